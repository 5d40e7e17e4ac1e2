"""Requests and answers as files in the format of batch services (half price at most of them; `vllm run-batch`
takes the same). The answers go through the same checks and into the same log as live ones."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgpo_cli.artifacts import line, write_lines
from sgpo_cli.errors import IncompleteError, RemoteError, UsageError
from sgpo_cli.remote.answer import Answer, RateLimited, RowRefused, Transient, read
from sgpo_cli.remote.asker import Question
from sgpo_cli.remote.paid import Paid, number_of
from sgpo_cli.remote.secret import redact_bytes

if TYPE_CHECKING:
    from sgpo_cli.engines.openai import Terms

logger = logging.getLogger(__name__)
URL = "/v1/chat/completions"


def write_requests(path: str, questions: Iterable[Question], paid: Paid) -> int:
    """Write what has no answer yet, one request a line; returns how many.

    Raises:
        UsageError: the file exists already.
    """
    if Path(path).exists():
        raise UsageError(f"{path}: exists already", "name a new file, or remove it")
    count = 0

    def lines() -> Iterator[dict[str, Any]]:
        nonlocal count
        for question in questions:
            if paid.claim(number_of(question.key)):
                count += 1
                yield {"custom_id": question.key, "method": "POST", "url": URL, "body": question.body}

    write_lines(Path(path), lines())
    return count


def read_answers(path: str, questions: Iterable[Question], paid: Paid, terms: "Terms") -> None:
    """Put the answers in a file into the log.

    Raises:
        UsageError: the file is missing, or a line is not an answer of a batch service.
        IncompleteError: requests are left without an answer, more than may fail.
    """
    wanted = {number_of(question.key): question for question in questions if paid.claim(number_of(question.key))}
    total, counts = len(wanted), Counter[str]()
    for number, (key, status, body) in enumerate(_lines(path), 1):
        question = wanted.get(number_of(key)) if len(key) == 32 else None
        if question is None or question.key != key:
            counts["for requests that are not of this step or are answered already"] += 1
            continue
        try:
            answer = read(status, {}, redact_bytes(body), lambda q=question: q.text, thinking=terms.thinking)  # type: ignore[misc]
        except RowRefused as refusal:
            answer = Answer("", refusal.finish, 0, 0)
        except Transient as fault:
            if fault.kind != "empty" or fault.paid is None:
                counts[f"failed: {fault.kind}"] += 1
                continue
            answer = Answer(**{**asdict(fault.paid), "finish": "empty"})
        except (RateLimited, RemoteError) as fault:
            counts[f"failed: {fault}"[:80]] += 1
            logger.debug("%s:%d: %s", path, number, fault)
            continue
        paid.add(key, answer, batch=True)
        del wanted[number_of(key)]
        counts["answers"] += 1
    paid.index()
    summary = ", ".join(f"{count} {what}" for what, count in counts.most_common()) or "nothing in it"
    logger.info("%s: %s", path, summary)
    if len(wanted) > terms.max_failed:
        raise IncompleteError(
            f"{path}: {len(wanted)} of {total} requests have no answer ({summary}); the others are kept",
            "write the rest with --batch-out and run that, or leave --batch-in out to ask for the rest at once",
        )


def _lines(path: str) -> Iterator[tuple[str, int, bytes]]:
    """(custom_id, status, body) of each line."""
    try:
        size = Path(path).stat().st_size
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "name the file that the batch service gave back") from None
    if not size:
        raise UsageError(f"{path}: empty", "name the file that the batch service gave back")
    with Path(path).open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                entry = json.loads(text)
                if "body" in entry:
                    raise ValueError("it is a request")
                key, response, failure = entry["custom_id"], entry.get("response"), entry.get("error")
                status = int(response["status_code"]) if response else 500
                body = response["body"] if response else {"error": failure}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(
                    f"{path}:{number}: not a line of a batch service's output ({type(error).__name__}: {error})",
                    "lines have custom_id and response, with status_code and body; requests are not answers",
                ) from None
            yield str(key), status, line(body) if isinstance(body, dict) else str(body).encode()
