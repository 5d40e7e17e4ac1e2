"""Reads a recipe: an ordered map of named steps, each a stage with its options.

    run_dir: runs/demo
    seed: 1
    steps:
      m0: {stage: sft, model_name_or_path: ./world/base, dataset: ./world/sft}

A value that starts with `./` is relative to `run_dir`, so a step names another step's output by its
path. `seed` is that of every step that sets none. YAML is read by the rules of YAML 1.2 (`no` is a
string, `012` is 12, `1e-5` is a number), and duplicate or unknown keys are errors. With `rounds: 4`, steps
named like `m{round}` are repeated (`rounds.py`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from sgpo_cli import rounds, trl_options
from sgpo_cli.configs import STAGES
from sgpo_cli.errors import UsageError
from sgpo_cli.options import TRAINER_KEY, StageConfig, own_options
from sgpo_cli.yaml12 import Loader

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
STEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEYS = ("run_dir", "seed", "rounds", "steps")
OLD = re.compile(r"\.old-\d+$")  # where earlier outputs are moved
STEP_KEYS = ("stage", "launch")  # of the step itself; every other key is an option of its stage


@dataclass(frozen=True)
class StepSpec:
    """One step of a recipe: its stage, its options as written (paths resolved), and how to launch it."""

    name: str
    stage: str
    options: dict[str, Any]
    launch: str = ""


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe; the order of `steps` is the order of work.

    `overrides` are the flags that it was read with; they read it the same way again.
    """

    path: Path
    run_dir: Path
    steps: dict[str, StepSpec] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    def step(self, name: str) -> StepSpec:
        """Raises UsageError for a name that is not there."""
        if name not in self.steps:
            hint = trl_options.did_you_mean(name, self.steps)
            raise UsageError(f"{self.path}: no step '{name}'{hint}", f"its steps: {', '.join(self.steps)}")
        return self.steps[name]

    def only_step_of(self, stage: str) -> StepSpec:
        """The step that runs `stage`, when there is just one."""
        names = [step.name for step in self.steps.values() if step.stage == stage]
        if len(names) != 1:
            found = f"has steps {', '.join(names)} of" if names else "has no step of"
            raise UsageError(f"{self.path}: {found} stage {stage}", "name one with --step")
        return self.steps[names[0]]


def read(path: str | Path, *, run_dir: str | Path | None = None, seed: int | None = None) -> Recipe:
    """Parse and check a recipe; no step is looked at on disk.

    Args:
        run_dir: used instead of the recipe's.
        seed: used instead of the recipe's, and of those of its steps.

    Raises:
        UsageError: naming file, line or key, for anything that is not a recipe.
    """
    path = Path(path)
    content = _load_yaml(path)
    unknown = [key for key in content if key not in KEYS and not str(key).startswith("x-")]
    if unknown:
        hint = trl_options.did_you_mean(str(unknown[0]), KEYS)
        raise UsageError(
            f"{path}: unknown key '{unknown[0]}'{hint}", f"keys: {', '.join(KEYS)}, and x-* to hold YAML anchors"
        )
    directory, steps = run_dir or content.get("run_dir"), content.get("steps")
    if isinstance(directory, Path):
        directory = str(directory)
    if not isinstance(directory, str) or not directory:
        raise UsageError(
            f"{path}: key 'run_dir': expected a path, got {directory!r}", "for example run_dir: runs/mine"
        )
    if not isinstance(steps, dict) or not steps:
        raise UsageError(f"{path}: key 'steps': expected a map of named steps, got {type(steps).__name__}")
    given = {"--run-dir": run_dir, "--seed": seed}
    overrides = tuple(str(part) for flag, value in given.items() if value is not None for part in (flag, value))
    recipe = Recipe(path, Path(directory).expanduser(), {}, overrides)
    seeds = {"seed": content["seed"]} if "seed" in content else {}
    for step in rounds.expand(steps, content.get("rounds"), str(path)):
        options = step.options
        if isinstance(options, dict):
            options = seeds | options | ({"seed": seed} if seed is not None else {})
        recipe.steps[step.name] = _read_step(recipe, step.name, options, f"{path}: steps.{step.key}")
    return recipe


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
        if len(text) > MAX_BYTES:
            raise UsageError(f"{path}: larger than 1 MiB; this is no recipe")
        content = yaml.load(text.decode("utf-8"), Loader=Loader)  # a SafeLoader
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "name a recipe file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UsageError(f"{path}{place}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a map with run_dir and steps, got {type(content).__name__}")
    _refuse_endless(content, path)
    return content


