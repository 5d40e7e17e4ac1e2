"""`sgpo report`: what stands in the page, that hostile data stays text, and that a real browser shows it all."""

import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import pytest
from conftest import Sgpo, write_lines

from sgpo_cli import artifacts
from sgpo_cli.errors import IntegrityError, SgpoError, UsageError
from sgpo_cli.report import write

VERSIONS = {"python": "3.11.7", "trl": "1.16.0"}


def finish(directory: Path, stage: str, inputs: dict[str, str], second: int, **facts: Any) -> str:
    """Write a step's request and manifest; returns its identity as an input."""
    request = {"stage": stage, "version": 1, "config": {"seed": 1}, "inputs": inputs}
    names = sorted(path.name for path in directory.iterdir() if path.suffix in (".jsonl", ".json"))
    outputs = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": artifacts.sha256_file(directory / name)}
        for name in names
        if name not in ("request.json", "manifest.json")
    }
    (directory / "request.json").write_text(json.dumps(request))
    manifest = {
        **request,
        "seconds": 12.5,
        "finished": f"2026-11-21T12:00:{second:02}Z",
        "run_id": "0123456789abcdef",
        "versions": VERSIONS,
        "outputs": outputs,
        **facts,
    }
    seal(directory, manifest)
    return f"step:{artifacts.sha256_file(directory / 'manifest.json')}:."


