"""The rules that echobot keeps, on real sockets: Messenger on one side of it, a stand-in for Graph on the other."""
import concurrent.futures
import contextlib
import copy
import email.utils
import errno
import functools
import hashlib
import hmac
import http.client
import http.server
import io
import itertools
import json
import logging
import os
import queue
import random
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import urllib.parse
from contextlib import closing
from typing import NamedTuple

import echobot

SORRY = "I can't echo this"
WAIT = 30  # s: a bound on waits that end at once unless something is broken
SECRET, TOKEN = "app-secret", "page-token"
FOLDER = tempfile.TemporaryDirectory()
PYTHON = sys.executable, "-S"  # without what is installed on this machine


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
    body = json.dumps({"error": dict(more, message="secret words", type="OAuthException", code=code,
                                     fbtrace_id="TR4CE")})
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


def echo(message):
    """The bot of the tests.  What `echobot.reply` says is for `Words` to test, and for you to change."""
    return message["text"] or SORRY


@functools.lru_cache(maxsize=None)
def program(body="return message['text'] or %r" % SORRY):
    """Return the path of a copy of the program, alone in its folder, whose `reply` has this body."""
    with open(echobot.__file__, encoding="utf-8") as file:
        text, count = re.subn(r"(?ms)^def reply\(.*?(?=^\S)", "def reply(message):\n    %s\n\n\n" % body, file.read())
    assert count == 1
    path = os.path.join(tempfile.mkdtemp(dir=FOLDER.name), "echobot.py")
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def tearDownModule():
    FOLDER.cleanup()


class Words(unittest.TestCase):
    """What the bot says: change it with `echobot.reply`.  No other test depends on it."""

    def test_a_text_is_said_back_and_anything_else_is_answered_with_an_excuse(self):
        self.assertEqual(echobot.reply({"mid": "m_1", "text": "hello"}), "hello")
        self.assertEqual(echobot.reply({"mid": "m_1", "text": "", "attachments": [{"type": "image"}]}), SORRY)


class BotTest(unittest.TestCase):
    """Starts bots and stand-ins for Graph, and closes them."""

    def start_graph(self, answer=lambda call: ACCEPTED):
        graph = Graph(answer)
        threading.Thread(target=graph.serve_forever, args=(0.01,), daemon=True).start()
        self.addCleanup(graph.server_close)
        self.addCleanup(graph.shutdown)
        return graph

    def start_bot(self, graph=None, limits=None, clock=time.monotonic, reply=echo, **settings):
        """Return a bot that serves: on a dry run without `graph`, else with a token and a secret."""
        if graph:
            settings = dict({"token": TOKEN, "secret": SECRET, "graph_url": graph.url}, **settings)
        settings = echobot.Settings(host="127.0.0.1", port=0)._replace(**settings)
        bot = echobot.make_server(settings, echobot.Limits()._replace(**limits or {}), clock, {}, reply)
        bot.thread = threading.Thread(target=bot.serve_forever, daemon=True)
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

    def until(self, condition):
        """Wait until `condition()` holds."""
        for _ in range(WAIT * 1000):
            if condition():
                return
            threading.Event().wait(0.001)
        self.fail("waited in vain")

    def deliver_in_background(self, bot, payload):
        """Return a queue that will hold the status of the delivery's answer."""
        answers = queue.Queue()
        threading.Thread(target=lambda: answers.put(self.bring(bot, payload)), daemon=True).start()
        return answers

    def bring(self, bot, payload):
        """Return the status that a delivery is answered, or None if `bot` is gone."""
        try:
            return self.deliver(bot, payload)[0]
        except (OSError, http.client.HTTPException):
            return None


class MadeYours(BotTest):
    """The program with another `reply`, as its users make it; a process, for its stack is what bugs meet there."""

    def start_yours(self, body):
        """Return the address of a dry run whose `reply` has this body."""
        process = subprocess.Popen([*PYTHON, program(body), "--host", "127.0.0.1", "--port", "0"],
                                   stderr=subprocess.PIPE)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)
        port = int(re.search(rb":(\d+),", process.stderr.readline()).group(1))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        return types.SimpleNamespace(server_address=("127.0.0.1", port))

    def test_reply_has_room_for_100_nested_calls_and_a_bug_in_it_gets_500_and_stops_nothing_else(self):
        bot = self.start_yours("nest = lambda left: left == 1 or nest(left - 1); "
                               "return {'deep': 'hi' if nest(99) else '', 'five': 5, 'neighbour': 'hi'}"
                               ".get(message['text']) or sorted('ab', key=lambda x: reply(message))")
        for text, status in ("deep", 200), ("five", 500), ("recursion", 500):
            with self.subTest(text):
                answer = self.deliver(bot, delivery(message("neighbour", "m_%s_1" % text), message(text, "m_" + text)))
                self.assertEqual((answer[0], self.request(bot, "GET", "/healthz")[0]), (status, 200))


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


VERIFY = "my_voice_is_my_password_verify_me"
WRONG_TOKEN = 403, "Error, wrong validation token"


def hub(**parameters):
    """Return the query of a webhook verification: hub(challenge=1) is "?hub.challenge=1"."""
    return "?" + urllib.parse.urlencode({"hub." + name: value for name, value in parameters.items()})


def event(kind, content, **more):
    """Return an event as Messenger describes it; what is None in `more` it lacks."""
    whole = dict({"sender": {"id": "2"}, "recipient": {"id": "1"}, "timestamp": 1458692752478, kind: content}, **more)
    return {name: value for name, value in whole.items() if value is not None}


def of(**message):
    """Return the event of a message with a mid and what is given."""
    return event("message", dict(message, mid="m"))


def attached(kind, **payload):
    return {"attachments": [{"type": kind, "payload": payload or {"url": "U"}}]}


def units(text):
    """Return the length of `text` in UTF-16 code units."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


class RuleTest(BotTest):
    """What the tests of the rules share."""

    def get(self, bot, target):
        status, _, text = self.request(bot, "GET", target)
        return status, text

    def raw(self, bot, request):
        """Return all that is answered to `request`, which need not be one that http.client would send."""
        with closing(socket.create_connection(bot.server_address, WAIT)) as connection:
            connection.sendall(request.encode())
            with connection.makefile("rb") as answer:
                return answer.read().decode()

    def echoes(self, payloads, **settings):
        """Return, for each of `payloads`, how it was answered and the texts that were sent for it."""
        graph = self.start_graph()
        bot = self.start_bot(graph, **settings)
        results = [(self.deliver(bot, payload), graph.texts()) for payload in payloads]
        self.stop(bot)
        self.assertEqual(graph.texts(), [], "sent after the last answer")
        return results

    def logged(self, action, *arguments):
        """Return what `action` returns and the lines that it logs; no bug is among them."""
        with self.assertLogs("echobot", "DEBUG") as logs:
            echobot.log.debug("assertLogs wants a line")
            result = action(*arguments)
        self.assertEqual([line for line, record in zip(logs.output, logs.records) if record.exc_info], [])
        return result, [record.getMessage() for record in logs.records[1:]]

    def assert_unsaid(self, said, *secrets):
        for secret in filter(None, secrets):
            self.assertNotIn(secret, said)
            self.assertNotIn(urllib.parse.quote_plus(secret), said)


class Verification(RuleTest):
    def test_the_right_token_gets_the_challenge_back(self):
        bot = self.start_bot(verify_token="TOKEN")
        documented = "?hub.verify_token=TOKEN&hub.challenge=CHALLENGE_ACCEPTED&hub.mode=subscribe"
        challenges = "1158201444", "", "żółć \U0001f600 \u05e9\u05dc", " a&b=c+d;e%41/?#\r\n", "<b>hi</b>"
        for query, challenge in [(documented, "CHALLENGE_ACCEPTED"), (hub(verify_token="TOKEN"), "")] + [
                (hub(verify_token="TOKEN", challenge=challenge), challenge) for challenge in challenges]:
            for path in "/", "/webhook":
                with self.subTest(path + query):
                    self.assertEqual(self.get(bot, path + query), (200, challenge))

    def test_a_wrong_verification_is_refused_and_logged_with_what_differs_and_neither_token(self):
        bot = self.start_bot()
        right = dict(mode="subscribe", challenge="c", verify_token=VERIFY)
        for name, parameters, differs in [
            ("a browser", {}, "verify_token"), ("no token", dict(mode="subscribe", challenge="c"), "verify_token"),
            ("an empty token", dict(right, verify_token=""), "verify_token"),
            ("another token", dict(right, verify_token="hunter2"), "verify_token"),
            ("its beginning", dict(right, verify_token=VERIFY[:-1]), "verify_token"),
            ("more than it", dict(right, verify_token=VERIFY + "!"), "verify_token"),
            ("another case", dict(right, verify_token=VERIFY.upper()), "verify_token"),
            ("a non-ASCII token", dict(right, verify_token="pässwörd \U0001f600"), "verify_token"),
            ("another mode", dict(right, mode="unsubscribe"), "mode"), ("an empty one", dict(right, mode=""), "mode"),
        ]:
            with self.subTest(name):
                answer, (line,) = self.logged(self.get, bot, "/webhook" + hub(**parameters))
                self.assertEqual(answer, WRONG_TOKEN)
                self.assertIn("hub." + differs, line)
                self.assert_unsaid(line, VERIFY, parameters.get("verify_token"))

    def test_a_token_is_compared_as_what_it_means_however_it_is_escaped(self):
        token = "пароль & +%41\U0001f600"
        bot = self.start_bot(verify_token=token)
        escaped = "".join("%%%02x" % byte for byte in token.encode())
        for given in urllib.parse.quote_plus(token), escaped, "пароль%20%26%20%2B%2541\U0001f600":
            with self.subTest(given):
                answer = self.raw(bot, "GET /?hub.verify_token=%s&hub.challenge=7 HTTP/1.0\r\n\r\n" % given)
                self.assertRegex(answer, r"(?s)\AHTTP/1.1 200 .*\r\n\r\n7\Z")
        for given in "пароль".encode(), b"\xff", token.replace("+", " ").encode():
            with self.subTest(given):
                answer, _ = self.logged(self.get, bot, "/" + hub(verify_token=given))
                self.assertEqual(answer, WRONG_TOKEN)

    def test_every_answer_is_plain_text_that_no_browser_sniffs_and_names_no_server(self):
        bot = self.start_bot(secret=SECRET)
        right, wrong = "/" + hub(verify_token=VERIFY, challenge="<b>hi</b>"), "/webhook" + hub(challenge="<b>hi</b>")
        good, bad = json.dumps(delivery(message("<b>hi</b>"))).encode(), b"<b>no JSON</b>"
        for status, method, target, body, fields, text in [
            (200, "GET", right, None, {}, "<b>hi</b>"), (200, "HEAD", right, None, {}, ""),
            (403, "GET", wrong, None, {}, WRONG_TOKEN[1]), (403, "HEAD", wrong, None, {}, ""),
            (200, "GET", "/healthz", None, {}, "ok"), (200, "HEAD", "/healthz", None, {}, ""),
            (200, "POST", "/webhook", good, sign(good), "ok"), (400, "POST", "/", bad, sign(bad), None),
            (403, "POST", "/", bad, {}, None),
            (404, "GET", "/<b>", None, {}, None), (405, "DELETE", "/", None, {}, None),
        ]:
            with self.subTest(method + " " + target, status=status):
                (got, headers, said), _ = self.logged(self.request, bot, method, target, body, fields)
                self.assertEqual((got, headers["Server"]), (status, None))
                self.assertEqual(headers.get_content_type(), "text/plain")
                self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
                self.assertIn(text, (None, said))

    def test_head_is_get_without_the_body(self):
        bot = self.start_bot()
        for target in "/" + hub(verify_token=VERIFY, challenge="żółć"), "/healthz", "/webhook", "/nowhere":
            with self.subTest(target):
                answers = [self.logged(self.raw, bot, "%s %s HTTP/1.0\r\n\r\n" % (method, target))[0]
                           for method in ("HEAD", "GET")]
                head, get = (answer.split("\r\n\r\n") for answer in answers)
                self.assertEqual(head[1:], [""])
                self.assertEqual(*(re.sub("Date:.*", "", fields) for fields, _ in (head, get)))
                self.assertIn("Content-Length: %d" % len(get[1].encode()), head[0])


EVENTS = [
    ("text", of(text="hi"), "hi"),
    ("white space", of(text=" "), " "),
    ("quick reply", of(text="Red", quick_reply={"payload": "P"}), "Red"),
    ("reply to a message", of(text="yes", reply_to={"mid": "m_0"}), "yes"),
    ("command", of(text="/flights", commands=[{"name": "flights"}]), "/flights"),
    ("text with a referral and nlp", of(text="hi", referral={"ref": "R"}, nlp={"entities": {}}), "hi"),
    ("fallback", of(text="t", attachments=[{"type": "fallback", "payload": None}]), "t"),
    ("sticker", of(**attached("sticker", url="U", sticker_id=369239263222822)), SORRY),
    ("no content", of(), SORRY),
    ("null text", of(text=None, **attached("image")), SORRY),
    ("empty text", of(text=""), SORRY),
    ("no mid", event("message", {"text": "hi"}), "hi"),
    ("no timestamp", dict(of(text="hi"), timestamp=None), "hi"),
    ("no recipient", dict(of(text="hi"), recipient=None), "hi"),
    ("postback", event("postback", {"mid": "m", "title": "T", "payload": "P", "referral": {"ref": "R"}}), "T"),
    ("postback without a mid", event("postback", {"title": "T", "payload": "P"}), "T"),
    ("postback without a title", event("postback", {"mid": "m", "payload": "P"}), SORRY),
    ("postback by a user_ref", event("postback", {"mid": "m", "title": "T"}, sender={"user_ref": "R"}), None),
    ("echo", of(is_echo=True, app_id=1517776481860111, metadata="s", text="hi"), None),
    ("echo from the page", dict(of(is_echo=True, text="hi"), sender={"id": "1"}), None),
    ("deleted", of(is_deleted=True), None),
    ("from entry.id", dict(of(text="hi"), sender={"id": "1"}, recipient={"id": "7"}), None),
    ("from recipient.id", dict(of(text="hi"), sender={"id": "7"}, recipient={"id": "7"}), None),
    ("no sender", event("message", {"mid": "m", "text": "hi"}, sender=None), None),
    ("no sender.id", dict(of(text="hi"), sender={}), None),
    ("empty sender.id", dict(of(text="hi"), sender={"id": ""}), None),
    ("a list as sender.id", dict(of(text="hi"), sender={"id": ["2"]}), None),
    ("true as sender.id", dict(of(text="hi"), sender={"id": True}), None),
    ("edit", event("message_edit", {"mid": "m", "text": "t", "num_edit": 1}), None),
    ("reaction", event("reaction", {"reaction": "love", "emoji": "\u2764\ufe0f", "action": "react"}), None),
    ("delivery", event("delivery", {"mids": ["m"], "watermark": 1}, timestamp=None), None),
    ("delivery without mids", event("delivery", {"watermark": 1}, timestamp=None), None),
    ("read", event("read", {"watermark": 1}), None),
] + [
    (kind, of(**attached(kind)), SORRY)
    for kind in "image audio video file reel ig_reel post template location appointment_booking of_the_future".split()
] + [
    (kind, event(kind, {"mid": "m", "text": "t", "title": "T"}), None)
    for kind in "typing optin referral account_linking pass_thread_control take_thread_control of_the_future "
                "request_thread_control response_feedback order game_play messaging_feedback".split()
] + [
    (kind, event(kind, {"1": ["R"]}, sender=None), None) for kind in ("app_roles", "policy_enforcement")
]

STRANGE = None, True, -1.5, "x", [], {}, ["x"], {"id": {"id": "2"}, "text": 5, "title": []}


def broken(value):
    """Yield `value` with each thing in it left out, or with something strange in its place."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        changed = copy.copy(value)
        for changed[key] in itertools.chain(STRANGE, broken(item)):
            yield copy.copy(changed)
        del changed[key]
        yield changed


