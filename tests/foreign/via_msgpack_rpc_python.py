"""msgpack-rpc-python of 2013: it knows raw strings only, as MessagePack had them in 2009."""

import ssl

# Its tornado looks for what Python 3.12 has taken out, and would use it for TLS only.
ssl.match_hostname = getattr(ssl, "match_hostname", None)

import msgpackrpc
from msgpackrpc.error import RPCError, TimeoutError, TransportError

import story


class Client:
    refused = RPCError
    strict = False
    gone = (TimeoutError, TransportError)  # it may not notice that a node is gone

    def __init__(self, port):
        self.client = msgpackrpc.Client(msgpackrpc.Address("127.0.0.1", port), timeout=10)

    def call(self, method, *params):
        return self.client.call(method, *params)

    def pipelined(self, requests):
        futures = [self.client.call_async(*request) for request in requests]
        return [future.get() for future in futures]

    def seen(self, value):
        """Every string is raw bytes to it."""
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, list):
            return [self.seen(item) for item in value]
        if isinstance(value, dict):
            return {self.seen(key): self.seen(item) for key, item in value.items()}
        return value


story.run(Client)
