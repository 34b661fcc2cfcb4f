#!/usr/bin/env python3
"""A Facebook Messenger bot that says back what it is told: one file, the standard library, nothing else.

    python echobot.py                 serve the webhook
    python echobot.py chat            talk to the bot on this machine; no account, no network
    python echobot.py check [URL]     find out why a live bot does not answer

The settings are environment variables:

    PAGE_ACCESS_TOKEN   the page's token; without one this is a dry run, which logs the replies that it would send
    APP_SECRET          the app's secret, which signs deliveries; a token needs it
    ALLOW_UNSIGNED      1 lets a token do without APP_SECRET, and so anybody in: for trying only
    VERIFY_TOKEN        what the webhook's set-up page must send; default my_voice_is_my_password_verify_me
    HOST, PORT          where to listen; default 0.0.0.0 and 5000
    GRAPH_URL           the Graph API and its version; default https://graph.facebook.com/v26.0
    LOG_LEVEL           DEBUG, INFO (the default), WARNING, ERROR or CRITICAL; the log goes to standard error

The life of a message, in one thread, whose `Loop` lets all tasks that wait for a network take turns:

 1. Messenger POSTs a delivery to the webhook.  A `Connection` reads it (`read_request`), within bounds.
 2. `handle_messages` checks its signature, and only then parses it.
 3. `messaging_events` finds the events in it, and `owed_to` which of them are owed a reply.
 4. The `Outbox` asks `reply`, the one function to make your own, what to say (in a thread of the `Crew`, for it may
    take its time), and sends that once, in each person's order, until Graph has accepted or refused it.
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
import queue
import random
import re
import selectors
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
import unicodedata
import urllib.parse
import urllib.request
from typing import (Any, Callable, Deque, Dict, Generator, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set,
                    Tuple, TypeVar, Union)

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
JSON_DEPTH = 100             # levels; Messenger sends about ten, and the parser recurses
LINE_BYTES = 8 * 1024        # of a request line or one header field, as in nginx
HEAD_BYTES = 32 * 1024       # of all header fields together; Messenger and its routers send about one KiB
BODY_BYTES = 1024 * 1024     # of a delivery, or of an answer of Graph's; real ones have a few KiB
PIECE_BYTES = 16 * 1024      # read at a time: a whole TLS record, for what TLS would keep of it no selector sees
FAIR_BYTES = 64 * 1024       # of a message that is read however many others are: nearly all have less
SKIPS_LOGGED = 10            # malformed events of a delivery; there is room for half a million
BACKLOG = 1024               # connections that wait to be accepted; the default of 5 loses bursts
SPARE_FILES = 40             # left to the interpreter, the log, name look-ups
SPARE_BYTES = 24 * 1024**2   # of memory, left to the interpreter and the first threads
FULL_BYTES = 128 * 1024**2   # of memory that `held` and `pending_bytes` come to, for JSON takes more once parsed
TICK = 0.02                  # s between two looks at the clock, and at the crew's work
NEW_THREADS = 8              # that a crew gets in a tick: all 100 in a quarter of a second
UNUSED = 60.0                # s after which an idle connection to Graph is closed: each takes some 100 KB


class Limits(NamedTuple):
    """The bounds that a test, or `chat`, may want smaller; times in seconds."""

    answer: float = 4.0         # for a delivery: Messenger wants its answer within 5
    request: float = 10.0       # for a request to arrive whole: deliveries are small
    idle: float = 120.0         # for a connection between requests: Heroku's router keeps 90, and must close first
    linger: float = 2.0         # for a client to read why it was refused
    connections: int = 500      # at once; more wait in the backlog
    senders: int = 300          # persons' replies on their way to Graph at once: its 300 a second, at 1 s each
    crew: int = 100             # threads for replies that take their time, and as many for connecting
    pending: int = 10_000       # replies not settled yet: minutes of them, and Messenger keeps what is beyond
    pending_bytes: int = 16 * 1024**2  # of the deliveries that they came in
    held: int = 32 * 1024**2    # bytes of all messages that are being read or dealt with
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
        yield "ALLOW_UNSIGNED must be 1 or 0: set it to 1 to do without APP_SECRET, or remove it"
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
    return "sha256=" + hmac.new(secret.encode(), body, "sha256").hexdigest()


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

    Python's parser recurses in C, as deep as a version of it allows: where the stack is small it would end the process.
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
        self.left: Deque[str] = collections.deque()  # pieces of it, still to be sent
        self.size = 0                       # its share of the delivery's bytes
        self.tries, self.since = 0, 0.0     # to send it, and since when
        self.ended, self.status = False, 200  # 503 when given up, 500 when a bug ended it
        self.waiting: List[Task] = []       # the deliveries that wait for it

    def ask(self, reply: Reply) -> None:
        """Ask `reply` what to say; raise TypeError if that is no text."""
        text = reply(self.message)
        if not isinstance(text, (str, type(None))):
            raise TypeError("reply returned %s: it has to return a text, or None" % type(text).__name__)
        self.left.extend(pieces(text or ""))
        self.text = text or ""


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


# ---- The loop: all that waits for a network, in one thread ---------------------------------------------------------
#
# A task is a generator.  Where it has to wait it yields, until it is woken; then it looks whether what it waits for is
# there, and yields again if not, for it may be woken in vain.  `yield from` has it take the steps of another generator.
#
# Hundreds of threads would do without this, but they hand the interpreter on at each read and write, and that cost them
# half of the processor's time.  asyncio would do it all, in 3 MB more and with a start that is a third longer.

T = TypeVar("T")
Steps = Generator[None, None, T]
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Late(BaseException):
    """The time that a task had is over: no Exception, which the task's parts may catch for other reasons."""


class Task:
    """Steps that are under way, and in the end what they returned or raised."""

    def __init__(self, steps: Steps[Any]) -> None:
        self.steps = steps
        self.late = False     # to be told so
        self.awaited = False  # by `Loop.run`, which says what was raised; else it is logged
        self.ended, self.value = False, None
        self.error: Optional[BaseException] = None


