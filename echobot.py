#!/usr/bin/env python3
"""A Facebook Messenger bot that says back what it is told: one file, the standard library, nothing else.

    python echobot.py                 serve the webhook
    python echobot.py chat            talk to the bot on this machine; no account, no network
    python echobot.py check [URL]     find out why a live bot does not answer

The settings are environment variables:

    PAGE_ACCESS_TOKEN   the page's token; without one this is a dry run, which logs the replies that it would send
    APP_SECRET          the app's secret, which signs deliveries; a token needs it
    ALLOW_UNSIGNED      1 takes deliveries from anybody: for trying only
    VERIFY_TOKEN        what the webhook's set-up page must send; default my_voice_is_my_password_verify_me
    HOST, PORT          where to listen; default 0.0.0.0 and 5000
    GRAPH_URL           the Graph API and its version; default https://graph.facebook.com/v26.0
    LOG_LEVEL           DEBUG, INFO (the default), WARNING, ERROR or CRITICAL; the log goes to standard error

The life of a message:

 1. Messenger POSTs a delivery to the webhook.  A thread of its own reads it (`read_request`), within bounds.
 2. `handle_messages` checks its signature, and only then parses it.
 3. `messaging_events` finds the events in it, and `owed_to` which of them are owed a reply.
 4. The `Outbox` asks `reply`, the one function to make your own, what to say, and sends that once, in each person's
    order, until Graph has accepted or refused it.
 5. Then the delivery is answered 200.  What takes longer than 4 s is answered 503, and goes on in the background:
    Messenger brings the delivery again, and finds its replies under way or sent.

So a 200 means done.  A reply is sent at least once, and twice only where Graph took it without saying so, or where
the delivery was brought again to another process.
"""
from __future__ import annotations  # needs Python 3.7 or newer

import _thread
import argparse
import base64
import bisect
import collections
import contextlib
import email.utils
import functools
import hashlib
import hmac
import http.client
import io
import itertools
import json
import logging
import os
import random
import re
import select
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
from typing import Any, Callable, Deque, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

__version__ = "1.0"
log = logging.getLogger("echobot")


# ---- What the bot says: make this yours ----------------------------------------------------------------------------

def reply(message: Mapping[str, Any]) -> Optional[str]:
    """Return what the bot says to `message`; None or an empty text says nothing.

    `message` is a person's message as Messenger describes it, {"mid": …, "text": …, "attachments": […], …}; `text` is
    empty where there is none.  A press on a button comes as {"text": its title, "payload": …}.  It may take its time,
    in one person's order and for several people at once; should it raise, the delivery is answered 500.
    """
    return message.get("text") or "I can't echo this"


# ---- Limits --------------------------------------------------------------------------------------------------------

TEXT_UNITS = 2000            # UTF-16 code units in one message: Graph's limit for a text
JSON_DEPTH = 100             # levels; Messenger sends about ten, and the parser recurses on a small stack
LINE_BYTES = 8 * 1024        # of a request line or one header field, as in nginx
HEAD_BYTES = 32 * 1024       # of all header fields together; Messenger and its routers send about one KiB
BODY_BYTES = 1024 * 1024     # of a delivery, or of an answer of Graph's; real ones have a few KiB
PIECE_BYTES = 64 * 1024      # read at a time of a body, however much is announced
STACK_BYTES = 384 * 1024     # of a thread: a host with 64 MiB has room for a hundred, and of the usual 8 MiB for four
RECURSION = 160              # calls: the bot makes 60, and what recurses for ever must end before such a stack does
SWITCH = 0.02                # s that a thread may hold the interpreter: each lets go by itself when it reads or writes,
#                              and every 5 ms, the default, hundreds that wait would wake up for nothing
THREAD_BYTES = 544 * 1024    # of a thread in all: its stack, its buffers, its TLS connection to Graph
SPARE_BYTES = 26 * 1024**2   # left to the interpreter
BACKLOG = 1024               # connections that wait to be accepted; the default of 5 loses bursts
SPARE_FILES = 40             # left to the interpreter, the log, name look-ups
ONE_HEAP = -8, 1             # M_ARENA_MAX of glibc: else up to 8 heaps a core, which grow for hours and never shrink
TRIM = 60.0                  # s between two times that glibc is asked for what is free: it keeps what it ever had
TICK = 0.02                  # s between two looks at the deadlines
UNUSED = 60.0                # s after which an idle connection to Graph is closed: each takes some 100 KB


class Limits(NamedTuple):
    """The bounds that a test, or `chat`, may want smaller; times in seconds."""

    answer: float = 4.0         # for a delivery: Messenger wants its answer within 5
    request: float = 10.0       # for a request to arrive whole: deliveries are small
    idle: float = 120.0         # for a connection between requests: Heroku's router keeps 90, and must close first
    linger: float = 2.0         # for a client to read why it was refused
    connections: int = 500      # at once, a thread each; more wait in the backlog
    senders: int = 300          # deliveries' threads that send to Graph at once: its 300 a second, at 1 s each
    crew: int = 100             # further threads that do, for deliveries of several people and for second tries
    pending: int = 10_000       # replies not settled yet: minutes of them, and Messenger keeps what is beyond
    pending_bytes: int = 16 * 1024**2  # of the deliveries that they came in; once parsed, several times as much
    remembered: int = 10_000    # settled replies that are not sent again: half a minute at Graph's 300 a second
    retry: float = 60.0         # from the first try of a reply until it is given up
    first_pause: float = 0.5    # before the second try; each further pause is twice as long
    longest_pause: float = 8.0  # between two tries, so that there are about ten
    outage: float = 600.0       # of failure without a break, after which deliveries are let go: after 3600 the
    #                             webhook would be unsubscribed, and someone would have to mend it by hand
    graph: float = 20.0         # for an exchange with Graph, and for each step of connecting; it takes one as a rule
    drain: float = 25.0         # for replies after SIGTERM: Heroku kills after 30


# ---- Settings ------------------------------------------------------------------------------------------------------

class Settings(NamedTuple):
    """What the environment says, checked."""

    token: str = ""
    secret: str = ""
    verify_token: str = "my_voice_is_my_password_verify_me"
    host: str = "0.0.0.0"
    port: int = 5000
    graph_url: str = "https://graph.facebook.com/v26.0"
    log_level: str = "INFO"

    def __repr__(self) -> str:
        """Return nothing of the values: three of them are secrets."""
        return "Settings(…)"


class SettingsError(Exception):
    """Settings that are wrong; `args` has a line for each, which never quotes a value."""


def settings_from(environ: Mapping[str, str]) -> Settings:
    """Return the settings of `environ`; raise SettingsError with everything that is wrong with them."""
    def value(name: str, default: str) -> str:
        return unquoted(environ.get(name, "")) or default

    usual = Settings()
    settings = Settings(
        token=value("PAGE_ACCESS_TOKEN", usual.token),
        secret=value("APP_SECRET", usual.secret),
        verify_token=value("VERIFY_TOKEN", usual.verify_token),
        host=value("HOST", usual.host),
        port=port_number(value("PORT", str(usual.port))),
        graph_url=value("GRAPH_URL", usual.graph_url).rstrip("/"),
        log_level=value("LOG_LEVEL", usual.log_level).upper(),
    )
    wrong = list(wrong_settings(settings, value("ALLOW_UNSIGNED", "0")))
    if wrong:
        raise SettingsError(*wrong)
    return settings


def unquoted(text: str) -> str:
    """Return `text` without the white space and the pair of quotes around it that get pasted along."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def port_number(text: str) -> int:
    """Return the TCP port that `text` names, or -1."""
    return int(text) if re.fullmatch("[0-9]{1,5}", text) and int(text) < 65536 else -1


def wrong_settings(settings: Settings, allow_unsigned: str) -> Iterator[str]:
    """Yield a line for each thing that is wrong: what, and how to mend it."""
    for name, secret in ("PAGE_ACCESS_TOKEN", settings.token), ("APP_SECRET", settings.secret):
        if not re.fullmatch("[!-~]*", secret):
            yield name + " has a space or another character in it that it cannot have: copy it again, by itself"
    if settings.token and not settings.secret and allow_unsigned != "1":
        yield ("PAGE_ACCESS_TOKEN is set without APP_SECRET, so anybody could make the bot speak: set APP_SECRET to "
               "the app's secret (Meta's dashboard: App settings, Basic), or set ALLOW_UNSIGNED=1 to let anybody in")
    if allow_unsigned not in ("0", "1"):
        yield "ALLOW_UNSIGNED must be 1 or 0: set it to 1 to take deliveries from anybody, or remove it"
    if settings.port < 0:
        yield "PORT (or --port) must be a whole number from 0 to 65535: set it to the port to listen on, such as 5000"
    if not re.fullmatch(r"[^\s/\[\]]+", settings.host) or settings.host.count(":") == 1:
        yield "HOST (or --host) must be a name or an address and nothing else: set it to one such as 127.0.0.1 or ::1"
    if not valid_url(settings.graph_url):
        yield "GRAPH_URL must be a plain http or https URL: remove it, or set it to one like " + Settings().graph_url
    if settings.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        yield "LOG_LEVEL must be DEBUG, INFO, WARNING, ERROR or CRITICAL: set it to one of these, or remove it"


def valid_url(url: str) -> bool:
    """Return whether `url` is http or https, names a host, and has no user, query or fragment."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        return bool(host and parts.port != 0 and re.fullmatch("https?://[^?#@]+", url) and re.fullmatch("[!-~]+", url))
    except ValueError:  # a port or a name that cannot be
        return False


# ---- The rules: pure, without I/O, clock or environment ------------------------------------------------------------

WRONG_TOKEN = "Error, wrong validation token"  # the tutorial's words


class Refusal(Exception):
    """What is wrong with a message, as the answer to it: `status`, a line of `text`, and `why` for the log."""

    def __init__(self, status: int, text: str, why: str = "") -> None:
        super().__init__(text)
        self.status, self.text, self.why = status, text, why or text