def _refuse_endless(content: Any, path: Path) -> None:
    """Anchors can nest a value in itself, or make ten lines stand for millions of values."""
    waiting, seen = [content], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise UsageError(f"{path}: more than {MAX_VALUES} values; does an anchor contain itself?")
        waiting.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


def _read_step(recipe: Recipe, name: Any, options: Any, where: str) -> StepSpec:
    if not isinstance(name, str) or not STEP_NAME.fullmatch(name) or OLD.search(name):
        rule = "begins with a letter or digit, has letters, digits, '.', '_' and '-', and no .old-N at its end"
        raise UsageError(f"{where}: a step's name {rule}", "quote it if it is a number")
    if not isinstance(options, dict):
        raise UsageError(f"{where}: expected a map with a stage, got {type(options).__name__}")
    stage = options.get("stage")
    if stage not in STAGES:
        raise UsageError(
            f"{where}.stage: unknown stage {stage!r}{trl_options.did_you_mean(str(stage), STAGES)}",
            f"stages: {', '.join(STAGES)}",
        )
    if "output_dir" in options:
        raise UsageError(f"{where}.output_dir: a step's directory is {recipe.run_dir / name}", "rename the step")
    launch = options.get("launch", "")
    if not isinstance(launch, str):
        raise UsageError(f"{where}.launch: expected a command line, got {launch!r}")
    _refuse_unknown_inputs(recipe, stage, options, where)
    values = {key: _resolve(value, recipe.run_dir) for key, value in options.items() if key not in STEP_KEYS}
    values["output_dir"] = str(recipe.run_dir / name)
    spec = StepSpec(name, stage, values, launch)
    build_config(stage, values, where)
    return spec


def _refuse_unknown_inputs(recipe: Recipe, stage: str, options: Mapping[str, Any], where: str) -> None:
    """`./x/...` in an input names an earlier step, or something that lies in the run directory."""
    own = own_options(STAGES[stage])
    for key in options:
        if key not in own or own[key].metadata["kind"] not in ("data", "model", "answers", "teacher", "judge"):
            continue
        for value in options[key] if isinstance(options[key], list) else [options[key]]:
            name = str(value).removeprefix("hf:").removeprefix("reward:")
            first = name[2:].split("/")[0]
            if name.startswith("./") and first not in recipe.steps and not (recipe.run_dir / first).exists():
                hint = trl_options.did_you_mean(first, recipe.steps)
                raise UsageError(f"{where}.{key}: {value} is no earlier step of this recipe{hint}")


def _resolve(value: Any, run_dir: Path) -> Any:
    if isinstance(value, list):
        return [_resolve(item, run_dir) for item in value]
    if isinstance(value, str) and value.startswith("~/"):
        return str(Path(value).expanduser())
    if isinstance(value, str) and value.startswith("./"):
        return str(run_dir / value[2:])
    if isinstance(value, str) and value.startswith(("hf:./", "reward:./")):
        kind, _, path = value.partition(":./")
        return f"{kind}:{run_dir / path}"
    return value


def build_config(stage: str, values: Mapping[str, Any], where: str) -> StageConfig:
    """The stage's config from options of ours and of TRL's, checked and with their types put right.

    Raises:
        UsageError: an unknown or missing option, or a value of the wrong type; `where` says where.
    """
    config = STAGES[stage]
    own = own_options(config)
    ours = {key: value for key, value in values.items() if key in own}
    rest = {key: value for key, value in values.items() if key not in own}
    if config.TRAINER:
        ours[TRAINER_KEY] = trl_options.check(config.TRAINER, rest, where, own)
    elif rest:
        name = next(iter(rest))
        raise UsageError(f"{where}: unknown option '{name}'{trl_options.did_you_mean(str(name), own)}")
    for key, value in ours.items():
        if isinstance(value, bool) and own[key].type is not bool:
            raise UsageError(f"{where}: option '{key}': expected {own[key].type}, got {value}")
    try:
        return TypeAdapter(config).validate_python(ours)
    except UsageError as error:  # options that do not go together
        raise UsageError(f"{where}: {error}", error.hint) from None
    except ValidationError as error:
        raise UsageError(f"{where}: {_first_problem(error)}", f"see: sgpo {stage} --help") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    if not problem["loc"]:  # a check of the config's own, which says what it is about
        return str(problem["ctx"]["error"])
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"option '{name}' is missing"
    return f"option '{name}': {problem['msg'].lower()}, got {problem['input']!r}"