class Loop:
    """Lets tasks take turns: those whose socket is ready, whose time is over, or whom another task has woken."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, limits: Limits = Limits()) -> None:
        self.clock, self.limits = clock, limits
        self.crew, self.connectors = Crew(self, limits.crew), Crew(self, limits.crew)
        self.tasks: Set[Task] = set()
        self.task: Task  # whose turn it is
        self.woken: Deque[Task] = collections.deque()
        self.looked = 0.0    # when the clock was last looked at
        self.timers: Dict[Callable[[], None], float] = {}  # what to call, and when
        self.held = 0        # bytes of the messages under way in all streams
        self.asleep = False  # or about to be
        self.selector = selectors.DefaultSelector()
        self.bell, self.rope = socket.socketpair()
        for end in self.bell, self.rope:
            end.setblocking(False)
        self.selector.register(self.bell, READ, lambda: self.bell.recv(PIECE_BYTES))

    def start(self, steps: Steps[Any]) -> Task:
        """Return a task that takes these steps, beginning with the next turn."""
        task = Task(steps)
        self.tasks.add(task)
        self.woken.append(task)
        return task

    def run(self, steps: Steps[T]) -> T:
        """Return what these steps return, or raise what they raise; all other tasks go on meanwhile."""
        task = self.start(steps)
        task.awaited = True
        self.run_until(lambda: task.ended)
        if task.error:
            raise task.error
        return task.value  # type: ignore[return-value]

    def run_until(self, done: Callable[[], bool]) -> None:
        """Let the tasks take turns until `done`."""
        while not done():
            try:
                self.wait()
                for _ in range(len(self.woken)):
                    self.step(self.woken.popleft())
            except Exception:  # what is left of this turn comes in the next one
                log.exception("a bug in the loop")

    def wait(self) -> None:
        """Wake the tasks whose socket is ready or whose time is over; wait for a tick at most until there is one."""
        self.asleep = True
        ready = self.selector.select(0 if self.woken else TICK)
        self.asleep = False
        for key, _ in ready:
            key.data()
        if time.monotonic() - self.looked >= TICK:
            self.looked = time.monotonic()
            self.keep_time()
            self.crew.grow()
            self.connectors.grow()

    def step(self, task: Task) -> None:
        """Let a task go on until it has to wait."""
        if task.ended:
            return
        self.task, late, task.late = task, task.late, False
        try:
            task.steps.throw(Late()) if late else next(task.steps)
            return
        except StopIteration as end:
            task.value = end.value
        except (Exception, Late) as error:  # and not Ctrl-C
            task.error = error
            if not task.awaited:
                log.exception("a bug ended a task")
        task.ended = True
        self.tasks.remove(task)

    def wake_from_thread(self, task: Task) -> None:
        """Wake a task, called by another thread than the loop's."""
        self.woken.append(task)
        self.ring()

    def ring(self) -> None:
        """Have the loop take its next turn at once, called by another thread."""
        if self.asleep:
            self.asleep = False
            with contextlib.suppress(OSError):  # it rings already, or the loop is closed
                self.rope.send(b"\0")

    def turn(self) -> Steps[None]:
        """Let the others take their turn."""
        self.woken.append(self.task)
        yield

    def at(self, seconds: float, act: Callable[[], None]) -> None:
        """Have `act` called in so many seconds."""
        self.timers[act] = self.clock() + seconds

    def keep_time(self) -> None:
        """Call what is due."""
        now = self.clock()
        for act in [act for act, when in self.timers.items() if when <= now]:
            del self.timers[act]
            act()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Raise Late in the steps under `with`, where they wait, unless they are done in so many seconds."""
        def make_late(task: Task = self.task) -> None:
            task.late = True
            self.woken.append(task)

        self.at(seconds, make_late)
        try:
            yield
        finally:
            self.timers.pop(make_late, None)

    def close(self) -> None:
        """End the tasks that are left, and give back what the loop has of the system's."""
        for task in self.tasks:
            task.steps.close()
        self.crew.close()
        self.connectors.close()
        self.selector.close()
        self.bell.close()
        self.rope.close()