def challenge(query: Mapping[str, str], verify_token: str) -> str:
    """Return the challenge to say back to a webhook verification; raise Refusal, with what differed, if it is wrong."""
    wrong = functools.partial(Refusal, 403, WRONG_TOKEN)
    if "hub.verify_token" not in query:
        raise wrong("verification refused: hub.verify_token is missing")
    if not hmac.compare_digest(as_bytes(query["hub.verify_token"]), as_bytes(verify_token)):
        raise wrong("verification refused: hub.verify_token is not this bot's VERIFY_TOKEN: make them the same")
    if query.get("hub.mode", "subscribe") != "subscribe":
        raise wrong("verification refused: hub.mode is not subscribe")
    return query.get("hub.challenge", "")


def as_bytes(text: str) -> bytes:
    """Return `text` in UTF-8, lone surrogates and all."""
    return text.encode("utf-8", "surrogatepass")


def signature(secret: str, body: bytes) -> str:
    """Return the X-Hub-Signature-256 of `body`, the raw bytes of a delivery."""
    return "sha256=" + hmac.digest(secret.encode(), body, "sha256").hex()


def verify_signature(given: Optional[str], secret: str, body: bytes) -> None:
    """Raise Refusal, with what is wrong, unless `given` is the signature of `body`."""
    same = (given or "")[:7] + (given or "")[7:].lower()  # the hex digits, and only they, may be in upper case
    if hmac.compare_digest(same.encode("latin-1"), signature(secret, body).encode()):
        return
    formed = re.fullmatch("sha256=[0-9a-fA-F]{64}", given or "")
    trouble = "is missing" if given is None else "does not match: check APP_SECRET" if formed else "is malformed"
    raise Refusal(403, "The delivery is not signed with the app's secret.",
                  "delivery refused: X-Hub-Signature-256 " + trouble)


def parse_json(raw: bytes) -> Any:
    """Return the value of `raw`; raise ValueError if it is not JSON in UTF-8, or nested deeper than JSON_DEPTH.

    Python's parser recurses in C: in a thread with a small stack a deep text would end the process.
    """
    text = raw.decode("utf-8")
    if text.count("[") + text.count("{") > JSON_DEPTH and depth(text) > JSON_DEPTH:
        raise ValueError("too deep")
    return STRICT_JSON.decode(text)


