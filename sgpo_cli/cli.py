"""The command line: parses, prints, maps errors to exit codes; imports nothing heavy.

The flags of a stage's command are the fields of its config; flags that are not ours go to TRL's options.
A flag beats the recipe, the recipe beats the default.
"""

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from sgpo_cli import __version__, compare, exchange, exits, look, one_stage
from sgpo_cli.configs import STAGES
from sgpo_cli.flags import (
    DebugFlag,
    DryRunFlag,
    FreshFlag,
    RecipeFlag,
    RunDirFlag,
    SeedFlag,
    StepFlag,
    VerboseFlag,
)
from sgpo_cli.options import StageConfig, own_options
from sgpo_cli.remote.secret import guard_streams

PASS_THROUGH = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": ["--help", "-h"],
}

app = typer.Typer(
    name="sgpo",
    help="Self-Generated Preference Optimization: a model learns to improve its own answers, and DPO on its "
    "answers and improvements makes it better. No human preference data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the console script."""
    guard_streams()
    # Set before any import of theirs: no pings to anyone, no floods of notices.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries are noise in a log file
    app()


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"sgpo {__version__}")
        raise typer.Exit


def _flag(field: Field[Any]) -> inspect.Parameter:
    """The command-line flag of a config field; None means "not given"."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    shown = "" if default in (MISSING, None, {}, []) else f" [default: {default}]"
    required = " [required]" if default is MISSING else ""
    option = typer.Option(
        "--" + field.name.replace("_", "-"),
        help=field.metadata["help"] + shown + required,
        metavar=_metavar(field.type),
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[_plain(field.type), option],
    )


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "[" + "|".join(map(str, get_args(annotation))) + "]"
    words = {"int": "INTEGER", "float": "NUMBER", "dict": "MAP"}
    return next((words[name] for name in words if name in str(annotation)), "TEXT")


def _plain(annotation: Any) -> Any:
    """The type that the command line parses; ranges and choices are checked where recipes are."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if any(get_origin(part) is list for part in (annotation, *get_args(annotation))):
        return list[str] | None
    if annotation is bool:
        return bool | None
    return str | None


def _command(stage: str, config: type[StageConfig]) -> Callable[..., None]:
    """The Typer command of a stage."""

    def command(
        ctx: typer.Context,
        recipe: RecipeFlag = None,
        step: StepFlag = None,
        run_dir: RunDirFlag = None,
        fresh: FreshFlag = False,
        dry_run: DryRunFlag = False,
        verbose: VerboseFlag = False,
        debug: DebugFlag = False,
        **flags: Any,
    ) -> None:
        with exits.mapped(debug=debug):
            _configure_logging(verbose)
            values = {name: value for name, value in flags.items() if value not in (None, [])}
            if config.POSITIONAL and ctx.args and not ctx.args[0].startswith("-"):
                values[config.POSITIONAL] = ctx.args.pop(0)
            built = _config(stage, recipe, step, run_dir, values | trailing_options(ctx.args))
            if dry_run:
                one_stage.dry_run(stage, built)
            else:
                one_stage.run(stage, built, fresh=fresh)

    own = [_flag(field) for field in own_options(config).values()]
    left_out = () if config.DRY_RUN else ("dry_run",)
    common = [
        parameter
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in left_out
    ]
    signature = inspect.Signature([*common[:1], *own, *(p.replace(kind=p.KEYWORD_ONLY) for p in common[1:])])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    command.__doc__ = inspect.getdoc(config) or ""
    if config.TRAINER:
        name = {"sft": "SFTConfig", "dpo": "DPOConfig"}[config.TRAINER]
        command.__doc__ += (
            f"\n\nEvery field of TRL's {name} and ModelConfig is a flag too, "
            "for example --learning-rate 1e-5 --use-peft --num-train-epochs 2."
        )
    return command


