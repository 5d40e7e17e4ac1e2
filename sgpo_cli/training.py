"""Runs a TRL trainer as a step: checks, resume, and a model that appears only when complete.

TRL's options are handed to TRL as they are (`trainer_options.py`). Every process of a launch runs this; the main
one locks and writes the step.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import DPOConfig, DPOTrainer, ModelConfig, SFTTrainer

from sgpo_cli import checkpoints, checks, launch, model_card, row_checks, saving, smoke, trainer_options
from sgpo_cli.configs import DpoConfig
from sgpo_cli.errors import IncompleteError, UsageError
from sgpo_cli.loading import end_tokens, generation_config, refusals
from sgpo_cli.options import TrainConfig
from sgpo_cli.row_checks import Lengths, RowTokens
from sgpo_cli.row_order import GlobalDPOTrainer, GlobalSFTTrainer, GroupedDPOTrainer, GroupedSFTTrainer
from sgpo_cli.start_model import HALF, Method, StartModel
from sgpo_cli.step import Step
from sgpo_cli.trainer_options import Arguments

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Trainer = SFTTrainer | DPOTrainer
CACHE = "cache"  # in the step's directory, until it is done


@dataclass(frozen=True)
class Job:
    """What is trained, from what, and how.

    `counting` is the tokenizer as TRL will have changed it, `ends` the tokens that end a turn, `reference` DPO's
    reference if it is another model than `start`.
    """

    config: TrainConfig
    args: Arguments
    model_args: ModelConfig
    start: StartModel
    method: Method
    tokenizer: PreTrainedTokenizerBase
    counting: PreTrainedTokenizerBase
    ends: list[int]
    reference: StartModel | None = None


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
        Terminated: SIGTERM came; a checkpoint was saved.
    """
    if not rows:
        raise IncompleteError(f"{', '.join(config.datasets)}: no row is left to train on ({dict(rejected)})")
    launch.use_all_gpus()
    job = prepare(config, step.directory)
    tokens = list(row_checks.tokenize(job.counting, rows, job.ends, config.chat_template_kwargs))
    lengths, found = check(job, tokens)
    with step if launch.is_main() else nullcontext():
        launch.wait()  # until the main process holds the lock
        try:
            with refusals(config.model_name_or_path):
                trainer, reference = build(job, rows, tokens, step)
                trainer.get_train_dataloader()
        except UsageError:
            shutil.rmtree(step.directory / CACHE, ignore_errors=True)  # refused: nothing shall be left
            raise
        fit(trainer, step.directory)
        names = save(job, trainer, step.directory)
        found |= _summary(trainer, lengths, reference) | _look(job, trainer, rows, tokens)
        if launch.is_main():
            _finish(job, trainer, step, names, {**_counts(lengths, rejected), "training": found, **(facts or {})})
        # Together: gloo (torch 2.13) can wait for itself for ever when it is taken down right after a collective.
        launch.wait()
        trainer.end()  # type: ignore[no-untyped-call]


def _finish(job: Job, trainer: Trainer, step: Step, names: list[str], facts: dict[str, Any]) -> None:
    """Card, manifest, and the Hub if it is asked for; by the main process."""
    history = model_card.lineage(job.config, step.request.stage, job.method.name, job.args, facts["rows_out"])
    books = {name: facts[name] for name in ("rows_in", "rows_out", "rejected")}
    names = names + model_card.write(
        step.directory, history, facts["training"] | {"rows": books}, trainer.state.log_history
    )
    step.finish(names, facts | {"lineage": history})
    shutil.rmtree(step.directory / CACHE, ignore_errors=True)
    if job.config.trainer.get("push_to_hub"):
        saving.push(trainer.args, step.directory, names)


