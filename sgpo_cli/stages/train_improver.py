"""train-improver: the policy learns to improve its own answers, and goes on answering. The result is M*."""

import random

from sgpo_cli import prompts
from sgpo_cli.batches import Row, derive_seed
from sgpo_cli.configs import TrainImproverConfig
from sgpo_cli.dataset import count_set_aside, read_dataset
from sgpo_cli.step import Step


def run(config: TrainImproverConfig, step: Step) -> None:
    needs = ("prompt", "response", "target", *(["reference"] if config.replay_ratio else []))
    dataset = read_dataset(config, needs, config.model_name_or_path)
    rows = list(dataset)
    from sgpo_cli import training  # imports TRL; bad rows are refused before

    request = prompts.load(config.improver_prompt)
    improver = [_example(prompts.improve(row["prompt"], row["response"], request), row["target"]) for row in rows]
    replay = [_example(row["prompt"], row["reference"]) for row in replayed(rows, config)]
    facts = {"improver_prompt": request, "improver_rows": len(improver), "replay_rows": len(replay)}
    training.train(config, step, improver + replay, count_set_aside(dataset), facts)


def replayed(rows: list[Row], config: TrainImproverConfig) -> list[Row]:
    """The rows whose reference is trained on as well, `replay_ratio` for each improver row, in seeded order."""
    count = round(config.replay_ratio * len(rows))
    dice = random.Random(derive_seed(config.seed, "replay"))
    whole, rest = divmod(count, len(rows))
    return rows * whole + dice.sample(rows, rest)


def _example(prompt: list[dict[str, str]], answer: str) -> Row:
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
