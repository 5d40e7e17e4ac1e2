"""A chat completions server that fails on purpose: over real sockets, deterministic, fast, without dependencies.

In a test, in a thread of its own:

    with FaultServer(mixed(0.3, seed=1)) as server:
        ...  # a client on server.url
    assert max(server.paid.values()) == 1

As a process of its own, where GET /stats counts what kill tests and benchmarks ask for:

    python tests/fault_server.py --port 0 --seed 1 --fault-share 0.3 --latency 0.05

A plan says which request fails, and how. It is a name out of FAULTS or a Fault (every request), None (no request), or
a function of the Request; `mixed`, `sequence`, `only` and `schedule` make such functions out of any of these.
"""

import argparse
import asyncio
import base64
import gzip
import json
import random
import re
import signal
import socket
import struct
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import cached_property
from hashlib import blake2b
from http.client import responses as REASONS
from itertools import pairwise
from typing import Any, Self

WORDS = "calm river stone bright open early quiet garden north paper simple honest window bread seven light".split()
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
LINGER_0 = struct.pack("ii", 1, 0)  # closing then sends RST instead of FIN


@dataclass
class Request:
    """One arrived POST: what a plan decides by, and afterwards the record of what became of it."""

    raw: bytes = field(repr=False)
    """Request line and headers as they came."""
    body: dict[str, Any]
    digest: str
    """Of the body's bytes: the same request sent again has the same digest."""
    number: int
    """Of arrival at this server, from 1."""
    attempt: int
    """How many times this body has arrived, this one included."""
    in_flight: int
    """Requests not yet answered, this one included."""
    arrived: float
    """`time.monotonic()`, also comparable between processes of one machine."""
    elapsed: float
    """Seconds since the server's first start."""
    fault: str = "good"
    status: int | None = None
    """None where no answer was begun."""
    answered: float | None = None
    """`time.monotonic()` at which the answer was begun."""
    completed: bool = False
    """Whether every byte of the answer was handed to the kernel before the client went away."""

    @property
    def path(self) -> str:
        return self.raw.split(b" ", 2)[1].decode()

    @cached_property
    def headers(self) -> dict[str, str]:
        """By lower-case name."""
        lines = (line.partition(":") for line in self.raw.decode("latin-1").split("\r\n")[1:])
        return {name.lower(): value.strip() for name, _, value in lines}


Completion = dict[str, Any]
Body = Callable[[Request, Completion], Any]


@dataclass(frozen=True)
class Fault:
    """One way to answer. `body` gets the request and the good completion; bytes go out as such, the rest as JSON."""

    name: str
    status: int = 200
    headers: Mapping[str, str | Callable[[], str]] = field(default_factory=dict)
    body: Body = lambda request, completion: completion
    wire: str = "whole"
    """whole, chunked, gzip, drip (a byte each `pace` seconds), short (of its Content-Length), close, reset, hang."""
    delay: float = 0.0
    """Seconds on top of the server's latency."""
    pace: float = 0.05
    good: bool = False
    """Whether a client that got all of it has a usable answer, one that it paid for."""


Plan = Callable[[Request], Fault | None]
Choice = Plan | Fault | str | None


# ---------------------------------------------------------------------------- kinds of faults


def error(
    status: int,
    code: str | None = None,
    *,
    name: str | None = None,
    message: str = "the fault server says no",
    type: str = "server_error",
    headers: Mapping[str, str | Callable[[], str]] | None = None,
) -> Fault:
    """An error status with a body as OpenAI writes it."""
    payload = {"error": {"message": message, "type": type, "param": None, "code": code}}
    return Fault(name or code or f"http_{status}", status, headers or {}, lambda request, completion: payload)


def rate_limit(seconds: float, form: str = "seconds") -> Fault:
    """429 with the wait as `seconds` (whole), `date` (whole, rounded up) or `ms` (OpenAI's retry-after-ms)."""
    forms: dict[str, tuple[str, str | Callable[[], str]]] = {
        "seconds": ("retry-after", f"{seconds:.0f}"),
        "date": ("retry-after", lambda: formatdate(time.time() + seconds + 1, usegmt=True)),
        "ms": ("retry-after-ms", f"{seconds * 1000:.0f}"),
    }
    headers = dict([forms[form]])
    return error(429, "rate_limit_exceeded", name=f"http_429_{form}", type="requests", headers=headers)


