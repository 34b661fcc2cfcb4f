#!/usr/bin/env python3
"""A Facebook Messenger bot that repeats what it is told: one file, the standard library, nothing else.

    python echobot.py                 serve the webhook
    python echobot.py chat            talk to the bot on this machine; no account, no network
    python echobot.py check [URL]     find out why a live bot does not answer

The settings are environment variables:

    PAGE_ACCESS_TOKEN   the page's token; without one this is a dry run, which logs the replies that it would send
    APP_SECRET          the app's secret, with which deliveries are signed; a token requires it
    ALLOW_UNSIGNED      1 accepts a token without APP_SECRET, and so deliveries from anybody: for experiments only
    VERIFY_TOKEN        what the webhook's setup page must send; default my_voice_is_my_password_verify_me
    HOST, PORT          where to listen; default 0.0.0.0 and 5000
    GRAPH_URL           the Graph API and its version; default https://graph.facebook.com/v26.0
    LOG_LEVEL           DEBUG, INFO (the default), WARNING, ERROR or CRITICAL; the log goes to standard error

The life of a message:

 1. Messenger POSTs a delivery.  `Bot` gives each connection a thread, in which `WebhookHandler` reads the request.
 2. `verify_signature` checks that the delivery comes from Messenger, if APP_SECRET is set; only then is it parsed.
 3. `replies_owed` finds the events in it that are owed a reply.
 4. `Outbox` asks `reply` what to say and calls Graph, one person's messages in order, with retries for a minute.
 5. The delivery is answered with the highest of these status codes that applies:

        200   its replies are settled: Graph has accepted or permanently refused each, or there was nothing to say
        500   `reply` raised
        503   one is still pending after 4 s; if the delivery's thread is sending then, the main thread answers
        503   one was given up, after a minute of failures; a redelivery may have waited for it
        503   with these, more than 1,000 would be pending: none is begun (all are, if nothing else is pending)

 6. After 500 or 503 Messenger redelivers.  A redelivery sends nothing that is settled, waits for what is pending, and
    starts the rest afresh; that may come after the person's newer messages.

When every call has failed for 10 minutes, the answer is 200 instead of 503, and the replies may be lost.

On SIGTERM the bot accepts no more and finishes what is under way, for up to 25 s.  What is left then, or after a crash,
Messenger redelivers; nothing is kept on disk.  A reply is sent at least once, unless Graph refuses it permanently,
`reply` keeps raising, the outage is long, or Messenger stops redelivering.  It is sent twice only if Graph accepted it
but its answer was lost, or if its delivery is redelivered to another process, such as the restarted bot, or after
10,000 other replies.  A long text that was given up halfway starts again from its beginning.
"""
from __future__ import annotations  # needs Python 3.7 or newer

import _thread
import argparse
import collections
import contextlib
import email.utils
import functools
import hashlib
import hmac
import http.client
import http.server
import json
import logging
import os
import random
import re
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
import traceback
import unicodedata
import urllib.parse
import urllib.request
from typing import Any, Callable, Deque, Dict, Iterator, List, Mapping, NamedTuple, NoReturn, Optional, Sequence, Tuple

__version__ = "2.0"
log = logging.getLogger("echobot")
ReplyFunction = Callable[[Mapping[str, Any]], Optional[str]]
Clock = Callable[[], float]
Wait = Callable[[threading.Event, float], bool]  # like threading.Event.wait; tests supply their own time


# ---- What the bot says: make this yours ----------------------------------------------------------------------------

def reply(message: Mapping[str, Any]) -> Optional[str]:
    """Return what the bot says to `message`, or None to say nothing.

    `message` is what Messenger sends: {"mid": …, "text": …, "attachments": […], …}, its `text` empty if there is none,
    and the person's id, as "sender".  A postback (the press of a button) comes as {"text": its title, "payload": …}.
    `reply` may be slow, but must return: many threads run it at once, but never two for one person.  It is called again
    for the same message if Graph failed for a minute, or if it raised: then the delivery is answered 500, and after an
    hour of that Messenger unsubscribes the bot.
    """
    return message.get("text") or "I can't echo this"


# ---- Limits --------------------------------------------------------------------------------------------------------

TEXT_UNITS = 2000            # UTF-16 code units in one message: Graph's limit for one text
LINE_BYTES = 8 * 1024        # of a request line or a header line, as in nginx
HEAD_BYTES = 32 * 1024       # of all header lines together; Messenger and the host's router send about 1 KiB
BODY_BYTES = 1024 * 1024     # of a delivery, or of one of Graph's answers; real ones are a few KiB
LARGE_BYTES = 64 * 1024      # larger bodies wait for one of `Limits.large` slots
STACK_BYTES = 2 * 1024 ** 2  # of a thread: with less, nested JSON crashes Python 3.13; the usual 8 MiB are not needed
SPARE_FILES = 40             # open files left to the interpreter, the log, DNS and `reply`: see `fit_file_limit`
TICK = 0.05                  # s between two looks at the clock: small compared with all deadlines


class Limits(NamedTuple):
    """The limits that a test, `chat` or a small host may want smaller: first times, in seconds, then numbers."""

    answer: float = 4.0        # for a delivery, once it is read: Messenger wants its answer within 5
    request: float = 10.0      # for a request to arrive whole, from accept or from its first byte: deliveries are small
    idle: float = 120.0        # between two requests: Heroku's router must be the one to close, after 90
    linger: float = 2.0        # for a client to take an answer and, after the last one, to close its side
    graph: float = 20.0        # for each socket operation of a call, which takes 0.1 to 1; Graph is trusted not to drip
    retry: float = 60.0        # from a reply's first call; a failure after it, or a longer Retry-After, is final
    first_pause: float = 0.5   # before the second try; each further pause is twice as long
    longest_pause: float = 8.0  # between two tries: there are about a dozen in a minute
    graph_unused: float = 60.0  # of idleness, after which no connection to Graph is used again: a NAT may have lost it
    outage: float = 600.0      # of failure, after which Messenger gets 200: after an hour it would unsubscribe the bot
    drain: float = 25.0        # for what is under way after SIGTERM: Heroku kills after 30
    same_signal: float = 1.0   # a second signal within this counts as the first: Heroku may send SIGTERM twice
    connections: int = 500     # at a time; one more ends the longest idle one, or if none is idle, it waits
    large: int = 16            # bodies above LARGE_BYTES at a time: each takes up to 1 MiB, and more once parsed
    pending: int = 1000        # replies that are not final yet: each may hold a thread, and Messenger keeps the rest
    calls: int = 300           # to Graph at a time, each with a file: at 1 s a call, Graph's own limit, 300 a second
    settled: int = 10_000      # replies remembered so that they are not sent again: half a minute's, at 300 a second
    graph_idle: int = 64       # connections to Graph, for each host or proxy, that are kept open while idle


# ---- Settings ------------------------------------------------------------------------------------------------------

class Settings(NamedTuple):
    """The environment variables that the bot knows, checked: each has its variable's name, in lower case."""

    page_access_token: str = ""
    app_secret: str = ""
    verify_token: str = "my_voice_is_my_password_verify_me"
    host: str = "0.0.0.0"
    port: int = 5000
    graph_url: str = "https://graph.facebook.com/v26.0"
    log_level: str = "INFO"
    allow_unsigned: str = "0"


class SettingsError(Exception):
    """Settings that are wrong; `args` has a line for each, and quotes no value."""


# Without a user, a query or a fragment: the last class has all but space, ", #, ? and @
URL = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[1-9][0-9]{0,4})?(/[!$->A-~]*)?")


def settings_from(environ: Mapping[str, str]) -> Settings:
    """Return the settings in `environ`; raise SettingsError with everything that is wrong with them."""
    values: Dict[str, Any] = {}
    for name, default in Settings()._asdict().items():
        text = environ.get(name.upper(), "").strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":  # quotes get pasted along
            text = text[1:-1].strip()
        values[name] = text or str(default)
    values["port"] = int(values["port"]) if re.fullmatch("[0-9]{1,5}", values["port"]) else -1  # refused below
    values["log_level"], values["graph_url"] = values["log_level"].upper(), values["graph_url"].rstrip("/")
    settings = Settings(**values)
    errors = list(settings_errors(settings))
    if errors:
        raise SettingsError(*errors)
    return settings


