"""aio-msgpack-rpc: asyncio; text is str, bytes are bin."""

import asyncio

import aio_msgpack_rpc
from aio_msgpack_rpc.error import RPCResponseError

import story


class Client:
    refused = RPCResponseError
    strict = True
    gone = (OSError, asyncio.TimeoutError)  # it does not notice that a node is gone

    def __init__(self, port):
        self.loop = asyncio.new_event_loop()
        streams = self.loop.run_until_complete(asyncio.open_connection("127.0.0.1", port))
        self.client = aio_msgpack_rpc.Client(*streams, loop=self.loop, response_timeout=10)

    def call(self, method, *params):
        return self.loop.run_until_complete(self.client.call(method, *params))

    def pipelined(self, requests):
        async def all_at_once():
            return await asyncio.gather(*(self.client.call(*request) for request in requests))

        return self.loop.run_until_complete(all_at_once())

    def seen(self, value):
        return value


story.run(Client)
