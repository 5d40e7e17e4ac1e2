"""The commands that look at what steps have left and change nothing there: inspect, report."""

from pathlib import Path
from typing import Annotated

import typer

from sgpo_cli import exits
from sgpo_cli.flags import DebugFlag

app = typer.Typer()


@app.command("inspect")
def inspect(
    directory: Annotated[Path, typer.Argument(help="A directory with rows: a data step.", metavar="DIR")],
    limit: Annotated[int, typer.Option("--limit", min=1, help="Show the first rows, this many.")] = 10,
    sample: Annotated[int | None, typer.Option("--sample", min=1, help="Show this many at random instead.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of --sample.")] = 1,
    ids: Annotated[list[str] | None, typer.Option("--id", help="Show the row with this id; repeatable.")] = None,
    rejects: Annotated[bool, typer.Option("--rejects", help="Show rows that were dropped, with the reason.")] = False,
    reason: Annotated[str | None, typer.Option("--reason", help="Show rows that were dropped for this.")] = None,
    debug: DebugFlag = False,
) -> None:
    """Show rows of a data step, with what differs between chosen and rejected, or target and response."""
    from rich.console import Console

    from sgpo_cli import inspect_rows

    with exits.mapped(debug=debug):
        choice = inspect_rows.Choice(limit, sample, seed, ids or [], rejects, reason)
        inspect_rows.show(directory, choice, Console())


@app.command("report")
def report(
    directory: Annotated[Path, typer.Argument(help="A recipe's run_dir, or one step.", metavar="RUN_DIR")],
    output: Annotated[Path | None, typer.Option("--output", help="File to write [RUN_DIR/report.html].")] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the web browser.")] = False,
    debug: DebugFlag = False,
) -> None:
    """Write one HTML file about a run: scores, lineage, data, learning curves, example pairs, cost."""
    with exits.mapped(debug=debug):
        from sgpo_cli.report import write

        path = write(directory, output)
        typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        if show:
            typer.launch(str(path))