def settings_errors(settings: Settings) -> Iterator[str]:
    """Yield a line for each setting that is wrong, with its fix."""
    for name in "page_access_token", "app_secret":
        if not re.fullmatch("[!-~]*", getattr(settings, name)):
            yield name.upper() + " contains a space or an invalid character: copy it again, without anything around it"
    if not settings.verify_token.isprintable():
        yield "VERIFY_TOKEN contains an invalid character: set it to any words"
    if settings.page_access_token and not settings.app_secret and settings.allow_unsigned != "1":
        yield ("PAGE_ACCESS_TOKEN is set without APP_SECRET, so anybody could make the bot speak: set APP_SECRET to "
               "the app's secret (Meta's dashboard: App settings, Basic), or ALLOW_UNSIGNED=1 to let anybody in")
    if not 0 <= settings.port < 65536:
        yield "PORT (or --port) must be a whole number from 0 to 65535: set it to the port to listen on, such as 5000"
    if not re.fullmatch(r"[^\s/\[\]]+", settings.host) or settings.host.count(":") == 1:
        yield "HOST (or --host) must be a host name or an address: set it to one such as 127.0.0.1 or ::1"
    if not URL.fullmatch(settings.graph_url):
        yield "GRAPH_URL must be a plain http or https URL: remove it, or set it to one like " + Settings().graph_url
    if settings.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        yield "LOG_LEVEL must be DEBUG, INFO, WARNING, ERROR or CRITICAL: set it to one of these, or remove it"


# ---- The rules: without I/O, clock or environment ------------------------------------------------------------------

WRONG_TOKEN = 403, "Error, wrong validation token"  # the tutorial's words
UNSIGNED = 403, "The delivery is not signed with the app's secret."


class RequestError(ValueError):
    """A refused request, or a malformed answer from Graph; `args`: the status, the text, and for the log the reason."""


def require(value: Any, status: int, *why: str) -> Any:
    """Return `value`, such as a match; raise RequestError, with `status` and `why` as its `args`, if it is false."""
    if not value:
        raise RequestError(status, *why)
    return value


def verify_challenge(query: Mapping[str, str], verify_token: str) -> str:
    """Return the challenge of a webhook verification; raise RequestError if its token or mode is wrong."""
    same = hmac.compare_digest(query.get("hub.verify_token", "").encode(), verify_token.encode())
    require(same, *WRONG_TOKEN,
            "hub.verify_token differs from VERIFY_TOKEN (a browser sends none): use the same value in both")
    require(query.get("hub.mode", "subscribe") == "subscribe", *WRONG_TOKEN, "hub.mode is not subscribe")
    return query.get("hub.challenge", "")


def sign(body: bytes, secret: str) -> str:
    """Return the X-Hub-Signature-256 of `body`, the raw bytes of a delivery."""
    return "sha256=" + hmac.digest(secret.encode(), body, "sha256").hex()


def verify_signature(signature: Optional[str], body: bytes, secret: str) -> None:
    """Raise RequestError, with the reason, unless `signature` is that of `body`."""
    require(signature is not None, *UNSIGNED, "X-Hub-Signature-256 is missing")
    match = require(re.fullmatch("sha256=[0-9a-f]{64}", signature or ""), *UNSIGNED, "X-Hub-Signature-256 is malformed")
    same = hmac.compare_digest(match.group(), sign(body, secret))
    require(same, *UNSIGNED, "X-Hub-Signature-256 does not match the body: check APP_SECRET")


def parse_object(raw: bytes) -> Dict[str, Any]:
    """Return the JSON object that `raw` holds in UTF-8; raise RequestError if it holds none or nests too deeply."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=int)  # int("NaN") is a ValueError: JSON has no NaN
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestError(400, "The body is not a JSON object in UTF-8.")
    return value


class OwedReply:
    """A reply that is owed to an event, and what becomes of it."""

    def __init__(self, key: bytes, recipient: str, mid: str, message: Dict[str, Any]) -> None:
        self.key = key              # 16 bytes that identify its event
        self.recipient = recipient  # the event's sender
        self.label = "%s, mid %s" % (recipient, mid or "none")  # for the log
        self.message = message      # what `reply` gets
        self.status = 503           # while pending, or if given up; 200 once settled; 500 if `reply` raised
        self.began = 0.0            # when its first call began
        self.done = threading.Event()  # set when `status` is final
        self.previous: Optional[threading.Event] = None  # `done` of the reply before it to the same person


def replies_owed(delivery: Mapping[str, Any]) -> Tuple[List[OwedReply], List[str]]:
    """Return the replies that a delivery owes, and what is wrong with each of its malformed events."""
    replies, errors = [], []
    if delivery.get("object", "page") != "page":
        return [], []
    for entry in list_in(delivery, "entry"):
        for event in list_in(entry, "messaging"):
            try:
                replies.append(reply_to_event(identity(entry), event))
            except ValueError as error:
                errors.append(str(error))
    return [owed for owed in replies if owed], errors


def list_in(container: Any, name: str) -> List[Any]:
    """Return the list that `container` has under `name`; [] if absent; if not a list, [None], which is malformed."""
    value = container.get(name, []) if isinstance(container, dict) else None
    return value if isinstance(value, list) else [None]


def identity(thing: Any, name: str = "id") -> str:
    """Return the id of a sender, recipient or entry, or the "mid" of a message; an empty string if it has none."""
    value = thing.get(name) if isinstance(thing, dict) else None
    return str(value) if type(value) in (str, int) else ""


def reply_to_event(page: str, event: Any) -> Optional[OwedReply]:
    """Return the reply owed to a person's message or postback, else None; raise ValueError if it is malformed."""
    if not isinstance(event, dict):
        raise ValueError("the event is not an object")
    kind = "postback" if event.get("message") is None else "message"
    message = event.get(kind)
    if message is None:
        return None
    if not isinstance(message, dict):
        raise ValueError("its %s is not an object" % kind)
    text = message.get("text" if kind == "message" else "title") or ""
    if not isinstance(text, str):
        raise ValueError("the text of its %s is not a string" % kind)
    sender = identity(event.get("sender"))  # the page's own messages come as events too
    if sender in ("", page, identity(event.get("recipient"))) or message.get("is_echo") or message.get("is_deleted"):
        return None
    mid = identity(message, "mid")
    name = mid or "%s %s %s" % (sender, event.get("timestamp"), kind)  # old postbacks have no mid
    key = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return OwedReply(key, sender, mid, dict(message, text=text, sender=sender))


FLAG_LETTERS = "".join(map(chr, range(0x1F1E6, 0x1F200)))  # a flag is two of them
INSEPARABLE = re.compile("\u200d|\r\n|[\ud800-\udbff][\udc00-\udfff]")  # joiner, CR LF, pair: no cut after the first
EXTENDING = re.compile("[\u200c\u200d\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")  # joiner, skin, tag: no cut before


def pieces(text: str) -> List[str]:
    """Return `text` cut into messages of at most TEXT_UNITS, after white space if there is any in the second half."""
    result = []
    while text:
        encoded = text[:TEXT_UNITS].encode("utf-16-le", "replace")  # in two bytes for each code unit
        end = len(encoded[:2 * TEXT_UNITS].decode("utf-16-le", "ignore"))  # characters that fit; none is cut in two
        if end < len(text):
            half = len(encoded[:TEXT_UNITS].decode("utf-16-le", "ignore"))  # TEXT_UNITS bytes: half a message
            cuts = [at for at in range(1, end + 1) if not inside_character(text, at)] or [end]
            spaces = [at for at in cuts if at > half and text[at - 1].isspace()]
            end = (spaces or cuts)[-1]
        result.append(text[:end])
        text = text[end:]
    return result


