"""Reads what a server sent: an answer to keep, a fault to try again, or a refusal to stop at.

Nothing is taken on trust: servers send HTML with status 200, lists, `choices: null`, half a JSON text
(measured: `openai` 3.54 hands some of these on as results), so the answer is checked as a shape.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from sgpo_cli.engines.base import FinishReason
from sgpo_cli.errors import RemoteError
from sgpo_cli.remote.secret import HIDDEN
from sgpo_cli.schema import blank

CHARS_PER_TOKEN = 4.3  # of English prose in the tokenizers of common models: 4 to 4.7
OTHER_SCRIPTS = 0.6  # tokens for a character outside ASCII: about 1 in Chinese, 0.3 to 0.5 in Cyrillic or accents
CONTEXT = re.compile(r"context.length|context.window|maximum context|too long|too many tokens|max_model_len", re.I)
HOPELESS_CODES = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated")
# Messages of servers that want another name for the token limit, or none of our parameters.
RENAMED = re.compile(r"max_completion_tokens")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: no file takes it
MOST_TOKENS = 10_000_000  # of one request; a larger number is not believed
UNSUPPORTED = re.compile(r"(unsupported|unrecognized|unknown|not (permitted|support|allowed))", re.I)


@dataclass(frozen=True)
class Answer:
    """What was paid for: a text, why it ended, and its tokens (estimated where the server did not say)."""

    text: str
    finish: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    estimated: bool = False
    model: str = ""
    fingerprint: str = ""


class Transient(Exception):
    """Worth another try: `kind` is one word for counting, `paid` what the useless answer cost."""

    def __init__(self, kind: str, message: str = "", paid: Answer | None = None) -> None:
        super().__init__(message)
        self.kind, self.paid = kind, paid


class RateLimited(Exception):
    """Everybody has to wait; `seconds` is the server's wish, if it has one."""

    def __init__(self, seconds: float | None, message: str) -> None:
        super().__init__(message)
        self.seconds = seconds


class RowRefused(Exception):
    """The server will not answer this request, whenever it is asked."""

    def __init__(self, finish: FinishReason, message: str) -> None:
        super().__init__(message)
        self.finish = finish


def read(
    status: int, headers: Mapping[str, str], content: bytes, request: Callable[[], str], *, thinking: bool
) -> Answer:
    """The answer in a response.

    Args:
        request: gives the request's texts, to estimate its tokens by.
        thinking: keep what a reasoning model thinks aloud.

    Raises:
        Transient, RateLimited, RowRefused: see there.
        RemoteError: what no further request can change: key, quota, model name, address.
    """
    if status != 200:
        raise _refusal(status, headers, _json(content), content)
    body = _json(content)
    if not isinstance(body, dict):
        raise Transient("malformed", f"status 200, and not a chat completion but {_start(content)}")
    error = body.get("error")
    if error and not body.get("choices"):
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, int) and 400 <= code < 600:
            raise _refusal(code, headers, body, content)
        if code in HOPELESS_CODES:
            raise _refusal(429, headers, body, content)
        raise Transient("error_in_answer", _message(body, content))
    return _completion(body, content, request, thinking)


def _completion(body: dict[str, Any], content: bytes, request: Callable[[], str], thinking: bool) -> Answer:
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    message = choice.get("message") if isinstance(choice, dict) else None
    if choices and not isinstance(message, dict):
        raise Transient("malformed", f"no message in the answer: {_start(content)}")
    message = message or {}
    raw = _text(message.get("content")).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    text = raw if thinking else strip_thinking(raw)
    reason = choice.get("finish_reason") if isinstance(choice, dict) else None
    finish: FinishReason = {"length": "length", "content_filter": "filtered"}.get(str(reason), "stop")  # type: ignore[assignment]
    if message.get("refusal") and not text.strip():
        finish = "refused"
    if HIDDEN in text:
        finish = "secret"
    if SURROGATE.search(text):
        text, finish = SURROGATE.sub("\ufffd", text), "broken"
    paid = _with_usage(body, text, finish, request, raw)
    if finish == "stop" and blank(text):
        raise Transient("empty", "an empty answer", paid)
    return paid


