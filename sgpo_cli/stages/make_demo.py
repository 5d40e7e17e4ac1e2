"""make-demo: the embedded world, made on the spot: data, and a tiny model that has learned nothing yet."""

import shutil
from typing import Any

from sgpo_cli import prompts
from sgpo_cli.artifacts import write_lines
from sgpo_cli.batches import Row
from sgpo_cli.configs import MakeDemoConfig
from sgpo_cli.errors import UsageError
from sgpo_cli.step import Step


def corpus(splits: dict[str, list[Row]]) -> list[str]:
    """The texts that the tokenizer is made from: all messages, and the improver's request as often."""
    texts = [
        turn["content"]
        for rows in splits.values()
        for row in rows
        for turn in (*row["prompt"], *row.get("completion", []))
    ]
    return texts + [prompts.load("improver")] * len(texts)


def run(config: MakeDemoConfig, step: Step) -> None:
    """Write `sft/`, `prompts/`, `heldout/` and perhaps `labelled/` (rows), and `base/` (model and tokenizer)."""
    from sgpo_cli.demo import model, world

    sizes = {"sft": config.num_sft, "prompts": config.num_prompts, "heldout": config.num_heldout}
    splits = world.make_splits(config.seed, sizes)
    texts = corpus(splits)  # without the labelled pairs: the model is the same with and without them
    if config.num_labelled:
        splits["labelled"] = _labelled(splits["sft"], config.seed, config.num_labelled)
    with step:
        for name, rows in splits.items():
            (step.directory / name).mkdir(exist_ok=True)
            write_lines(step.directory / name / "train.jsonl", rows)
        base = step.directory / "base"
        shutil.rmtree(base, ignore_errors=True)
        model.build_base(base, texts, config.seed)
        made = [path for name in (*splits, "base") for path in (step.directory / name).iterdir()]
        rows_out = sum(map(len, splits.values()))
        counts: dict[str, Any] = {"rows_in": rows_out, "rows_out": rows_out, "rejected": {}}
        step.finish([str(path.relative_to(step.directory)) for path in made if path.is_file()], counts)


def _labelled(rows: list[Row], seed: int, count: int) -> list[Row]:
    from sgpo_cli.demo import world

    try:
        return world.labelled_pairs(rows, seed, count)
    except ValueError as error:
        raise UsageError(f"num_labelled: {error}", "raise num_sft") from None
