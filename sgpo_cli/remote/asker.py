"""Asks servers many questions: retries what may pass, stops at what will not, keeps every paid answer.

One policy, here and in `gate.py`: rate limits make everybody wait and count against nobody; failures of a
request are tried again after a growing, random time; failures of the server as a whole end the run after a
while; what no retry can change ends it at once.
"""

import asyncio
import logging
import math
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from sgpo_cli.errors import RemoteError, UsageError
from sgpo_cli.remote.answer import Answer, RateLimited, RowRefused, Transient, estimate_tokens, hint_for, read
from sgpo_cli.remote.gate import Gate, Limits
from sgpo_cli.remote.signals import gently
from sgpo_cli.remote.tally import BudgetReached, Tally

logger = logging.getLogger(__name__)

EMPTY_ATTEMPTS = 3
LAST_ATTEMPTS = 3  # for a row that failed, when all the others are through
MAX_ELAPSED = 900.0  # seconds of trying one row
SAME_REFUSALS = 5  # so many rows refused alike, and none answered: it is not the rows
GRACE = 3.0  # seconds for requests in flight when the server has refused us for good
STOP_GRACE = 10.0  # the same when we are told to stop
SERVER_FAULTS = ("connection", "timeout", "http_5")

Response = tuple[int, Mapping[str, str], bytes]
Send = Callable[[Mapping[str, Any]], Awaitable[Response]]
"""Sends one request's body; raises Transient without a response, RowRefused for one that is too large."""
Connection = Callable[[], AbstractAsyncContextManager[Send]]
"""Opens what sends to one server, in the event loop that it is used in."""


@dataclass(frozen=True)
class Patience:
    """Seconds for one call, tries for one row, seconds to wait when told to, and without any answer."""

    timeout: float = 300.0
    max_attempts: int = 8
    max_wait: float = 600.0
    max_outage: float = 60.0


@dataclass(slots=True)
class Question:
    """One request: `row` is its place in the input, `key` the digest of its content."""

    row: int
    key: str
    body: Mapping[str, Any]
    attempts: int = 0
    empty: int = 0
    server: int = 0

    @property
    def text(self) -> str:
        return "\n".join(str(message["content"]) for message in self.body["messages"])


