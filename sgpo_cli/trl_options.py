"""The names, types and help texts of TRL's options, read from its source without importing it.

Importing TRL takes seconds; a typing error in a recipe should not. Nothing about an option is repeated
here: the installed version's dataclasses are the list.
"""

import ast
import difflib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Optional, Union

from pydantic import TypeAdapter, ValidationError

from sgpo_cli.errors import UsageError
from sgpo_cli.yaml12 import parse

_TRAINING = ("transformers", "training_args.py", "TrainingArguments")
_BASE = ("trl", "trainer/base_config.py", "_BaseConfig")
_MODEL = ("trl", "trainer/model_config.py", "ModelConfig")
SOURCES = {
    "sft": (_TRAINING, _BASE, ("trl", "trainer/sft_config.py", "SFTConfig"), _MODEL),
    "dpo": (_TRAINING, _BASE, ("trl", "trainer/dpo_config.py", "DPOConfig"), _MODEL),
}
OURS = ("output_dir", "seed", "model_name_or_path", "resume_from_checkpoint")  # a step resumes by itself
_POSITIVE = ("a number above 0", lambda value: 0 < value < math.inf)
_COUNT = ("at least 1", lambda value: value >= 1)
_LIMITS: dict[str, tuple[str, Callable[[float], bool]]] = {  # TRL takes any number, and trains nothing or fails late
    "learning_rate": _POSITIVE,
    "beta": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "max_steps": ("at least 1, or -1 for no limit", lambda value: value >= 1 or value == -1),
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "precompute_ref_batch_size": _COUNT,
    "max_length": _COUNT,
}


@dataclass(frozen=True)
class TrlOption:
    """One field of a TRL config: its annotation as written there, and its help."""

    name: str
    annotation: str
    help: str


@cache
def options(trainer: str) -> dict[str, TrlOption]:
    """All options of the trainer "sft" or "dpo", by name."""
    found: dict[str, TrlOption] = {}
    for package, file, class_name in SOURCES[trainer]:
        found |= _fields(package, file, class_name)
    return {name: option for name, option in found.items() if name not in OURS and not name.startswith("_")}


@cache
def _fields(package: str, file: str, class_name: str) -> dict[str, TrlOption]:
    tree = ast.parse(_source(package, file))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return {
        node.target.id: TrlOption(node.target.id, ast.unparse(node.annotation), _help(node.value))
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _source(package: str, file: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UsageError(f"the package {package} is not installed", "pip install sgpo")
    return (Path(spec.origin).parent / file).read_text(encoding="utf-8")


def _help(value: ast.expr | None) -> str:
    for node in ast.walk(value) if value is not None else ():
        if isinstance(node, ast.Dict):
            for key, text in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help" and isinstance(text, ast.Constant):
                    return str(text.value)
    return ""


def check(trainer: str, values: Mapping[str, Any], where: str, ours: Iterable[str] = ()) -> dict[str, Any]:
    """The values with their types put right ("1e-4" from a command line becomes a number).

    Args:
        where: what to name in an error.
        ours: names that are known elsewhere, for suggestions.

    Raises:
        UsageError: an unknown name (with a suggestion), a value of the wrong type, or a number out of its range.
    """
    known = options(trainer)
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"{where}: unknown option '{name}'{did_you_mean(name, {*known, *ours})}")
        checked[name] = _convert(known[name], value, where)
        _check_limit(name, checked[name], where)
    _check_loss(trainer, checked.get("loss_type", ()), where)
    return checked


def _check_limit(name: str, value: Any, where: str) -> None:
    if name not in _LIMITS or value is None:
        return
    expected, allowed = _LIMITS[name]
    if not allowed(value):
        raise UsageError(f"{where}: option '{name}': expected {expected}, got {value}")


def _check_loss(trainer: str, given: str | Sequence[str], where: str) -> None:
    """TRL takes any loss name and fails at the first training step."""
    known = loss_names(trainer)
    for name in [given] if isinstance(given, str) else given:
        if name not in known:
            raise UsageError(
                f"{where}: option 'loss_type': unknown loss '{name}'{did_you_mean(name, known)}",
                f"losses: {', '.join(sorted(known))}",
            )


@cache
def loss_names(trainer: str) -> set[str]:
    """What the trainer compares its `loss_type` with."""
    tree = ast.parse(_source("trl", f"trainer/{trainer}_trainer.py"))
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare) and _is_loss_type(node.left)]
    return {
        constant.value
        for node in compared
        for constant in ast.walk(node.comparators[0])
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }


def _is_loss_type(node: ast.expr) -> bool:
    return getattr(node, "id", getattr(node, "attr", "")) == "loss_type"


def _convert(option: TrlOption, value: Any, where: str) -> Any:
    try:
        # The annotation comes from the installed package's source, not from a user.
        expected = eval(option.annotation, {"Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union})
    except NameError:
        return value  # an enum of transformers; the trainer checks it
    structured = "dict" in option.annotation or "list" in option.annotation
    if structured and isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            value = parse(value)
        except ValueError as error:
            raise UsageError(f"{where}: option '{option.name}': {error}") from None
    elif isinstance(value, str) and option.annotation.startswith("list["):
        value = [value]
    try:
        return TypeAdapter(expected).validate_python(value)
    except ValidationError:
        raise UsageError(f"{where}: option '{option.name}': expected {option.annotation}, got {value!r}") from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