def depth(text: str) -> int:
    """Return how deep the JSON `text` nests, up to its first error."""
    outside_strings = text.replace("\\\\", "").replace('\\"', "").split('"')[::2]
    brackets = re.findall(r"[\[{}\]]", "".join(outside_strings))
    return max(itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def number(digits: str) -> float:
    """Return the number that `digits` write; as an int only up to 100 of them, for more cost time by their square."""
    return int(digits) if len(digits) <= 100 else float(digits)


STRICT_JSON = json.JSONDecoder(parse_int=number, parse_constant=int)  # int("NaN") is a ValueError: JSON has none


class Malformed(Exception):
    """An event that breaks Messenger's rules."""


Reply = Callable[[Mapping[str, Any]], Optional[str]]


class Owed:
    """A reply that a delivery owes, and how far it has come."""

    def __init__(self, key: bytes, recipient: str, mid: str, message: Dict[str, Any]) -> None:
        self.key = key                      # what tells its event from every other
        self.recipient = recipient          # whom to send it to: the event's sender
        self.mid = mid                      # Messenger's name of the event, for the log; may be empty
        self.message = message              # what `reply` gets
        self.text: Optional[str] = None     # what `reply` says, when it has been asked
        self.left: Deque[str] = collections.deque()     # pieces of it, still to be sent
        self.size, self.tries, self.since = 0, 0, 0.0   # its share of the delivery's bytes; so far; of the first
        self.ended, self.status = threading.Event(), 200  # 503 when given up, 500 when a bug ended it

    def ask(self, reply: Reply) -> None:
        """Ask `reply` what to say, once; raise TypeError if that is no text."""
        if self.text is None:
            text = reply(self.message)
            if not isinstance(text, (str, type(None))):
                raise TypeError("reply returned %s: it has to return a text, or None" % type(text).__name__)
            self.text = text or ""
            self.left.extend(pieces(self.text))


def messaging_events(payload: Any) -> Iterator[Tuple[str, Any]]:
    """Yield the page's id and the event, for each item of `messaging` in each `entry` of a delivery.

    A lone object counts as a list of one; what is neither is yielded as an event, for `owed_to` to complain of.
    """
    if payload.get("object") != "page":
        return
    for entry in as_list(payload.get("entry")):
        for event in as_list(entry.get("messaging")) if isinstance(entry, dict) else [entry]:
            yield identity(entry), event


def as_list(value: Any) -> List[Any]:
    """Return `value` as the list that it ought to be, with nothing in it where there is none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def owed_to(page: str, event: Any) -> Optional[Owed]:
    """Return the reply that is owed to `event`, or None; raise Malformed if it is not an event.

    Messages and postbacks of persons are owed one, and nothing else: not what a page says, itself included.
    """
    if not isinstance(event, dict):
        raise Malformed("it is not an object")
    kind = next((kind for kind in ("message", "postback") if event.get(kind) is not None), None)
    if kind is None:
        return None
    message = checked(kind, event[kind])
    sender = identity(event.get("sender"))
    if sender in ("", page, identity(event.get("recipient"))) or message.get("is_echo") or message.get("is_deleted"):
        return None
    mid = message["mid"] if isinstance(message.get("mid"), str) else ""
    name = mid or "%s %s %s" % (sender, event.get("timestamp"), kind)
    return Owed(hashlib.blake2b(as_bytes(name), digest_size=16).digest(), sender, mid, message)


def identity(party: Any) -> str:
    """Return the id of a sender, recipient or entry, or an empty text."""
    value = party.get("id") if isinstance(party, dict) else None
    return str(value) if type(value) in (str, int) else ""


def checked(kind: str, message: Any) -> Dict[str, Any]:
    """Return `message` as `reply` is promised to get it; raise Malformed where that cannot be."""
    if not isinstance(message, dict):
        raise Malformed("its %s is not an object" % kind)
    text = message.get("text" if kind == "message" else "title")
    if not isinstance(text, (str, type(None))):
        raise Malformed("the text of its %s is not a text" % kind)
    return dict(message, text=text or "")


def pieces(text: str) -> List[str]:
    """Return `text` cut into messages that Graph takes, none longer than TEXT_UNITS; joined, they are `text`."""
    result = []
    while len(text) > TEXT_UNITS // 2:  # no character has more than two units
        units = list(itertools.accumulate(2 if c > "\uffff" else 1 for c in text[:TEXT_UNITS]))
        half, most = bisect.bisect_right(units, TEXT_UNITS // 2), bisect.bisect_right(units, TEXT_UNITS)
        end = best_cut(text, half, most) if most < len(text) else most
        result.append(text[:end])
        text = text[end:]
    return result + [text] if text else result


def best_cut(text: str, half: int, most: int) -> int:
    """Return where the first piece ends: after white space beyond `half`, else between characters, else at `most`."""
    after_space = (at for at in range(most, half, -1) if text[at - 1].isspace())
    anywhere = range(most, 0, -1)
    return next((at for at in itertools.chain(after_space, anywhere) if not inside_character(text, at)), most)


FLAG_LETTERS = "".join(map(chr, range(0x1F1E6, 0x1F200)))


def inside_character(text: str, at: int) -> bool:
    """Return whether a cut at `at` would divide what a reader sees as one character."""
    before, after = text[at - 1], text[at]
    if before == "\u200d" or after == "\u200d" or before + after == "\r\n":
        return True
    if after in FLAG_LETTERS:  # a flag is two of them
        return (at - len(text[:at].rstrip(FLAG_LETTERS))) % 2 == 1
    return (unicodedata.category(after) in ("Mn", "Mc", "Me")
            or "\U0001f3fb" <= after <= "\U0001f3ff" or "\U000e0020" <= after <= "\U000e007f"
            or "\ud800" <= before <= "\udbff" and "\udc00" <= after <= "\udfff")


# ---- HTTP, as both halves of the bot read it -----------------------------------------------------------------------
#
# Python's own parser takes what RFC 9112 has a server refuse (two lengths, folded lines, chunks read as requests), and
# run for a request and again for Graph's answer it costs half of the processor's time.

Fields = Dict[str, str]
Proxies = Optional[Dict[str, str]]  # by scheme, as in urllib; None for the environment's
CHUNKED = -1
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(r"(?:\r?\n)?(%s) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])\r?\n" % TOKEN)
STATUS_LINE = re.compile(r"HTTP/1\.[0-9] ([1-9][0-9][0-9])( .*)?\r?\n")
FIELD = re.compile(r"^(%s):([\t -~\x80-\xff]*)\r?$" % TOKEN, re.M)
AUTHORITY = re.compile("^https?://[^/?]*", re.I)
HOST = re.compile(r"((?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*|\[[0-9A-Fa-fv:.]+\])(:[0-9]*)?")
END_OF_HEAD = re.compile(rb"\n\r?\n")
TLS_HELLO = b"\x16"  # which begins no line of HTTP
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]+)[ \t]*(;[\t -~\x80-\xff]*)?\r\n")


def read_head(file: io.BufferedReader, head: bytes = b"") -> str:
    """Return `head` and what follows it up to an empty line; raise Refusal if it is too long, or ends before that."""
    end = END_OF_HEAD.search(file.peek(1))
    if end and not head:  # all of it has come, as a rule
        return file.read(end.end()).decode("latin-1")
    if file.peek(1)[:1] == TLS_HELLO:
        raise Refusal(400, "This is TLS, and only HTTP is spoken here: put a proxy that has the certificate in front.")
    while not head.endswith((b"\n\r\n", b"\n\n")):
        line = file.readline(LINE_BYTES)
        if len(line) == LINE_BYTES or len(head) > HEAD_BYTES:
            raise Refusal(431, "The header fields are too long.") if head else Refusal(414, "The line is too long.")
        if not line.endswith(b"\n"):
            raise Refusal(400, "It broke off.")
        head += line
    return head.decode("latin-1")


def parse_fields(head: str, start: int) -> Fields:
    """Return the header fields of `head` from `start` on, by their names in lower case.

    Values of the same name are joined by a comma: so a length or a host that is given twice is malformed.
    """
    fields: Fields = {}
    found = FIELD.findall(head, start)
    if len(found) + 1 != head.count("\n", start):
        raise Refusal(400, "A header field is malformed.")
    for spelling, value in found:
        name = spelling.lower()
        fields[name] = (fields[name] + ", " if name in fields else "") + value.strip(" \t")
    return fields


def framing(fields: Fields) -> Optional[int]:
    """Return how many bytes of body follow, CHUNKED, or None where the fields do not say; raise Refusal in doubt."""
    length, coding = fields.get("content-length"), fields.get("transfer-encoding")
    if coding is not None:
        codings = [name.strip(" \t").lower() for name in coding.split(",")]
        if length is not None or "chunked" in codings[:-1]:
            raise Refusal(400, "Where the body ends is in doubt: chunked goes last, and without a Content-Length.")
        if codings != ["chunked"]:
            raise Refusal(501, "The only transfer coding known here is chunked.")
        return CHUNKED
    if length is None:
        return None
    if not (length.isdigit() and length.isascii()):
        raise Refusal(400, "Content-Length is not a number.")
    size = float(length)  # not int, which refuses thousands of digits
    if size > BODY_BYTES:
        raise Refusal(413, "The body is longer than %d bytes." % BODY_BYTES)
    return int(size)


def read_body(file: io.BufferedReader, length: int) -> bytes:
    """Return the body of a message framed by `length`, bytes or CHUNKED; raise Refusal if it is not whole."""
    if length == CHUNKED:
        return read_chunks(file)
    parts = []
    while length:
        part = file.read(min(length, PIECE_BYTES))  # an announced body takes no memory before it comes
        if not part:
            raise Refusal(400, "It broke off.")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def read_chunks(file: io.BufferedReader) -> bytes:
    """Return a chunked body, and read the trailer fields, which say nothing that is needed here.

    The lines between the chunks are bounded too, in all as the body is.
    """
    parts: List[bytes] = []
    room = lines = BODY_BYTES
    while True:
        line = file.readline(LINE_BYTES)
        match = CHUNK_LINE.fullmatch(line)
        if match is None:
            raise Refusal(400, "A chunk is malformed.")
        size = int(match.group(1), 16)
        room, lines = room - size, lines - len(line)
        if room < 0 or lines < 0:
            raise Refusal(413, "The body is longer than %d bytes, or in too many chunks." % BODY_BYTES)
        if not size:
            parse_fields(read_head(file, line), len(line))
            return b"".join(parts)
        parts.append(read_body(file, size))
        if file.read(2) != b"\r\n":
            raise Refusal(400, "A chunk is malformed.")


# ---- Deadlines -----------------------------------------------------------------------------------------------------

class Late(Exception):
    """The deadline is missed, and the watch has acted."""


class Deadlines:
    """Who has until when.  Whoever takes a deadline out may act, and nobody else: the one in time, or the watch.

    What has to happen at a time of its own, such as a second try, is a deadline that nobody meets.

    To take an item out of a dictionary is one step in Python, so this needs no lock.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.tickets = itertools.count()
        self.open: Dict[int, Tuple[float, Callable[[], None]]] = {}

    def set(self, seconds: float, late: Callable[[], None]) -> int:
        """Return a ticket; unless it is given to `meet` in so many seconds, the watch calls `late`."""
        ticket = next(self.tickets)
        self.open[ticket] = self.clock() + seconds, late
        return ticket

    def meet(self, ticket: int) -> None:
        """Take the deadline out; raise Late if the watch was quicker."""
        if self.open.pop(ticket, None) is None:
            raise Late

    def enforce(self) -> None:
        """Act on those that are missed."""
        now = self.clock()
        for ticket, (when, late) in self.open.copy().items():
            if when <= now and self.open.pop(ticket, None) is not None:
                try:
                    late()
                except Exception:
                    log.exception("a bug in the watch")

    def watch(self, closed: threading.Event) -> None:
        """Act on those that are missed until `closed` is set: the work of a thread, the watch."""
        while not closed.wait(TICK):
            with contextlib.suppress(MemoryError):  # what is missed stays so until there is some
                self.enforce()


# ---- Graph ---------------------------------------------------------------------------------------------------------

class Response(NamedTuple):
    """An HTTP server's answer."""

    status: int
    fields: Fields
    body: bytes


class Source(socket.SocketIO):
    """What comes from a socket; withheld, it lets a reader show what it has read ahead, and wait for nothing."""

    withheld = False

    def readinto(self, buffer: Any) -> Optional[int]:
        """Return how many bytes have been put into `buffer`, None where they are withheld."""
        return None if self.withheld else super().readinto(buffer)


class Link:
    """A connection to an HTTP server, and what has been read ahead from it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.since, self.source = sock, 0.0, Source(sock, "rb")  # 0.0: when it was last used
        self.file: io.BufferedReader = io.BufferedReader(self.source, LINE_BYTES)

    def exchange(self, request: bytes) -> Response:
        """Return the server's answer; raise ConnectionError if it closed instead, Refusal if it is not HTTP."""
        self.sock.sendall(request)
        if not self.file.peek(1):
            raise ConnectionError("the connection was closed without an answer")
        status = 100
        while status < 200:  # such as 100 Continue: the answer proper is still to come
            head = read_head(self.file)
            match = STATUS_LINE.match(head)
            if match is None:
                raise Refusal(400, "The answer is not HTTP.")
            status, fields = int(match.group(1)), parse_fields(head, match.end())
        length = 0 if status in (204, 304) else framing(fields)
        if length is None:
            return Response(status, dict(fields, connection="close"), self.file.read(BODY_BYTES))
        return Response(status, fields, read_body(self.file, length))

    def surplus(self) -> bytes:
        """Return what has been read beyond the answer: nobody asked for it, and the next call would take it for its."""
        self.source.withheld = True
        try:
            return self.file.peek()
        finally:
            self.source.withheld = False

    def spent(self) -> bool:
        """Return whether the server has closed the connection, or has said something unasked, while it was idle."""
        if hasattr(select, "poll"):  # on all but Windows; select.select takes no file above the 1024th
            poll = select.poll()
            poll.register(self.sock, select.POLLIN)
            return bool(poll.poll(0))
        return bool(select.select([self.sock], [], [], 0)[0])

    def abort(self) -> None:
        """End an exchange that takes too long, called by the watch: who waits for the answer reads an end of file.

        Not by SSLSocket's own `shutdown`: that takes away the TLS state which the other thread is reading with.
        """
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self.file.close()
        self.sock.close()


NO_ANSWER = OSError, http.client.HTTPException, Refusal, Late


class Client:
    """Calls one HTTP server, by the proxies of the environment, over connections that are kept open.

    urllib.request would open a connection for each call, and http.client write and parse at twice the cost; what they
    know of proxies, tunnels and certificates is used here.
    """

    def __init__(self, url: str, timeout: float, deadlines: Deadlines, proxies: Proxies = None) -> None:
        parts = urllib.parse.urlsplit(url)
        self.host, self.base, self.timeout, self.deadlines = parts.netloc, parts.path, timeout, deadlines
        self.context = ssl.create_default_context() if parts.scheme == "https" else None
        self.proxy, self.proxy_fields = proxy_for(parts.scheme, parts.netloc, proxies)
        self.common = "Host: %s\r\nUser-Agent: echobot/%s\r\nAccept-Encoding: identity\r\n" % (self.host, __version__)
        if self.proxy and not self.context:
            self.base = "http://%s%s" % (self.host, self.base)
            self.common += lines_of(self.proxy_fields)
        self.idle: Deque[Link] = collections.deque()  # the one that was used last is last
        self.prune()

    def call(self, method: str, path: str, body: bytes = b"", fields: Optional[Fields] = None) -> Response:
        """Return the server's answer; raise one of NO_ANSWER where there is none."""
        head = "%s %s%s HTTP/1.1\r\n%s%sContent-Length: %d\r\n\r\n" % (
            method, self.base, path, self.common, lines_of(fields or {}), len(body))
        request = head.encode("latin-1") + body
        link = self.reuse()
        if link:
            with contextlib.suppress(ConnectionError, ssl.SSLError):  # closed just now: once more, on one that is new
                return self.exchange(link, request)
        return self.exchange(self.connect(), request)

    def reuse(self) -> Optional[Link]:
        """Return a connection that is open and idle, if there is one."""
        with contextlib.suppress(IndexError):
            while True:
                link = self.idle.pop()
                if not link.spent():
                    return link
                link.close()
        return None

    def connect(self) -> Link:
        """Return a new connection, by way of the proxy if there is one."""
        at = self.proxy or self.host
        connection: Any = http.client.HTTPConnection(at, timeout=self.timeout)
        if self.context:
            connection = http.client.HTTPSConnection(at, timeout=self.timeout, context=self.context)
            if self.proxy:
                connection.set_tunnel(self.host, headers=self.proxy_fields)
        connection.connect()
        connection.sock.settimeout(None)  # the watch sees to it: a time-out costs a poll for each read and write
        return Link(connection.sock)

    def exchange(self, link: Link, request: bytes) -> Response:
        """Return the server's answer, and keep the connection if it can be used again; raise one of NO_ANSWER."""
        ticket = self.deadlines.set(self.timeout, link.abort)
        try:
            try:
                response = link.exchange(request)
            finally:
                self.deadlines.meet(ticket)  # raises Late, in place of what the watch's `abort` looks like here
        except BaseException:
            link.close()
            raise
        if link.surplus() or "close" in response.fields.get("connection", "").lower():
            link.close()
        else:
            link.since = self.deadlines.clock()
            self.idle.append(link)
        return response

    def prune(self) -> None:
        """Close the connections that nobody has needed for a minute, as after a burst, from now on each minute."""
        self.deadlines.set(UNUSED, self.prune)
        with contextlib.suppress(IndexError):
            while self.deadlines.clock() - self.idle[0].since >= UNUSED:
                self.idle.popleft().close()

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with contextlib.suppress(IndexError):
            while True:
                self.idle.pop().close()


def lines_of(fields: Fields) -> str:
    """Return the header's lines of `fields`."""
    return "".join(["%s: %s\r\n" % field for field in fields.items()])


def proxy_for(scheme: str, host: str, proxies: Proxies) -> Tuple[str, Fields]:
    """Return the name and port of the proxy to `host`, if there is one, and the field that it wants."""
    if proxies is None:
        proxies = {} if urllib.request.proxy_bypass(host) else urllib.request.getproxies()
    user, _, address = urllib.parse.urlsplit("//" + proxies.get(scheme, "").split("://")[-1]).netloc.rpartition("@")
    basic = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
    return address, {"Proxy-Authorization": "Basic " + basic} if user else {}


class Passing(Exception):
    """A failure that may pass, why, and how many seconds the server asks to wait."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class ForGood(Exception):
    """Graph's refusal of a call: Graph's own `error`, and in words what it means."""

    def __init__(self, error: Dict[str, Any]) -> None:
        super().__init__(explain(error))
        self.error = error


PASSING = {1, 2, 4, 17, 32, 341, 613, 1200, 80006}
MEANINGS: Dict[Any, str] = {
    1: "Graph has an unknown problem: nothing for you to do",
    2: "Graph is down, or the person has blocked the page: nothing for you to do",
    4: "the app makes too many calls: send fewer messages",
    10: "the page may not write to this person, who last wrote more than 24 hours ago, or the app lacks permission: "
        "ask for pages_messaging in app review",
    17: "the user makes too many calls: send fewer messages",
    32: "the page makes too many calls: send fewer messages",
    100: "a parameter is wrong, or the page knows no such person: check that the token is this page's, and GRAPH_URL",
    102: "the session is over: make a new PAGE_ACCESS_TOKEN",
    190: "the token is not valid any more: make a new PAGE_ACCESS_TOKEN",
    230: "a permission is missing: ask for pages_messaging in app review",
    341: "the app has reached a limit: send fewer messages",
    368: "Facebook has blocked the page or the app for its behaviour: see the page's support inbox",
    551: "the person is not available: nothing for you to do",
    613: "calls come too fast: send fewer messages",
    1200: "the message could not be sent for now: nothing for you to do",
    80006: "the page sends too many messages: send fewer messages",
    1545041: "the 24 hours in which the page may answer are over: wait until the person writes again",
}


def judge(response: Response) -> Dict[str, Any]:
    """Return what Graph says; raise Passing or ForGood if it did not do what was asked."""
    try:
        answer = parse_json(response.body)
    except ValueError:
        answer = None
    error = answer.get("error") if isinstance(answer, dict) else None
    if response.status == 200 and isinstance(answer, dict) and not error:
        return answer
    if not isinstance(error, dict) or not isinstance(error.get("code"), int):
        raise Passing("HTTP status %d and not Graph's answer: check GRAPH_URL and the proxy" % response.status,
                      retry_after(response))
    if response.status >= 500 or response.status == 429 or error.get("is_transient") or error.get("code") in PASSING:
        raise Passing(explain(error), retry_after(response))
    raise ForGood(error)


def explain(error: Mapping[str, Any]) -> str:
    """Return the code of Graph's `error`, what it means, what to do, and the trace for Meta's support; no message."""
    code = error.get("code")
    missing = "a permission is missing: check the app's permissions and the page's tasks"
    meaning = MEANINGS.get(code) or (missing if code in range(200, 300) else "see Meta's list of error codes")
    subcode = ", subcode %s" % error["error_subcode"] if "error_subcode" in error else ""
    return "code %s%s: %s (fbtrace_id %s)" % (code, subcode, meaning, error.get("fbtrace_id", "none"))


def retry_after(response: Response) -> float:
    """Return how many seconds the server asks to wait: Retry-After has a number or a date."""
    value = response.fields.get("retry-after", "")
    if re.fullmatch("[0-9]{1,6}", value):
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, IndexError, OverflowError):  # each is raised for some that are neither
        return 0.0


def credentials(settings: Settings) -> str:
    """Return the query that says whose call it is: the token, and the proof that the caller has the app's secret."""
    query = {"access_token": settings.token}
    if settings.secret:
        query["appsecret_proof"] = hmac.digest(settings.secret.encode(), settings.token.encode(), "sha256").hex()
    return urllib.parse.urlencode(query)


class Graph:
    """The Graph API, for one page."""

    def __init__(self, settings: Settings, client: Client) -> None:
        self.client, self.credentials = client, credentials(settings)

    def send_message(self, recipient: str, text: str) -> None:
        """Send `text` to a person; raise Passing or ForGood if Graph does not take it."""
        body = '{"recipient":{"id":%s},"messaging_type":"RESPONSE","message":{"text":%s}}' % tuple(
            map(json.dumps, (recipient, text)))
        self.call("POST", "/me/messages?", body.encode(), {"Content-Type": "application/json"})

    def call(self, method: str, path: str, body: bytes = b"", fields: Optional[Fields] = None) -> Dict[str, Any]:
        """Return Graph's answer; raise Passing or ForGood if it is not what was asked for."""
        try:
            return judge(self.client.call(method, path + self.credentials, body, fields))
        except NO_ANSWER as error:
            why = getattr(error, "strerror", None) or str(error) or "it took too long"  # no URL, which holds the token
            raise Passing("no answer from Graph (%s)" % why) from error


# ---- The outbox: each reply once, each person's in order -----------------------------------------------------------

class Outbox:
    """Sends each reply until it is settled, accepted by Graph or refused for good, or given up.

    One person's replies form a line, and a line is sent by one thread at a time: one of a delivery's new lines by the
    delivery's own, which saves the hand-over, the others by the crew.  A line whose first reply has failed for now
    waits in `deadlines`, without a thread.
    """

    def __init__(self, reply: Reply, send: Callable[[str, str], None], report: Callable[[Owed, float], None],
                 limits: Limits, deadlines: Deadlines) -> None:
        self.reply, self.send, self.report, self.limits, self.deadlines = reply, send, report, limits, deadlines
        self.lock = threading.Lock()
        self.pending: Dict[bytes, Owed] = {}
        self.size = 0                                       # bytes that `pending` came in
        self.settled: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self.lines: Dict[str, Deque[Owed]] = {}
        self.senders = threading.BoundedSemaphore(limits.senders)  # deliveries' threads that send
        self.waiting: Deque[str] = collections.deque()      # whose lines the crew is to send
        self.crew = 0                                       # threads of it
        self.failing: Optional[Tuple[float, float]] = None  # when Graph first and last failed, since it last did not

    def deliver(self, replies: Sequence[Owed], size: int) -> List[Owed]:
        """Send what a delivery of `size` bytes owes; return it, less what was settled before, and with the replies of
        other deliveries that it joins; raise Refusal if it is too much."""
        with self.lock:
            fresh = self.enter(replies, size)
            joined = [self.pending[owed.key] for owed in replies if owed.key in self.pending]
        own = fresh.pop() if fresh and self.senders.acquire(blocking=False) else None
        for recipient in fresh:
            self.hand_over(recipient)
        if own:
            try:
                self.send_line(own, joined)
            finally:
                self.senders.release()
        return joined

    def enter(self, replies: Sequence[Owed], size: int) -> List[str]:
        """Line up the replies that are new; return whose lines are new."""
        new: Dict[bytes, Owed] = {}
        for owed in replies:
            if not (owed.key in self.settled or owed.key in self.pending):
                new.setdefault(owed.key, owed)
        full = len(self.pending) + len(new) > self.limits.pending or self.size + size > self.limits.pending_bytes
        if new and full:
            raise Refusal(503, "Too many replies are pending: bring it again.")
        fresh = []
        for key, owed in new.items():
            owed.size = size // len(new)
            self.size += owed.size
            self.pending[key] = owed
            line = self.lines.setdefault(owed.recipient, collections.deque())
            if not line:
                fresh.append(owed.recipient)
            line.append(owed)
        return fresh

    def hand_over(self, *recipients: str) -> None:
        """Have persons' lines sent by the crew, by a new thread of it if there may be more."""
        with self.lock:
            self.waiting.extend(recipients)
            more = bool(self.waiting) and self.crew < self.limits.crew
            self.crew += more
        if more:
            try:
                _thread.start_new_thread(self.send_lines, ())
            except (RuntimeError, MemoryError):  # none can be had now
                with self.lock:
                    self.crew -= 1
                self.deadlines.set(1.0, self.hand_over)

    def send_lines(self) -> None:
        """Send one line after another until none waits: the work of a thread of the crew.

        A pool of concurrent.futures would wait for its threads to begin, holding its lock, and would never end them.
        """
        while True:
            with self.lock:
                if not self.waiting:
                    self.crew -= 1
                    return
                recipient = self.waiting.popleft()
            self.send_line(recipient)

    def send_line(self, recipient: str, until: Sequence[Owed] = ()) -> None:
        """Send a person's replies, until none is left, one has to wait, or all of `until` have ended."""
        line = self.lines[recipient]
        while self.send_reply(line[0]):
            with self.lock:
                line.popleft()
                if not line:
                    del self.lines[recipient]
                    return
            if until and all(owed.ended.is_set() for owed in until):
                self.hand_over(recipient)
                return

    def send_reply(self, owed: Owed) -> bool:
        """Send what is left of a reply, and end it; return False if it has to wait instead."""
        now = self.deadlines.clock()
        owed.since = owed.since or now
        try:
            if now < owed.since + self.limits.retry:
                owed.ask(self.reply)
                self.send_pieces(owed)
            else:
                owed.status = 503
                log.error("gave up the reply to %s, mid %s", owed.recipient, owed.mid)
        except Passing as failure:
            self.postpone(owed, failure)
            return False
        except BaseException:  # SystemExit too: it must not take the person's line with it
            owed.status = 500
            log.exception("a bug ended the reply to %s, mid %s", owed.recipient, owed.mid)
        self.end(owed)
        return True

    def send_pieces(self, owed: Owed) -> None:
        """Send what is left of a reply until Graph refuses it; raise Passing where it failed for now."""
        try:
            while owed.left:
                self.send(owed.recipient, owed.left[0])
                self.failing = None
                owed.left.popleft()
            if owed.text:
                self.report(owed, self.deadlines.clock() - owed.since)
        except ForGood as refusal:
            self.failing = None
            log.error("Graph refused the reply to %s, mid %s: %s", owed.recipient, owed.mid, refusal)

    def postpone(self, owed: Owed, failure: Passing) -> None:
        """Have the line sent again: after a pause that doubles, less a random part, or as long as the server asks."""
        now = self.deadlines.clock()
        self.failing = self.failing_since(now) or now, now
        left = owed.since + self.limits.retry - now
        pause = min(self.limits.first_pause * 2 ** owed.tries, self.limits.longest_pause) * random.uniform(0.5, 1)
        pause = max(0.0, min(max(pause, failure.retry_after), left))
        owed.tries += 1
        log.warning("the reply to %s, mid %s, failed for now and is %s in %.1f s: %s",
                    owed.recipient, owed.mid, "tried again" if pause < left else "given up", pause, failure)
        self.deadlines.set(pause, functools.partial(self.hand_over, owed.recipient))

    def failing_since(self, now: float) -> Optional[float]:
        """Return since when Graph fails without a break, or None; ten minutes without a call are a break."""
        return self.failing[0] if self.failing and now - self.failing[1] < self.limits.outage else None

    def end(self, owed: Owed) -> None:
        """Tell all that wait for the reply; remember it if it is settled, else forget it."""
        with self.lock:
            del self.pending[owed.key]
            self.size -= owed.size
            if owed.status == 200:
                self.settled[owed.key] = None
                if len(self.settled) > self.limits.remembered:
                    self.settled.popitem(last=False)
        owed.ended.set()


def outcome(replies: Sequence[Owed], until: float) -> int:
    """Return 200 when all the replies are settled, 500 when a bug has ended one, 503 when one is given up, or has not
    ended by `until`, a time of `time.monotonic`."""
    return max([owed.status if owed.ended.wait(until - time.monotonic()) else 503 for owed in replies], default=200)


# ---- The server: anybody's requests, a thread a connection ---------------------------------------------------------

class Request(NamedTuple):
    """A request, read whole."""

    method: str
    path: str
    query: str
    fields: Fields
    body: bytes
    keep: bool   # the connection, after the answer


class Answer(NamedTuple):
    """What a request is answered: a line of text."""

    status: int
    text: str
    allow: str = ""   # the methods, where the request's was wrong


NO_MEMORY = Refusal(503, "There is no memory left for this: bring it again.")
BUG = Answer(500, "Something is wrong here.")
Respond = Callable[[Request], Answer]


def read_request(file: io.BufferedReader, client: Any) -> Request:
    """Return the next request; raise Refusal if it is not one.  To `client` goes what tells it to go on, if it asks."""
    head = read_head(file)
    match = REQUEST_LINE.match(head)
    if match is None:
        raise Refusal(400, "The request line is malformed.")
    method, target, major, minor = match.groups()
    if major != "1":
        raise Refusal(505, "The only HTTP spoken here is HTTP/1.1.")
    old, fields = minor == "0", parse_fields(head, match.end())
    if not HOST.fullmatch(fields.get("host", "" if old else "/")):  # HTTP/1.0 may do without
        raise Refusal(400, "Host is missing, malformed, or given twice.")
    length = framing(fields)
    if length == CHUNKED and old:
        raise Refusal(400, "HTTP/1.0 has no chunks.")
    if length is None and method == "POST":
        raise Refusal(411, "A delivery needs a Content-Length, or chunks.")
    if length and not old and fields.get("expect", "").lower() == "100-continue":
        client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    path, _, query = (target if target[0] == "/" else AUTHORITY.sub("", target)).partition("?")
    keep = not old and "close" not in fields.get("connection", "").lower()
    return Request(method, path or "/", query, fields, read_body(file, length) if length else b"", keep)


@functools.lru_cache(maxsize=16)
def encode(answer: Answer, keep: bool, with_body: bool, now: int) -> bytes:
    """Return the bytes of an answer at the Unix time `now`; without its body they are what HEAD gets."""
    body = answer.text.encode("utf-8", "replace")
    head = ("HTTP/1.1 %d %s\r\nDate: %s\r\nContent-Type: text/plain; charset=utf-8\r\n"
            "X-Content-Type-Options: nosniff\r\nContent-Length: %d\r\n%s%s\r\n" % (
                answer.status, http.client.responses[answer.status], email.utils.formatdate(now, usegmt=True),
                len(body),
                "Allow: %s\r\n" % answer.allow if answer.allow else "", "" if keep else "Connection: close\r\n"))
    return head.encode() + (body if with_body else b"")


class Connection(socketserver.StreamRequestHandler):
    """A client's connection: reads its requests one after another, and answers each once.

    Each step has an entry in the server's deadlines.  Should it be late, the watch takes the entry, and with it the
    right to answer and to close; this thread finds the entry gone, and leaves.
    """

    disable_nagle_algorithm = True
    rbufsize = LINE_BYTES
    server: WebServer
    rfile: io.BufferedReader

    def setup(self) -> None:
        """Begin the first step: a request has to arrive, counted from the connection."""
        super().setup()
        self.limits, self.deadlines, self.ended = self.server.limits, self.server.deadlines, threading.Event()
        self.deadlines.meet(self.server.sockets[self.request])
        self.ticket = self.deadlines.set(self.limits.request, self.late_request)

    def handle(self) -> None:
        """Serve until either side has had enough."""
        try:
            if self.arrives():
                while self.serve() and self.arrives():
                    self.next_step(self.limits.request, self.late_request)
        except OSError:  # the client is gone
            pass
        except Late:  # the watch answers: to close now would cut it short
            self.ended.wait(self.limits.linger)

    def arrives(self) -> bool:
        """Wait for a request; return False where the client closes instead, or the server is closing.

        Whoever takes the connection out of `idle`, this thread or `close`, has it.
        """
        self.server.idle[self] = True
        try:
            more = not self.server.closing and bool(self.rfile.peek(1))
        finally:
            mine = self.server.idle.pop(self, False)
        return more and mine

    def serve(self) -> bool:
        """Read a request and answer it; return whether the connection can be used again."""
        try:
            request: Optional[Request] = read_request(self.rfile, self.wfile)
        except Refusal as refusal:
            return self.refuse(refusal)
        except MemoryError:
            request = None  # what has been read of it has to go before there is memory for an answer
        if request is None:
            return self.refuse(NO_MEMORY)
        self.next_step(self.limits.answer, lambda: self.end(self.server.late_answer()))
        answer = self.server.answer(request)
        keep = request.keep and not self.server.closing
        self.next_step(self.limits.idle, self.end)
        self.wfile.write(encode(answer, keep, request.method != "HEAD", int(time.time())))
        return keep

    def refuse(self, refusal: Refusal) -> bool:
        """Answer what is no request, and return False.  To close on unread input would reset the connection, and the
        client could not read why."""
        self.next_step(self.limits.linger, self.end)
        log.info("refused a request from %s with %d: %s", self.client_address[0], refusal.status, refusal.why)
        self.wfile.write(encode(Answer(refusal.status, refusal.text), False, True, int(time.time())))
        self.request.shutdown(socket.SHUT_WR)
        while self.rfile.read1(PIECE_BYTES):
            pass
        return False

    def next_step(self, seconds: float, late: Callable[[], None]) -> None:
        """Go on to a step that has a deadline of its own; raise Late if the watch was quicker."""
        self.deadlines.meet(self.ticket)
        self.ticket = self.deadlines.set(seconds, late)

    def late_request(self) -> None:
        """Refuse a request that does not arrive; called by the watch."""
        log.info("refused a request from %s with 408: it did not arrive whole", self.client_address[0])
        self.end(Answer(408, "The request did not arrive whole within %g s." % self.limits.request))

    def end(self, answer: Optional[Answer] = None) -> None:
        """End the connection from another thread, waiting for nobody; this one reads an end of file, if it reads."""
        with contextlib.suppress(OSError):
            self.request.setblocking(False)
            self.request.send(encode(answer, False, True, int(time.time())) if answer else b"")
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)
        self.server.close_request(self.request)
        self.ended.set()

    def finish(self) -> None:
        """Give up the deadline."""
        self.deadlines.open.pop(self.ticket, None)
        super().finish()


class WebServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """An HTTP server that keeps to its limits whoever calls."""

    request_queue_size = BACKLOG
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two servers share a port

    def __init__(self, host: str, port: int, routes: Dict[str, Dict[str, Respond]], limits: Limits,
                 clock: Callable[[], float]) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = found[0]
        self.routes, self.limits, self.deadlines, self.closing = routes, limits, Deadlines(clock), False
        self.places = threading.BoundedSemaphore(limits.connections)
        self.sockets: Dict[socket.socket, int] = {}  # which have a place; a ticket, until a thread serves them
        self.idle: Dict[Connection, bool] = {}       # which wait for a request
        self.closed = threading.Event()
        super().__init__(found[4], Connection)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Bind, `::` to IPv4 as well."""
        if self.address_family == socket.AF_INET6:
            ipv6 = getattr(socket, "IPPROTO_IPV6", 41)  # Python 3.7 has no name for it on Windows
            self.socket.setsockopt(ipv6, socket.IPV6_V6ONLY, self.server_address[0] != "::")
        super().server_bind()

    def serve_forever(self, poll_interval: float = 2 * TICK) -> None:
        """Serve until `shutdown`."""
        threading.Thread(target=self.deadlines.watch, args=(self.closed,), daemon=True).start()
        super().serve_forever(poll_interval)

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Return the next connection; raise OSError where none can be had now, after a pause that keeps it calm."""
        if not self.places.acquire(timeout=2 * TICK):
            raise OSError("every place is taken")
        try:
            connection, address = super().get_request()
        except (OSError, MemoryError) as error:
            self.places.release()
            self.closed.wait(TICK)
            raise OSError("no connection can be had") from error
        self.sockets[connection] = self.deadlines.set(
            self.limits.request, functools.partial(self.close_request, connection))
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, without waiting for it.

        `Thread.start` waits until the thread has begun: behind hundreds of busy ones, and for ever where it dies of too
        little memory before that.  The connection of such a thread is closed by the watch.
        """
        _thread.start_new_thread(self.process_request_thread, (request, client_address))

    def close_request(self, request: Any) -> None:
        """Close a connection and give its place to another; twice is once."""
        super().close_request(request)
        with contextlib.suppress(KeyError):
            self.deadlines.open.pop(self.sockets.pop(request), None)
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what has ended a connection: a bug, or that no thread could be started for it."""
        with contextlib.suppress(MemoryError):
            log.exception("a connection is lost")

    def answer(self, request: Request) -> Answer:
        """Return the answer to `request`, whatever happens."""
        try:
            return self.dispatch(request)
        except Refusal as refusal:
            log.log(logging.WARNING if refusal.status == 403 else logging.INFO, "%s", refusal.why)
            return Answer(refusal.status, refusal.text)
        except MemoryError:
            log.error("%s", NO_MEMORY.why)
            return Answer(NO_MEMORY.status, NO_MEMORY.text)
        except Exception:
            log.exception("a bug in %s %s", request.method, request.path)
            return BUG

    def dispatch(self, request: Request) -> Answer:
        """Return the answer that the request's path and method have."""
        methods = self.routes.get(request.path)
        if methods is None:
            log.info("refused a request with 404: nothing is at %.100s", request.path)
            return Answer(404, "There is nothing here.")
        respond = methods.get("GET" if request.method == "HEAD" else request.method)
        if respond is None:
            log.info("refused a request with 405: %.100s does nothing at %s", request.method, request.path)
            return Answer(405, "This method does nothing here.", ", ".join(methods).replace("GET", "GET, HEAD"))
        return respond(request)

    def late_answer(self) -> Answer:
        """Return the answer to a request that takes too long."""
        return Answer(503, "This takes too long: bring it again.")

    def close(self) -> None:
        """After `shutdown`: finish and answer what is under way, within the limit; then close all that is open."""
        self.closing = True
        self.server_close()
        for connection in self.idle.copy():
            if self.idle.pop(connection, False):
                connection.end()
        until = self.deadlines.clock() + self.limits.drain
        while self.busy() and self.deadlines.clock() < until:
            time.sleep(TICK / 5)
        self.closed.set()

    def busy(self) -> bool:
        """Return whether something is still under way."""
        return bool(self.sockets)