def page(status: int) -> Fault:
    """The HTML page of a proxy or a login wall."""
    html = f"<!doctype html><html><body><h1>{status}</h1><p>nginx</p></body></html>".encode()
    return Fault(f"html_{status}", status, {"content-type": "text/html"}, lambda request, completion: html)


def payload(name: str, value: Any) -> Fault:
    """200 with a body of its own: bytes, or anything for JSON."""
    return Fault(name, body=lambda request, completion: value)


def redirect(url: str) -> Fault:
    """307 to another URL, method and body to be kept."""
    return Fault("redirect", 307, {"location": url}, lambda request, completion: b"")


def changed(name: str, good: bool = False, **fields: Any) -> Fault:
    """The good completion with other values at its top level; `...` as value drops the field."""

    def body(request: Request, completion: Completion) -> Completion:
        return {key: value for key, value in (completion | fields).items() if value is not ...}

    return Fault(name, body=body, good=good)


def message(name: str, finish_reason: str = "stop", good: bool = False, **fields: Any) -> Fault:
    """The good completion with other values in its message; a value may be a function of the good answer."""

    def body(request: Request, completion: Completion) -> Completion:
        [choice] = completion["choices"]
        for key, value in fields.items():
            choice["message"][key] = value(choice["message"]["content"]) if callable(value) else value
        choice["finish_reason"] = finish_reason
        return completion

    return Fault(name, body=body, good=good)


def echo_key(status: int) -> Fault:
    """The Authorization header in an error's message, or (200) in the answer: plain, its key alone and in base64."""

    def body(request: Request, completion: Completion) -> Any:
        header = request.headers.get("authorization", "")
        key = header.removeprefix("Bearer ")
        text = f"You sent {header!r}, the key {key}, in base64 {base64.b64encode(key.encode()).decode()}."
        if status != 200:
            return {"error": {"message": text, "type": "invalid_request_error", "param": key, "code": None}}
        completion["choices"][0]["message"]["content"] = text
        return completion

    return Fault(f"echo_key_{status}", status, body=body, good=status == 200)


