"""Runs a TRL trainer as a step: arguments, checks, resume, and a model that appears only when complete.

TRL's options are handed to TRL as they are. What is set here is set because the installed versions are
silently wrong or unusable otherwise; each line says why.
"""

import dataclasses
import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    get_peft_config,
    get_quantization_config,
)

from sgpo_cli import checkpoints, checks
from sgpo_cli.configs import TrainConfig
from sgpo_cli.errors import IncompleteError, UsageError
from sgpo_cli.loading import load_tokenizer, refusals, template_ids
from sgpo_cli.step import Step

logger = logging.getLogger(__name__)

Row = dict[str, Any]
LOG = "training_log.json"
TRAINERS: dict[str, tuple[type[SFTConfig | DPOConfig], type[SFTTrainer | DPOTrainer]]] = {
    "sft": (SFTConfig, SFTTrainer),
    "dpo": (DPOConfig, DPOTrainer),
}


def arguments(config: TrainConfig, output_dir: Path) -> tuple[SFTConfig | DPOConfig, ModelConfig]:
    """TRL's two configs from the step's options.

    Raises:
        UsageError: TRL refuses a value or a combination of values.
    """
    config_class, _ = TRAINERS[config.TRAINER]
    model_names = {field.name for field in dataclasses.fields(ModelConfig)}
    model_options = {name: value for name, value in config.trainer.items() if name in model_names}
    options = {name: value for name, value in config.trainer.items() if name not in model_names}
    on_cpu = not torch.cuda.is_available()
    defaults = {
        "use_cpu": on_cpu,  # TRL's bf16 default is refused on a machine without a GPU unless this is set
        "activation_checkpointing": not on_cpu,  # the old name, gradient_checkpointing, warns at every start
        "logging_first_step": True,  # the first loss proves the reference model
        "save_total_limit": 2,  # of checkpoints; each is three times the model
        "disable_tqdm": True,  # `LogProgress` speaks instead
    }
    if "gradient_checkpointing" in options:
        options.setdefault("activation_checkpointing", options.pop("gradient_checkpointing"))
    fixed = {
        "output_dir": str(output_dir),
        "seed": config.seed,
        "logging_nan_inf_filter": False,  # on, a NaN loss is logged as 0.0
    }
    with refusals("TRL"):
        return (
            config_class(**(defaults | options | fixed)),
            ModelConfig(model_name_or_path=config.model_name_or_path, **model_options),
        )