# ---- The bot -------------------------------------------------------------------------------------------------------

class Bot(WebServer):
    """The webhook: verifies, and owes Messenger a reply for each message."""

    def __init__(self, settings: Settings, limits: Limits = Limits(), clock: Callable[[], float] = time.monotonic,
                 proxies: Proxies = None, reply: Reply = reply) -> None:
        """Bind, and do not start; raise OSError where it cannot listen."""
        webhook: Dict[str, Respond] = {"GET": self.handle_verification, "POST": self.handle_messages}
        routes = {"/": webhook, "/webhook": webhook, "/healthz": {"GET": lambda request: Answer(200, "ok")}}
        super().__init__(settings.host, settings.port, routes, limits, clock)
        self.settings = settings
        self.client = Client(settings.graph_url, limits.graph, self.deadlines, proxies)
        send = Graph(settings, self.client).send_message if settings.token else lambda recipient, text: None
        self.outbox = Outbox(reply, send, self.report, limits, self.deadlines)

    def handle_verification(self, request: Request) -> Answer:
        """Answer the webhook's set-up page with its challenge."""
        query = request.query.encode("latin-1").decode("utf-8", "replace")
        return Answer(200, challenge(dict(urllib.parse.parse_qsl(query, True)), self.settings.verify_token))

    def handle_messages(self, request: Request) -> Answer:
        """Answer a delivery ok once all replies that it owes are settled; raise Refusal if it is not Messenger's."""
        if self.settings.secret:
            verify_signature(request.fields.get("x-hub-signature-256"), self.settings.secret, request.body)
        try:
            payload = parse_json(request.body)
        except ValueError:
            payload = None
        if not isinstance(payload, dict):
            text = "the body is not a JSON object in UTF-8"
            raise Refusal(400, text, "delivery refused: " + text)
        if payload.get("object") != "page":
            log.info("acknowledged a delivery that is not about a page: nothing is owed to it")
        until = time.monotonic() + self.limits.answer
        replies = self.outbox.deliver(list(self.replies_owed(payload)), len(request.body))
        status = outcome(replies, until)
        return Answer(200, "ok") if status == 200 else BUG if status == 500 else self.late_answer()

    def replies_owed(self, payload: Dict[str, Any]) -> Iterator[Owed]:
        """Yield the replies owed to a delivery; log what is malformed in it."""
        for page, event in messaging_events(payload):
            try:
                owed = owed_to(page, event)
                if owed:
                    yield owed
            except Malformed as error:
                log.warning("skipped an event: %s", error)

    def late_answer(self) -> Answer:
        """Have the delivery brought again, save in an outage so long that the webhook would be unsubscribed."""
        now = self.deadlines.clock()
        since = self.outbox.failing_since(now)
        if since is None or now - since < self.limits.outage:
            return Answer(503, "The replies are not settled yet: bring it again.")
        log.error("let a delivery go: Graph has failed for %d s", now - since)
        return Answer(200, "ok")

    def busy(self) -> bool:
        """Return whether a delivery is not answered yet or a reply is not settled."""
        return bool(self.sockets or self.outbox.pending)

    def close(self) -> None:
        """Finish what is under way, and close the connections to Graph."""
        super().close()
        self.client.close()

    def report(self, owed: Owed, seconds: float) -> None:
        """Log that a reply is accepted: whose, and not what, save on a dry run."""
        if self.settings.token:
            log.info("replied to %s: mid %s, %d characters, %d ms",
                     owed.recipient, owed.mid, len(owed.text or ""), seconds * 1000)
        else:
            log.info("dry run, would reply to %s, mid %s: %s", owed.recipient, owed.mid, owed.text)


