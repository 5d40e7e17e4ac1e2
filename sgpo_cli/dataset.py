"""The rows of a stage's `dataset` option, read strictly; rows that were set aside stay accounted for."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from sgpo_cli.control_tokens import added_tokens, control_tokens
from sgpo_cli.errors import UsageError
from sgpo_cli.joined_rows import JoinedRows
from sgpo_cli.options import DataConfig, RemoteConfig, part_of
from sgpo_cli.rows import Columns, Rows, read_rows
from sgpo_cli.step import Outcome

logger = logging.getLogger(__name__)
SHOWN = 20


def read_dataset(config: DataConfig, needs: Sequence[str], model: str) -> Rows | JoinedRows:
    """The rows with the columns that a stage needs; those of several data sets one after another.

    Args:
        needs: canonical column names, see `rows.read_rows`.
        model: the model that will read the rows; its control tokens must not occur in them.

    Raises:
        UsageError: naming file, row and column of what is wrong.
        IncompleteError: more bad rows than `max_reject_share`, with `on_bad_row: reject`.
    """
    columns = Columns(
        prompt=config.prompt_column,
        completion=config.completion_column,
        messages=config.messages_column,
        id=config.id_column,
    )
    forbidden = forbidden_tokens(config, model)
    found = [_read_one(config, source, needs, columns, forbidden) for source in config.datasets]
    return found[0] if len(found) == 1 else JoinedRows(found)


def _read_one(
    config: DataConfig, source: str, needs: Sequence[str], columns: Columns, forbidden: Sequence[str]
) -> Rows:
    rows = read_rows(
        source,
        needs,
        columns=columns,
        max_rows=config.max_rows,
        part=part_of(config.part),
        on_bad_row=config.on_bad_row,
        max_reject_share=config.max_reject_share,
        split=config.split,
    )
    for note in rows.notes:
        logger.info("%s: %s", source, note)
    _refuse_control_tokens(rows, needs, forbidden)
    return rows


def forbidden_tokens(config: DataConfig, model: str) -> list[str]:
    """The control tokens of a model that must not occur in text; none with `control_tokens: keep`."""
    if config.control_tokens == "keep" or (isinstance(config, RemoteConfig) and config.is_served(model)):
        return []
    return model_tokens(model)


def model_tokens(model: str) -> list[str]:
    """The control tokens of a model directory or Hub name."""
    directory = Path(model)
    if not directory.exists():
        from huggingface_hub import hf_hub_download

        directory = Path(hf_hub_download(model, "tokenizer.json")).parent
    return added_tokens(directory)


def _refuse_control_tokens(rows: Rows, needs: Sequence[str], tokens: Sequence[str]) -> None:
    bad = control_tokens(rows, needs, tokens)
    if bad:
        more = f"\nand {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise UsageError(
            "\n".join(map(str, bad[:SHOWN])) + more,
            "remove it from the text, or pass --control-tokens keep to let it steer the model",
        )


def set_aside(rows: Rows | JoinedRows) -> Iterator[Outcome]:
    """The outcomes of the rows that the reader rejected."""
    for bad in rows.rejected:
        yield {"where": bad.where, "column": bad.column, "message": bad.message}, bad.reason


def count_set_aside(rows: Rows | JoinedRows) -> Counter[str]:
    """How many rows the reader rejected, by reason."""
    return Counter(bad.reason for bad in rows.rejected)