def train(
    config: TrainConfig,
    step: Step,
    rows: Sequence[Row],
    rejected: Mapping[str, int],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Train on `rows` and finish the step.

    Args:
        rows: prompt and completion (SFT) or prompt, chosen and rejected (DPO), each a list of messages.
            Only these columns reach TRL: others, such as `text` or `labels`, would change what it does.
        rejected: rows that the stage has dropped before, by reason.
        facts: more for the manifest.

    Raises:
        UsageError: options or data that cannot be trained on.
        IncompleteError: there are no rows.
        DivergedError: the loss is not finite, or the reference is not the start model.
    """
    if not rows:
        raise IncompleteError(f"{config.dataset}: no row is left to train on ({dict(rejected)})")
    if (Path(config.model_name_or_path) / "adapter_config.json").exists():
        raise UsageError(
            f"{config.model_name_or_path}: an adapter cannot be trained further yet",
            "merge it into its base model and start from the merged directory",
        )
    args, model_args = arguments(config, step.directory)
    tokenizer = _tokenizer(config)
    lengths = checks.check_lengths(
        [_lengths(tokenizer, row, config.chat_template_kwargs) for row in rows],
        args.max_length,
        config.max_truncated_share,
    )
    with step:
        with refusals(config.model_name_or_path):
            trainer, reference = _build(config, args, model_args, tokenizer, rows, step)
            trainer.get_train_dataloader()
        checks.show_examples(tokenizer, trainer.train_dataset)
        checkpoint = checkpoints.newest_whole(step.directory)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        outputs = _save(trainer, step)
        summary = _summary(trainer, lengths, reference)
        step.finish(outputs, {**_counts(lengths, rejected), "training": summary, **(facts or {})})
        trainer.end()  # type: ignore[no-untyped-call]


def _counts(lengths: checks.Lengths, rejected: Mapping[str, int]) -> dict[str, Any]:
    """The manifest's books: rows in, rows out, rejected by reason."""
    dropped = Counter(rejected) + Counter(too_long=lengths.dropped)
    return {
        "rows_in": lengths.rows + sum(rejected.values()),
        "rows_out": lengths.rows - lengths.dropped,
        "rejected": dict(sorted(dropped.items())),
    }


def _summary(
    trainer: SFTTrainer | DPOTrainer, lengths: checks.Lengths, reference: checks.CheckReference | None
) -> dict[str, Any]:
    """What the manifest says of the training itself."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = [int(entry["num_tokens"]) for entry in trainer.state.log_history if "num_tokens" in entry]
    summary = {
        "steps": trainer.state.global_step,
        "rows_cut": lengths.cut,
        "last_loss": losses[-1] if losses else None,
        "tokens": max(tokens, default=0),
    }
    return summary | ({"first_loss": reference.first_loss} if reference else {})


def _tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    if "chat_template_path" in config.trainer:  # TRL gives the tokenizer its template
        return AutoTokenizer.from_pretrained(config.model_name_or_path, trust_remote_code=False)
    return load_tokenizer(config.model_name_or_path)


def _build(
    config: TrainConfig,
    args: SFTConfig | DPOConfig,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    step: Step,
) -> tuple[SFTTrainer | DPOTrainer, checks.CheckReference | None]:
    """The trainer with its callbacks, and the check of the reference model if there is one."""
    given = args.model_init_kwargs
    args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "use_safetensors": True,
        **(given if isinstance(given, dict) else {}),
    }
    reference = checks.CheckReference(args.loss_type) if isinstance(args, DPOConfig) else None
    callbacks = [
        checks.StopOnNan(),
        checks.LogProgress(step.request.stage),
        checkpoints.SealCheckpoints(),
        *([reference] if reference else []),
    ]
    extra = {"chat_template_kwargs": config.chat_template_kwargs} if config.chat_template_kwargs else {}
    _, trainer_class = TRAINERS[config.TRAINER]
    trainer = trainer_class(
        model=config.model_name_or_path,
        args=args,  # type: ignore[arg-type]  # the pair in TRAINERS fits
        train_dataset=Dataset.from_list([{**row, **extra} for row in rows]),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # prints every log as a dict; `LogProgress` speaks instead
    return trainer, reference


def _lengths(tokenizer: PreTrainedTokenizerBase, row: Row, kwargs: dict[str, Any]) -> tuple[int, int]:
    """(tokens of the prompt, tokens of the longest prompt + answer)."""
    answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    prompt = template_ids(tokenizer, row["prompt"], prompt=True, **kwargs)
    totals = [len(template_ids(tokenizer, row["prompt"] + answer, prompt=False, **kwargs)) for answer in answers]
    return len(prompt), max(totals)


def _save(trainer: SFTTrainer | DPOTrainer, step: Step) -> list[str]:
    """Write the model beside the rest of the step by renaming complete files; returns their names."""
    temporary = step.directory / "model.tmp"
    # Trainers turn the cache off, and generation from a model saved that way crawls.
    trainer.model.config.use_cache = True  # type: ignore[union-attr]
    trainer.save_model(str(temporary))
    (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle has no place in a published model
    shutil.rmtree(temporary / "ref", ignore_errors=True)  # TRL's frozen copy of an adapter
    (temporary / LOG).write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", encoding="utf-8")
    (step.directory / "README.md").unlink(missing_ok=True)  # TRL's card names no base model for a local one
    names = sorted(path.name for path in temporary.iterdir())
    for name in names:
        (temporary / name).replace(step.directory / name)
    temporary.rmdir()
    return names