make_server = Bot


# ---- chat: a rehearsal on the real wire ----------------------------------------------------------------------------

CHAT_LIMITS = Limits(answer=0.3)  # s: the real 4, shortened
SLOW = 0.7                        # s that a slow Graph takes, more than twice that
BRINGS = 20                       # times that a delivery is brought; Messenger goes on for an hour
PERSON, PAGE = "1001", "2002"     # the ids of who types, and of the page
COMMANDS: Dict[str, Tuple[str, Any]] = {  # what each is, and the events that it sends or the error that Graph gives
    "/sticker": ("a sticker", [{"message": {"attachments": [
        {"type": "sticker", "payload": {"url": "https://example.com/like.png", "sticker_id": 369239263222822}}]}}]),
    "/image": ("an image", [{"message": {"attachments": [
        {"type": "image", "payload": {"url": "https://example.com/cat.jpg"}}]}}]),
    "/postback": ("a press on a button", [{"postback": {"title": "Get started", "payload": "GET_STARTED"}}]),
    "/read": ("a read receipt", [{"read": {"watermark": 1458692752478}}]),
    "/echo": ("the bot's own message, echoed", [{"message": {"is_echo": True, "app_id": 1517776481, "text": "hello"}}]),
    "/edit": ("an edit", [{"message_edit": {"mid": "m_1", "text": "hello, edited", "num_edit": 1}}]),
    "/batch": ("three messages in one delivery", [{"message": {"text": text}} for text in ("one", "two", "three")]),
    "/again": ("the last delivery once more", None),
    "/unsigned": ("the last delivery once more, not signed", None),
    "/slow": ("Graph takes %g s for its next answer, and the bot waits %g s here instead of 4" % (
        SLOW, CHAT_LIMITS.answer), {}),
    "/500": ("Graph fails next time, with HTTP status 500", {"code": 2}),
    "/613": ("Graph says next time that calls come too fast", {"code": 613}),
    "/190": ("Graph says next time that the token has expired", {"code": 190, "error_subcode": 463}),
    "/wire": ("show or hide what goes over the wire, the last exchange first", None),
    "/help": ("this list", None),
}


class PlayedGraph(WebServer):
    """Graph, for `chat`: refuses what the real one refuses, and says the rest."""

    def __init__(self, credentials: str, say: Callable[[str], None], show: Callable[..., None]) -> None:
        routes: Dict[str, Dict[str, Respond]] = {"/v26.0/me/messages": {"POST": self.handle_call}}
        super().__init__("127.0.0.1", 0, routes, Limits(), time.monotonic)
        self.credentials, self.say, self.show, self.fault = credentials, say, show, ""

    def handle_call(self, request: Request) -> Answer:
        """Answer a call of the Send API, with the fault that is played or as it deserves."""
        secrets = re.sub("=[^&]*", "=***", request.query)
        self.show("bot > Graph", "POST %s?%s HTTP/1.1" % (request.path, secrets), request.body.decode())
        fault, self.fault = self.fault, ""
        if fault == "/slow":
            self.closed.wait(SLOW)
        error = fault and COMMANDS[fault][1] or self.refusal(request)
        status = 500 if fault == "/500" else 400 if error else 200
        played = {"message": "as played", "type": "OAuthException", "fbtrace_id": "played"}
        result = json.dumps({"error": dict(played, **error)} if error else {
            "recipient_id": PERSON, "message_id": "m_out"})
        self.show("Graph > bot", "HTTP/1.1 %d" % status, result)
        if not error:
            self.say(json.loads(request.body)["message"]["text"])
        return Answer(status, result)

    def refusal(self, request: Request) -> Dict[str, Any]:
        """Return Graph's error for a call that is wrong, or nothing."""
        given, right = (dict(urllib.parse.parse_qsl(query)) for query in (request.query, self.credentials))
        if given.get("access_token") != right["access_token"]:
            return {"code": 190}
        if given != right:
            return {"code": 100, "message": "Invalid appsecret_proof provided in the API argument"}
        try:
            call = parse_json(request.body)
            text = call["message"]["text"]
            whole = text.strip() and pieces(text) == [text] and call["messaging_type"] and call["recipient"]["id"]
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        return {} if whole else {"code": 100}