def prepare(config: TrainConfig, directory: Path) -> Job:
    """Everything that can be known and refused before data are tokenized and weights loaded."""
    args, model_args = trainer_options.arguments(config, directory)
    start = StartModel.find(config.model_name_or_path, model_args.model_revision)
    method = Method.of(model_args, start, bf16=bool(args.bf16), chosen_dtype="dtype" in config.trainer)
    method.refuse_other_shape(start, config.trainer)
    launch.refuse_bad_states(args, method.name)
    tokenizer, counting = trainer_options.tokenizers(config)
    return Job(
        config,
        args,
        model_args,
        start,
        method,
        tokenizer,
        counting,
        end_tokens(generation_config(start.base), counting),
        _other_reference(config, method, counting),
    )


def _other_reference(config: TrainConfig, method: Method, tokenizer: PreTrainedTokenizerBase) -> StartModel | None:
    name = config.ref_model if isinstance(config, DpoConfig) else None
    if name in (None, config.model_name_or_path):
        return None
    reference = StartModel.find(str(name))
    reference.refuse_as_reference(method, tokenizer.get_vocab())
    return reference


def check(job: Job, tokens: Sequence[RowTokens]) -> tuple[Lengths, dict[str, Any]]:
    """The checks of the rows; what the manifest says of them."""
    name = job.config.model_name_or_path
    row_checks.check_beginnings(tokens, job.counting, name)
    ended = row_checks.check_ends(tokens, job.counting.convert_ids_to_tokens(job.ends), name)
    lengths = row_checks.check_lengths(tokens, job.args.max_length, job.config.max_truncated_share)
    return lengths, {"method": job.method.name, "ended_share": round(ended, 4)}


