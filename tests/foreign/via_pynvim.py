"""pynvim's session layer, on which nothing of Neovim is needed; text is str, bytes are bin."""

import greenlet
from pynvim.msgpack_rpc import tcp_session

import story


class Refused(Exception):
    pass


class Client:
    refused = Refused
    strict = True
    gone = (EOFError, OSError)

    def __init__(self, port):
        self.session = tcp_session("127.0.0.1", port)
        self.session.error_wrapper = Refused  # its own wants [type, text], as Neovim has it

    def call(self, method, *params):
        return self.session.request(method, *params)

    def pipelined(self, requests):
        """All are sent before the first answer is read: each waits in a greenlet of its own."""
        answers = {}

        def ask(number, request):
            answers[number] = self.call(*request)
            if len(answers) == len(requests):
                self.session.stop()

        def ask_all():
            for number, request in enumerate(requests):
                greenlet.greenlet(ask).switch(number, request)

        self.session.run(None, None, ask_all)
        return [answers[number] for number in range(len(requests))]

    def seen(self, value):
        return value


story.run(Client)