class Chat:
    """Plays Messenger and Graph on loopback, with the real bot between them."""

    def __init__(self) -> None:
        settings = Settings(token=os.urandom(16).hex(), secret=os.urandom(16).hex(), host="127.0.0.1", port=0)
        self.graph = PlayedGraph(credentials(settings), self.say, self.show)
        settings = settings._replace(graph_url="http://127.0.0.1:%d/v26.0" % self.graph.server_address[1])
        self.bot = make_server(settings, CHAT_LIMITS, proxies={})
        url = "http://127.0.0.1:%d" % self.bot.server_address[1]
        self.messenger = Client(url, 2 * CHAT_LIMITS.retry, self.bot.deadlines, proxies={})
        self.secret, self.terminal = settings.secret, sys.stdin.isatty() and sys.stdout.isatty()
        self.sent, self.said, self.showing, self.body = 0, 0, False, b"{}"
        self.tape: List[str] = []  # the last exchange

    def run(self) -> int:
        """Talk until the input ends; return the exit status."""
        for server in self.graph, self.bot:
            threading.Thread(target=server.serve_forever, args=(TICK / 5,), daemon=True).start()
        if self.terminal:
            self.note("Say something.  /help lists what else Messenger and Graph can do; Ctrl-D ends.")
        try:
            while True:
                self.hear(input("you> " if self.terminal else ""))
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if self.terminal else "")
            self.messenger.close()
            for server in self.bot, self.graph:
                server.shutdown()
                server.close()
        return 0

    def hear(self, line: str) -> None:
        """Do what a line of input says."""
        command = line.strip() if line.startswith("/") else ""
        if command in ("/wire", "/help"):
            getattr(self, command[1:])()
        elif command in ("/again", "/unsigned"):
            self.deliver(signed=command == "/again")
        elif command in ("/slow", "/500", "/613", "/190"):
            self.graph.fault = command
            self.note("(%s; now say something)" % COMMANDS[command][0])
        elif command in COMMANDS:
            self.bring(*COMMANDS[command][1])
        elif command:
            self.note("(there is no %s; /help lists what there is)" % command)
        elif line.strip():
            self.bring({"message": {"text": line}})

    def bring(self, *parts: Dict[str, Any]) -> None:
        """Deliver events with these parts."""
        now = int(time.time() * 1000)  # in ms, as Messenger has it
        entry = {"id": PAGE, "time": now, "messaging": [self.event(part, now) for part in parts]}
        self.body = json.dumps({"object": "page", "entry": [entry]}).encode()
        self.deliver(signed=True)

    def event(self, part: Dict[str, Any], now: int) -> Dict[str, Any]:
        """Return an event with `part`, and with a mid of its own where it has none."""
        self.sent += 1
        (kind, value), = part.items()
        value = dict({"mid": "m_%d" % self.sent} if kind in ("message", "postback") else {}, **value)
        sender, recipient = (PAGE, PERSON) if "is_echo" in value else (PERSON, PAGE)
        return {"sender": {"id": sender}, "recipient": {"id": recipient}, "timestamp": now, kind: value}

    def deliver(self, signed: bool) -> None:
        """Bring the delivery `body` as Messenger does: until it is answered with something else than a 503."""
        fields = {"X-Hub-Signature-256": signature(self.secret, self.body)} if signed else {}
        said, status = self.said, 503
        self.tape.clear()
        for _ in range(BRINGS):
            self.show("Messenger > bot", "POST /webhook HTTP/1.1", *lines_of(fields).splitlines(), self.body.decode())
            status, _, answer = self.messenger.call("POST", "/webhook", self.body, fields)
            self.show("bot > Messenger", "HTTP/1.1 %d" % status, answer.decode())
            if status != 503:
                break
            self.note("(the bot answered 503, the reply is not settled yet: Messenger brings the delivery again)")
        if status != 200:
            self.note("(the bot answered %d: %s)" % (status, answer.decode()))
        elif self.said == said:
            self.note("(the bot answered 200 ok, and no reply came of it: Messenger does not bring it again)")

    def say(self, text: str) -> None:
        """Print what the bot says."""
        self.said += 1
        try:
            print(("bot> " if self.terminal else "") + text, flush=True)
        except BrokenPipeError:  # nobody reads on
            os._exit(1)

    def note(self, text: str) -> None:
        """Print what is about the talk and not of it."""
        print(text, file=sys.stderr, flush=True)

    def show(self, direction: str, *lines: str) -> None:
        """Keep a message that went over the wire, and print it if that is wanted."""
        self.tape.append("\n    ".join(("  " + direction,) + lines))
        if self.showing:
            self.note(self.tape[-1])

    def wire(self) -> None:
        """Show what goes over the wire from now on, and what went last; or show it no more."""
        self.showing = not self.showing
        self.note("(the wire is shown from now on)" if self.showing else "(the wire is hidden again)")
        for message in self.tape if self.showing else ():
            self.note(message)

    def help(self) -> None:
        """List the commands."""
        for command, (meaning, _) in COMMANDS.items():
            self.note("  %-10s %s" % (command, meaning))


# ---- check: why does it not answer? --------------------------------------------------------------------------------

CHECK_SECONDS = 4.0  # for an answer; what does not answer ends its part of the report
EMPTY = b'{"object":"page","entry":[]}'  # a delivery that owes nothing
Finding = Tuple[bool, str, str]  # whether it holds, what, and how it is or how to mend it
ENDED_TOKENS = {"458": "ended when the app was removed from the page", "460": "ended with a change of password",
                "463": "has expired", "467": "was revoked"}
ADVICE: Sequence[Tuple[Any, str]] = (
    (ssl.SSLCertVerificationError, "the certificate is not trusted ({error.verify_message}): renew it, with its chain, "
                                   "or check this host's clock and SSL_CERT_FILE"),
    (ssl.SSLError, "what is there does not speak TLS: check {where}"),
    (socket.gaierror, "the name cannot be looked up: check it, and the network of this host"),
    ((socket.timeout, Late), "it does not answer within {seconds:g} s: check the network, the firewall, and {where}"),
    (ConnectionRefusedError, "nothing listens there: check {where}"),
    (ConnectionError, "it closes the connection without an answer: check {where}"),
    (http.client.InvalidURL, "its port is not a number: check {where}"),
    (OSError, "it cannot be reached: check the network of this host"),
    (Exception, "something else answers there: check {where}"),
)


def check(environ: Mapping[str, str], url: Optional[str], proxies: Proxies = None,
          seconds: float = CHECK_SECONDS) -> int:
    """Print a line for each cause of silence, in order; return the exit status, 0 if all is well."""
    problems = 0
    for holds, what, how in findings(environ, url, proxies, seconds):
        print("%-4s  %-12s  %s" % ("ok" if holds else "FAIL", what, printable(how)), flush=True)
        problems += not holds
    return 1 if problems else 0


def findings(environ: Mapping[str, str], url: Optional[str], proxies: Proxies,
             seconds: float) -> Iterator[Finding]:
    """Yield what is found, in each part up to the first cause that leaves nothing further to find."""
    try:
        settings = settings_from(environ)
    except SettingsError as error:
        yield from ((False, "settings", line) for line in error.args)
        return
    if not settings.token:
        yield False, "settings", "PAGE_ACCESS_TOKEN is not set, so nothing is sent: set it to the page's token"
    if not settings.secret:
        yield False, "settings", "APP_SECRET is not set, so anybody can post deliveries: set it to the app's secret"
    if settings.token and settings.secret:
        yield True, "settings", "PAGE_ACCESS_TOKEN and APP_SECRET are set"
    deadlines = Deadlines(time.monotonic)
    threading.Thread(target=deadlines.watch, args=(threading.Event(),), daemon=True).start()
    if settings.token:
        yield from graph_findings(settings, Client(settings.graph_url, seconds, deadlines, proxies))
    if url and not valid_url(url):
        yield False, "URL", "it is not one: give the callback URL, without ? and #, like https://example.com/webhook"
    elif url:
        url += "" if urllib.parse.urlsplit(url).path else "/"
        yield from webhook_findings(settings, Client(url, seconds, deadlines, proxies))


def graph_findings(settings: Settings, client: Client) -> Iterator[Finding]:
    """Yield what Graph says of the token, the secret and the subscription."""
    graph, what = Graph(settings, client), "token"
    try:
        page = graph.call("GET", "/me?fields=id,name&")
        yield True, what, "it is valid, of \"%s\", id %s" % (page.get("name"), page.get("id"))
        what = "subscription"
        apps = graph.call("GET", "/me/subscribed_apps?").get("data")
        yield subscription([app for app in as_list(apps) if isinstance(app, dict)])
    except ForGood as refusal:
        yield refused(what, refusal.error)
    except Passing as error:
        yield False, what, "Graph at %s: %s" % (client.host, advice(error, client, "GRAPH_URL"))
    finally:
        client.close()


def subscription(apps: List[Dict[str, Any]]) -> Finding:
    """Return whether the page's subscribed apps get messages."""
    fields = sorted({str(field) for app in apps for field in as_list(app.get("subscribed_fields"))})
    if "messages" in fields:
        return True, "subscription", "the page sends " + ", ".join(fields)
    trouble = "the app is subscribed to the page without messages" if apps else "no app is subscribed to the page"
    return False, "subscription", trouble + ": subscribe it to messages and messaging_postbacks, in Meta's dashboard"


def refused(what: str, error: Mapping[str, Any]) -> Finding:
    """Return what Graph's refusal of the token means, without Graph's message, which may quote it."""
    code: Any = error["code"]
    if "appsecret_proof" in str(error.get("message")):
        return False, "secret", "APP_SECRET is not of the token's app: copy both from the same app"
    if what == "subscription" and code in (100, 190, 210):
        return False, what, "the token is a person's and not a page's: make one for the page, in Meta's dashboard"
    if what == "subscription" and code in (10, *range(200, 300)):
        return False, what, "the token may not tell: make one that has pages_manage_metadata"
    if code == 190:
        state = ENDED_TOKENS.get(str(error.get("error_subcode")), "is not known to Graph, perhaps not copied whole")
        return False, what, "it %s: make a new PAGE_ACCESS_TOKEN" % state
    return False, what, explain(error)


