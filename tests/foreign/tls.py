"""A client in another language over mutual TLS: aio-msgpack-rpc, which takes any pair of
asyncio streams, on those of Python's own ssl. Run by tls.sh with the path of a kv54."""

import asyncio
import random
import socket
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path

from aio_msgpack_rpc import Client

KV54 = sys.argv[1]
NAMES = ["alice", "bob", "carol"]


def free_ports(count):
    """Ports in a row, below those that the system hands out."""
    while True:
        first = random.randrange(12_000, 31_900)
        ports = range(first, first + count)
        try:
            for port in ports:
                socket.create_server(("127.0.0.1", port)).close()
            return ports
        except OSError:
            continue


def openssl(arguments):
    command = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", *arguments.split()]
    subprocess.run(command, cwd=here, check=True, capture_output=True)


def context():
    """Believes the ca alone, and shows the certificate of this host."""
    tls = ssl.create_default_context(cafile=here / "ca.pem")
    tls.load_cert_chain(here / "host.pem", here / "host.key")
    return tls


async def dial(name, tls):
    return await asyncio.open_connection("127.0.0.1", ports[name], ssl=tls, server_hostname=name)


async def story():
    alice, bob = [Client(*await dial(name, context())) for name in ["alice", "bob"]]
    assert await alice.call("set", "tea", "green", timeout=10) is None
    assert await bob.call("get", "tea", timeout=10) == "green"
    large = "green " * 170_000
    await alice.call("set", "pot", large, timeout=10)
    assert await bob.call("get", "pot", timeout=10) == large
    alice.close()
    bob.close()
    version = ssl.OPENSSL_VERSION
    print(f"Python {sys.version.split()[0]} with {version}: set at alice, got at bob")

    # The name is checked, whatever the address.
    ports["dave"] = ports["alice"]
    try:
        await dial("dave", context())
        raise AssertionError("dave was believed")
    except ssl.SSLCertVerificationError as error:
        print("as dave:", error.verify_message)

    anonymous = ssl.create_default_context(cafile=here / "ca.pem")
    reader, writer = await dial("alice", anonymous)
    try:
        await reader.read()
        raise AssertionError("nobody was let in")
    except ssl.SSLError as error:
        print("without a certificate:", error.reason)


with tempfile.TemporaryDirectory() as directory:
    here = Path(directory)
    ports = dict(zip(NAMES, free_ports(len(NAMES))))
    openssl("-subj /CN=ca -addext keyUsage=critical,keyCertSign -keyout ca.key -out ca.pem")
    san = ",".join(f"DNS:{name}" for name in NAMES)
    openssl(
        f"-subj /CN=host -addext subjectAltName={san} -addext basicConstraints=critical,CA:false"
        " -CA ca.pem -CAkey ca.key -keyout host.key -out host.pem"
    )
    nodes = "".join(f'{name} = "127.0.0.1:{port}"\n' for name, port in ports.items())
    table = 'ca = "ca.pem"\ncert = "host.pem"\nkey = "host.key"\n'
    (here / "cluster.toml").write_text(f"[nodes]\n{nodes}[tls]\n{table}")
    ring = subprocess.Popen([KV54, "serve", "--all"], cwd=here)
    try:
        wait = [KV54, "status", "--wait", "--timeout", "30s"]
        subprocess.run(wait, cwd=here, check=True, stdout=subprocess.DEVNULL)
        asyncio.run(story())
    finally:
        ring.terminate()
        ring.wait()
