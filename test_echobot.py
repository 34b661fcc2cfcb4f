"""What echobot promises, on real sockets: Messenger on one side of the bot, a stand-in for Graph on the other.

The classes follow the design, part by part.  If you change `echobot.reply`, change `Words`, and nothing else.
"""
import collections
import contextlib
import functools
import hashlib
import hmac
import http.client
import http.server
import io
import json
import logging
import os
import queue
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import urllib.parse
import urllib.request

import echobot

WAIT = 20  # s: a bound on waits, which end at once unless something is broken
SECRET, TOKEN, VERIFY = "app-secret", "page-token", "verify-token"
PROOF = hmac.new(SECRET.encode(), TOKEN.encode(), hashlib.sha256).hexdigest()
CREDENTIALS = "access_token=%s&appsecret_proof=%s" % (TOKEN, PROOF)
SORRY = "I can't echo this"
MIB = 1024 * 1024
OPEN = 200, {}, b""
ACCEPTED = 200, {}, b'{"recipient_id":"2","message_id":"m_out"}'
logging.getLogger("echobot").addHandler(logging.NullHandler())  # the tests that are about the log look at it


class Clock:
    """Time that passes only when a test says so, as the parameters `clock` and `wait` of a bot.

    If it `leaps`, a pause between retries takes no time; `pauses` are their seconds.
    """

    def __init__(self, leaps=False):
        self.now, self.leaps, self.pauses = 1000.0, leaps, []

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds

    def wait(self, event, seconds):
        """Wait as `threading.Event.wait` does, in this time."""
        until = self.now + seconds
        if self.leaps and not event.is_set():
            self.pauses.append(seconds)
            self.now = until
        while not event.wait(0.005) and self.now < until:
            pass
        return event.is_set()


def accept(call):
    return ACCEPTED


def graph_error(code, status=400, headers=None, **more):
    """Return an answer of Graph's that refuses a call."""
    content = dict(more, message="secret words", type="OAuthException", code=code, fbtrace_id="TR4CE")
    return status, headers or {}, json.dumps({"error": content}).encode()


class Graph(http.server.ThreadingHTTPServer):
    """A stand-in for Graph: puts each call into `calls`, and gives it the answer that `answer(call)` returns.

    An answer is (status, headers, body), or None to close the connection without one.
    """

    request_queue_size = 1024

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), GraphHandler)
        self.calls, self.answer, self.connections, self.context = queue.Queue(), answer, [], None
        self.url = "http://127.0.0.1:%d/v26.0" % self.server_port

    def process_request(self, request, client_address):
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        """The bot may have gone in the middle: that is what some tests are about."""

    def texts(self):
        """Return the texts of the calls since the last time."""
        return [self.calls.get().text for _ in range(self.calls.qsize())]


class GraphHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = json.loads(body or "{}")
        call = types.SimpleNamespace(method=self.command, path=self.path, headers=self.headers, content=content,
                                     recipient=content.get("recipient", {}).get("id"),
                                     text=content.get("message", {}).get("text"), ascii=body.isascii())
        self.server.calls.put(call)
        answer = self.server.answer(call)
        if answer is None:
            self.close_connection = True
            return
        status, headers, body = answer
        if answer is ACCEPTED:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # as some proxies do unasked
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def do_CONNECT(self):
        """Answer as a proxy; if it is open, then as the Graph behind it, over TLS."""
        self.do_POST()
        self.wfile.flush()
        if self.server.context:
            self.request = self.server.context.wrap_socket(self.request, server_side=True)
            self.setup()
            self.close_connection = False

    def finish(self):
        super().finish()
        self.request.close()

    def log_message(self, *args):
        pass


def close_idle(opener):
    """Close the connections that `opener` keeps, which at the end of a process nobody needs to do."""
    handler, = (handler for handler in opener.handlers if isinstance(handler, echobot.KeepAliveHandler))
    for _, connection, buffer in sum(handler.idle.values(), []):
        buffer.close()
        connection.close()
    handler.idle.clear()


def message(text="hello", mid="m_1", sender="2", **more):
    """Return the event of a person's message, as Messenger describes it."""
    return {"sender": {"id": sender}, "recipient": {"id": "1"}, "timestamp": 1458692752478,
            "message": dict({"mid": mid, "text": text}, **more)}


def people(*senders):
    """Return the events of a message from each of `senders`, in a list."""
    return [message(mid="m_%s" % sender, sender=str(sender)) for sender in senders]


def delivery(*events):
    """Return the payload of a delivery of `events`."""
    return {"object": "page", "entry": [{"id": "1", "time": 1458692752478, "messaging": list(events)}]}


