"""The remote client against real servers of language models."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import read_lines, run

pytestmark = pytest.mark.model


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(command: list[str], port: int, log: Path, seconds: float = 120, **environment: str) -> Iterator[str]:
    """The base URL of a server, once it answers; it ends with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
    try:
        end = time.monotonic() + seconds
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


def targets(step: Path) -> dict[str, str]:
    """By id; our engine leaves special tokens out of a text, the server does not."""
    rows = [*read_lines(step / "train.jsonl"), *read_lines(step / "rejects.jsonl")]
    return {row["id"]: row["target"].replace("<|im_start|>", "") for row in rows}


def test_transformers_serve_gives_the_texts_of_the_local_engine(demo: Path, tmp_path: Path) -> None:
    model, port = demo / "runs/demo/m0", free_port()
    command = [
        *(sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--device", "cpu"),
        *("--host", "127.0.0.1", "--port", str(port), "--reasoning", "off"),
    ]
    (tmp_path / "hub").mkdir()
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    with serving(command, port, tmp_path / "log", **environment) as url:
        options = (
            "--dataset",
            demo / "runs/demo/world/sft",
            "--max-rows",
            12,
            "--max-new-tokens",
            80,
            "--gates",
            "none",
        )
        remote = ("--teacher", f"openai:{model}", "--teacher-base-url", url, "--concurrency", 4)
        common = ("make-targets", "--policy", model, *options, "--teacher-max-new-tokens", 40)
        result = run(tmp_path, *common, *remote, "--output-dir", "remote")
        assert result.returncode in (0, 3), result.stderr  # a tiny teacher may never come to an end
        result_local = run(tmp_path, *common, "--teacher", f"hf:{model}", "--output-dir", "local")
        assert result_local.returncode == result.returncode
    assert targets(tmp_path / "remote") == targets(tmp_path / "local")
    answers = [json.loads(line[9:]) for line in (tmp_path / "remote/paid/rank-0000.jsonl").read_text().splitlines()]
    assert len(answers) == 12
    assert all(answer["prompt_tokens"] > 0 and not answer["estimated"] for answer in answers)