def inside_character(text: str, at: int) -> bool:
    """Return whether a cut at `at` would divide what a reader sees as one character."""
    if text[at] in FLAG_LETTERS:
        return (at - len(text[:at].rstrip(FLAG_LETTERS))) % 2 == 1  # an odd number of letters before it
    return bool(INSEPARABLE.match(text, at - 1) or EXTENDING.match(text, at)
                or unicodedata.category(text[at]).startswith("M"))  # a mark, such as an accent


# ---- HTTP: what http.client and http.server leave out --------------------------------------------------------------
# http.client and http.server parse header fields as if they were e-mail's: slowly, and accepting what RFC 9112 tells a
# server to refuse.  These functions raise RequestError for what is malformed, too long or cut off.

CHUNKED = -1
TOO_LONG = "The body is longer than 1 MiB."
CLOSE = "Connection: close\r\n"
NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
FIELD = re.compile(r"(%s):([\t -~\x80-\xff]*)\r?\n" % NAME)
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]+)[ \t]*(;[\t -~\x80-\xff]*)?\r\n")
TEXTS: Dict[int, str] = {**http.client.responses, 200: "ok"}  # what an answer says unless there is more to say


def read_fields(file: Any) -> Dict[str, str]:
    """Return the header fields up to the empty line, by their names in lower case."""
    fields: Dict[str, str] = {}
    room = HEAD_BYTES
    while True:
        line = file.readline(LINE_BYTES + 1)
        room -= len(line)
        require(len(line) <= LINE_BYTES and room >= 0, 431, "The header fields are too long.")
        if line in (b"\r\n", b"\n"):
            return fields
        match = require(FIELD.fullmatch(line.decode("latin-1")), 400, "A header field is malformed.")
        name, value = match.group(1).lower(), match.group(2).strip(" \t")
        fields[name] = fields[name] + ", " + value if name in fields else value  # so a length given twice is malformed


def body_length(fields: Dict[str, str], minor: int) -> Optional[int]:
    """Return the length of the body after an HTTP/1.`minor` head: a number, CHUNKED, or None if it does not say."""
    length, coding = fields.get("content-length"), fields.get("transfer-encoding")
    if coding is not None:
        codings = [name.strip(" \t").lower() for name in coding.split(",")]
        require(length is None and minor > 0 and "chunked" not in codings[:-1],
                400, "Chunked must be the last coding, in HTTP/1.1, and excludes Content-Length.")
        require(codings == ["chunked"], 501, "The only transfer coding supported is chunked.")
        return CHUNKED
    if length is None:
        return None
    require(re.fullmatch("[0-9]+", length), 400, "Content-Length is not a decimal number, or is given twice.")
    size = float(length)  # int refuses thousands of digits
    require(size <= BODY_BYTES, 413, TOO_LONG)
    return int(size)


def read_body(file: Any, length: int, before_large: Callable[[], None] = lambda: None) -> bytes:
    """Return a body of `length` bytes, or CHUNKED; call `before_large` before reading more than LARGE_BYTES of it."""
    if length != CHUNKED:
        if length > LARGE_BYTES:
            before_large()
        return read_exactly(file, length)
    body = bytearray()
    while True:
        match = require(CHUNK_LINE.fullmatch(file.readline(LINE_BYTES)), 400, "A chunk is malformed.")
        size = int(match.group(1), 16)
        if size == 0:
            read_fields(file)  # trailer fields, which are ignored
            return bytes(body)
        require(len(body) + size <= BODY_BYTES, 413, TOO_LONG)
        if len(body) <= LARGE_BYTES < len(body) + size:
            before_large()
        body += read_exactly(file, size)
        require(read_exactly(file, 2) == b"\r\n", 400, "A chunk is malformed.")


def read_exactly(file: Any, size: int) -> bytes:
    """Return the next `size` bytes."""
    data: bytes = file.read(size) or b""  # None if `Bot.end` has made the socket non-blocking
    require(len(data) == size, 400, "The body is cut off.")
    return data


def encode_answer(status: int, text: Optional[str] = None, fields: str = CLOSE, head_only: bool = False) -> bytes:
    """Return the bytes of an answer; `fields` are further lines of its head."""
    body = (TEXTS[status] if text is None else text).encode("utf-8", "replace")
    head = ("HTTP/1.1 %d %s\r\nDate: %s\r\nContent-Type: text/plain; charset=utf-8\r\n"
            "X-Content-Type-Options: nosniff\r\nContent-Length: %d\r\n%s\r\n")
    head %= status, http.client.responses[status], email.utils.formatdate(usegmt=True), len(body), fields
    return head.encode() + (b"" if head_only else body)


# ---- Graph ---------------------------------------------------------------------------------------------------------

class GraphError(Exception):
    """A call that failed, or that Graph has refused."""

    temporary = True   # whether it may succeed when retried
    retry_after = 0.0  # s, if Graph said so


DOWN, TOO_FAST = (1, 2, 1200), (4, 17, 32, 341, 613, 80006)
MEANINGS: Dict[Any, str] = {
    10: "the person's last message is over 24 hours old, or a permission is missing: ask for pages_messaging in review",
    100: "a parameter is wrong, or the page knows no such person: check that the token is this page's, and GRAPH_URL",
    368: "Facebook has blocked the page or the app for its behavior: see the page's support inbox",
    1545041: "the person's last message is over 24 hours old: wait for the next one",
    551: "the person is not available: there is nothing to do",
    **dict.fromkeys((102, 190), "the token is wrong, has expired or was revoked: generate a new PAGE_ACCESS_TOKEN"),
    **dict.fromkeys(DOWN, "Graph is down, or cannot reach the person, for now: wait"),
    **dict.fromkeys(TOO_FAST, "too many calls, or too fast: send fewer messages"),
    **dict.fromkeys(range(200, 300), "a permission is missing: check the app's permissions and the page's tasks"),
}


def parse_response(status: int, headers: Mapping[str, str], body: bytes) -> Dict[str, Any]:
    """Return Graph's answer; raise GraphError if it has not done what was asked."""
    try:
        answer = parse_object(body)
    except RequestError:
        answer = {"error": None}
    if status == 200 and "error" not in answer:
        return answer
    error: Any = answer.get("error")
    if not isinstance(error, dict) or not isinstance(error.get("code"), int):
        failure = GraphError("HTTP status %d, and not from Graph: check GRAPH_URL and the proxy" % status)
    else:
        meaning = MEANINGS.get(error["code"], "see Meta's error codes")
        if "appsecret_proof" in str(error.get("message")):  # the message itself may quote the token
            meaning = "APP_SECRET and the token belong to different apps: copy both from the same app"
        failure = GraphError("code %s, subcode %.40s: %s (fbtrace_id %.40s)" % (
            error["code"], error.get("error_subcode", "none"), meaning, error.get("fbtrace_id")))
        failure.temporary = bool(status >= 500 or status == 429 or error.get("is_transient")
                                 or error["code"] in DOWN + TOO_FAST)
    if re.fullmatch("[0-9]+", headers.get("retry-after", "")):
        failure.retry_after = float(headers["retry-after"])
    raise failure


class Response(http.client.HTTPResponse):
    """An answer that is read whole, with `status`, `headers` (by their names in lower case) and `body`.

    Unlike http.client's, it leaves its buffer, `fp`, open after the answer: what Graph sends beyond that stays in it,
    where `KeepAliveHandler.take` looks, so that it is not read as the next answer.
    """

    def begin(self) -> None:
        """Read the answer; raise HTTPException or RequestError if it is malformed, too long or cut off."""
        self.status = 100
        while self.status < 200:  # such as 100 Continue: the answer proper is still to come
            version, self.status, _ = self._read_status()  # type: ignore[attr-defined]
            self.headers: Any = read_fields(self.fp)
        length = 0 if self.status in (204, 304) else body_length(self.headers, 1)
        self.body = self.fp.read(BODY_BYTES) if length is None else read_body(self.fp, length)
        self.will_close = (length is None or version != "HTTP/1.1"
                           or "close" in self.headers.get("connection", "").lower())


class KeepAliveHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens http and https URLs over connections that it keeps open: urllib's http_open and https_open call do_open.

    urllib itself would open a connection, with a TLS handshake, for each call.
    """

    def __init__(self, limits: Limits, clock: Clock) -> None:
        super().__init__(context=ssl.create_default_context())  # once (20 ms, 1.5 MB), not for each connection
        self.limits, self.clock = limits, clock
        self.lock = threading.Lock()  # guards `idle`
        # By (type, host, tunnel): a list of (idle since, connection, its last answer), the latest at the end
        self.idle: Dict[Any, List[Tuple[float, Any, Response]]] = collections.defaultdict(list)

    def do_open(self, http_class: Any, req: urllib.request.Request, **options: Any) -> Any:
        """Return the Response to `req`, and keep the connection open if it can be used again."""
        headers = dict(req.header_items())
        tunnel: Optional[str] = req._tunnel_host  # type: ignore[attr-defined]
        # ProxyHandler adds Proxy-Authorization to the request's own fields, which a tunnel would carry to Graph
        for_proxy = {name: headers.pop(name) for name in list(headers) if tunnel and name.startswith("Proxy-")}
        fields = "".join(["%s: %s\r\n" % field for field in headers.items()])  # urllib has added Host, Content-Length
        head = "%s %s HTTP/1.1\r\n%s\r\n" % (req.get_method(), req.selector or "/", fields)
        key = req.type, req.host, tunnel
        connection = self.take(key)
        if connection is None:
            connection = http_class(req.host, timeout=req.timeout, **options)
            if tunnel:
                connection.set_tunnel(tunnel, headers=for_proxy)
        with contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            # Connects, if need be; in one write, where http.client's `request` makes two
            connection.send(head.encode("latin-1") + (req.data or b""))  # type: ignore[operator]
            response = stack.enter_context(Response(connection.sock))
            response.begin()
            with self.lock:
                if not response.will_close and len(self.idle[key]) < self.limits.graph_idle:
                    self.idle[key].append((self.clock(), connection, response))
                    stack.pop_all()  # the connection and its buffer stay open
        return response

    def take(self, key: Any) -> Any:
        """Return the most recently used idle connection that is still good, or None."""
        while True:
            with self.lock:
                if not self.idle[key]:
                    return None
                since, connection, response = self.idle[key].pop()
            connection.sock.settimeout(0)
            with response:  # closes the answer's buffer, not the connection
                try:
                    good = response.fp.read(1) is None  # nothing has come; b"" is the end, a byte was not asked for
                except OSError as error:
                    good = isinstance(error, ssl.SSLWantReadError)  # so TLS says that nothing has come
            if good and self.clock() - since < self.limits.graph_unused:
                connection.sock.settimeout(connection.timeout)
                return connection
            connection.close()


def make_opener(limits: Limits = Limits(), proxies: Optional[Dict[str, str]] = None,
                clock: Clock = time.monotonic) -> urllib.request.OpenerDirector:
    """Return an opener that keeps connections open, follows no redirect, and returns any status as a Response."""
    opener = urllib.request.OpenerDirector()
    opener.addheaders = [("User-Agent", "echobot/" + __version__), ("Accept-Encoding", "identity")]
    opener.add_handler(urllib.request.ProxyHandler(proxies))
    opener.add_handler(KeepAliveHandler(limits, clock))
    return opener


def fetch(opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout: float) -> Response:
    """Return the Response to `request`; raise OSError, with a text that quotes no secret, if none comes."""
    try:
        return opener.open(request, timeout=timeout)  # type: ignore[no-any-return]
    except OSError:  # first, because a certificate error is a ValueError too
        raise
    except (http.client.HTTPException, ValueError, OverflowError) as error:  # their texts may quote a secret
        raise OSError(error.args[1] if isinstance(error, RequestError) else type(error).__name__) from error


class Graph:
    """The Graph API, for one page; `credentials` are the query that every call has."""

    def __init__(self, settings: Settings, opener: urllib.request.OpenerDirector, timeout: float) -> None:
        self.url, self.opener, self.timeout = settings.graph_url, opener, timeout
        query = {"access_token": settings.page_access_token}
        if settings.app_secret:
            query["appsecret_proof"] = sign(settings.page_access_token.encode(), settings.app_secret).partition("=")[2]
        self.credentials = urllib.parse.urlencode(query)

    def call(self, path: str, content: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
        """Return Graph's answer; raise GraphError if it did not do what was asked."""
        url = "%s%s%s%s" % (self.url, path, "&" if "?" in path else "?", self.credentials)
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            response = fetch(self.opener, request, self.timeout)
        except OSError as error:
            raise GraphError("no answer from Graph (%s): check GRAPH_URL, https_proxy and this host's network"
                             % error) from error
        return parse_response(response.status, response.headers, response.body)


# ---- The outbox: each reply once, and each person's in order -------------------------------------------------------

class Outbox:
    """Sends the replies of a delivery: in the delivery's thread, and in one more for each reply after the first.

    A reply is pending until its status is final: settled, given up, or failed.  Only settled ones are remembered.
    """

    def __init__(self, reply: ReplyFunction, graph: Optional[Graph], limits: Limits, clock: Clock, wait: Wait) -> None:
        self.reply, self.limits, self.clock, self.wait = reply, limits, clock, wait
        self.graph: Any = graph                         # None on a dry run
        self.lock = threading.Lock()                    # guards the next three
        self.pending: Dict[bytes, OwedReply] = {}       # by key
        self.last: Dict[str, threading.Event] = {}      # `done` of the newest reply to each person, by the person's id
        self.settled: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        # The outage: the first (or None) and the last of the failures since Graph last accepted or refused a reply;
        # after `outage` without a failure a new one begins.  Not locked: roughly right is enough
        self.failing_since: Optional[float] = None
        self.failed_at = 0.0
        self.calls = threading.BoundedSemaphore(limits.calls)

    def settle(self, replies: Sequence[OwedReply]) -> int:
        """Send the new replies, wait for all until the deadline; return the delivery's status: 200, 500 or 503."""
        until = self.clock() + self.limits.answer  # then it is answered: by the main thread, if this one is sending
        awaited: Dict[bytes, OwedReply] = {}  # by key; the pending one, if an earlier delivery owes the same
        with self.lock:
            for owed in replies:
                if owed.key not in self.settled:
                    awaited.setdefault(owed.key, self.pending.get(owed.key, owed))
            new = [owed for owed in awaited.values() if owed.key not in self.pending]
            # If nothing is pending, a delivery of any size is accepted: it would never fit otherwise
            if new and self.pending and len(self.pending) + len(new) > self.limits.pending:
                return 503  # which `respond` turns into 200 in a long outage
            for owed in new:  # all at once: each waits only for older ones, so no two wait for each other
                self.pending[owed.key] = owed
                owed.previous = self.last.get(owed.recipient)
                self.last[owed.recipient] = owed.done
        self.send_all(new)
        for owed in awaited.values():  # some are being sent by other threads: this delivery's, or an earlier one's
            self.wait(owed.done, until - self.clock())
        return max([owed.status for owed in awaited.values()], default=200)  # 503 outweighs 500, which outweighs 200

    def send_all(self, replies: Sequence[OwedReply]) -> None:
        """Send the replies, in this thread and in one more for each further reply, or in as many as can be started."""
        queue = collections.deque(replies)  # shared: if a thread dies as it starts, the others send what it would have
        with contextlib.suppress(RuntimeError, MemoryError):  # no more can be started
            for _ in replies[1:self.limits.pending]:  # bounds the threads; the queue has all
                # Thread.start would wait until it runs: forever, if memory runs out
                _thread.start_new_thread(self.send_queued, (queue,))
        self.send_queued(queue)

    def send_queued(self, queue: Deque[OwedReply]) -> None:
        """Take and send replies until none is left, oldest first: so what one waits for has been taken before it."""
        with contextlib.suppress(IndexError):  # `send` raises nothing
            while True:
                self.send(queue.popleft())

    def send(self, owed: OwedReply) -> None:
        """When it is this reply's turn, ask `reply` what to say, send it, and record what has become of it."""
        try:
            if owed.previous:
                owed.previous.wait()
            text = self.reply(owed.message) or ""
            if not isinstance(text, str):
                raise TypeError("reply returned %s: it must return a string or None" % type(text).__name__)
            owed.status = self.send_text(owed, text) if text else 200
        except BaseException:  # SystemExit too: it must not end the thread before the delivery is answered
            owed.status = 500
            log.exception("reply failed for %s", owed.label)
        finally:
            with self.lock:
                del self.pending[owed.key]
                if self.last.get(owed.recipient) is owed.done:
                    del self.last[owed.recipient]
                if owed.status == 200:
                    self.settled[owed.key] = None
                    if len(self.settled) > self.limits.settled:
                        self.settled.popitem(last=False)
            owed.done.set()

    def send_text(self, owed: OwedReply, text: str) -> int:
        """Send a text in as many messages as it needs; return 200 if it is settled, 503 if it was given up."""
        if self.graph is None:
            log.info("dry run, would reply to %s: %s", owed.label, text)
            return 200
        try:
            for piece in pieces(text):
                if piece.strip() or not text.strip():  # a blank one is refused, which would end the reply
                    self.send_piece(owed, piece)
        except GraphError as failure:
            status, outcome = (503, "gave up") if failure.temporary else (200, "Graph refused")
            log.error("%s the reply to %s: %s", outcome, owed.label, failure)
            return status
        log.info("replied to %s: %d characters, %d ms", owed.label, len(text), (self.clock() - owed.began) * 1000)
        return 200

    def send_piece(self, owed: OwedReply, piece: str) -> None:
        """Send one message, with retries; raise GraphError if Graph refuses it, or when its time is up."""
        content = {"recipient": {"id": owed.recipient}, "messaging_type": "RESPONSE", "message": {"text": piece}}
        pause = self.limits.first_pause
        while True:
            try:
                with self.calls:
                    owed.began = owed.began or self.clock()
                    self.graph.call("/me/messages", content)
                self.failing_since = None
                return
            except GraphError as failure:
                if not failure.temporary:
                    self.failing_since = None
                    raise
                now = self.clock()
                if self.failing_since is None or now - self.failed_at > self.limits.outage:
                    self.failing_since = now
                self.failed_at = now
                remaining = owed.began + self.limits.retry - now
                if remaining <= 0 or failure.retry_after > remaining:
                    raise
                # The last pause is cut short, so that the last try comes when the time is over
                seconds = max(min(pause * random.uniform(0.5, 1), remaining), failure.retry_after)
                log.warning("Graph failed; retrying the reply to %s, in %.1f s: %s", owed.label, seconds, failure)
                self.wait(owed.done, seconds)  # just a pause, since only this thread sets `done`
                pause = min(2 * pause, self.limits.longest_pause)

    def unsettled_status(self) -> int:
        """Log and return an unsettled delivery's status: 503, but 200 in a long outage, or Messenger unsubscribes."""
        since, last, outage = self.failing_since, self.failed_at, self.limits.outage
        if since is not None and last - since >= outage and self.clock() - last <= outage:  # silence is no failure
            log.error("answering 200 although replies are unsettled: Graph has failed for %d s", last - since)
            return 200
        log.info("answering 503, so that Messenger redelivers; replies pending: %d", len(self.pending))
        return 503