class Asker:
    """One run of asking servers that hold the same model.

    Args:
        connections: the seam to the web, one for each server; the limits are those of each.
        tally: takes the answers, and knows the budget.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        limits: Limits,
        patience: Patience,
        tally: Tally,
        *,
        thinking: bool = False,
    ) -> None:
        self._connections, self._limits, self._patience, self._tally = connections, limits, patience, tally
        self._thinking = thinking
        self._gates = [Gate(limits) for _ in connections]
        self._sends: list[Send] = []
        self._refusals: list[tuple[Question, RowRefused]] = []
        self._limited_since = 0.0
        self._stopping = False
        self._flying: set[asyncio.Task[None]] = set()

    def run(self, questions: Iterable[Question]) -> None:
        """Ask them all; the tally's `failed` then holds the rows that were given up, with the reason.

        Raises:
            RemoteError: the server refuses, is gone, or the budget is reached; what was paid for is kept.
        """
        if caught := asyncio.run(self._run(iter(questions))):
            signal.raise_signal(caught[0])

    async def _run(self, questions: Iterator[Question]) -> list[int]:
        """Returns the signals that came."""
        with gently(self._stop) as caught:
            async with AsyncExitStack() as stack:
                self._sends = [await stack.enter_async_context(connect()) for connect in self._connections]
                await self._rounds(questions)
        self._keep_refusals()
        return caught

    async def _rounds(self, questions: Iterator[Question]) -> None:
        """All rows once, and those that failed once more when all the others are through."""
        given_up: list[Question] = []
        await self._round(questions, self._patience.max_attempts, given_up)
        if given_up and self._tally.whole and not self._stopping:
            for question in given_up:
                question.attempts = question.empty = 0
                del self._tally.failed[question.row]
            await self._round(iter(given_up), min(LAST_ATTEMPTS, self._patience.max_attempts), [])

    def _stop(self, at_once: bool) -> None:
        """Send nothing more; leave what is in flight a moment."""
        self._stopping = True
        for task in self._workers:
            if at_once or task not in self._flying:
                task.cancel()
        if not at_once:
            asyncio.get_running_loop().call_later(STOP_GRACE, self._stop, True)

    async def _round(self, questions: Iterator[Question], attempts: int, given_up: list[Question]) -> None:
        self._workers = [
            asyncio.create_task(self._work(questions, attempts, given_up))
            for _ in range(self._limits.concurrency * len(self._gates))
        ]
        done, _ = await asyncio.wait(self._workers, return_when=asyncio.FIRST_EXCEPTION)
        error = next((task.exception() for task in done if not task.cancelled() and task.exception()), None)
        if error is None:
            await asyncio.wait(self._workers)
            return
        self._stopping = True
        for task in self._workers:
            if task not in self._flying:
                task.cancel()
        grace = self._patience.timeout if isinstance(error, BudgetReached) else GRACE
        if flying := [task for task in self._workers if not task.done()]:
            await asyncio.wait(flying, timeout=grace)
        for task in self._workers:
            task.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        raise error

    async def _work(self, questions: Iterator[Question], attempts: int, given_up: list[Question]) -> None:
        for question in questions:
            try:
                await self._ask(question, attempts)
            except Transient as fault:
                self._tally.failed[question.row] = fault.kind
                given_up.append(question)
                logger.debug("row %d: given up: %s %s", question.row + 1, fault.kind, fault)
            if self._stopping:
                return

    async def _ask(self, question: Question, attempts: int) -> None:
        """Get an answer, or raise the fault that the last attempt ended with."""
        policy = AsyncRetrying(
            retry=retry_if_exception_type(Transient),
            stop=lambda state: self._enough(question, attempts, state),
            wait=wait_random_exponential(multiplier=0.5, max=60),
            reraise=True,
        )
        try:
            await policy(self._attempt, question)
        except RowRefused as refusal:
            self._note_refusal(question, refusal)
        except Transient as fault:
            if fault.kind != "empty":
                raise
            self._tally.keep(question.key, Answer("", "empty", 0, 0))

    def _enough(self, question: Question, attempts: int, state: RetryCallState) -> bool:
        """Whether to give a row up. While the server as a whole fails, its rows are not to blame."""
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, Transient):
            return True
        self._tally.retries[error.kind] += 1
        server_fault = error.kind.startswith(SERVER_FAULTS)
        outage = min(gate.outage() for gate in self._gates)
        if server_fault and outage > self._patience.max_outage:
            raise RemoteError(
                f"nothing has worked for {outage:.0f} s, last: {error.kind} {error}".rstrip(),
                "what was answered is kept; run the same command again when the server is back",
            )
        if error.kind == "empty":
            question.empty += 1
            return question.empty >= EMPTY_ATTEMPTS
        question.attempts += not (server_fault and self._gates[question.server].suspect)
        return question.attempts >= attempts or (state.seconds_since_start or 0) > MAX_ELAPSED

    async def _attempt(self, question: Question) -> None:
        while True:
            tokens = estimate_tokens(question.text) if self._counts_tokens() else 0
            if tokens > (self._limits.tokens_per_minute or math.inf):
                raise UsageError(
                    f"row {question.row + 1}: about {tokens} tokens, more than --tokens-per-minute allows",
                    "raise --tokens-per-minute",
                )
            question.server = min(range(len(self._gates)), key=lambda number: self._gates[number].preference)
            gate = self._gates[question.server]
            await gate.enter(tokens)
            task = asyncio.current_task()
            assert task is not None
            try:
                if self._stopping:
                    raise asyncio.CancelledError
                self._tally.check_budget(tokens, sum(gate.in_flight for gate in self._gates))
                self._flying.add(task)
                await self._call(question, tokens)
                return
            except RateLimited as limit:
                self._wait_as_told(gate, limit)
            finally:
                self._flying.discard(task)
                gate.leave()

    async def _call(self, question: Question, tokens: float) -> None:
        self._tally.requests += 1
        gate, send = self._gates[question.server], self._sends[question.server]
        try:
            async with asyncio.timeout(self._patience.timeout):
                status, headers, content = await send(question.body)
            answer = read(status, headers, content, lambda: question.text, thinking=self._thinking)
        except TimeoutError:
            gate.failed()
            raise Transient("timeout", f"no answer within {self._patience.timeout:g} s") from None
        except Transient as fault:
            if fault.kind.startswith(SERVER_FAULTS):
                gate.failed()
            if fault.paid is not None:
                self._tally.charge(fault.paid)
            raise
        except RowRefused:
            gate.answered()
            raise
        self._tally.keep(question.key, answer)
        self._limited_since = 0.0
        if self._refusals and self._tally.whole:
            self._keep_refusals()
        gate.answered()
        gate.settle(tokens, answer.prompt_tokens + answer.completion_tokens)

    def _counts_tokens(self) -> bool:
        return self._tally.is_limited or self._limits.tokens_per_minute is not None

    def _note_refusal(self, question: Question, refusal: RowRefused) -> None:
        """Five rows refused alike before any is answered: it is not the rows, and none of them is written off."""
        self._refusals.append((question, refusal))
        if self._tally.whole:
            self._keep_refusals()
        elif len(self._refusals) >= SAME_REFUSALS and len({str(refusal) for _, refusal in self._refusals}) == 1:
            raise RemoteError(f"every request is refused: {refusal}", hint_for(str(refusal)))

    def _keep_refusals(self) -> None:
        waiting, self._refusals = self._refusals, []
        for question, refusal in waiting:
            self._tally.keep(question.key, Answer("", refusal.finish, 0, 0))
            logger.debug("row %d: %s", question.row + 1, refusal)

    @property
    def lowest_concurrency(self) -> int:
        """The fewest requests at a time that a server brought us down to."""
        return min(gate.lowest for gate in self._gates)

    def _wait_as_told(self, gate: Gate, limit: RateLimited) -> None:
        self._tally.retries["rate_limit"] += 1
        now = time.monotonic()
        self._limited_since = self._limited_since or now
        wait = gate.refused(limit.seconds)
        waited_blindly = now - self._limited_since if limit.seconds is None else 0.0
        if max(wait, waited_blindly) > self._patience.max_wait:
            raise RemoteError(
                f"{limit}; the wait is {max(wait, waited_blindly):.0f} s, longer than --max-wait",
                "what was answered is kept; run the same command again later, or raise --max-wait",
            )
