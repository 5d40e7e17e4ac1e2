"""What a step's request is made of: its options as they act, and the digests of what it reads."""

import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from sgpo_cli import artifacts, prompts
from sgpo_cli.errors import UsageError
from sgpo_cli.options import RemoteConfig, StageConfig, own_options
from sgpo_cli.remote.endpoint import clean_url
from sgpo_cli.step import Request

HUB_SECONDS = 5.0
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", re.ASCII)


def request_of(stage: str, config: StageConfig) -> Request:
    """The request of `stage` with `config`; reads its inputs, writes nothing.

    Raises:
        UsageError: an input does not exist or is a step that has not finished.
    """
    values: dict[str, Any] = dict(getattr(config, "trainer", {}))
    for name, field in own_options(type(config)).items():
        kind, value = field.metadata["kind"], getattr(config, name)
        if kind == "prompt" and value is not None:
            values[name] = prompts.load(value)
        elif kind == "url":
            values[name] = clean_url(value)
        elif kind in ("value", "prompt", "teacher", "judge") or (kind == "model" and _is_served(config, value)):
            values[name] = value
    inputs = {name: _digest(source, kind) for name, source, kind in sources(config)}
    return Request(stage, type(config).VERSION, values, inputs)


def sources(config: StageConfig) -> Iterator[tuple[str, str, str]]:
    """What a step reads: (option, source, "data" or "model")."""
    for name, field in own_options(type(config)).items():
        kind, value = field.metadata["kind"], getattr(config, name)
        if kind in ("teacher", "judge"):
            yield from _named_by(name, value or "")
            continue
        for number, source in enumerate(value if isinstance(value, list) else [value]):
            if kind in ("data", "model", "answers") and source is not None and not _is_served(config, source, kind):
                option = f"{name}.{number}" if isinstance(value, list) else name
                file = kind == "answers" and Path(source).is_file()
                yield option, source, "data" if file or kind == "data" else "model"


def _named_by(name: str, spec: str) -> Iterator[tuple[str, str, str]]:
    """What a teacher or judge `kind:argument` reads: a model, or the file of a user's own function."""
    kind, _, argument = spec.partition(":")
    if kind in ("hf", "reward") and argument:
        yield name, argument, "model"
    elif argument and Path(module := kind.replace(".", "/") + ".py").is_file():
        yield name, module, "data"


def _is_served(config: StageConfig, model: object, kind: str = "model") -> bool:
    named = kind in ("model", "answers") and isinstance(model, str)
    return named and isinstance(config, RemoteConfig) and config.is_served(str(model))


def refuse_nesting(config: StageConfig) -> None:
    """A step's directory is its own: not inside another step or a model, and not what the step reads.

    Raises:
        UsageError: naming the two directories.
    """
    output = Path(config.output_dir).absolute()
    for parent in output.parents:
        if (parent / artifacts.REQUEST).exists() or (parent / "config.json").exists():
            raise UsageError(f"{config.output_dir}: lies inside {parent}, a step or a model", "choose another place")
    for option, source, _ in sources(config):
        if Path(source).absolute().is_relative_to(output):
            raise UsageError(f"{option}: {source} is in {config.output_dir}, which this step would write")


def check_inputs(config: StageConfig) -> None:
    """Verify the steps that this one reads against their manifests, before anything parses them.

    Raises:
        IntegrityError: a file changed after its step had finished.
        UsageError: a model's directory holds no model, or a step was made with another chat template's settings.
    """
    _refuse_other_template(config)
    for _, source, kind in sources(config):
        step = artifacts.step_of(Path(source))
        if step is not None:
            artifacts.verify(step, under=Path(source))
        if kind == "model" and Path(source).exists():
            _refuse_other_than_model(Path(source))


def _refuse_other_template(config: StageConfig) -> None:
    """A model that was trained with thinking switched off must not be asked with it on, and the like."""
    own = getattr(config, "chat_template_kwargs", None)
    for option, source, _ in sources(config) if own is not None else ():
        step = artifacts.step_of(Path(source)) if option != "teacher" else None
        manifest = (artifacts.read_manifest(step) or {}) if step else {}
        before = manifest.get("config", {}).get("chat_template_kwargs", manifest.get("chat_template_kwargs"))
        if before is not None and before != own:
            raise UsageError(
                f"{option}: {source} was made with --chat-template-kwargs {json.dumps(before)}, "
                f"this step has {json.dumps(own)}",
                "use the same in every step",
            )


def _refuse_other_than_model(path: Path) -> None:
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UsageError(
            f"{path}: not a model, it has no config.json",
            "name the directory that holds config.json and the weights",
        )
    if not any(path.glob("*.safetensors")):
        raise UsageError(
            f"{path}: no weights, it has no *.safetensors",
            "other formats can run code when they are loaded; save the model again with save_pretrained",
        )


def _digest(source: str, kind: str) -> str:
    if Path(source).exists() or not looks_like_hub_name(source):
        return artifacts.digest(source)
    name = source.partition(":")[0]  # of a data set, a configuration may follow
    return f"hub:{source}@{hub_commit(name, kind)}"


def looks_like_hub_name(source: str) -> bool:
    """`org/name`, and not a path: no suffix of a data file, no leading dot, slash or tilde."""
    data_file = Path(source).suffix in (".jsonl", ".json", ".csv", ".parquet", ".yaml")
    return bool(HUB_NAME.fullmatch(source)) and not source.startswith(".") and not data_file


@cache
def hub_commit(name: str, kind: str) -> str:
    """The commit that `name` has on the Hub now, or in the local cache when the Hub is out of reach.

    Raises:
        UsageError: neither knows it.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    repo_type = "model" if kind == "model" else "dataset"
    try:
        info = HfApi().repo_info(name, repo_type=repo_type, timeout=HUB_SECONDS)
        return str(info.sha)
    except Exception as error:  # the client raises a dozen kinds; each means the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=repo_type) / "refs" / "main"
    if cached.exists():
        os.environ["HF_HUB_OFFLINE"] = "1"
        return cached.read_text().strip()
    raise UsageError(
        f"{name}: no such file or directory, and no {repo_type} of that name in the cache or on the Hub ({reason})",
        "check the path; for the Hub, check the name and the connection",
    )
