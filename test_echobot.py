"""The rules that echobot keeps, tried on real sockets: Messenger on one side of it, a stand-in for Graph on the other."""
import hashlib
import hmac
import http.client
import http.server
import json
import queue
import threading
import unittest
from contextlib import closing
from typing import NamedTuple

import echobot

WAIT = 10  # s: a bound on waits that end at once unless something is broken
SECRET, TOKEN = "app-secret", "page-token"


class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def pass_time(self, seconds):
        self.now += seconds


class Call(NamedTuple):
    """A request that reached the stand-in for Graph."""

    method: str
    path: str
    headers: dict
    body: bytes

    @property
    def recipient(self):
        return json.loads(self.body)["recipient"]["id"]

    @property
    def text(self):
        return json.loads(self.body)["message"]["text"]


ACCEPTED = 200, {}, b'{"recipient_id":"2","message_id":"m_out"}'


def error(code, status=400, headers=None, **more):
    """Return an answer of Graph's that refuses."""
    body = json.dumps({"error": dict(more, message="secret words", type="OAuthException", code=code, fbtrace_id="TR4CE")})
    return status, headers or {}, body.encode()


class Graph(http.server.ThreadingHTTPServer):
    """A stand-in for Graph: puts each call into `calls`, and answers what `answer(call)` returns.

    An answer is (status, headers, body), or None to close the connection without one.
    """

    request_queue_size = 1024

    def __init__(self, answer=lambda call: ACCEPTED):
        self.calls, self.answer, self.connections = queue.Queue(), answer, []
        super().__init__(("127.0.0.1", 0), GraphHandler)
        self.url = "http://127.0.0.1:%d/v26.0" % self.server_address[1]

    def process_request(self, request, client_address):
        self.connections.append(client_address)
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        """The bot may have gone in the middle: that is what some tests are about."""

    def texts(self):
        """Return the texts of the calls so far."""
        return [call.text for call in drain(self.calls)]


class GraphHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_call(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        call = Call(self.command, self.path, dict(self.headers), body)
        self.server.calls.put(call)
        answer = self.server.answer(call)
        if answer is None:
            self.close_connection = True
            return
        status, headers, body = answer
        self.send_response(status)
        for name, value in dict({"Content-Length": len(body)}, **headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = handle_call

    def log_message(self, *args):
        pass


def drain(items):
    """Return all that is in the queue `items` now."""
    taken = []
    while not items.empty():
        taken.append(items.get())
    return taken


def message(text="hello", mid="m_1", sender="2", **more):
    """Return a person's message as Messenger describes it."""
    return {"sender": {"id": sender}, "recipient": {"id": "1"}, "timestamp": 1458692752478,
            "message": dict({"mid": mid, "text": text}, **more)}


def delivery(*events, page="1"):
    """Return the payload of a delivery of `events`."""
    return {"object": "page", "entry": [{"id": page, "time": 1458692752478, "messaging": list(events)}]}


def sign(body, secret=SECRET):
    return {"X-Hub-Signature-256": "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}


class BotTest(unittest.TestCase):
    """Starts bots and stand-ins for Graph, and closes them."""

    def start_graph(self, answer=lambda call: ACCEPTED):
        graph = Graph(answer)
        threading.Thread(target=graph.serve_forever, args=(0.01,), daemon=True).start()
        self.addCleanup(graph.server_close)
        self.addCleanup(graph.shutdown)
        return graph

    def start_bot(self, graph=None, limits=None, clock=None, **settings):
        """Return a bot that serves: on a dry run without `graph`, else with a token and a secret."""
        if graph:
            settings = dict({"token": TOKEN, "secret": SECRET, "graph_url": graph.url}, **settings)
        settings = echobot.Settings(host="127.0.0.1", port=0)._replace(**settings)
        more = {"clock": clock} if clock else {}
        bot = echobot.make_server(settings, echobot.Limits()._replace(**limits or {}), proxies={}, **more)
        bot.thread = threading.Thread(target=bot.serve_forever, args=(0.01,), daemon=True)
        bot.thread.start()
        self.addCleanup(self.stop, bot)
        return bot

    def stop(self, bot):
        """Close `bot` as SIGTERM does: what it has under way is finished.  A second time does nothing."""
        if not bot.closed.is_set():
            bot.shutdown()
            bot.close()
            bot.thread.join(WAIT)

    def request(self, bot, method, path, body=None, headers=None):
        """Return the status, the headers and the text of an answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", bot.server_address[1], timeout=WAIT)) as connection:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read().decode("utf-8")

    def deliver(self, bot, payload, path="/"):
        """Return the status and the text that a signed delivery is answered."""
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        status, _, text = self.request(bot, "POST", path, body, sign(body))
        return status, text

    def deliver_in_background(self, bot, payload):
        """Return a queue that will hold the status of the delivery's answer."""
        answers = queue.Queue()
        threading.Thread(target=lambda: answers.put(self.deliver(bot, payload)[0]), daemon=True).start()
        return answers


class Delivery(BotTest):
    def test_a_signed_delivery_is_echoed_once_and_answered_ok(self):
        graph = self.start_graph()
        bot = self.start_bot(graph)
        self.assertEqual(self.deliver(bot, delivery(message("hello \U0001f600"))), (200, "ok"))
        call = graph.calls.get(timeout=WAIT)
        self.assertEqual(json.loads(call.body), {"recipient": {"id": "2"}, "messaging_type": "RESPONSE",
                                                 "message": {"text": "hello \U0001f600"}})
        self.assertTrue(call.body.isascii())
        self.stop(bot)
        self.assertTrue(graph.calls.empty())


if __name__ == "__main__":
    unittest.main()