# ---- The server ----------------------------------------------------------------------------------------------------

class Bot(http.server.ThreadingHTTPServer):
    """The webhook's server: each connection has a thread, and one deadline.

    socketserver calls `get_request` and `process_request` in the accept loop, and then, in the thread, WebhookHandler's
    `handle`, and `close_request`.

    Before each step, an answer included, the thread sets the next deadline (`set_deadline`).  When one has passed, the
    accept loop removes the connection from `deadlines`, and ends it (`end`), with an answer if one is owed; the thread
    gets an OSError when it sets the next, and sends nothing more.  So whichever comes first answers, and only that one.
    Socket timeouts would not do: they start anew with each byte, and the thread of a late delivery is not reading.

    A connection is in one of these states, each of which lasts at most as long as the field of `Limits` with its name:

        request   a request is being read; at the deadline it is answered 408
        answer    it is whole, its replies are being sent; at the deadline it is answered 503; the thread goes on
        linger    an answer is being written; after the last one, until the client closes
        idle      nothing has come since the last answer; at the deadline it is closed
    """

    request_queue_size = 1024  # connections that wait to be accepted; the default of 5 loses bursts
    # Two servers must not share a port; the first would let them on Windows, the second in Python 3.14
    allow_reuse_address = os.name == "posix"
    allow_reuse_port = False

    def __init__(self, settings: Settings, limits: Limits, outbox: Outbox, clock: Clock) -> None:
        self.address_family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        super().__init__(address, WebhookHandler)  # type: ignore[arg-type]
        self.settings, self.limits, self.outbox, self.clock = settings, limits, outbox, clock
        self.large = threading.BoundedSemaphore(limits.large)
        self.lock = threading.Lock()  # held to change a deadline or to end a connection: so only one of the two happens
        self.deadlines: Dict[socket.socket, Tuple[float, str]] = {}  # each open connection's (deadline, state)
        self.stopping = False         # from then on idle connections are ended

    def server_bind(self) -> None:
        """Bind, `::` for IPv4 as well; without the DNS lookup of the host's name that HTTPServer makes."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self.server_address[0] != "::")
        socketserver.TCPServer.server_bind(self)
        self.server_port = self.server_address[1]
        self.socket.settimeout(TICK)  # for handle_request and accept, so that deadlines are checked in time

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept a connection; raise OSError, so that the loop goes on, if there is no place or no file for it."""
        try:
            if len(self.deadlines) >= self.limits.connections:
                with self.lock:
                    idle = [each for each, (_, state) in self.deadlines.items() if state == "idle"]
                    if not idle:
                        raise OSError("too many connections")
                    self.end(min(idle, key=self.deadlines.__getitem__))  # its thread wakes and closes it
            return super().get_request()
        except OSError as error:
            log.debug("cannot accept a connection: %s", error)
            time.sleep(TICK)  # or the loop would spin
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Set a connection's first deadline, and start its thread."""
        with self.lock:
            self.deadlines[request] = self.clock() + self.limits.request, "request"
        # Thread.start would wait until it runs: forever, if memory runs out
        _thread.start_new_thread(self.process_request_thread, (request, client_address))

    def set_deadline(self, connection: socket.socket, state: str) -> None:
        """Replace a connection's deadline with its next state's; raise OSError if the accept loop has ended it."""
        with self.lock:
            if connection not in self.deadlines:
                raise ConnectionAbortedError
            self.deadlines[connection] = self.clock() + getattr(self.limits, state), state  # a field of Limits

    def service_actions(self) -> None:
        """End the connections whose deadline has passed; the accept loop calls this on each turn."""
        now = self.clock()
        with self.lock:
            for connection, (deadline, state) in list(self.deadlines.items()):
                if deadline <= now or (self.stopping and state == "idle"):
                    self.end(connection)

    def end(self, connection: socket.socket) -> None:
        """With `lock` held, end a connection, after the answer that it is owed, if that can be sent without waiting."""
        _, state = self.deadlines.pop(connection)
        with contextlib.suppress(OSError):  # for example, the client is not reading
            if state == "request":
                log.info("refused a request with 408: it did not arrive whole within %g s", self.limits.request)
            if state in ("request", "answer"):
                status = 408 if state == "request" else self.outbox.unsettled_status()
                connection.setblocking(False)
                connection.send(encode_answer(status))
        with contextlib.suppress(OSError):  # the client is gone
            connection.shutdown(socket.SHUT_RDWR)  # a thread that reads or writes wakes, and closes the connection
        if state == "answer":  # its thread, which is not using the socket, may be sending replies for a minute
            socket.close(connection.detach())  # frees the file; after `connection.close`, rfile would still have it

    def close_request(self, request: Any) -> None:
        """Close a connection, and free its place."""
        with self.lock:
            self.deadlines.pop(request, None)
        request.close()  # only now: `end` must not find a closed one in `deadlines`

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log why a thread failed or could not be started; not an OSError, which is how a connection usually ends."""
        if not isinstance(sys.exc_info()[1], OSError):  # the client is gone, or `end` has ended the connection
            log.error("closed a connection without an answer: %r", sys.exc_info()[1])

    def drain(self) -> int:
        """After the accept loop, finish what is under way, within the limit; return how many replies are left."""
        until = self.clock() + self.limits.drain
        self.server_close()  # the listening socket
        self.stopping = True
        while (self.deadlines or self.outbox.pending) and self.clock() < until:
            self.service_actions()
            time.sleep(TICK)
        return len(self.outbox.pending)


REQUEST_LINE = re.compile(r"(%s) ([!-~\x80-\xff]+) HTTP/1\.([0-9])\r?\n" % NAME)
AUTHORITY = re.compile("^https?://[^/?]*/?", re.I)  # of a target in absolute form
HOST_FIELD = re.compile(r"((?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*|\[[0-9A-Fa-fv:.]+\])(:[0-9]*)?")
METHODS = {"/": "GET, HEAD, POST", "/webhook": "GET, HEAD, POST", "/healthz": "GET, HEAD"}  # "/" is the webhook too


class WebhookHandler(http.server.BaseHTTPRequestHandler):
    """Reads a connection's requests and answers them, in its thread; any OSError ends that (see `Bot.handle_error`)."""

    disable_nagle_algorithm = True  # else an answer may wait 40 ms for the one before it to be acknowledged
    server: Bot
    rfile: Any

    def handle(self) -> None:
        """Answer a connection's requests until it is to be closed; `process_request` has set the first deadline."""
        self.handle_one_request()
        while not self.close_connection:
            self.server.set_deadline(self.connection, "idle")
            self.rfile.peek(1)  # waits for the next request's first byte
            self.server.set_deadline(self.connection, "request")
            self.handle_one_request()
        self.connection.shutdown(socket.SHUT_WR)
        # Until the client closes: closing with unread input would reset the connection, and lose the answer
        while self.rfile.read1(64 * 1024):
            pass

    def handle_one_request(self) -> None:
        """Answer a request, whatever happens; http.server's would read 64 KiB of its first line before refusing it."""
        self.close_connection = True  # until the request is read whole, it is unknown where it ends
        self.command = ""  # until it is known
        with contextlib.ExitStack() as self.large_slot:  # `wait_for_slot` takes it; `do_POST` or this returns it
            try:
                if self.parse_request():
                    self.server.set_deadline(self.connection, "answer")
                    getattr(self, "do_" + self.command)()
            except RequestError as error:
                self.send_error(*error.args)  # raises if it was `Bot.end` that has cut the request off
            except OSError:  # the client is gone, or the accept loop has answered
                raise
            except Exception:
                log.exception("a bug while answering a request")
                self.send_error(500)
        self.body = b""  # or an idle connection would keep up to 1 MiB

    def parse_request(self) -> bool:
        """Read a request, its body included; return whether there is one; raise RequestError if it is refused."""
        line = self.rfile.readline(LINE_BYTES + 1)
        if line in (b"\r\n", b"\n"):  # which some clients send after a body
            line = self.rfile.readline(LINE_BYTES + 1)
        if not line:
            return False
        require(len(line) <= LINE_BYTES, 414, "The request line is too long.")
        match = require(REQUEST_LINE.fullmatch(line.decode("latin-1")), 400, "The request line is malformed.")
        self.command, target, minor = match.group(1), match.group(2), int(match.group(3))
        self.path, _, self.query = AUTHORITY.sub("/", target).partition("?")
        self.fields = read_fields(self.rfile)
        require("host" in self.fields or minor == 0, 400, "Host is missing.")
        require(HOST_FIELD.fullmatch(self.fields.get("host", "")), 400, "Host is malformed, or given twice.")
        length = body_length(self.fields, minor)
        require(length is not None or self.command != "POST",
                411, "A POST needs a Content-Length, or Transfer-Encoding: chunked.")
        if minor and length and self.fields.get("expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.body = read_body(self.rfile, length or 0, self.wait_for_slot)
        self.close_connection = not minor or "close" in self.fields.get("connection", "").lower()
        require(self.path in METHODS, 404, "There is nothing here: the callback path is /webhook.")
        require(self.command in METHODS[self.path].split(", "), 405, "This method does nothing here.")
        return True

    def wait_for_slot(self) -> None:
        """Wait for one of `Limits.large` slots, at most until the request's deadline."""
        deadline, _ = self.server.deadlines.get(self.connection, (0.0, ""))  # in the past, if it has been ended
        seconds = max(0.0, deadline - self.server.clock())
        require(self.server.large.acquire(timeout=seconds), 408, "Too many large bodies.")
        self.large_slot.callback(self.server.large.release)

    def do_GET(self) -> None:
        """Answer a health check, or the webhook verification with its challenge."""
        if self.path == "/healthz":
            self.respond(200)
        else:
            query = self.query.encode("latin-1").decode("utf-8", "replace")
            fields = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
            self.respond(200, verify_challenge(fields, self.server.settings.verify_token))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Check and parse a delivery, and answer it when its replies are settled, or at the deadline."""
        if self.server.settings.app_secret:
            verify_signature(self.fields.get("x-hub-signature-256"), self.body, self.server.settings.app_secret)
        replies, errors = replies_owed(parse_object(self.body))
        self.body = b""  # sending may take a minute
        self.large_slot.close()
        if errors:
            log.warning("skipped %d malformed event(s) of a delivery; the first: %s", len(errors), errors[0])
        self.respond(self.server.outbox.settle(replies))

    def respond(self, status: int, text: Optional[str] = None, reason: Optional[str] = None) -> None:
        """Answer the request, in one write; log a refusal, and its reason."""
        self.server.set_deadline(self.connection, "linger")  # raises if the accept loop has answered; now it will not
        if status == 503:
            status = self.server.outbox.unsettled_status()
        if status not in (200, 500, 503):  # without the path: a secret may be in it
            log.log(logging.WARNING if status == 403 else logging.INFO, "refused a %.20s from %s with %d: %s",
                    self.command or "request", self.client_address[0], status, reason or text or TEXTS[status])
        # A 503 frees the connection's place, whether this thread sends it or the accept loop
        self.close_connection = self.close_connection or self.server.stopping or status == 503
        fields = CLOSE if self.close_connection else ""
        if status == 405:
            fields += "Allow: %s\r\n" % METHODS[self.path]
        self.wfile.write(encode_answer(status, text, fields, head_only=self.command == "HEAD"))

    send_error = respond  # type: ignore[assignment]  # http.server's name, for a refusal; its own would send HTML


def make_server(settings: Settings, limits: Limits = Limits(), reply: ReplyFunction = reply,
                opener: Optional[urllib.request.OpenerDirector] = None,
                clock: Clock = time.monotonic, wait: Wait = threading.Event.wait) -> Bot:
    """Return the bot, bound and not started; raise OSError if it cannot be bound."""
    graph = None  # on a dry run
    if settings.page_access_token:
        graph = Graph(settings, opener or make_opener(limits, clock=clock), limits.graph)
    return Bot(settings, limits, Outbox(reply, graph, limits, clock, wait), clock)


# ---- Serving -------------------------------------------------------------------------------------------------------

class LogFormatter(logging.Formatter):
    """A line for each record, and below it the traceback of a bug; control characters are escaped."""

    quote = False  # whether to print what an exception says, which may quote a message or a secret

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines for a record."""
        lines = ["%s %s" % (record.levelname, record.getMessage())]
        if record.exc_info and record.exc_info[0]:
            kind, error, frames = record.exc_info
            lines += "".join(traceback.format_tb(frames)).splitlines()
            lines += ["%s: %s" % (kind.__name__, error) if self.quote else kind.__name__]
        return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    """Return `text` with its control characters escaped."""
    return "".join([c if c.isprintable() else c.encode("unicode_escape").decode() for c in text])


def fit_file_limit(limits: Limits) -> Limits:
    """Return `limits`, scaled down if the host does not allow as many open files."""
    with contextlib.suppress(ImportError):  # on Windows, which has no such limit
        import resource
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        names = "connections", "calls", "graph_idle"
        share = (files - SPARE_FILES) / sum(getattr(limits, name) for name in names)
        if files != resource.RLIM_INFINITY and share < 1:
            return limits._replace(**{name: max(1, int(share * getattr(limits, name))) for name in names})
    return limits


def serve(environ: Mapping[str, str]) -> int:
    """Serve until a signal, and end the process; return the exit status if it cannot start."""
    try:
        settings = settings_from(environ)
        bot = make_server(settings, fit_file_limit(Limits()))
    except SettingsError as error:
        print(*("echobot: " + line for line in error.args), sep="\n", file=sys.stderr)
        return 2
    except (OSError, UnicodeError) as error:
        print("echobot: cannot listen on %s port %d (%s): set HOST to an address of this host, or PORT to a free port "
              "above 1023" % (printable(settings.host), settings.port, error), file=sys.stderr)
        return 1
    log.setLevel(settings.log_level)
    threading.stack_size(STACK_BYTES)
    sys.setswitchinterval(0.02)  # s: after the usual 0.005, hundreds of threads would interrupt each other's requests
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it
        # Because of the GIL threads take turns, and handing over to another processor costs a third of the rate
        os.sched_setaffinity(0, {random.choice(list(os.sched_getaffinity(0)))})
    return run_until_signal(bot)


def run_until_signal(bot: Bot) -> NoReturn:
    """Serve until SIGTERM or Ctrl-C, finish what is under way, and end the process."""
    signals: List[float] = []

    def on_signal(number: int, frame: Any) -> None:
        signals.append(time.monotonic())
        if signals[-1] - signals[0] > bot.limits.same_signal:
            os._exit(128 + number)  # as a shell reports it

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, on_signal)
    host = "[%s]" % bot.settings.host if ":" in bot.settings.host else bot.settings.host
    log.info("echobot %s listens on http://%s:%d, callback path /webhook", __version__, host, bot.server_port)
    if bot.settings.page_access_token:
        log.info("live: replies go to %s", bot.settings.graph_url)
    else:
        log.warning("dry run: replies are logged, not sent, until PAGE_ACCESS_TOKEN is set")
    if not bot.settings.app_secret:
        log.warning("anybody can post deliveries until APP_SECRET is set")
    while not signals:  # not serve_forever: `shutdown`, called by a signal handler, would deadlock
        bot.handle_request()
        bot.service_actions()
    log.info("stopping within %g s; another signal, more than %g s from now, ends the bot at once",
             bot.limits.drain, bot.limits.same_signal)
    left = bot.drain()
    log.log(logging.ERROR if left else logging.INFO, "stopped; replies still pending: %d", left)
    with contextlib.suppress(OSError):
        print(end="", flush=True)  # what `reply` has printed
    os._exit(1 if left else 0)  # Python itself would wait for threads that `reply` may have started


