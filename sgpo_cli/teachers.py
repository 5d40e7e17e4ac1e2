"""Teachers: rows with an answer and a reference in, improved answers out.

A teacher that is a language model gets the teacher's prompt through an engine; the others look at the row
itself. A stage cannot tell them apart.
"""

import random
from collections.abc import Sequence
from typing import Any, Protocol

from sgpo_cli import prompts
from sgpo_cli.engines import Engine, Generation, Sampling, open_engine
from sgpo_cli.errors import UsageError

Row = dict[str, Any]
KINDS = "demo, demo:JUNK_SHARE, reference, self, hf:PATH_OR_NAME"


class Teacher(Protocol):
    """Improves the `response` of rows that have `prompt`, `response` and `reference`."""

    def improve(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Generation]:
        """One improved answer per row, in order; one seed per row decides what is random in it."""
        ...


class ReferenceTeacher:
    """The reference answer is the target: no teacher at all."""

    def improve(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Generation]:
        return [Generation(row["reference"], "stop") for row in rows]


class DemoTeacher:
    """The demo world's rule, with a share of off-distribution junk."""

    def __init__(self, junk_share: float) -> None:
        self._junk_share = junk_share

    def improve(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Generation]:
        from sgpo_cli.demo.teacher import improve

        try:
            texts = [
                improve(
                    row["prompt"][-1]["content"],
                    row["response"],
                    row["reference"],
                    random.Random(seed),
                    self._junk_share,
                )
                for row, seed in zip(rows, seeds, strict=True)
            ]
        except ValueError as error:
            raise UsageError(
                f"teacher demo: {error}", "it only knows the demo world; name another --teacher"
            ) from None
        return [Generation(text, "stop") for text in texts]


class PromptedTeacher:
    """A language model that follows the teacher's instructions."""

    def __init__(self, engine: Engine, instructions: str, sampling: Sampling) -> None:
        self._engine, self._instructions, self._sampling = engine, instructions, sampling

    def improve(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Generation]:
        conversations = [
            prompts.teach(self._instructions, row["prompt"], row["response"], row["reference"]) for row in rows
        ]
        return self._engine.generate(conversations, self._sampling, seeds)


def check_teacher(spec: str) -> tuple[str, str]:
    """The kind and the argument of `kind:argument`.

    Raises:
        UsageError: no such teacher, or a wrong argument.
    """
    kind, colon, argument = spec.partition(":")
    if kind in ("reference", "self") and not colon:
        return kind, ""
    if kind == "hf" and argument:
        return kind, argument
    if kind == "demo":
        try:
            if not colon or 0 <= float(argument) <= 1:
                return kind, argument or "0.1"
        except ValueError:
            pass
        raise UsageError(f"teacher '{spec}': expected demo or demo:SHARE with a share of junk from 0 to 1")
    raise UsageError(f"no teacher '{spec}'", f"teachers: {KINDS}")


def open_teacher(
    spec: str,
    policy: Engine,
    instructions: str,
    sampling: Sampling,
    **settings: Any,
) -> Teacher:
    """The teacher named by `spec`.

    Args:
        policy: the engine of the policy, which `self` asks.
        sampling: how a language model decodes.
        settings: of the engine that `hf` opens.

    Raises:
        UsageError: no such teacher.
    """
    kind, argument = check_teacher(spec)
    if kind == "reference":
        return ReferenceTeacher()
    if kind == "demo":
        return DemoTeacher(float(argument))
    engine = policy if kind == "self" else open_engine("transformers", argument, **settings)
    return PromptedTeacher(engine, instructions, sampling)
