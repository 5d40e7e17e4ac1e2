"""The command `compare`: recipes once per seed, then the evaluated models with intervals over seeds and costs."""

from pathlib import Path
from typing import Annotated

import typer

from sgpo_cli import exits
from sgpo_cli.flags import DebugFlag, RunDirFlag

app = typer.Typer()


@app.command("compare")
def compare(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes; those that share steps run them once.")],
    seeds: Annotated[str, typer.Option("--seeds", help="5 for the seeds 1 to 5, or a list as 1,2,7.")] = "5",
    against: Annotated[
        str | None, typer.Option("--against", help="Model to take differences from [sgpo, else the first one].")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Seeds to run at the same time.")] = 1,
    run_dir: RunDirFlag = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of every seed and stop.")] = False,
    debug: DebugFlag = False,
) -> None:
    """Run recipes with several seeds and compare the models that they evaluate, with intervals and costs."""
    with exits.mapped(debug=debug):
        from sgpo_cli import pipeline
        from sgpo_cli.compare import figures, shown
        from sgpo_cli.compare import seeds as running

        runs = running.plan(recipes, run_dir, running.parse(seeds))
        if names := running.evaluated(runs[0]):
            figures.chosen(against, names)  # a wrong name is found now, not hours later
        if dry_run:
            for run in runs:
                for book in run.books:
                    pipeline.print_plan(book)
            return
        running.run(runs, jobs)
        compared = figures.read(runs, against)
        for line in shown.lines(compared):
            typer.echo(line)
        for path in shown.write(compared, runs):
            typer.echo(path)
