"""merge: an adapter and its base model become one full model, for tools that take no adapters."""

from pathlib import Path

from sgpo_cli.artifacts import read_manifest
from sgpo_cli.configs import MergeConfig
from sgpo_cli.errors import UsageError
from sgpo_cli.step import Step


def run(config: MergeConfig, step: Step) -> None:
    import torch

    from sgpo_cli import saving
    from sgpo_cli.loading import end_tokens, load_tokenizer, refusals
    from sgpo_cli.start_model import StartModel

    start = StartModel.find(config.model_name_or_path)
    if start.adapter is None:
        raise UsageError(f"{config.model_name_or_path}: a full model already, there is nothing to merge")
    dtype = start.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    tokenizer = load_tokenizer(config.model_name_or_path)
    with step:
        temporary = step.directory / "model.tmp"
        with refusals(config.model_name_or_path):
            model = start.load_merged(dtype)
        model.generation_config.eos_token_id = end_tokens(
            model.generation_config, tokenizer
        )  # the adapter may have got one of its own
        model.save_pretrained(temporary)
        saving.save_tokenizer(tokenizer, config.model_name_or_path, temporary)
        before = read_manifest(Path(config.model_name_or_path)) or {}
        known = before.get("config", {}) | before  # what later steps ask of a model's manifest
        facts = {name: known[name] for name in ("improver_prompt", "chat_template_kwargs", "lineage") if name in known}
        step.finish(saving.reveal(temporary, step.directory), facts)
