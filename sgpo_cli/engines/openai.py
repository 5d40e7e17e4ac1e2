"""Generation by any server that speaks OpenAI's chat completions, through the `openai` package.

The package signs and sends; retrying (`max_retries=0`), reading answers and keeping them is ours
(`sgpo_cli.remote`), because its own retries multiply, its time-out is per read and not per call, and it
hands on HTML as a result.
"""

import asyncio
import logging
from array import array
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2 as httpx
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

from sgpo_cli.engines.base import Asked, Generation, Message, Sampling
from sgpo_cli.errors import IncompleteError, RemoteError
from sgpo_cli.progress import RowProgress
from sgpo_cli.remote.answer import Answer, RowRefused, Transient
from sgpo_cli.remote.asker import Asker, Patience, Question, Response, Send
from sgpo_cli.remote.budget import Budget, Prices
from sgpo_cli.remote.endpoint import Endpoint
from sgpo_cli.remote.form import RequestForm
from sgpo_cli.remote.gate import Limits
from sgpo_cli.remote.paid import Paid, number_of
from sgpo_cli.remote.secret import redact, redact_bytes
from sgpo_cli.remote.tally import Tally
from sgpo_cli.sliced import Sliced

logger = logging.getLogger(__name__)
MAX_ANSWER_BYTES = 1 << 20
CONNECT_SECONDS = 10.0
MODELS_SECONDS = 2.0
PLACEHOLDER = "no-key-needed"  # the package insists on a key; local servers do not look at it
PATH = "/chat/completions"


