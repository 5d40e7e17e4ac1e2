"""Control tokens in text: `<|im_end|>` in a user's row would end the user's turn (transformers #29279).

A chat template puts row text and its own markers into one string, and the tokenizer cannot tell them apart.
"""

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from sgpo_cli.errors import UsageError
from sgpo_cli.readers.strict import printable, shown
from sgpo_cli.rows import BadRow, Message, Row, Rows
from sgpo_cli.schema import blank


def control_tokens(rows: Sequence[Row], names: Sequence[str], tokens: Collection[str]) -> list[BadRow]:
    """The rows with a control token in one of the named columns (text or messages)."""
    wanted = [re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token]
    if not wanted:
        return []
    pattern = re.compile("|".join(wanted))
    bad = []
    for index, row in enumerate(rows):
        where = rows.where(index) if isinstance(rows, Rows) else f"row {index + 1}"
        for name in names:
            if found := next(filter(None, map(pattern.search, _texts(row[name]))), None):
                message = f"contains {shown(found[0])}, a control token of the model"
                bad.append(BadRow(index, where, name, "control_token", message))
                break
    return bad


def _texts(value: str | list[Message]) -> list[str]:
    return [value] if isinstance(value, str) else [message["content"] for message in value]


def added_tokens(model_dir: Path) -> list[str]:
    """The strings that a local tokenizer turns into one id wherever they stand, also inside a user's text.

    Special tokens, and the other added ones (`<think>`, `<tool_call>`). Two kinds are left out, as ordinary
    text is full of them and they steer nothing: white space, and unless special, plain words and numbers.
    """
    found: dict[str, bool] = {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = Path(model_dir) / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_bytes())
            listed: Any = content.get("added_tokens") or list(content.get("added_tokens_decoder", {}).values())
            for token in listed:
                found[token["content"]] = found.get(token["content"], False) or bool(token.get("special"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UsageError(f"{printable(str(path))}: not a tokenizer file", "save the tokenizer again") from error
    return [text for text, special in found.items() if not blank(text) and (special or not _is_ordinary(text))]


def _is_ordinary(text: str) -> bool:
    return all(char.isalnum() or char.isspace() for char in text)


def defused(text: str, tokens: Collection[str]) -> str:
    """The text with a space in every control token, so that it is read as the words it looks like."""
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
