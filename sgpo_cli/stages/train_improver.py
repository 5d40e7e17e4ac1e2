"""train-improver: the policy learns to improve its own answers, and goes on answering. The result is M*."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from sgpo_cli import prompts
from sgpo_cli.batches import Row, derive_seed
from sgpo_cli.configs import TrainImproverConfig
from sgpo_cli.dataset import count_set_aside, read_dataset
from sgpo_cli.step import Step


def run(config: TrainImproverConfig, step: Step) -> None:
    rows, rejected, facts = examples(config)
    from sgpo_cli import training  # imports TRL; bad rows are refused before

    training.train(config, step, rows, rejected, facts)


def dry_run(config: TrainImproverConfig) -> Iterator[str]:
    """What the step would do and need."""
    rows, rejected, _ = examples(config)
    from sgpo_cli import training_plan  # imports TRL

    return training_plan.plan(config, rows, rejected)


def examples(config: TrainImproverConfig) -> tuple[list[Row], Counter[str], dict[str, Any]]:
    """What TRL is given, what was rejected, and facts for the manifest."""
    needs = ("prompt", "response", "target", *(["reference"] if config.replay_ratio else []))
    dataset = read_dataset(config, needs, config.model_name_or_path)
    rows = list(dataset)
    rows, unchanged = with_fewer_unchanged(rows, config)
    request = prompts.load(config.improver_prompt)
    improver = [_example(prompts.improve(row["prompt"], row["response"], request), row["target"]) for row in rows]
    replay = [_example(row["prompt"], row["reference"]) for row in replayed(rows, config)]
    facts = {"improver_prompt": request, "improver_rows": len(improver), "replay_rows": len(replay)}
    return improver + replay, count_set_aside(dataset) + Counter(unchanged=unchanged), facts


def with_fewer_unchanged(rows: list[Row], config: TrainImproverConfig) -> tuple[list[Row], int]:
    """The rows with at most `max_unchanged_share` of them unchanged, a seeded choice, and how many were dropped."""
    share = config.max_unchanged_share
    same = [place for place, row in enumerate(rows) if row["target"].strip() == row["response"].strip()]
    allowed = len(rows) if share is None else int(share / (1 - share) * (len(rows) - len(same)))
    if len(same) <= allowed:
        return rows, 0
    dice = random.Random(derive_seed(config.seed, "unchanged"))
    dropped = set(dice.sample(same, len(same) - allowed))
    return [row for place, row in enumerate(rows) if place not in dropped], len(dropped)


def replayed(rows: list[Row], config: TrainImproverConfig) -> list[Row]:
    """The rows whose reference is trained on as well, `replay_ratio` for each improver row, in seeded order."""
    count = round(config.replay_ratio * len(rows))
    dice = random.Random(derive_seed(config.seed, "replay"))
    whole, rest = divmod(count, len(rows))
    return rows * whole + dice.sample(rows, rest)


def _example(prompt: list[dict[str, str]], answer: str) -> Row:
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
