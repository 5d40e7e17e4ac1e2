"""Asks a server many questions: retries what may pass, stops at what will not, and keeps every paid answer.

One policy, here and in `gate.py`: rate limits make everybody wait and count against nobody; failures of a
request are tried again after a growing, random time; failures of the server as a whole end the run after a
while; what no retry can change ends it at once.
"""

import asyncio
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from sgpo_cli.errors import RemoteError
from sgpo_cli.remote.answer import Answer, RateLimited, RowRefused, Transient, estimate_tokens, hint_for, read
from sgpo_cli.remote.budget import Budget, Prices
from sgpo_cli.remote.gate import Gate, Limits
from sgpo_cli.remote.paid import Paid

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
"""Opens what sends, in the event loop that it is used in."""


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

    @property
    def text(self) -> str:
        return "\n".join(str(message["content"]) for message in self.body["messages"])


class BudgetReached(RemoteError):
    """No further request is allowed; those in flight are paid for already."""


class Asker:
    """One run of asking one server.

    Args:
        connection: the seam to the web.
        paid: takes the answers.
        on_answer: called for every row that is through, with its answer.
    """

    def __init__(
        self,
        connection: Connection,
        limits: Limits,
        patience: Patience,
        paid: Paid,
        *,
        prices: Prices | None = None,
        budget: Budget | None = None,
        thinking: bool = False,
        on_answer: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        self._connection, self._limits, self._patience, self._paid = connection, limits, patience, paid
        self._prices, self._budget = prices or Prices(), budget or Budget()
        self._thinking, self._on_answer = thinking, on_answer
        self.gate = Gate(limits)
        self.retries: Counter[str] = Counter()
        self.failed: dict[int, str] = {}
        self.requests = self.answers = self.estimated = self._useful = 0
        self.models: set[str] = set()
        self.fingerprints: set[str] = set()
        self._spent_tokens = 0
        self.cost = 0.0
        self._refusals: list[str] = []
        self._limited_since = 0.0
        self._stopping = False
        self._flying: set[asyncio.Task[None]] = set()

    def run(self, questions: Iterable[Question]) -> None:
        """Ask them all; `failed` then holds the rows that were given up, with the reason.

        Raises:
            RemoteError: the server refuses, is gone, or the budget is reached; what was paid for is kept.
        """
        if caught := asyncio.run(self._run(iter(questions))):
            signal.raise_signal(caught[0])

    async def _run(self, questions: Iterator[Question]) -> list[int]:
        """Returns the signals that came."""
        with _signals(self._stop) as caught:
            async with self._connection() as self._send:
                await self._rounds(questions)
        return caught

    async def _rounds(self, questions: Iterator[Question]) -> None:
        """All rows once, and those that failed once more when all the others are through."""
        given_up: list[Question] = []
        await self._round(questions, self._patience.max_attempts, given_up)
        if given_up and self._useful and not self._stopping:
            for question in given_up:
                question.attempts = question.empty = 0
                del self.failed[question.row]
            await self._round(iter(given_up), min(LAST_ATTEMPTS, self._patience.max_attempts), [])

    def failure_kinds(self) -> list[tuple[str, int]]:
        """How many rows were given up for what."""
        return Counter(self.failed.values()).most_common()

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
            asyncio.create_task(self._work(questions, attempts, given_up)) for _ in range(self._limits.concurrency)
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
                self.failed[question.row] = fault.kind
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
            self._note_refusal(refusal)
            self._keep(question, Answer("", refusal.finish, 0, 0), str(refusal))
        except Transient as fault:
            if fault.kind != "empty":
                raise
            self._keep(question, Answer("", "empty", 0, 0))

    def _enough(self, question: Question, attempts: int, state: RetryCallState) -> bool:
        """Whether to give a row up. While the server as a whole fails, its rows are not to blame."""
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, Transient):
            return True
        self.retries[error.kind] += 1
        if self.gate.outage() > self._patience.max_outage:
            raise RemoteError(
                f"nothing has worked for {self.gate.outage():.0f} s, last: {error.kind} {error}".rstrip(),
                "what was answered is kept; run the same command again when the server is back",
            )
        if error.kind == "empty":
            question.empty += 1
            return question.empty >= EMPTY_ATTEMPTS
        question.attempts += not self.gate.suspect
        return question.attempts >= attempts or (state.seconds_since_start or 0) > MAX_ELAPSED

    async def _attempt(self, question: Question) -> None:
        while True:
            tokens = estimate_tokens(question.text) if self._counts_tokens() else 0
            await self.gate.enter(tokens)
            task = asyncio.current_task()
            assert task is not None
            try:
                if self._stopping:
                    raise asyncio.CancelledError
                self._check_budget(tokens)
                self._flying.add(task)
                await self._call(question, tokens)
                return
            except RateLimited as limit:
                self._wait_as_told(limit)
            finally:
                self._flying.discard(task)
                self.gate.leave()

    async def _call(self, question: Question, tokens: float) -> None:
        self.requests += 1
        try:
            async with asyncio.timeout(self._patience.timeout):
                status, headers, content = await self._send(question.body)
            answer = read(status, headers, content, lambda: question.text, thinking=self._thinking)
        except TimeoutError:
            self.gate.failed()
            raise Transient("timeout", f"no answer within {self._patience.timeout:g} s") from None
        except Transient as fault:
            if fault.kind.startswith(SERVER_FAULTS):
                self.gate.failed()
            if fault.paid is not None:
                self._paid.add(None, fault.paid, self._cost(fault.paid))
            raise
        except RowRefused:
            self.gate.answered()
            raise
        self._keep(question, answer)
        self.gate.answered()
        self.gate.settle(tokens, answer.prompt_tokens + answer.completion_tokens)

    def _keep(self, question: Question, answer: Answer, message: str = "") -> None:
        """Into the log before anything else."""
        cost = self._cost(answer)
        self._paid.add(question.key, answer, cost)
        self.cost += cost
        self.answers += 1
        self._useful += answer.finish == "stop"
        self._limited_since = 0.0
        self._spent_tokens += answer.prompt_tokens + answer.completion_tokens
        self.estimated += answer.estimated
        for found, names in ((answer.model, self.models), (answer.fingerprint, self.fingerprints)):
            if found and len(names) < 100:
                names.add(found)
        if message:
            logger.debug("row %d: %s", question.row + 1, message)
        self._on_answer(answer)

    def _cost(self, answer: Answer) -> float:
        return self._prices.cost(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens)

    def _counts_tokens(self) -> bool:
        return bool(self._limits.tokens_per_minute or self._budget.cost is not None or self._budget.tokens is not None)

    def _check_budget(self, tokens: float) -> None:
        """Whether this request, and what is in flight, fits; by the mean of what answers took so far."""
        mean = max(self._spent_tokens / self.answers if self.answers else 0, tokens)
        price = self._paid.cost / self._paid.tokens if self._paid.tokens else self._prices.input / 1_000_000
        coming = mean * self.gate.in_flight
        try:
            self._budget.check(self._paid.cost + coming * price, self._paid.tokens + coming)
        except RemoteError as error:
            raise BudgetReached(str(error), error.hint) from None

    def _note_refusal(self, refusal: RowRefused) -> None:
        """Five rows refused alike before any is answered: it is not the rows."""
        if self._useful:
            return
        self._refusals.append(str(refusal))
        if len(self._refusals) >= SAME_REFUSALS and len(set(self._refusals)) == 1:
            raise RemoteError(f"every request is refused: {refusal}", hint_for(str(refusal)))

    def _wait_as_told(self, limit: RateLimited) -> None:
        self.retries["rate_limit"] += 1
        now = time.monotonic()
        self._limited_since = self._limited_since or now
        wait = self.gate.refused(limit.seconds)
        waited_blindly = now - self._limited_since if limit.seconds is None else 0.0
        if max(wait, waited_blindly) > self._patience.max_wait:
            raise RemoteError(
                f"{limit}; the wait is {max(wait, waited_blindly):.0f} s, longer than --max-wait",
                "what was answered is kept; run the same command again later, or raise --max-wait",
            )


@contextmanager
def _signals(stop: Callable[[bool], None]) -> Iterator[list[int]]:
    """Ctrl-C and the scheduler's signals stop the asking gently, the second one at once.

    Yields the signals that came; the caller raises the first again when the loop has come to rest.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    loop = asyncio.get_running_loop()

    def handle(number: int) -> None:
        caught.append(number)
        stop(len(caught) > 1)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] != signal.SIG_IGN:
            loop.add_signal_handler(number, handle, number)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
