"""How fast to ask: one gate that every request of an endpoint passes.

Concurrency follows the server (additive increase, multiplicative decrease, as TCP does); a `Retry-After`
closes the gate for all; an outage is told from a bad request by failures in a row.
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass

MARGIN = 0.05  # our clock starts when the server's answer arrives; this covers what rounding takes off
DEFAULT_WAIT = 0.25  # where a server says "too many" and not how long
MAX_BLIND_WAIT = 60.0
OUTAGE_FAILURES = 20
DOWN_FAILURES = 3  # where there are other servers, so many failures in a row are enough to turn to them
PROBE_SECONDS = 5.0


@dataclass
class Limits:
    """Concurrent requests, and requests and tokens a minute (None: no limit)."""

    concurrency: int
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


class Gate:
    """Lets requests out; all methods belong to one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._window = float(limits.concurrency)
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._open_at = self._next_request = self._next_tokens = 0.0
        self._refusals = 0
        self._failures = 0
        self._failing_since = 0.0
        self._down_until = 0.0
        self.in_flight = 0
        self.lowest = limits.concurrency

    async def enter(self, tokens: float) -> None:
        """Wait for leave to send a request of so many tokens (estimated); pair it with `leave`."""
        while True:
            if (wait := self._open_at - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            elif self.in_flight >= int(self._window):
                waiting = asyncio.get_running_loop().create_future()
                self._waiting.append(waiting)
                await waiting
            else:
                self.in_flight += 1
                if await self._keeps_pace(tokens):
                    return
                self.leave()

    async def _keeps_pace(self, tokens: float) -> bool:
        """Wait for the rates; False if the gate was closed meanwhile."""
        wait = self._book(tokens) - time.monotonic()
        if wait <= 0:
            return True
        try:
            await asyncio.sleep(wait)
        except asyncio.CancelledError:
            self.leave()
            raise
        return self._open_at <= time.monotonic()

    def _book(self, tokens: float) -> float:
        """The time at which the rates allow this request; the slot is taken."""
        if not (self._limits.requests_per_minute or self._limits.tokens_per_minute):
            return 0.0
        now = time.monotonic()
        slot = max(now, self._next_request, self._next_tokens)
        if self._limits.requests_per_minute:
            self._next_request = slot + 60 / self._limits.requests_per_minute
        if self._limits.tokens_per_minute:
            self._next_tokens = slot + tokens * 60 / self._limits.tokens_per_minute
        return slot

    def leave(self) -> None:
        self.in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                return

    def settle(self, estimated: float, used: float) -> None:
        """Put the token rate right once the real number is known."""
        if self._limits.tokens_per_minute:
            self._next_tokens += (used - estimated) * 60 / self._limits.tokens_per_minute

    def answered(self) -> None:
        """The server works: one more at a time, per window of answers."""
        self._failures = self._refusals = 0
        if self._window < self._limits.concurrency:
            self._window = min(self._window + 1 / self._window, self._limits.concurrency)
            self._wake()

    def refused(self, seconds: float | None) -> float:
        """Too many requests: halve the concurrency, and close for everyone. Returns the seconds to wait."""
        now = time.monotonic()
        if now >= self._open_at:  # the others that were in flight say the same again
            self._window = max(self._window / 2, 1.0)
            self.lowest = min(self.lowest, int(self._window))
            self._refusals += 1
        if seconds is None:
            seconds = min(DEFAULT_WAIT * 2 ** (self._refusals - 1), MAX_BLIND_WAIT)
        self._open_at = max(self._open_at, now + seconds + MARGIN)
        self._failures = 0
        return seconds

    def failed(self) -> None:
        """No connection, or an error of the server's."""
        if not self._failures:
            self._failing_since = time.monotonic()
        self._failures += 1
        if self._failures >= DOWN_FAILURES:
            self._down_until = time.monotonic() + PROBE_SECONDS

    @property
    def preference(self) -> tuple[bool, bool, float]:
        """The smallest is where to go next: a server that works, that is not resting, that has least to do."""
        now = time.monotonic()
        return now < self._down_until, now < self._open_at, self.in_flight / self._window

    @property
    def suspect(self) -> bool:
        """Whether failures are the server's rather than a request's."""
        return self._failures >= OUTAGE_FAILURES

    def outage(self) -> float:
        """Seconds for which nothing has worked, 0 while there are few failures in a row."""
        return time.monotonic() - self._failing_since if self.suspect else 0.0