def build(
    job: Job, rows: Sequence[Row], tokens: Sequence[RowTokens], step: Step
) -> tuple[Trainer, checks.CheckReference | None]:
    """The trainer with its callbacks, and the check of the reference model if there is one."""
    args = job.args
    reference = None
    if isinstance(args, DPOConfig):
        half = bool(args.bf16 or args.fp16 or args.tf32) or job.method.dtype != torch.float32
        rounded = half and args.precompute_ref_log_probs  # otherwise both come from the same batches
        reference = checks.CheckReference(args.loss_type, args.beta, rounded=rounded, other=job.reference is not None)
    models = _models(job)
    trainer = _trainer_class(job)(
        **models,
        args=args,  # type: ignore[arg-type]
        train_dataset=_dataset(job, rows, tokens, step.directory),
        processing_class=job.tokenizer,
        callbacks=[
            checks.StopOnNan(),
            checks.LogProgress(step.request.stage),
            checkpoints.SealCheckpoints(),
            checkpoints.SaveWhenTerminated(),
            checkpoints.LogBeforeSave(),
            *([reference] if reference else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)  # prints every log as a dict; `LogProgress` speaks instead
    row_checks.show_examples(job.tokenizer, trainer.train_dataset)
    return trainer, reference


def _trainer_class(job: Job) -> type[Trainer]:
    """TRL's trainer, with an order of rows that is right for several processes and for a run that continues."""
    together = job.config.global_batch_size is not None or launch.world_size() > 1
    if job.config.TRAINER == "sft":
        return GlobalSFTTrainer if together else GroupedSFTTrainer
    if together:
        return GlobalDPOTrainer
    return GroupedDPOTrainer if job.args.train_sampling_strategy == "group_by_length" else DPOTrainer


def _dataset(job: Job, rows: Sequence[Row], tokens: Sequence[RowTokens], directory: Path) -> Dataset:
    kwargs = job.config.chat_template_kwargs
    extra: Row = {"chat_template_kwargs": kwargs} if kwargs else {}
    if not isinstance(job.args, DPOConfig):
        return Dataset.from_list([{**row, **extra} for row in rows])
    # TRL's preference rows have no column that `group_by_length` could measure.
    pairs = [{**row, **extra, "length": each.total} for row, each in zip(rows, tokens, strict=True)]
    if not job.args.precompute_ref_log_probs:
        return Dataset.from_list(pairs)
    return _on_disk(pairs, directory / CACHE)


def _on_disk(pairs: list[Row], cache: Path) -> Dataset:
    """The pairs as a data set in a directory, where TRL keeps the reference's log-probabilities beside them.

    In memory they would be computed again by a run that continues, and several processes would crash, as each has
    temporary files of its own.
    """
    if launch.is_main() and not cache.exists():
        temporary = cache.with_name(CACHE + ".tmp")
        Dataset.from_list(pairs).save_to_disk(temporary)
        temporary.replace(cache)
    launch.wait()
    return load_from_disk(cache)


def _models(job: Job) -> dict[str, Any]:
    """The trainer's arguments that hold models: what is trained, and the frozen reference if it is not implied."""
    start, method, args = job.start, job.method, job.args
    given = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    kwargs = {"attn_implementation": job.model_args.attn_implementation, **given}
    logger.info("%s: %s training, weights in %s", job.config.model_name_or_path, method.name, method.dtype)
    frozen = {"ref_model": job.reference.load_reference(method, **kwargs)} if job.reference else {}
    if start.adapter is None:
        args.model_init_kwargs = {
            "dtype": str(method.dtype).removeprefix("torch."),
            "revision": start.revision,
            "use_safetensors": True,
            **kwargs,
        }
        trained = {"model": start.base, "quantization_config": method.quantization, "peft_config": method.adapter}
        return trained | frozen
    args.model_init_kwargs = None
    if method.name != "full":  # TRL keeps a frozen copy of the adapter as the reference
        adapted = start.load_adapted(start.load(method.dtype, method.quantization, **kwargs), trainable=True)
        return {"model": adapted} | frozen
    models = {"model": start.load_merged(method.dtype, **kwargs)} | frozen
    if isinstance(args, DPOConfig) and not frozen:  # TRL would load the base model without the adapter
        models["ref_model"] = start.load_merged(method.dtype, **kwargs)
    return models


def fit(trainer: Trainer, directory: Path) -> None:
    """Train from the start, or from the newest whole checkpoint."""
    found = checkpoints.newest_whole(directory) if launch.is_main() else None
    checkpoint = launch.agreed(found)
    if checkpoint:
        trainer._total_train_tokens = checkpoints.tokens_trained_on(checkpoint)  # TRL (1.16) would count from 0
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def save(job: Job, trainer: Trainer, directory: Path) -> list[str]:
    """Write the model beside the rest of the step by renaming complete files; returns their names."""
    temporary = directory / "model.tmp"
    half = job.method.name == "full" and job.start.dtype in HALF
    saving.write_model(trainer, temporary, job.start.dtype if half else None)
    if not launch.is_main():
        return []
    if not trainer_options.changes_tokenizer(job.config):
        saving.keep_tokenizer(job.config.model_name_or_path, temporary, job.start.revision)
    (temporary / "README.md").unlink(missing_ok=True)  # PEFT's card, of empty sections; ours comes last
    return saving.reveal(temporary, directory)


def _look(job: Job, trainer: Trainer, rows: Sequence[Row], tokens: Sequence[RowTokens]) -> dict[str, Any]:
    """The smoke generation; not of weights that no process has as a whole."""
    if not launch.is_main() or launch.is_sharded(job.args):
        return {}
    longest = max(row.total - row.prompt for row in tokens)
    model = trainer.accelerator.unwrap_model(trainer.model)
    prompts = [row["prompt"] for row in rows[: smoke.PROMPTS]]
    template = job.config.chat_template_kwargs
    return {"smoke": smoke.generate(model, job.counting, prompts, longest, job.ends, template)}


def _counts(lengths: Lengths, rejected: Mapping[str, int]) -> dict[str, Any]:
    """The manifest's books: rows in, rows out, rejected by reason."""
    dropped = Counter(rejected) + Counter(too_long=lengths.dropped)
    return {
        "rows_in": lengths.rows + sum(rejected.values()),
        "rows_out": lengths.rows - lengths.dropped,
        "rejected": dict(sorted(dropped.items())),
    }


def _summary(trainer: Trainer, lengths: Lengths, reference: checks.CheckReference | None) -> dict[str, Any]:
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
