"""TRL's arguments for a step: what the user gave, our defaults where TRL's are wrong here, and what is fixed."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import DPOConfig, ModelConfig, SFTConfig

from sgpo_cli import launch
from sgpo_cli.errors import UsageError
from sgpo_cli.loading import load_tokenizer, refusals
from sgpo_cli.options import TrainConfig

Arguments = SFTConfig | DPOConfig
CONFIGS: dict[str, type[Arguments]] = {"sft": SFTConfig, "dpo": DPOConfig}
CHANGES_TOKENIZER = ("chat_template_path", "eos_token", "pad_token")


def arguments(config: TrainConfig, output_dir: Path) -> tuple[Arguments, ModelConfig]:
    """TRL's two configs from the step's options.

    Raises:
        UsageError: TRL refuses a value or a combination of values, or a tracker cannot be used.
    """
    model_names = {field.name for field in dataclasses.fields(ModelConfig)}
    model_options = {name: value for name, value in config.trainer.items() if name in model_names}
    options = {name: value for name, value in config.trainer.items() if name not in model_names}
    if "gradient_checkpointing" in options:
        options.setdefault("activation_checkpointing", options.pop("gradient_checkpointing"))
    fixed = {
        "output_dir": str(output_dir),
        "seed": config.seed,
        "logging_nan_inf_filter": False,  # on, a NaN loss is logged as 0.0
        "push_to_hub": False,  # the finished step is pushed, not what lies about on the way
    }
    if config.global_batch_size is not None:
        fixed["gradient_accumulation_steps"] = _accumulation(config, options)
    with refusals("TRL"):
        args = CONFIGS[config.TRAINER](**(_defaults(config.TRAINER, options) | options | fixed))
        model_args = ModelConfig(model_name_or_path=config.model_name_or_path, **model_options)
    for tracker in args.report_to or ():
        _check_tracker(tracker)
    return args, model_args


def _check_tracker(name: str) -> None:
    """A tracker is made here once for nothing: it says itself what is not installed."""
    if name not in INTEGRATION_TO_CALLBACK:
        raise UsageError(
            f"--report-to {name}: unknown, or not to be named together with others",
            f"one of none, all, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}",
        )
    try:
        INTEGRATION_TO_CALLBACK[name]()
    except (RuntimeError, ImportError) as error:
        found = re.search(r"pip install [^`]+", str(error))
        otherwise = "pip install tensorboard" if name == "tensorboard" else "leave it out"
        raise UsageError(f"--report-to {name}: {error}", found.group() if found else otherwise) from error


def _defaults(trainer: str, options: dict[str, Any]) -> dict[str, Any]:
    """Ours, where TRL's would be refused, silent or slow."""
    on_gpu = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "use_cpu": not on_gpu,  # TRL's bf16 default is refused on a machine without a GPU unless this is set
        "activation_checkpointing": on_gpu,  # the old name, gradient_checkpointing, warns at every start
        "logging_first_step": True,  # the first loss proves the reference model
        "ddp_find_unused_parameters": False,  # on, every step searches for what these models do not have
        "save_total_limit": 2,  # of checkpoints; each is three times the model
        "disable_tqdm": True,  # `LogProgress` speaks instead
    }
    if on_gpu and not torch.cuda.is_bf16_supported():
        defaults["bf16"] = False
    return defaults | (_dpo_defaults(options, on_gpu) if trainer == "dpo" else {})


def _dpo_defaults(options: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    """The reference's log-probabilities are computed once if that saves time (epochs) or memory (on a GPU)."""
    once = on_gpu or options.get("num_train_epochs", DPOConfig.num_train_epochs) > 1
    per_device = options.get("per_device_train_batch_size", DPOConfig.per_device_train_batch_size)
    return {
        "precompute_ref_log_probs": once and not options.get("sync_ref_model", False),
        "precompute_ref_batch_size": 4 * per_device,  # nothing is kept for a backward pass
    }


def _accumulation(config: TrainConfig, options: dict[str, Any]) -> int:
    if "gradient_accumulation_steps" in options:
        raise UsageError(
            "--global-batch-size and --gradient-accumulation-steps: the first decides the second", "leave one out"
        )
    per_device = options.get("per_device_train_batch_size", CONFIGS[config.TRAINER].per_device_train_batch_size)
    return launch.accumulation_steps(int(config.global_batch_size or 0), per_device)


def changes_tokenizer(config: TrainConfig) -> bool:
    """Whether the model gets another tokenizer than it has."""
    return any(name in config.trainer for name in CHANGES_TOKENIZER)


def tokenizers(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The tokenizer for TRL, and the one that rows are checked with: as TRL will have changed it."""
    source = config.trainer.get("chat_template_path")
    if source is None:
        tokenizer = load_tokenizer(config.model_name_or_path)
    else:
        with refusals(config.model_name_or_path):
            tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, trust_remote_code=False)
    if not changes_tokenizer(config):
        return tokenizer, tokenizer
    changed = copy.deepcopy(tokenizer)
    if source is not None:
        _take_template(changed, source)
    if "eos_token" in config.trainer:
        changed.eos_token = config.trainer["eos_token"]
    return tokenizer, changed


def _take_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """A Jinja file, or another model's tokenizer (with its end token, as TRL does it)."""
    if source.endswith((".jinja", ".j2")):
        if not Path(source).is_file():
            raise UsageError(f"--chat-template-path {source}: no such file")
        tokenizer.chat_template = Path(source).read_text(encoding="utf-8")
        return
    other = load_tokenizer(source)
    tokenizer.chat_template = other.chat_template
    tokenizer.add_tokens(list(other.added_tokens_decoder.values()))
    tokenizer.eos_token = other.eos_token
