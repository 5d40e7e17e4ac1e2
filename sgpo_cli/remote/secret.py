"""Secrets: read from the environment or a file, and kept out of all that is printed, logged or written.

A server may echo the Authorization header in an error or even in an answer (measured: the `openai` package
then puts the key into `str(exception)`), so it is not enough to be careful with one's own words.
"""

import base64
import json
import logging
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from sgpo_cli.errors import UsageError

logger = logging.getLogger(__name__)
DEFAULT = "OPENAI_API_KEY"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
SHORTEST = 8  # a shorter one ("EMPTY", "none") is a placeholder, and hiding it would deface every text
HIDDEN = "[hidden:api-key]"
_forms: list[str] = []
_forms_in_bytes: list[bytes] = []


class Secret:
    """A value that does not show itself."""

    def __init__(self, value: str) -> None:
        self._value = value
        _hide(value)

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret()"


def read_key(variable: str, file: str | None) -> Secret | None:
    """The key in a file if one is named, else in an environment variable; None if there is neither.

    Raises:
        UsageError: the file cannot be read or is empty, or the key has characters that no header can carry.
    """
    if variable and not NAME.fullmatch(variable):
        raise UsageError("the option for the key's variable: not the name of one", "name it; the key stays there")
    value, where = os.environ.get(variable, "") if variable else "", f"${variable}"
    if variable not in ("", DEFAULT) and not value and file is None:
        raise UsageError(f"{where} is not set", f"export {variable}=..., or name another variable")
    if file is not None:
        where = file
        path = Path(file).expanduser()
        try:
            value = path.read_text(encoding="utf-8").strip()
            shared = stat.S_IMODE(path.stat().st_mode) & 0o077
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            named = file if os.sep in file or len(file) < SHORTEST * 2 else "the key file"  # it may be the key itself
            raise UsageError(f"{named}: {reason}", "name a file that holds the key and nothing else") from None
        if shared:
            logger.warning("%s: others can read this key; chmod 600 %s", file, file)
        if not value:
            raise UsageError(f"{file}: empty", "name a file that holds the key and nothing else")
    value = value.strip()
    if not value:
        return None
    if not value.isascii() or not value.isprintable() or " " in value:
        raise UsageError(f"{where}: not a key, it has spaces or characters outside ASCII")
    return Secret(value)


def redact(text: str) -> str:
    """The text without any secret that this process has read, in plain, quoted or base64 form."""
    for form in _forms:
        if form in text:
            text = text.replace(form, HIDDEN)
    return text


def redact_bytes(content: bytes) -> bytes:
    """The same for bytes."""
    for form in _forms_in_bytes:
        if form in content:
            content = content.replace(form, HIDDEN.encode())
    return content


def _hide(value: str) -> None:
    if len(value) < SHORTEST or value in _forms:
        return
    forms = {value, quote(value, safe=""), json.dumps(value)[1:-1], *_base64_forms(value.encode())}
    _forms.extend(sorted(forms, key=len, reverse=True))
    _forms_in_bytes[:] = [form.encode() for form in _forms]


def guard_streams() -> None:
    """From here on no secret goes to stdout or stderr, whoever prints, logs or raises; before logging is set up."""
    sys.stdout, sys.stderr = _Redacting(sys.stdout), _Redacting(sys.stderr)


def _base64_forms(value: bytes) -> set[str]:
    """What of `value` shows in a base64 text, wherever in it the value begins; the shared edges are left out."""
    forms = set()
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = encode(b"\0" * shift + value).decode().rstrip("=")
            inner = encoded[-(-shift * 8 // 6) : (len(value) + shift) * 8 // 6]
            forms.add(inner)
    return forms


class _Redacting:
    """A text stream that passes everything on but secrets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
