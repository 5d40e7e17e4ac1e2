"""One raw record to one row of ours: which columns are read, and what each must hold. Pure functions.

The prompt becomes a list of messages whichever way it was written, and every fault names its column.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgpo_cli.readers.strict import Fault, shown

Message = dict[str, str]
Row = dict[str, Any]

NEEDS = ("prompt", "reference", "response", "target", "chosen", "rejected")
REFERENCES = ("reference", "completion", "response")
ANSWERS = {*REFERENCES, "target", "chosen", "rejected"}
MAX_ID = 200
CANDIDATE = re.compile(r"#(\d+)$")  # ends the id of each further candidate of a prompt (gen-pairs --num-candidates)
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
# Letters to Unicode, nothing to the eye: the Hangul fillers and the blank Braille pattern.
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"


@dataclass(frozen=True)
class Columns:
    """The user's own column names; None stands for the standard ones."""

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Parsed:
    """A row without its id, the id the user gave it, and how each part was written: (column, form)."""

    row: Row
    id: str | None
    forms: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Schema:
    """What the rows of one source must have, and under which names."""

    needs: Sequence[str]
    columns: Columns = Columns()

    def parse(self, raw: dict[str, Any]) -> Parsed:
        """The canonical row of a raw record, or a Fault."""
        column = self._prompt_column(raw)
        value = _present(raw, column)
        answer = None
        if column == self._messages:
            prompt, answer = _conversation(column, value)
        elif isinstance(value, str):
            prompt = [{"role": "user", "content": _text(column, value, "empty_prompt")}]
        else:
            prompt = _ending_with_user(column, _messages(column, value, "text or a list of messages"))
        parts: dict[str, Any] = {"prompt": prompt}
        forms = {"prompt": (column, _form(value))}
        for name in (need for need in NEEDS if need in self.needs and need != "prompt"):
            source = self._source(name, raw, column)
            if source == column:
                if answer is None:
                    raise Fault("no_reference", "ends with a user turn; the last turn must be the reference", column)
                text = answer
            else:
                given = _present(raw, source)
                if name in ("chosen", "rejected"):
                    given = _after_prompt(given, prompt)
                text = _answer(source, given, f"empty_{name}")
            parts[name] = [{"role": "assistant", "content": text}] if name in ("chosen", "rejected") else text
            forms[name] = (source, _form(raw[source]))
        return self._assemble(raw, parts, forms)

    def _assemble(self, raw: dict[str, Any], parts: Row, forms: dict[str, tuple[str, str]]) -> Parsed:
        column = self.columns.id or "id"
        given = raw.get(column)
        if given is None and self.columns.id:
            _present(raw, column)
        forms["id"] = (column, "no id" if given is None else "an id")
        used = {column, *(source for source, _ in forms.values()), *parts}
        rest = {name: value for name, value in raw.items() if name not in used and name != "id"}
        return Parsed(parts | rest, None if given is None else _identity(column, given), forms)

    @property
    def _messages(self) -> str:
        return self.columns.messages or "messages"

    def _prompt_column(self, raw: dict[str, Any]) -> str:
        """`messages` where it is named or stands alone, `prompt` where there is an answer beside it."""
        if named := self.columns.messages or self.columns.prompt:
            return named
        answered = self.columns.completion or any(raw.get(name) is not None for name in ANSWERS)
        if raw.get("messages") is None or (raw.get("prompt") is not None and answered):
            return "prompt"
        return "messages"

    def _source(self, name: str, raw: dict[str, Any], prompt_column: str) -> str:
        """The column that holds an answer; only the reference may stand under another name."""
        if name != "reference":
            return name
        if self.columns.completion:
            return self.columns.completion
        names = [other for other in REFERENCES if other == "reference" or other not in self.needs]
        fallback = prompt_column if prompt_column == self._messages else next(filter(raw.__contains__, names), name)
        return next((other for other in names if raw.get(other) is not None), fallback)


def blank(text: str) -> bool:
    """Whether a reader would see nothing: white space, zero-width and other invisible characters."""
    return not any(
        not char.isspace() and char not in BLANK_LETTERS and unicodedata.category(char) not in ("Cf", "Cc")
        for char in text
    )