CALL = {"id": "call_1", "type": "function", "function": {"name": "search", "arguments": "{}"}}
FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in [
        error(400, "context_length_exceeded", type="invalid_request_error"),
        *(error(status) for status in (400, 401, 402, 403, 404, 408, 409, 429, 500, 502, 503, 504, 529)),
        error(404, "model_not_found", type="invalid_request_error"),
        error(429, "insufficient_quota", type="insufficient_quota"),
        Fault("http_422", 422, body=lambda request, completion: {"detail": [{"loc": ["body"], "msg": "no"}]}),
        *(rate_limit(1, form) for form in ("seconds", "date", "ms")),
        *(page(status) for status in (200, 403, 502, 503)),
        *(Fault(wire, wire=wire) for wire in ("reset", "close", "short", "hang")),
        *(Fault(wire, wire=wire, good=True) for wire in ("drip", "chunked", "gzip")),
        Fault("slow", delay=1.0, good=True),
        Fault("broken_json", body=lambda request, completion: json.dumps(completion)[:-60].encode()),
        Fault("json_list", body=lambda request, completion: [completion]),
        payload("json_null", None),
        payload("empty_body", b""),
        payload("error_in_200", {"error": {"message": "overloaded", "type": "server_error", "code": 503}}),
        changed("choices_empty", choices=[]),
        changed("choices_null", choices=None),
        changed("choices_missing", choices=...),
        changed("usage_missing", good=True, usage=...),
        changed("usage_null", good=True, usage=None),
        changed("usage_strings", good=True, usage={"prompt_tokens": "7", "completion_tokens": "many"}),
        message("content_null", content=None),
        message("content_empty", content=""),
        message("content_blank", content=" \n\t "),
        message("content_zero_width", content="\u200b\ufeff\u2060"),
        message("content_list", content=[{"type": "text", "text": "in parts"}]),
        message("huge", content="word " * 2_000_000),
        message("length", "length", content=lambda answer: answer[: len(answer) // 2]),
        message("content_filter", "content_filter", content=None),
        message("refusal", content=None, refusal="I cannot help with that."),
        message("tool_calls", "tool_calls", content=None, tool_calls=[CALL]),
        message("reasoning_content", good=True, reasoning_content="First, think about it."),
        message("think", good=True, content="<think>First, think about it.</think>\n\n{}".format),
        *(echo_key(status) for status in (200, 401, 500)),
    ]
}
PASSING = (
    "http_408 http_409 http_429 http_500 http_502 http_503 http_504 http_529 html_502 html_200 reset close short "
    "broken_json json_list json_null empty_body error_in_200"
).split()
"""Kinds that a client should get over by asking again at once. Not among them: `hang`, `drip`, which take its time."""


# ---------------------------------------------------------------------------- plans


def as_plan(choice: Choice) -> Plan:
    """The function behind a choice. Raises KeyError for an unknown name."""
    fault = FAULTS[choice] if isinstance(choice, str) else choice
    return fault if callable(fault) else lambda request: fault


def mixed(share: float, seed: int, kinds: Sequence[Choice] = PASSING, at_most: int | None = None) -> Plan:
    """Fails a `share` of all arrivals, drawn from seed, body and attempt: concurrency and order change nothing.

    `at_most`: faults for one body, after which it is answered; None leaves it to chance.
    """
    plans = [as_plan(kind) for kind in kinds]

    def plan(request: Request) -> Fault | None:
        draw = random.Random(f"{seed} {request.digest} {request.attempt}")
        if (at_most is not None and request.attempt > at_most) or draw.random() >= share:
            return None
        return draw.choice(plans)(request)

    return plan


def sequence(choices: Sequence[Choice], *, per_body: bool = False) -> Plan:
    """One choice for each arrival (or for each attempt of one body); after the last one all is well."""
    plans = [as_plan(choice) for choice in choices]

    def plan(request: Request) -> Fault | None:
        index = request.attempt if per_body else request.number
        return plans[index - 1](request) if index <= len(plans) else None

    return plan


def only(predicate: Callable[[Request], bool], choice: Choice) -> Plan:
    """The choice where the predicate holds, else none."""
    chosen = as_plan(choice)
    return lambda request: chosen(request) if predicate(request) else None


def schedule(*phases: tuple[float, Choice]) -> Plan:
    """Each choice from its second (since the server's first start) on; before the first phase all is well."""
    starts, plans = [start for start, _ in phases], [as_plan(choice) for _, choice in phases]
    assert all(before < after for before, after in pairwise(starts)), "phases in order of time"

    def plan(request: Request) -> Fault | None:
        phase = bisect_right(starts, request.elapsed)
        return plans[phase - 1](request) if phase else None

    return plan


# ---------------------------------------------------------------------------- the server


def default_answer(body: dict[str, Any]) -> str:
    """Some words that depend on the messages, all of them, and on nothing else."""
    digest = blake2b(json.dumps(body["messages"]).encode(), digest_size=12)
    return f"Answer {digest.hexdigest()}: {' '.join(WORDS[byte % len(WORDS)] for byte in digest.digest())}."


class FaultServer:
    """Serves POST /v1/chat/completions by plan, GET /v1/models and GET /stats on 127.0.0.1, from a thread.

    `stop()` and `start()` play an outage: same port, same books. An exception in `plan` or `answer` ends the
    connection and is raised by `stop()`. With `record=False` a request leaves some 150 bytes, for the books only.
    """

    def __init__(
        self,
        plan: Choice = None,
        *,
        answer: Callable[[dict[str, Any]], str] = default_answer,
        latency: float = 0.0,
        models: Sequence[str] = ("teacher",),
        port: int = 0,
        record: bool = True,
    ) -> None:
        self.plan, self.answer, self.latency, self.models = as_plan(plan), answer, latency, models
        self.port, self.record = port, record
        self.connections = self.arrived = self.in_flight = self.in_flight_max = 0
        self.completed: Counter[str] = Counter()
        """Answers written out entirely, by the name of their fault; `good` for none."""
        self._attempts: dict[str, int] = {}
        self._paid: dict[str, int] = {}
        self._paid_total = 0
        self._requests: list[Request] = []
        self._failures: list[BaseException] = []
        self._open: set[_Connection] = set()
        self._first_start: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def requests(self) -> list[Request]:
        """Chat requests so far in order of arrival; none with `record=False`."""
        return self._requests.copy()

    @property
    def paid(self) -> Counter[str]:
        """How many usable answers went out entirely, by the digest of the request's body."""
        return Counter(self._paid.copy())

    def stats(self) -> dict[str, int]:
        paid, distinct = self._paid_total, len(self._paid)
        books = {"requests": self.arrived, "paid": paid, "paid_distinct": distinct, "doubled": paid - distinct}
        return books | {"in_flight_max": self.in_flight_max, "in_flight": self.in_flight}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listens from here on. Raises OSError where the port is taken."""
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        self._first_start = self._first_start or time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._on_exception)
        self._stopping = self._loop.create_future()
        serve = self._serve(listener)
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(serve,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Drops every connection and frees the port; raises what went wrong in `plan` or `answer`."""
        if self._loop is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set_result, None)
        self._thread.join()
        self._loop.close()
        self._loop = None
        if self._failures:
            raise self._failures.pop()

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(self), sock=listener, backlog=1024)
        await self._stopping
        while accepting := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(accepting)  # a connection half accepted would leak its socket
        server.close()
        for connection in self._open:
            connection.transport.abort()
        while self._open:
            await asyncio.sleep(0)

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._failures.append(context.get("exception") or RuntimeError(context["message"]))
        loop.default_exception_handler(context)

    def arrive(self, head: bytes, content: bytes) -> Request:
        """Enters a chat request into the books."""
        body = json.loads(content)
        digest = blake2b(content, digest_size=8).hexdigest()
        self.arrived += 1
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        self._attempts[digest] = attempt = self._attempts.get(digest, 0) + 1
        now = time.monotonic()
        elapsed = now - (self._first_start or now)
        request = Request(head, body, digest, self.arrived, attempt, self.in_flight, now, elapsed)
        if self.record:
            self._requests.append(request)
        return request

    def leave(self, request: Request, fault: Fault, completed: bool) -> None:
        """Closes a request's entry: answered, or its connection is gone."""
        self.in_flight -= 1
        request.completed = completed
        if completed:
            self.completed[fault.name] += 1
        if completed and fault.good:
            self._paid_total += 1
            self._paid[request.digest] = self._paid.get(request.digest, 0) + 1

    def completion(self, request: Request) -> Completion:
        """The good answer, a pure function of the request's body."""
        text = self.answer(request.body)
        asked = sum(len(str(message.get("content")).split()) for message in request.body["messages"])
        given = len(text.split())
        return {
            "id": f"chatcmpl-{request.digest}",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": request.body.get("model"),
            "system_fingerprint": "fp_fault_server",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given},
        }

    def page(self, path: str) -> tuple[int, Any]:
        """Status and JSON for a GET."""
        if path == "/stats":
            return 200, self.stats()
        if path.endswith("/models"):
            return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
        return 404, {"error": {"message": f"no such path: {path}", "type": "invalid_request_error", "code": None}}