class Events(RuleTest):
    def test_each_event_gets_the_reply_of_the_table_or_none(self):
        def apart(number, event):  # a mid and a person that no other event has
            text = json.dumps(event).replace('"m"', '"m%d"' % number)
            return json.loads(text.replace('{"id": "2"}', '{"id": "2%d"}' % number))

        payloads = [delivery(apart(number, event)) for number, (_, event, _) in enumerate(EVENTS)]
        for (name, _, reply), result in zip(EVENTS, self.echoes(payloads)):
            with self.subTest(name):
                self.assertEqual(result, ((200, "ok"), [] if reply is None else [reply]))

    def test_every_event_of_every_entry_is_looked_at(self):
        payload = {"object": "page", "entry": [
            {"id": "1", "messaging": [message("a", "m_a", "2"), message("b", "m_b", "3"), message("c", "m_c", "2")]},
            {"id": "1", "changes": [{"field": "feed"}]}, {"id": "1"}, {"id": "1", "messaging": []},
            {"id": "8", "messaging": [message("d", "m_d", "4"), event("read", {"watermark": 1})]}]}
        (answer, texts), = self.echoes([payload])
        self.assertEqual((answer, sorted(texts)), ((200, "ok"), ["a", "b", "c", "d"]))

    def test_what_is_not_the_bots_is_acknowledged_and_sends_nothing(self):
        entry = delivery(message())["entry"]
        rows = [("standby", {"object": "page", "entry": [{"id": "1", "standby": [message()]}]}),
                ("changes", {"object": "page", "entry": [{"id": "1", "changes": [{"field": "feed", "value": {}}]}]}),
                ("an unknown object", {"object": "instagram", "entry": entry}), ("no object", {"entry": entry}),
                ("the documentation's", {"object": "page", "entry": [{"messaging": [{"message": "TEST_MESSAGE"}]}]}),
                ("no entry", {"object": "page"}), ("nothing", {})]
        for name, payload in rows:
            with self.subTest(name):
                results, lines = self.logged(self.echoes, [payload])
                self.assertEqual(results, [((200, "ok"), [])])
                self.assertEqual("not about a page" in "".join(lines), payload.get("object") != "page")

    def test_a_broken_event_is_logged_and_skipped_and_does_not_cost_its_neighbours(self):
        events = "x", 5, [], None, {"message": "TEST_MESSAGE"}, message(text=5), message(text=["hi"])
        payloads = [delivery(message("before", "b%d" % number, "3"), event, message("after", "a%d" % number, "4"))
                    for number, event in enumerate(events)]
        results, lines = self.logged(self.echoes, payloads)
        for event, (answer, texts) in zip(events, results):
            with self.subTest(event=event):
                self.assertEqual((answer, sorted(texts)), ((200, "ok"), ["after", "before"]))
        self.assertEqual(len([line for line in lines if "skipped" in line]), len(events))

    def test_whatever_is_wrong_with_an_event_its_neighbours_are_answered(self):
        bad = [*STRANGE, *broken(message(quick_reply={"payload": "P"}, **attached("image"))),
               *broken(event("postback", {"mid": "m", "title": "T", "payload": "P"}))]
        names = ["%03d" % number for number, _ in enumerate(bad)]
        good = [message(name, "good" + name, "person" + name) for name in names]
        payload = delivery(*itertools.chain.from_iterable(zip(good, bad)))
        ((answer, texts),), _ = self.logged(self.echoes, [payload])
        self.assertEqual((answer, sorted(text for text in texts if text in names)), ((200, "ok"), names))

    def test_whatever_is_wrong_with_a_delivery_it_is_acknowledged(self):
        bot = self.start_bot()
        for number, payload in enumerate(broken(delivery(message("hi")))):
            with self.subTest(payload=payload):
                body = json.dumps(payload).replace('"m_1"', '"m%d"' % number).encode()
                self.assertEqual(self.logged(self.deliver, bot, body)[0], (200, "ok"))