def signed(body, secret=SECRET):
    """Return the header fields that sign `body`."""
    return {"X-Hub-Signature-256": "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}


def echo(message):
    """The bot of the tests.  What `echobot.reply` says is for `Words` to test, and for you to change."""
    return message["text"] or SORRY


class Words(unittest.TestCase):
    """What the bot says.  Change it with `echobot.reply`; no other test depends on it."""

    def test_a_text_is_said_back_and_anything_else_is_answered_with_an_excuse(self):
        self.assertEqual(echobot.reply({"mid": "m_1", "text": "hello"}), "hello")
        self.assertEqual(echobot.reply({"mid": "m_1", "text": "", "attachments": [{"type": "image"}]}), SORRY)


def split(wire):
    """Return the answers (`status`, `fields`, `text`) in `wire`; raise ValueError where it holds anything else."""
    answers = []
    while wire:
        head, end, rest = wire.partition(b"\r\n\r\n")
        (version, status, _), *lines = (line.split(" ", 2) for line in head.decode().split("\r\n"))
        fields = {name.rstrip(":"): " ".join(value) for name, *value in lines}
        length = int(fields.get("Content-Length", 0))
        if version != "HTTP/1.1" or not end or len(rest) < length:
            raise ValueError(wire)
        answers.append(types.SimpleNamespace(status=int(status), fields=fields, text=rest[:length].decode()))
        wire = rest[length:]
    return answers


class BotTest(unittest.TestCase):
    """Starts bots and stand-ins for Graph, stops them, and is Messenger or anybody else on a bot's socket."""

    opener = echobot.make_opener(proxies={})  # of all bots, save where its limits matter

    def request(self, bot, method, path, body=None, headers=None):
        """Return the status, the headers and the text of an answer."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", bot.server_port, timeout=WAIT)) as connection:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read().decode()

    def deliver(self, bot, payload):
        """Return the status that a signed delivery is answered."""
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        return self.request(bot, "POST", "/webhook", body, signed(body))[0]

    def sent(self, bot, *events):
        """Return the texts that are sent for a delivery of `events`, which is answered 200."""
        self.assertEqual(self.deliver(bot, delivery(*events)), 200)
        return bot.graph.texts()

    def deliver_in_background(self, bot, payload):
        """Return a queue that will hold the status of the delivery's answer, or None if the bot is gone."""
        def deliver():
            try:
                statuses.put(self.deliver(bot, payload))
            except (OSError, http.client.HTTPException):
                statuses.put(None)

        statuses = queue.Queue()
        threading.Thread(target=deliver, daemon=True).start()
        return statuses

    def connect(self, bot, data=b""):
        """Return a connection on which `data` has been sent."""
        client = socket.create_connection(("127.0.0.1", bot.server_port), WAIT)
        self.addCleanup(client.close)
        client.sendall(data)
        return client

    def one(self, client):
        """Return the next answer, which is one write."""
        answer, = split(client.recv(MIB))
        return answer

    def rest(self, client):
        """Return the answers that come until the bot closes the connection, or resets it."""
        wire = b""
        with contextlib.suppress(ConnectionResetError):
            for data in iter(lambda: client.recv(MIB), b""):
                wire += data
        client.close()
        return split(wire)

    def last_statuses(self, client):
        return [answer.status for answer in self.rest(client)]

    def answers(self, bot, data):
        return self.rest(self.connect(bot, data))

    def statuses(self, bot, data):
        return self.last_statuses(self.connect(bot, data))

    def said(self, bot, data):
        return [(answer.status, answer.text) for answer in self.answers(bot, data)]

    def serve(self, server):
        """Run a server until the test ends."""
        threading.Thread(target=server.serve_forever, args=(0.002,), daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return server

    def start_graph(self, answer=accept):
        return self.serve(Graph(answer))

    def start_bot(self, answer=None, limits=None, reply=echo, clock=None, **settings):
        """Return a bot that serves: with a token, a secret and a Graph that gives `answer`, or else on a dry run.

        In the time of `clock` it does not drain, unless `limits` say so.
        """
        graph = answer and self.start_graph(answer)
        if graph:
            settings = {"page_access_token": TOKEN, "app_secret": SECRET, "graph_url": graph.url, **settings}
        settings = echobot.Settings(host="127.0.0.1", port=0, verify_token=VERIFY)._replace(**settings)
        limits = echobot.Limits()._replace(**{**({"drain": 0} if clock else {}), **(limits or {})})
        times = {"clock": clock, "wait": clock.wait} if clock else {}
        opener = echobot.make_opener(limits, {}, clock) if limits.graph_idle < 64 else self.opener
        bot = self.serve(echobot.make_server(settings, limits, reply, opener, **times))
        bot.graph, bot.opener = graph, opener
        self.addCleanup(self.stop, bot)
        if clock:  # which stands still: where a test fails, draining would never end
            self.addCleanup(vars(bot).update, limits=limits._replace(drain=0))
        # No reply may be left, or its log would reach the next test
        self.addCleanup(self.until, lambda: not bot.outbox.pending or clock and clock.advance(10 ** 9))
        return bot

    def stop(self, bot):
        """Stop `bot` as SIGTERM does; return how many replies are left."""
        bot.shutdown()
        left = bot.drain()
        close_idle(bot.opener)
        return left

    def until_states(self, bot, **numbers):
        """Wait until so many connections are in each of the states that are named."""
        def states():
            return collections.Counter(state for _, state in list(bot.deadlines.values()))

        self.until(lambda: numbers.items() <= states().items())

    def until(self, condition):
        """Wait until `condition()` holds."""
        for _ in range(WAIT * 500):
            if condition():
                return
            threading.Event().wait(0.002)
        self.fail("waited in vain")

    def logged(self, action, *arguments):
        """Return what `action` returns and the lines that it logs, as (level, text); no traceback is among them."""
        with self.assertLogs("echobot", "DEBUG") as logs:
            echobot.log.debug("assertLogs wants a line")
            result = action(*arguments)
        self.assertEqual([record for record in logs.records if record.exc_info], [])
        return result, [(record.levelname, record.getMessage()) for record in logs.records[1:]]


def hub(**fields):
    """Return the query of a webhook verification."""
    return "?" + urllib.parse.urlencode({"hub." + name: value for name, value in fields.items()})


class Verification(BotTest):
    def test_the_right_token_gets_the_challenge_back_as_plain_text(self):
        token, strange = "пароль & +%41\U0001f600", "<b>żółć \U0001f600\r\n&+%41</b>"
        bot = self.start_bot(verify_token=token)
        for query, challenge in [
            (hub(mode="subscribe", challenge="1158201444", verify_token=token), "1158201444"),
            (hub(challenge="without a mode", verify_token=token), "without a mode"),
            (hub(challenge=strange, verify_token=token), strange), (hub(verify_token=token), ""),
            ("?hub.verify_token=" + "".join("%%%02x" % byte for byte in token.encode()) + "&hub.challenge=7", "7"),
        ]:
            for path in "/", "/webhook":
                with self.subTest(path + query):
                    status, headers, text = self.request(bot, "GET", path + query)
                    self.assertEqual((status, headers.get_content_type(), text), (200, "text/plain", challenge))

    def test_a_wrong_verification_is_refused_and_the_log_says_what_differs_and_shows_neither_token(self):
        bot = self.start_bot()
        wrong = "", "hunter2", VERIFY[:-1], VERIFY + "!", VERIFY.upper(), "pässwörd \U0001f600"
        for fields, differs in [
            ({}, "hub.verify_token differs"), ({"mode": "subscribe"}, "hub.verify_token differs"),
            *[({"verify_token": VERIFY, "mode": mode}, "hub.mode") for mode in ("", "unsubscribe")],
            *[({"verify_token": token, "mode": "subscribe"}, "hub.verify_token differs") for token in wrong],
        ]:
            with self.subTest(fields=fields):
                query = "/webhook" + hub(challenge="c", **fields)
                (status, _, text), [(_, line)] = self.logged(self.request, bot, "GET", query)
                self.assertEqual((status, text), (403, "Error, wrong validation token"))
                self.assertIn(differs, line)
                for token in filter(None, (VERIFY, fields.get("verify_token"))):
                    self.assertNotIn(token, urllib.parse.unquote_plus(line))

    def test_healthz_is_ok_and_head_is_answered_as_get_without_the_body(self):
        bot = self.start_bot()
        self.assertEqual(self.request(bot, "GET", "/healthz")[::2], (200, "ok"))
        for target in "/" + hub(verify_token=VERIFY, challenge="żółć"), "/webhook", "/healthz", "/nowhere":
            head, get = (self.connect(bot, ask("%s %s HTTP/1.0" % (method, target))) for method in ("HEAD", "GET"))
            with self.subTest(target), head.makefile("rb") as head, get.makefile("rb") as get:
                head, get = (re.sub(b"Date: .*", b"", file.read()).partition(b"\r\n\r\n") for file in (head, get))
                self.assertEqual((head[0], head[2]), (get[0], b""))


class Signature(BotTest):
    def test_unsigned_delivery_is_refused_unparsed_and_sends_nothing_and_the_log_says_why(self):
        bot = self.start_bot(accept)
        for body in json.dumps(delivery(message())).encode(), b"\xff is not JSON":
            right = signed(body)["X-Hub-Signature-256"]
            sha1 = "sha1=" + hmac.new(SECRET.encode(), body, hashlib.sha1).hexdigest()
            malformed = ["", "sha256=", right[7:], "sha512" + right[6:], right[:-1], right + "0", right + ", " + right,
                         sha1, "sha256=" + "g" * 64, "sha256=" + "\xe9" * 64]
            other = [*signed(body, "other").values(), *signed(body, "").values(), *signed(body + b" ").values()]
            for reason, signatures in ("missing", [None]), ("malformed", malformed), ("check APP_SECRET", other):
                for signature in signatures:
                    with self.subTest(signature=signature, body=body):
                        headers = {"X-Hub-Signature": sha1, "X-Hub-Signature-256": signature}
                        headers = {name: value for name, value in headers.items() if value is not None}
                        answer, [(_, line)] = self.logged(self.request, bot, "POST", "/webhook", body, headers)
                        self.assertEqual(answer[0], 403)
                        self.assertRegex(line, "X-Hub-Signature-256 .*" + reason)
                        self.assertNotRegex(line, SECRET + "|" + right[7:])
        self.assertEqual((self.stop(bot), bot.graph.texts()), (0, []))

    def test_without_a_secret_a_delivery_is_accepted_from_anybody_and_with_one_from_nobody_on_a_dry_run_too(self):
        bot = self.start_bot(accept, app_secret="")
        self.assertEqual(self.request(bot, "POST", "/", json.dumps(delivery(message())))[0], 200)
        self.assertEqual(bot.graph.texts(), ["hello"])
        self.assertEqual(self.request(self.start_bot(app_secret=SECRET), "POST", "/", b"{}")[0], 403)


EVENTS = [  # what it is, its part of the event, and the reply
    ("a text", {"message": {"text": "hi"}}, "hi"), ("white space", {"message": {"text": " "}}, " "),
    ("a quick reply", {"message": {"text": "Red", "quick_reply": {"payload": "P"}}}, "Red"),
    ("an answer", {"message": {"text": "yes", "reply_to": {"mid": "m_0"}}}, "yes"),
    ("a command", {"message": {"text": "/flights", "commands": [{"name": "flights"}]}}, "/flights"),
    ("a fallback", {"message": {"text": "t", "attachments": [{"type": "fallback", "payload": None}]}}, "t"),
    ("a null text", {"message": {"text": None}}, SORRY), ("an empty text", {"message": {"text": ""}}, SORRY),
    ("no content", {"message": {}}, SORRY), ("a deleted message", {"message": {"is_deleted": True}}, None),
    ("a postback", {"postback": {"title": "T", "payload": "P", "referral": {"ref": "R"}}}, "T"),
    ("a postback without a title", {"postback": {"payload": "P"}}, SORRY),
    ("an echo", {"message": {"text": "hi", "is_echo": True, "app_id": 1517776481860111}}, None),
    ("the page itself", {"message": {"text": "hi"}, "sender": {"id": "1"}, "recipient": {"id": "7"}}, None),
    ("the recipient", {"message": {"text": "hi"}, "sender": {"id": "7"}, "recipient": {"id": "7"}}, None),
    *[("the sender %s" % sender, {"message": {"text": "hi"}, "sender": sender}, None)
      for sender in (None, {}, {"id": None}, {"id": ""}, {"id": ["2"]}, {"id": True}, {"user_ref": "R"}, "2")],
    *[("the attachment " + kind, {"message": {"attachments": [{"type": kind, "payload": {"url": "U"}}]}}, SORRY)
      for kind in "image audio video file sticker reel ig_reel post template location appointment_booking new".split()],
    *[(kind, {kind: {"text": "t", "title": "T"}}, None)
      for kind in "delivery read reaction typing optin referral message_edit account_linking pass_thread_control "
                  "take_thread_control request_thread_control app_roles policy_enforcement response_feedback order "
                  "game_play messaging_feedback new".split()],
]


class Events(BotTest):
    def test_each_event_gets_the_reply_of_the_table_or_none(self):
        bot = self.start_bot(accept)
        for number, (name, part, reply) in enumerate(EVENTS):
            with self.subTest(name):
                event = {"sender": {"id": "2"}, "recipient": {"id": "1"}, "timestamp": number, **part}
                self.assertEqual(self.deliver(bot, delivery(event)), 200)
                calls = [bot.graph.calls.get() for _ in range(bot.graph.calls.qsize())]
                self.assertEqual([(call.recipient, call.text) for call in calls], [("2", reply)] if reply else [])
        self.stop(bot)
        self.assertEqual(bot.graph.texts(), [])

    def test_reply_gets_the_message_with_its_text_and_who_sent_it_and_may_say_nothing(self):
        postback = {"sender": {"id": "3"}, "postback": {"title": "Start", "payload": "P"}}
        for nothing in None, "":
            asked = queue.Queue()
            bot = self.start_bot(accept, reply=lambda message: asked.put(message) or nothing)
            self.assertEqual(self.sent(bot, message(quick_reply={"payload": "Q"}), postback), [])
            self.assertCountEqual([asked.get(timeout=WAIT), asked.get(timeout=WAIT)], [
                {"mid": "m_1", "text": "hello", "quick_reply": {"payload": "Q"}, "sender": "2"},
                {"title": "Start", "text": "Start", "payload": "P", "sender": "3"}])
            self.assertEqual((self.stop(bot), bot.graph.texts()), (0, []))

    def test_every_event_of_every_entry_is_looked_at_and_all_else_is_acknowledged_and_owed_nothing(self):
        entries = [
            {"id": "1", "messaging": [message("a", "m_a"), message("b", "m_b", "3"), message("c", "m_c")]},
            {"id": "1", "changes": [{"field": "feed"}]}, {"id": "1"}, {"id": "1", "messaging": []},
            {"id": "8", "messaging": [{"sender": {"id": "2"}, "read": {"watermark": 1}}, message("d", "m_d", "4")]}]
        for payload, texts in [
            ({"object": "page", "entry": entries}, list("abcd")), ({"entry": entries}, list("abcd")),
            ({"object": "instagram", "entry": entries}, []), ({"object": "page"}, []), ({}, []),
            *(({"entry": [{"id": "1", key: [message()]}]}, []) for key in ("standby", "changes", "new")),
        ]:
            with self.subTest(payload):
                bot = self.start_bot(accept)
                status, lines = self.logged(self.deliver, bot, payload)
                self.assertEqual((status, self.stop(bot), sorted(bot.graph.texts())), (200, 0, texts))
                self.assertEqual(len(lines), len(texts), "nothing else is logged")

    def test_a_malformed_event_is_logged_and_skipped_and_its_neighbors_are_answered(self):
        bot = self.start_bot(accept)
        for number, event in enumerate([
            "x", 5, [], None, {"message": "TEST_MESSAGE"}, {"message": []}, {"postback": "x"},
            message(5), message(["hi"]), {"sender": {"id": "2"}, "postback": {"title": {"x": "y"}}},
        ]):
            with self.subTest(event=event):
                before, after = [message(text, "%s %d" % (text, number)) for text in ("before", "after")]
                status, lines = self.logged(self.deliver, bot, delivery(before, event, after))
                self.assertEqual((status, bot.graph.texts()), (200, ["before", "after"]))
                self.assertEqual([line[:25] for level, line in lines if level != "INFO"], ["skipped 1 malformed event"])
        payload = {"object": "page", "entry": [{"messaging": [message(["private"]), "private"]}, 5, {"messaging": 5}]}
        _, [(_, line)] = self.logged(self.deliver, bot, payload)
        self.assertRegex(line, r"skipped 4 malformed event\(s\).* the text of its message is not a string$")

    def test_a_body_that_is_not_a_json_object_is_answered_400_with_a_line_of_text(self):
        good = json.dumps(delivery(message("\xe9")), ensure_ascii=False)
        bot = self.start_bot()
        for body in [
            b"", b" \n", b"\xff\xfe\x00", good.encode("latin-1"), good.encode("utf-16"), b'{"object": "\xed\xa0\xbd"}',
            b"hello", b"object=page&entry=1", good[:-1].encode(), good.encode() * 2, b"{'object': 'page'}",
            b'{"object": NaN}', b'{"object": [-Infinity]}', b"[%s]" % good.encode(), b'"page"', b"5", b"null",
            b'{"a":' * 100000, b"[" * 100000, b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}",  # too deep
        ]:
            with self.subTest(body=body[:50]):
                status, _, text = self.request(bot, "POST", "/webhook", body, signed(body))
                self.assertRegex("%d %s" % (status, text), r"\A400 [ -~]+\Z")
        self.assertEqual(self.deliver(bot, good.encode()), 200)


def units(text):
    """Return the length of `text` in UTF-16 code units."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


class Text(BotTest):
    def test_a_text_is_echoed_character_for_character_in_as_few_messages_as_it_needs(self):
        bot = self.start_bot(accept, limits={"settled": 0})
        for text in [
            "\U0001f600\U0001f44d\U0001f3fd", "\u05e9\u05dc\u05d5\u05dd \u200fabc\u202e", "e\u0301\u0323 \xe9", "\0",
            "a\0b\x1b[31m\x7f", "one\ntwo\r\nthree\r\u2028\x85", "\"'`\\\\n%s{}<b>&amp;", "\ud83d", "a\ude00\ud83db",
            " \t both ends\u3000\n ", "\ufeff", "\uffff\U0010ffff", "null", "x" * 2000, "x" * 20000,
            "\U0001f600" * 10000, "word " * 4000, "".join("%04d " % number for number in range(4000)),
        ]:
            with self.subTest(text[:20]):
                sent = self.sent(bot, message(text))
                self.assertEqual("".join(sent), text)
                self.assertEqual(len(sent), -(-units(text) // 2000))

    def test_what_follows_2000_blanks_is_sent(self):
        bot = self.start_bot(lambda call: ACCEPTED if call.text.strip() else graph_error(100))
        self.assertRegex("".join(self.sent(bot, message("a" + " " * 4500 + "b"))), "a +b")

    def test_a_text_is_cut_after_white_space_in_the_second_half_of_a_piece_or_else_as_late_as_can_be(self):
        a, pair, flag = "a", "\U0001f600", "\U0001f1e8"
        for name, text, lengths in [
            ("short", a, [1]), ("just short enough", a * 2000, [2000]), ("just too long", a * 2001, [2000, 1]),
            ("just too long, in pairs", pair * 1001, [1000, 1]),
            ("white space in the second half", a * 1500 + " " + a * 1000, [1501, 1000]),
            ("white space early in the second half", a * 1000 + " " + a * 1500, [1001, 1500]),
            ("white space in the first half only", a * 999 + " " + a * 2000, [2000, 1000]),
            ("white space in the first half, by units", a * 700 + " " + pair * 1500, [1350, 851]),
            ("white space twice", a * 1200 + " " + a * 300 + "\n" + a * 1000, [1502, 1000]),
            ("white space in a row", a * 1500 + " \n\u3000" + a * 1000, [1503, 1000]),
            ("white space at the end", a * 1999 + " a", [2000, 1]), ("after it", a * 2000 + " a", [2000, 2]),
            ("white space behind 2000", a * 2000 + " ", [2000, 1]),
            ("white space before marks that stand alone", a * 1500 + " `^\u200f" + a * 1000, [1501, 1003]),
            ("white space with an accent", a * 1500 + " " + a * 498 + " \u0301" + a * 9, [1501, 509]),
            ("flags", flag * 1200, [1000, 200]), ("a flag and a half", a * 1993 + flag * 4, [1995, 2]),
            ("lone surrogates", a * 1999 + "\ud83d" * 2, [2000, 1]), ("other ones", a * 1999 + "\ude00" * 2, [2000, 1]),
            ("joined ones", "\U0001f469\u200d" * 1000, [1333, 667]), ("nothing", "", []),
            ("accents without end", "e" + "\u0301" * 4000, [2000, 2000, 1]),
        ]:
            with self.subTest(name):
                pieces = echobot.pieces(text)
                self.assertEqual((list(map(len, pieces)), "".join(pieces)), (lengths, text))

    def test_a_text_is_never_cut_inside_what_a_reader_sees_as_one_character(self):
        for name, character in [
            ("two surrogates", "\ud83d\ude00"), ("accents", "e\u0301\u0323\u0308"), ("a vowel sign", "\u0915\u093f"),
            ("a keycap", "1\ufe0f\u20e3"), ("a family", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"),
            ("a couple", "\U0001f469\U0001f3fb\u200d\u2764\ufe0f\u200d\U0001f468\U0001f3ff"),
            ("an emoji's style", "\u2764\ufe0f"), ("dark skin", "\U0001f44d\U0001f3ff"),
            ("light skin", "\U0001f44d\U0001f3fb"), ("a flag", "\U0001f1e8\U0001f1ed"), ("CR LF", "\r\n"),
            ("a flag of tags", "\U0001f3f4\U000e0067\U000e0062\U000e007f"),
        ]:
            for room in range(1, units(character)):
                with self.subTest(name, room=room):
                    before = "a" * (2000 - room)
                    self.assertEqual(echobot.pieces(before + character + "a"), [before, character + "a"])


def held(event, answer=ACCEPTED):
    """Return what makes Graph answer after `event`, and not before."""
    return lambda call: answer if event.wait(WAIT) else None


def in_turn(*answers):
    """Return what makes Graph give `answers` one after another, and accept what comes then."""
    turn = iter(answers)
    return lambda call: next(turn, ACCEPTED)


class Promise(BotTest):
    """A 200 means done."""

    def test_a_delivery_is_answered_200_when_graph_has_accepted_its_reply_or_refused_it_permanently(self):
        for answer, line in ((ACCEPTED, r"INFO:echobot:replied to 2, mid m_1: 5 characters, \d+ ms$"),
                             (graph_error(100), "ERROR:.*code 100.*TR4CE")):
            hold = threading.Event()
            bot = self.start_bot(held(hold, answer))
            with self.assertLogs("echobot", "INFO") as logs:
                status = self.deliver_in_background(bot, delivery(message()))
                self.assertEqual(bot.graph.calls.get(timeout=WAIT).text, "hello")
                self.assertTrue(status.empty())
                hold.set()
                self.assertEqual((status.get(timeout=WAIT), self.deliver(bot, delivery(message()))), (200, 200))
            self.assertEqual((len(logs.output), bot.graph.calls.qsize()), (1, 0))
            self.assertRegex(logs.output[0], line)
            self.assertNotRegex(logs.output[0], "hello|secret words")

    def test_at_its_own_deadline_each_is_answered_503_and_closed_and_redeliveries_join_the_pending_reply(self):
        clock, hold = Clock(), threading.Event()
        bot = self.start_bot(accept, clock=clock, limits={"connections": 2},
                             reply=lambda message: message["sender"] == "3" and "hi" or str(hold.wait(WAIT)))
        first = self.connect(bot, signed_request(delivery(message())))
        self.until_states(bot, answer=1)
        other_side, = bot.deadlines
        clock.advance(3.9)
        self.assertEqual(self.sent(bot, *people("3")), ["hi"], "a reply that blocks holds up nobody else")
        self.assertEqual(select.select([first], [], [], 0)[0], [])
        second = self.deliver_in_background(bot, delivery(message()))
        self.until_states(bot, answer=2)
        (_, answers), lines = self.logged(lambda: (clock.advance(0.1), self.rest(first)))
        self.assertEqual([(answer.status, answer.fields["Connection"]) for answer in answers], [(503, "close")])
        self.assertRegex(lines[-1][1], "answering 503.*Messenger redelivers")
        self.until(lambda: other_side.fileno() == -1)  # so does its file
        third = self.connect(bot, signed_request(delivery(message())))  # for which there is a place again
        self.until_states(bot, answer=2)
        self.assertTrue(second.empty())
        clock.advance(3.9)
        self.assertEqual(second.get(timeout=WAIT), 503)
        hold.set()
        self.assertEqual(self.one(third).status, 200)
        self.stop(bot)
        self.assertEqual(bot.graph.texts(), ["True"], "sent once")

    def test_at_the_same_instant_the_deadline_and_the_settled_reply_give_one_answer(self):
        clock = Clock()
        bot = self.start_bot(accept, clock=clock, limits={"linger": 5})  # or 4 s at once could end the answer's writing
        for payload in map(delivery, people(*range(2, 22))):
            hold = threading.Event()
            bot.graph.answer = held(hold)
            client = self.connect(bot, signed_request(payload))
            bot.graph.calls.get(timeout=WAIT)
            threading.Thread(target=hold.set).start()
            clock.advance(4)
            self.assertIn(self.one(client).status, (200, 503))
            self.until(lambda: clock.advance(4) or not bot.deadlines)
            self.assertEqual((self.rest(client), self.deliver(bot, payload)), ([], 200))
        self.stop(bot)
        self.assertTrue(bot.graph.calls.empty())

    def test_a_temporary_failure_is_retried_with_growing_random_pauses_and_retry_after_in_seconds_is_honored(self):
        clock, answers = Clock(leaps=True), in_turn(
            *[graph_error(2, 500)] * 5, graph_error(613, 400, {"Retry-After": "20"}),
            (503, {"Retry-After": "9"}, b"<html>"), graph_error(4, 429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00"}))
        bot = self.start_bot(answers, clock=clock, limits={"answer": 10 ** 6})
        self.assertEqual(self.deliver(bot, delivery(message())), 200)
        shares = [pause / most for pause, most in zip(clock.pauses, (0.5, 1, 2, 4, 8, 20, 9, 8))]
        self.assertEqual((len(shares), shares[5:7]), (8, [1, 1]))
        self.assertTrue(all(0.5 <= share <= 1 for share in shares) and len(set(shares)) > 5, clock.pauses)

    def test_after_60_s_a_reply_is_given_up_and_a_redelivery_starts_afresh(self):
        clock = Clock(leaps=True)
        bot = self.start_bot(lambda call: graph_error(2, 500), clock=clock, limits={"answer": 10 ** 6})
        status, lines = self.logged(self.deliver, bot, delivery(message()))
        self.assertEqual((status, round(sum(clock.pauses), 6)), (503, 60))
        self.assertEqual([level for level, _ in lines], ["WARNING"] * len(clock.pauses) + ["ERROR", "INFO"])
        self.assertRegex(lines[-2][1], "gave up.* 2, mid m_1: code 2")
        self.assertEqual(bot.graph.calls.qsize(), len(clock.pauses) + 1, "each retry that is announced is made")
        for too_long in "61", 400 * "9":
            bot.graph.answer = in_turn(graph_error(613, headers={"Retry-After": too_long}))
            answer, = self.answers(bot, signed_request(delivery(message())))
            self.assertEqual((answer.status, answer.fields["Connection"]), (503, "close"))
        self.assertEqual(self.deliver(bot, delivery(message())), 200)

    def test_what_reply_does_wrong_gets_500_and_a_redelivery_starts_afresh(self):
        def recurse(message):
            return recurse(message)

        for wrong in ((lambda message: 5), (lambda message: [message]), (lambda message: {}["x"]), recurse, sys.exit,
                      (lambda message: echobot.parse_response(500, {}, b""))):  # which raises GraphError
            behavior = [wrong, wrong]
            bot = self.start_bot(accept, reply=lambda message: behavior.pop()(message) if behavior else "mended")
            with self.assertLogs("echobot", "ERROR"):
                self.assertEqual(self.deliver(bot, delivery(*people("2", "3"))), 500)
            self.assertEqual(self.deliver(bot, delivery(*people("2"))), 200)
            self.assertEqual((self.stop(bot), bot.graph.texts()), (0, ["mended"]))

    def test_one_mid_gets_one_reply_however_often_it_is_delivered_while_it_is_among_the_last_10_000_settled(self):
        bot = self.start_bot(accept, limits={"settled": 3})
        self.assertEqual(self.sent(bot, message("first"), message("second")), ["first"])
        statuses = [self.deliver_in_background(bot, delivery(message("again"))) for _ in range(10)]
        self.assertEqual([status.get(timeout=WAIT) for status in statuses], [200] * 10)
        for mid in "abcddcbab":
            self.assertEqual(self.deliver(bot, delivery(message(mid, mid))), 200)
        self.assertEqual((self.stop(bot), bot.graph.texts()), (0, [*"abcdab"]))

    def test_an_event_without_a_mid_is_known_by_its_sender_timestamp_and_kind(self):
        event = {"sender": {"id": "2"}, "recipient": {"id": "1"}, "timestamp": 5, "message": {"text": "hello"}}
        bot = self.start_bot(accept)
        for change, calls in (({}, 1), ({}, 0), ({"timestamp": 6}, 1), ({"sender": {"id": "3"}}, 1),
                              ({"message": {"mid": 11, "text": "hello"}}, 1),
                              ({"message": None, "postback": {"title": "hello"}}, 1)):
            with self.subTest(change):
                self.assertEqual(self.sent(bot, {**event, **change}), calls * ["hello"])
        self.assertEqual((self.stop(bot), bot.graph.texts()), (0, []))

    def test_one_persons_replies_leave_one_at_a_time_in_the_order_in_which_they_were_accepted(self):
        def answer(call):
            under_way.append(call.text)
            go.wait(WAIT)
            alone = under_way == [call.text]
            under_way.remove(call.text)
            return next_answer(call) if alone else graph_error(100)

        next_answer, under_way, go = in_turn(ACCEPTED, None, ACCEPTED, graph_error(2, 500)), [], threading.Event()
        bot = self.start_bot(answer, limits={"first_pause": 0, "answer": WAIT})
        statuses = []
        for number in range(0, 10, 2):
            events = [message(str(each), "m_%d" % each) for each in (number, number + 1)]
            statuses.append(self.deliver_in_background(bot, delivery(*events)))
            self.until(lambda: len(bot.outbox.pending) == number + 2)
        go.set()
        self.assertEqual([status.get(timeout=WAIT) for status in statuses], [200] * 5)
        self.assertEqual(bot.graph.texts(), list("011223456789"), "of 1 and 2 the first call failed")

    def test_a_delivery_to_50_people_takes_no_longer_than_to_one_and_one_persons_failure_holds_up_nobody(self):
        def answer(call):
            together.wait(WAIT)
            return ACCEPTED if call.recipient != "7" else graph_error(2, 500)

        together = threading.Barrier(50)
        bot = self.start_bot(answer, clock=Clock())
        self.deliver_in_background(bot, delivery(*people(*range(2, 52))))
        self.until(lambda: list(bot.outbox.last) == ["7"])
        bot.graph.answer = accept
        self.assertEqual(self.deliver(bot, delivery(message(mid="m_x", sender="3"))), 200)

    def test_one_persons_many_messages_hold_up_nobody_in_the_same_delivery(self):
        bot = self.start_bot(lambda call: ACCEPTED if call.recipient == "3" else graph_error(2, 500),
                             clock=Clock(), limits={"calls": 2})
        many = [message(mid="n_%d" % number, sender="7") for number in range(9)]
        self.deliver_in_background(bot, delivery(*many, *people("3")))
        self.until(lambda: "3" in [call.recipient for call in list(bot.graph.calls.queue)])

    def test_after_10_minutes_of_nothing_but_failure_200_is_answered_instead_of_503_and_it_is_logged(self):
        clock, hold = Clock(), threading.Event()
        bot = self.start_bot(accept, clock=clock, limits={"pending": 1})
        failure = graph_error(613, headers={"Retry-After": "61"})  # so that the reply is given up at once
        for number, (seconds, answer, status) in enumerate([
                (0, failure, 503), (599, failure, 503), (1, failure, 200),
                (601, failure, 503), (599, failure, 503), (1, failure, 200),  # nothing had failed for 10 minutes
                (1, ACCEPTED, 200), (1, failure, 503), (599, failure, 503), (1, failure, 200),
                (1, graph_error(100), 200), (1, failure, 503), (600, failure, 200)], start=10):
            with self.subTest(number=number):
                clock.advance(seconds)
                bot.graph.answer = in_turn(answer)
                self.assertEqual(self.deliver(bot, delivery(*people(number))), status)
        bot.graph.answer = held(hold)
        for seconds, status, level in (0, 200, "ERROR"), (601, 503, "INFO"):
            clock.advance(seconds)
            with self.subTest(seconds), self.assertLogs("echobot", "INFO") as logs:
                late = self.deliver_in_background(bot, delivery(*people("late")))
                self.until(lambda: bot.outbox.pending)
                self.until_states(bot, answer=1)
                self.assertEqual(self.deliver(bot, delivery(*people("too", "many"))), status)
                clock.advance(4)
                self.assertEqual(late.get(timeout=WAIT), status)
            line = "%s:echobot:answering %d" % (level, status)
            self.assertEqual([each[:len(line)] for each in logs.output], [line, line])
        hold.set()

    def test_beyond_1000_pending_replies_a_delivery_gets_503_at_once_unless_nothing_is_pending(self):
        hold = threading.Event()
        bot = self.start_bot(held(hold), limits={"pending": 3, "answer": WAIT})
        events = people(*range(20, 28))
        statuses = [self.deliver_in_background(bot, delivery(*some)) for some in (events[:2], events[2:3])]
        self.until(lambda: len(bot.outbox.pending) == 3)
        self.assertEqual(self.deliver(bot, delivery(events[0], events[3])), 503)
        self.assertEqual(len(bot.outbox.pending), 3, "a delivery is accepted whole or not at all")
        hold.set()
        self.assertEqual([status.get(timeout=WAIT) for status in statuses], [200, 200])
        hold.clear()
        status = self.deliver_in_background(bot, delivery(*events))
        self.until(lambda: len(bot.outbox.pending) == 5)
        redelivery = self.deliver_in_background(bot, delivery(*events))
        self.until_states(bot, answer=2)
        hold.set()
        self.assertEqual((status.get(timeout=WAIT), redelivery.get(timeout=WAIT)), (200, 200))
        self.assertEqual(bot.graph.calls.qsize(), 8)

    def test_a_dry_run_logs_the_replies_that_it_would_send(self):
        _, lines = self.logged(self.deliver, self.start_bot(), delivery(message("a person's words")))
        self.assertEqual(lines, [("INFO", "dry run, would reply to 2, mid m_1: a person's words")])


class GraphCalls(BotTest):
    """How Graph is called, and what its answers mean."""

    def test_a_call_is_the_send_apis_with_the_token_and_its_proof_in_ascii(self):
        bot = self.start_bot(accept)
        self.deliver(bot, delivery(message("h\u00e9 \U0001f600")))
        call = bot.graph.calls.get()
        self.assertEqual((call.method, call.path), ("POST", "/v26.0/me/messages?" + CREDENTIALS))
        self.assertEqual(call.headers["Content-type"], "application/json")
        self.assertEqual((call.ascii, call.content), (True, {
            "recipient": {"id": "2"}, "messaging_type": "RESPONSE", "message": {"text": "h\u00e9 \U0001f600"}}))

    def test_temporary_failures_are_retried_and_permanent_refusals_are_not(self):
        permanent = {str(code): graph_error(code) for code in (
            10, 100, 102, 190, 200, 230, 299, 368, 551, 1545041, 987654)}
        temporary = {"code %d" % code: graph_error(code) for code in (1, 2, 4, 17, 32, 341, 613, 1200, 80006)}
        temporary.update({"redirect %d" % code: (code, {"Location": "/"}, b"") for code in (301, 302, 303, 307, 308)})
        temporary.update({
            "no answer": None, "500": graph_error(99, 500), "429": graph_error(99, 429),
            "is_transient": graph_error(99, is_transient=True), "a proxy's 503": (503, {}, b"<html>"),
            "200 and not JSON": (200, {}, b"<html>"), "200 and an error": graph_error(2, 200),
            "400 and no object": (400, {}, b"[]"), "no code": (400, {}, b'{"error": 1}'),
            "too deep": (200, {}, b"[" * 100000), "more than 1 MiB": (200, {}, b'{"x": "%s"}' % (b"x" * 2 ** 20)),
            "half an answer": (200, {"Content-Length": 100, "Connection": "close"}, ACCEPTED[2]),
            "a malformed field": (200, {"X Y": "z"}, ACCEPTED[2]), "status 999": (999, {}, b"")})
        first = {**permanent, **temporary}  # answers; the second is acceptance
        bot = self.start_bot(lambda call: first.pop(call.recipient, ACCEPTED),
                             {"first_pause": 0, "longest_pause": 0, "answer": WAIT})
        status, lines = self.logged(self.deliver, bot, delivery(*people(*first)))
        self.assertEqual((status, self.stop(bot)), (200, 0))
        log = "\n".join(line for _, line in lines)
        for name, why in ("half an answer", "The body is cut off"), ("a malformed field", "A header field is malf"):
            self.assertRegex(log, "to %s, mid .*no answer from Graph .%s" % (name, why))
        recipients = [call.recipient for call in bot.graph.calls.queue]
        self.assertEqual({name: recipients.count(name) for name in {**permanent, **temporary}},
                         {**dict.fromkeys(permanent, 1), **dict.fromkeys(temporary, 2)})

    def test_no_answer_in_time_is_a_temporary_failure(self):
        hold = threading.Event()
        bot = self.start_bot(lambda call: ACCEPTED if bot.graph.calls.qsize() > 1 else held(hold)(call),
                             {"graph": 0.05, "first_pause": 0, "answer": WAIT})
        status, lines = self.logged(self.deliver, bot, delivery(message()))
        self.assertEqual(status, 200)
        self.assertIn("timed out", lines[0][1])
        self.assertNotIn(TOKEN, lines[0][1])
        hold.set()

    def test_a_long_text_goes_out_in_order_and_a_retry_goes_on_where_it_failed(self):
        text = "".join("%09d " % number for number in range(950))
        bot = self.start_bot(in_turn(ACCEPTED, ACCEPTED, graph_error(2, 500), None), {"first_pause": 0, "answer": WAIT})
        texts = self.sent(bot, message(text))
        self.assertEqual(texts[2:5], [texts[2]] * 3)
        self.assertEqual("".join(texts[:2] + texts[4:]), text)

    def test_a_connection_on_which_the_server_has_closed_or_said_more_is_replaced_without_a_failure(self):
        surplus = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
        timed_out = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        for name, answer, last_words in (
                ("closed", ACCEPTED, b""), ("a 408", ACCEPTED, timed_out), ("an answer unasked", ACCEPTED, surplus),
                ("surplus", (200, {"Content-Length": len(ACCEPTED[2])}, ACCEPTED[2] + surplus), None)):
            with self.subTest(name):
                bot = self.start_bot(in_turn(answer))
                self.assertEqual(self.deliver(bot, delivery(message())), 200)
                if last_words is not None:
                    bot.graph.connections[0].sendall(last_words)
                    bot.graph.connections[0].shutdown(socket.SHUT_RDWR)
                status, lines = self.logged(self.deliver, bot, delivery(message(mid="m_2")))
                self.assertEqual((status, [level for level, _ in lines]), (200, ["INFO"]))
                self.assertEqual((bot.graph.calls.qsize(), len(bot.graph.connections)), (2, 2))

    def test_an_answer_in_chunks_and_one_that_ends_with_its_connection_are_read(self):
        chunks = 200, {"Content-Length": None, "Transfer-Encoding": "chunked"}, chunked(ACCEPTED[2], 9)
        closing = 200, {"Content-Length": None, "Connection": "close"}, ACCEPTED[2]
        bot = self.start_bot(in_turn(chunks, closing), limits={"settled": 0})
        self.assertEqual([self.deliver(bot, delivery(message())) for _ in range(3)], [200] * 3)
        self.assertEqual((bot.graph.calls.qsize(), len(bot.graph.connections)), (3, 2))

    def test_a_connection_idle_for_a_minute_is_not_used_and_at_most_64_are_kept(self):
        clock, together = Clock(), threading.Barrier(3)
        bot = self.start_bot(accept, clock=clock, limits={"graph_idle": 2})
        for seconds, connections in (0, 1), (59, 1), (60, 2):
            clock.advance(seconds)
            self.deliver(bot, delivery(message(mid="m_%d" % seconds)))
            self.assertEqual(len(bot.graph.connections), connections)
        bot.graph.answer = lambda call: together.wait(WAIT) < 0 or ACCEPTED
        for batch in 10, 20:
            self.deliver(bot, delivery(*people(*range(batch, batch + 3))))
        self.assertEqual(len(bot.graph.connections), 2 + 2 + 1, "of three one is closed, and opened again")

    def test_above_300_a_call_waits_for_its_turn_and_only_then_its_replys_60_s_begin(self):
        clock, hold = Clock(), threading.Event()
        bot = self.start_bot(held(hold), clock=clock, limits={"calls": 1, "answer": 10 ** 6})
        first = self.deliver_in_background(bot, delivery(*people("2")))
        bot.graph.calls.get(timeout=WAIT)
        second = self.deliver_in_background(bot, delivery(*people("3")))
        self.until(lambda: len(bot.outbox.pending) == 2)
        self.assertEqual(self.request(bot, "GET", "/healthz")[0], 200)
        self.assertTrue(bot.graph.calls.empty())
        bot.graph.answer = in_turn(graph_error(2, 500))
        clock.advance(61)
        hold.set()
        self.until(lambda: clock.advance(0.1) or not bot.outbox.pending)
        self.assertEqual((first.get(timeout=WAIT), second.get(timeout=WAIT)), (200, 200))


HOST, CHUNKED, EXPECT, CLOSE = "Host: bot", "Transfer-Encoding: chunked", "Expect: 100-continue", "Connection: close"


def ask(line, *fields, body=b""):
    """Return the bytes of a request, as they are written here."""
    return "\r\n".join((line,) + fields + ("", "")).encode("latin-1") + body


def get(target, *fields):
    return ask("GET %s HTTP/1.1" % target, HOST, *fields)


def say(word, *fields):
    """Return a request that is answered `word`."""
    return get("/?hub.verify_token=%s&hub.challenge=%s" % (VERIFY, word), *fields)


def framed(*fields, body=b"2\r\n{}\r\n0\r\n\r\n"):
    """Return a delivery, framed as `fields` say."""
    return ask("POST / HTTP/1.1", HOST, *fields, body=body)


def sized(body, *fields):
    return framed("Content-Length: %d" % len(body), *fields, body=body)


def signed_request(payload, *fields):
    body = json.dumps(payload).encode()
    return sized(body, *fields, *("%s: %s" % field for field in signed(body).items()))


def chunked(body, size):
    """Return `body` in chunks of `size` bytes."""
    parts = [body[at:at + size] for at in range(0, len(body), size)] + [b""]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


NEXT, LAST, SMUGGLED = say("next"), say("last", CLOSE), say("smuggled", CLOSE)
REFUSED = [(status, why, request) for status, requests in {
    411: {"no length": framed(body=b"{}"), "no body": framed(body=b"")},
    413: {"a length": framed("Content-Length: %d" % (MIB + 1)), "10^30": framed("Content-Length: 1" + 30 * "0"),
          "more digits than Python converts": framed("Content-Length: " + 5000 * "9"),
          "a chunk": framed(CHUNKED, body=b"100001\r\n"), "a chunk of 2^36": framed(CHUNKED, body=b"1000000000\r\n")},
    414: {"a long request line": get("/" + 9000 * "x"), "one without an end": 70000 * b"x"},
    431: {"a long field": get("/", "X: " + 9000 * "x"), "many fields": get("/", *40 * ["X: " + 1000 * "x"]),
          "a long trailer": framed(CHUNKED, body=b"0\r\nX: " + 9000 * b"x" + b"\r\n\r\n")},
    501: {coding: framed("Transfer-Encoding: " + coding) for coding in (
        "gzip", "gzip, chunked", "identity", "xchunked", "chunked;x=y", "chunked\xa0", "\x85chunked")},
}.items() for why, request in requests.items()] + [(400, why, request) for why, request in dict({
    "a length and chunks": framed(CHUNKED, "Content-Length: 12"), "chunked twice": framed(CHUNKED, CHUNKED),
    "HTTP/1.0": framed(CHUNKED).replace(b"1.1", b"1.0"), "chunked not last": framed("Transfer-Encoding: chunked, gzip"),
    "a length twice": framed("Content-Length: 2", "Content-Length: 2", body=b"{}"),
    "two lengths": framed("Content-Length: 2", "content-length: 40", body=b"{}"),
    "no host": ask("GET / HTTP/1.1"), "two hosts": get("/", HOST), "an empty one beside it": get("/", "host:"),
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
    "X: a\rb", "X: y\r", "X: \x7f", "X: \x1b[0m", "X: \x08", "X\x80: y", "X(y): z", "X y: z", '"X": y', "X,Y: z",
    "X:" + 8000 * " " + "\0")
}, **{"garbage %r" % line: ask(line, HOST) for line in (
    "\x16\x03\x01\x02", "hello", "GET", "GET /", "GET / HTTP", "GET / HTTP/1", "GET / HTTP/1.1 x", "GET / HTTP/1.10",
    "GET / HTTP/2.0", "GET  / HTTP/1.1", "GET /  HTTP/1.1", " GET / HTTP/1.1", "GET\t/ HTTP/1.1", "GET / x HTTP/1.1",
    "GET /\x00 HTTP/1.1", "GET /\x1b HTTP/1.1", "GET / HTTP/1.1\x00", "G(T / HTTP/1.1", "\r\n\r\nGET / HTTP/1.1",
    " \t\r\nGET / HTTP/1.1", "\x0b\r\nGET / HTTP/1.1")}).items()]


class Wire(BotTest):
    """HTTP, against anyone."""

    def test_malformed_requests_are_refused_and_nothing_of_one_request_is_read_as_another(self):
        bot = self.start_bot()
        for status, why, request in REFUSED:
            with self.subTest(why, status=status):
                answer, *others = self.answers(bot, request + SMUGGLED)
                self.assertEqual((answer.status, answer.fields.get("Connection"), others), (status, "close", []))
        self.assertEqual(self.statuses(bot, 9000 * b"x"), [414], "without waiting for the line's end")

    def test_an_answer_is_plain_text_that_no_browser_sniffs_and_names_no_server(self):
        for answer in self.answers(self.start_bot(), say("<b>") + get("/<b>") + LAST):
            self.assertRegex(answer.fields["Content-Type"], "^text/plain; ")
            self.assertEqual((answer.fields["X-Content-Type-Options"], "Server" in answer.fields), ("nosniff", False))

    def test_a_request_that_is_cut_off_is_refused(self):
        bot = self.start_bot()
        for whole in framed(CHUNKED, body=b"2;x\r\n{}\r\n0\r\nA: b\r\n\r\n"), sized(b"{}   "):
            for part in (*(whole[:at] for at in range(1, len(whole), 4)), whole, whole + b"\r\n"):
                with self.subTest(part):
                    client = self.connect(bot, part)
                    client.shutdown(socket.SHUT_WR)
                    self.assertEqual(self.last_statuses(client), [200 if whole in part else 400])

    def test_a_body_of_1_mib_is_accepted_and_a_longer_one_refused_so_that_the_client_reads_why(self):
        bot = self.start_bot()
        for size, expected in (MIB, [200, 200]), (MIB + 1, [413]), (3 * MIB, [413]):
            for chunk in None, 300, 9000, size:
                with self.subTest(size=size, chunk=chunk):
                    body = b"{}".ljust(size)
                    request = framed(CHUNKED, body=chunked(body, chunk)) if chunk else sized(body)
                    self.assertEqual(self.statuses(bot, request + LAST), expected)
        client = self.connect(bot, framed("Content-Length: %d" % (3 * MIB)))
        self.assertEqual(self.one(client).status, 413)
        for _ in range(30):
            client.sendall(bytes(100000))  # fails where the connection is reset

    def test_another_path_is_404_and_another_method_405_with_allow(self):
        bot = self.start_bot()
        for status, allow, lines in ((404, None, "GET /nowhere, POST /nowhere, GET *, GET /webhook/, GET //webhook"),
                                     (405, {"GET", "HEAD", "POST"}, "PUT /, DELETE /webhook, get /, FOO /"),
                                     (405, {"GET", "HEAD"}, "POST /healthz")):
            for line in lines.split(", "):
                with self.subTest(line):
                    answer, last = self.answers(bot, ask(line + " HTTP/1.1", HOST, "Content-Length: 0") + LAST)
                    methods = answer.fields.get("Allow")
                    self.assertEqual((answer.status, methods and set(methods.split(", "))), (status, allow))

    def test_requests_of_one_connection_are_answered_in_order_each_in_one_write(self):
        bot = self.start_bot()
        words = ["word%d" % number for number in range(25)]
        self.assertEqual(self.said(bot, b"".join(map(say, words)) + LAST), [(200, word) for word in words + ["last"]])
        client = self.connect(bot)
        for status, request in (200, sized(b"{}")), (404, get("/nowhere")), (400, sized(b"[]")), (411, framed()):
            client.sendall(request)
            self.assertEqual(self.one(client).status, status)

    def test_the_next_request_is_not_read_out_of_a_body(self):
        bot, length, pieces = self.start_bot(), "Content-Length: %d" % len(SMUGGLED), chunked(SMUGGLED, 9)
        for status, why, request in (
                (400, "a length", sized(SMUGGLED)), (400, "chunks", framed(CHUNKED, body=pieces)),
                (400, "a length with zeros", framed(length.replace(" ", " " + 5000 * "0"), body=SMUGGLED)),
                (400, "trailers", framed(CHUNKED, body=pieces[:-2] + b"A: b\r\nContent-Length: 3\r\n\r\n")),
                (200, "an empty line after a body", sized(b"{}") + b"\r\n"),
                (200, "a GET's body", get("/healthz", length) + SMUGGLED),
                (200, "a GET's chunks", get("/healthz", CHUNKED) + pieces),
                (404, "a body for nowhere", get("/nowhere", length) + SMUGGLED),
                (405, "a PUT's body", ask("PUT / HTTP/1.1", HOST, length, body=SMUGGLED))):
            with self.subTest(why):
                first, *others = self.said(bot, request + NEXT + LAST)
                self.assertEqual((first[0], others), (status, [(200, "next"), (200, "last")]))

    def test_a_connection_is_closed_after_the_answer_where_the_client_says_so_or_speaks_http_1_0(self):
        bot = self.start_bot()
        for request in (ask("GET /healthz HTTP/1.0"), ask("GET /healthz HTTP/1.0", HOST, "Connection: keep-alive"),
                        get("/healthz", CLOSE), get("/healthz", "connection: x, Close")):
            with self.subTest(request):
                answer, *others = self.answers(bot, request + SMUGGLED)
                self.assertEqual((answer.text, answer.fields["Connection"], others), ("ok", "close", []))

    def test_what_is_unusual_and_right_is_served(self):
        bot, target = self.start_bot(), LAST.split()[1]
        urls, hosts = b"http://bot/ HTTP://bot:80/ http://bot", b"|a.b:80|a:| [::1]|[::1]:5000 |a_b-c|\t 1.2.3.4\t"
        for request in [ask("GET /healthz HTTP/1.0"), b"\r\n" + LAST, LAST.replace(b"\r\n", b"\n"),
                        LAST.replace(b"HTTP/1.1", b"HTTP/1.2"), LAST.replace(b"Host", b"X:\xc3\xa9\xff\t\r\nHost"),
                        *(LAST.replace(target, url + target[1:]) for url in urls.split()),
                        *(LAST.replace(b" bot", host) for host in hosts.split(b"|"))]:
            with self.subTest(request):
                self.assertEqual(self.statuses(bot, request), [200])

    def test_chunks_are_decoded(self):
        bot = self.start_bot(app_secret=SECRET)
        for why, chunks in {
                "one": lambda body: chunked(body, len(body)), "several": lambda body: chunked(body, 7),
                "capitals and zeros": lambda body: b"%06X\r\n%s\r\n000\r\n\r\n" % (len(body), body),
                "extensions": lambda body: chunked(body, 60).replace(b"3c\r\n", b'3c ;a=b;c="d \xff"\r\n'),
                "trailers": lambda body: chunked(body, 60)[:-2] + b"Expires: never\r\nContent-Length: 3\r\n\r\n",
                "chunks beyond a buffer": lambda body: chunked(body, 66000)}.items():
            with self.subTest(why):
                body = json.dumps(delivery(message(why, why))).encode() + 70000 * b" "
                fields = ["%s: %s" % field for field in signed(body).items()]
                wire = framed("transfer-encoding: Chunked", *fields, body=chunks(body))
                self.assertEqual(self.said(bot, wire + LAST), [(200, "ok"), (200, "last")], "as it is signed")

    def test_a_client_that_expects_100_continue_gets_it_where_its_body_is_wanted(self):
        bot = self.start_bot()
        for field, body in ("Content-Length: 2", b"{}"), (CHUNKED, chunked(b"{}", 1)):
            with self.subTest(field):
                client = self.connect(bot, framed(field, EXPECT, body=b""))
                self.assertEqual(client.recv(MIB), b"HTTP/1.1 100 Continue\r\n\r\n")
                client.sendall(body + LAST)
                self.assertEqual(self.last_statuses(client), [200, 200])
        for status, request in ((411, framed(EXPECT)), (413, framed("Content-Length: %d" % (MIB + 1), EXPECT)),
                                (400, framed("Content-Length: x", EXPECT)),
                                (200, ask("POST / HTTP/1.0", "Content-Length: 2", EXPECT, body=b"{}"))):
            with self.subTest(request):
                self.assertEqual(self.statuses(bot, request), [status])


class Limits(BotTest):
    """Time, size, memory, threads and files are bounded."""

    def test_the_limits_that_other_tests_set_smaller_are_these(self):
        limits = dict(connections=500, large=16, pending=1000, settled=10000, calls=300, graph_idle=64, graph=20,
                      drain=25, same_signal=1)
        self.assertEqual({name: getattr(echobot.Limits(), name) for name in limits}, limits)

    def test_a_first_request_has_10_s_from_the_connection_however_slowly_it_drips(self):
        clock = Clock()
        bot = self.start_bot(clock=clock)
        begun = [b"", b"\r\n", b"POST / HTTP/1.1", framed(CHUNKED, body=b""), framed(CHUNKED, body=b"63\r\n{"),
                 framed()[:-20], framed(CHUNKED, body=b"0\r\nA: b"), framed("Content-Length: 99", body=b"{")]
        clients = [self.connect(bot, data) for data in begun]
        self.until_states(bot, request=len(begun))
        for _ in range(18):
            clock.advance(0.5)
            for client in clients[1:]:
                client.sendall(b"x")
        clock.advance(0.9)
        self.assertEqual(select.select(clients, [], [], 0)[0], [])
        clock.advance(0.1)
        for data, client in zip(begun, clients):
            with self.subTest(data):
                self.assertEqual(self.last_statuses(client), [408])

    def test_between_requests_a_connection_is_kept_for_120_s_and_a_later_request_has_10_s_from_its_first_byte(self):
        clock = Clock()
        bot = self.start_bot(clock=clock)
        idle, used = self.connect(bot, NEXT), self.connect(bot, NEXT)
        self.assertEqual([self.one(client).text for client in (idle, used)], ["next", "next"])
        self.until_states(bot, idle=2)
        clock.advance(119)
        used.sendall(framed("Content-Length: 30", EXPECT, body=b""))
        self.assertEqual(self.one(used).status, 100)
        clock.advance(1)
        self.assertEqual(self.rest(idle), [])
        clock.advance(8.9)
        self.assertEqual(self.said(bot, LAST), [(200, "last")])
        self.assertEqual(select.select([used], [], [], 0)[0], [])
        with self.assertLogs("echobot", "INFO") as logs:
            clock.advance(0.1)
            self.assertEqual(self.last_statuses(used), [408])
        self.assertRegex(logs.output[0], "refused a request with 408: .* within 10 s")

    def test_a_refused_client_that_does_not_close_and_one_that_does_not_read_lose_their_places(self):
        clock = Clock()
        bot = self.start_bot(clock=clock)
        for wire in framed(), NEXT * 600:
            client = self.connect(bot)
            self.until(lambda: bot.deadlines)
            for end, buffer in (client, socket.SO_RCVBUF), (*bot.deadlines, socket.SO_SNDBUF):
                end.setsockopt(socket.SOL_SOCKET, buffer, 4096)
            client.sendall(wire)
            self.until_states(bot, linger=1)
            self.until(lambda: clock.advance(0.2) or not bot.deadlines)

    def test_the_connection_that_has_been_idle_longest_makes_room_and_where_none_is_idle_they_wait(self):
        hold = threading.Event()
        bot = self.start_bot(limits={"connections": 3, "answer": WAIT}, reply=lambda message: str(hold.wait(WAIT)))
        busy = self.deliver_in_background(bot, delivery(message()))
        self.until(lambda: bot.outbox.pending)
        first, second = self.connect(bot), self.connect(bot)
        for client, idle in (first, 1), (second, 2), (first, 2):
            client.sendall(NEXT)
            self.one(client)
            self.until_states(bot, idle=idle)
        self.assertEqual(self.said(bot, LAST), [(200, "last")])
        self.assertEqual(self.rest(second), [])
        first.sendall(NEXT)
        self.assertEqual(self.one(first).text, "next")
        others = [self.deliver_in_background(bot, delivery(message(mid="n_%d" % number))) for number in range(4)]
        self.until(lambda: len(bot.outbox.pending) == 3)
        self.assertLessEqual(len(bot.deadlines), 3)
        hold.set()
        self.assertEqual([status.get(timeout=WAIT) for status in [busy] + others], [200] * 5)

    def test_large_bodies_take_turns_until_they_are_parsed_and_small_ones_never_wait(self):
        clock, hold = Clock(), threading.Event()
        bot = self.start_bot(clock=clock, limits={"large": 1}, reply=lambda message: str(hold.wait(WAIT)))
        large, body = "Content-Length: %d" % MIB, json.dumps(delivery(message())).encode().ljust(MIB)
        first = self.connect(bot, framed(large, body=body[:999]))
        self.until(lambda: not bot.large.acquire(blocking=False) or bot.large.release())
        second = self.connect(bot, framed(CHUNKED, CLOSE, body=chunked(b"{}".ljust(131072), 131072)))
        self.assertEqual(self.statuses(bot, sized(b"{}", CLOSE)), [200])
        self.assertEqual(select.select([second], [], [], 0)[0], [])
        first.sendall(body[999:])
        self.assertEqual(self.last_statuses(second), [200])
        late = [self.connect(bot, framed(large)) for _ in range(2)]
        self.until_states(bot, request=2)
        self.until(lambda: not bot.large.acquire(blocking=False) or bot.large.release())
        clock.advance(10)
        self.assertEqual([self.last_statuses(client) for client in late], [[408], [408]], "each is answered once")
        hold.set()

    def test_a_large_body_waits_for_its_turn_until_its_requests_deadline(self):
        clock = Clock()
        bot = self.start_bot(clock=clock, limits={"large": 1, "request": 2 * WAIT})
        for request in framed("Content-Length: %d" % MIB), framed(CHUNKED, body=chunked(b"{}".ljust(70000), 9000)):
            with self.subTest(request[:99]), bot.large:
                client = self.connect(bot)
                self.until_states(bot, request=1)
                clock.advance(2 * WAIT - 0.05)
                client.sendall(request)
                self.assertEqual([answer.text for answer in self.rest(client)], ["Too many large bodies."])

    def test_a_delivery_that_is_whole_only_after_its_408_is_not_acted_on(self):
        clock = Clock()
        bot = self.start_bot(accept, clock=clock, limits={"large": 1})
        with bot.large:
            client = self.connect(bot, signed_request(delivery(message("x" * 65536)), EXPECT))
            self.assertEqual(self.one(client).status, 100)  # from now on its thread waits for a slot
            connection, = bot.deadlines
            clock.advance(10)
            self.assertEqual(self.last_statuses(client), [408])
        self.until(lambda: connection.fileno() == -1)
        self.assertTrue(bot.graph.calls.empty())

    def test_a_client_that_vanishes_leaves_its_place_and_no_trace(self):
        bot, whole = self.start_bot(limits={"connections": 9}), sized(b"{}", EXPECT)
        with self.assertLogs("echobot", "INFO") as logs:
            echobot.log.info("assertLogs wants a line")
            for at in range(0, len(whole) + 1, 12):
                for linger in b"\0" * 8, b"\1\0\0\0\0\0\0\0":  # closed, or reset
                    client = self.connect(bot, whole[:at])
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    client.close()
                    self.assertEqual(self.said(bot, LAST), [(200, "last")])
        self.assertEqual({record.levelname for record in logs.records}, {"INFO"})
        self.until(lambda: not bot.deadlines)

    def test_a_bug_costs_its_request_a_500_and_is_logged_with_its_traceback(self):
        bot = self.start_bot()
        bot.settings = None  # which breaks what answers at the webhook
        with self.assertLogs("echobot", "ERROR") as logs:
            self.assertEqual(self.statuses(bot, sized(b"{}") + get("/healthz", CLOSE)), [500, 200])
        self.assertTrue(logs.records[0].exc_info)

    def test_where_a_thread_cannot_be_started_its_connection_is_closed_or_its_reply_sent_in_another(self):
        bot = self.start_bot()
        client = self.connect(bot, get("/healthz"))
        self.one(client)
        size = threading.stack_size(1 << 45)
        try:
            with self.assertLogs("echobot", "INFO") as logs:
                self.assertEqual(self.answers(bot, LAST), [])
                client.sendall(signed_request(delivery(*people(*"234"))))
                self.assertEqual(self.one(client).status, 200)
        finally:
            threading.stack_size(size)
        self.assertIn("closed a connection", logs.output[0])
        self.assertEqual(["would reply" in line for line in logs.output], [False, True, True, True])
        self.assertEqual(self.statuses(bot, LAST), [200])

    def test_a_thread_that_dies_at_once_costs_its_connection_and_no_reply(self):
        clock, own = Clock(), []
        bot = self.start_bot(accept, clock=clock)
        settle, send_queued = bot.outbox.settle, bot.outbox.send_queued
        bot.outbox.settle = lambda replies: own.append(threading.get_ident()) or settle(replies)
        bot.outbox.send_queued = lambda queue: threading.get_ident() in own and send_queued(queue)
        self.assertEqual(self.sent(bot, *people(*"2345")), ["hello"] * 4)
        bot.process_request_thread = lambda connection, address: self.addCleanup(connection.close)
        client = self.connect(bot, LAST)
        self.until_states(bot, request=1)
        clock.advance(10)
        self.assertEqual((self.last_statuses(client), bot.deadlines), ([408], {}))

    def test_two_colons_listen_for_ipv6_and_ipv4(self):
        try:
            bot = self.start_bot(host="::")
        except OSError:
            self.skipTest("this host has no IPv6")
        for address in "::1", "127.0.0.1":
            with socket.create_connection((address, bot.server_port), WAIT) as client:
                client.sendall(LAST)
                self.assertEqual(self.one(client).text, "last")


class Draining(BotTest):
    """Being told to stop, the bot finishes what is under way."""

    def stop_in_background(self, bot):
        left = queue.Queue()
        threading.Thread(target=lambda: left.put(self.stop(bot)), daemon=True).start()
        self.until(lambda: bot.stopping)
        return left

    def test_nothing_new_is_accepted_the_idle_are_closed_at_once_and_what_is_under_way_is_finished_and_answered(self):
        clock, hold = Clock(), threading.Event()
        bot = self.start_bot(held(hold, graph_error(2, 500)), clock=clock, limits={"drain": 10 ** 6, "answer": 10 ** 6})
        idle, begun, silent = self.connect(bot, NEXT), self.connect(bot, LAST[:30]), self.connect(bot)
        self.assertEqual(self.one(idle).text, "next")
        busy = self.connect(bot, signed_request(delivery(message(), message(mid="m_2"))))
        bot.graph.calls.get(timeout=WAIT)
        self.until_states(bot, idle=1, request=2, answer=1)
        left = self.stop_in_background(bot)
        self.assertRaises(OSError, self.connect, bot)
        self.assertEqual(self.rest(idle), [])
        begun.sendall(LAST[30:])
        self.assertEqual([answer.text for answer in self.rest(begun)], ["last"])
        bot.graph.answer = accept
        hold.set()
        self.until(lambda: clock.advance(0.1) or not bot.outbox.pending)  # there is a pause before the retry
        answer, = self.rest(busy)
        self.assertEqual((answer.status, answer.fields["Connection"]), (200, "close"))
        clock.advance(10)
        self.assertEqual((self.last_statuses(silent), left.get(timeout=WAIT)), ([408], 0))
        self.assertEqual(bot.graph.calls.qsize(), 2)

    def test_replies_get_25_s_and_what_is_left_then_is_counted(self):
        clock, hold = Clock(), threading.Event()
        bot = self.start_bot(held(hold), clock=clock, limits={"drain": 25})
        status = self.deliver_in_background(bot, delivery(message()))
        bot.graph.calls.get(timeout=WAIT)
        left = self.stop_in_background(bot)
        clock.advance(4)
        self.assertEqual(status.get(timeout=WAIT), 503)
        clock.advance(20.9)
        self.assertRaises(queue.Empty, left.get, timeout=0.1)
        clock.advance(0.1)
        self.assertEqual(left.get(timeout=WAIT), 1)
        hold.set()


VARIABLES = "PAGE_ACCESS_TOKEN APP_SECRET ALLOW_UNSIGNED VERIFY_TOKEN HOST PORT GRAPH_URL LOG_LEVEL".split()
LIVE = {"PAGE_ACCESS_TOKEN": TOKEN, "APP_SECRET": SECRET, "VERIFY_TOKEN": VERIFY}
WRONG = [  # a variable, a value that is wrong, and the part of it that must not be shown
    ("PAGE_ACCESS_TOKEN", "EAAG two-words", "two-words"), ("PAGE_ACCESS_TOKEN", "EAAG\x07bell", "bell"),
    ("PAGE_ACCESS_TOKEN", "EAAGpässword", "ssword"), ("VERIFY_TOKEN", "w\udcffrds", "\udcff"),
    ("APP_SECRET", "5ecr3t two-words", "5ecr3t"),
    ("HOST", "bot.example/webhook", "bot."), ("HOST", "[::1]", "[::1]"),
    ("HOST", "bot.example:80", "bot."), ("PORT", "http", "http "), ("PORT", "65536", "65536"), ("PORT", "-1", "-1"),
    ("PORT", "80.5", "80.5"), ("PORT", "\u0665", "\u0665"), ("PORT", "1" * 5000, "1" * 9),
    ("GRAPH_URL", "graph.example", "graph.ex"), ("GRAPH_URL", "ftp://graph.example/", "graph.ex"),
    ("GRAPH_URL", "https:///pa55", "pa55"), ("GRAPH_URL", "https://graph.example:p0rt", "p0rt"),
    ("GRAPH_URL", "https://us3r:pa55@graph.example", "pa55"), ("GRAPH_URL", "https://graph.example/?t=pa55", "pa55"),
    ("GRAPH_URL", "https://graph.example/#pa55", "pa55"), ("LOG_LEVEL", "loudest", "loudest"),
]


class Settings(unittest.TestCase):
    def test_what_is_not_set_has_its_default(self):
        defaults = echobot.Settings("", "", "my_voice_is_my_password_verify_me", "0.0.0.0", 5000,
                                    "https://graph.facebook.com/v26.0", "INFO")
        for value in None, "", ' " "\n':
            environ = {name: value for name in VARIABLES if value is not None}
            self.assertEqual(echobot.settings_from(environ), defaults)

    def test_each_variable_sets_its_own_without_white_space_and_a_pair_of_quotes_around_it(self):
        normal = echobot.settings_from(LIVE)
        for variable, text, field, value in [
            ("PAGE_ACCESS_TOKEN", "EA", "page_access_token", "EA"), ("APP_SECRET", "5ecr3t", "app_secret", "5ecr3t"),
            ("VERIFY_TOKEN", "ä b'", "verify_token", "ä b'"), ("VERIFY_TOKEN", "'tis so", "verify_token", "'tis so"),
            ("HOST", "::", "host", "::"), ("HOST", "bot.example", "host", "bot.example"), ("PORT", "0", "port", 0),
            ("PORT", "65535", "port", 65535), ("LOG_LEVEL", "DEBUG", "log_level", "DEBUG"),
            ("GRAPH_URL", "http://127.0.0.1:9/v1", "graph_url", "http://127.0.0.1:9/v1"),
            ("GRAPH_URL", "https://[::1]/v1/", "graph_url", "https://[::1]/v1"),
        ]:
            for form in "%s", " %s\n", '"%s"', "'%s'", "\t'%s' ", '" %s "':
                with self.subTest(variable, form=form):
                    settings = echobot.settings_from({**LIVE, variable: form % text})
                    self.assertEqual(settings, normal._replace(**{field: value}))

    def test_a_wrong_setting_is_named_with_its_fix_and_without_its_value(self):
        for variable, value, hidden in WRONG:
            with self.subTest(variable, value=value):
                with self.assertRaises(echobot.SettingsError) as caught:
                    echobot.settings_from({**LIVE, variable: value})
                line, = caught.exception.args
                self.assertRegex(line, r"\A%s .+: .*\b(set|copy|remove)\b" % variable)
                self.assertNotIn(hidden, line)


CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgkWS0Xc1l/LfeqL3T
aHMbd22RViIUjihn5hpFo3gDOuKhRANCAASncv+nRVeXOkzWIw5SOW+M07pPO0Ku
jGyWmI0hSmh4WxQ0/p6YqSTcvOSzR/KVoLNU5MWgPk9MelgMgE7b/qPP
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBXDCCAQKgAwIBAgIBATAKBggqhkjOPQQDAjAMMQowCAYDVQQDDAFUMCAXDTIw
MDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAMMQowCAYDVQQDDAFUMFkwEwYH
KoZIzj0CAQYIKoZIzj0DAQcDQgAEp3L/p0VXlzpM1iMOUjlvjNO6TztCroxslpiN
IUpoeFsUNP6emKkk3Lzks0fylaCzVOTFoD5PTHpYDIBO2/6jz6NTMFEwDwYDVR0T
AQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAoQwHQYDVR0OBBYEFAb8nCLGww/awrnI
EWRZFuq6qBLOMA8GA1UdEQQIMAaHBH8AAAEwCgYIKoZIzj0EAwIDSAAwRQIgWeF3
qO503PL91c0329LOTUdhYOpBp6O5FKNVrZZfcw0CIQDSkTiOXDigJtDZBOEZkrol
tp2VVfrAiVC2iEkrtHrSKw==
-----END CERTIFICATE-----
"""  # with its key; signed by itself, for 127.0.0.1, until 2120
SECRETS = "|".join((TOKEN, SECRET, VERIFY, PROOF, "pass.?word"))
REPLY = '''def reply(message):
    if message["text"] == "raise":
        raise ValueError(message, os.environ)
    return message["text"] or %r


''' % SORRY
posix = unittest.skipUnless(os.name == "posix", "elsewhere there are no such signals and limits")


class Process(subprocess.Popen):
    """The program, as a user runs it, or `code`: with the settings and proxies of `environ` and no others."""

    started = []

    def __init__(self, *arguments, typed="", prefix=(), code=None, options=None, **environ):
        inherited = {name: value for name, value in os.environ.items()
                     if name not in VARIABLES and not name.lower().endswith("_proxy")}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        program = ["-c", code] if code else [os.path.join(FOLDER.name, "echobot.py"), *arguments]
        path = os.pathsep.join([os.path.dirname(echobot.__file__), *sys.path])  # for what your `reply` imports
        super().__init__([*prefix, sys.executable, "-S", "-W", "error", *program], encoding="utf-8", cwd=FOLDER.name,
                         env={**inherited, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": path, **environ},
                         **{**pipes, **(options or {})})
        self.log = ""  # what of it has been read
        self.bound = threading.Timer(WAIT, self.kill)
        self.bound.daemon = True
        self.bound.start()
        self.started.append(self)
        if self.stdin:
            self.stdin.write(typed)
            self.stdin.close()

    @classmethod
    def serving(cls, graph=None, **more):
        """Return a process that serves, live if there is a `graph`."""
        live = {**LIVE, "GRAPH_URL": graph.url} if graph else {}
        process = cls("--host", "127.0.0.1", "--port", "0", **{**live, **more})
        process.until_logged("listens")
        process.server_port = int(re.search(r":(\d+), callback", process.log).group(1))
        return process

    def until_logged(self, words):
        """Read the log up to the next line that has `words`."""
        for line in iter(self.stderr.readline, ""):
            self.log += line
            if words in line:
                break

    def end(self):
        """Wait for its end; return the exit status, and what it has printed."""
        printed = [stream.read() for stream in (self.stdout, self.stderr) if stream]
        return (self.wait(WAIT), *printed[:1], *(self.log + log for log in printed[1:]))


FOLDER = tempfile.TemporaryDirectory()


def setUpModule():
    """Copy the program, for the processes: what the bot says there is `REPLY`."""
    with open(echobot.__file__, encoding="utf-8") as source:
        program = re.sub(r"(?ms)^def reply\(.*?(?=^[^\s)])", lambda match: REPLY, source.read())
    with open(os.path.join(FOLDER.name, "echobot.py"), "w", encoding="utf-8") as copy:
        copy.write(program)


def tearDownModule():
    for process in Process.started:
        process.kill()
        process.bound.cancel()
        process.wait()
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()
    FOLDER.cleanup()


LIMITED = """import logging, os, echobot
logging.basicConfig(level="INFO")
echobot.run_until_signal(echobot.make_server(echobot.settings_from(os.environ), echobot.Limits(%s)))
"""


class Commands(BotTest):
    def test_help_names_every_variable_and_command_and_version_is_one_line(self):
        asked, version = Process("--help"), Process("--version")
        status, out, err = asked.end()
        self.assertEqual((status, err), (0, ""))
        for word in ["--host", "--port", "--version", "chat", "check [URL]", *VARIABLES]:
            self.assertIn(word, out)
        self.assertEqual(version.end(), (0, "echobot %s\n" % echobot.__version__, ""))

    def test_if_it_cannot_start_it_says_all_that_is_wrong_without_the_values_and_the_status_is_2_or_1(self):
        wrong = {"PAGE_ACCESS_TOKEN": "pass word", "PORT": "70707", "HOST": "a:password",
                 "GRAPH_URL": "http://me:password@graph.invalid", "LOG_LEVEL": "password"}
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            port = str(taken.getsockname()[1])
            for process, status, starts in [
                    (Process(**wrong), 2, [*wrong, "PAGE_ACCESS_TOKEN"]),  # which has no secret
                    (Process("--host", "127.0.0.1", "--port", port, HOST="::", PORT="0"), 1,
                     ["cannot listen on 127.0.0.1 port %s (" % port]),
                    (Process(HOST="no..host", PORT="0"), 1, ["cannot listen on no..host port 0 ("])]:
                ended, out, err = process.end()
                self.assertEqual((ended, out, err.count("\n")), (status, "", len(starts)))
                for line, start in zip(sorted(err.splitlines()), sorted(starts)):
                    self.assertRegex(line, r"\Aechobot: %s.*: .*\b(set|copy)\b" % re.escape(start))
                self.assertNotRegex(err, "(?i)70707|pass.?word")

    @posix
    def test_the_log_says_at_the_start_where_it_listens_the_mode_and_what_is_missing(self):
        where = r"\AINFO echobot [0-9.]+ listens on http://127\.0\.0\.1:\d+, callback path /webhook\n"
        live, stop = "INFO live: .*http://graph.invalid/v1\n", "INFO stopping.*\nINFO stopped.*\n"
        dry, open_to_all = "WARNING dry run.* PAGE_ACCESS_TOKEN.*\n", "WARNING anybody .* APP_SECRET.*\n"
        for environ, lines, number in (({}, dry + open_to_all, signal.SIGINT), (LIVE, live, signal.SIGTERM),
                                       ({"APP_SECRET": SECRET}, dry, signal.SIGTERM)):
            with self.subTest(environ=environ):
                process = Process.serving(GRAPH_URL="http://graph.invalid/v1", **environ)
                process.send_signal(number)
                status, out, log = process.end()
                self.assertEqual((status, out), (0, ""))
                self.assertRegex(log, where + lines + stop + r"\Z")
        process = Process("--host", "127.0.0.1", "--port", "0", LOG_LEVEL="warning")
        process.until_logged("APP_SECRET")
        process.terminate()
        self.assertRegex("%d%s%s" % process.end(), r"\A0" + dry + open_to_all + r"\Z")

    def test_no_secret_and_no_text_is_printed_whatever_comes(self):
        def answer(call):
            if call.recipient == "4":
                return graph.connections[-1].sendall(call.path.encode() + b"\r\n\r\n")  # which is no status line
            return {"3": graph_error(190, error_user_msg=TOKEN), "5": graph_error(613, error_user_title=TOKEN),
                    "6": (200, {}, call.path.encode()), "7": (200, {call.path: 1}, b"")}.get(call.recipient, ACCEPTED)

        graph = self.start_graph(answer)
        process = Process.serving(graph, LOG_LEVEL="debug")
        statuses = [self.deliver(process, delivery(message(text, "m\r\n\x1b[31m\u202e\u2028" + sender, sender)))
                    for sender, text in (("2", "private"), ("3", "private"), ("8", "raise"))]
        statuses += [self.deliver(process, body) for body in (b"\xff", TOKEN.encode(), b'{"entry": ["private"]}')]
        statuses += [self.request(process, *what)[0] for what in (
            ("GET", "/?hub.verify_token=" + VERIFY), ("GET", "/webhook&hub.verify_token=" + VERIFY),
            ("GET", "/?hub.verify_token=%s-guessed" % VERIFY),
            ("POST", "/", SECRET), ("PUT", "/", SECRET), ("POST", "/", b"{}", {"X-Hub-Signature-256": SECRET}))]
        statuses += self.statuses(process, get("/\x85\xa0", CLOSE))
        self.assertEqual(statuses, [200, 200, 500, 400, 400, 200, 200, 404, 403, 403, 405, 403, 404])
        for sender in "4567":
            self.deliver_in_background(process, delivery(message("private", "m_" + sender, sender)))
            process.until_logged("retrying the reply to %s," % sender)
        process.kill()
        _, out, log = process.end()
        self.assertNotRegex(out + log, SECRETS + "|private")
        self.assertTrue(all(line.isprintable() for line in log.split("\n")))
        for line in r"ERROR .*\b190\b.*\bTR4CE\b.*", "  File .*in reply", "ValueError", ".*VERIFY_TOKEN.*", ".*missing":
            self.assertRegex(log, "(?m)^%s$" % line)

    @posix
    def test_at_sigterm_what_is_under_way_is_finished_and_the_status_is_0_or_1_with_a_count_of_what_is_left(self):
        hold = threading.Event()
        graph = self.start_graph(held(hold))
        patient, impatient = Process.serving(graph), Process.serving(graph, code=LIMITED % "drain=0", PORT="0")
        for process, expected, count in (impatient, (None, 1), 1), (patient, (200, 0), 0):
            status = self.deliver_in_background(process, delivery(message()))
            graph.calls.get(timeout=WAIT)
            process.terminate()
            process.until_logged("stopping")
            if process is patient:
                hold.set()
            ended, _, log = process.end()
            self.assertEqual((status.get(timeout=WAIT), ended), expected)
            self.assertIn("still pending: %d" % count, log)

    @posix
    def test_within_a_second_of_the_first_a_signal_does_nothing_and_later_it_ends_it_at_once(self):
        process = Process.serving(code=LIMITED % "same_signal=0.1, idle=0.1", PORT="0")
        self.assertEqual(self.statuses(process, get("/healthz")), [200], "closed when it has been idle")
        self.connect(process, framed(EXPECT, "Content-Length: 1", body=b"")).recv(MIB)  # the rest would be waited for
        began = time.monotonic()
        while process.poll() is None:
            process.terminate()
            threading.Event().wait(0.002)
        self.assertTrue(0.1 <= time.monotonic() - began < 9)
        self.assertEqual((process.returncode, "stopped" in process.end()[2]), (128 + signal.SIGTERM, False))

    def test_killed_under_load_it_loses_nothing_that_messenger_redelivers(self):
        killed = threading.Event()
        graph = self.start_graph(lambda call: (call.recipient != "p0" or killed.wait(WAIT)) and ACCEPTED)
        first, second = Process.serving(graph), Process.serving(graph)
        payloads = {str(number): delivery(message(str(number), "m_%d" % number, "p%d" % (number % 6)))
                    for number in range(60)}
        answers = {text: self.deliver_in_background(first, payload) for text, payload in payloads.items()}
        self.until(lambda: graph.calls.qsize() > 30)
        first.kill()
        killed.set()
        statuses = {text: answer.get(timeout=WAIT) for text, answer in answers.items()}
        self.assertIn(set(statuses.values()), ({200, None}, {200, 503, None}))  # 503 too, on a slow machine
        redelivered = {self.deliver(second, payloads[text]) for text in payloads if statuses[text] != 200}
        self.assertEqual((redelivered, set(graph.texts())), ({200}, set(payloads)))

    def test_calls_share_a_connection_over_tls_and_through_the_proxy_of_the_environment_too(self):
        certificate = os.path.join(FOLDER.name, "certificate.pem")
        with open(certificate, "w") as file:
            file.write(CERTIFICATE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        graph, proxy, refusing = self.start_graph(), self.start_graph(), self.start_graph(lambda call: (403, {}, b""))
        tunnel = self.start_graph(lambda call: OPEN if call.method == "CONNECT" else ACCEPTED)
        graph.socket, tunnel.context = context.wrap_socket(graph.socket, server_side=True), context
        address = "127.0.0.1:%d" % graph.server_port
        trusting = {"GRAPH_URL": "https://" + address, "SSL_CERT_FILE": certificate}
        through = {server: server.url.replace("//", "//user:pass%20word@") for server in (proxy, refusing, tunnel)}
        password, path = "Basic dXNlcjpwYXNzIHdvcmQ=", "/me/messages?" + CREDENTIALS
        for server, environ, calls in [
                (proxy, {"GRAPH_URL": "http://graph.invalid", "http_proxy": through[proxy]},
                 2 * [("POST", "http://graph.invalid" + path, password)]),
                (graph, trusting, 2 * [("POST", path, None)]),
                (tunnel, {**trusting, "https_proxy": through[tunnel]},
                 [("CONNECT", address, password)] + 2 * [("POST", path, None)])]:
            with self.subTest(environ):
                process = Process.serving(server, **environ)
                self.assertEqual([self.deliver(process, delivery(person)) for person in people(2, 3)], [200, 200])
                self.assertEqual(len(server.connections), 1)
                self.assertEqual([(call.method, call.path, call.headers["Proxy-Authorization"])
                                  for call in server.calls.queue], calls)
        environ = {**LIVE, "GRAPH_URL": "https://" + address}
        for process, why in ((Process("check", **environ), "CERTIFICATE_VERIFY_FAILED"),
                             (Process("check", **environ, https_proxy=through[refusing]), "Tunnel connection failed")):
            _, out, _ = process.end()
            self.assertRegex(out, "FAIL  token .*no answer from Graph .*%s.*: check GRAPH_URL" % why)
            self.assertNotRegex(out, SECRETS)

    @posix
    def test_a_host_that_allows_few_files_and_a_small_stack_has_fewer_connections_and_deep_json_crashes_nothing(self):
        process = Process.serving(prefix=("sh", "-c", 'ulimit -n 64; ulimit -s 256; exec "$@"', "sh"))
        for _ in range(80):
            self.connect(process, get("/healthz")).recv(1)
        self.assertEqual(self.deliver(process, delivery(message())), 200)
        for depth in 2000, 9000, 100000:
            self.assertIn(self.deliver(process, b'{"a": %s}' % (b"[" * depth + b"]" * depth)), (200, 400))

    @unittest.skipUnless(os.path.exists("/proc/self/statm") and sys.implementation.name == "cpython", "memory in /proc")
    def test_an_idle_connection_keeps_nothing_of_the_last_body(self):
        process = Process.serving(APP_SECRET=SECRET)
        for _ in range(100):
            self.assertEqual(self.one(self.connect(process, sized(b"x" * MIB))).status, 403)
        with open("/proc/%d/statm" % process.pid) as pages:
            self.assertLess(int(pages.read().split()[1]) * os.sysconf("SC_PAGESIZE"), 90 * MIB)


TALK = (  # what is typed, what the bot says, and what is noted beside that
    ("hi", ["hi"], "^$"), ("/sticker", [SORRY], "^$"), ("/image", [SORRY], "^$"), ("/postback", ["Get started"], "^$"),
    ("/batch", ["one", "two", "three"], "^$"), ("/read", [], "200.*no reply"), ("/echo", [], "200.*no reply"),
    ("/edit", [], "200.*no reply"), ("once\n/again", ["once"], "200.*no reply"),
    ("once\n/unsigned\n/again", ["once"], "(?s)X-Hub-Signature-256.*403.*200"),
    ("/wire\n/wire", [], r"(?s)\A\(.* shown .*\)\n\(.* hidden .*\)\Z"),
    ("/190\nhello", [], "190.*token"), ("/help", [], "/help"),
)
COMMANDS = "".join(typed + "\n/nope\n" for typed, _, _ in TALK)
LONG = "".join("%d bots, " % number for number in range(500))
PIPED = "hello\n/help\n/wire\n\U0001f600 é\n/nope\n\n  \n/unsigned\n bye \n" + LONG
FAULTS = {"/slow": "503.*\n.*redelivers", "/500": "retrying", "/613": "retrying.*too fast"}


class Chat(BotTest):
    @classmethod
    def setUpClass(cls):  # all at once, because they take a while
        cls.faults = {fault: Process("chat", typed=fault + "\nhello\nbye\n") for fault in FAULTS}
        cls.commands = Process("chat", typed=COMMANDS, options={"stderr": subprocess.STDOUT})
        environ = {**dict.fromkeys(VARIABLES, "wrong wrong"), "http_proxy": "http://127.0.0.1:9"}
        cls.piped = Process("chat", typed=PIPED, **environ)
        cls.wire = Process("chat", typed="/wire\nhello\n/190\nhello\n")

    def test_in_a_pipe_standard_output_holds_what_the_bot_says_whatever_the_environment_has(self):
        status, out, _ = self.piped.end()
        first, second, third, *long = out.splitlines()
        self.assertEqual((status, first, second, third, "".join(long)), (0, "hello", "\U0001f600 é", " bye ", LONG))

    def test_the_reply_comes_once_whatever_passing_fault_graph_has(self):
        for fault, noted in FAULTS.items():
            with self.subTest(fault):
                status, out, err = self.faults[fault].end()
                self.assertEqual((status, out), (0, "hello\nbye\n"))
                self.assertRegex(err.split("\n", 1)[1], noted)

    def test_what_each_command_plays_is_answered_as_it_would_be(self):
        status, out = self.commands.end()
        blocks = out.split("(unknown command /nope; /help lists them)\n")
        self.assertEqual((status, len(blocks), blocks[-1]), (0, len(TALK) + 1, ""))
        for (typed, said, noted), block in zip(TALK, blocks):
            with self.subTest(typed):
                notes = re.findall(r"^(?:\(|  |[A-Z]{4,} ).*", block, re.M)
                self.assertEqual([line for line in block.splitlines() if line not in notes], said)
                self.assertRegex("\n".join(notes), noted)
        self.assertEqual(set(re.findall(r"^ +(/\w+)", blocks[-2], re.M)),
                         set(re.findall(r"/\w+", COMMANDS.replace("/nope", ""))).union(FAULTS))

    def test_wire_shows_each_exchange_as_messenger_and_graph_see_it_and_no_secret(self):
        status, out, notes = self.wire.end()
        self.assertEqual((status, out), (0, "hello\n"))
        ways = ["Messenger > bot", "bot > Graph", "Graph > bot", "bot > Messenger"]
        self.assertEqual(re.findall(r"\w+ > \w+", notes), 2 * ways)
        delivered, call, accepted, _, _, refused = map(json.loads, re.findall(r"^ +(\{.*)", notes, re.M))
        event, = delivered["entry"][0]["messaging"]
        text = event["message"]["text"]
        self.assertEqual(call, {"recipient": event["sender"], "messaging_type": "RESPONSE", "message": {"text": text}})
        self.assertEqual((text, "error" in accepted, refused["error"]["code"]), ("hello", False, 190))
        self.assertEqual(re.findall(r"HTTP/1\.1 (\d+)$", notes, re.M), ["200", "200", "400", "200"])
        for shown in "POST /webhook ", "X-Hub-Signature-256: sha256=[0-9a-f]{64}\n", r"POST /v26.0/me/messages\?access":
            self.assertRegex(notes, shown)
        self.assertNotRegex(notes, r"\b[0-9a-f]{32}\b|(access_token|appsecret_proof)=\w")

    @unittest.skipUnless(hasattr(os, "openpty"), "this system has no pseudo-terminals")
    def test_on_a_terminal_it_prompts_until_control_d(self):
        terminal, inner = os.openpty()
        for file in terminal, inner:
            self.addCleanup(os.close, file)
        os.write(terminal, b"hello\n\x04")
        process = Process("chat", options=dict.fromkeys(("stdin", "stdout", "stderr"), inner))
        self.assertEqual(process.wait(WAIT), 0)
        shown = b""
        while select.select([terminal], [], [], 0)[0]:
            shown += os.read(terminal, 4096)
        self.assertRegex(shown.decode(), r"Say .* /help .* Ctrl-D .*\r\nyou> bot> hello\r\nyou> \r\n\Z")

    def test_its_graph_refuses_what_graph_refuses(self):
        said = queue.Queue()
        graph = self.serve(http.server.HTTPServer(("127.0.0.1", 0), echobot.FakeGraph))
        vars(graph).update(fault="", credentials=CREDENTIALS, print_reply=said.put, show=lambda *_: None)
        for text, code, query, change in [
                ("hi", None, CREDENTIALS, {}), (2000 * "x", None, CREDENTIALS, {}), ("", 100, CREDENTIALS, {}),
                (" \n", 100, CREDENTIALS, {}), (1001 * "\U0001f600", 100, CREDENTIALS, {}), (5, 100, CREDENTIALS, {}),
                ("hi", 190, "", {}), ("hi", 100, "access_token=" + TOKEN, {}),
                ("hi", 100, CREDENTIALS, {"messaging_type": None}), ("hi", 100, CREDENTIALS, {"recipient": "1001"})]:
            content = {"recipient": {"id": "1001"}, "messaging_type": "RESPONSE", "message": {"text": text}, **change}
            with self.subTest(text, query=query, change=change):
                _, _, answer = self.request(graph, "POST", "/v26.0/me/messages?" + query, json.dumps(content))
                self.assertEqual(json.loads(answer).get("error", {}).get("code"), code)
                self.assertEqual([said.get() for _ in range(said.qsize())], [] if code else [text])


def graph_says(page=None, apps=None):
    """Return how Graph answers, if it says this of the token and of the subscription."""
    def answer(call):
        says = apps if "/subscribed_apps" in call.path else page
        return says if isinstance(says, tuple) else (200, {}, json.dumps(says).encode())

    page = page or {"id": "1", "name": "A Page\n\x1b[2JFAIL"}
    apps = apps or {"data": [{"subscribed_fields": ["messages"]}]}
    return answer


class Check(BotTest):
    def setUp(self):
        self.graph = self.start_graph()
        self.addCleanup(close_idle, self.opener)

    def check(self, url=None, answer=graph_says(), timeout=WAIT, **environ):
        """Return the exit status of `check` and its findings, in which there is no secret."""
        self.graph.answer = answer
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = echobot.check({**LIVE, "GRAPH_URL": self.graph.url, **environ}, url, self.opener, timeout)
        lines = output.getvalue().splitlines()
        for line in lines:
            self.assertRegex(line, r"\A(ok  |FAIL)  \w[^\x00-\x1f\x7f]{20,}\Z")
            self.assertNotRegex(line, SECRETS)
        return status, lines

    def assert_found(self, *causes):
        """Assert of each (pattern, what is checked) that one finding fails, and how; the tests' http does not count."""
        for pattern, what in causes:
            with self.subTest(pattern):
                status, lines = self.check(**what)
                failed = [line for line in lines if line.startswith("FAIL") and "not https" not in line]
                self.assertEqual((status, len(failed)), (1, 1), lines)
                self.assertRegex(failed[0], pattern)

    def test_where_everything_holds_each_line_is_ok_and_the_status_is_0_and_nothing_is_sent(self):
        self.graph.answer = graph_says()
        good, bad = Process("check", GRAPH_URL=self.graph.url, **LIVE), Process("check", "nowhere")
        malformed = Process("check", GRAPH_URL=self.graph.url, http_proxy="http:/me:password@127.0.0.1", **LIVE)
        no_port = Process("check", GRAPH_URL=self.graph.url, http_proxy="http://127.0.0.1:" + 20 * "9", **LIVE)
        (status, out, err), (other_status, other_out, other_err) = good.end(), bad.end()
        self.assertEqual((status, [line.split()[:2] for line in out.splitlines()], err), (0, [["ok", what] for what in (
            "settings", "settings", "token", "subscription")], ""))
        self.assertRegex(out, r'"A Page\\n\\x1b\[2JFAIL", id 1.*\n.* messages\n')
        self.assertEqual([(call.method, call.path) for call in self.graph.calls.queue], [
            ("GET", "/v26.0/me?fields=id,name&" + CREDENTIALS), ("GET", "/v26.0/me/subscribed_apps?" + CREDENTIALS)])
        self.assertEqual((other_status, other_err, other_out.count("FAIL  ")), (1, "", 3))
        for process in malformed, no_port:
            self.assertRegex("%d %s%s" % process.end(), r"(?s)\A1 .*FAIL  token  .*: check .*https_proxy [^\n]*\n\Z")

    def test_what_is_wrong_with_the_settings_is_found_and_a_token_needs_a_secret_unless_that_is_waived(self):
        self.assert_found(
            ("PAGE_ACCESS_TOKEN is not set.*: set it", {"PAGE_ACCESS_TOKEN": ""}),
            ("APP_SECRET is not set.*: set it", {"APP_SECRET": "", "ALLOW_UNSIGNED": ' "1"'}),
            *(("PAGE_ACCESS_TOKEN is set without APP_SECRET.*: set APP_SECRET.*ALLOW_UNSIGNED=1",
               {"APP_SECRET": ' "" ', "ALLOW_UNSIGNED": allowed}) for allowed in ("", "0")),
            ("URL .*: give one like https://", {"url": ""}), ("URL .*: give one like https://", {"url": "bot.example"}),
            ("URL .*: give one like https://", {"url": "https://bot.example/?a=b"}))

    def test_what_graph_says_against_the_token_or_the_subscription_is_found(self):
        quoting = functools.partial(graph_error, error_user_msg=TOKEN)
        proof = 400, {}, b'{"error": {"code": 100, "message": "Invalid appsecret_proof provided, %s"}}' % TOKEN.encode()
        self.assert_found(*((pattern, {"answer": graph_says(*says)}) for pattern, says in (
            ("token .*190, subcode 463.*: generate a new PAGE_ACCESS_TOKEN", [quoting(190, error_subcode=463)]),
            ("token .*: copy both from the same app", [proof]),
            ("token .*code 2.*down", [quoting(2, 500)]),
            ("token .*status 200, and not from Graph: check GRAPH_URL", [(200, {}, b"<html>" + TOKEN.encode())]),
            ("subscription .*code 200.*permission is missing: check", [None, quoting(200)]),
            ("subscription .*: subscribe the app to messages", [None, {"data": []}]),
            ("subscription .*: subscribe the app to messages", [None, {"data": [{"subscribed_fields": ["feed"]}]}]))))

    def test_what_is_wrong_with_a_deployed_bot_is_found(self):
        def url(path="/webhook", **settings):
            return {"url": "http://127.0.0.1:%d%s" % (self.start_bot(accept, **settings).server_port, path)}

        def other(*answer):
            return {"url": self.start_graph(lambda call: answer).url}

        status, lines = self.check(**url())
        self.assertEqual((status, [line[:4] for line in lines[4:]]), (1, ["FAIL"] + 4 * ["ok  "]))
        self.assertRegex(lines[4], "URL .*not https.*: give the https URL.* proxy with a certificate")
        self.assert_found(("verification .*status 404.*: check the address", url("/elsewhere")),
                          ("verification .*different VERIFY_TOKEN: use the same", url(verify_token="another")),
                          ("signed .*different APP_SECRET, use the same", url(app_secret="another")),
                          ("unsigned .*anybody.*: set APP_SECRET on the deployed bot", url(app_secret="")),
                          ("verification .*status 200, not the challenge", other(200, {}, b"Welcome")),
                          ("verification .*status 403, not the challenge", other(403, {}, b"Blocked")),
                          ("verification .*status 302", other(302, {"Location": self.graph.url}, b"")))
        _, lines = self.check(**other(200, {}, b"1158201444"))
        self.assertRegex("\n".join(lines), "(?s)FAIL  wrong token .*echobot is not at this address.*FAIL  unsigned ")

    def test_what_does_not_answer_is_found_within_the_time_out(self):
        with socket.socket() as closed, socket.socket() as silent:
            for server in closed, silent:
                server.bind(("127.0.0.1", 0))
            silent.listen(5)
            refused, late = ("http://127.0.0.1:%d" % server.getsockname()[1] for server in (closed, silent))
            for what, fix in ("GRAPH_URL", "token .*no answer.*%s.*: check GRAPH_URL"), ("url", "webhook .*%s.*: che"):
                self.assert_found((fix % "efused", {what: refused}), (fix % "timed out", {what: late, "timeout": 0.3}))


class Shape(BotTest):
    def test_it_is_made_of_threading_http_server_and_an_opener_of_urllib(self):
        bot = self.start_bot(accept)
        self.assertIsInstance(bot, http.server.ThreadingHTTPServer)
        self.assertTrue(issubclass(bot.RequestHandlerClass, http.server.BaseHTTPRequestHandler))
        self.assertTrue({"do_GET", "do_POST", "parse_request", "send_error"} <= {*vars(bot.RequestHandlerClass)})
        self.assertIsInstance(bot.outbox.graph.opener, urllib.request.OpenerDirector)
        opener = echobot.make_opener(proxies={"https": "http://127.0.0.1:9"})
        self.assertTrue({urllib.request.ProxyHandler, echobot.KeepAliveHandler} <= {*map(type, opener.handlers)})