# ---- chat: talk to the bot on this machine -------------------------------------------------------------------------
# The bot is complete above this line: `chat` and `check` use it.

CHAT_LIMITS = Limits(answer=0.3)  # s, so that redeliveries can be watched
SLOW = 0.7                        # s that a slow Graph takes, so that there are two redeliveries
PERSON, PAGE = "1001", "2002"     # the ids of the person who types, and of the page
COMMANDS: Dict[str, Tuple[str, Any]] = {  # what each is, and its events (a list) or Graph's next error (a dict)
    "/sticker": ("a sticker", [("message", {"attachments": [{"type": "sticker", "payload": {"sticker_id": 369239}}]})]),
    "/image": ("an image", [("message", {"attachments": [{"type": "image", "payload": {"url": "https://a.b/c"}}]})]),
    "/postback": ("the press of a button", [("postback", {"title": "Get started", "payload": "GET_STARTED"})]),
    "/batch": ("three messages in one delivery", [("message", {"text": text}) for text in ("one", "two", "three")]),
    "/read": ("a read receipt", [("read", {"watermark": 1458692752478})]),
    "/echo": ("the bot's own message, echoed", [("message", {"is_echo": True, "app_id": 1517776481, "text": "hello"})]),
    "/edit": ("an edit", [("message_edit", {"mid": "m_1", "text": "hello, edited", "num_edit": 1})]),
    "/again": ("the last delivery again", None),
    "/unsigned": ("the last delivery again, without its signature", None),
    "/slow": ("Graph takes %g s for its next answer; the bot waits %g s here, not 4" % (SLOW, CHAT_LIMITS.answer), {}),
    "/500": ("Graph fails next time, with HTTP status 500", {"code": 2}),
    "/613": ("Graph says next time that calls come too fast", {"code": 613}),
    "/190": ("Graph says next time that the token has expired", {"code": 190, "error_subcode": 463}),
    "/wire": ("show, or stop showing, what goes over the wire", None),
    "/help": ("this list", None),
}