def _present(raw: dict[str, Any], column: str) -> Any:
    if column not in raw:
        raise Fault("missing_column", "the column is missing", column)
    if raw[column] is None:
        raise Fault("null", "expected text, got null", column)
    return raw[column]


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} ({shown(value)})"


def _form(value: object) -> str:
    return "text" if isinstance(value, str) else "a list of messages"


def _text(column: str, value: object, reason_if_empty: str) -> str:
    if not isinstance(value, str):
        raise Fault("wrong_type", f"expected text, got {_kind(value)}", column)
    if blank(value):
        raise Fault(reason_if_empty, f"the text is empty ({shown(value)})", column)
    if found := FORBIDDEN.search(value):
        kind = "lone_surrogate" if found[0] >= "\ud800" else "control_character"
        raise Fault(kind, f"{kind.replace('_', ' ')} {shown(found[0])} at character {found.start() + 1}", column)
    return value


def _answer(column: str, value: object, reason_if_empty: str) -> str:
    """The text of an assistant turn, given as text or as a list with this one message."""
    if not isinstance(value, list):
        return _text(column, value, reason_if_empty)
    if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
        raise Fault(
            "bad_messages", "expected text, or a list of one assistant message (before it, the prompt again)", column
        )
    return _text(column, _message(column, 0, value[0])["content"], reason_if_empty)


def _after_prompt(value: object, prompt: list[Message]) -> object:
    """What comes after the prompt, where a preference data set repeats it in every answer."""
    if isinstance(value, list) and len(value) == len(prompt) + 1 and value[:-1] == prompt:
        return value[-1:]
    return value


def _conversation(column: str, value: object) -> tuple[list[Message], str | None]:
    """The turns up to the last user turn, and the assistant turn after it if there is one."""
    turns = _messages(column, value)
    answer = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
    return _ending_with_user(column, turns), answer


def _ending_with_user(column: str, turns: list[Message]) -> list[Message]:
    if turns and turns[-1]["role"] == "user":
        return turns
    last = f"a turn of {turns[-1]['role']}" if turns else "nothing"
    raise Fault("bad_turns", f"the prompt must end with a user turn, it ends with {last}", column)


def _messages(column: str, value: object, expected: str = "a list of messages") -> list[Message]:
    """Messages that a chat template can render: an optional system turn, then user and assistant in turn."""
    if not isinstance(value, list):
        raise Fault("wrong_type", f"expected {expected}, got {_kind(value)}", column)
    if not value:
        raise Fault("empty_prompt", "the list of messages is empty", column)
    turns = [_message(column, number, item) for number, item in enumerate(value)]
    system = turns[0]["role"] == "system"
    for number, turn in enumerate(turns[system:]):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected:
            message = f"message {number + system + 1} is of {turn['role']}, expected {expected}"
            raise Fault("bad_turns", f"{message}: user and assistant take turns, system only comes first", column)
    return turns


def _message(column: str, number: int, item: object) -> Message:
    where = f"message {number + 1}"
    if not isinstance(item, dict):
        raise Fault("bad_messages", f"{where}: expected an object with role and content, got {shown(item)}", column)
    # Arrow fills the keys that other messages have with nulls.
    keys = {key for key, value in item.items() if value is not None}
    if extra := sorted(keys - {"role", "content"}):
        raise Fault("extra_key", f"{where}: unexpected key {shown(extra[0])}; role and content are read", column)
    role, content = item.get("role"), item.get("content")
    if role not in ("system", "user", "assistant"):
        raise Fault("bad_role", f"{where}: role is system, user or assistant, not {shown(role)}", column)
    # An empty system turn is a choice; any other empty turn is a hole in the data.
    if role == "system" and isinstance(content, str) and not content.strip():
        return {"role": role, "content": ""}
    try:
        return {
            "role": role,
            "content": _text(column, content, "empty_prompt" if role == "user" else "empty_turn"),
        }
    except Fault as fault:
        raise Fault(fault.reason, f"{where}: {fault.message}", column) from None


def _identity(column: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Fault("wrong_type", f"expected text or an integer, got {_kind(value)}", column)
    text = str(value)
    if blank(text) or not text.isprintable():
        raise Fault("bad_id", f"an id needs visible characters, and no others: {shown(text)}", column)
    if len(text) > MAX_ID:
        raise Fault("bad_id", f"the id has {len(text)} characters, at most {MAX_ID} are allowed", column)
    return text
