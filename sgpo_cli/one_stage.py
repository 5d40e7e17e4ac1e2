"""One stage as one step: from its options to its directory, or to what it would do."""

import importlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from sgpo_cli.configs import FilterPplConfig
from sgpo_cli.options import GenerateConfig, StageConfig


def run(stage: str, config: StageConfig, *, fresh: bool) -> None:
    """Run one step, unless it is up to date.

    Raises:
        StoppedError: it is a check, and what it has found, now or before, is not healthy.
    """
    from sgpo_cli import artifacts, guard, identity
    from sgpo_cli.errors import UsageError
    from sgpo_cli.ranks import Rank, SharedWorkDone, this_rank
    from sgpo_cli.step import Step

    rank = this_rank()
    shared = isinstance(config, GenerateConfig | FilterPplConfig)
    if not rank.is_main and not shared and not config.TRAINER:
        return
    if rank.count > 1 and fresh and shared:
        raise UsageError(
            "--fresh: which of several processes should move the old output aside?", "move or remove it beforehand"
        )
    main_process = rank.is_main
    identity.refuse_nesting(config)
    # A trainer's processes agree among themselves, and one of them keeps the step.
    share = rank if shared else Rank()
    step = Step(config.output_dir, identity.request_of(stage, config), fresh=fresh, rank=share)
    if step.is_complete():
        typer.echo(f"{config.output_dir}: up to date")
        guard.refuse(step.directory)
        return
    if main_process:
        identity.check_inputs(config)
    module = importlib.import_module(f"sgpo_cli.stages.{stage.replace('-', '_')}")
    try:
        with suppress(SharedWorkDone):
            module.run(config, step)
    except FileNotFoundError:
        if main_process or not step.is_complete():
            raise
        return  # a helper came late: the main process has ended the step meanwhile, and cleared its logs away
    manifest = artifacts.read_manifest(step.directory) if main_process else None
    if manifest is not None:  # a step may stop on purpose before its end
        _print_summary(Path(config.output_dir), manifest)
        guard.refuse(step.directory)


def dry_run(stage: str, config: StageConfig) -> None:
    """Print what a step would do; reads its inputs, sends and writes nothing."""
    from sgpo_cli import identity

    identity.request_of(stage, config)
    identity.check_inputs(config)
    for line in importlib.import_module(f"sgpo_cli.stages.{stage.replace('-', '_')}").dry_run(config):
        typer.echo(line)


def _print_summary(directory: Path, manifest: dict[str, Any]) -> None:
    dropped = ", ".join(f"{count} {reason}" for reason, count in manifest.get("rejected", {}).items())
    rows = f"{manifest['rows_out']} of {manifest['rows_in']} rows" if "rows_in" in manifest else "done"
    typer.echo(f"{directory}: {rows}{f' (rejected: {dropped})' if dropped else ''}, {manifest['seconds']:.1f} s")
    if manifest.get("verdict") == "healthy":
        typer.echo("the guard says healthy")
    for line in manifest.get("report", []):
        typer.echo(line)