class Crew:
    """Threads for what blocks: `reply`, which may be anybody's code, or connecting.

    One of them does the jobs as they come, for most are done at once.  For those that still wait a tick later there are
    more, which end when there is nothing left to do; but not while they compute, which holds up the loop.
    """

    def __init__(self, loop: Loop, most: int) -> None:
        self.loop, self.most = loop, most
        self.waited, self.computed = 0, 0.0  # jobs, and s of the processor's time, when `grow` looked last
        self.threads: Set[int] = set()  # those that have begun
        self.jobs: queue.SimpleQueue[Optional[Callable[[], None]]] = queue.SimpleQueue()

    def do(self, function: Callable[..., T], *arguments: Any) -> Steps[T]:
        """Return what `function` returns, or raise what it raises."""
        task = self.loop.task
        returned: List[T] = []
        raised: List[Exception] = []

        def job() -> None:
            try:
                returned.append(function(*arguments))
            except BaseException as error:  # SystemExit too: it is neither the thread's nor the task's to end by
                raised.append(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            self.loop.wake_from_thread(task)

        self.jobs.put(job)
        while not (returned or raised):
            yield
        if raised:
            raise raised[0]
        return returned[0]

    def grow(self) -> None:
        """Start threads for jobs that have waited since the last tick; if there is no thread, start one.

        `Thread.start` would wait until the thread runs, and where memory is short it may never.
        """
        waiting, computed = self.jobs.qsize(), time.process_time() - time.thread_time()  # all other threads'
        needed = min(self.waited, waiting, NEW_THREADS) if computed - self.computed < TICK / 2 else 0
        with contextlib.suppress(RuntimeError, MemoryError):  # none can be had now
            for _ in range(min(needed, self.most - len(self.threads)) if self.threads else 1):
                _thread.start_new_thread(self.work, ())
        self.waited, self.computed = waiting, computed

    def work(self) -> None:
        """Do jobs until there is none; then, as the last thread, wait for more."""
        self.threads.add(_thread.get_ident())
        try:
            while len(self.threads) == 1 or not self.jobs.empty():
                job = self.jobs.get()
                if not job:
                    return
                job()
        finally:
            self.threads.remove(_thread.get_ident())

    def close(self) -> None:
        """Let the last thread end."""
        self.jobs.put(None)


class Stream:
    """A connection's socket, and what has come from it and is not read yet."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.loop, self.sock, self.ahead = loop, sock, bytearray()
        self.held = 0     # bytes of the message under way, until `release`
        self.watched = 0  # the events that the selector looks for
        self.task: Optional[Task] = None  # who waits for them

    def wait(self, events: int) -> Steps[None]:
        """Wait until the socket is ready; return sooner where the task is woken for another reason."""
        if events != self.watched:
            self.watch(events)
        self.task = self.loop.task
        try:
            yield
        finally:
            self.task = None

    def watch(self, events: int) -> None:
        """Have the selector look for `events`; 0 for none."""
        if not events:
            self.loop.selector.unregister(self.sock)
        elif self.watched:
            self.loop.selector.modify(self.sock, events, self.happened)
        else:
            self.loop.selector.register(self.sock, events, self.happened)
        self.watched = events

    def happened(self) -> None:
        """Wake who waits for the socket; where nobody does, look no more, for it would happen again and again."""
        if self.task:
            self.loop.woken.append(self.task)
        else:
            self.watch(0)

    def more(self) -> Steps[bool]:
        """Wait for more to read ahead; return False when the other side has ended; raise Refusal if it is too much."""
        yield from self.wait(READ)
        piece = yield from self.attempt(READ, self.sock.recv, PIECE_BYTES)
        self.ahead += piece
        self.held += len(piece)
        self.loop.held += len(piece)
        if self.held > FAIR_BYTES and self.loop.held > self.loop.limits.held:
            raise Refusal(503, "Too much is being read: bring it again.")
        return bool(piece)

    def release(self) -> None:
        """Stop counting the message that has been dealt with."""
        self.loop.held -= self.held - len(self.ahead)
        self.held = len(self.ahead)

    def send(self, data: bytes) -> Steps[None]:
        """Send all of `data`."""
        while data:
            sent = yield from self.attempt(WRITE, self.sock.send, data)
            data = data[sent:]

    def attempt(self, events: int, act: Callable[[Any], T], argument: Any) -> Steps[T]:
        """Return what `act` returns when the socket lets it; TLS may have to read in order to write."""
        while True:
            try:
                return act(argument)
            except ssl.SSLWantReadError:
                yield from self.wait(READ)
            except ssl.SSLWantWriteError:
                yield from self.wait(WRITE)
            except BlockingIOError:
                yield from self.wait(events)

    def line(self) -> Steps[bytes]:
        """Return a line, or what there is of it at the end or when it is too long."""
        while b"\n" not in self.ahead and len(self.ahead) < LINE_BYTES and (yield from self.more()):
            pass
        return self.take(min(self.ahead.find(b"\n") + 1 or LINE_BYTES, LINE_BYTES))

    def take(self, count: int) -> bytes:
        """Return what has been read ahead, `count` bytes of it at most."""
        taken = bytes(self.ahead[:count])
        del self.ahead[:count]
        return taken

    def drop(self) -> None:
        """Forget what has been read ahead."""
        self.ahead.clear()
        self.release()

    def end(self) -> None:
        """Have who waits for more find the end, after what has come."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close the socket."""
        if self.watched:
            self.watch(0)
        self.sock.close()
        self.drop()


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


def read_head(stream: Stream) -> Steps[str]:
    """Return what comes up to an empty line; raise Refusal if that is too long, or ends before."""
    looked, end = 0, None
    while not end:
        if stream.ahead[:1] == TLS_HELLO:  # at once: it has no empty line, and would wait for its 10 s
            raise Refusal(400, "This is TLS, and only HTTP is spoken here: put a proxy with the certificate in front.")
        end = END_OF_HEAD.search(stream.ahead, max(0, looked - 2))
        looked = len(stream.ahead)
        if looked > LINE_BYTES and (end or looked > HEAD_BYTES or looked - stream.ahead.rfind(b"\n") > LINE_BYTES):
            check_lengths(stream.ahead[:end.end() if end else looked])
        if not end and not (yield from stream.more()):
            raise Refusal(400, "It broke off.")
    return stream.take(end.end()).decode("latin-1")


def check_lengths(head: bytearray) -> None:
    """Raise Refusal if the lines of a head are too long, or all together are."""
    first, *others = map(len, head.split(b"\n"))
    if first >= LINE_BYTES:
        raise Refusal(414, "The line is too long.")
    if max(others, default=0) >= LINE_BYTES or len(head) > HEAD_BYTES:
        raise Refusal(431, "The header fields are too long.")


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
        raise Refusal(400, "Content-Length is not a number, or given twice.")
    size = float(length)  # not int, which refuses thousands of digits
    if size > BODY_BYTES:
        raise Refusal(413, "The body is longer than %d bytes." % BODY_BYTES)
    return int(size)


def read_body(stream: Stream, length: int) -> Steps[bytes]:
    """Return the body of a message framed by `length`, bytes or CHUNKED; raise Refusal if it is not whole."""
    if length == CHUNKED:
        return (yield from read_chunks(stream))
    while len(stream.ahead) < length:
        if not (yield from stream.more()):
            raise Refusal(400, "It broke off.")
    return stream.take(length)


def read_chunks(stream: Stream) -> Steps[bytes]:
    """Return a chunked body, and read the trailer fields, which say nothing that is needed here.

    The lines between the chunks are bounded too.
    """
    parts: List[bytes] = []
    room, lines = BODY_BYTES, BODY_BYTES // 8
    while True:
        line = yield from stream.line()
        match = CHUNK_LINE.fullmatch(line)
        if match is None:
            raise Refusal(400, "A chunk is malformed.")
        size = int(match.group(1), 16)
        room, lines = room - size, lines - len(line)
        if room < 0 or lines < 0:
            raise Refusal(413, "The body is longer than %d bytes, or in too many chunks." % BODY_BYTES)
        if not size:
            stream.ahead[:0] = line  # the trailer ends as a head does, and where there is none, with this line
            parse_fields((yield from read_head(stream)), len(line))
            return b"".join(parts)
        parts.append((yield from read_body(stream, size)))
        if len(parts) % 100 == 0:  # tiny ones take a while
            yield from stream.loop.turn()
        if (yield from read_body(stream, 2)) != b"\r\n":
            raise Refusal(400, "A chunk is malformed.")


# ---- Graph ---------------------------------------------------------------------------------------------------------

class Response(NamedTuple):
    """An HTTP server's answer."""

    status: int
    fields: Fields
    body: bytes


class Link(Stream):
    """A connection to an HTTP server."""

    since = 0.0  # when it was last used

    def exchange(self, request: bytes) -> Steps[Response]:
        """Return the server's answer; raise ConnectionError if it closed instead, Refusal if it is not HTTP."""
        yield from self.send(request)
        if not (yield from self.more()):
            raise ConnectionError("the connection was closed without an answer")
        status = 100
        while status < 200:  # such as 100 Continue: the answer proper is still to come
            head = yield from read_head(self)
            match = STATUS_LINE.match(head)
            if match is None:
                raise Refusal(400, "The answer is not HTTP.")
            status, fields = int(match.group(1)), parse_fields(head, match.end())
        length = 0 if status in (204, 304) else framing(fields)
        if length is None:
            while len(self.ahead) < BODY_BYTES and (yield from self.more()):
                pass
            return Response(status, dict(fields, connection="close"), self.take(BODY_BYTES))
        return Response(status, fields, (yield from read_body(self, length)))

    def spent(self) -> bool:
        """Return whether the server has closed the connection, or has said something unasked, while it was idle."""
        try:
            socket.socket.recv(self.sock, 1, socket.MSG_PEEK)  # past TLS, which would say so at ten times the cost
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True


NO_ANSWER = OSError, http.client.HTTPException, UnicodeError, Refusal, Late  # UnicodeError: a name that cannot be


class Client:
    """Calls one HTTP server, by the proxies of the environment, over connections that are kept open.

    urllib.request would open a connection for each call, and http.client write and parse at twice the cost; what they
    know of proxies, tunnels and certificates is used here.
    """

    def __init__(self, loop: Loop, url: str, timeout: float, proxies: Proxies = None) -> None:
        parts = urllib.parse.urlsplit(url)
        self.host, self.base, self.timeout, self.loop = parts.netloc, parts.path, timeout, loop
        self.context = ssl.create_default_context() if parts.scheme == "https" else None
        self.proxy, self.proxy_fields = proxy_for(parts.scheme, parts.netloc, proxies)
        self.common = "Host: %s\r\nUser-Agent: echobot/%s\r\nAccept-Encoding: identity\r\n" % (self.host, __version__)
        if self.proxy and not self.context:
            self.base = "http://%s%s" % (self.host, self.base)
            self.common += "".join(["%s: %s\r\n" % field for field in self.proxy_fields.items()])
        self.idle: Deque[Link] = collections.deque()  # the one that was used last is last
        self.prune()

    def call(self, method: str, path: str, body: bytes = b"", fields: str = "") -> Steps[Response]:
        """Return the server's answer; raise one of NO_ANSWER where there is none.  `fields` are whole lines."""
        head = "%s %s%s HTTP/1.1\r\n%s%sContent-Length: %d\r\n\r\n" % (
            method, self.base, path, self.common, fields, len(body))
        request = head.encode("latin-1") + body
        link = self.reuse()
        if link:
            with contextlib.suppress(ConnectionError, ssl.SSLError):  # closed just now: once more, on one that is new
                return (yield from self.exchange(link, request))
        with self.loop.within(3 * self.timeout):  # to reach a proxy, to have it reach the server, to agree on TLS
            link = Link(self.loop, (yield from self.loop.connectors.do(self.connect)))
        return (yield from self.exchange(link, request))

    def reuse(self) -> Optional[Link]:
        """Return a connection that is open and idle, if there is one."""
        while self.idle:
            link = self.idle.pop()
            if not link.spent():
                return link
            link.close()
        return None

    def connect(self) -> socket.socket:
        """Return a new connection, by way of the proxy if there is one."""
        at = self.proxy or self.host
        connection: Any = http.client.HTTPConnection(at, timeout=self.timeout)
        if self.context:
            connection = http.client.HTTPSConnection(at, timeout=self.timeout, context=self.context)
            if self.proxy:
                connection.set_tunnel(self.host, headers=self.proxy_fields)
        connection.connect()
        sock: socket.socket = connection.sock
        return sock

    def exchange(self, link: Link, request: bytes) -> Steps[Response]:
        """Return the server's answer, and keep the connection if it can be used again; raise one of NO_ANSWER."""
        try:
            with self.loop.within(self.timeout):
                response = yield from link.exchange(request)
        except BaseException as error:
            link.close()
            if isinstance(error, Late):  # those that are idle may lead to the same dead end
                self.close()
            raise
        if link.ahead or "close" in response.fields.get("connection", "").lower():
            link.close()  # what comes beyond the answer nobody asked for, and the next call would take it for its
        else:
            link.release()
            link.since = self.loop.clock()
            self.idle.append(link)
        return response

    def prune(self) -> None:
        """Close the connections that nobody has needed for a minute, as after a burst, from now on each minute."""
        self.loop.at(UNUSED, self.prune)
        while self.idle and self.loop.clock() - self.idle[0].since >= UNUSED:
            self.idle.popleft().close()

    def close(self) -> None:
        """Close the connections that nobody uses."""
        while self.idle:
            self.idle.pop().close()


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
    100: "a parameter is wrong, such as a blank text, or the page knows no such person: check that the token is this "
         "page's, and GRAPH_URL",
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

    def send_message(self, recipient: str, text: str) -> Steps[None]:
        """Send `text` to a person; raise Passing or ForGood if Graph does not take it."""
        body = '{"recipient":{"id":%s},"messaging_type":"RESPONSE","message":{"text":%s}}' % tuple(
            map(json.dumps, (recipient, text)))
        yield from self.call("POST", "/me/messages?", body.encode(), "Content-Type: application/json\r\n")

    def call(self, method: str, path: str, body: bytes = b"", fields: str = "") -> Steps[Dict[str, Any]]:
        """Return Graph's answer; raise Passing or ForGood if it is not what was asked for."""
        try:
            return judge((yield from self.client.call(method, path + self.credentials, body, fields)))
        except NO_ANSWER as error:
            why = getattr(error, "strerror", None) or str(error) or "it took too long"  # no URL, which holds the token
            raise Passing("no answer from Graph (%s)" % why) from error


# ---- The outbox: each reply once, each person's in order -----------------------------------------------------------

class Outbox:
    """Sends each reply until it is settled, accepted by Graph or refused for good, or given up.

    One person's replies form a line, which one task sends.  A line whose first reply has failed for now waits for its
    time, and keeps no sender from the others.
    """

    def __init__(self, loop: Loop, reply: Reply, send: Callable[[str, str], Steps[None]],
                 report: Callable[[Owed, float], None], limits: Limits) -> None:
        self.loop, self.reply, self.send, self.report, self.limits = loop, reply, send, report, limits
        self.pending: Dict[bytes, Owed] = {}
        self.size = 0                                       # bytes that `pending` came in
        self.settled: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self.lines: Dict[str, Deque[Owed]] = {}
        self.waiting: Deque[str] = collections.deque()      # whose lines are to be sent
        self.senders = 0                                    # tasks that do
        self.failing: Optional[Tuple[float, float]] = None  # when Graph first and last failed, since it last did not

    def deliver(self, replies: Sequence[Owed], size: int) -> List[Owed]:
        """Begin to send what a delivery of `size` bytes owes; return it, less what was settled before, and with the
        replies of other deliveries that it joins; raise Refusal if it is too much."""
        new: Dict[bytes, Owed] = {}
        for owed in replies:
            if not (owed.key in self.settled or owed.key in self.pending):
                new.setdefault(owed.key, owed)
        full = len(self.pending) + len(new) > self.limits.pending or self.size + size > self.limits.pending_bytes
        if new and full:
            raise Refusal(503, "Too many replies are pending: bring it again.")
        for owed in new.values():
            owed.size = size // len(new)
            self.enter(owed)
        return [self.pending[owed.key] for owed in replies if owed.key in self.pending]

    def enter(self, owed: Owed) -> None:
        """Line a reply up."""
        self.size += owed.size
        self.pending[owed.key] = owed
        line = self.lines.setdefault(owed.recipient, collections.deque())
        line.append(owed)
        if len(line) == 1:
            self.begin(owed.recipient)

    def begin(self, recipient: str) -> None:
        """Have a person's line sent, by a new sender unless there are enough."""
        self.waiting.append(recipient)
        if self.senders < self.limits.senders:
            self.senders += 1
            self.loop.start(self.send_lines())

    def send_lines(self) -> Steps[None]:
        """Send one line after another until none waits: a sender's task."""
        try:
            while self.waiting:
                yield from self.send_line(self.waiting.popleft())
        finally:
            self.senders -= 1

    def send_line(self, recipient: str) -> Steps[None]:
        """Send a person's replies, until none is left or one has to wait."""
        line = self.lines[recipient]
        while (yield from self.send_reply(line[0])):
            line.popleft()
            if not line:
                del self.lines[recipient]
                return

    def send_reply(self, owed: Owed) -> Steps[bool]:
        """Send what is left of a reply, and end it; return False if it has to wait instead."""
        try:
            if owed.text is None:
                yield from self.loop.crew.do(owed.ask, self.reply)
                owed.since = self.loop.clock()
            if self.loop.clock() < owed.since + self.limits.retry:
                yield from self.send_pieces(owed)
            else:
                owed.status = 503
                log.error("gave up the reply to %s, mid %s", owed.recipient, owed.mid)
        except Passing as failure:
            self.postpone(owed, failure)
            return False
        except Exception:
            owed.status = 500
            log.exception("a bug ended the reply to %s, mid %s", owed.recipient, owed.mid)
        self.end(owed)
        return True

    def send_pieces(self, owed: Owed) -> Steps[None]:
        """Send what is left of a reply until Graph refuses it; raise Passing where it failed for now."""
        try:
            while owed.left:
                yield from self.send(owed.recipient, owed.left[0])
                self.failing = None
                owed.left.popleft()
            if owed.text:
                self.report(owed, self.loop.clock() - owed.since)
        except ForGood as refusal:
            self.failing = None
            log.error("Graph refused the reply to %s, mid %s: %s", owed.recipient, owed.mid, refusal)

    def postpone(self, owed: Owed, failure: Passing) -> None:
        """Have the line sent again: after a pause that doubles, less a random part, or as long as the server asks."""
        now = self.loop.clock()
        self.failing = self.failing_since(now) or now, now
        left = owed.since + self.limits.retry - now
        pause = min(self.limits.first_pause * 2 ** owed.tries, self.limits.longest_pause) * random.uniform(0.5, 1)
        pause = max(0.0, min(max(pause, failure.retry_after), left))
        owed.tries += 1
        log.warning("the reply to %s, mid %s, failed for now and is %s in %.1f s: %s",
                    owed.recipient, owed.mid, "tried again" if pause < left else "given up", pause, failure)
        self.loop.at(pause, functools.partial(self.begin, owed.recipient))

    def failing_since(self, now: float) -> Optional[float]:
        """Return since when Graph fails without a break, or None; ten minutes without a call are a break."""
        return self.failing[0] if self.failing and now - self.failing[1] < self.limits.outage else None

    def end(self, owed: Owed) -> None:
        """Tell all that wait for the reply; remember it if it is settled, else forget it."""
        del self.pending[owed.key]
        self.size -= owed.size
        if owed.status == 200:
            self.settled[owed.key] = None
            if len(self.settled) > self.limits.remembered:
                self.settled.popitem(last=False)
        owed.ended = True
        self.loop.woken.extend(owed.waiting)

    def settle(self, replies: Sequence[Owed]) -> Steps[int]:
        """Wait until all the replies have ended; return 200 if they are settled, 500 if a bug has ended one, and 503 if
        one is given up."""
        for owed in replies:
            owed.waiting.append(self.loop.task)
            while not owed.ended:
                yield
        return max([owed.status for owed in replies], default=200)


# ---- The server: anybody's requests, a task a connection -----------------------------------------------------------

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
Respond = Callable[[Request], Union[Answer, Steps[Answer]]]
Routes = Dict[str, Dict[str, Respond]]  # by path and method


def read_request(stream: Stream) -> Steps[Request]:
    """Return the next request; raise Refusal if it is not one.  A client that asks whether to go on is told so."""
    head = yield from read_head(stream)
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
        yield from stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    path, _, query = (target if target[0] == "/" else AUTHORITY.sub("", target)).partition("?")
    keep = not old and "close" not in fields.get("connection", "").lower()
    body = (yield from read_body(stream, length)) if length else b""
    return Request(method, path or "/", query, fields, body, keep)


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


class Connection:
    """A client's connection: a task that reads its requests one after another, and answers each once."""

    def __init__(self, server: WebServer, sock: socket.socket, address: Any) -> None:
        self.server, self.limits, self.within = server, server.limits, server.loop.within
        self.stream, self.client = Stream(server.loop, sock), address[0]

    def serve(self) -> Steps[None]:
        """Serve until either side has had enough."""
        try:
            self.stream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request = yield from self.receive()
            while request:
                answer = yield from self.server.answer(request)
                keep = request.keep and not self.server.closing
                with self.within(self.limits.idle):
                    yield from self.send(answer, keep, request.method != "HEAD")
                    if keep and self.stream.ahead:  # a client may send hundreds of requests at once
                        yield from self.server.loop.turn()
                    keep = keep and (yield from self.arrives())
                request = (yield from self.receive()) if keep else None
            if self.stream.ahead:
                yield from self.linger()
        except (OSError, Late, MemoryError):  # the client is gone, or has had its time; or it costs too much
            pass
        finally:
            self.stream.close()
            self.server.forget(self)

    def receive(self) -> Steps[Optional[Request]]:
        """Return a request, or None where there is none to answer: refused, or the client has closed instead."""
        try:
            with self.within(self.limits.request):
                return (yield from read_request(self.stream)) if (yield from self.arrives()) else None
        except Refusal as refusal:
            yield from self.refuse(refusal)
        except Late:
            yield from self.refuse(Refusal(408, "The request did not arrive whole within %g s." % self.limits.request))
        except MemoryError:
            self.stream.drop()
            yield from self.refuse(NO_MEMORY)
        return None

    def arrives(self) -> Steps[bool]:
        """Wait for a request to begin; return False where the client closes instead, or the server is closing."""
        self.stream.release()
        if self.stream.ahead:
            return True
        self.server.idle.add(self)
        try:
            return not self.server.closing and (yield from self.stream.more())
        finally:
            self.server.idle.discard(self)

    def send(self, answer: Answer, keep: bool, with_body: bool = True) -> Steps[None]:
        """Send an answer."""
        yield from self.stream.send(encode(answer, keep, with_body, int(time.time())))

    def refuse(self, refusal: Refusal) -> Steps[None]:
        """Answer what is no request."""
        log.info("refused a request from %s with %d: %s", self.client, refusal.status, refusal.why)
        with self.within(self.limits.linger):
            yield from self.send(Answer(refusal.status, refusal.text), False)
            yield from self.linger()

    def linger(self) -> Steps[None]:
        """Take what still comes: to close on unread input would reset the connection, and the answer could be lost."""
        with self.within(self.limits.linger):
            self.stream.sock.shutdown(socket.SHUT_WR)
            self.stream.drop()
            while (yield from self.stream.more()):
                self.stream.drop()


class WebServer:
    """An HTTP server that keeps to its limits whoever calls."""

    def __init__(self, listener: socket.socket, routes: Routes, limits: Limits, loop: Loop) -> None:
        self.socket, self.routes, self.limits, self.loop = listener, routes, limits, loop
        self.server_address = listener.getsockname()
        self.connections: Set[Connection] = set()
        self.idle: Set[Connection] = set()  # which wait for a request
        self.listening, self.closing = False, False
        self.stopping, self.closed, self.serving = threading.Event(), threading.Event(), threading.Lock()

    def serve_forever(self, poll_interval: float = TICK) -> None:
        """Serve until `shutdown`.  `poll_interval` is for who knows socketserver; nothing here has to poll by it."""
        with self.serving:
            self.listen(True)
            self.loop.run_until(self.stopping.is_set)

    def shutdown(self) -> None:
        """End `serve_forever`, from another thread; what is under way goes on in `close`."""
        self.stopping.set()
        self.loop.ring()
        with self.serving:
            pass

    def listen(self, on: bool) -> None:
        """Take connections from now on, or let them wait in the backlog."""
        on = on and not self.closing
        if on and not self.listening:
            self.loop.selector.register(self.socket, READ, self.accept)
        elif self.listening and not on:
            self.loop.selector.unregister(self.socket)
        self.listening = on

    def accept(self) -> None:
        """Take the connections that wait, as many as there are places for."""
        try:
            while len(self.connections) < self.limits.connections:
                connection = Connection(self, *self.socket.accept())
                self.connections.add(connection)
                self.loop.start(connection.serve())
            self.listen(False)
        except BlockingIOError:  # no more wait
            pass
        except (OSError, MemoryError):  # none can be had now: the pause keeps it calm
            self.listen(False)
            self.loop.at(2 * TICK, functools.partial(self.listen, True))

    def forget(self, connection: Connection) -> None:
        """Give the place of a connection to another."""
        self.connections.discard(connection)
        self.listen(True)

    def answer(self, request: Request) -> Steps[Answer]:
        """Return the answer to `request`, in time and whatever happens."""
        try:
            with self.loop.within(self.limits.answer):
                answer = self.dispatch(request)
                return answer if isinstance(answer, Answer) else (yield from answer)
        except Late:
            return self.late_answer()
        except Refusal as refusal:
            log.log(logging.WARNING if refusal.status == 403 else logging.INFO, "%s", refusal.why)
            return Answer(refusal.status, refusal.text)
        except MemoryError:
            log.error("%s", NO_MEMORY.why)
            return Answer(NO_MEMORY.status, NO_MEMORY.text)
        except Exception:
            log.exception("a bug in %s %s", request.method, request.path)
            return BUG

    def dispatch(self, request: Request) -> Union[Answer, Steps[Answer]]:
        """Return the answer that the request's path and method have, or the steps to it."""
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

    def server_close(self) -> None:
        """Take no further connection, ever."""
        self.closing = True
        self.listen(False)
        self.socket.close()

    def close(self) -> None:
        """Finish and answer what is under way, within the limit, and close what is idle."""
        self.shutdown()
        self.server_close()
        for connection in self.idle:
            connection.stream.end()
        until = self.loop.clock() + self.limits.drain
        self.loop.run_until(lambda: not self.busy() or self.loop.clock() >= until)
        self.closed.set()

    def busy(self) -> bool:
        """Return whether something is still under way."""
        return bool(self.connections)


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens, `::` for IPv4 as well; raise OSError where it cannot."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            ipv6 = getattr(socket, "IPPROTO_IPV6", 41)  # Python 3.7 has no name for it on Windows
            listener.setsockopt(ipv6, socket.IPV6_V6ONLY, address[0] != "::")
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


# ---- The bot -------------------------------------------------------------------------------------------------------

class Bot(WebServer):
    """The webhook: verifies, and owes Messenger a reply for each message."""

    def __init__(self, settings: Settings, limits: Limits = Limits(), clock: Callable[[], float] = time.monotonic,
                 proxies: Proxies = None, reply: Reply = reply, loop: Optional[Loop] = None) -> None:
        """Bind, and do not start; raise OSError where it cannot listen."""
        webhook: Dict[str, Respond] = {"GET": self.handle_verification, "POST": self.handle_messages}
        health: Dict[str, Respond] = {"GET": lambda request: Answer(200, "ok")}
        routes = {"/": webhook, "/webhook": webhook, "/healthz": health}
        listener = listening_socket(settings.host, settings.port)
        super().__init__(listener, routes, limits, loop or Loop(clock, limits))
        self.settings = settings
        self.graph: Optional[Graph] = None  # on a dry run
        if settings.token:
            self.graph = Graph(settings, Client(self.loop, settings.graph_url, limits.graph, proxies))
        self.outbox = Outbox(self.loop, reply, self.send, self.report, limits)

    def handle_verification(self, request: Request) -> Answer:
        """Answer the webhook's set-up page with its challenge."""
        query = request.query.encode("latin-1").decode("utf-8", "replace")
        return Answer(200, challenge(dict(urllib.parse.parse_qsl(query, True)), self.settings.verify_token))

    def handle_messages(self, request: Request) -> Steps[Answer]:
        """Answer a delivery ok once all replies that it owes are settled; raise Refusal if it is not Messenger's."""
        if self.settings.secret:
            verify_signature(request.fields.get("x-hub-signature-256"), self.settings.secret, request.body)
        if len(request.body) <= FAIR_BYTES:
            replies = self.replies_owed(request.body)
        else:
            replies = yield from self.loop.crew.do(self.replies_owed, request.body)  # it takes a while
        status = yield from self.outbox.settle(self.outbox.deliver(replies, len(request.body)))
        return Answer(200, "ok") if status == 200 else BUG if status == 500 else self.late_answer()

    def replies_owed(self, body: bytes) -> List[Owed]:
        """Return the replies owed to a delivery; log what is malformed in it; raise Refusal if it is none."""
        try:
            payload = parse_json(body)
        except ValueError:
            payload = None
        if not isinstance(payload, dict):
            text = "the body is not a JSON object in UTF-8"
            raise Refusal(400, text, "delivery refused: " + text)
        if payload.get("object") != "page":
            log.info("acknowledged a delivery that is not about a page: nothing is owed to it")
        replies, skipped = [], 0
        for page, event in messaging_events(payload):
            try:
                replies.append(owed_to(page, event))
            except Malformed as error:
                skipped += 1
                if skipped <= SKIPS_LOGGED:
                    log.warning("skipped an event: %s", error)
        if skipped > SKIPS_LOGGED:
            log.warning("skipped %d further events", skipped - SKIPS_LOGGED)
        return [owed for owed in replies if owed]

    def late_answer(self) -> Answer:
        """Have the delivery brought again, save in an outage so long that the webhook would be unsubscribed."""
        now = self.loop.clock()
        since = self.outbox.failing_since(now)
        if since is None or now - since < self.limits.outage:
            return Answer(503, "The replies are not settled yet: bring it again.")
        log.error("let a delivery go: Graph has failed for %d s", now - since)
        return Answer(200, "ok")

    def send(self, recipient: str, text: str) -> Steps[None]:
        """Send a text to a person, save on a dry run; raise Passing or ForGood if Graph does not take it."""
        if self.graph:
            yield from self.graph.send_message(recipient, text)

    def report(self, owed: Owed, seconds: float) -> None:
        """Log that a reply is accepted: whose, and not what, save on a dry run."""
        if self.settings.token:
            log.info("replied to %s: mid %s, %d characters, %d ms",
                     owed.recipient, owed.mid, len(owed.text or ""), seconds * 1000)
        else:
            log.info("dry run, would reply to %s, mid %s: %s", owed.recipient, owed.mid, owed.text)

    def busy(self) -> bool:
        """Return whether a delivery is not answered yet or a reply is not settled."""
        return bool(self.connections or self.outbox.pending)

    def close(self) -> None:
        """Finish what is under way, and close all connections."""
        super().close()
        if self.graph:
            self.graph.client.close()
        self.loop.close()


make_server = Bot


# ---- chat: a rehearsal on the real wire ----------------------------------------------------------------------------

CHAT_LIMITS = Limits(answer=0.3)  # s: the real 4, shortened
SLOW = 0.7                        # s that a slow Graph takes, more than twice that
BRINGS = 200                      # times that a delivery is brought, in a minute; Messenger goes on for an hour
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

    def __init__(self, loop: Loop, credentials: str, say: Callable[[str], None], show: Callable[..., None]) -> None:
        routes: Routes = {"/v26.0/me/messages": {"POST": self.handle_call}}
        super().__init__(listening_socket("127.0.0.1", 0), routes, Limits(), loop)
        self.credentials, self.say, self.show, self.fault = credentials, say, show, ""

    def handle_call(self, request: Request) -> Steps[Answer]:
        """Answer a call of the Send API, with the fault that is played or as it deserves."""
        secrets = re.sub("=[^&]*", "=***", request.query)
        self.show("bot > Graph", "POST %s?%s HTTP/1.1" % (request.path, secrets), request.body.decode())
        fault, self.fault = self.fault, ""
        if fault == "/slow":
            yield from self.loop.crew.do(time.sleep, SLOW)
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
        self.loop = Loop()
        self.graph = PlayedGraph(self.loop, credentials(settings), self.say, self.show)
        settings = settings._replace(graph_url="http://127.0.0.1:%d/v26.0" % self.graph.server_address[1])
        self.bot = make_server(settings, CHAT_LIMITS, proxies={}, loop=self.loop)
        url = "http://127.0.0.1:%d" % self.bot.server_address[1]
        self.messenger = Client(self.loop, url, 2 * CHAT_LIMITS.retry, proxies={})
        self.secret, self.terminal = settings.secret, sys.stdin.isatty() and sys.stdout.isatty()
        self.sent, self.said, self.showing, self.body = 0, 0, False, b"{}"
        self.tape: List[str] = []  # the last exchange

    def run(self) -> int:
        """Talk until the input ends; return the exit status."""
        for server in self.graph, self.bot:
            server.listen(True)
        if self.terminal:
            self.note("Say something.  /help lists what else Messenger and Graph can do; Ctrl-D ends.")
        try:
            while True:
                self.hear(input("you> " if self.terminal else ""))
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if self.terminal else "")
            for part in self.messenger, self.bot, self.graph.socket:
                part.close()
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
        fields = "X-Hub-Signature-256: %s\r\n" % signature(self.secret, self.body) if signed else ""
        said, status = self.said, 503
        self.tape.clear()
        for _ in range(BRINGS):
            self.show("Messenger > bot", "POST /webhook HTTP/1.1", *fields.splitlines(), self.body.decode())
            status, _, answer = self.loop.run(self.messenger.call("POST", "/webhook", self.body, fields))
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


