"""The remote client against a server that fails on purpose: every row of the table of faults, over real sockets."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_server import (
    FAULTS,
    Choice,
    FaultServer,
    changed,
    message,
    mixed,
    only,
    rate_limit,
    redirect,
    schedule,
    sequence,
)

from sgpo_cli.engines import Generation, Sampling
from sgpo_cli.engines.openai import OpenAIEngine, Terms
from sgpo_cli.errors import IncompleteError, RemoteError, SgpoError, UsageError
from sgpo_cli.remote.answer import strip_thinking
from sgpo_cli.remote.asker import Patience
from sgpo_cli.remote.budget import Budget, Prices
from sgpo_cli.remote.endpoint import open_endpoint
from sgpo_cli.remote.form import RequestForm
from sgpo_cli.remote.gate import Limits
from sgpo_cli.remote.paid import Paid

QUICK = Patience(timeout=2.0, max_attempts=4, max_wait=5.0, max_outage=1.0)


def conversations(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"What of thing number {number}?"}] for number in range(count)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "step").mkdir()
    return tmp_path / "step"


class Client:
    """One engine on one server, with a log of its own; `facts` are those of the last run."""

    def __init__(self, url: str, directory: Path, concurrency: int = 16, **terms: Any) -> None:
        limits = terms.pop("limits", Limits(concurrency))
        form = {name: terms.pop(name) for name in ("extra", "drop", "max_tokens_field") if name in terms}
        self.engine = OpenAIEngine(
            [open_endpoint(each, None) for each in url.split(",")],
            RequestForm("", "teacher", **form),
            Terms(limits, terms.pop("patience", QUICK), **terms),
        )
        self.directory = directory
        self.facts: dict[str, Any] = {}

    def ask(self, asked: list[list[dict[str, str]]] | int, sampling: Sampling | None = None) -> list[Generation]:
        texts = conversations(asked) if isinstance(asked, int) else asked
        with Paid(self.directory) as paid:
            try:
                result = self.engine.ask_all(paid, texts, sampling or Sampling(64, 0.0), range(len(texts)), "test")
            finally:
                self.paid_tokens, self.cost = paid.tokens, paid.cost(self.engine.terms.prices or Prices())
            self.facts = result.facts
            return list(result.texts)


def outcome(fault: Choice, directory: Path, **terms: Any) -> tuple[str, int]:
    """How row 3 of 6 ends when all its requests fail in one way, and how often it was sent."""
    bad = "number 3?"
    with FaultServer(only(lambda request: bad in str(request.body["messages"]), fault)) as server:
        client = Client(server.url, directory, max_failed=1, **terms)
        texts = client.ask(6)
        good = [text.finish_reason for place, text in enumerate(texts) if place != 3]
        assert good == ["stop"] * 5
        return texts[3].finish_reason, sum(bad in str(request.body) for request in server.requests)


class TestOneRowThatAlwaysFails:
    @pytest.mark.parametrize(
        "kind",
        "http_408 http_409 http_500 http_502 http_503 http_529 html_503 reset close short broken_json json_list "
        "json_null html_200 error_in_200 empty_body".split(),
    )
    def test_is_tried_again_then_counted_as_failed(self, kind: str, directory: Path) -> None:
        patience = replace(QUICK, max_attempts=2)
        assert outcome(kind, directory, patience=patience) == ("failed", 4)  # two tries, and two when all are through

    @pytest.mark.parametrize(
        "kind", "choices_empty choices_null content_null content_empty content_blank content_zero_width".split()
    )
    def test_empty_answers_are_asked_for_three_times(self, kind: str, directory: Path) -> None:
        assert outcome(kind, directory) == ("empty", 3)

    @pytest.mark.parametrize(
        ("kind", "finish"),
        [
            ("length", "length"),
            ("content_filter", "filtered"),
            ("refusal", "refused"),
            ("huge", "too_large"),
            ("context_length_exceeded", "too_long"),
            ("http_422", "bad_request"),
            ("http_400", "bad_request"),
        ],
    )
    def test_what_will_not_change_is_asked_once(self, kind: str, finish: str, directory: Path) -> None:
        assert outcome(kind, directory) == (finish, 1)

    @pytest.mark.parametrize("kind", ["hang", "drip"])
    def test_no_call_outlives_its_deadline(self, kind: str, directory: Path) -> None:
        started = time.monotonic()
        patience = Patience(timeout=0.5, max_attempts=1)
        assert outcome(kind, directory, patience=patience)[0] == "failed"
        assert time.monotonic() - started < 2 * (0.5 + 0.5)  # its only try, and the one when all are through

    @pytest.mark.parametrize("kind", "usage_missing usage_null usage_strings chunked gzip content_list".split())
    def test_odd_but_good_answers_are_taken(self, kind: str, directory: Path) -> None:
        assert outcome(kind, directory) == ("stop", 1)


def test_half_a_character_makes_no_file_unwritable(directory: Path) -> None:
    with FaultServer(message("half", content="Improved \ud800 answer")) as server:
        (text,) = Client(server.url, directory).ask(1)
    assert (text.text, text.finish_reason) == ("Improved \ufffd answer", "broken")


def test_absurd_usage_is_not_believed(directory: Path) -> None:
    with FaultServer(changed("absurd", good=True, usage={"prompt_tokens": 10**30, "completion_tokens": 3})) as server:
        client = Client(server.url, directory)
        client.ask(1)
        assert client.paid_tokens < 100


@pytest.mark.parametrize(
    "form", [{"drop": ["messages"]}, {"drop": ["top-p"]}, {"extra": {"n": 5}}, {"extra": {"stream": True}}]
)
def test_what_makes_the_request_stays(form: dict[str, Any], directory: Path) -> None:
    with pytest.raises(UsageError):
        Client("http://127.0.0.1:9/v1", directory, **form)


def test_thoughts_are_taken_off_and_can_be_kept(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with FaultServer() as plain, FaultServer("think") as thinking, FaultServer("reasoning_content") as beside:
        (answer,) = Client(plain.url, directory).ask(1)
        assert Client(thinking.url, directory).ask(1)[0].text == answer.text
        assert Client(beside.url, directory).ask(1)[0].text == answer.text
        kept = Client(thinking.url, tmp_path / "other", thinking=True).ask(1)
        assert kept[0].text.startswith("<think>First")


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("plain", "plain"),
        ("<think>a</think>\n\nb", "b"),
        ("a, as the template opened it</think>\nb", "b"),
        ("<think>never closed", ""),
        ("<think>a</think><think>b</think>c", "c"),
        ("of <think> and </think> we speak <think>", "of <think> and </think> we speak <think>"),
    ],
)
def test_strip_thinking(text: str, stripped: str) -> None:
    assert strip_thinking(text) == stripped


class TestStopsAtOnce:
    @pytest.mark.parametrize(
        "kind", "http_401 http_403 html_403 http_402 http_404 model_not_found insufficient_quota".split()
    )
    def test_when_no_request_can_succeed(self, kind: str, directory: Path) -> None:
        with FaultServer(kind, latency=0.05) as server:
            started = time.monotonic()
            with pytest.raises(RemoteError, match=r"status \d+") as caught:
                Client(server.url, directory, concurrency=8).ask(200)
            assert time.monotonic() - started < 5
            assert len(server.requests) <= 8
            assert server.url in str(caught.value)

    def test_a_model_that_is_not_there_is_told_with_those_that_are(self, directory: Path) -> None:
        with FaultServer("model_not_found", models=("one", "two")) as server:
            with pytest.raises(RemoteError, match="model teacher") as caught:
                Client(server.url, directory).ask(5)
            assert caught.value.hint == "it serves: one, two"

    def test_and_keeps_what_was_paid_for(self, directory: Path) -> None:
        with FaultServer(schedule((0, None), (0.5, "insufficient_quota")), latency=0.05) as server:
            with pytest.raises(RemoteError):
                Client(server.url, directory, concurrency=4).ask(2000)
            paid = len(server.paid)
            assert paid > 8
        assert _answers(directory) == paid

    def test_when_every_request_is_refused_alike(self, directory: Path) -> None:
        with FaultServer("http_422", latency=0.02) as server:
            with pytest.raises(RemoteError, match="every request is refused"):
                Client(server.url, directory, concurrency=4).ask(100)
            assert len(server.requests) <= 4 + 5

    def test_at_a_redirect_which_is_not_followed(self, directory: Path) -> None:
        with FaultServer() as other, FaultServer(redirect(other.url + "/chat/completions")) as server:
            with pytest.raises(RemoteError, match="redirect"):
                Client(server.url, directory).ask(5)
            assert other.connections == 0

    def test_when_the_server_is_gone(self, directory: Path) -> None:
        with FaultServer(latency=0.02) as server:
            server.stop()
            started = time.monotonic()
            with pytest.raises(RemoteError, match="nothing has worked"):
                Client(server.url, directory).ask(100)
            assert QUICK.max_outage <= time.monotonic() - started < 20
            server.start()


def _answers(directory: Path) -> int:
    return sum(
        '"key":null' not in line
        for path in (directory / "paid").glob("*.jsonl")
        for line in path.read_text().splitlines()
    )


class TestRateLimits:
    @pytest.mark.parametrize("form", ["seconds", "date", "ms"])
    def test_nobody_asks_while_the_server_wants_rest(self, form: str, directory: Path) -> None:
        rest = 1.0
        with FaultServer(only(lambda request: request.number == 20, rate_limit(rest, form)), latency=0.01) as server:
            texts = Client(server.url, directory, concurrency=8).ask(60)
            assert all(text.finish_reason == "stop" for text in texts)
            limited = next(request for request in server.requests if request.status == 429)
            assert limited.answered is not None
            # What was on its way when the server spoke does not count.
            begin, end = limited.answered + 0.1, limited.answered + rest
            assert not [request for request in server.requests if begin < request.arrived < end]

    def test_too_long_a_rest_is_refused(self, directory: Path) -> None:
        with FaultServer(rate_limit(300)) as server, pytest.raises(RemoteError, match="longer than --max-wait"):
            Client(server.url, directory).ask(5)

    def test_they_count_against_no_row(self, directory: Path) -> None:
        patience = replace(QUICK, max_attempts=1)
        with FaultServer(mixed(0.5, seed=3, kinds=[rate_limit(0.02, "ms")])) as server:
            client = Client(server.url, directory, patience=patience)
            assert {text.finish_reason for text in client.ask(40)} == {"stop"}
            assert client.facts["retries"].keys() == {"rate_limit"}

    def test_concurrency_follows_the_server(self, directory: Path) -> None:
        busy = only(lambda request: request.in_flight > 4, rate_limit(0.05, "ms"))
        with FaultServer(busy, latency=0.02) as server:
            client = Client(server.url, directory, concurrency=32)
            assert {text.finish_reason for text in client.ask(300)} == {"stop"}
            assert client.facts["lowest_concurrency"] <= 4
            assert client.facts["retries"]["rate_limit"] < 150

    def test_requests_per_minute(self, directory: Path) -> None:
        with FaultServer() as server:
            started = time.monotonic()
            Client(server.url, directory, limits=Limits(8, requests_per_minute=1200)).ask(30)
            assert time.monotonic() - started >= 29 * 60 / 1200
            arrivals = sorted(request.arrived for request in server.requests)
            assert arrivals[-1] - arrivals[0] >= 1.3

    def test_tokens_per_minute(self, directory: Path) -> None:
        with FaultServer() as server:
            client = Client(server.url, directory, limits=Limits(8, tokens_per_minute=20_000))
            started = time.monotonic()
            client.ask(30)
            seconds = time.monotonic() - started
            assert seconds > 0.8 * client.paid_tokens / 20_000 * 60 - 1


class TestPaysOnce:
    def test_grown_and_reordered_input_asks_only_for_what_is_new(self, directory: Path) -> None:
        with FaultServer() as server:
            client = Client(server.url, directory)
            first = client.ask(30)
            texts = client.ask(list(reversed(conversations(40))))
            assert len(server.requests) == 40
            assert client.facts["reused"] == 30
            assert texts[::-1][:30] == first

    def test_the_log_of_an_earlier_output_is_taken_over(self, directory: Path) -> None:
        with FaultServer() as server:
            client = Client(server.url, directory)
            client.ask(10)
            for number in (1, 2):
                old = directory.rename(directory.with_name(f"step.old-{number}"))
                directory.mkdir()
                client.ask(10 + number)
                shutil.rmtree(old)
            assert len(server.requests) == 12
            assert client.paid_tokens == client.facts["prompt_tokens"] + client.facts["completion_tokens"]

    def test_a_damaged_record_costs_its_own_answer_only(self, directory: Path) -> None:
        with FaultServer() as server:
            client = Client(server.url, directory)
            first = client.ask(10)
            log = directory / "paid" / "rank-0000.jsonl"
            content = bytearray(log.read_bytes())
            content[len(content) // 2] ^= 1
            log.write_bytes(content)
            assert client.ask(10) == first
            assert len(server.requests) == 11

    def test_another_prompt_parameter_or_model_is_another_request(self, directory: Path) -> None:
        with FaultServer() as server:
            Client(server.url, directory).ask(3)
            Client(server.url, directory, extra={"top_k": 3}).ask(3)
            Client(server.url, directory).ask(3, Sampling(32, 0.0))
            Client(server.url, directory).ask(3, Sampling(64, 0.7))
            assert len(server.requests) == 12

    def test_equal_requests_are_sent_once(self, directory: Path) -> None:
        with FaultServer(latency=0.02) as server:
            texts = Client(server.url, directory).ask(conversations(2) * 10)
            assert len(server.requests) == 2
            assert texts == texts[:2] * 10

    def test_failed_rows_alone_are_asked_for_again(self, directory: Path) -> None:
        bad = only(lambda request: "number 7?" in str(request.body), "http_500")
        with FaultServer(bad) as server, pytest.raises(IncompleteError, match=r"1 of 20 rows failed .*http_500"):
            Client(server.url, directory, patience=replace(QUICK, max_attempts=2)).ask(20)
        with FaultServer(port=server.port) as server:
            assert {text.finish_reason for text in Client(server.url, directory).ask(20)} == {"stop"}
            assert len(server.requests) == 1

    def test_a_torn_log_loses_its_last_answer_only(self, directory: Path) -> None:
        with FaultServer() as server:
            client = Client(server.url, directory)
            first = client.ask(10)
            log = directory / "paid" / "rank-0000.jsonl"
            log.write_bytes(log.read_bytes()[:-5])
            assert client.ask(10) == first
            assert len(server.requests) == 11


class TestBudget:
    PRICES = Prices(input=1000.0, output=1000.0)

    def test_holds_over_all_runs(self, directory: Path) -> None:
        with FaultServer(latency=0.02) as server:
            client = Client(server.url, directory, concurrency=4, prices=self.PRICES, budget=Budget(cost=0.5))
            for _ in range(3):
                with pytest.raises(RemoteError, match=r"--max-cost 0\.5 is reached"):
                    client.ask(200)
            assert 0.3 < client.cost <= 0.5
            assert len(server.requests) < 60
            more = Client(server.url, directory, concurrency=4, prices=self.PRICES, budget=Budget(cost=100.0))
            more.ask(200)
            assert len(server.requests) == 200

    def test_counts_what_was_paid_without_a_price_and_at_the_price_of_today(self, directory: Path) -> None:
        with FaultServer() as server:
            Client(server.url, directory).ask(10)
            dear = Client(server.url, directory, prices=self.PRICES, budget=Budget(cost=0.1))
            with pytest.raises(RemoteError, match=r"--max-cost 0\.1 is reached"):
                dear.ask(12)
            cheap = Client(server.url, directory, prices=Prices(1.0, 1.0), budget=Budget(cost=0.1))
            cheap.ask(12)
            assert len(server.requests) == 12

    def test_what_was_thought_aside_is_on_the_bill(self, directory: Path) -> None:
        usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 520}
        with FaultServer(changed("thought", good=True, usage=usage)) as server:
            client = Client(server.url, directory)
            client.ask(3)
            assert client.paid_tokens == 3 * 520

    def test_of_tokens(self, directory: Path) -> None:
        with FaultServer(latency=0.02) as server:
            client = Client(server.url, directory, concurrency=4, budget=Budget(tokens=500))
            with pytest.raises(RemoteError, match="--max-tokens 500 is reached"):
                client.ask(200)
        assert 300 < client.paid_tokens <= 500

    def test_useless_answers_are_on_the_bill(self, directory: Path) -> None:
        with FaultServer(sequence(["content_empty"], per_body=True)) as server:
            client = Client(server.url, directory, prices=self.PRICES)
            client.ask(5)
            answered = client.facts["prompt_tokens"] + client.facts["completion_tokens"]
            assert client.paid_tokens > answered
            assert len(server.requests) == 10


@pytest.mark.parametrize(("seed", "share"), [(1, 0.3), (2, 0.6)])
def test_mixed_faults_change_nothing_but_the_time(seed: int, share: float, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "calm").mkdir()
    count = 60
    with FaultServer() as server:
        calm = Client(server.url, tmp_path / "calm").ask(count)
    with FaultServer(mixed(share, seed, at_most=6), port=server.port) as server:
        client = Client(server.url, directory, concurrency=64, patience=Patience(timeout=2.0))
        assert client.ask(count) == calm
        assert sorted(server.paid.values()) == [1] * count


class TestSeveralServers:
    def test_share_the_work(self, directory: Path) -> None:
        with FaultServer(latency=0.02) as one, FaultServer(latency=0.02) as two:
            texts = Client(f"{one.url},{two.url}", directory, concurrency=4).ask(100)
            assert {text.finish_reason for text in texts} == {"stop"}
            assert min(len(one.requests), len(two.requests)) > 30
            assert len(one.requests) + len(two.requests) == 100

    def test_one_that_dies_stops_nobody(self, directory: Path) -> None:
        with FaultServer(latency=0.02) as one, FaultServer("reset", latency=0.02) as two:
            texts = Client(f"{one.url},{two.url}", directory, concurrency=4).ask(100)
            assert {text.finish_reason for text in texts} == {"stop"}
            assert sum(one.paid.values()) == 100
            assert len(two.requests) < 40

    def test_all_of_them_gone_is_an_outage(self, directory: Path) -> None:
        with FaultServer("close") as one, FaultServer("reset") as two:
            client = Client(f"{one.url},{two.url}", directory)
            with pytest.raises(RemoteError, match="nothing has worked"):
                client.ask(100)


class TestAddresses:
    @pytest.mark.parametrize(
        "url",
        "file:///etc/passwd ftp://host/v1 localhost:8000/v1 http:// http://169.254.169.254/v1 http://[fe80::1]/v1 "
        "http://host:port/v1".split(),
    )
    def test_where_no_request_should_go(self, url: str) -> None:
        with pytest.raises(UsageError):
            open_endpoint(url, None)

    def test_nothing_secret_is_left_in_what_is_shown(self) -> None:
        endpoint = open_endpoint(
            "https://user:pass-word-1@host.example:8443/v1/?key=0123456789abc&api-version=1", None
        )
        assert endpoint.url == "https://host.example:8443/v1"
        assert endpoint.query == {"key": "0123456789abc", "api-version": "1"}
        assert "0123456789abc" not in repr(endpoint)

    def test_no_key_travels_in_the_clear(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sgpo_cli.remote.secret import read_key

        monkeypatch.setenv("A_KEY", "short")
        key = read_key("A_KEY", None)
        for url in ("http://127.0.0.1:1/v1", "http://localhost/v1", "http://[::1]/v1", "https://host.example/v1"):
            open_endpoint(url, key)
        with pytest.raises(UsageError, match="unencrypted"):
            open_endpoint("http://host.example/v1", key)
        open_endpoint("http://host.example/v1", key, allow_insecure=True)
        open_endpoint("http://host.example/v1", None)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return


def test_errors_are_ours() -> None:
    assert issubclass(RemoteError, SgpoError)
    assert RemoteError.exit_code == 6
    assert json.dumps(sorted(FAULTS))  # every kind has a name
