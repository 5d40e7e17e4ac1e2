"""What answers cost, and when to stop paying."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgpo_cli.errors import RemoteError, UsageError

MILLION = 1_000_000


@dataclass(frozen=True)
class Prices:
    """Per million tokens, in any currency; `batch` is the factor of the batch service."""

    input: float = 0.0
    output: float = 0.0
    cached_input: float | None = None
    batch: float = 0.5

    def cost(self, prompt: float, completion: float, cached: float = 0, *, batch: bool = False) -> float:
        """Of so many tokens; `cached` is the part of the prompt that the server had cached."""
        cheap = self.input if self.cached_input is None else self.cached_input
        full = ((prompt - cached) * self.input + cached * cheap + completion * self.output) / MILLION
        return full * (self.batch if batch else 1)


def read_prices(given: Mapping[str, Any]) -> Prices | None:
    """Prices from a recipe or flag; None where none are given.

    Raises:
        UsageError: an unknown key, or not a price.
    """
    example = 'for example {"input": 2.5, "output": 10} per million tokens'
    for name, value in given.items():
        if name not in Prices.__dataclass_fields__:
            raise UsageError(f"price: unknown key {name!r}", "keys: input, output, cached_input, batch; " + example)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise UsageError(f"price.{name}: expected a number, got {value!r}", example)
    if given.get("batch", 0) > 1:
        raise UsageError(f"price.batch: a factor of at most 1, got {given['batch']!r}", "half the price is 0.5")
    if given and not {"input", "output"} <= given.keys():
        raise UsageError("price: input and output are both needed", example)
    return Prices(**given) if given else None


@dataclass(frozen=True)
class Budget:
    """The most that may be spent on a step, over all its runs; None: no limit."""

    cost: float | None = None
    tokens: int | None = None

    def check(self, cost: float, tokens: float) -> None:
        """Raises RemoteError when so much is more than allowed."""
        for name, spent, limit in (("cost", cost, self.cost), ("tokens", tokens, self.tokens)):
            if limit is not None and spent > limit:
                raise RemoteError(
                    f"--max-{name} {limit:g} is reached: with the next request it would be about {spent:.6g}",
                    f"what was paid for is kept; run again with a higher --max-{name} to continue",
                )
