"""The books of one run of asking: what was kept, what it cost, whether there is money for more."""

from collections import Counter
from collections.abc import Callable

from sgpo_cli.errors import RemoteError
from sgpo_cli.remote.answer import Answer
from sgpo_cli.remote.budget import MILLION, Budget, Prices
from sgpo_cli.remote.paid import Paid

MOST_NAMES = 100


class BudgetReached(RemoteError):
    """No further request is allowed; those in flight are paid for already."""


class Tally:
    """Counts of this run; the money is that of all runs, in `paid`.

    Args:
        on_answer: called for every row that is through, with its answer.
    """

    def __init__(
        self, paid: Paid, prices: Prices | None, budget: Budget | None, on_answer: Callable[[Answer], None]
    ) -> None:
        self._paid, self._prices, self._budget = paid, prices or Prices(), budget or Budget()
        self._on_answer = on_answer
        self.retries: Counter[str] = Counter()
        self.failed: dict[int, str] = {}
        self.requests = self.answers = self.whole = self.estimated = 0
        self.cost = 0.0
        self.models: set[str] = set()
        self.fingerprints: set[str] = set()

    def keep(self, key: str, answer: Answer) -> None:
        """Into the log before anything else."""
        self._paid.add(key, answer)
        self.cost += self._prices.cost(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens)
        self.answers += 1
        self.whole += answer.finish == "stop"
        self.estimated += answer.estimated
        for found, names in ((answer.model, self.models), (answer.fingerprint, self.fingerprints)):
            if found and len(names) < MOST_NAMES:
                names.add(found)
        self._on_answer(answer)

    def charge(self, useless: Answer) -> None:
        """An answer that is of no use, but on the bill."""
        self._paid.add(None, useless)

    @property
    def is_limited(self) -> bool:
        """Whether there is a budget to keep to."""
        return self._budget.cost is not None or self._budget.tokens is not None

    def check_budget(self, tokens: float, in_flight: int) -> None:
        """Whether a request of so many prompt tokens fits beside those in flight, by the mean of answers so far.

        Raises:
            BudgetReached: it does not.
        """
        mean = max(self._paid.tokens / len(self._paid) if len(self._paid) else 0, tokens)
        spent = self._paid.cost(self._prices)
        price = spent / self._paid.tokens if self._paid.tokens else self._prices.input / MILLION
        coming = mean * in_flight
        try:
            self._budget.check(spent + coming * price, self._paid.tokens + coming)
        except RemoteError as error:
            raise BudgetReached(str(error), error.hint) from None

    def failure_kinds(self) -> list[tuple[str, int]]:
        """How many rows were given up for what."""
        return Counter(self.failed.values()).most_common()
