"""Functions that score answers: the demo world's rule, a user's own, a reward model."""

import importlib
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sgpo_cli.batches import Row
from sgpo_cli.control_tokens import defused
from sgpo_cli.dataset import model_tokens
from sgpo_cli.errors import UsageError

ScoreFunction = Callable[[Sequence[Row]], list[float | None]]
"""Rows with `id`, `prompt` and `response` in, a number each out; None for no valid verdict."""


def open_function(spec: str, rows: Sequence[Row], settings: dict[str, Any]) -> Callable[[], ScoreFunction]:
    """What opens the function that a judge's name stands for; loads no model yet.

    Args:
        rows: those to be judged about, so that a prompt which the demo's rule cannot read is refused before any work.
        settings: `dtype` and `chat_template_kwargs` of a reward model.

    Raises:
        UsageError: no such judge, or none that scores by itself.
    """
    kind, _, argument = spec.partition(":")
    if not (spec == "demo" or (kind and argument and kind not in ("demo", "hf", "openai"))):
        raise UsageError(f"no judge '{spec}' here", "judges: demo, reward:PATH_OR_NAME, MODULE:FUNCTION")
    if kind == "reward":
        return lambda: reward_model(argument, model_tokens(argument), settings)
    function = demo_rule(rows) if kind == "demo" else users_function(spec)
    return lambda: function


def demo_rule(rows: Iterable[Row]) -> ScoreFunction:
    """The demo world's rule, 0..1.

    Raises:
        UsageError: a prompt is not of the demo world.
    """
    from sgpo_cli.demo.scorer import score

    def judged(row: Row, response: str) -> float:
        try:
            return score(row["prompt"][-1]["content"], response)
        except ValueError as error:
            raise UsageError(f"row {row['id']}: {error}", "the judge demo only knows the demo world") from None

    for row in rows:
        judged(row, "")
    return lambda batch: [judged(row, row["response"]) for row in batch]


def users_function(spec: str) -> ScoreFunction:
    """`module:function` of the user's own, from the working directory or installed.

    It is called with the prompt (a text, or the list of messages where there is more than one) and the answer,
    and gives a number, or None where it cannot tell.

    Raises:
        UsageError: it is not there, does not load, raises, or gives something else.
    """
    module_name, _, name = spec.partition(":")
    function = getattr(_imported(module_name, spec), name, None)
    if not callable(function):
        raise UsageError(f"judge {spec}: {module_name} has no function {name}")

    def score(row: Row) -> float | None:
        prompt = row["prompt"][0]["content"] if len(row["prompt"]) == 1 else row["prompt"]
        try:
            value = function(prompt, row["response"])
        except Exception as error:  # whatever the user's code raises
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            raise UsageError(
                f"judge {spec}: row {row['id']}: {type(error).__name__}: {error} ({where})", "--debug shows all of it"
            ) from error
        return _number(value, f"judge {spec}: row {row['id']}")

    return lambda batch: [score(row) for row in batch]


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{where}: gave {value!r}", "a judge gives a finite number, or None where it cannot tell")
    return number


def _imported(module: str, spec: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)  # the console script does not look there, `python -m` does
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] and error.name != module:
            raise UsageError(f"judge {spec}: it needs the module {error.name}", f"pip install {error.name}") from error
        raise UsageError(
            f"no judge '{spec}': no module {module} in {here}",
            "judges: demo, hf:PATH_OR_NAME, openai:MODEL, reward:PATH_OR_NAME, MODULE:FUNCTION",
        ) from None
    except Exception as error:  # the user's code, while it is loaded; --debug shows where
        raise UsageError(f"judge {spec}: {module} does not load: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)


def reward_model(model: str, tokens: Sequence[str], settings: dict[str, Any]) -> ScoreFunction:
    """A reward model's number; `tokens` are its control tokens. Raises UsageError as `reward.RewardModel` does."""
    from sgpo_cli.reward import RewardModel

    scorer = RewardModel(model, **settings)

    def score(rows: Sequence[Row]) -> list[float | None]:
        asked = [[{**turn, "content": defused(turn["content"], tokens)} for turn in row["prompt"]] for row in rows]
        return scorer.score(asked, [defused(row["response"], tokens) for row in rows])

    return score
