"""Saves a trained model so that other tools load it: complete, in its own precision, with its own tokenizer."""

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file
from trl import DPOTrainer, SFTTrainer

logger = logging.getLogger(__name__)

LOG = "training_log.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def write_model(trainer: SFTTrainer | DPOTrainer, directory: Path, dtype: torch.dtype | None) -> None:
    """Write what was trained; every process calls it, because shards are gathered.

    Args:
        dtype: format to save a full model in; None for the one that it was trained in.
    """
    # Trainers turn the cache off, and generation from a model saved that way crawls.
    trainer.model.config.use_cache = True  # type: ignore[union-attr]
    trainer.save_model(str(directory))
    if not trainer.is_world_process_zero():
        return
    (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle has no place in a published model
    shutil.rmtree(directory / "ref", ignore_errors=True)  # TRL's frozen copy of an adapter
    (directory / LOG).write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", encoding="utf-8")
    if (directory / "adapter_config.json").exists():
        _name_base_absolutely(directory / "adapter_config.json")
    elif dtype is not None:
        cast(directory, dtype)


def cast(directory: Path, dtype: torch.dtype) -> None:
    """Rewrite the floating-point weights of a saved model in `dtype`, file by file."""
    total = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        converted = {name: _cast_tensor(tensor, dtype) for name, tensor in tensors.items()}
        save_file(converted, path, metadata=metadata)
        total += sum(tensor.nbytes for tensor in converted.values())
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["metadata"]["total_size"] = total
        index.write_text(json.dumps(content, indent=2) + "\n")
    config = directory / "config.json"
    name = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(_with_dtype(json.loads(config.read_text()), name), indent=2) + "\n")


def _cast_tensor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with its own `dtype` and those of its parts replaced."""
    parts = {key: _with_dtype(value, dtype) for key, value in config.items() if isinstance(value, dict)}
    return config | parts | ({"dtype": dtype} if "dtype" in config else {})


def _name_base_absolutely(path: Path) -> None:
    """A relative path to the base model would hold in one working directory only."""
    config = json.loads(path.read_text())
    base = Path(config["base_model_name_or_path"])
    if base.is_dir():
        config["base_model_name_or_path"] = str(base.resolve())
        path.write_text(json.dumps(config, indent=2) + "\n")


def keep_tokenizer(source: str, directory: Path, revision: str | None = None) -> None:
    """Put the tokenizer files of `source` in place of the saved ones, byte for byte.

    Saving them again renames classes and moves settings, and older tools no longer load the result.
    """
    found = {name: _find(source, name, revision) for name in TOKENIZER_FILES}
    if found["tokenizer.json"] is None and found["tokenizer.model"] is None:
        return
    for name, path in found.items():
        (directory / name).unlink(missing_ok=True)
        if path is not None:
            shutil.copyfile(path, directory / name)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str, directory: Path) -> None:
    """The tokenizer of `source`, unchanged if its files can be found."""
    tokenizer.save_pretrained(directory)
    keep_tokenizer(source, directory)


def _find(source: str, name: str, revision: str | None) -> Path | None:
    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    found = cached_file(
        source, name, revision=revision or "main", _raise_exceptions_for_missing_entries=False, local_files_only=True
    )
    return Path(found) if found else None


def reveal(temporary: Path, directory: Path) -> list[str]:
    """Move complete files beside the rest of the step, by renaming; returns their names."""
    names = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
    for path in list(temporary.iterdir()):
        path.replace(directory / path.name)
    temporary.rmdir()
    return names


def push(args: Any, directory: Path, names: Iterable[str]) -> str:
    """Upload the finished files to the Hub, as TRL's `hub_*` options say; returns the address."""
    from huggingface_hub import HfApi

    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or directory.name
    repository = api.create_repo(name, private=args.hub_private_repo, exist_ok=True)
    api.upload_folder(
        repo_id=repository.repo_id, folder_path=directory, allow_patterns=list(names), revision=args.hub_revision
    )
    logger.info("pushed to %s", repository)
    return str(repository)