GOOD = Fault("good", good=True)


class _Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive; one request at a time, those behind it wait in the buffer."""

    transport: asyncio.Transport

    def __init__(self, server: FaultServer) -> None:
        self.server = server
        self.buffer = b""
        self.current: tuple[Request, Fault] | None = None
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(0)  # so that resume_writing says when the last byte is out
        self.server.connections += 1
        self.server._open.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.server._open.discard(self)
        if self.timer:
            self.timer.cancel()
        if self.current:
            self.server.leave(*self.current, completed=False)
            self.current = None

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.current is None:
            self.read()

    def read(self) -> None:
        """Takes a request out of the buffer once all of it is there."""
        head, end, rest = self.buffer.partition(b"\r\n\r\n")
        length = int(found[1]) if (found := LENGTH.search(head)) else 0
        if not end or len(rest) < length:
            return
        self.buffer = rest[length:]
        self.closing = CLOSE.search(head) is not None
        method, target, _ = head.split(b" ", 2)
        path = target.decode().partition("?")[0]
        if method != b"POST" or not path.endswith("/chat/completions"):
            status, value = self.server.page(path)
            self.write(status, {}, json.dumps(value).encode())
            return self.proceed()
        request = self.server.arrive(head, rest[:length])
        self.current = request, GOOD  # before the plan: should that raise, the books still balance
        fault = self.server.plan(request) or GOOD
        self.current = request, fault
        request.fault = fault.name
        value = fault.body(request, self.server.completion(request))
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.after(self.server.latency + fault.delay, self.answer, content)

    def after(self, seconds: float, then: Callable[..., None], *arguments: Any) -> None:
        if seconds:
            self.timer = asyncio.get_running_loop().call_later(seconds, then, *arguments)
        else:
            then(*arguments)

    def answer(self, content: bytes) -> None:
        """Puts the content on the wire in the fault's way."""
        assert self.current
        request, fault = self.current
        if fault.wire == "hang":
            return
        if fault.wire in ("close", "reset"):
            if fault.wire == "reset":
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
            return self.transport.abort()
        headers = {name: value() if callable(value) else value for name, value in fault.headers.items()}
        request.status, request.answered = fault.status, time.monotonic()
        if fault.wire == "drip":
            self.write(fault.status, headers, b"", length=len(content))
            return self.drip(content, fault.pace)
        if fault.wire == "short":
            self.write(fault.status, headers, content[: len(content) // 2], length=len(content))
            return self.transport.close()
        if fault.wire == "gzip":
            content, headers["content-encoding"] = gzip.compress(content), "gzip"
        self.write(fault.status, headers, content, chunked=fault.wire == "chunked")
        self.settle()

    def write(
        self, status: int, headers: dict[str, str], content: bytes, *, length: int | None = None, chunked: bool = False
    ) -> None:
        """`length` where the Content-Length shall differ from the content's own."""
        size = {"content-length": str(len(content) if length is None else length)}
        if chunked:
            size = {"transfer-encoding": "chunked"}
            parts = (content[start : start + 100] for start in range(0, len(content), 100))
            content = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        reason = REASONS.get(status, "Unknown")
        lines = {"content-type": "application/json"} | headers | size
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.transport.write(f"HTTP/1.1 {status} {reason}\r\n{head}\r\n".encode() + content)

    def drip(self, content: bytes, pace: float) -> None:
        self.transport.write(content[:1])
        if len(content) > 1:
            self.after(pace, self.drip, content[1:], pace)
        else:
            self.settle()

    def resume_writing(self) -> None:
        if self.current and self.current[1].wire != "drip":
            self.settle()

    def settle(self) -> None:
        """Closes the entry if the kernel has all of the answer; else `resume_writing` comes back here."""
        if self.current is None or self.transport.is_closing() or self.transport.get_write_buffer_size():
            return
        self.server.leave(*self.current, completed=True)
        self.current = None
        self.proceed()

    def proceed(self) -> None:
        """To the next request of the connection, where there may be one."""
        if self.closing:
            self.transport.close()
        elif self.buffer:
            self.read()


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat completions server that fails on purpose.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault-share", type=float, default=0.0, help="of all arrivals; 1 fails every one")
    parser.add_argument("--at-most", type=int, help="faults for one body, after which it is answered")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=PASSING, metavar="KIND", help=", ".join(FAULTS))
    parser.add_argument("--latency", type=float, default=0.0, help="seconds from a request to its answer")
    arguments = parser.parse_args()
    plan = mixed(arguments.fault_share, arguments.seed, arguments.kinds, arguments.at_most)
    stop = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # before the thread starts, so that sigwait gets them
    with FaultServer(plan, latency=arguments.latency, port=arguments.port, record=False) as server:
        print(server.port, flush=True)
        signal.sigwait(stop)


if __name__ == "__main__":
    main()
