"""Who is compared: models that answer the prompts, in both roles, and files of answers.

The improver improves the model's own sampled answer, the one it would meet in gen-pairs.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sgpo_cli import prompts
from sgpo_cli.batches import Row
from sgpo_cli.configs import EvaluateConfig
from sgpo_cli.engines import Generation, LazyEngine, Sampling
from sgpo_cli.errors import UsageError
from sgpo_cli.generation import Lazy, Passes, seeds_for
from sgpo_cli.interchange import is_answer_file, read_answers
from sgpo_cli.readers.strict import printable
from sgpo_cli.remote.connect import open_generation

GIVEN = "policy_given"  # the one answer of a file


@dataclass(frozen=True)
class Contestant:
    """A model or a file of answers.

    Args:
        key: the name as it may stand in the name of a file.
        columns: the answers that compete, `<role>_<decoding>`.
        compared: the answers that those of others are compared with; of the baseline only.
        request: what asks its improver.
    """

    key: str
    name: str
    source: str
    is_file: bool
    columns: tuple[str, ...]
    compared: tuple[str, ...] = ()
    request: str = ""

    @property
    def judged(self) -> list[str]:
        """Columns that the judge looks at."""
        return [column for column in (*EvaluateConfig.ALL_ANSWERS, GIVEN) if column in (*self.columns, *self.compared)]

    @property
    def needed(self) -> list[str]:
        """Columns to make: an improver needs what it improves."""
        improves = any(column.startswith("improver") for column in self.judged)
        return [*(["policy_sampled"] if improves and "policy_sampled" not in self.judged else []), *self.judged]

    def pass_name(self, *parts: str) -> str:
        """A name for files, whatever the model is called."""
        return ".".join((self.key, *parts))

    def answer(self, passes: Passes, rows: Sequence[Row], config: EvaluateConfig) -> dict[str, Sequence[str]]:
        """A text per row, for each column."""
        if self.is_file:
            return {GIVEN: self.given(rows)}
        engine = open_generation(config, self.source)
        texts: dict[str, Sequence[str]] = {}
        for column in self.needed:
            temperature = config.temperature if column.endswith("sampled") else 0.0
            made = passes.generate(
                self.pass_name(column),
                engine,
                self._conversations(column, rows, texts),
                Sampling(config.max_new_tokens, temperature, config.top_p),
                seeds_for(rows, config.seed, self.name, *column.split("_")),
            )
            texts[column] = _texts(made)
        if isinstance(engine, LazyEngine):
            engine.unload()  # one model in memory at a time
        return texts

    def given(self, rows: Sequence[Row]) -> list[str]:
        """The file's answers. Raises UsageError when there are rows without one."""
        return read_answers(Path(self.source)).answers(rows)

    def _conversations(
        self, column: str, rows: Sequence[Row], texts: dict[str, Sequence[str]]
    ) -> Sequence[list[dict[str, str]]]:
        if column.startswith("policy"):
            return Lazy(len(rows), lambda place: rows[place]["prompt"])
        own = texts["policy_sampled"]
        return Lazy(len(rows), lambda place: prompts.improve(rows[place]["prompt"], own[place], self.request))


def _texts(made: Sequence[Generation]) -> Sequence[str]:
    return Lazy(len(made), lambda place: made[place].text)


def contestants(config: EvaluateConfig) -> list[Contestant]:
    """The models to compare, and the baseline if it is none of them.

    Raises:
        UsageError: two have the same name, or a file that is not one of answers.
    """
    sources = list(config.models)
    if config.baseline and config.baseline not in sources:
        sources.append(config.baseline)
    named = {_name(source): source for source in sources}
    if len(named) < len(sources):
        raise UsageError(f"models {', '.join(sources)}: two have the same name", "rename a directory")
    keys = {name: re.sub(r"[^A-Za-z0-9]", "_", name)[:40] for name in named}
    taken = Counter(keys.values())
    return [
        _contestant(keys[name] + (str(number) if taken[keys[name]] > 1 else ""), name, source, config)
        for number, (name, source) in enumerate(named.items())
    ]


def _name(source: str) -> str:
    return printable(read_answers(Path(source)).name)[:64] if is_answer_file(source) else Path(source).name


def _contestant(key: str, name: str, source: str, config: EvaluateConfig) -> Contestant:
    competes, is_baseline = source in config.models, source == config.baseline
    if is_answer_file(source):
        given = (GIVEN,)
        return Contestant(key, name, source, True, given if competes else (), given if is_baseline else ())
    columns = tuple(column for column in config.ALL_ANSWERS if column in config.answers)
    compared = tuple({column.replace("improver", "policy"): None for column in columns}) if is_baseline else ()
    request = prompts.improver_request(source, config.improver_prompt)
    return Contestant(key, name, source, False, columns if competes else (), compared, request)


def baseline_column(column: str, available: Sequence[str]) -> str:
    """Which of the baseline's answers one is compared with: the policy's, decoded the same way if there is one."""
    same = "policy_" + column.rpartition("_")[2]
    return same if same in available else GIVEN if GIVEN in available else available[0]