def chat() -> int:
    """Talk until the input ends; return the exit status."""
    start_log("WARNING", quotes=True)
    return Chat().run()


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
    loop = Loop()
    if settings.token:
        yield from graph_findings(settings, Client(loop, settings.graph_url, seconds, proxies))
    if url and not valid_url(url):
        yield False, "URL", "it is not one: give the callback URL, without ? and #, like https://example.com/webhook"
    elif url:
        url += "" if urllib.parse.urlsplit(url).path else "/"
        yield from webhook_findings(settings, Client(loop, url, seconds, proxies))
    loop.close()


def graph_findings(settings: Settings, client: Client) -> Iterator[Finding]:
    """Yield what Graph says of the token, the secret and the subscription."""
    graph, what = Graph(settings, client), "token"
    try:
        page = client.loop.run(graph.call("GET", "/me?fields=id,name&"))
        yield True, what, "it is valid, of \"%s\", id %s" % (page.get("name"), page.get("id"))
        what = "subscription"
        apps = client.loop.run(graph.call("GET", "/me/subscribed_apps?")).get("data")
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
        yield from answers(settings, lambda *request: client.loop.run(client.call(*request)))
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
        holds = ask("POST", "", EMPTY, "X-Hub-Signature-256: %s\r\n" % signature(settings.secret, EMPTY)).status == 200
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
    signals: List[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: signals.append(number))  # no handler can safely do more
    announce(settings, bot.server_address)
    bot.listen(True)
    bot.loop.run_until(lambda: bool(signals))
    left = finish(bot)
    logging.shutdown()
    os._exit(1 if left else 0)  # at once: Python would wait for threads that `reply` may have started