def seal(directory: Path, manifest: dict[str, Any]) -> None:
    manifest = {name: value for name, value in manifest.items() if name != "digest"}
    manifest["digest"] = artifacts.sha256_json(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def make_run(run: Path, text: str = "harmless", rows: int = 3) -> Path:
    """A run of five steps that never happened; `text` is everywhere where text of others can be."""
    name = text.replace("/", "\u2215").replace("\0", "")[:60]
    run = run / f"{name} run" if text != "harmless" else run
    steps = {key: run / f"{name} {key}" for key in ("targets", "filtered", "pairs", "m1", "scores")}
    for directory in steps.values():
        directory.mkdir(parents=True)
    triples = [
        {"id": f"{text} {n}", "prompt": message(text), "response": f"a {text}", "target": f"b {text} {n}"}
        for n in range(rows)
    ]
    write_lines(steps["targets"] / "train.jsonl", triples)
    made = finish(steps["targets"], "make-targets", {text: f"hub:{text}@1"}, 1, rows_in=rows, rows_out=rows)
    write_lines(steps["filtered"] / "train.jsonl", [{**row, "log_ppl": 0.2} for row in triples[1:]])
    write_lines(steps["filtered"] / "rejects.jsonl", [{**triples[0], "log_ppl": 9.0, "reason": text}])
    finish(steps["filtered"], "filter-ppl", {"dataset": made}, 2, rows_in=rows, rows_out=rows - 1,
           rejected={text: 1}, log_ppl_threshold=0.5)  # fmt: skip
    pairs = [
        {
            "id": f"{text} {n}",
            "prompt": message(f"{text} number {n}"),
            "chosen": message(f"chosen {text} {n} " + "more " * (n % 7)),
            "rejected": message(f"rejected {text} {n}"),
        }
        for n in range(rows)
    ]
    write_lines(steps["pairs"] / "train.jsonl", pairs)
    paired = finish(steps["pairs"], "gen-pairs", {"dataset": f"file:{text}"}, 3, rows_in=rows, rows_out=rows,
                    prompt_tokens=10_000, completion_tokens=2_000, generation_seconds=3.0)  # fmt: skip
    log = [
        {"step": step, "loss": 1 / step, "rewards/chosen": step / 9, "rewards/rejected": -step / 9,
         "rewards/margins": step / 4, "rewards/accuracies": 0.5, "logps/chosen": -9.0, "logps/rejected": -9.5}
        for step in range(1, 30)
    ]  # fmt: skip
    (steps["m1"] / "training_log.json").write_text(json.dumps(log))
    trained = finish(steps["m1"], "dpo", {"dataset": paired}, 4, rows_in=rows, rows_out=rows,
                     training={"steps": 29, "tokens": 700, "first_loss": 0.69, "last_loss": 0.03})  # fmt: skip
    answers = [
        {"id": f"{text} {n}", "model": model, "prompt": message(text), "policy_sampled": f"{model} says {text}",
         "score_policy_sampled": score + n / 100}
        for model, score in ((f"{text} m0", 0.25), (f"{text} m1", 0.75))
        for n in range(rows)
    ]  # fmt: skip
    write_lines(steps["scores"] / "train.jsonl", answers)
    entries = [
        {"name": f"{text} {model}", "role": "policy", "decoding": "sampled", "score": score,
         "ci95": [score - 0.02, score + 0.02], "n": rows}
        for model, score in (("m0", 0.25), ("m1", 0.75))
    ]  # fmt: skip
    (steps["scores"] / "metrics.json").write_text(json.dumps({"models": entries}))
    finish(steps["scores"], "evaluate", {"models.0": trained}, 5, rows_in=2 * rows, rows_out=2 * rows,
           versions=VERSIONS | {"trl": text})  # fmt: skip
    (run / "run.json").write_text(json.dumps({"command": f"sgpo run {text}", "recipe": text}))
    return run


class Page(HTMLParser):
    """Elements with their attributes' names in order, the text, and the embedded rows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.data = ""
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self._inside = "data" if ("id", "examples-data") in attrs else tag

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data
        elif self._inside not in ("script", "style"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def test_the_page_says_what_the_run_did(run: Path) -> None:
    page = Page(write(run))
    for text in (
        "harmless m1 scores 0.750 where harmless m0 scores 0.250: +0.500",  # headline
        "harmless 1",  # the reason of a drop, with its count
        "from harmless targets",  # lineage
        "cut 0.5",
        "Rewards", "Log-probabilities", "Pair accuracy", "29 optimizer steps, 700 tokens",
        "1 min 2 s",  # 5 x 12.5 s
        "10\u202f000", "667",  # tokens read, tokens a second
        "sgpo run harmless", "1.16.0, harmless",
        "sgpo dpo --dataset 'run/harmless pairs' --seed 1 --output-dir 'run/harmless m1'",
    ):  # fmt: skip
        assert text in page.text, text
    sets = json.loads(page.data)
    assert [found["title"] for found in sets][:2] == ["harmless pairs", "harmless scores: policy, sampled"]
    assert [part for row in sets[0]["rows"] for part in row["parts"]][:3] == [
        [-1, "rejected "], [1, "chosen "], [0, "harmless 0"],
    ]  # fmt: skip
    assert sets[1]["rows"][0]["scores"] == [0.25, 0.75]
    assert {row.get("reason") for found in sets for row in found["rows"]} == {None, "harmless"}


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first = write(run).read_bytes()
    shutil.copytree(run, tmp_path / "elsewhere" / "run")
    assert write(tmp_path / "elsewhere" / "run").read_bytes() == first
    assert write(run, tmp_path / "other.html").read_bytes() == first


PAYLOADS = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>', "'><svg onload=alert(1)>", "<svg><script>alert(1)</script></svg>",
    "</pre><h1>x", "</textarea><b>", "</style><script>alert(1)</script>", "</title><script>alert(1)</script>",
    "<!--", "--><script>alert(1)</script>", "<![CDATA[", "]]><script>alert(1)</script>", "&lt;script&gt;",
    "&#60;script&#62;alert(1)", "{{ 7 * 7 }}", "{% raw %}", "${alert(1)}", "javascript:alert(1)",
    '" onmouseover="alert(1)', "' onfocus='alert(1)' autofocus='", "`onclick=alert(1)`", "\u2028alert(1)\u2029",
    "<iframe src=javascript:alert(1)>", "<a href=data:text/html,x>y</a>", "<base href=//evil.example>",
    "<meta http-equiv=refresh content=0>", "<style>*{display:none}</style>", "\x00<b>\x1b[31m",
]  # fmt: skip


def test_no_payload_becomes_an_element_or_an_attribute(tmp_path: Path) -> None:
    assert len(PAYLOADS) == 30
    for number, payload in enumerate(PAYLOADS):
        page = Page(write(make_run(tmp_path / str(number), payload)))
        harmless = Page(write(make_run(tmp_path / f"harmless {number}", re.sub(r"\S", "x", payload))))
        assert page.elements == harmless.elements, payload
        assert json.loads(page.data)[0]["rows"][0]["prompt"] == f"{payload} number 0"


def test_half_a_surrogate_pair_does_not_stop_the_report(run: Path) -> None:
    rows = run / "harmless pairs" / "train.jsonl"
    rows.write_text(json.dumps({"id": "x", "prompt": "\ud800", "chosen": "a \udfff", "rejected": "b"}) + "\n")
    finish(rows.parent, "gen-pairs", {}, 3, rows_in=1, rows_out=1)
    assert "\ufffd" in write(run).read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_and_runs_nothing_but_its_own_script(run: Path) -> None:
    text = write(run).read_text(encoding="utf-8")
    policy = text.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    assert policy.startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert "unsafe" not in policy
    for sign in ("http://", "https://", "src=", "@import", "url("):
        assert sign not in text.replace("http://www.w3.org/2000/svg", "")


HOSTILE: list[Any] = [
    None, True, -1, 0, -0.5, 1e308, 10**400, "", "x" * 100_000, "../../etc/passwd", "/etc/passwd", "\0", "<b>",
    [], [[]], [None], {}, {"": ""}, {"x": -1}, {"a": {"b": []}},
]  # fmt: skip


@pytest.mark.parametrize("step", ["targets", "filtered", "pairs", "m1", "scores"])
def test_a_manifest_with_any_field_of_any_kind_is_read_or_refused(run: Path, step: str) -> None:
    directory = run / f"harmless {step}"
    manifest = json.loads((directory / "manifest.json").read_text())
    everywhere = {"stage", "version", "config", "inputs", "seconds", "finished", "run_id", "versions", "outputs"}
    fields = set(manifest) - {"digest"} - (everywhere if step != "pairs" else set())
    refused = 0
    for field in fields:
        for value in HOSTILE:
            seal(directory, manifest | {field: value})
            try:
                write(directory)
            except SgpoError as error:
                assert error.exit_code == 4, (field, value)  # noqa: PT017
                refused += 1
    assert refused >= 10 * len(fields)


@pytest.mark.parametrize(("step", "file"), [("m1", "training_log.json"), ("scores", "metrics.json"),
                                            ("pairs", "train.jsonl"), ("scores", "train.jsonl")])  # fmt: skip
def test_other_files_of_any_kind_are_read_or_refused(run: Path, step: str, file: str) -> None:
    directory = run / f"harmless {step}"
    whole = (directory / file).read_text()
    first = json.loads(whole.splitlines()[0]) if file.endswith("l") else json.loads(whole)
    for record in first[:1] if isinstance(first, list) else [first, *first.get("models", [])[:1]]:
        before = dict(record)
        for key in list(record):
            for value in HOSTILE:
                record[key] = value
                (directory / file).write_text(json.dumps(first) + "\n")
                finish(directory, "evaluate", {}, 1, rows_in=1, rows_out=1)
                try:
                    write(directory)
                except SgpoError as error:
                    assert error.exit_code == 4, (key, value)  # noqa: PT017
            record[key] = before[key]


def test_changed_and_foreign_files_are_refused(run: Path, tmp_path: Path) -> None:
    rows = run / "harmless pairs" / "train.jsonl"
    good = rows.read_bytes()
    rows.write_bytes(good + b"{}\n")
    with pytest.raises(IntegrityError, match="sha256 mismatch"):
        write(run)
    rows.unlink()
    (tmp_path / "secret.jsonl").write_bytes(good)
    rows.symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(IntegrityError, match="not a file of this run"):
        write(run)
    rows.unlink()
    rows.write_bytes(good)
    (run / "harmless m1" / "manifest.json").write_text("{}")
    with pytest.raises(IntegrityError, match="changed after the step had finished"):
        write(run)
    (run / "harmless m1" / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(IntegrityError, match=r"not valid JSON|nested too deep"):
        write(run)


def test_a_partial_run_is_reported_as_such(run: Path) -> None:
    directory = run / "harmless m1"
    (directory / "manifest.json").unlink()
    (directory / "training_log.json").rename(directory / "log")
    (directory / "checkpoint-20").mkdir()
    state = {"log_history": json.loads((directory / "log").read_text())[:20], "global_step": 20}
    (directory / "checkpoint-20" / "trainer_state.json").write_text(json.dumps(state))
    shutil.rmtree(run / "harmless scores")
    text = Page(write(run)).text
    assert "this step has not finished" in text
    assert "Reward margin" in text


def test_the_bill_of_a_remote_model_is_in_the_page(run: Path) -> None:
    directory = run / "harmless targets"
    bill = {"url": "http://localhost:8000/v1", "prompt_tokens": 5_000, "completion_tokens": 700, "cost": 1.25}
    finish(directory, "make-targets", {}, 1, rows_in=3, rows_out=3, teacher=bill, prompt_tokens=20)
    text = Page(write(run)).text
    assert "5\u202f020" in text
    assert "1.2500" in text


def test_the_cut_of_the_gap_method_is_no_place_on_the_axis_of_perplexities(run: Path) -> None:
    directory = run / "harmless filtered"
    finish(directory, "filter-ppl", {}, 2, rows_in=3, rows_out=2, config={"method": "gap"}, log_ppl_threshold=0.3)
    page = Page(write(run))
    assert "cut by the distance to the response's, 0.3" in page.text
    assert "cut 0.3" not in page.text


def test_entries_without_a_score_are_left_out_and_what_was_printed_is_shown(run: Path) -> None:
    directory = run / "harmless scores"
    (directory / "metrics.json").write_text(json.dumps({"models": [{"name": "x", "score": None}], "more": 1}))
    finish(directory, "evaluate", {}, 5, rows_in=6, rows_out=6, report=["model win rate", "m1 0.75"])
    text = Page(write(run)).text
    assert "m1 0.75" in text
    assert "95 % interval" not in text


def test_a_single_step_and_no_step(run: Path, tmp_path: Path) -> None:
    assert "harmless pairs" in Page(write(run / "harmless pairs", tmp_path / "one.html")).text
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UsageError):
            write(path)


def test_the_command_line(run: Path, sgpo: Sgpo) -> None:
    result = sgpo("report", run, "--output", "page.html")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("page.html: ")
    assert sgpo("report", "nowhere").returncode == 2
    (run / "harmless m1" / "manifest.json").write_text("{}")
    result = sgpo("report", run)
    assert result.returncode == 4
    assert "Traceback" not in result.stderr


def test_a_run_writes_its_report_and_survives_when_it_cannot(echo_recipe: Path, sgpo: Sgpo) -> None:
    with echo_recipe.open("a") as file:
        file.write("# see https://me:secret1@host/v1?key=secret2 for more\n")
    result = sgpo("run", "echo.yaml", "--seed", 3)
    assert result.returncode == 0, result.stderr
    report = echo_recipe.parent / "runs/echo/report.html"
    assert "sgpo run echo.yaml --seed 3" in report.read_text()
    assert "see https://host/v1 for more" in report.read_text()
    assert "secret" not in report.read_text() + (report.parent / "run.json").read_text()
    before = report.stat().st_mtime_ns
    assert sgpo("run", "echo.yaml", "--seed", 3).returncode == 0
    assert report.stat().st_mtime_ns == before  # nothing ran, nothing to tell
    report.unlink()
    report.mkdir()
    shutil.rmtree(echo_recipe.parent / "runs/echo/pairs")
    result = sgpo("run", "echo.yaml", "--seed", 3)
    assert result.returncode == 0
    assert "the report was not written" in result.stderr


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A browser with a report of many pairs open."""
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium: install one, or name it with SGPO_CHROMIUM")
    directory = tmp_path_factory.mktemp("browser")
    path = write(make_run(directory / "run", PAYLOADS[1], rows=200))
    with browser.Browser(program, directory / "profile") as opened:
        opened.look(1200, 900)
        opened.open(path)
        yield opened


def test_a_browser_has_no_complaint_and_asks_for_nothing(page: browser.Browser) -> None:
    assert page.complaints() == []
    assert all(url.startswith(("file:", "data:")) for url in page.requests())
    assert len([url for url in page.requests() if url.startswith("file:")]) == 1


def test_every_chart_is_drawn(page: browser.Browser) -> None:
    shapes = "path, line, rect, circle, text"
    drawn = f"""[...document.querySelectorAll("svg")].map((svg) => [svg.getAttribute("aria-label"),
        svg.getBoundingClientRect().width > 50, [...svg.querySelectorAll("{shapes}")].some((shape) =>
        shape.getBoundingClientRect().width + shape.getBoundingClientRect().height > 10)])"""
    charts = page.run(drawn)
    assert len(charts) > 20
    assert all(wide and visible for _, wide, visible in charts), charts
    assert page.run("document.body.innerHTML.includes('NaN')") is False


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_window(page: browser.Browser, width: int) -> None:
    page.look(width, 900, phone=width < 600)
    assert page.run("document.documentElement.scrollWidth") == width
    page.look(1200, 900)


def value(page: browser.Browser, name: str, text: str, event: str) -> None:
    """Give a control a value, as a user would, and wait for the list."""
    page.run(f"""(() => {{ const control = document.getElementById({json.dumps(name)});
        control.value = {json.dumps(text)}; control.dispatchEvent(new Event({json.dumps(event)})); }})()""")
    page.run("new Promise((done) => setTimeout(done, 250))")


def shown(page: browser.Browser) -> list[str]:
    found: list[str] = page.run("[...document.querySelectorAll('.example header b')].map((each) => each.textContent)")
    return [text.rpartition(" ")[2] for text in found]


def test_paging_searching_and_sorting(page: browser.Browser) -> None:
    value(page, "set", "0", "change")
    assert shown(page) == [str(number) for number in range(10)]
    page.run("document.getElementById('next').click()")
    assert shown(page) == [str(number) for number in range(10, 20)]
    assert page.run("document.getElementById('page').textContent") == "2 / 20"
    page.run("document.getElementById('previous').click()")
    assert page.run("document.getElementById('previous').disabled") is True
    value(page, "search", "NUMBER 123", "input")
    assert shown(page) == ["123"]
    value(page, "search", f"chosen {PAYLOADS[1]} 77", "input")
    assert shown(page) == ["77"]
    value(page, "search", "", "input")
    value(page, "sort", "5", "change")  # the longest for their rejected text first
    assert {int(number) % 7 for number in shown(page)} == {6}
    value(page, "set", "1", "change")
    value(page, "sort", "1", "change")
    value(page, "search", "139", "input")
    assert "1.64 → 2.14 (+0.50)" in page.run("document.querySelector('.example header').textContent")
    value(page, "search", "", "input")
    value(page, "set", "2", "change")
    options = page.run("[...document.getElementById('reason').options].map((option) => option.textContent)")
    assert options == ["kept (200)"]
    value(page, "set", "3", "change")
    options = page.run("[...document.getElementById('reason').options].map((option) => option.textContent)")
    assert options == ["kept (199)", f"dropped: {PAYLOADS[1]} (1)", "all (200)"]
    value(page, "reason", f"dropped {PAYLOADS[1]}", "change")
    assert shown(page) == ["0"]


def test_data_stays_text_in_the_browser(page: browser.Browser) -> None:
    assert page.run("document.querySelectorAll('script').length") == 2
    assert page.run("document.querySelector('.example .prompt').textContent").count(PAYLOADS[1]) == 1
    assert page.complaints() == []


@pytest.mark.slow
def test_a_run_with_100_000_pairs(tmp_path: Path) -> None:
    words = "the sea was calm and the harbour lay still under a pale sky while gulls sent their regards".split()
    text = " ".join(words * 9)
    directory = tmp_path / "run" / "pairs"
    directory.mkdir(parents=True)
    rows = (
        {"id": f"p{n}", "prompt": message(f"{n} {text[:200]}"), "chosen": message(f"{text} {n}"),
         "rejected": message(f"{n % 97} {text[n % 300:]}")}
        for n in range(100_000)
    )  # fmt: skip
    artifacts.write_lines(directory / "train.jsonl", rows)
    finish(directory, "gen-pairs", {}, 1, rows_in=100_000, rows_out=100_000)
    started = time.process_time()
    path = write(tmp_path / "run")
    assert time.process_time() - started < 60
    assert path.stat().st_size < 20e6
    if program := browser.find():
        with browser.Browser(program, tmp_path / "profile") as opened:
            assert opened.open(path) < 3
            assert opened.complaints() == []