def webhook_findings(settings: Settings, client: Client) -> Iterator[Finding]:
    """Yield what the public webhook does, asked as Messenger asks."""
    if not client.context:
        yield False, "URL", "it is not https, and Messenger calls nothing else: put a proxy with a certificate in front"
    try:
        yield from answers(settings, client.call)
    except NO_ANSWER as error:
        yield False, "webhook", advice(error, client, "the address and the port, and that the bot runs")
    finally:
        client.close()


def answers(settings: Settings, ask: Callable[..., Response]) -> Iterator[Finding]:
    """Yield what the webhook answers to what is right and to what is wrong."""
    number = str(random.randrange(10 ** 9))
    query = {"hub.mode": "subscribe", "hub.challenge": number, "hub.verify_token": settings.verify_token}
    response = ask("GET", "?" + urllib.parse.urlencode(query))
    trouble = verification_trouble(response, number)
    yield not trouble, "verification", trouble or "the webhook returns the challenge"
    if trouble and response.body != WRONG_TOKEN.encode():  # it is not the bot that answers
        return
    query["hub.verify_token"] += "?"
    holds = ask("GET", "?" + urllib.parse.urlencode(query)).status == 403
    yield holds, "other token", "another verify token is refused" if holds else (
        "any verify token is taken: this is not echobot, check the address")
    if settings.secret:
        holds = ask("POST", "", EMPTY, {"X-Hub-Signature-256": signature(settings.secret, EMPTY)}).status == 200
        yield holds, "signed", "a signed delivery is taken" if holds else (
            "a signed delivery is refused: the bot there has another APP_SECRET, make the two the same")
    holds = ask("POST", "", EMPTY).status == 403
    yield holds, "unsigned", "an unsigned delivery is refused" if holds else (
        "an unsigned delivery is taken, so anybody can make the bot speak: set APP_SECRET there")


def verification_trouble(response: Response, number: str) -> str:
    """Return what is wrong with the answer to a verification, and how to mend it, or an empty text."""
    text = response.body.decode("utf-8", "replace")
    if response.status == 200 and text == number:
        return ""
    if 300 <= response.status < 400:
        place = response.fields.get("location", "").partition("?")[0]  # what follows may hold the verify token
        return "the URL redirects to %s, and Messenger does not follow: give the URL where it ends" % place
    if response.status == 403 and text == WRONG_TOKEN:
        return "the bot there has another VERIFY_TOKEN: make the two the same"
    if response.status == 404:
        return "there is nothing at this path: the callback path is /webhook"
    if response.status in (502, 503, 504):
        return ("a proxy answers there with status %d, and the bot behind it does not: start the bot, or correct its "
                "address in the proxy" % response.status)
    return ("something else answers there, with status %d: check the address and its path, which is /webhook, and that "
            "the bot runs" % response.status)


def advice(error: BaseException, client: Client, where: str) -> str:
    """Return why a server gives no answer, and what to do: to check `where`, or the proxy."""
    cause = error.__cause__ or error
    if "Tunnel connection failed" in str(cause):
        return "the proxy %s refuses: check https_proxy and no_proxy" % client.proxy
    if isinstance(cause, Passing):  # an answer, and not Graph's
        return str(cause)
    text = next(text for kind, text in ADVICE if isinstance(cause, kind))
    text = text.format(error=cause, seconds=client.timeout, where="https_proxy and no_proxy" if client.proxy else where)
    return "by way of the proxy %s, %s" % (client.proxy, text) if client.proxy else text


# ---- The commands --------------------------------------------------------------------------------------------------

class LogFormat(logging.Formatter):
    """A line an occurrence: nothing from outside breaks it, or colours the terminal."""

    def __init__(self, quotes: bool = False) -> None:
        """Show an exception's own words only if `quotes`: on a dry run, and in chat, they are nobody's secret."""
        super().__init__()
        self.quotes = quotes

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and under it the traceback of a bug."""
        line = "%s %s" % (record.levelname, printable(record.getMessage()))
        return line + "\n" + self.formatException(record.exc_info) if record.exc_info else line

    def formatException(self, exc_info: Any) -> str:
        """Return the traceback, without the exception's own words where they might quote a person's, or a secret."""
        text = "".join(traceback.format_tb(exc_info[2])) + str(exc_info[0].__name__)
        return "\n".join(map(printable, super().formatException(exc_info).split("\n"))) if self.quotes else text


def start_log(level: str, quotes: bool) -> None:
    """Log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormat(quotes))
    logging.basicConfig(level=level, handlers=[handler])


def printable(text: str) -> str:
    """Return `text` with its control characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


SIGNALS = signal.SIGINT, signal.SIGTERM  # which end the program


def serve(environ: Mapping[str, str]) -> int:
    """Serve until a signal, and end the program; return the exit status where it cannot even start."""
    try:
        settings = settings_from(environ)
    except SettingsError as error:
        print(*("echobot: " + line for line in error.args), sep="\n", file=sys.stderr)
        return 2
    start_log(settings.log_level, quotes=not settings.token)
    try:
        bot = make_server(settings, within_host(Limits()))
    except (OSError, UnicodeError) as error:
        trouble = getattr(error, "strerror", None) or "that is no name"
        print("echobot: cannot listen on %s port %d: %s; set HOST to an address of this host, and PORT to one that is "
              "free and above 1023" % (printable(settings.host), settings.port, trouble), file=sys.stderr)
        return 1
    give_back_memory(bot.deadlines)
    signals: List[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: signals.append(number))  # no handler can safely do more
    announce(settings, bot.server_address)
    threading.Thread(target=bot.serve_forever, daemon=True).start()
    while not signals:
        time.sleep(TICK)
    left = finish(bot)
    logging.shutdown()
    os._exit(1 if left else 0)  # at once: Python would wait for threads that still wait for Graph


def finish(bot: Bot) -> int:
    """Finish what is under way; return how many replies are left."""
    bot.shutdown()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # a further one ends it; the first may come twice at once, on Heroku
    log.info("stopping: finishing what is under way, within %g s; a second signal ends it at once", bot.limits.drain)
    bot.close()
    left = len(bot.outbox.pending)
    if left:
        log.error("stopped; replies left, for Messenger to bring again: %d", left)
    else:
        log.info("stopped; nothing is left")
    return left


def announce(settings: Settings, address: Any) -> None:
    """Log the mode, the address, and what is missing."""
    host = "[%s]" % address[0] if ":" in address[0] else address[0]
    log.info("echobot %s listens on http://%s:%d, callback path /webhook", __version__, host, address[1])
    if settings.token:
        log.info("live: replies go to %s", settings.graph_url)
    else:
        log.warning("dry run: replies are logged, not sent, until PAGE_ACCESS_TOKEN is set")
    if not settings.secret:
        log.warning("anybody can post deliveries, until APP_SECRET is set")


def within_host(limits: Limits) -> Limits:
    """Return `limits`, with as many connections and threads as the process may have files and memory for.

    Beyond its memory a thread may die while it is being started, and who starts it would wait for ever.
    """
    try:
        import resource
    except ImportError:  # Windows sets no such limits
        return limits
    threads = limits.connections + limits.senders + limits.crew
    files = threads + limits.senders
    soft, hard = (sys.maxsize if most == resource.RLIM_INFINITY else most
                  for most in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < min(files + SPARE_FILES, hard):
        with contextlib.suppress(ValueError, OSError):  # a host may not let it have more
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(files + SPARE_FILES, hard), hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    data = resource.getrlimit(resource.RLIMIT_DATA)[0]
    memory = 1.0 if data == resource.RLIM_INFINITY else (data - SPARE_BYTES) / (threads * THREAD_BYTES)
    room = min(1.0, memory, (soft - SPARE_FILES) / files)
    return limits._replace(**{name: max(1, int(getattr(limits, name) * room))
                              for name in ("connections", "senders", "crew")})


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a command; return its exit status."""
    parser = argparse.ArgumentParser(prog="echobot.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("serve", "chat", "check"), default="serve",
                        help="serve (the default), chat or check")
    parser.add_argument("url", nargs="?", help="the public callback URL, for check")
    parser.add_argument("--host", help="where to listen, instead of HOST")
    parser.add_argument("--port", help="where to listen, instead of PORT")
    parser.add_argument("--version", action="version", version="echobot " + __version__)
    options = parser.parse_args(arguments)
    given = {name: value for name, value in (("HOST", options.host), ("PORT", options.port)) if value is not None}
    if options.url and options.command != "check":
        parser.error("only check takes a URL")
    if given and options.command != "serve":
        parser.error("only serve takes --host and --port")
    tune_interpreter()
    if options.command == "chat":
        if not sys.stdin or not sys.stdout:
            parser.error("chat needs standard input and output")
        start_log("WARNING", quotes=True)
        return Chat().run()
    if options.command == "check":
        return check(os.environ, options.url)
    return serve({**os.environ, **given})


def tune_interpreter() -> None:
    """Set Python up for hundreds of threads, and for whatever text comes in and goes out."""
    if sys.implementation.name == "cpython":  # PyPy counts on the usual stack
        threading.stack_size(STACK_BYTES)
        sys.setrecursionlimit(RECURSION)
    sys.setswitchinterval(SWITCH)
    ask_glibc("mallopt", *ONE_HEAP)
    for stream in sys.stdin, sys.stdout:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def give_back_memory(deadlines: Deadlines) -> None:
    """Have glibc return what is free to the system, now and every so often: else it keeps what a burst has taken."""
    deadlines.set(TRIM, functools.partial(give_back_memory, deadlines))
    ask_glibc("malloc_trim", 0)


def ask_glibc(function: str, *arguments: int) -> None:
    """Call a function of the C library; do nothing where that is not glibc, or where there is no ctypes."""
    with contextlib.suppress(Exception):
        import ctypes
        getattr(ctypes.CDLL(None), function)(*arguments)


if __name__ == "__main__":
    sys.exit(main())
