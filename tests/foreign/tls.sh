#!/usr/bin/env bash
# Runs tls.py against a kv54 with TLS. Its client is installed into target/, by pip.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
cargo test --locked --features tls --test tls --no-run # which builds kv54, too
venv=$target/foreign-tls
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check aio-msgpack-rpc==0.2.0
timeout 120 "$venv/bin/python" tests/foreign/tls.py "$target/debug/kv54"
