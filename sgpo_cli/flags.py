"""Flags that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

RecipeFlag = Annotated[Path | None, typer.Option("--recipe", help="Recipe to take the options from.")]
StepFlag = Annotated[str | None, typer.Option("--step", help="Step of the recipe; needed if several run this stage.")]
RunDirFlag = Annotated[Path | None, typer.Option("--run-dir", help="Use this instead of the recipe's run_dir.")]
SeedFlag = Annotated[int | None, typer.Option("--seed", help="Use this seed in every step.")]
FreshFlag = Annotated[
    bool, typer.Option("--fresh", help="Move an earlier output aside (NAME.old-1, -2, ...) and run anew.")
]
DryRunFlag = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done and what it would cost, and stop.")
]
VerboseFlag = Annotated[
    bool, typer.Option("--verbose", help="Show more, such as training examples with their labels.")
]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