class _CappedStream(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MAX_ANSWER_BYTES:
                raise RowRefused("too_large", f"an answer of more than {MAX_ANSWER_BYTES} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _cap(response: httpx.Response) -> None:
    """Stop reading an answer that is too large to be one; a hook, so that proxies of the environment stay."""
    assert isinstance(response.stream, httpx.AsyncByteStream)
    response.stream = _CappedStream(response.stream)


def _client(endpoint: Endpoint, timeout: float, concurrency: int) -> AsyncOpenAI:
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    return AsyncOpenAI(
        api_key=endpoint.key.reveal() if endpoint.key else PLACEHOLDER,
        base_url=endpoint.url,
        default_query=endpoint.query,
        max_retries=0,
        timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
        http_client=DefaultAsyncHttpxClient(follow_redirects=False, limits=limits, event_hooks={"response": [_cap]}),
    )


@asynccontextmanager
async def connection(endpoint: Endpoint, *, timeout: float, concurrency: int) -> AsyncIterator[Send]:
    """A function that sends one body to an endpoint."""
    client = _client(endpoint, timeout, concurrency)

    async def send(body: Mapping[str, Any]) -> Response:
        try:
            response = await client.post(PATH, cast_to=httpx.Response, body=body)
        except APIStatusError as error:
            response = error.response
        except APIConnectionError as error:
            if isinstance(error.__cause__, RowRefused):
                raise error.__cause__ from None
            kind = "timeout" if isinstance(error.__cause__, httpx.TimeoutException) else "connection"
            reason = str(error.__cause__ or "") or type(error.__cause__ or error).__name__
            raise Transient(kind, redact(f"{endpoint.url}: {reason}")) from None
        return response.status_code, response.headers, redact_bytes(response.content)

    async with client:
        yield send


async def served_models(endpoint: Endpoint) -> list[str]:
    """The names of the models that a server has, none where it does not tell."""
    try:
        async with asyncio.timeout(MODELS_SECONDS), _client(endpoint, MODELS_SECONDS, 1) as client:
            page = await client.models.list()
            return [redact(str(model.id)) for model in page.data[:20]]
    except (OpenAIError, TimeoutError, TypeError, ValueError):
        return []


@dataclass(frozen=True)
class Terms:
    """How a server is to be asked: how fast, how long, for how much; and how many rows may fail."""

    limits: Limits
    patience: Patience
    prices: Prices | None = None
    budget: Budget | None = None
    max_failed: int = 0
    thinking: bool = False


class OpenAIEngine:
    """A model behind an OpenAI-compatible server, or behind several that are asked in turn."""

    def __init__(self, endpoints: Sequence[Endpoint], form: RequestForm, terms: Terms) -> None:
        self.endpoints, self.form, self.terms = endpoints, form, terms
        self.url = ", ".join(endpoint.url for endpoint in endpoints)

    def ask_all(
        self,
        paid: Paid,
        conversations: Sequence[list[Message]],
        sampling: Sampling,
        seeds: Sequence[int],
        label: str,
    ) -> Asked:
        """A text per conversation; answers that are there already are not asked for again.

        Raises:
            RemoteError: the server refuses, is gone, or the budget is reached.
            IncompleteError: more rows failed than may; all others are kept.
        """
        numbers = array("Q")
        reused = 0

        def wanted() -> Iterator[Question]:
            nonlocal reused
            for question in self.form.questions(conversations, sampling, seeds):
                numbers.append(number_of(question.key))
                if paid.claim(numbers[-1]):
                    yield question
                else:
                    reused += 1
                    progress.reuse(1)

        with RowProgress(label, len(conversations), note=lambda: self._note(tally, paid, progress)) as progress:
            tally = Tally(
                paid,
                self.terms.prices,
                self.terms.budget,
                lambda answer: progress.advance(1, answer.completion_tokens),
            )
            asker = self._asker(tally)
            try:
                asker.run(wanted())
            except RemoteError as error:
                raise self._explained(error) from None
        paid.index()
        if len(tally.models) > 1:
            logger.warning("%s: answers came from several models: %s", self.url, ", ".join(sorted(tally.models)))
        texts = PaidTexts(paid, numbers)
        missing = sum(paid.find(number) is None for number in numbers) if tally.failed else 0
        if missing > self.terms.max_failed:
            raise self._too_many(missing, len(numbers), tally)
        return Asked(texts, self._facts(asker, tally, paid, texts, reused, missing))

    def _too_many(self, missing: int, rows: int, tally: Tally) -> IncompleteError:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in tally.failure_kinds())
        return IncompleteError(
            f"{self.url}: {missing} of {rows} rows failed after retries ({kinds}), "
            f"--max-failed is {self.terms.max_failed}; the other answers are kept",
            "run the same command again: only the failed rows are asked for again",
        )

    def _explained(self, error: RemoteError) -> RemoteError:
        """The error with the server's address; where there is no such model, with those that there are."""
        if "status 404" not in str(error):
            return RemoteError(f"{self.url}: {error}", error.hint)
        served = asyncio.run(served_models(self.endpoints[0]))
        hint = f"it serves: {', '.join(served)}" if served else error.hint
        return RemoteError(f"{self.url}: model {self.form.model}: {error}", hint)

    def _asker(self, tally: Tally) -> Asker:
        terms = self.terms
        return Asker(
            [
                partial(connection, each, timeout=terms.patience.timeout, concurrency=terms.limits.concurrency)
                for each in self.endpoints
            ],
            terms.limits,
            terms.patience,
            tally,
            thinking=terms.thinking,
        )

    def _note(self, tally: Tally, paid: Paid, progress: RowProgress) -> str:
        """For the live line: cost so far and in the end, and what had to be tried again."""
        note = ""
        if self.terms.prices is not None and tally.answers:
            left = max(progress.total - progress.done, 0)
            spent = paid.cost(self.terms.prices)
            note += f", cost {spent:.4g} of about {spent + left * tally.cost / tally.answers:.4g}"
        if tally.retries:
            kinds = ", ".join(f"{count} {kind}" for kind, count in tally.retries.most_common(3))
            note += f", {tally.retries.total()} retries ({kinds})"
        return note

    def _facts(
        self, asker: Asker, tally: Tally, paid: Paid, texts: "PaidTexts", reused: int, failed: int
    ) -> dict[str, Any]:
        """For the manifest: the answers of this output, the bill of all runs, and the faults of the last."""
        used = [0, 0]
        for text in texts:
            used[0] += text.prompt_tokens
            used[1] += text.completion_tokens
        facts: dict[str, Any] = {
            "url": self.url,
            "prompt_tokens": used[0],
            "completion_tokens": used[1],
            "paid_tokens": paid.tokens,
            "requests": tally.requests,
            "reused": reused,
            "failed": failed,
            "retries": dict(sorted(tally.retries.items())),
            "usage_estimated": tally.estimated,
            "lowest_concurrency": asker.lowest_concurrency,
            "models": sorted(tally.models),
            "fingerprints": sorted(tally.fingerprints),
        }
        return facts | ({"cost": round(paid.cost(self.terms.prices), 6)} if self.terms.prices is not None else {})


class PaidTexts(Sliced[Generation]):
    """The texts of requests, by their numbers, read from the log; one that has no answer has failed."""

    def __init__(self, paid: Paid, numbers: "array[int]") -> None:
        self._paid, self._numbers = paid, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def item(self, position: int) -> Generation:
        found = self._paid.find(self._numbers[position])
        if found is None:
            return Generation("", "failed")
        answer: Answer = self._paid.read(found)
        return Generation(answer.text, answer.finish, answer.prompt_tokens, answer.completion_tokens)