class FakeGraph(http.server.BaseHTTPRequestHandler):
    """Plays Graph: it refuses what the real one refuses, and prints the rest."""

    protocol_version = "HTTP/1.1"
    server: Chat

    def do_POST(self) -> None:
        """Answer a call, with the fault that was asked for, or as it deserves."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.show("bot > Graph", "POST %s HTTP/1.1" % re.sub("=[^&]*", "=***", self.path), body)
        content = json.loads(body)
        text = content["message"]["text"]
        fault, self.server.fault = self.server.fault, ""
        if fault == "/slow":
            time.sleep(SLOW)
        error: Dict[str, Any] = COMMANDS[fault][1] if fault else {}
        if not self.path.endswith("/me/messages?" + self.server.credentials):  # the proof is wrong, or the token too
            error = {"code": 100 if self.server.credentials.split("&")[0] in self.path else 190}
        elif (content.get("messaging_type") != "RESPONSE" or content.get("recipient") != {"id": PERSON}
              or not isinstance(text, str) or not text.strip() or len(pieces(text)) > 1):
            error = {"code": 100}
        status = 500 if fault == "/500" else 400 if error else 200
        answer = json.dumps({"error": {**error, "message": "fake", "type": "OAuthException", "fbtrace_id": "fake"}}
                            if error else {"recipient_id": PERSON, "message_id": "m_out"})
        self.server.show("Graph > bot", "HTTP/1.1 %d" % status, answer)
        if not error:
            self.server.print_reply(text)
        self.wfile.write(encode_answer(status, answer, ""))


class Chat(socketserver.ThreadingTCPServer):
    """Plays Messenger, and is Graph's server, with the real bot between them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeGraph)
        settings = Settings(page_access_token=os.urandom(16).hex(), app_secret=os.urandom(16).hex(), host="127.0.0.1",
                            port=0, graph_url="http://127.0.0.1:%d/v26.0" % self.server_address[1])
        self.opener = make_opener(proxies={})
        bot = make_server(settings, CHAT_LIMITS, opener=self.opener)
        self.secret, self.credentials = settings.app_secret, bot.outbox.graph.credentials
        self.url = "http://127.0.0.1:%d/webhook" % bot.server_port
        self.note = functools.partial(print, file=sys.stderr, flush=True)
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.body, self.fault, self.sent, self.replies, self.showing = b"{}", "", 0, 0, False
        for server in self, bot:
            threading.Thread(target=server.serve_forever, args=(TICK,), daemon=True).start()

    def run(self) -> int:
        """Talk until the input ends; return the exit status."""
        if self.terminal:
            self.note("Say something.  /help lists what else Messenger and Graph can do; Ctrl-D ends.")
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while True:
                self.say(input("you> " if self.terminal else ""))
        print(end="\n" if self.terminal else "")
        return 0

    def say(self, line: str) -> None:
        """Do what a line of input says."""
        command = line.strip()
        meaning, content = COMMANDS.get(command, ("", [("message", {"text": line})]))
        if command == "/help":
            self.note("\n".join(["  %-10s %s" % (name, what) for name, (what, _) in COMMANDS.items()]))
        elif command == "/wire":
            self.showing = not self.showing
            self.note("(what goes over the wire is %s from now on)" % ("shown" if self.showing else "hidden"))
        elif command in ("/again", "/unsigned"):
            self.deliver(signed=command == "/again")
        elif isinstance(content, dict):
            self.fault = command
            self.note("(%s; now say something)" % meaning)
        elif command.startswith("/") and not meaning:
            self.note("(unknown command %s; /help lists them)" % command)
        elif command:
            entry: Dict[str, Any] = {"id": PAGE, "time": int(time.time() * 1000), "messaging": []}
            for kind, value in content:
                self.sent += 1
                sender, recipient = (PAGE, PERSON) if "is_echo" in value else (PERSON, PAGE)
                entry["messaging"].append({"sender": {"id": sender}, "recipient": {"id": recipient},
                                           "timestamp": entry["time"],
                                           kind: value if kind == "read" else {"mid": "m_%d" % self.sent, **value}})
            self.body = json.dumps({"object": "page", "entry": [entry]}).encode()
            self.deliver(signed=True)

    def deliver(self, signed: bool) -> None:
        """Deliver `body`, again and again while the answer is 503."""
        fields = {"X-Hub-Signature-256": sign(self.body, self.secret)} if signed else {}
        replies = self.replies
        for _ in range(200):  # for a minute; Messenger goes on for an hour
            self.show("Messenger > bot", "POST /webhook HTTP/1.1", *["%s: %s" % field for field in fields.items()],
                      self.body.decode())
            response = fetch(self.opener, urllib.request.Request(self.url, self.body, fields), 60)
            status, text = response.status, response.body.decode()
            self.show("bot > Messenger", "HTTP/1.1 %d" % status, text)
            if status != 503:
                break
            self.note("(the bot answered 503 because the reply is not sent yet; Messenger redelivers)")
        if status != 200:
            self.note("(the bot answered %d: %s)" % (status, text))
        elif self.replies == replies:
            self.note("(the bot answered 200, and there is no reply)")

    def print_reply(self, text: str) -> None:
        """Print what the bot says."""
        self.replies += 1
        try:
            print(("bot> " if self.terminal else "") + text, flush=True)
        except BrokenPipeError:
            os._exit(1)  # nobody is reading any more

    def show(self, direction: str, *lines: str) -> None:
        """Print a message that goes over the wire, if that is wanted."""
        if self.showing:
            self.note("\n    ".join(("  " + direction, *lines)))