def finish(bot: Bot) -> int:
    """Finish what is under way; return how many replies are left."""
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
    """Return `limits`, less what the process may not have the files or the memory for."""
    try:
        import resource
    except ImportError:  # Windows
        return limits._replace(connections=250, senders=200)  # select takes 512 sockets there
    soft, hard, data = (sys.maxsize if most == resource.RLIM_INFINITY else most for most in (
        *resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_DATA)[0]))
    files = limits.connections + limits.senders
    if soft < min(files + SPARE_FILES, hard):
        with contextlib.suppress(ValueError, OSError):  # a host may not let it have more
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(files + SPARE_FILES, hard), hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room, memory = (soft - SPARE_FILES) / files, (data - SPARE_BYTES) / FULL_BYTES
    return limits._replace(
        connections=part(limits.connections, room), senders=part(limits.senders, room),
        held=part(limits.held, memory), pending_bytes=part(limits.pending_bytes, memory))


def part(most: int, share: float) -> int:
    """Return `share` of `most`: all of it at most, a hundredth at least."""
    return int(most * min(1.0, max(0.01, share)))


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
    for stream in sys.stdin, sys.stdout:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if options.command == "serve":
        return serve({**os.environ, **given})
    if options.command == "chat" and not (sys.stdin and sys.stdout):
        parser.error("chat needs standard input and output")
    try:
        return check(os.environ, options.url) if options.command == "check" else chat()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # as a shell has it


if __name__ == "__main__":
    sys.exit(main())
