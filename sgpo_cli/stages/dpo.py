"""dpo: the model learns to prefer its improvements; the reference is the frozen start model. The result is M1."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sgpo_cli import prompts
from sgpo_cli.artifacts import read_manifest
from sgpo_cli.batches import Row, derive_seed
from sgpo_cli.configs import DpoConfig
from sgpo_cli.dataset import count_set_aside, read_dataset
from sgpo_cli.errors import UsageError
from sgpo_cli.step import Step


def run(config: DpoConfig, step: Step) -> None:
    rows, rejected, facts = examples(config)
    from sgpo_cli import training  # imports TRL; bad rows are refused before

    training.train(config, step, rows, rejected, facts)


def dry_run(config: DpoConfig) -> Iterator[str]:
    """What the step would do and need."""
    rows, rejected, _ = examples(config)
    from sgpo_cli import training_plan  # imports TRL

    return training_plan.plan(config, rows, rejected)


def examples(config: DpoConfig) -> tuple[list[Row], Counter[str], dict[str, Any]]:
    """What TRL is given, what was rejected, and facts for the manifest."""
    rows = read_dataset(config, ("prompt", "chosen", "rejected"), config.model_name_or_path)
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    start = read_manifest(Path(config.model_name_or_path)) or {}
    facts = {"improver_prompt": start["improver_prompt"]} if "improver_prompt" in start else {}
    different = [pair for pair in pairs if _text(pair["chosen"]) != _text(pair["rejected"])]
    rejected = count_set_aside(rows) + Counter(identical=len(pairs) - len(different))
    if not config.improver_replay:
        return different, rejected, facts
    asked = improver_pairs(different, config, start.get("improver_prompt"))
    return different + asked, rejected, facts | {"improver_rows": len(asked)}


def improver_pairs(pairs: list[Row], config: DpoConfig, request: str | None) -> list[Row]:
    """A seeded share of the pairs as pairs of the improver: asked to improve the rejected answer, it has the same two
    to choose from.

    Args:
        request: what the start model was trained to answer as improver.

    Raises:
        UsageError: it was not trained as one.
    """
    if request is None:
        raise UsageError(
            f"--improver-replay: {config.model_name_or_path} has no improver_prompt in its manifest",
            "start from a model of train-improver, or from one that goes back to it; or leave the option out",
        )
    dice = random.Random(derive_seed(config.seed, "improver_replay"))
    picked = dice.sample(pairs, round((config.improver_replay or 0) * len(pairs)))
    return [{**pair, "prompt": prompts.improve(pair["prompt"], _text(pair["rejected"]), request)} for pair in picked]


def _text(messages: list[dict[str, str]]) -> str:
    return messages[0]["content"].strip()