class Json(RuleTest):
    def test_what_is_not_a_json_object_is_answered_400_with_a_line_of_text(self):
        good = json.dumps(delivery(message("h\u00e9", "m_x")), ensure_ascii=False)
        bot = self.start_bot()
        for name, body in [
            ("empty", b""), ("white space", b" \n"), ("bytes", b"\xff\xfe\x00"), ("Latin-1", good.encode("latin-1")),
            ("UTF-16", good.encode("utf-16")), ("a surrogate in UTF-8", b'{"object": "\xed\xa0\xbd"}'),
            ("no JSON", b"hello"), ("a form", b"object=page&entry=1"), ("cut off", good[:-1].encode()),
            ("more than one", good.encode() * 2), ("Python's quotes", b"{'object': 'page'}"),
            ("NaN", b'{"object": NaN}'), ("Infinity", b'{"object": [-Infinity]}'),
            ("a list", b"[" + good.encode() + b"]"), ("a string", b'"page"'), ("a number", b"5"), ("null", b"null"),
            ("deep", b"[" * 100000), ("deep and whole", b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
            ("deep objects", b'{"a":' * 5000), ("deep after a quote", b'{"a": "\\"", "b": ' + b"[" * 5000),
            ("deep after a backslash", b'{"a": "\\\\", "b": ' + b"[" * 5000),
            ("deep after both", b'{"a": "\\\\\\"]]", "b\\\\": ' + b"[" * 5000),
        ]:
            with self.subTest(name):
                (status, text), _ = self.logged(self.deliver, bot, body)
                self.assertEqual(status, 400)
                self.assertRegex(text, r"\A[ -~]{5,}\Z")
        self.assertEqual(self.deliver(bot, good.encode()), (200, "ok"), "the bot has survived")

    def test_json_is_read_as_it_is_meant(self):
        reads = [event("read", {"watermark": number}) for number in range(500)]
        text = "h\u00e9 \U0001f600"
        for name, payload, text in [
            ("flat, with many events", delivery(*reads, message("at last")), "at last"),
            ("brackets in a text", delivery(message('[{"\\' * 400)), '[{"\\' * 400),
            ("UTF-8", json.dumps(delivery(message("h\u00e9 \U0001f600")), ensure_ascii=False).encode(), text),
            ("a long number", json.dumps(delivery(message("?"), {"x": 5})).replace("5}", "5" * 5000 + "}").encode(),
             "?"),
            ("escapes", json.dumps(delivery(message("?"))).replace("?", r"h\u00e9 \uD83d\ude00").encode(), text),
        ]:
            with self.subTest(name):
                self.assertEqual(self.echoes([payload]), [((200, "ok"), [text])])


class Signature(RuleTest):
    def test_unsigned_delivery_is_refused_unread_and_sends_nothing_and_is_logged_with_what_is_wrong(self):
        graph = self.start_graph()
        bot = self.start_bot(graph)
        for body in json.dumps(delivery(message("unsigned"))).encode(), b"\xff no JSON", b"[" * 100000:
            right = sign(body)["X-Hub-Signature-256"]
            for name, value, wrong in [
                ("none", None, "missing"), ("empty", "", "malformed"), ("no digest", "sha256=", "malformed"),
                ("no prefix", right[7:], "malformed"), ("another prefix", "SHA" + right[3:], "malformed"),
                ("SHA-1 in its place", "sha1=" + "0" * 40, "malformed"),
                ("too short", right[:-1], "malformed"), ("too long", right + "0", "malformed"),
                ("no hex", "sha256=" + "g" * 64, "malformed"), ("non-ASCII", "sha256=" + "\xe9" * 64, "malformed"),
                ("a guess", "sha256=" + "0" * 64, "APP_SECRET"),
                ("another secret", sign(body, "another")["X-Hub-Signature-256"], "APP_SECRET"),
                ("no secret", sign(body, "")["X-Hub-Signature-256"], "APP_SECRET"),
                ("another body", sign(body + b" ")["X-Hub-Signature-256"], "APP_SECRET"),
            ]:
                with self.subTest(name, body=body[:20]):
                    fields = {} if value is None else {"X-Hub-Signature-256": value}
                    fields["X-Hub-Signature"] = "sha1=" + hmac.new(SECRET.encode(), body, hashlib.sha1).hexdigest()
                    (status, _, _), (line,) = self.logged(self.request, bot, "POST", "/webhook", body, fields)
                    self.assertEqual(status, 403)
                    self.assertEqual([why for why in ("missing", "malformed", "APP_SECRET") if why in line], [wrong])
                    self.assert_unsaid(line, SECRET, right[7:])
        self.stop(bot)
        self.assertTrue(graph.calls.empty())

    def test_a_signature_in_upper_case_is_the_same_number(self):
        graph = self.start_graph()
        body = json.dumps(delivery(message())).encode()
        fields = {"X-Hub-Signature-256": "sha256=" + sign(body)["X-Hub-Signature-256"][7:].upper()}
        self.assertEqual(self.request(self.start_bot(graph), "POST", "/", body, fields)[0], 200)
        self.assertEqual(graph.texts(), ["hello"])

    def test_without_a_secret_a_delivery_is_taken_from_anybody(self):
        payloads = [delivery(message(mid=mid)) for mid in ("m_1", "m_2")]  # signed with SECRET, which the bot has not
        self.assertEqual(self.echoes(payloads, secret=""), [((200, "ok"), ["hello"])] * 2)


class Texts(RuleTest):
    def test_a_text_arrives_character_for_character_in_as_many_messages_as_it_needs(self):
        texts = ["\U0001f600\U0001f44d\U0001f3fd", "\u05e9\u05dc\u05d5\u05dd \u200fabc\u202e", "e\u0301\u0323 \u00e9",
                 "\0", "a\0b\x1b[31m\x7f", "one\ntwo\r\nthree\r\u2028\x85", "\"'`\\\\n%s{}<b>&amp;", "\ud83d",
                 "a\ude00\ud83db", " \t both ends\u3000\n ", "\ufeff", "\uffff\U0010ffff", "null", "x" * 2000,
                 "x" * 20000, "\U0001f600" * 10000, "word " * 4000]
        results = self.echoes(delivery(message(text, "m_%d" % number)) for number, text in enumerate(texts))
        for text, (answer, sent) in zip(texts, results):
            with self.subTest(text[:20]):
                self.assertEqual((answer, "".join(sent)), ((200, "ok"), text))
                self.assertEqual(len(sent), -(-units(text) // 2000))

    def test_a_long_text_goes_out_in_order(self):
        text = " ".join(map(str, range(3000)))
        (answer, sent), = self.echoes([delivery(message(text))])
        self.assertEqual((answer, "".join(sent)), ((200, "ok"), text))
        self.assertEqual([piece for piece in sent[:-1] if piece[-1] != " " or not 1000 < units(piece) <= 2000], [])


class Pieces(unittest.TestCase):
    def test_pieces_are_the_text_and_none_is_too_long_or_empty(self):
        dice = random.Random(1)
        alphabet = ["a", "word ", "\n", "\u3000", "e\u0301", "\u0301", "\U0001f600", "\U0001f469\u200d\U0001f469",
                    "\u200d", "\ufe0f", "\U0001f3fd", "\U0001f1e8", "\U0001f1e8\U0001f1ed", "\ud83d", "\ude00"]
        for number in range(80):
            some = dice.sample(alphabet, dice.randint(1, 5))
            text = "".join(dice.choices(some, k=dice.choice([1, 700, 2000, 3000])))
            with self.subTest(number, some=some):
                cut = echobot.pieces(text)
                self.assertEqual("".join(cut), text)
                self.assertEqual([piece for piece in cut if not 0 < units(piece) <= 2000], [])
                self.assertLessEqual(len(cut), 2 + units(text) // 990, "pieces of less than half a message")

    def test_a_text_is_cut_where_the_rules_say(self):
        letter = "\U0001f1e8"
        for name, text, lengths in [
            ("short", "a", [1]), ("just short enough", "a" * 2000, [2000]), ("just too long", "a" * 2001, [2000, 1]),
            ("just short enough, of two units each", "\U0001f600" * 1000, [1000]),
            ("just too long, of two units each", "\U0001f600" * 1001, [1000, 1]),
            ("white space in the second half", "a" * 1500 + " " + "a" * 1000, [1501, 1000]),
            ("white space early in the second half", "a" * 1001 + " " + "a" * 1500, [1002, 1500]),
            ("white space in the first half only", "a" * 990 + " " + "a" * 2000, [2000, 991]),
            ("white space in the second half, by units", "\U0001f600" * 600 + " " + "a" * 3000, [601, 2000, 1000]),
            ("white space in the first half, by units", "a" * 700 + " " + "\U0001f600" * 1500, [1350, 851]),
            ("white space twice", "a" * 1200 + " " + "a" * 300 + "\n" + "a" * 1000, [1502, 1000]),
            ("white space of several characters", "a" * 1500 + " \n\u3000" + "a" * 1000, [1503, 1000]),
            ("white space at the end", "a" * 1999 + " a", [2000, 1]), ("after it", "a" * 2000 + " a", [2000, 2]),
            ("white space with an accent", "a" * 1500 + " " + "a" * 498 + " \u0301" + "a" * 9, [1501, 509]),
            ("flags", letter * 1200, [1000, 200]), ("flags, after one unit", "a" + letter * 1200, [999, 202]),
            ("room for two letters of three", "a" * 1995 + letter * 3, [1997, 1]),
            ("room for one letter of three", "a" * 1997 + letter * 3, [1997, 3]),
            ("room for three letters of four", "a" * 1993 + letter * 4, [1995, 2]),
            ("accents without an end", "e" + "\u0301" * 4000, [2000, 2000, 1]),
            ("joined without an end", "\U0001f469\u200d" * 1000, [1333, 667]),
            ("after accents without an end", "e" + "\u0301" * 2000 + " e", [2000, 3]),
        ]:
            with self.subTest(name):
                cut = echobot.pieces(text)
                self.assertEqual((list(map(len, cut)), "".join(cut)), (lengths, text))

    def test_what_a_reader_sees_as_one_character_is_not_cut(self):
        for name, character in [
            ("surrogate pair", "\U0001f600"), ("two surrogates", "\ud83d\ude00"), ("accent", "e\u0301"),
            ("accents", "e\u0301\u0323\u0308"), ("vowel sign", "\u0915\u093f"), ("enclosed", "1\ufe0f\u20e3"),
            ("family", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"), ("emoji style", "\u2764\ufe0f"),
            ("skin tone", "\U0001f44d\U0001f3fd"), ("flag", "\U0001f1e8\U0001f1ed"),
            ("couple", "\U0001f469\U0001f3fd\u200d\u2764\ufe0f\u200d\U0001f468\U0001f3ff"),
        ]:
            for room in range(1, units(character)):
                with self.subTest(name, room=room):
                    before = "a" * (2000 - room)
                    self.assertEqual(echobot.pieces(before + character + "a"), [before, character + "a"])


ENOUGH = {"PAGE_ACCESS_TOKEN": TOKEN, "APP_SECRET": SECRET}
WRONG = [  # a variable, a value that is wrong, and the part of it that must not be shown
    ("PAGE_ACCESS_TOKEN", "EAAG two-words", "two-words"), ("PAGE_ACCESS_TOKEN", "EAAG\x07bell", "bell"),
    ("PAGE_ACCESS_TOKEN", "EAAGpässword", "ssword"), ("APP_SECRET", "5ecr3t two-words", "5ecr3t"),
    ("ALLOW_UNSIGNED", "yes-please", "please"), ("PORT", "http", "http "), ("PORT", "65536", "65536"),
    ("PORT", "-1", "-1"), ("PORT", "80.5", "80.5"), ("PORT", "\u0665", "\u0665"),
    ("HOST", "http://bot.example", "bot.ex"), ("HOST", "bot.example:80", "bot.ex"), ("HOST", "[::1]", "::1]"),
    ("LOG_LEVEL", "loudest", "loudest"),
    ("GRAPH_URL", "https://", None), ("GRAPH_URL", "graph.example", "graph.example"),
    ("GRAPH_URL", "ftp://graph.example/", "graph.example"), ("GRAPH_URL", "https://graph.example:p0rt", "p0rt"),
    ("GRAPH_URL", "https://us3r:pa55@graph.example", "pa55"), ("GRAPH_URL", "https://graph.example/?t=pa55", "pa55"),
]
VARIABLES = [*ENOUGH, "VERIFY_TOKEN", "HOST", "PORT", "GRAPH_URL", "LOG_LEVEL", "ALLOW_UNSIGNED"]


class Settings(RuleTest):
    def test_without_a_setting_the_defaults_hold(self):
        settings = echobot.Settings("", "", VERIFY, "0.0.0.0", 5000, "https://graph.facebook.com/v26.0", "INFO")
        for environ in {}, dict.fromkeys(VARIABLES, ""), dict.fromkeys(VARIABLES, ' "" '), {"WEB_CONCURRENCY": "5"}:
            with self.subTest(environ=environ):
                self.assertEqual(tuple(echobot.settings_from(environ)), tuple(settings))

    def test_each_variable_sets_its_own_without_white_space_and_a_pair_of_quotes_around_it(self):
        normal = echobot.settings_from(ENOUGH)
        for variable, field, value in [
            ("PAGE_ACCESS_TOKEN", "token", "EAAG"), ("APP_SECRET", "secret", "5ecr3t"), ("HOST", "host", "::"),
            ("VERIFY_TOKEN", "verify_token", "ä b'"), ("VERIFY_TOKEN", "verify_token", "'tis \"so"),
            ("PORT", "port", "8080"), ("PORT", "port", "0"), ("PORT", "port", "65535"),
            ("GRAPH_URL", "graph_url", "http://127.0.0.1:9/v1"), ("LOG_LEVEL", "log_level", "DEBUG"),
        ]:
            for form in "%s", " %s\n", '"%s"', "'%s'", "\t'%s' ", '" %s "':
                with self.subTest(variable, form=form):
                    settings = echobot.settings_from(dict(ENOUGH, **{variable: form % value}))
                    self.assertEqual(str(getattr(settings, field)), value)
                    self.assertEqual(settings._replace(**{field: getattr(normal, field)}), normal)

    def test_a_token_without_a_secret_needs_leave(self):
        for environ in {}, {"ALLOW_UNSIGNED": "0"}:
            with self.assertRaisesRegex(echobot.SettingsError, "APP_SECRET.*ALLOW_UNSIGNED=1"):
                echobot.settings_from(dict(environ, PAGE_ACCESS_TOKEN=TOKEN))
        self.assertEqual(echobot.settings_from({"PAGE_ACCESS_TOKEN": TOKEN, "ALLOW_UNSIGNED": ' "1"'}).token, TOKEN)
        self.assertEqual(echobot.settings_from({"APP_SECRET": SECRET}).secret, SECRET)

    def test_a_wrong_setting_is_named_with_its_mend_and_without_its_value(self):
        for name, value, hidden in WRONG:
            with self.subTest(name, value=value):
                with self.assertRaises(echobot.SettingsError) as caught:
                    echobot.settings_from(dict(ENOUGH, **{name: value}))
                line, = caught.exception.args
                self.assertRegex(line, r"^%s .+: .*\b(set|copy|remove)\b" % name)
                self.assert_unsaid(line, hidden)

    def test_settings_print_no_secret(self):
        settings = echobot.Settings("5ecr3t-1", "5ecr3t-2", "5ecr3t-3")
        for shown in repr(settings), str(settings), "%s" % (settings,), "{}".format(settings):
            self.assert_unsaid(shown, "5ecr3t")


class Program(RuleTest):
    """The program as a process of its own."""

    def start(self, *arguments, **environ):
        """Return the process of `python echobot.py arguments` with the settings `environ` and no others."""
        inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        process = subprocess.Popen([*PYTHON, "-W", "error", echobot.__file__, *arguments],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env=dict(inherited, no_proxy="*", **environ))
        bound = threading.Timer(2 * WAIT, process.kill)
        bound.start()
        for clean_up in process.stdout.close, process.stderr.close, process.wait, process.kill, bound.cancel:
            self.addCleanup(clean_up)
        return process

    def end(self, process):
        """Return the exit status and what the process prints until then, to standard output and to standard error."""
        out, err = process.stdout.read().decode(), process.stderr.read().decode()
        return process.wait(), out.replace("\r\n", "\n"), err.replace("\r\n", "\n")

    def test_all_that_is_wrong_with_the_settings_is_said_at_once_and_ends_it_with_status_2(self):
        environ = {name: value for name, value, _ in WRONG if value.isascii() and name != "APP_SECRET"}
        status, out, err = self.end(self.start(**environ))
        self.assertEqual((status, out), (2, ""))
        lines = sorted(line.replace("echobot: ", "").split()[0] for line in err.splitlines())
        self.assertEqual(lines, sorted([*environ, "PAGE_ACCESS_TOKEN"]), "the token is wrong, and it has no secret")
        self.assert_unsaid(err, *environ.values())

    def test_where_it_cannot_listen_is_one_line_and_status_1(self):
        with closing(socket.socket()) as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            port = str(taken.getsockname()[1])
            for process, place in [(self.start("--host", "127.0.0.1", "--port", port, PORT="0"), port),
                                   (self.start("--port", "0", HOST="no..host"), "HOST|no..host")]:
                with self.subTest(place):
                    status, out, err = self.end(process)
                    self.assertEqual((status, out), (1, ""))
                    self.assertRegex(err, r"\A[^\n]*(%s)[^\n]*\n\Z" % place)

    def test_help_names_the_settings_and_version_is_a_line(self):
        asked, version = self.start("--help"), self.start("--version")
        status, out, err = self.end(asked)
        self.assertEqual((status, err), (0, ""))
        for word in ["--host", "--port", "--version", "chat", "check", *VARIABLES]:
            self.assertIn(word, out)
        self.assertEqual(self.end(version), (0, "echobot %s\n" % echobot.__version__, ""))

    @unittest.skipUnless(os.name == "posix", "needs signals")
    def test_ctrl_c_ends_a_check_without_a_traceback(self):
        hold = threading.Event()
        graph = self.start_graph(held(hold))
        process = self.start("check", PAGE_ACCESS_TOKEN=TOKEN, APP_SECRET=SECRET, GRAPH_URL=graph.url)
        graph.calls.get(timeout=WAIT)
        process.send_signal(signal.SIGINT)
        status, said, complaints = self.end(process)
        self.assertEqual((status, said.count("\n"), complaints), (130, 1, ""))
        hold.set()

    @unittest.skipUnless(os.name == "posix", "elsewhere a process cannot be sent SIGTERM")
    def test_no_secret_is_printed_whatever_comes(self):
        refusal = error(190, error_user_msg="the token is " + TOKEN)
        graph = self.start_graph(lambda call: refusal if call.recipient == "2" else ACCEPTED)
        process = self.start("--host", "127.0.0.1", "--port", "0", GRAPH_URL=graph.url, LOG_LEVEL="debug",
                             VERIFY_TOKEN="verify-token", **ENOUGH)
        first = process.stderr.readline().decode()
        port = int(re.search(r"127\.0\.0\.1:(\d+)", first).group(1))
        bot = types.SimpleNamespace(server_address=("127.0.0.1", port))
        good = json.dumps(delivery(message("words of a person"))).encode()
        statuses = [self.get(bot, "/" + hub(verify_token=token))[0] for token in ("verify-token", "guessed-token")]
        others = json.dumps(delivery(message("words of a person", "m_2", "3"))).encode()
        strange = b"\xff", b"[" * 100000, good.replace(b'"2"', b"[]")
        statuses += [self.deliver(bot, body)[0] for body in (good, others, *strange)]
        statuses += [self.request(bot, "POST", "/", body)[0] for body in (good, b"\xff" + SECRET.encode())]
        self.assertEqual(statuses, [200, 403, 200, 200, 400, 400, 200, 403, 403])
        process.send_signal(signal.SIGTERM)
        status, out, err = self.end(process)
        self.assertEqual((status, out), (0, ""), err)
        call = graph.calls.get(timeout=WAIT)
        proof, = urllib.parse.parse_qs(urllib.parse.urlsplit(call.path).query)["appsecret_proof"]
        self.assert_unsaid(first + err, SECRET, TOKEN, "verify-token", "guessed-token", proof,
                           sign(good)["X-Hub-Signature-256"][7:], "words of a person")
        self.assertRegex(err, r"(?m)^ERROR .*\b190\b.*\bTR4CE\b")


MIB = 1024 * 1024
HOST, CHUNKED, EXPECT, CLOSE = "Host: bot", "Transfer-Encoding: chunked", "Expect: 100-continue", "Connection: close"


class Got(NamedTuple):
    """An answer of the bot's, read whole."""

    status: int
    fields: dict
    text: str


def ask(line, *fields, body=b""):
    """Return the bytes of a request, as they are written here."""
    return "\r\n".join((line,) + fields + ("", "")).encode("latin-1") + body


def get(target, *fields):
    return ask("GET %s HTTP/1.1" % target, HOST, *fields)


def say(word, *fields):
    """Return a request that is answered `word`, by a bot whose verify token is v."""
    return get("/?hub.verify_token=v&hub.challenge=" + word, *fields)


def framed(*fields, body=b"2\r\n{}\r\n0\r\n\r\n"):
    """Return a delivery, framed as `fields` say."""
    return ask("POST / HTTP/1.1", HOST, *fields, body=body)


def sized(body, *fields):
    return framed("Content-Length: %d" % len(body), *fields, body=body)


def chunked(body, size):
    """Return `body` in chunks of `size` bytes."""
    parts = [body[at:at + size] for at in range(0, len(body), size)] + [b""]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def split(wire):
    """Return the answers that `wire` holds; raise ValueError where it holds anything else."""
    found = []
    while wire:
        head, end, rest = wire.partition(b"\r\n\r\n")
        (version, status, _), *lines = (line.split(" ", 2) for line in head.decode().split("\r\n"))
        fields = {name.rstrip(":"): " ".join(value) for name, *value in lines}
        length = int(fields.get("Content-Length", 0))
        if version != "HTTP/1.1" or not end or len(rest) < length:
            raise ValueError(wire)
        found.append(Got(int(status), fields, rest[:length].decode()))
        wire = rest[length:]
    return found


NEXT, LAST, SMUGGLED = say("next"), say("last", CLOSE), say("smuggled", CLOSE)
REFUSED = [(status, why, request) for status, requests in {
    411: {"no length": framed(body=b"{}"), "no body": framed(body=b"")},
    413: {"a length": framed("Content-Length: %d" % (MIB + 1)), "10^30": framed("Content-Length: 1" + 30 * "0"),
          "more digits than Python converts": framed("Content-Length: " + 5000 * "9"),
          "a chunk": framed(CHUNKED, body=b"100001\r\n"), "a chunk of 2^36": framed(CHUNKED, body=b"1000000000\r\n")},
    414: {"a long request line": get("/" + 9000 * "x"), "one without an end": 50000 * b"x"},
    431: {"a long field": get("/", "X: " + 9000 * "x"), "many fields": get("/", *40 * ["X: " + 1000 * "x"]),
          "a long trailer": framed(CHUNKED, body=b"0\r\nX: " + 9000 * b"x" + b"\r\n\r\n")},
    501: {coding: framed("Transfer-Encoding: " + coding) for coding in (
        "gzip", "gzip, chunked", "identity", "xchunked", "chunked;x=y", "chunked\xa0", "\x85chunked")},
}.items() for why, request in requests.items()] + [(400, why, request) for why, request in dict({
    "a length and chunks": framed(CHUNKED, "Content-Length: 12"), "HTTP/1.0": ask("POST / HTTP/1.0", CHUNKED),
    "chunked twice": framed(CHUNKED, CHUNKED), "chunked not last": framed("Transfer-Encoding: chunked, gzip"),
    "a length twice": framed("Content-Length: 2", "Content-Length: 2", body=b"{}"),
    "two lengths": framed("Content-Length: 2", "content-length: 40", body=b"{}"),
    "no host": ask("GET / HTTP/1.1"), "two hosts": get("/", HOST), "two hosts in HTTP/1.1": get("/", "host: x"),
}, **{"length %r" % length: framed("Content-Length: " + length, body=b"{}   ") for length in (
    "+5", "-1", "-0", "0x5", "5, 5", "5,5", "5 5", "5.0", "5e0", "5_0", "5;", "five", "", "\xb2", "5\xa0", "\x855",
    "\xef\xbc\x95", "\xd9\xa5")
}, **{"chunks %r" % chunks[:20]: framed(CHUNKED, body=chunks) for chunks in (
    b"2\n{}\r\n0\r\n\r\n", b"2;x\n{}\r\n0\r\n\r\n", b"2\r\n{}\n0\r\n\r\n", b"2\r\n{}0\r\n\r\n", b"2\r\n{}xx0\r\n\r\n",
    b"g\r\n{}\r\n0\r\n\r\n", b"0x2\r\n{}\r\n0\r\n\r\n", b"+2\r\n{}\r\n0\r\n\r\n", b"-2\r\n{}\r\n0\r\n", b"\r\n{}",
    b" 2\r\n{}\r\n0\r\n\r\n", b"2 2\r\n{}\r\n0\r\n\r\n", b"2;\x00\r\n{}\r\n0\r\n\r\n", b"2;x\ry\r\n{}\r\n0\r\n\r\n",
    b"2;" + 9000 * b"x" + b"\r\n{}\r\n0\r\n\r\n", b"0\r\nno colon\r\n\r\n", b"0\r\nX : y\r\n\r\n", b"0\r\n\x00\r\n")
}, **{"host %r" % host: ask("GET / HTTP/1.1", "Host: " + host) for host in (
    "a b", "a/b", "a@b", "a:b", "a:1:2", "[::1", "::1", "[x]", "a?b", "a#b", "a\\b", "<a>", "\xe9", "a\xa0")
}, **{"line %r" % line: get("/", "A: b", line) for line in (
    "X : y", "X\t: y", " X: folded", "\tfolded", " ", "no colon", ": no name", "X\x00: y", "X: a\x00b", "X: a\x0bb",
    "X: a\rb", "X: y\r", "X: \x7f", "X: \x1b[0m", "X: \x08", "X\x80: y", "X(y): z", "X y: z", '"X": y', "X,Y: z")
}, **{"garbage %r" % line: ask(line, HOST) for line in (
    "\x16\x03\x01\x02", "hello", "GET", "GET /", "GET / HTTP", "GET / HTTP/1", "GET / HTTP/1.1 x", "GET / HTTP/1.10",
    "GET  / HTTP/1.1", "GET /  HTTP/1.1", " GET / HTTP/1.1", "GET\t/ HTTP/1.1", "GET / x HTTP/1.1",
    "GET /\x00 HTTP/1.1", "GET /\x1b HTTP/1.1", "GET / HTTP/1.1\x00", "G(T / HTTP/1.1", "\r\n\r\nGET / HTTP/1.1",
    " \t\r\nGET / HTTP/1.1", "\x0b\r\nGET / HTTP/1.1")}).items()]


class WireTest(BotTest):
    """Speaks to a bot byte by byte."""

    def start(self, **more):
        return self.start_bot(verify_token="v", **more)

    def hold(self, bot):
        """Have `bot` hold deliveries; return queues: what is put there as one comes, and what answers one."""
        entered, go = queue.Queue(), queue.Queue()

        def handle(request):
            entered.put(request)
            return echobot.Answer(200, (yield from bot.loop.crew.do(go.get, True, WAIT)))

        bot.routes["/"]["POST"] = handle
        return entered, go

    def connect(self, bot, data=b""):
        """Return a connection on which `data` is sent."""
        client = socket.create_connection(bot.server_address[:2], WAIT)
        self.addCleanup(client.close)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # less than what is sent of a body too long
        client.sendall(data)
        return client

    def raw(self, bot, data, end=False):
        """Return all that the bot says to `data` until it closes; `end` closes this side's half first."""
        client = self.connect(bot, data)
        if end:
            client.shutdown(socket.SHUT_WR)
        return self.rest(client)

    def rest(self, client):
        """Return what there is to read until the bot closes, and close."""
        wire = b"".join(iter(lambda: client.recv(MIB), b""))
        client.close()
        return wire

    def one(self, client):
        """Return the next answer, which is to be one write."""
        answer, = split(client.recv(MIB))
        return answer

    def answers(self, bot, data, end=False):
        """Return the answers to `data`, each of which has to keep the rules that all keep."""
        answers = split(self.raw(bot, data, end))
        for answer in answers:
            self.assertEqual(answer.fields["Content-Type"].split(";")[0], "text/plain")
            self.assertEqual(answer.fields["X-Content-Type-Options"], "nosniff")
            self.assertNotIn("Server", answer.fields)
        return answers

    def said(self, bot, data, end=False):
        """Return the status and the text of each answer to `data`."""
        return [(answer.status, answer.text) for answer in self.answers(bot, data, end)]

    def statuses(self, bot, data, end=False):
        return [answer.status for answer in self.answers(bot, data, end)]


class WireRefusals(WireTest):
    def test_what_is_no_request_is_refused_and_what_follows_is_not_read_as_another(self):
        bot = self.start()
        for status, why, request in REFUSED:
            with self.subTest(why, status=status):
                answer, *others = self.answers(bot, request + SMUGGLED)
                self.assertEqual((answer.status, answer.fields.get("Connection"), others), (status, "close", []))

    def test_a_client_that_speaks_tls_is_refused_at_once(self):
        client = self.connect(self.start(clock=Clock()))
        with self.assertRaisesRegex(ssl.SSLError, "WRONG_VERSION_NUMBER|wrong version number"):
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(client, server_hostname="bot")

    def test_a_request_that_breaks_off_is_refused(self):
        bot = self.start()
        for whole in framed(CHUNKED, body=b"2;x\r\n{}\r\n0\r\nA: b\r\n\r\n"), sized(b"{}   "):
            self.assertEqual(self.said(bot, whole, end=True), [(200, "ok")])
            for at in range(1, len(whole), 3):
                with self.subTest(whole[:at]):
                    self.assertEqual(self.statuses(bot, whole[:at], end=True), [400])

    def test_a_body_of_one_mib_is_taken_and_of_more_is_refused_so_that_a_client_that_goes_on_sending_reads_why(self):
        bot = self.start()
        for size, expected in (MIB, [200, 200]), (MIB + 1, [413]), (3 * MIB, [413]):
            for chunk in None, 64, 9000, size:
                with self.subTest(size=size, chunk=chunk):
                    body = b"{}".ljust(size)
                    request = framed(CHUNKED, body=chunked(body, chunk)) if chunk else sized(body)
                    self.assertEqual(self.statuses(bot, request + LAST), expected)

    def test_nothing_but_the_webhook_and_its_methods_is_there(self):
        bot = self.start()
        for status, allow, lines in ((404, None, "GET /nowhere, POST /nowhere, GET *, GET /webhook/, GET //webhook"),
                                     (405, {"GET", "HEAD", "POST"}, "PUT /, DELETE /webhook, get /"),
                                     (405, {"GET", "HEAD"}, "POST /healthz")):
            for line in lines.split(", "):
                with self.subTest(line), self.assertLogs("echobot") as seen:
                    answer, last = self.answers(bot, ask(line + " HTTP/1.1", HOST, "Content-Length: 0") + LAST)
                    self.assertRegex("".join(seen.output), "%d: .*%s" % (status, re.escape(line.split()[1])))
                    methods = answer.fields.get("Allow")
                    self.assertEqual((answer.status, methods and set(methods.split(", "))), (status, allow))


class WireKeepAlive(WireTest):
    def test_requests_of_one_connection_are_answered_in_order_each_in_one_write(self):
        bot = self.start()
        words = ["word%d" % number for number in range(25)]
        self.assertEqual(self.said(bot, b"".join(map(say, words)) + LAST), [(200, word) for word in words + ["last"]])
        client = self.connect(bot)
        for word in words:
            client.sendall(say(word))
            self.assertEqual(self.one(client).text, word)
        for status, request in (200, sized(b"{}")), (404, get("/nowhere")), (400, sized(b"[]")), (411, framed()):
            client.sendall(request)
            self.assertEqual(self.one(client).status, status)

    def test_the_next_request_is_not_read_out_of_a_body(self):
        bot, length, pieces = self.start(), "Content-Length: %d" % len(SMUGGLED), chunked(SMUGGLED, 9)
        for status, why, request in (
                (400, "a length", sized(SMUGGLED)), (400, "chunks", framed(CHUNKED, body=pieces)),
                (400, "a length with zeros", framed(length.replace(" ", " 000"), body=SMUGGLED)),
                (400, "trailers", framed(CHUNKED, body=pieces[:-2] + b"A: b\r\nC: d\r\n\r\n")),
                (200, "an empty line after a body", sized(b"{}") + b"\r\n"),
                (200, "a GET's body", get("/healthz", length) + SMUGGLED),
                (200, "a GET's chunks", get("/healthz", CHUNKED) + pieces),
                (404, "a body for nowhere", get("/nowhere", length) + SMUGGLED),
                (404, "chunks for nowhere", get("/nowhere", CHUNKED) + pieces),
                (405, "a PUT's body", ask("PUT / HTTP/1.1", HOST, length, body=SMUGGLED))):
            with self.subTest(why):
                first, *others = self.said(bot, request + NEXT + LAST)
                self.assertEqual((first[0], others), (status, [(200, "next"), (200, "last")]))

    def test_a_connection_is_closed_after_an_answer_that_says_so(self):
        bot = self.start()
        for request in (ask("GET /healthz HTTP/1.0"), ask("GET /healthz HTTP/1.0", HOST, "Connection: keep-alive"),
                        get("/healthz", CLOSE), get("/healthz", "connection: x, Close")):
            with self.subTest(request):
                answer, *others = self.answers(bot, request + SMUGGLED)
                self.assertEqual((answer.text, answer.fields["Connection"], others), ("ok", "close", []))

    def test_a_head_is_answered_as_a_get_without_its_body(self):
        bot = self.start()
        for request in LAST, get("/nowhere", CLOSE), get("/", CLOSE, "Content-Length: 0"):
            with self.subTest(request), self.assertLogs("echobot"):
                echobot.log.info("a line at least")
                body = split(self.raw(bot, request))[0].text.encode()
                head, whole = (self.raw(bot, wire) for wire in (request.replace(b"GET", b"HEAD"), request))
                self.assertEqual([line for line in (head + body).split(b"\r\n") if b"Date" not in line],
                                 [line for line in whole.split(b"\r\n") if b"Date" not in line])

    def test_what_is_unusual_and_right_is_served(self):
        bot, target = self.start(), LAST.split()[1]
        urls, hosts = b"http://bot/ HTTP://bot:80/ http://bot", b"|a.b:80|a:| [::1]|[::1]:5000 |a_b-c|\t 1.2.3.4\t"
        for request in [ask("GET /healthz HTTP/1.0"), b"\r\n" + LAST, LAST.replace(b"\r\n", b"\n"),
                        LAST.replace(b"HTTP/1.1", b"HTTP/1.2"), LAST.replace(b"Host", b"X:\xc3\xa9\xff\t\r\nHost"),
                        *(LAST.replace(target, url + target[1:]) for url in urls.split()),
                        *(LAST.replace(b" bot", host) for host in hosts.split(b"|"))]:
            with self.subTest(request):
                self.assertEqual(self.statuses(bot, request), [200])

    def test_a_client_that_has_closed_its_half_gets_its_answer(self):
        self.assertEqual(self.said(self.start(), NEXT, end=True), [(200, "next")])


class WireChunks(WireTest):
    def test_chunks_are_put_together_and_echoed(self):
        graph = self.start_graph()
        bot, pad = self.start(graph=graph), 70000 * b" "
        for why, chunks in {
                "one": lambda body: chunked(body, len(body)), "several": lambda body: chunked(body, 7),
                "capitals and zeros": lambda body: b"%06X\r\n%s\r\n000\r\n\r\n" % (len(body), body),
                "extensions": lambda body: chunked(body, 60).replace(b"3c\r\n", b'3c ;a=b;c="d \xff"\r\n'),
                "trailers": lambda body: chunked(body, 60)[:-2] + b"Expires: never\r\nContent-Length: 3\r\n\r\n",
                "chunks beyond a buffer": lambda body: chunked(body, 66000)}.items():
            with self.subTest(why):
                body = json.dumps(delivery(message(why, why))).encode() + pad
                fields = ["%s: %s" % field for field in sign(body).items()]
                wire = framed("transfer-encoding: Chunked", *fields, body=chunks(body))
                self.assertEqual(self.said(bot, wire + LAST), [(200, "ok"), (200, "last")])
                self.assertEqual(graph.calls.get(timeout=WAIT).text, why)

    def test_a_client_that_waits_to_be_asked_for_its_body_is_asked_where_it_is_wanted(self):
        bot = self.start()
        for field, body in ("Content-Length: 2", b"{}"), (CHUNKED, chunked(b"{}", 1)):
            with self.subTest(field):
                client = self.connect(bot, framed(field, EXPECT, body=b""))
                self.assertEqual(client.recv(MIB), b"HTTP/1.1 100 Continue\r\n\r\n")
                client.sendall(body + LAST)
                self.assertEqual([answer.status for answer in split(self.rest(client))], [200, 200])
        for status, request in ((411, framed(EXPECT)), (413, framed("Content-Length: %d" % (MIB + 1), EXPECT)),
                                (400, framed("Content-Length: x", EXPECT)),
                                (501, framed("Transfer-Encoding: x", EXPECT)),
                                (200, ask("POST / HTTP/1.0", "Content-Length: 2", EXPECT, body=b"{}"))):
            with self.subTest(request):
                self.assertEqual(self.statuses(bot, request), [status])


class WireTime(WireTest):
    def begin(self, bot, first=b""):
        """Return a connection on which `first` is answered and a request is begun, which the bot has noticed."""
        client = self.connect(bot, first)
        if first:
            self.one(client)
        client.sendall(framed("Content-Length: 30", EXPECT, body=b""))
        self.assertEqual(client.recv(MIB), b"HTTP/1.1 100 Continue\r\n\r\n")
        return client

    def assertLate(self, client):
        answer, = split(self.rest(client))
        self.assertEqual((answer.status, answer.fields["Connection"]), (408, "close"))

    def test_a_first_request_has_ten_seconds_from_the_connection_however_it_drips(self):
        clock = Clock()
        bot = self.start(clock=clock)
        sooner = self.begin(bot)
        timers = len(bot.loop.timers)
        clock.pass_time(0.5)
        begun = [b"", b"", b"\r\n", b"POST / HTTP/1.1", framed(CHUNKED, body=b""), framed(CHUNKED, body=b"63\r\n{"),
                 framed()[:-20], framed(CHUNKED, body=b"0\r\nA: b"), framed("Content-Length: 99", body=b"{")]
        clients = [self.connect(bot, data) for data in begun] + [self.begin(bot)]
        self.until(lambda: len(bot.loop.timers) == timers + len(clients))
        for _ in range(19):
            clock.pass_time(0.5)
            for client in clients[1:]:
                client.sendall(b"x")
        self.assertLate(sooner)
        self.assertEqual(select.select(clients, [], [], 0)[0], [])
        clock.pass_time(0.5)
        for data, client in zip(begun + ["asked"], clients):
            with self.subTest(data):
                self.assertLate(client)

    def test_a_later_request_has_ten_seconds_from_its_first_byte(self):
        clock = Clock()
        bot = self.start(clock=clock)
        client = self.connect(bot, NEXT)
        self.one(client)
        clock.pass_time(60)
        client.sendall(framed("Content-Length: 30", EXPECT, body=b""))
        self.assertEqual(self.one(client).status, 100)
        clock.pass_time(0.5)
        later = self.begin(bot, NEXT)
        clock.pass_time(9.5)
        self.assertLate(client)
        later.sendall(b"{}".ljust(30))
        self.assertEqual(self.one(later).status, 200)

    def test_an_idle_connection_is_closed_after_two_minutes_and_not_before(self):
        clock = Clock()
        bot = self.start(clock=clock)
        idle, used = self.connect(bot, NEXT), self.connect(bot, NEXT)
        self.assertEqual([self.one(client).text for client in (idle, used)], ["next", "next"])
        clock.pass_time(109)
        sooner = self.begin(bot)
        clock.pass_time(10)
        self.assertLate(sooner)
        used.sendall(NEXT)
        self.assertEqual(self.one(used).text, "next")
        self.assertEqual(select.select([idle], [], [], 0)[0], [])
        clock.pass_time(1)
        self.assertEqual(self.rest(idle), b"")
        used.sendall(NEXT)
        self.assertEqual(self.one(used).text, "next")

    def test_a_refused_client_that_does_not_close_loses_its_place(self):
        clock = Clock()
        bot = self.start(clock=clock, limits={"connections": 1})
        self.assertEqual(self.one(self.connect(bot, framed())).status, 411)
        clock.pass_time(2)
        self.assertEqual(self.said(bot, LAST), [(200, "last")])

    def test_who_has_been_answered_that_it_takes_too_long_gets_no_second_answer(self):
        clock = Clock()
        bot = self.start(clock=clock)
        entered, go = self.hold(bot)
        client = self.connect(bot, sized(b"{}") + LAST)
        entered.get(timeout=WAIT)
        clock.pass_time(4)
        select.select([client], [], [], WAIT)
        go.put("mine")
        self.assertEqual([answer.status for answer in split(self.rest(client))], [503, 200])

    def test_an_answer_in_time_is_not_given_again_at_the_deadline(self):
        clock = Clock()
        bot = self.start(clock=clock)
        entered, go = self.hold(bot)
        clients = [self.connect(bot, sized(b"{}")) for _ in range(2)]
        for _ in clients:
            entered.get(timeout=WAIT)
        clock.pass_time(3.5)
        go.put("mine")
        first = select.select(clients, [], [], WAIT)[0][0]
        self.assertEqual(self.one(first).text, "mine")
        clock.pass_time(0.5)
        clients.remove(first)
        self.assertEqual(self.one(clients[0]).status, 503)
        first.sendall(LAST)
        self.assertEqual([answer.text for answer in split(self.rest(first))], ["last"])
        go.put("too late")


class WireHarm(WireTest):
    def test_no_more_connections_than_there_are_places_are_served_at_once_and_the_rest_wait(self):
        bot = self.start(limits={"connections": 2})
        entered, go = self.hold(bot)
        clients = [self.connect(bot, sized(b"{}", CLOSE)) for _ in range(6)]
        for _ in range(2):
            entered.get(timeout=WAIT)
        with self.assertRaises(queue.Empty):
            entered.get(timeout=0.05)
        for word in "abcdef":
            go.put(word)
        self.assertEqual({split(self.rest(client))[0].text for client in clients}, set("abcdef"))

    def test_a_client_that_vanishes_leaves_its_place_and_no_trace(self):
        bot, whole = self.start(limits={"connections": 1}), sized(b"{}", EXPECT)
        with self.assertLogs("echobot", "INFO") as seen:
            for at in range(0, len(whole) + 1, 12):
                for options in [], [(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))]:
                    with self.subTest(at=at, reset=bool(options)):
                        client = self.connect(bot, whole[:at])
                        for option in options:
                            client.setsockopt(*option)
                        client.close()
                        self.assertEqual(self.said(bot, LAST), [(200, "last")])
        self.assertEqual({record.levelname for record in seen.records}, {"INFO"})
        self.until(lambda: not bot.connections and not bot.idle)

    def test_a_bug_costs_its_request_an_answer_of_500_and_is_logged(self):
        def handle(request):
            raise ValueError("page-" + "token\n\x1b[31m")

        bot = self.start()
        bot.routes["/\x85\xa0"] = {"GET": handle, "POST": handle}
        for method in "GET", "HEAD", "POST":
            with self.subTest(method), self.assertLogs("echobot", "ERROR") as seen:
                wire = self.raw(bot, ask(method + " /\x85\xa0 HTTP/1.1", HOST, "Content-Length: 0") + LAST)
                head, _, rest = wire.partition(b"\r\n\r\n")
                self.assertRegex(head, b"^HTTP/1.1 500 (?s:.*)\r\nContent-Length: [1-9]")
                self.assertEqual(rest.startswith(b"HTTP/1.1 200 "), method == "HEAD")
                self.assertEqual(split(rest[rest.index(b"HTTP/1.1 "):])[0].text, "last")
            line, = map(echobot.LogFormat().format, seen.records)
            self.assertRegex(line, r'in handle\n +raise ValueError\("page-')
            self.assertNotIn("page-token", line + wire.decode())
            self.assertEqual([part for part in line.split("\n") if not part.isprintable()], [])

    def test_a_request_for_which_there_is_no_memory_is_answered_503(self):
        def handle(request):
            raise MemoryError

        bot = self.start()
        bot.routes["/"] = dict(bot.routes["/"], POST=handle)
        with self.assertLogs("echobot") as seen:
            self.assertEqual(self.statuses(bot, sized(b"{}") + LAST), [503, 200])
        self.assertEqual([record.exc_info for record in seen.records], [None])

    def test_what_comes_from_outside_stays_within_its_line_of_the_log(self):
        bot, evil = self.start(), "a\r\n\x1b[31m\x00\x7f\x85\u2028\u202e\ud800z"
        with self.assertLogs("echobot", "INFO") as seen:
            self.said(bot, sized(json.dumps(delivery(message(evil, evil, evil), evil)).encode(), CLOSE))
            self.said(bot, get("/?hub.verify_token=%0A%1B&" + evil[-1] + "&hub.mode=%0D%0A", CLOSE))
            for _, _, request in REFUSED[::9]:
                self.raw(bot, request + LAST)
        for line in map(echobot.LogFormat().format, seen.records):
            self.assertTrue(line.isprintable(), ascii(line))

    def test_a_thread_that_dies_costs_its_reply_a_moment_and_nothing_more(self):
        def die():
            del bot.loop.crew.work

        go = threading.Event()
        bot = self.start(reply=lambda message: "hi" if message["text"] == "hello" or go.wait(WAIT) else None)
        held = self.deliver_in_background(bot, delivery(message("hold", "m_held")))
        self.until(lambda: bot.outbox.pending and bot.loop.crew.jobs.empty())
        bot.loop.crew.work = die
        answer = self.deliver(bot, delivery(message(sender="3")))
        self.assertEqual((answer, vars(bot.loop.crew).get("work")), ((200, "ok"), None))
        go.set()
        self.assertEqual(held.get(timeout=WAIT), 200)

    def test_where_much_is_being_read_who_sends_much_is_refused_and_a_small_delivery_is_answered(self):
        bot = self.start(limits={"held": 2 * MIB + 4096})
        much = framed("Content-Length: %d" % MIB, CLOSE, body=b"x" * (MIB - 1))
        clients = [self.connect(bot, much) for _ in range(2)]
        self.until(lambda: bot.loop.held > 2 * (MIB - 1))
        self.assertEqual(self.statuses(bot, much), [503])
        self.assertEqual(self.deliver(bot, delivery(message())), (200, "ok"))
        for client in clients:
            client.sendall(b"x")
            self.assertEqual(self.one(client).status, 400)
        self.until(lambda: not bot.loop.held)
        self.assertEqual(self.statuses(bot, much + b"x"), [400])

    def test_what_comes_while_nobody_reads_waits_and_costs_nothing(self):
        bot = self.start()
        entered, go = self.hold(bot)
        client = self.connect(bot, sized(b"{}"))
        entered.get(timeout=WAIT)
        client.sendall(LAST)
        turns, wait = [], bot.loop.wait
        bot.loop.wait = lambda: turns.append(bot.loop.looked) or wait()
        self.until(lambda: len(set(turns)) > 5)
        self.assertLess(len(turns), 60)
        go.put("first")
        self.assertEqual([answer.text for answer in split(self.rest(client))], ["first", "last"])

    def test_a_client_that_sends_hundreds_of_requests_at_once_lets_the_others_have_their_turn(self):
        def handle(request):
            if not served:
                other.sendall(say("other", CLOSE))
            served.append(request.path)
            return echobot.Answer(200, "")

        bot, served = self.start(), []
        other, many = self.connect(bot, get("/healthz")), self.connect(bot)
        self.one(other)
        bot.routes["/many"] = {"GET": handle}
        bot.routes["/"] = {"GET": lambda request: served.append("other") or echobot.Answer(200, "")}
        many.sendall(get("/many") * 200 + get("/many", CLOSE))
        self.rest(many)
        self.assertLess(served.index("other"), 20)

    def test_of_many_malformed_events_a_few_are_logged_and_the_rest_counted(self):
        graph = self.start_graph()
        bot = self.start_bot(graph)
        payload = delivery(*[[]] * 30000, message())
        with self.assertLogs("echobot", "WARNING") as seen:
            self.assertEqual(self.deliver(bot, payload), (200, "ok"))
        self.assertEqual((len(seen.output), graph.calls.qsize()), (11, 1))
        self.assertIn("29990", seen.output[-1])

    def test_what_has_been_dealt_with_is_not_counted_as_held(self):
        graph = self.start_graph()
        bot = self.start_bot(graph)
        with closing(http.client.HTTPConnection("127.0.0.1", bot.server_address[1], timeout=WAIT)) as connection:
            for number in range(3):
                body = json.dumps(delivery(message(mid="m_%d" % number))).encode()
                connection.request("POST", "/", body, sign(body))
                self.assertEqual(connection.getresponse().read(), b"ok")
            self.until(lambda: bot.loop.held == 0)
            self.assertTrue(bot.idle and bot.graph.client.idle)

    def test_no_answer_waits_for_a_client_to_acknowledge_what_went_before(self):
        bot = self.start()
        self.one(self.connect(bot, say("hello")))
        self.assertTrue(all(connection.stream.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                            for connection in bot.connections))

    def test_a_bug_in_the_loop_is_logged_and_stops_nothing(self):
        def bug():
            raise ValueError

        def steps():
            yield
            bug()

        bot = self.start()
        with self.assertLogs("echobot", "ERROR") as seen:
            bot.loop.at(0, bug)
            bot.loop.wake_from_thread(bot.loop.start(steps()))
            self.until(lambda: len(seen.records) == 2)
        self.assertEqual(self.said(bot, LAST), [(200, "last")])

    def test_when_files_run_out_connections_wait(self):
        class Exhausted:
            def accept(self):
                bot.socket = genuine
                raise OSError(errno.EMFILE, "Too many open files")

            def __getattr__(self, name):
                return getattr(genuine, name)

        bot = self.start(limits={"connections": 1})
        genuine = bot.socket
        bot.socket = Exhausted()
        self.assertEqual(self.said(bot, LAST), [(200, "last")])
        self.assertIs(bot.socket, genuine)


logging.getLogger("echobot").addHandler(logging.NullHandler())  # else what it warns of would go to standard error


def held(event, answer=ACCEPTED):
    """Return what has Graph answer after `event`, and not before."""
    return lambda call: answer if event.wait(WAIT) else None


def in_turn(*answers):
    """Return what has Graph give `answers` one after another, and accept what comes then."""
    turn = iter(answers)
    return lambda call: next(turn, ACCEPTED)


def nameless(event, kind="message", **more):
    """Return `event` without a mid."""
    return dict(event, **{kind: {"text": "hello", "title": "hello"}}, **more)


class WiredGraph(Graph):
    """A stand-in for Graph that refuses connections until it listens, and whose connections can be cut."""

    def __init__(self):
        self.wires = []
        super().__init__()

    def server_activate(self):
        """Do not listen yet."""

    def listen(self, test):
        super().server_activate()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        test.addCleanup(self.shutdown)

    def process_request(self, request, client_address):
        self.wires.append(request)
        super().process_request(request, client_address)

    def cut(self, last_words=b""):
        """Close all connections that there are, as a server does with idle ones."""
        while self.wires:
            wire = self.wires.pop()
            wire.sendall(last_words)
            wire.shutdown(socket.SHUT_RDWR)


class PromiseTest(BotTest):
    def start_frozen_bot(self, graph, limits=None, **more):
        """Return a bot whose time passes in `elapse` only.  It gives no reply up, and is closed at once."""
        return self.start_bot(graph, dict({"graph": 10 ** 6, "retry": 10 ** 6, "drain": 0}, **limits or {}), Clock(),
                              **more)

    def elapse(self, bot, seconds):
        """Let time pass, and wait until the bot has seen it."""
        def look():
            bot.loop.keep_time()
            seen.set()
            yield

        seen = threading.Event()
        bot.loop.clock.pass_time(seconds)
        bot.loop.wake_from_thread(bot.loop.start(look()))
        while not (seen.wait(0.01) or bot.closed.is_set()):
            pass

    def elapse_until(self, bot, seconds, condition):
        """Let `seconds` pass, and again as often as it takes."""
        self.until(lambda: self.elapse(bot, seconds) or condition())

    def settle(self, bot, seconds=8):
        """Let time pass until nothing is pending."""
        self.elapse_until(bot, seconds, lambda: not bot.outbox.pending)

    def entered(self, bot):
        """Return a queue that gets an item for each delivery that `bot` lines up or joins from now on."""
        entered, deliver = queue.Queue(), bot.outbox.deliver
        bot.outbox.deliver = lambda *replies: entered.put(replies) or deliver(*replies)
        return entered

    def wired_graph(self):
        graph = WiredGraph()
        self.addCleanup(graph.server_close)
        return graph

    def stop_in_background(self, bot):
        stopping = threading.Thread(target=self.stop, args=(bot,), daemon=True)
        stopping.start()
        self.until(lambda: bot.closing and bot.socket.fileno() < 0)
        return stopping


class Failures(PromiseTest):
    """A reply is settled once Graph has accepted it or refused it for good."""

    PASSING = dict({"code_%d" % code: error(code) for code in (1, 2, 4, 17, 32, 341, 613, 1200, 80006)}, **{
        "closes without an answer": None,
        "500": error(99, 500),
        "503 of a proxy": (503, {}, b"<html>"),
        "429": error(99, 429),
        "is_transient": error(99, is_transient=True),
        "garbage": (99999, {}, b"garbage"),
        "200 and not JSON": (200, {}, b"<html>"),
        "200 and an error": error(2, 200),
        "400 and not JSON": (400, {}, b"<html>"),
        "400 and no object": (400, {}, b"[]"),
        "an error that is none": (400, {}, b'{"error": 1}'),
        "too deep": (200, {}, b"[" * 100000),
        "half an answer": (200, {"Content-Length": 100, "Connection": "close"}, ACCEPTED[2]),
        "half a header": (200, {"Content-Length": "1\r\nX: " + "x" * 100000, "Connection": "close"}, b""),
        "more than 1 MiB": (200, {}, b'{"x": "%s"}' % (b"x" * (1 << 20))),
        "Retry-After is nonsense": error(613, headers={"Retry-After": "Wed, 21 Oct 99999 07:28:00 GMT"}),
        "Retry-After is too long": error(613, headers={"Retry-After": "9" * 400}),
        "a code that is none": error([]),
    })

    def test_what_failed_for_now_is_tried_again_and_settled_when_graph_recovers(self):
        accepted, tried = [], set()

        def sick(call):
            tried.add(call.recipient)
            return self.PASSING[call.recipient]

        def well(call):
            accepted.append(call.recipient)
            return ACCEPTED

        graph = self.start_graph(sick)
        bot = self.start_frozen_bot(graph)
        deliveries = {kind: delivery(message(mid=kind, sender=kind)) for kind in self.PASSING}
        answers = {kind: self.deliver_in_background(bot, deliveries[kind]) for kind in deliveries}
        self.until(lambda: tried == set(self.PASSING))
        self.elapse(bot, 4)
        statuses = {kind: answers[kind].get(timeout=WAIT) for kind in answers}
        graph.answer = well
        self.settle(bot)
        recovered = list(accepted)
        again = {kind: self.deliver(bot, deliveries[kind]) for kind in deliveries}
        self.stop(bot)
        for kind in self.PASSING:
            with self.subTest(kind):
                self.assertEqual((statuses[kind], recovered.count(kind), again[kind]), (503, 1, (200, "ok")))
                self.assertEqual(accepted.count(kind), 1)

    def test_a_closed_port_is_tried_again(self):
        graph = self.wired_graph()
        bot = self.start_frozen_bot(graph)
        with self.assertLogs("echobot", "WARNING") as logs:
            answers = self.deliver_in_background(bot, delivery(message()))
            self.until(lambda: logs.records)
        self.elapse(bot, 4)
        self.assertEqual(answers.get(timeout=WAIT), 503)
        self.assertNotIn(TOKEN, logs.output[0])
        graph.listen(self)
        self.settle(bot)
        self.assertEqual(self.deliver(bot, delivery(message())), (200, "ok"))
        self.stop(bot)
        self.assertEqual(graph.texts(), ["hello"])

    def test_no_answer_for_20_s_is_a_failure_on_a_new_connection_and_on_a_kept_one(self):
        for kept in False, True:
            with self.subTest(kept=kept):
                graph, hold = self.start_graph(), threading.Event()
                bot = self.start_frozen_bot(graph, {"graph": 20})
                if kept:
                    self.deliver(bot, delivery(message("first", "m_0")))
                graph.answer = held(hold)
                answers = self.deliver_in_background(bot, delivery(message()))
                self.until(lambda: graph.calls.qsize() == 1 + kept)
                self.elapse(bot, 4)
                self.assertEqual(answers.get(timeout=WAIT), 503)
                with self.assertLogs("echobot", "WARNING") as logs:
                    self.elapse(bot, 16.01)
                    self.until(lambda: logs.records or graph.calls.qsize() > 1 + kept)
                graph.answer = in_turn()
                self.settle(bot, 0.1)
                self.stop(bot)
                self.assertEqual(graph.texts(), ["first"] * kept + ["hello"] * 2)
                self.assertEqual([record.levelname for record in logs.records], ["WARNING"])
                hold.set()

    def test_a_refusal_for_good_settles_the_reply_with_one_log_line(self):
        meanings = {10: "24 hours", 100: "no such person", 102: "session", 190: "token", 200: "permission",
                    230: "permission", 299: "permission", 368: "blocked", 551: "not available", 1545041: "24 hours",
                    987654: "code"}
        graph = self.start_graph(lambda call: error(int(call.recipient)))
        bot = self.start_bot(graph)
        for code, meaning in meanings.items():
            with self.subTest(code=code):
                event = message(mid="m_%d" % code, sender=str(code))
                with self.assertLogs("echobot") as logs:
                    self.assertEqual(self.deliver(bot, delivery(event)), (200, "ok"))
                self.assertEqual(self.deliver(bot, delivery(event)), (200, "ok"))
                self.assertEqual([record.levelname for record in logs.records], ["ERROR"])
                self.assertRegex(logs.output[0], r"\b%d\b.*%s.*TR4CE" % (code, meaning))
                self.assertNotRegex(logs.output[0], "%s|%s|secret words" % (TOKEN, SECRET))
        self.stop(bot)
        self.assertEqual(graph.calls.qsize(), len(meanings))

    def test_a_redirect_is_not_followed(self):
        graph = self.start_graph()
        elsewhere = self.start_graph()
        graph.answer = in_turn(*((status, {"Location": elsewhere.url}, b"") for status in (301, 302, 303, 307, 308)))
        bot = self.start_frozen_bot(graph)
        self.deliver_in_background(bot, delivery(message()))
        self.until(lambda: bot.outbox.pending)
        self.settle(bot)
        self.stop(bot)
        self.assertEqual((graph.calls.qsize(), elsewhere.calls.qsize()), (6, 0))


class Pauses(PromiseTest):
    """A passing failure is tried again for 60 s, less and less often."""

    def failing_bot(self, *answers):
        """Return a bot on whose only reply Graph gives the last answer for ever, and the times of its calls."""
        def answer(call):
            times.append(bot.loop.clock.now)
            return answers[min(len(times), len(answers)) - 1]

        times = []
        bot = self.start_frozen_bot(self.start_graph(answer))
        return bot, times

    def test_each_pause_is_about_twice_the_last_up_to_8_s(self):
        bot, times = self.failing_bot(error(2, 500))
        with self.assertLogs("echobot", "WARNING") as logs:  # a line for each failure
            answers = self.deliver_in_background(bot, delivery(message()))
            for tries, pause in enumerate((0.5, 1, 2, 4, 8, 8, 8), 1):
                self.until(lambda: len(logs.records) == tries)
                self.elapse(bot, pause * 0.49)
                threading.Event().wait(0.01)  # for a call that would be too early
                self.elapse(bot, pause * 0.52)
                self.until(lambda: len(times) > tries or self.elapse(bot, pause * 0.001))
                self.assertEqual(len(times), tries + 1)
                self.assertTrue(0.495 < (times[tries] - times[tries - 1]) / pause < 1.9)
            self.until(lambda: len(logs.records) == len(times))
        self.assertEqual(answers.get(timeout=WAIT), 503)

    def test_retry_after_is_honoured(self):
        for value, least in ("30", 30), (email.utils.formatdate(time.time() + 30, usegmt=True), 28):
            for status in 400, 429, 503:
                with self.subTest(value=value, status=status):
                    bot, times = self.failing_bot(error(613, status, {"Retry-After": value}), ACCEPTED)
                    with self.assertLogs("echobot", "WARNING") as logs:
                        answers = self.deliver_in_background(bot, delivery(message()))
                        self.until(lambda: logs.records)
                    self.elapse(bot, least - 0.1)
                    self.assertEqual(answers.get(timeout=WAIT), 503)
                    self.settle(bot, 3)
                    self.assertEqual(len(times), 2)
                    self.assertGreaterEqual(times[1] - times[0], least)
                    self.stop(bot)

    def test_after_60_s_a_reply_is_given_up_and_the_delivery_starts_afresh_when_brought_again(self):
        graph = self.start_graph(lambda call: error(2, 500))
        bot = self.start_frozen_bot(graph, {"retry": 60})
        with self.assertLogs("echobot", "WARNING") as logs:
            answers = self.deliver_in_background(bot, delivery(message(mid="m_lost")))
            self.until(lambda: logs.records)
            started = bot.loop.clock.now
            while bot.loop.clock.now < started + 59:
                self.elapse(bot, 1)
                self.assertTrue(bot.outbox.pending)
            self.settle(bot, 1)
        self.assertEqual(answers.get(timeout=WAIT), 503)
        self.assertEqual(["m_lost" in record.getMessage() for record in logs.records if record.levelname == "ERROR"],
                         [True])
        graph.texts()
        graph.answer = in_turn()
        self.assertEqual(self.deliver(bot, delivery(message(mid="m_lost"))), (200, "ok"))
        self.stop(bot)
        self.assertEqual(graph.texts(), ["hello"])

    def test_after_10_minutes_of_failure_deliveries_are_let_go_until_graph_recovers(self):
        graph = self.start_graph()
        bot = self.start_frozen_bot(graph, {"retry": 60, "outage": 600})

        def status(number):
            """Return the status that a new delivery is answered at the deadline, and whether an error is logged."""
            with self.assertLogs("echobot") as logs:
                event = message(mid="m_%d" % number, sender="p%d" % number)
                answers = self.deliver_in_background(bot, delivery(event))
                self.until(lambda: logs.records)  # of the failure
                self.elapse(bot, 4)
                answer = answers.get(timeout=WAIT)
            return answer, "ERROR" in [record.levelname for record in logs.records]

        graph.answer = lambda call: error(2, 500)
        until = bot.loop.clock.now + 600
        for number in itertools.count():
            self.assertEqual(status(number), (503, False))
            self.settle(bot, 10)
            if bot.loop.clock.now > until - 80:
                break
        self.elapse(bot, until - bot.loop.clock.now)
        self.assertEqual(status(1001), (200, True))
        graph.answer = in_turn()
        self.settle(bot)
        self.assertEqual(self.deliver(bot, delivery(message())), (200, "ok"))
        graph.answer = lambda call: error(2, 500)
        self.assertEqual(status(1002), (503, False))

    def test_a_reply_that_says_nothing_does_not_end_an_outage(self):
        bot = self.start_frozen_bot(self.start_graph(lambda call: error(2, 500)), {"retry": 60, "outage": 600},
                                    reply=lambda message: message["text"])
        with self.assertLogs("echobot") as logs:
            self.deliver_in_background(bot, delivery(message()))
            self.until(lambda: logs.records)
            since = bot.outbox.failing
            self.assertEqual(self.deliver(bot, delivery(message("", "m_2", "3"))), (200, "ok"))
        self.assertEqual((bot.outbox.failing, bool(since)), (since, True))

    def test_ten_minutes_without_a_call_are_no_failure(self):
        graph, hold = self.start_graph(lambda call: error(2, 500)), threading.Event()
        bot = self.start_frozen_bot(graph, {"retry": 60})
        answers = self.deliver_in_background(bot, delivery(message()))
        self.until(graph.calls.qsize)
        self.elapse(bot, 4)
        self.assertEqual(answers.get(timeout=WAIT), 503)
        self.settle(bot)
        bot.loop.clock.pass_time(7200)
        graph.answer = held(hold)
        answers = self.deliver_in_background(bot, delivery(message("late", "m_2")))
        self.until(lambda: "late" in graph.texts())
        self.elapse(bot, 4)
        self.assertEqual(answers.get(timeout=WAIT), 503)
        hold.set()


class OnceOnly(PromiseTest):
    """One message gets one reply, however often it is brought."""

    def test_a_delivery_brought_again_joins_the_reply_under_way(self):
        hold = threading.Event()
        graph = self.start_graph(held(hold))
        bot = self.start_frozen_bot(graph)
        entered = self.entered(bot)
        answers = self.deliver_in_background(bot, delivery(message()))
        self.until(graph.calls.qsize)
        self.elapse(bot, 4)
        self.assertEqual(answers.get(timeout=WAIT), 503)
        again = [self.deliver_in_background(bot, delivery(message())) for _ in range(3)]
        self.until(lambda: entered.qsize() == 4)
        self.elapse(bot, 3.9)
        hold.set()
        self.assertEqual([answers.get(timeout=WAIT) for answers in again], [200] * 3)
        self.stop(bot)
        self.assertEqual(graph.texts(), ["hello"])

    def test_a_reply_that_takes_its_time_is_asked_for_once_and_joined(self):
        def reply(message):
            asked.put(message)
            return go.wait(WAIT) and "hi"

        asked, go = queue.Queue(), threading.Event()
        bot = self.start_frozen_bot(self.start_graph(), reply=reply)
        entered = self.entered(bot)
        answers = self.deliver_in_background(bot, delivery(message()))
        self.until(asked.qsize)
        self.elapse(bot, 4)
        self.assertEqual(answers.get(timeout=WAIT), 503)
        again = self.deliver_in_background(bot, delivery(message()))
        self.until(lambda: entered.qsize() == 2)
        go.set()
        self.assertEqual((again.get(timeout=WAIT), asked.qsize()), (200, 1))

    def test_replies_that_take_their_time_are_asked_for_side_by_side(self):
        together = threading.Barrier(10)
        bot = self.start_bot(reply=lambda message: str(together.wait(WAIT)))
        people = [message(mid="m_%d" % number, sender="2%d" % number) for number in range(10)]
        self.assertEqual(self.deliver(bot, delivery(*people)), (200, "ok"))

    def test_what_reply_does_wrong_gets_500_and_starts_afresh_and_nothing_to_say_is_said_once(self):
        graph = self.start_graph()
        for wrong, status in (5, 500), (b"bytes", 500), (["list"], 500), (None, 200), ("", 200):
            with self.subTest(wrong):
                said = [wrong, "never" if status == 200 else "mended"]
                bot = self.start_bot(graph, reply=lambda message: said.pop(0))
                with self.assertLogs("echobot") as logs:
                    echobot.log.info("assertLogs wants a line")
                    self.assertEqual(self.deliver(bot, delivery(message()))[0], status)
                self.assertEqual(len(logs.records), 1 if status == 200 else 2)
                self.assertEqual(self.deliver(bot, delivery(message()))[0], 200)
                self.stop(bot)
                self.assertEqual(graph.texts(), [] if status == 200 else ["mended"])

    def test_reply_that_exits_costs_its_delivery_and_nothing_more(self):
        def reply(message):
            if exits:
                raise exits.pop()
            return "hello"

        exits = []
        bot = self.start_bot(self.start_graph(), reply=reply)
        for people in "2", "34":
            with self.subTest(people), self.assertLogs("echobot", "ERROR"):
                exits.extend(SystemExit(3) for _ in people)
                events = [message(mid="m_" + sender, sender=sender) for sender in people]
                self.assertEqual(self.deliver(bot, delivery(*events))[0], 500)
                self.assertEqual(self.deliver(bot, delivery(*events)), (200, "ok"))

    def test_of_two_events_with_one_mid_the_first_is_answered(self):
        graph = self.start_graph()
        bot = self.start_bot(graph)
        self.assertEqual(self.deliver(bot, delivery(message("first"), message("second"))), (200, "ok"))
        self.stop(bot)
        self.assertEqual(graph.texts(), ["first"])

    def test_a_delivery_brought_ten_times_at_once_gets_one_reply(self):
        hold = threading.Event()
        graph = self.start_graph(held(hold))
        bot = self.start_bot(graph, {"answer": WAIT})
        entered = self.entered(bot)
        payload = delivery(message(), message("other", "m_2", "3"))
        answers = [self.deliver_in_background(bot, payload) for _ in range(10)]
        self.until(lambda: entered.qsize() == 10)
        hold.set()
        self.assertEqual([answer.get(timeout=WAIT) for answer in answers], [200] * 10)
        self.stop(bot)
        self.assertEqual(sorted(graph.texts()), ["hello", "other"])

    def test_what_is_settled_is_not_sent_again(self):
        event, page = message(), {"recipient": {"id": "1"}}
        press = nameless({"sender": {"id": "2"}, "timestamp": 5}, "postback", **page)
        for known, other in ((event, message(mid="m_2")),
                             (nameless(event), nameless(event, timestamp=6)),
                             (nameless(event), nameless(event, sender={"id": "3"})),
                             (nameless({"sender": {"id": "2"}, "timestamp": 5}, **page), press),
                             (press, dict(press, timestamp=6)),
                             (dict(press, postback={"title": "hello", "mid": "m_3"}), event)):
            with self.subTest(known=known, other=other):
                graph = self.start_graph()
                bot = self.start_bot(graph)
                for _ in range(3):
                    self.assertEqual(self.deliver(bot, delivery(known)), (200, "ok"))
                self.assertEqual(self.deliver(bot, delivery(known, known)), (200, "ok"))
                self.assertEqual(graph.texts(), ["hello"])
                self.assertEqual(self.deliver(bot, delivery(known, other)), (200, "ok"))
                self.stop(bot)
                self.assertEqual(graph.texts(), ["hello"])

    def test_the_last_settled_are_remembered_and_not_more(self):
        graph = self.start_graph()
        bot = self.start_bot(graph, {"remembered": 3})
        for mid in "a", "b", "c", "d", "d", "c", "b", "a", "b":
            self.assertEqual(self.deliver(bot, delivery(message(mid, mid))), (200, "ok"))
        self.stop(bot)
        self.assertEqual("".join(graph.texts()), "abcdab")

    def test_beyond_the_limit_of_pending_replies_or_their_bytes_a_delivery_is_refused_whole_and_at_once(self):
        joined, fresh = message("a", "a", "5"), [message(mid, mid, mid) for mid in ("7", "8")]
        for limit in {"pending": 3}, {"pending_bytes": len(json.dumps(delivery(joined, *fresh)))}:
            with self.subTest(limit):
                hold = threading.Event()
                graph = self.start_graph(held(hold))
                bot = self.start_frozen_bot(graph, {"answer": 2 * WAIT, **limit})
                answers = self.deliver_in_background(bot, delivery(message("a", "a", "5"), message("b", "b", "6")))
                self.until(lambda: len(bot.outbox.pending) == 2)
                self.assertEqual(self.deliver(bot, delivery(joined, *fresh))[0], 503)
                self.assertEqual(self.deliver(bot, delivery(*fresh))[0], 503)
                self.assertEqual(len(bot.outbox.pending), 2)
                hold.set()
                self.assertEqual(answers.get(timeout=WAIT), 200)
                self.assertEqual(sorted(graph.texts()), ["a", "b"])
                self.assertEqual(self.deliver(bot, delivery(joined, *fresh)), (200, "ok"))
                self.stop(bot)
                self.assertEqual(sorted(graph.texts()), ["7", "8"])


class Order(PromiseTest):
    """One person's replies leave one at a time and in order; nobody waits for somebody else's."""

    def test_20_messages_of_one_person_are_answered_in_the_order_of_arrival_whatever_fails(self):
        hold, under_way, accepted, number = threading.Event(), threading.Semaphore(1), [], itertools.count()

        def answer(call):
            alone = under_way.acquire(blocking=False)
            hold.wait(WAIT)
            fails = next(number) % 4 == 1
            accepted.extend([] if fails else [call.text if alone else "not alone"])
            under_way.release()
            return None if fails else ACCEPTED

        bot = self.start_bot(self.start_graph(answer), {"first_pause": 0, "longest_pause": 0, "answer": WAIT})
        answers = []
        for text in map(str, range(0, 20, 2)):
            payload = delivery(message(text, text), message(text + "+", text + "+"))
            answers.append(self.deliver_in_background(bot, payload))
            self.until(lambda: len(bot.outbox.pending) == 2 * len(answers))
        hold.set()
        self.assertEqual([answer.get(timeout=WAIT) for answer in answers], [200] * 10)
        self.stop(bot)
        self.assertEqual(accepted, [text + end for text in map(str, range(0, 20, 2)) for end in ("", "+")])

    def test_a_person_whose_replies_fail_holds_up_nobody_else(self):
        graph = self.start_graph(lambda call: error(2, 500) if call.recipient == "ill" else ACCEPTED)
        bot = self.start_frozen_bot(graph)
        answers = self.deliver_in_background(bot, delivery(*(message(sender="ill", mid=mid) for mid in "abc"),
                                                           message("with it", "m_1", "3")))
        self.until(lambda: len(bot.outbox.pending) == 3)
        self.assertEqual(self.deliver(bot, delivery(message("after it", "m_2", "4"))), (200, "ok"))
        self.until(lambda: graph.calls.qsize() == 3)
        self.elapse(bot, 4)
        self.assertEqual(answers.get(timeout=WAIT), 503)
        self.assertEqual(set(graph.texts()), {"with it", "hello", "after it"})
        graph.answer = in_turn()
        self.settle(bot)
        self.assertEqual(graph.texts()[-3:], ["hello"] * 3)

    def test_a_person_for_whom_graph_is_slow_holds_up_nobody_else(self):
        hold = threading.Event()
        graph = self.start_graph(lambda call: held(hold)(call) if call.recipient == "slow" else ACCEPTED)
        bot = self.start_frozen_bot(graph)
        slow = self.deliver_in_background(bot, delivery(message(sender="slow"), message(mid="m_2", sender="3")))
        self.until(lambda: len(bot.outbox.pending) == 1)
        self.assertEqual(self.deliver(bot, delivery(message(mid="m_3", sender="3"))), (200, "ok"))
        hold.set()
        self.assertEqual(slow.get(timeout=WAIT), 200)

    def test_the_replies_to_50_people_in_one_delivery_go_out_at_once(self):
        all_there = threading.Barrier(50)
        graph = self.start_graph(lambda call: all_there.wait(WAIT) < 0 or ACCEPTED)
        bot = self.start_bot(graph, {"answer": WAIT})
        people = [message(mid=str(number), sender=str(number)) for number in range(2, 52)]
        self.assertEqual(self.deliver(bot, delivery(*people)), (200, "ok"))
        self.stop(bot)
        self.assertEqual(graph.calls.qsize(), 50)

    def test_no_more_people_are_written_to_at_once_than_may_be(self):
        hold = threading.Event()
        graph = self.start_graph(held(hold))
        bot = self.start_bot(graph, {"senders": 2, "answer": WAIT})
        people = [message(mid=str(number), sender=str(number)) for number in range(2, 8)]
        answers = self.deliver_in_background(bot, delivery(*people))
        self.until(lambda: graph.calls.qsize() == 2)
        self.assertEqual(self.request(bot, "GET", "/healthz")[0], 200)
        self.assertEqual(len(graph.connections), 2)
        hold.set()
        self.assertEqual(answers.get(timeout=WAIT), 200)
        self.assertEqual((graph.calls.qsize(), len(graph.connections)), (6, 2))

    def test_a_long_text_goes_out_in_order_and_goes_on_where_it_failed(self):
        long = "".join("%09d " % number for number in range(950))
        graph = self.start_graph(in_turn(ACCEPTED, ACCEPTED, error(2, 500), None))
        bot = self.start_bot(graph, {"first_pause": 0, "longest_pause": 0, "answer": WAIT})
        self.assertEqual(self.deliver(bot, delivery(message(long))), (200, "ok"))
        self.stop(bot)
        texts = graph.texts()
        self.assertEqual(texts[2:5], [texts[2]] * 3)
        self.assertEqual("".join(texts[:2] + texts[4:]), long)


class Draining(PromiseTest):
    """Being told to stop, the bot finishes what is under way."""

    def test_it_waits_for_no_client_that_has_nothing_under_way(self):
        bot = self.start_frozen_bot(self.start_graph(), {"drain": 10 ** 6})
        with closing(http.client.HTTPConnection("127.0.0.1", bot.server_address[1], timeout=WAIT)) as used:
            used.request("GET", "/healthz")
            self.assertEqual(used.getresponse().read(), b"ok")
            with closing(socket.create_connection(bot.server_address, WAIT)) as silent:
                self.until(lambda: len(bot.idle) == 2)
                self.stop_in_background(bot).join(WAIT)
                self.assertTrue(bot.closed.is_set())
                self.assertEqual((silent.recv(1), used.sock.recv(1)), (b"", b""))

    def test_what_is_left_in_the_end_is_left_without_a_word(self):
        hold = threading.Event()
        graph = self.start_graph(held(hold))
        bot = self.start_frozen_bot(graph)
        self.deliver_in_background(bot, delivery(message()))
        self.until(graph.calls.qsize)
        with self.assertLogs("echobot") as seen:
            echobot.log.info("assertLogs wants a line")
            self.stop(bot)
        hold.set()
        self.assertEqual((len(seen.output), len(bot.outbox.pending)), (1, 1))

    def test_what_is_under_way_is_finished_and_answered_and_nothing_new_is_taken(self):
        hold = threading.Event()
        graph = self.start_graph(held(hold))
        bot = self.start_bot(graph, {"answer": WAIT})
        answers = self.deliver_in_background(bot, delivery(message(), message(mid="m_2")))
        self.until(graph.calls.qsize)
        stopping = self.stop_in_background(bot)
        self.assertRaises(ConnectionError, self.deliver, bot, delivery(message(mid="m_3")))
        hold.set()
        self.assertEqual(answers.get(timeout=WAIT), 200)
        stopping.join(WAIT)
        self.assertTrue(bot.closed.is_set())
        self.assertEqual(graph.calls.qsize(), 2)

    def test_a_reply_that_waits_for_its_next_try_is_waited_for(self):
        graph = self.start_graph(in_turn(error(2, 500), error(2, 500)))
        bot = self.start_bot(graph, {"first_pause": 0.01})
        answers = self.deliver_in_background(bot, delivery(message()))
        self.until(graph.calls.qsize)
        self.stop(bot)
        self.assertEqual(answers.get(timeout=WAIT), 200)
        self.assertEqual(graph.calls.qsize(), 3)

    def test_replies_get_25_s_and_not_more(self):
        hold = threading.Event()
        graph = self.start_graph(held(hold, None))
        bot = self.start_frozen_bot(graph, {"drain": 25})
        answers = self.deliver_in_background(bot, delivery(message()))
        self.until(graph.calls.qsize)
        started = bot.loop.clock.now
        self.stop_in_background(bot)
        self.elapse_until(bot, 0.5, bot.closed.is_set)
        self.assertGreaterEqual(bot.loop.clock.now, started + 25)
        self.assertEqual(answers.get(timeout=WAIT), 503)
        hold.set()


class KeptConnections(PromiseTest):
    """Connections to Graph are kept open."""

    def test_deliveries_one_after_another_use_one_connection(self):
        graph = self.start_graph(lambda call: error(100) if call.text == "7" else ACCEPTED)
        bot = self.start_bot(graph)
        for number in range(20):
            self.deliver(bot, delivery(message(str(number), str(number))))
        self.stop(bot)
        self.assertEqual((graph.calls.qsize(), len(graph.connections)), (20, 1))

    def test_connections_that_graph_closed_while_idle_are_replaced_without_a_failure(self):
        timed_out = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        for last_words in b"", timed_out:
            with self.subTest(last_words=last_words):
                graph = self.wired_graph()
                graph.listen(self)
                bot = self.start_frozen_bot(graph)
                with self.assertLogs("echobot") as logs:
                    for batch in "ab":
                        all_there = threading.Barrier(5)
                        graph.answer = lambda call: all_there.wait(WAIT) < 0 or ACCEPTED
                        people = [message(mid=batch + sender, sender=sender) for sender in "56789"]
                        self.assertEqual(self.deliver(bot, delivery(*people)), (200, "ok"))
                        self.until(lambda: len(bot.graph.client.idle) == 5)
                        graph.cut(last_words)
                        self.elapse(bot, 2)
                self.stop(bot)
                self.assertEqual({record.levelname for record in logs.records}, {"INFO"})
                self.assertEqual((graph.calls.qsize(), len(graph.connections)), (10, 10))

    def test_what_graph_says_unasked_is_not_the_answer_to_the_next_call(self):
        refused = error(613)[2]
        for unasked in (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(ACCEPTED[2]), ACCEPTED[2]),
                        b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n%s" % (len(refused), refused), b"surplus"):
            with self.subTest(unasked[:12]):
                status, headers, body = ACCEPTED
                graph = self.start_graph(in_turn((status, {"Content-Length": len(body)}, body + unasked), error(613)))
                bot = self.start_frozen_bot(graph)
                self.assertEqual(self.deliver(bot, delivery(message())), (200, "ok"))
                answers = self.deliver_in_background(bot, delivery(message(mid="m_2")))
                self.until(lambda: graph.calls.qsize() == 2)
                self.assertEqual(len(graph.connections), 2)
                self.settle(bot)
                self.assertIn(answers.get(timeout=WAIT), (200, 503))
                self.assertEqual(graph.texts(), ["hello"] * 3)

    def test_a_call_without_an_answer_closes_the_idle_connections_which_may_lead_nowhere_either(self):
        go = threading.Event()
        graph = self.start_graph(lambda call: go.wait(WAIT) and ACCEPTED)
        bot = self.start_frozen_bot(graph, {"graph": 20})
        answers = self.deliver_in_background(bot, delivery(message(), message(mid="m_2", sender="3")))
        self.until(lambda: graph.calls.qsize() == 2)
        go.set()
        self.assertEqual(answers.get(timeout=WAIT), 200)
        self.until(lambda: len(bot.graph.client.idle) == 2)
        go.clear()
        self.deliver_in_background(bot, delivery(message(mid="m_3")))
        self.until(lambda: graph.calls.qsize() == 3)
        self.elapse(bot, 20)
        self.until(lambda: not bot.graph.client.idle)
        go.set()

    def test_a_server_that_takes_no_connection_keeps_no_reply_from_being_asked_for(self):
        asked = queue.Queue()
        with closing(socket.socket()) as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(8)
            graph = types.SimpleNamespace(url="https://127.0.0.1:%d/v26.0" % silent.getsockname()[1])
            bot = self.start_bot(graph, {"crew": 1, "drain": 0}, reply=lambda message: asked.put(message) or "hi")
            for number in range(2):
                self.deliver_in_background(bot, delivery(message(mid="m_%d" % number, sender="3%d" % number)))
                self.assertEqual(asked.get(timeout=WAIT)["mid"], "m_%d" % number)
                self.until(lambda: bot.loop.connectors.threads)

    def test_a_connection_that_nobody_has_needed_for_a_minute_is_closed(self):
        graph = self.start_graph()
        bot = self.start_frozen_bot(graph)
        for number, (seconds, connections) in enumerate(((0, 1), (59, 1), (1, 1), (120, 2))):
            self.elapse(bot, seconds)
            self.deliver(bot, delivery(message(mid="m_%d" % number)))
            self.assertEqual(len(graph.connections), connections)
            self.until(lambda: bot.graph.client.idle)


class Process:
    """A bot of its own process; `lines` gets what it logs."""

    def __init__(self, test, **environ):
        inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        self.popen = subprocess.Popen(
            [*PYTHON, "-I", program(), "--host", "127.0.0.1", "--port", "0"], stderr=subprocess.PIPE,
            env=dict(inherited, PAGE_ACCESS_TOKEN=TOKEN, APP_SECRET=SECRET, LOG_LEVEL="INFO", **environ))
        self.lines = queue.Queue()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        test.addCleanup(self.end)
        self.server_address = "127.0.0.1", int(re.search(r"http://127\.0\.0\.1:(\d+)", self.line("listens")).group(1))

    def read(self):
        for line in self.popen.stderr:
            self.lines.put(line.decode())

    def line(self, words):
        """Return the next line that has `words` in it."""
        while True:
            line = self.lines.get(timeout=WAIT)
            if words in line:
                return line

    def end(self):
        self.popen.kill()
        self.popen.wait(WAIT)
        self.reader.join(WAIT)
        self.popen.stderr.close()


class Processes(PromiseTest):
    """The promise, kept by a process and across two."""

    def load(self, bot, clients=8):
        """Deliver one message after another from `clients` threads until `bot` is gone; return what they need."""
        def client(name):
            for number in itertools.count():
                text = "%s%d" % (name, number)
                sent.append(text)
                status = self.bring(bot, delivery(message(text, text, name)))
                if status is None:
                    return
                done.extend([text] * (status == 200))

        sent, done = [], []
        threads = [threading.Thread(target=client, args=("client%d-" % number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        self.until(lambda: len(done) > 20)
        return sent, done, threads

    def finish(self, process, threads):
        """Return the exit status of a process under load, when all is over."""
        status = process.popen.wait(WAIT)
        for thread in threads:
            thread.join(WAIT)
        return status

    @unittest.skipUnless(os.name == "posix", "needs signals")
    def test_sigterm_under_load_ends_it_with_0_when_all_that_is_sent_is_answered(self):
        graph = self.start_graph()
        process = Process(self, GRAPH_URL=graph.url)
        _, done, threads = self.load(process)
        process.popen.terminate()
        self.assertEqual(self.finish(process, threads), 0)
        self.assertEqual(sorted(graph.texts()), sorted(done))

    @unittest.skipUnless(os.name == "posix", "needs limits")
    def test_it_keeps_to_what_the_host_lets_it_have(self):
        usual, cases = echobot.Limits(), (("NOFILE", 120, 0.1, 1), ("NOFILE", 1000, 1, 1), ("NOFILE", 41, 0.01, 1),
                                          ("DATA", 88 * MIB, 1, 0.5), ("DATA", 2 ** 40, 1, 1))
        code = "import os, resource; from echobot import *\n"
        for name, most, _, _ in cases:
            code += ("if not os.fork():\n"
                     " resource.setrlimit(resource.RLIMIT_{0}, ({1}, {1})); now = within_host(Limits())\n"
                     " print(now.connections, now.senders, now.held, now.pending_bytes, flush=True); os._exit(0)\n"
                     "os.wait()\n").format(name, most)
        said = subprocess.check_output([*PYTHON, "-c", code], cwd=os.path.dirname(echobot.__file__))
        for (name, most, files, memory), line in zip(cases, said.decode().splitlines()):
            with self.subTest(name, most=most):
                self.assertEqual([int(part) for part in line.split()],
                                 [usual.connections * files, usual.senders * files,
                                  usual.held * memory, usual.pending_bytes * memory])
        self.assertEqual(said.count(b"\n"), len(cases))

    @unittest.skipUnless(os.name == "posix", "needs signals")
    def test_a_second_sigterm_ends_it_at_once(self):
        hold = threading.Event()
        graph = self.start_graph(held(hold))
        process = Process(self, GRAPH_URL=graph.url)
        threading.Thread(target=self.bring, args=(process, delivery(message()))).start()
        self.until(graph.calls.qsize)
        process.popen.terminate()
        process.line("stopping")
        process.popen.terminate()
        self.assertEqual(process.popen.wait(WAIT), -signal.SIGTERM)
        hold.set()

    def test_killed_under_load_it_loses_nothing_that_is_brought_again(self):
        graph = self.start_graph()
        first = Process(self, GRAPH_URL=graph.url)
        sent, done, threads = self.load(first)
        first.popen.kill()
        self.finish(first, threads)
        second = Process(self, GRAPH_URL=graph.url)
        for text in set(sent) - set(done):
            self.assertEqual(self.deliver(second, delivery(message(text, text))), (200, "ok"))
        self.assertEqual(set(sent) - set(graph.texts()), set())

    def test_calls_go_through_the_proxy_of_the_environment(self):
        proxy = self.start_graph()
        address = "http://user:pass%%20word@127.0.0.1:%d/" % proxy.server_address[1]
        process = Process(self, GRAPH_URL="http://graph.invalid/v26.0", http_proxy=address)
        self.assertEqual(self.deliver(process, delivery(message())), (200, "ok"))
        self.assertEqual(self.deliver(process, delivery(message(mid="m_2"))), (200, "ok"))
        call = proxy.calls.get(timeout=WAIT)
        self.assertRegex(call.path, r"^http://graph\.invalid/v26\.0/me/messages\?access_token=%s&" % TOKEN)
        self.assertEqual((call.headers["Host"], call.headers["Proxy-Authorization"]),
                         ("graph.invalid", "Basic dXNlcjpwYXNzIHdvcmQ="))
        self.assertEqual((proxy.calls.qsize(), len(proxy.connections)), (1, 1))

    def test_a_tunnel_that_the_proxy_refuses_is_a_failure_for_now_and_logged_clearly(self):
        class Refusing(GraphHandler):
            def do_CONNECT(self):
                self.server.calls.put(dict(self.headers, path=self.path))
                self.send_error(403)

        proxy = self.start_graph()
        proxy.RequestHandlerClass = Refusing
        address = "http://user:pass%%20word@127.0.0.1:%d" % proxy.server_address[1]
        process = Process(self, GRAPH_URL="https://graph.invalid/v26.0", https_proxy=address)
        threading.Thread(target=self.bring, args=(process, delivery(message()))).start()
        line = process.line("WARNING")
        self.assertRegex(line, "tried again.*Tunnel connection failed: 403")
        self.assertNotRegex(line, "pass|%s|%s" % (TOKEN, SECRET))
        call = proxy.calls.get(timeout=WAIT)
        self.assertEqual((call["path"], call["Proxy-Authorization"]),
                         ("graph.invalid:443", "Basic dXNlcjpwYXNzIHdvcmQ="))


def run(*arguments, typed=b"", stderr=subprocess.PIPE, **environ):
    """Run the program as a user does; return its exit status, its standard output and its standard error."""
    done = subprocess.run([*PYTHON, program(), *arguments], input=typed if isinstance(typed, bytes) else typed.encode(),
                          env=dict(os.environ, PYTHONIOENCODING="utf-8", **environ), timeout=30,
                          stdout=subprocess.PIPE, stderr=stderr)
    texts = (text.decode().replace("\r\n", "\n") for text in (done.stdout, done.stderr or b""))
    return (done.returncode, *texts)


class TalkOnAPipe(BotTest):
    COMMANDS = (  # what is typed, what the bot says to it, and what is noted beside that
        ("hi", ["hi"], "^$"),
        ("/sticker", ["I can't echo this"], "^$"),
        ("/image", ["I can't echo this"], "^$"),
        ("/postback", ["Get started"], "^$"),
        ("/batch", ["one", "two", "three"], "^$"),
        ("/read", [], "200.*no reply"),
        ("/echo", [], "200.*no reply"),
        ("/edit", [], "200.*no reply"),
        ("once\n/again", ["once"], "200.*no reply"),
        ("never twice\n/unsigned\n/again", ["never twice"], "(?s)X-Hub-Signature-256.*403.*200"),
        ("/wire\n/wire", [], "(?s)Messenger > bot.*bot > Graph.*Graph > bot.*bot > Messenger"),
        ("/nope", [], "/nope.*/help"),
        ("/help", [], "/help"),
    )
    PLAIN = "hello\n/sticker\n/help\n/wire\n\U0001f600 \u00e9\n/nope\n\n   \n/read\n/unsigned\n bye "
    LONG = "".join("%d little bots, " % number for number in range(1000))[:5000]
    FAULTS = (  # and what is noted about it
        ("/slow", ["hello"], "503.*\n.*brings.* again"),
        ("/500", ["hello"], "tried again"),
        ("/613", ["hello"], "tried again.*too fast"),
        ("/190", [], "token"),
    )

    @classmethod
    def start(cls):
        """Start the talks that the tests below look at, all at once, beside the other tests: they take a while."""
        commands = "".join("%s\n-- \n" % line for line, _, _ in cls.COMMANDS)
        talks = {"commands": dict(typed=commands, stderr=subprocess.STDOUT), "plain": dict(typed=cls.PLAIN),
                 "long": dict(typed=cls.LONG.encode() + b"\n\xff\xfe\xed\xa0\x80\nhello\n"),
                 "wire": dict(typed="hello\n/wire\n/190\nhello again\n"),
                 **{command: dict(typed=command + "\nhello\nbye\n") for command, _, _ in cls.FAULTS}}
        pool = concurrent.futures.ThreadPoolExecutor(2)
        cls.talks = {name: pool.submit(run, "chat", **talk) for name, talk in talks.items()}
        pool.shutdown(wait=False)

    def chat(self, talk):
        return self.talks[talk].result()

    def test_standard_output_holds_what_the_bot_says_and_nothing_else(self):
        self.assertEqual(self.chat("plain")[:2], (0, "hello\nI can't echo this\n\U0001f600 \u00e9\n bye \n"))

    def test_each_command_has_the_bot_say_what_it_does_in_life(self):
        status, output, _ = self.chat("commands")
        *blocks, rest = output.split("-- \n")
        self.assertEqual((status, len(blocks), rest), (0, len(self.COMMANDS), ""))
        for (line, said, noted), block in zip(self.COMMANDS, blocks):
            with self.subTest(line):
                lines = block.splitlines()
                notes = [each for each in lines if re.match(r"\(|  |INFO|WARNING|ERROR", each)]
                self.assertEqual([each for each in lines if each not in notes], said)
                self.assertRegex("\n".join(notes), noted)
        known = {line.split("\n")[-1] for line, _, _ in self.COMMANDS + self.FAULTS} | {"/unsigned"}
        self.assertEqual(set(re.findall("^ *(/[a-z0-9]+)", blocks[-1], re.M)), known - {"hi", "/nope"})

    def test_a_fault_of_graphs_is_told_and_the_reply_comes_once_or_not_at_all(self):
        for command, said, noted in self.FAULTS:
            with self.subTest(command):
                status, output, notes = self.chat(command)
                self.assertEqual((status, output.splitlines()), (0, said + ["bye"]))
                self.assertRegex(notes.split("\n", 1)[1], noted)

    def test_a_long_text_comes_in_several_lines_that_make_it_up_and_what_is_not_utf_8_ends_nothing(self):
        status, output, notes = self.chat("long")
        *lines, _, last, rest = output.split("\n")
        self.assertEqual((status, "".join(lines), last, rest, notes), (0, self.LONG, "hello", "", ""))
        self.assertTrue(len(lines) > 2 and max(map(len, lines)) <= 2000)

    def test_nothing_of_the_environment_is_used(self):
        graph = self.start_graph()
        trap = {name: graph.url for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "GRAPH_URL")}
        output = run("chat", typed="hello\n/sticker\n", PAGE_ACCESS_TOKEN="a b", APP_SECRET="\u00e9", PORT="no",
                     HOST="nowhere.invalid", LOG_LEVEL="LOUD", no_proxy="", NO_PROXY="", **trap)
        self.assertEqual(output[:2], (0, "hello\nI can't echo this\n"))
        self.assertTrue(graph.calls.empty())

    def test_wire_shows_both_exchanges_and_no_secret(self):
        _, _, notes = self.chat("wire")
        ways = ["Messenger > bot", "bot > Graph", "Graph > bot", "bot > Messenger"]
        self.assertEqual(re.findall(r"\w+ > \w+", notes), 2 * ways)
        values = [json.loads(line) for line in notes.splitlines() if line.strip().startswith("{")]
        for text, (brought, call, answer) in ("hello", values[:3]), ("hello again", values[3:6]):
            event, = brought["entry"][0]["messaging"]
            self.assertEqual(event["message"]["text"], text)
            self.assertEqual(call, {"recipient": event["sender"], "messaging_type": "RESPONSE",
                                    "message": {"text": text}})
            self.assertEqual("error" in answer, text != "hello")
        self.assertEqual(re.findall(r"^ *(?:HTTP/1.1 )?(\d{3})\b", notes, re.M), ["200", "200", "400", "200"])
        for shown in "POST /webhook", "X-Hub-Signature-256: sha256=[0-9a-f]{64}\n", r"POST /v26.0/me/messages\?acc":
            self.assertRegex(notes, shown)
        for secret in r"\b[0-9a-f]{32}\b", r"(access_token|appsecret_proof)=\w":
            self.assertNotRegex(notes, secret)


@unittest.skipUnless(hasattr(os, "openpty"), "this system has no pseudo-terminals")
class TalkOnATerminal(unittest.TestCase):
    def test_it_prompts_and_answers_until_control_d(self):
        terminal, inner = os.openpty()
        self.addCleanup(os.close, terminal)
        process = subprocess.Popen([*PYTHON, program(), "chat"], stdin=inner, stdout=inner, stderr=inner)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        os.close(inner)
        self.assertIn("/help", self.read_until(terminal, "you> "))
        os.write(terminal, b"hello\n")
        self.assertRegex(self.read_until(terminal, "you> "), r"^hello\r\n(bot> )?hello\r\nyou> $")
        os.write(terminal, b"\x04")
        self.assertEqual(process.wait(WAIT), 0)

    def read_until(self, terminal, ending):
        """Return what the terminal shows up to `ending`."""
        shown = ""
        while not shown.endswith(ending):
            self.assertTrue(select.select([terminal], [], [], WAIT)[0], shown)
            shown += os.read(terminal, 4096).decode()
        return shown


class CommandTest(BotTest):
    def start(self, server):
        """Have `server` serve, and close it in the end."""
        server.thread = threading.Thread(target=server.serve_forever, daemon=True)
        server.thread.start()
        self.addCleanup(self.stop, server)


class PlayedGraph(CommandTest):
    def test_it_takes_what_graph_takes_and_refuses_what_graph_refuses(self):
        said, right = [], echobot.credentials(echobot.Settings(token=TOKEN, secret=SECRET))
        loop = echobot.Loop()
        self.addCleanup(loop.close)
        played = echobot.PlayedGraph(loop, right, said.append, lambda *lines: None)
        self.start(played)
        for name, query, change, code in (
            ("a right call", right, {}, None),
            ("a text of 2,000 characters", right, {"message": {"text": 2000 * "x"}}, None),
            ("a text of 2,001 characters", right, {"message": {"text": 2001 * "x"}}, 100),
            ("a text of 1,001 emoji, two units each", right, {"message": {"text": 1001 * "\U0001f600"}}, 100),
            ("an empty text", right, {"message": {"text": ""}}, 100),
            ("no text", right, {"message": {}}, 100),
            ("no messaging_type", right, {"messaging_type": None}, 100),
            ("no recipient", right, {"recipient": None}, 100),
            ("a recipient without an id", right, {"recipient": {}}, 100),
            ("another token", right.replace(TOKEN, "another"), {}, 190),
            ("no token", "", {}, 190),
            ("another proof", right[:-1] + chr(ord(right[-1]) ^ 1), {}, 100),
        ):
            with self.subTest(name):
                said.clear()
                call = {"recipient": {"id": "1"}, "messaging_type": "RESPONSE", "message": {"text": "hi"}}
                call = {name: value for name, value in dict(call, **change).items() if value is not None}
                body = json.dumps(call).encode()
                status, _, text = self.request(played, "POST", "/v26.0/me/messages?" + query, body)
                self.assertEqual(status, 400 if code else 200)
                self.assertEqual(json.loads(text).get("error", {}).get("code"), code)
                self.assertEqual(said, [] if code else [call["message"]["text"]])


SESAME, PASSWORD = "open-sesame", "pass-word"
PAGE, SUBSCRIBED = {"id": "1", "name": "A Page"}, {"data": [{"id": "9", "subscribed_fields": ["feed", "messages"]}]}


def said_by_graph(me=PAGE, apps=SUBSCRIBED):
    """Return how Graph answers, if it says `me` of the token and `apps` of the subscription."""
    answers = [each if isinstance(each, tuple) else (200, {}, json.dumps(each).encode()) for each in (me, apps)]
    return lambda call: answers["/subscribed_apps" in call.path]


def refusal(code, subcode=None, words="", status=400):
    """Return an answer of Graph's that quotes the token, as some do."""
    error = {"message": words + TOKEN, "type": "OAuthException", "code": code, "error_subcode": subcode}
    return status, {}, json.dumps({"error": error}).encode()


class ProxyHandler(GraphHandler):
    do_CONNECT = GraphHandler.handle_call


class CheckTest(CommandTest):
    def setUp(self):
        self.graph = self.start_graph(said_by_graph())
        self.environ = {"PAGE_ACCESS_TOKEN": TOKEN, "APP_SECRET": SECRET, "VERIFY_TOKEN": SESAME,
                        "GRAPH_URL": self.graph.url}

    def check(self, url=None, proxies=None, answer=said_by_graph(), **environ):
        """Return the lines of a report that say FAIL, and the others.

        Whatever it is about, its lines are well formed, no secret is in them, and Graph was asked and told nothing.
        """
        limits = {"seconds": environ.pop("seconds")} if "seconds" in environ else {}
        self.graph.answer = answer
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = echobot.check(dict(self.environ, **environ), url, proxies or {}, **limits)
        lines = output.getvalue().splitlines()
        for line in lines:
            self.assertRegex(line, r"\A(ok  |FAIL)  [^\x00-\x1f\x7f]{20,}\Z")
            self.assertNotRegex(line, "|".join((TOKEN, SECRET, SESAME, PASSWORD)))
        self.assertLessEqual({call.method for call in drain(self.graph.calls)}, {"GET"})
        failed = [line for line in lines if line.startswith("FAIL")]
        self.assertEqual(status, 1 if failed else 0)
        return failed, [line for line in lines if line not in failed]

    def check_causes(self, *causes):
        """Assert of each cause (name, what `check` is given, pattern) that the report names it, and nothing else."""
        for name, given, pattern in causes:
            with self.subTest(name):
                failed, _ = self.check(**given)
                if given.get("url", "").startswith("http:"):  # as bots have here, of which it rightly complains
                    self.assertRegex(failed.pop(0), "not https.*certificate")
                self.assertEqual(len(failed), 1, failed)
                self.assertRegex(failed[0], pattern)

    def check_process(self, status, words, *url, **environ):
        """Assert that the command exits with `status`, and that its lines begin with `words`."""
        result = run("check", *url, **dict(dict(self.environ, no_proxy="*", NO_PROXY="*"), **environ))
        self.assertEqual((result[0], re.findall("^[a-zA-Z]+", result[1], re.M), result[2]), (status, words, ""))

    def bind(self):
        """Return a socket with a port, where nobody listens, and its http URL."""
        bound = socket.socket()
        self.addCleanup(bound.close)
        bound.bind(("127.0.0.1", 0))
        return bound, "http://127.0.0.1:%d" % bound.getsockname()[1]


class CheckGraph(CheckTest):
    def test_where_all_is_well_each_line_says_so(self):
        for name in "A Page", "\n\x1b[2JFAIL \x7f\r\u202e A Page":  # which cannot break the report
            with self.subTest(name):
                failed, well = self.check(answer=said_by_graph({"id": "1", "name": name}))
                self.assertEqual(failed, [])
                self.assertRegex("\n".join(well), "(?s)APP_SECRET.*A Page.*messages")

    def test_graph_is_asked_with_the_token_and_its_proof(self):
        calls = []
        self.check(answer=lambda call: calls.append(call.path) or said_by_graph()(call))
        proof = hmac.new(SECRET.encode(), TOKEN.encode(), hashlib.sha256).hexdigest()
        self.assertEqual([path.split("?")[0] for path in calls], ["/v26.0/me", "/v26.0/me/subscribed_apps"])
        for path in calls:
            query = dict(urllib.parse.parse_qsl(path.split("?")[1]))
            self.assertEqual((query["access_token"], query["appsecret_proof"]), (TOKEN, proof))

    def test_each_cause_in_the_settings_is_named_with_its_mend(self):
        self.check_causes(
            ("no token", {"PAGE_ACCESS_TOKEN": ""}, "PAGE_ACCESS_TOKEN is not set.*: set it"),
            ("no secret", {"APP_SECRET": ""}, "APP_SECRET.*: set"),
            ("a space", {"PAGE_ACCESS_TOKEN": "page- token"}, "PAGE_ACCESS_TOKEN.*space.*: copy it again"),
            ("unsigned allowed", {"APP_SECRET": "", "ALLOW_UNSIGNED": "1"}, "APP_SECRET.*: set"),
        )
        self.assertRegex(self.check(GRAPH_URL="https://a..b")[0][0], "GRAPH_URL.*: remove it")
        self.assertEqual(len(self.check(PAGE_ACCESS_TOKEN="", PORT="no", LOG_LEVEL="LOUD")[0]), 2)

    def test_each_cause_that_graph_knows_is_named_with_its_mend(self):
        proof = "Invalid appsecret_proof provided in the API argument"
        self.check_causes(*((name, {"answer": said_by_graph(**said)}, pattern) for name, said, pattern in (
            ("malformed", {"me": refusal(190)}, "token.*not copied whole.*: make a new PAGE_ACCESS_TOKEN"),
            ("expired", {"me": refusal(190, 463)}, "token.*expired: make a new PAGE_ACCESS_TOKEN"),
            ("removed", {"me": refusal(190, 458)}, "token.*app was removed.*: make a new PAGE_ACCESS_TOKEN"),
            ("new password", {"me": refusal(190, 460)}, "token.*password: make a new PAGE_ACCESS_TOKEN"),
            ("revoked", {"me": refusal(190, 467)}, "token.*revoked: make a new PAGE_ACCESS_TOKEN"),
            ("a person's token", {"apps": refusal(100)}, "token.*person's.*not a page's: make one for the page"),
            ("another app's secret", {"me": refusal(100, None, proof)}, "APP_SECRET.*: copy both from the same app"),
            ("no permission", {"apps": refusal(200)}, "may not tell: make one that has pages_manage_metadata"),
            ("not subscribed", {"apps": {"data": []}}, "no app is subscribed.*: subscribe it to messages"),
            ("no messages", {"apps": {"data": [{"subscribed_fields": ["feed"]}]}}, "without messages: subscribe it"),
            ("down", {"me": refusal(2, status=500)}, "Graph.*down"),
            ("a portal", {"me": (200, {}, b"<html>Log in!")}, "200 and not Graph's.*: check GRAPH_URL and the proxy"),
        )))


class CheckNetwork(CheckTest):
    def test_each_cause_is_named_with_its_mend_for_graph_and_for_the_webhook(self):
        proxy = self.start_graph(lambda call: (403, {}, b""))
        proxy.RequestHandlerClass = ProxyHandler
        refusing = {"https": proxy.url.replace("//", "//me:%s@" % PASSWORD)}
        (_, dead), nowhere = self.bind(), "https://graph.invalid/v26.0"
        for name, url, proxies, pattern in (
            ("nothing listens", dead, {}, "nothing listens there: check %s"),
            ("no name", "https://[fe80::1%nosuch]", {}, "name cannot be looked up: check it"),  # asks no DNS
            ("the proxy refuses", nowhere, refusing, "proxy 127.0.0.1:.* refuses: check https_proxy and no_proxy"),
            ("the proxy is dead", nowhere, {"https": dead}, "proxy 127.*nothing listens there: check https_proxy"),
            ("the proxy is none", nowhere, {"https": "a:b:c"}, "proxy a:b:c, its port is not a number: check https_pr"),
            ("no TLS", proxy.url.replace("http:", "https:"), {}, "does not speak TLS: check %s"),
        ):
            self.check_causes(
                ("Graph: " + name, {"GRAPH_URL": url, "proxies": proxies}, pattern.replace("%s", "GRAPH_URL")),
                ("webhook: " + name, {"url": url, "proxies": proxies}, pattern.replace("%s", "the address.*bot runs")))

    def test_what_never_answers_ends_its_part_of_the_report(self):
        silent, url = self.bind()
        silent.listen(5)
        for name, given in ("Graph", {"GRAPH_URL": url}), ("the webhook", {"url": url}):
            self.check_causes((name, dict(given, seconds=0.1), r"does not answer within 0\.1 s: check"))

    @unittest.skipUnless(shutil.which("openssl"), "there is no openssl to make a certificate with")
    def test_a_certificate_has_to_be_trusted(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        key, certificate = os.path.join(folder.name, "key"), os.path.join(folder.name, "certificate")
        command = ("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=bot "
                   "-addext subjectAltName=IP:127.0.0.1")
        subprocess.run(command.split() + ["-keyout", key, "-out", certificate], check=True, stderr=subprocess.DEVNULL)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        bot = echobot.make_server(echobot.Settings(TOKEN, SECRET, SESAME, "127.0.0.1", 0, self.graph.url), proxies={})
        bot.socket = context.wrap_socket(bot.socket, server_side=True)
        self.start(bot)
        url = "https://127.0.0.1:%d/webhook" % bot.server_address[1]
        self.check_causes(("the webhook's", {"url": url}, r"certificate is not trusted \(self.signed.*\): renew it"),
                          ("Graph's", {"GRAPH_URL": url}, "certificate is not trusted .*: .*clock"))
        with self.assertLogs("echobot"):
            self.check_process(0, 7 * ["ok"], url, SSL_CERT_FILE=certificate)


class CheckWebhook(CheckTest):
    def webhook(self, path="", **settings):
        """Return the URL of a live bot, which would send to the same stand-in for Graph."""
        bot = self.start_bot(self.graph, **dict({"verify_token": SESAME}, **settings))
        return "http://127.0.0.1:%d%s" % (bot.server_address[1], path)

    def test_a_live_bot_is_well_but_for_https_and_sends_nothing(self):
        for path in "", "/", "/webhook":
            with self.subTest(path), self.assertLogs("echobot"):
                failed, well = self.check(self.webhook(path))
                self.assertEqual(["not https" in line for line in failed], [True], failed)
                self.assertEqual(len(well), 3 + 4)

    def test_each_cause_in_a_live_bot_is_named_with_its_mend(self):
        with self.assertLogs("echobot"):
            self.check_causes(*((name, {"url": url}, pattern) for name, url, pattern in (
                ("another path", self.webhook("/elsewhere"), "nothing at this path: .*/webhook"),
                ("another verify token", self.webhook(verify_token="x"), "another VERIFY_TOKEN: make the two"),
                ("another secret", self.webhook(secret="x"), "another APP_SECRET.* make the two"),
                ("no secret", self.webhook(secret=""), "anybody can.*: set APP_SECRET there"),
            )))

    def test_each_cause_in_what_is_not_the_bot_is_named_with_its_mend(self):
        def says(status, body=b"", location=""):
            return lambda call: (status, {"Location": location + call.path} if location else {}, body)

        def obliging(call):
            return 200, {}, "".join(re.findall(r"hub\.challenge=(\w*)", call.path)).encode()

        other = "something else answers.*status %d: check the address.*/webhook.*, and that the bot runs"
        self.check_causes(*((name, {"url": self.start_graph(answer).url}, pattern) for name, answer, pattern in (
            ("a page", says(200, b"Welcome"), other % 200),
            ("a long page", says(200, 2**21 * b"x"), "something else answers there: check the address"),
            ("a guard", says(403, b"Blocked"), other % 403),
            ("a dead bot", says(502, b"Bad gateway"), "a proxy.*status 502.*: start the bot"),
            ("a redirect", says(302, b"", "https://example.com"), "redirects to https://example.com/v26.0.*: give"),
        )))
        self.assertRegex("\n".join(self.check(url=self.start_graph(obliging).url)[0]), "other token.* is taken")

    def test_what_is_no_url_is_named_with_its_mend(self):
        mend = "URL.*: give the callback URL, without . and #, like https://"
        self.check_causes(*((url, {"url": url}, mend) for url in (
            "example.com", "ftp://a.com", "https://", "https://a.com:99999", "https://a b.com", "https://a..b")))

    def test_the_exit_status_of_the_process_says_whether_all_is_well(self):
        self.check_process(0, 3 * ["ok"])
        self.check_process(1, ["FAIL"], PAGE_ACCESS_TOKEN="")


def setUpModule():
    TalkOnAPipe.start()


if __name__ == "__main__":
    unittest.main()
