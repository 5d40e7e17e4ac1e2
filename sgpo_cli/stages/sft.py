"""sft: a base model learns to answer from prompts with a reference answer. The result is M0."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from sgpo_cli.batches import Row
from sgpo_cli.configs import SftConfig
from sgpo_cli.dataset import count_set_aside, read_dataset
from sgpo_cli.step import Step


def run(config: SftConfig, step: Step) -> None:
    rows, rejected, facts = examples(config)
    from sgpo_cli import training  # imports TRL; bad rows are refused before

    training.train(config, step, rows, rejected, facts)


def dry_run(config: SftConfig) -> Iterator[str]:
    """What the step would do and need."""
    rows, rejected, _ = examples(config)
    from sgpo_cli import training_plan  # imports TRL

    return training_plan.plan(config, rows, rejected)


def examples(config: SftConfig) -> tuple[list[Row], Counter[str], dict[str, Any]]:
    """What TRL is given, what was rejected, and facts for the manifest."""
    rows = read_dataset(config, ("prompt", "reference"), config.model_name_or_path)
    made = [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["reference"]}]} for row in rows
    ]
    return made, count_set_aside(rows), {}
