"""Teachers: rows with a response and a reference in, improved answers out.

A teacher that is a language model gets the teacher's prompt through an engine; the others look at the row
itself. A stage cannot tell them apart.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sgpo_cli import prompts
from sgpo_cli.configs import MakeTargetsConfig
from sgpo_cli.engines import Engine, Generation, LazyEngine, Sampling, open_engine
from sgpo_cli.engines.base import AsksServer, Message
from sgpo_cli.errors import UsageError
from sgpo_cli.generation import Lazy, Passes, seeds_for

Row = dict[str, Any]
KINDS = "openai:MODEL, hf:PATH_OR_NAME, self, reference, demo, demo:JUNK_SHARE"


class Teacher(Protocol):
    """Improves the `response` of rows that have `prompt`, `response` and `reference`."""

    def improve(self, passes: Passes, rows: Sequence[Row]) -> Sequence[Generation]:
        """One improved answer per row, in order."""
        ...


class RuleTeacher:
    """A function of a row and its seed."""

    def __init__(self, rule: Callable[[Row, int], str], seed: int) -> None:
        self._rule, self._seed = rule, seed

    def improve(self, passes: Passes, rows: Sequence[Row]) -> Sequence[Generation]:
        seeds = seeds_for(rows, self._seed, "teacher")
        return Lazy(len(rows), lambda place: Generation(self._rule(rows[place], seeds[place]), "stop"))


class PromptedTeacher:
    """A language model that follows the teacher's instructions."""

    def __init__(self, engine: Engine | AsksServer, config: MakeTargetsConfig) -> None:
        self.engine = engine
        self.sampling = Sampling(config.teacher_max_new_tokens, config.teacher_temperature)
        self._instructions = prompts.load(config.teacher_prompt)
        self._seed = config.seed

    def improve(self, passes: Passes, rows: Sequence[Row]) -> Sequence[Generation]:
        return passes.generate("teacher", self.engine, self.conversations(rows), self.sampling, self.seeds(rows))

    def conversations(self, rows: Sequence[Row]) -> Sequence[list[Message]]:
        """What the teacher is asked, per row."""
        return Lazy(len(rows), lambda place: self._conversation(rows[place]))

    def seeds(self, rows: Sequence[Row]) -> Sequence[int]:
        return seeds_for(rows, self._seed, "teacher")

    def _conversation(self, row: Row) -> list[Message]:
        return prompts.teach(self._instructions, row["prompt"], row["response"], row["reference"])


def check_teacher(spec: str) -> tuple[str, str]:
    """The kind and the argument of `kind:argument`.

    Raises:
        UsageError: no such teacher, or a wrong argument.
    """
    kind, colon, argument = spec.partition(":")
    if kind in ("reference", "self") and not colon:
        return kind, ""
    if kind in ("hf", "openai") and argument:
        return kind, argument
    if kind == "demo":
        try:
            if not colon or 0 <= float(argument) <= 1:
                return kind, argument or "0.1"
        except ValueError:
            pass
        raise UsageError(f"teacher '{spec}': expected demo or demo:SHARE with a share of junk from 0 to 1")
    raise UsageError(f"no teacher '{spec}'", f"teachers: {KINDS}")


def open_teacher(config: MakeTargetsConfig, policy: Engine | AsksServer, sample: Row) -> Teacher:
    """The teacher that a stage asks for; loads and sends nothing yet.

    Args:
        policy: the engine of the policy, which `self` asks.
        sample: a row, so that a data set which the teacher cannot read is refused before any work.

    Raises:
        UsageError: no such teacher, or it cannot be asked.
    """
    kind, argument = check_teacher(config.teacher)
    if kind == "reference":
        return RuleTeacher(lambda row, seed: str(row["reference"]), config.seed)
    if kind == "demo":
        return RuleTeacher(_demo_rule(float(argument), sample), config.seed)
    if kind == "openai":
        from sgpo_cli.remote.connect import connect

        key = config.teacher_api_key_env, config.teacher_api_key_file
        return PromptedTeacher(connect(config, argument, config.teacher_base_url, *key), config)
    settings: dict[str, Any] = {"dtype": config.dtype, "chat_template_kwargs": config.chat_template_kwargs}
    local = LazyEngine(lambda: open_engine("transformers", argument, **settings))
    return PromptedTeacher(policy if kind == "self" else local, config)


def _demo_rule(junk_share: float, sample: Row) -> Callable[[Row, int], str]:
    """The demo world's rule, with a share of off-distribution junk."""
    from sgpo_cli.demo.teacher import improve

    def rule(row: Row, seed: int) -> str:
        prompt = row["prompt"][-1]["content"]
        try:
            return improve(prompt, row["response"], row["reference"], random.Random(seed), junk_share)
        except ValueError as error:
            raise UsageError(
                f"teacher demo: {error}", "it only knows the demo world; name another --teacher"
            ) from None

    rule({**sample, "response": sample["reference"]}, 0)
    return rule