def trailing_options(arguments: list[str]) -> dict[str, Any]:
    """`--learning-rate 1e-4 --use-peft --no-bf16` as {"learning_rate": "1e-4", "use_peft": True, "bf16": False}.

    A flag with several values, or given several times, is a list.

    Raises:
        UsageError: an argument that belongs to no flag.
    """
    from sgpo_cli.errors import UsageError

    values: dict[str, Any] = {}
    waiting = list(arguments)
    while waiting:
        flag = waiting.pop(0)
        if not flag.startswith("--"):
            raise UsageError(f"unexpected argument '{flag}'", "options start with --")
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        given: list[Any] = [value] if equals else []
        while not equals and waiting and not waiting[0].startswith("--"):
            given.append(waiting.pop(0))
        if not given:
            given, name = [not name.startswith("no_")], name.removeprefix("no_")
        before = values.get(name, [])
        values[name] = given[0] if name not in values and len(given) == 1 else [*_listed(before), *given]
    return values


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _config(
    stage: str, recipe_path: Path | None, step_name: str | None, run_dir: Path | None, flags: dict[str, Any]
) -> StageConfig:
    from sgpo_cli import recipe
    from sgpo_cli.errors import UsageError

    if recipe_path is None:
        if step_name is not None or run_dir is not None:
            raise UsageError("--step and --run-dir need --recipe")
        return recipe.build_config(stage, _parsed(stage, flags), f"sgpo {stage}")
    plan = recipe.read(recipe_path, run_dir=run_dir)
    spec = plan.step(step_name) if step_name else plan.only_step_of(stage)
    if spec.stage != stage:
        raise UsageError(f"{recipe_path}: step {spec.name} runs {spec.stage}, not {stage}")
    return recipe.build_config(stage, spec.options | _parsed(stage, flags), f"{recipe_path}: steps.{spec.name}")


def _parsed(stage: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Flags whose option is a map are given as in a recipe, or as JSON."""
    from sgpo_cli.errors import UsageError
    from sgpo_cli.yaml12 import parse

    own = own_options(STAGES[stage])
    for name in [name for name in flags if name in own and get_origin(own[name].type) is dict]:
        try:
            flags[name] = parse(flags[name])
        except ValueError as error:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag}: {error}", f"for example {flag} '{{a: 1}}'") from None
    return flags


def _configure_logging(verbose: bool) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of a missing kernel on every CPU start
    logging.getLogger("sgpo_cli").setLevel(logging.DEBUG if verbose else logging.INFO)
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("sgpo_cli").setLevel(logging.WARNING)  # the main process speaks for all
    if not verbose:
        warnings.simplefilter("ignore", FutureWarning)  # between libraries; nothing that a user could change


for _name, _config_class in STAGES.items():
    app.command(_name, context_settings=PASS_THROUGH)(_command(_name, _config_class))


@app.command("run")
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    from_step: Annotated[str | None, typer.Option("--from", help="Run this step and all after it again.")] = None,
    run_dir: RunDirFlag = None,
    seed: SeedFlag = None,
    fresh: FreshFlag = False,
    verbose: VerboseFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Run a recipe's steps in order, skipping what is up to date."""
    from sgpo_cli import pipeline
    from sgpo_cli.recipe import read

    with exits.mapped(debug=debug):
        _configure_logging(verbose)
        book = read(recipe, run_dir=run_dir, seed=seed)
        if dry_run:
            pipeline.print_plan(book, from_step=from_step, fresh=fresh)
        else:
            pipeline.run(book, from_step=from_step, fresh=fresh, flags=["--verbose"] * verbose + ["--debug"] * debug)


@app.command("status")
def status(
    recipe: Annotated[Path, typer.Argument(help="The recipe.")],
    run_dir: RunDirFlag = None,
    seed: SeedFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Print the state of a recipe's steps: rows, rejects, seconds, and what would run next."""
    from sgpo_cli import pipeline
    from sgpo_cli.recipe import read

    with exits.mapped(debug=debug):
        pipeline.print_status(read(recipe, run_dir=run_dir, seed=seed))


app.add_typer(look.app)
app.add_typer(compare.app)
app.add_typer(exchange.app)