# ---- check: why does it not answer? --------------------------------------------------------------------------------

EMPTY = b'{"object":"page","entry":[]}'  # a delivery that owes nothing
Finding = Tuple[Any, str, str, str]  # whether it holds, its name, what to print if it does, and if not


def check(environ: Mapping[str, str], url: Optional[str] = None,
          opener: Optional[urllib.request.OpenerDirector] = None, timeout: float = 4.0) -> int:
    """Print a line for each possible cause of silence, in order; return the exit status, 0 if all is well."""
    status = 0
    for holds, what, good, fix in findings(environ, url, opener or make_opener(Limits(graph_idle=0)), timeout):
        print("%-4s  %-12s  %s" % ("ok" if holds else "FAIL", what, printable(good if holds else fix)), flush=True)
        if not holds:
            status = 1
    return status


def findings(environ: Mapping[str, str], url: Optional[str], opener: urllib.request.OpenerDirector,
             timeout: float) -> Iterator[Finding]:
    """Yield what is found out about the settings, the token and the deployed bot."""
    try:
        settings = settings_from(environ)
    except SettingsError as error:
        yield from [(False, "settings", "", line) for line in error.args]
        return
    yield (settings.page_access_token, "settings", "PAGE_ACCESS_TOKEN is set",
           "PAGE_ACCESS_TOKEN is not set: set it to the page's token, here as for the live bot, or nothing is sent")
    yield (settings.app_secret, "settings", "APP_SECRET is set",
           "APP_SECRET is not set: set it to the app's secret, here as for the live bot, or anybody can post to it")
    if settings.page_access_token:
        yield from graph_findings(Graph(settings, opener, timeout))
    if url is not None and not URL.fullmatch(url):
        yield False, "URL", "", "not a plain http or https URL: give one like https://example.com/webhook"
    elif url:
        try:
            yield from webhook_findings(settings, url, opener, timeout)
        except OSError as error:
            yield (False, "webhook", "", "no answer (%s): check the address, its certificate, that the bot runs, and "
                   "this host's network and proxy" % error)


def graph_findings(graph: Graph) -> Iterator[Finding]:
    """Yield what Graph says about the token, the secret and the subscription."""
    what = "token"
    try:
        page = graph.call("/me?fields=id,name")
        yield True, what, 'valid, for the page "%s", id %s' % (page.get("name"), page.get("id")), ""
        what = "subscription"
        apps = list_in(graph.call("/me/subscribed_apps"), "data")
        fields = sorted({str(field) for app in apps for field in list_in(app, "subscribed_fields")})
        yield ("messages" in fields, what, "the page sends " + ", ".join(fields), "the page sends no messages: "
               "subscribe the app to messages and messaging_postbacks, in Meta's dashboard")
    except GraphError as failure:
        yield False, what, "", str(failure)


def webhook_findings(settings: Settings, url: str, opener: urllib.request.OpenerDirector,
                     timeout: float) -> Iterator[Finding]:
    """Yield how the public webhook answers valid and invalid requests, made as Messenger makes them."""
    def ask(query: Optional[Dict[str, str]], **fields: str) -> Tuple[int, str]:
        target = url + "?" + urllib.parse.urlencode(query) if query else url
        response = fetch(opener, urllib.request.Request(target, None if query else EMPTY, fields), timeout)
        return response.status, response.body.decode("utf-8", "replace")

    yield (url.startswith("https:"), "URL", url, "not https, and Messenger calls nothing else: give the https URL, "
           "or put a proxy with a certificate in front")
    query = {"hub.mode": "subscribe", "hub.challenge": "1158201444", "hub.verify_token": settings.verify_token}
    status, text = ask(query)
    echobot = (status, text) in ((200, query["hub.challenge"]), WRONG_TOKEN)
    yield (status == 200 and echobot, "verification", "the webhook returns the challenge",
           "the deployed bot has a different VERIFY_TOKEN: use the same value in both" if echobot else
           "status %d, not the challenge: check the address, which ends in /webhook, and that the bot runs" % status)
    if not echobot:
        return
    yield (ask({**query, "hub.verify_token": settings.verify_token + "?"})[0] == 403, "wrong token",
           "a different verify token is refused", "any verify token is accepted: echobot is not at this address")
    if settings.app_secret:
        status, _ = ask(None, **{"X-Hub-Signature-256": sign(EMPTY, settings.app_secret)})
        yield (status == 200, "signed", "a signed delivery is accepted", "a signed delivery is refused with %d: the "
               "deployed bot has a different APP_SECRET, use the same value in both" % status)
    yield (ask(None)[0] == 403, "unsigned", "an unsigned delivery is refused", "an unsigned delivery is accepted, so "
           "anybody can make the bot speak: set APP_SECRET on the deployed bot")


# ---- The command line ----------------------------------------------------------------------------------------------

def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a command; return its exit status."""
    usage, _, _ = (__doc__ or "").partition("The life of a message")
    parser = argparse.ArgumentParser(prog="echobot.py", description=usage,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("serve", "chat", "check"), default="serve")
    parser.add_argument("url", nargs="?", help="the public callback URL, for check")
    parser.add_argument("--host", default=os.environ.get("HOST", ""), help="where to listen, instead of HOST")
    parser.add_argument("--port", default=os.environ.get("PORT", ""), help="the port to listen on, instead of PORT")
    parser.add_argument("--version", action="version", version="echobot " + __version__)
    options = parser.parse_args(arguments)
    for stream in sys.stdin, sys.stdout:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    formatter = LogFormatter()
    formatter.quote = options.command == "chat" or not os.environ.get("PAGE_ACCESS_TOKEN")
    logging.basicConfig()  # to standard error
    logging.getLogger().handlers[0].setFormatter(formatter)
    if options.command == "chat":
        return Chat().run()
    if options.command == "check":
        return check(os.environ, options.url)
    return serve({**os.environ, "HOST": options.host, "PORT": options.port})


if __name__ == "__main__":
    sys.exit(main())
