"""The README of a trained model: what it comes from, on which data, how it went, and whom to cite."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgpo_cli import learning_curves
from sgpo_cli.artifacts import read_manifest, step_of, versions, write_atomically
from sgpo_cli.options import TrainConfig

CITATION = """\
```bibtex
@article{sgpo2025,
  title  = {SGPO: Self-Generated Preference Optimization based on Self-Improver},
  journal = {arXiv preprint arXiv:2507.20181},
  year   = {2025}
}
```"""
SHOWN = ("learning_rate", "num_train_epochs", "beta", "loss_type", "lora_r", "max_length")


def lineage(config: TrainConfig, stage: str, method: str, args: Any, rows: int) -> list[dict[str, Any]]:
    """The training steps that led to a model, the last of them this one; goes on from step to step.

    Args:
        args: TRL's arguments, with the defaults that act.
        rows: rows trained on.
    """
    before = _manifest(config.model_name_or_path).get("lineage", [])
    made = [_manifest(source) for source in config.datasets]
    settings = {name: getattr(args, name, config.trainer.get(name)) for name in SHOWN}
    return [
        *before,
        {
            "stage": stage,
            "start": _name(config.model_name_or_path),
            "start_on_hub": not Path(config.model_name_or_path).exists(),
            "data": " + ".join(map(_name, config.datasets)),
            "made_by": _made_by(made) if all(made) else {},
            "rows": rows,
            "method": method,
            "settings": {name: value for name, value in settings.items() if value is not None},
            "seed": config.seed,
        },
    ]


def _made_by(made: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The stage that made the data, and its rows in and out; of several data sets, their sums."""
    stages = {"stage": ", ".join(dict.fromkeys(data["stage"] for data in made))}
    counts = (key for key in ("rows_in", "rows_out") if all(key in data for data in made))
    return stages | {key: sum(data[key] for data in made) for key in counts}


def _manifest(source: str) -> dict[str, Any]:
    step = step_of(Path(source))
    return (read_manifest(step) or {}) if step else {}


def _name(source: str) -> str:
    """A Hub name as it is; of a path only its end, since a card is read elsewhere."""
    path = Path(source)
    return "/".join(path.parts[-2:]) if path.exists() else source


def write(
    directory: Path, steps: Sequence[Mapping[str, Any]], training: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Write the card and the learning curves beside the model; returns their names.

    Args:
        log: the trainer's log history.
    """
    picture = learning_curves.picture(directory.name, log)
    if picture:
        write_atomically(directory / learning_curves.NAME, picture)
    card = text(directory.name, steps, training, learning_curves.NAME if picture else "")
    write_atomically(directory / "README.md", card)
    return ["README.md", *([learning_curves.NAME] if picture else [])]


def text(name: str, steps: Sequence[Mapping[str, Any]], training: Mapping[str, Any], picture: str = "") -> str:
    """The card, in Markdown with the Hub's front matter.

    No scores: they are measured later, by steps of their own, and a finished step's files do not change.

    Args:
        steps: the lineage.
        training: of the manifest, with its books as `rows`.
        picture: file name of the learning curves.
    """
    base = str(steps[0]["start"])
    head: dict[str, Any] = {"library_name": "transformers" if training["method"] == "full" else "peft"}
    if steps[0]["start_on_hub"]:  # the Hub refuses a base model that it does not have
        head["base_model"] = base
    head["tags"] = ["sgpo", "trl", str(steps[-1]["stage"])]
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    parts = [
        f"---\n{front}\n---",
        f"# {name}",
        f"Trained from `{base}` with sgpo: a model learns to improve its own answers, and DPO on its answers and its "
        "improvements makes it better.",
        "## How it was made\n\n" + _table(steps),
        "## Training\n\n" + _facts(training) + (f"\n\n![Learning curves]({picture})" if picture else ""),
        "## Versions\n\n" + ", ".join(f"{package} {version}" for package, version in versions().items()),
        "## Citation\n\n" + CITATION,
    ]
    return "\n\n".join(parts) + "\n"


def _table(steps: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| step | starts from | data | rows | method | settings |", "|---|---|---|---|---|---|"]
    for step in steps:
        made = step["made_by"]
        rows = f" ({made['stage']}: {made['rows_out']} of {made['rows_in']} rows)" if "rows_in" in made else ""
        settings = ", ".join(f"{name} {value}" for name, value in step["settings"].items())
        cells = (step["stage"], step["start"], f"{step['data']}{rows}", step["rows"], step["method"], settings)
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _facts(training: Mapping[str, Any]) -> str:
    """Only what a run that was stopped and continued knows as well as one that was not."""
    books = training["rows"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in books["rejected"].items())
    lines = [
        f"- {books['rows_out']} of {books['rows_in']} rows" + (f" (dropped: {dropped})" if dropped else ""),
        f"- {training['steps']} optimizer steps",
    ]
    if training.get("last_loss") is not None:
        lines.append(f"- last loss: {training['last_loss']:.4f}")
    if look := training.get("smoke"):
        lines.append(
            f"- of {look['prompts']} greedy answers to prompts of the training data, {look['stopped']} ended by "
            f"themselves and {look['repetitive']} were repetitive"
        )
    return "\n".join(lines)