def _with_usage(body: dict[str, Any], text: str, finish: FinishReason, request: Callable[[], str], raw: str) -> Answer:
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    estimated = prompt is None or completion is None
    if prompt is None:
        prompt = estimate_tokens(request())
    if completion is None:
        completion = estimate_tokens(raw)
    elif (total := _count(usage.get("total_tokens"))) is not None:
        completion = max(completion, total - prompt)  # some servers keep what was thought out of it
    model, fingerprint = (str(body.get(name) or "")[:200] for name in ("model", "system_fingerprint"))
    return Answer(text, finish, prompt, completion, min(cached or 0, prompt), estimated, model, fingerprint)


def estimate_tokens(text: str) -> int:
    """Tokens of a text under an unknown tokenizer."""
    other = 0 if text.isascii() else sum(char > "\x7f" for char in text)
    return round((len(text) - other) / CHARS_PER_TOKEN + other * OTHER_SCRIPTS)


def strip_thinking(text: str) -> str:
    """Without what a reasoning model thinks aloud before it answers, also where the template opened the tag."""
    head, tag, rest = text.partition("</think>")
    if tag and "<think>" not in rest:
        return rest.lstrip()
    if head.lstrip().startswith("<think>"):
        return "" if not tag else rest.rpartition("</think>")[2].lstrip()
    return text


def _text(content: Any) -> str:
    """A message's content: text, or a list of parts of which the texts count."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _count(value: Any) -> int | None:
    sane = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS
    return value if sane else None


def _refusal(status: int, headers: Mapping[str, str], body: Any, content: bytes) -> Exception:
    """The exception for a status that is not 200."""
    message, code = _message(body, content), _code(body)
    said = f"status {status}: {message}"
    if status == 429 or (status == 503 and retry_after(headers) is not None):
        if any(word in (code, _code(body, "type")) for word in HOPELESS_CODES):
            return RemoteError(said, "check plan and billing; what was answered is kept, run again to continue")
        return RateLimited(retry_after(headers), said)
    if status in (401, 403):
        return RemoteError(said, "check the key: is it set, and may it use this model?")
    if status == 402:
        return RemoteError(said, "check the balance; what was answered is kept, run again to continue")
    if status in (404, 405):
        return RemoteError(said, "check the name of the model, and the URL: it mostly ends with /v1")
    if 300 <= status < 400:
        target = headers.get("location", "")
        return RemoteError(f"status {status}: a redirect to {target!r}, not followed", "name the right URL")
    if status in (408, 409, 425) or status >= 500:
        return Transient(f"http_{status}", said)
    if status == 413 or code == "context_length_exceeded" or CONTEXT.search(message):
        return RowRefused("too_long", said)
    return RowRefused("bad_request", said)


def hint_for(message: str) -> str:
    """What to change when a server refuses every request as malformed."""
    if CONTEXT.search(message):
        return "the prompts do not fit: a shorter --teacher-prompt, or a server with a longer context"
    if RENAMED.search(message):
        return "pass --max-tokens-field max_completion_tokens"
    if UNSUPPORTED.search(message):
        return "leave the parameter out with --drop-params NAME"
    return "check the model's name and the request's parameters (--extra-body, --drop-params, --max-tokens-field)"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by `retry-after-ms` or `retry-after` (seconds or an HTTP date)."""
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(float(milliseconds) / 1000, 0.0)
        value = headers.get("retry-after")
        if value is None:
            return None
        if value.strip().replace(".", "", 1).isdigit():
            return float(value)
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _message(body: Any, content: bytes) -> str:
    """What the server says is wrong, on one line; FastAPI says it under `detail`."""
    if isinstance(body, dict):
        error = body.get("error")
        said = error.get("message") if isinstance(error, dict) else error
        said = said or body.get("message") or body.get("detail")
        if said:
            return _line(said if isinstance(said, str) else json.dumps(said, ensure_ascii=False))
    return _start(content)


def _code(body: Any, name: str = "code") -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get(name) or "") if isinstance(error, dict) else ""


def _start(content: bytes) -> str:
    return _line(content[:2000].decode("utf-8", "replace")) or "nothing"


def _line(text: str) -> str:
    words = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return words if len(words) <= 300 else words[:300] + " ..."
