"""sft: a base model learns to answer from prompts with a reference answer. The result is M0."""

from sgpo_cli.configs import SftConfig
from sgpo_cli.dataset import count_set_aside, read_dataset
from sgpo_cli.step import Step


def run(config: SftConfig, step: Step) -> None:
    rows = read_dataset(config, ("prompt", "reference"), config.model_name_or_path)
    from sgpo_cli import training  # imports TRL; bad rows are refused before

    examples = [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["reference"]}]} for row in rows
    ]
    training.train(config, step, examples, count_set_aside(rows))
