"""What every client does, whoever wrote it.

A client has `call(method, *params)`, `pipelined(requests)`, `refused` (its error for an
answer that is one), `gone` (its errors for a node that is no more), `seen(value)` (how a
value looks to it) and `strict` (it takes a str only if that is UTF-8).
"""

import os
import signal
import sys

MIB = 1 << 20
RAW = ["msgpack_rpc_python", "neovim"]  # they write bytes as raw, which is a str today
VALUES = [
    "green", "grün", "x" * 31, "x" * 32, "x" * 255, "x" * 256, "x" * 65_536, "", "x" * MIB,
    b"\xff", b"\x00\xff" * 150, b"", b"\xff" * MIB,
    0, 1, -1, 127, 128, -32, -33, 65_536, 2**32, 2**63 - 1, -(2**63), 2**64 - 1,
    0.0, 1.5, -0.1, 1e300, float("inf"),
    True, False,
    [], [1, None, [2.5, "grün", b"\xff"]], list(range(1000)),
    {}, {"leaves": [1, 2], "old": None, "inner": {"a": b"\xff"}},
]


def run(connect):
    """`story PORT OTHER_PORT PID NAME` or `finds PORT NAME...`."""
    what, port, *rest = sys.argv[1:]
    client = connect(int(port))
    if what == "story":
        other_port, pid, name = rest
        story(client, name)
        os.kill(int(pid), signal.SIGKILL)
        raises(client.gone, client, "get", "tea")
        goes_on(connect(int(other_port)), name)
    else:
        for name in rest:
            finds(client, name)


def story(client, name):
    for value in VALUES:
        same(client.call("set", "tea", value), None, value)
        same(client.call("get", "tea"), client.seen(value), value)
    same(client.call("delete", "tea"), None, "delete")
    same(client.call("get", "tea"), None, "a deleted key")
    same(client.call("get", "never set"), None, "a missing key")
    client.call("set", "tea", "green")
    client.call("set", "tea", None)
    same(client.call("get", "tea"), None, "nil")

    raises(client.refused, client, "steep", "tea", says="no-such-method: ")
    raises(client.refused, client, "get", says="bad-request: ")
    raises(client.refused, client, "set", "tea", "x" * (MIB + 1), says="too-large: ")
    raises(client.refused, client, "set", "tea", b"\xff" * (MIB + 1), says="too-large: ")

    same(client.call("cas", "tea", None, "green"), [True, None], "cas")
    same(client.call("cas", "tea", "black", "white"), [False, client.seen("green")], "another value")
    same(client.call("cas", "tea", b"green", None), [True, None], "bytes are equal to text")
    same(client.call("incr", "tea"), 1, "incr")
    same(client.call("incr", "tea", -3), -2, "incr by -3")
    client.call("delete", "tea")

    sets = [("set", f"{name} {n}", n) for n in range(100)]
    same(client.pipelined(sets), [None] * 100, "100 sets")
    gets = [("get", f"{name} {n}") for n in range(100)]
    same(client.pipelined(gets), list(range(100)), "100 gets")

    client.call("set", f"text of {name}", f"grün of {name}")
    client.call("set", b"\xff of " + name.encode(), b"\xff\xfe of " + name.encode())


def goes_on(client, name):
    finds(client, name)
    gets = [("get", f"{name} {n}") for n in range(100)]
    same(client.pipelined(gets), list(range(100)), "100 gets after a node was killed")
    client.call("set", "tea", "black")
    same(client.call("get", "tea"), client.seen("black"), "a set after a node was killed")


def finds(client, name):
    """What a client has left: a key is its bytes, sent as str, as bin or as raw."""
    for key in [f"text of {name}", f"text of {name}".encode()]:
        same(client.call("get", key), client.seen(f"grün of {name}"), key)
    if name in RAW and client.strict:
        return  # a node keeps the raw as it came
    key = b"\xff of " + name.encode()
    same(client.call("get", key), client.seen(b"\xff\xfe of " + name.encode()), key)


def same(got, wanted, what):
    if type(got) is not type(wanted) or got != wanted:
        sys.exit(f"{short(what)}: {short(got)} came, {short(wanted)} was wanted")


def raises(errors, client, method, *params, says=""):
    try:
        got = client.call(method, *params)
    except errors as error:
        if says in str(error):
            return
        sys.exit(f"{method}: {says!r} was to be said, not {error!r}")
    sys.exit(f"{method}: {short(got)} came, an error was wanted")


def short(value):
    text = repr(value)
    return text if len(text) < 200 else f"{text[:100]}… ({len(text)} characters)"
