"""Rounds of a recipe: steps whose name holds `{round}` are repeated, once for each round.

    rounds: 3
    steps:
      pairs-{round}: {stage: gen-pairs, policy: "./m{previous}", dataset: ./world/prompts, part: "{round}/{rounds}"}
      m{round}: {stage: dpo, model_name_or_path: "./m{previous}", dataset: ["./pairs-{all}"]}

Steps of that kind that follow each other are one block: all of them for round 1, then all for round 2. In their
options `{round}` is the round's number, `{previous}` the one before (0 in round 1) and `{rounds}` how many there are.
An item of a list with `{all}` becomes one item for each round so far, in a step outside of the block for all rounds;
in round 1, an item `./x-{previous}` is left out unless there is a step `x-0`. What comes out are plain steps.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sgpo_cli.errors import UsageError

MOST = 100
ROUND, ALL, PREVIOUS = "{round}", "{all}", "{previous}"
OF_A_ROUND = re.compile(r"\{(round|previous)\}")


@dataclass(frozen=True)
class Written:
    """A step as a recipe would have it without rounds. `key` is what its recipe says, for messages."""

    name: Any
    key: str
    options: Any


@dataclass(frozen=True)
class Place:
    """Where placeholders are replaced: in a step of a round, or (`number` is None) outside of the rounds."""

    number: int | None
    rounds: int
    names: frozenset[str]
    where: str

    def value(self, value: Any) -> Any:
        """The value with its placeholders replaced.

        Raises:
            UsageError: a placeholder that means nothing here.
        """
        if isinstance(value, dict):
            return {key: self.value(each) for key, each in value.items()}
        if isinstance(value, list):
            return [item for each in value for item in self._items(each)]
        if not isinstance(value, str):
            return value
        if ALL in value:
            raise UsageError(f"{self.where}: {value}: {{all}} belongs in an item of a list", f'write ["{value}"]')
        if self.number is None and (found := OF_A_ROUND.search(value)):
            raise UsageError(
                f"{self.where}: {value}: {found[0]} means nothing outside of the rounds",
                "put {round} into the step's name, or use {all} in a list",
            )
        return self._replaced(value)

    def _items(self, item: Any) -> Iterator[Any]:
        """What an item of a list becomes: one value, one for each round, or none."""
        if not isinstance(item, str):
            yield self.value(item)
        elif ALL in item:
            for number in range(1, (self.number or self.rounds) + 1):
                yield self.value(item.replace(ALL, str(number)))
        elif not self._is_before_the_first(item):
            yield self.value(item)

    def _is_before_the_first(self, item: str) -> bool:
        step = self._replaced(item).removeprefix("./").split("/")[0]
        return self.number == 1 and item.startswith("./") and PREVIOUS in item and step not in self.names

    def _replaced(self, text: str) -> str:
        number = self.number or 0
        values = {ROUND: number, PREVIOUS: number - 1, "{rounds}": self.rounds}
        for placeholder, value in values.items():
            text = text.replace(placeholder, str(value))
        return text


def expand(steps: Mapping[Any, Any], rounds: object, where: str) -> Iterator[Written]:
    """The steps of a recipe with those of the rounds repeated, in the order of work.

    Args:
        rounds: the recipe's key `rounds`, None when it has none.
        where: the recipe's file, for messages.

    Raises:
        UsageError: `rounds` is no number of rounds or there is nothing to repeat, a name comes out twice, or a
            placeholder means nothing where it stands.
    """
    repeated = [key for key in steps if _is_repeated(key)]
    if rounds is None and repeated:
        raise UsageError(f"{where}: steps.{repeated[0]}: how many rounds?", "for example, beside run_dir: rounds: 4")
    if rounds is None:
        yield from (Written(name, str(name), options) for name, options in steps.items())
        return
    if not isinstance(rounds, int) or isinstance(rounds, bool) or not 1 <= rounds <= MOST:
        raise UsageError(f"{where}: key 'rounds': expected a number from 1 to {MOST}, got {rounds!r}")
    if not repeated:
        raise UsageError(f"{where}: key 'rounds': no step is repeated", "name steps like m{round} and pairs-{round}")
    names: set[str] = set()
    for in_rounds, block in groupby(steps, _is_repeated):
        keys = list(block)
        for number in range(1, rounds + 1) if in_rounds else [None]:
            for key in keys:
                written = _written(key, steps[key], number, rounds, frozenset(names), where)
                if written.name in names:
                    raise UsageError(f"{where}: steps.{written.key}: there is a step {written.name} already")
                names.add(written.name)
                yield written


def _is_repeated(key: Any) -> bool:
    return ROUND in str(key)


def _written(key: Any, options: Any, number: int | None, rounds: int, names: frozenset[str], where: str) -> Written:
    shown = str(key) if number is None else f"{key} (round {number})"
    place = Place(number, rounds, names, f"{where}: steps.{shown}")
    name = key if number is None else key.replace(ROUND, str(number))
    return Written(name, shown, place.value(options))
