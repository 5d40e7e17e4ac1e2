"""The commands that exchange files with public benchmarks: export, win-rates."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sgpo_cli import exits
from sgpo_cli.flags import DebugFlag

app = typer.Typer()


@app.command("export")
def export(
    directory: Annotated[Path, typer.Argument(help="A finished evaluate step.", metavar="DIR")],
    form: Annotated[Literal["alpaca-eval", "arena-hard"], typer.Option("--format", help="Whose files to write.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Empty or new directory for them.")],
    answer: Annotated[str, typer.Option("--answer", help="Which answer of each model.")] = "policy_sampled",
    category: Annotated[
        str, typer.Option("--category", help="Arena-Hard's category, for prompts that have no column of that name.")
    ] = "hard_prompt",
    debug: DebugFlag = False,
) -> None:
    """Write answers and verdicts of an evaluate step as AlpacaEval's or Arena-Hard's files."""
    with exits.mapped(debug=debug):
        from sgpo_cli import export as exporting

        for path in exporting.export(directory, form, output_dir, answer, category):
            typer.echo(path)


@app.command("win-rates")
def win_rates(
    files: Annotated[list[Path], typer.Argument(help="annotations.json of AlpacaEval, or judgments of Arena-Hard.")],
    lc_official: Annotated[
        str | None, typer.Option("--lc-official", help="AlpacaEval's df_gamed.csv or instruction_difficulty.csv.")
    ] = None,
    model_answers: Annotated[
        Path | None, typer.Option("--model-answers", help="Arena-Hard's model_answer directory, for style control.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the figures to this JSON file too.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the intervals.")] = 42,
    debug: DebugFlag = False,
) -> None:
    """Print win rates with intervals from verdicts that another tool has collected."""
    with exits.mapped(debug=debug):
        from sgpo_cli.annotations import win_rates
        from sgpo_cli.interchange import write_json

        entries, lines = win_rates(files, seed, lc_official, model_answers)
        if output is not None:
            write_json(output, {"win_rates": entries})
        for line in lines:
            typer.echo(line)
