"""Shared pieces: a run directory with echo steps (no model), and the command line as a real process."""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

from sgpo_cli import artifacts, identity, recipe
from sgpo_cli.step import Step

ROOT = Path(__file__).parents[1]

Sgpo = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def sgpo(tmp_path: Path) -> Sgpo:
    """Runs `sgpo ...` as a process of its own in the test's directory."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sgpo_cli", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A directory with prompts, references and something that passes for a model where none is loaded."""
    prompts = [{"id": f"p{n}", "prompt": f"Tell me of thing number {n}, please."} for n in range(60)]
    write_lines(tmp_path / "prompts.jsonl", prompts)
    write_lines(tmp_path / "sft.jsonl", [{**row, "completion": f"Of {row['id']}: all is well."} for row in prompts])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").touch()
    return tmp_path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(
    directory: Path, *arguments: object, python: str = sys.executable, timeout: float = 280, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "sgpo_cli", *map(str, arguments)],
        cwd=directory,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo recipe with small sizes, run to its end; `runs/demo` lies in the directory.

    Made once, and copied for each process that runs tests: some of them break things.
    """
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo-made"
    with FileLock(made.with_suffix(".lock")):
        if not (made / "complete").exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            (made / "demo.yaml").write_text((ROOT / "tests" / "small.yaml").read_text())
            result = run(made, "run", "demo.yaml")
            assert result.returncode == 0, result.stderr
            (made / "complete").touch()
    directory = base / "demo"
    shutil.copytree(made, directory)
    return directory


ECHO_RECIPE = """\
run_dir: runs/echo
steps:
  targets:
    {stage: make-targets, policy: model, dataset: sft.jsonl, teacher: reference, engine: echo, batch_size: 4}
  pairs: {stage: gen-pairs, policy: model, dataset: prompts.jsonl, engine: echo, batch_size: 4}
"""


@pytest.fixture
def echo_recipe(world: Path) -> Path:
    """A recipe of two steps that need no model."""
    path = world / "echo.yaml"
    path.write_text(ECHO_RECIPE)
    return path


# Stages with a tiny model of a standard architecture, in this process.

WORDS = "the small harbour keeps every lost umbrella and lantern safe until somebody asks for it".split()


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(3 + number % 9))


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": sentence(number)}]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sgpo_cli.demo.model import build_base

    directory = tmp_path_factory.mktemp("models") / "base"
    build_base(directory, [sentence(number) for number in range(50)], seed=1)
    return directory


def run_stage(stage: str, output: Path, **options: Any) -> dict[str, Any]:
    """One stage in this process; returns its manifest."""
    config = recipe.build_config(stage, {"output_dir": str(output), **options}, "test")
    step = Step(output, identity.request_of(stage, config))
    identity.check_inputs(config)
    importlib.import_module(f"sgpo_cli.stages.{stage.replace('-', '_')}").run(config, step)
    return artifacts.read_manifest(output) or {}


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


SMALL = {"per_device_train_batch_size": 4, "max_length": 128, "num_train_epochs": 1, "bf16": False}

# The same training with each method.

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"use_peft": True, "lora_r": 4},
    "qlora": {"load_in_4bit": True, "lora_r": 4},
}
FAST = SMALL | {"learning_rate": 5e-3, "logging_steps": 1, "max_length": 256}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Rows for every training stage."""
    directory = tmp_path_factory.mktemp("data")
    prompts = [{"prompt": chat(n)} for n in range(16)]
    rows = {
        "sft": [{**row, "completion": sentence(n + 1)} for n, row in enumerate(prompts)],
        "train-improver": [
            {**row, "response": sentence(n + 1), "reference": sentence(n + 2), "target": sentence(n + 3)}
            for n, row in enumerate(prompts)
        ],
        "dpo": [{**row, "chosen": sentence(n + 1), "rejected": sentence(n + 3)} for n, row in enumerate(prompts)],
    }
    for stage, each in rows.items():
        write_lines(directory / f"{stage}.jsonl", each)
    return {stage: str(directory / f"{stage}.jsonl") for stage in rows}


@pytest.fixture(scope="session")
def starts(base: Path, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same SFT with each method."""
    directory = tmp_path_factory.mktemp("starts")
    for method, options in METHODS.items():
        run_stage("sft", directory / method, model_name_or_path=str(base), dataset=data["sft"], **(FAST | options))
    return {method: directory / method for method in METHODS}


def greedy(model: Path) -> list[str]:
    from sgpo_cli.engines import Sampling, open_engine

    engine = open_engine("transformers", str(model))
    made = engine.generate([chat(n) for n in range(4)], Sampling(12, temperature=0.0), [0] * 4)
    return [each.text for each in made]


@pytest.fixture(scope="session")
def adapter(demo: Path) -> Path:
    """A LoRA adapter over the demo's m0, made by train-improver."""
    options = ["--use-peft", "--lora-target-modules", "all-linear", "--lora-r", 12, "--learning-rate", 5e-3]
    result = run(demo, "train-improver", "--recipe", "demo.yaml", *options, "--output-dir", "adapter")
    assert result.returncode == 0, result.stderr
    return demo / "adapter"


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python of an environment with vLLM, which is never the one that the tests run in."""
    python = os.environ.get("SGPO_VLLM_PYTHON")
    if not python:
        pytest.skip("SGPO_VLLM_PYTHON is not set; tests/vllm_env.sh makes an environment with vLLM")
    return python


class Server(NamedTuple):
    """An OpenAI-compatible server: its base URL, and the names of the model and of the adapter it serves."""

    url: str
    model: str
    adapter: str


@pytest.fixture(scope="session")
def vllm_server(demo: Path, adapter: Path, vllm_python: str) -> Iterator[Server]:
    """`vllm serve` with the demo's m0 and the adapter, on a free port; nothing of it is left afterwards."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [str(Path(vllm_python).with_name("vllm")), "serve", str(demo / "runs/demo/m0")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m0", "--dtype", "float32"]
    command += ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"adapter={adapter}"]
    command += ["--max-model-len", "512", "--kv-cache-memory-bytes", str(1 << 28), "--enforce-eager"]
    command += ["--generation-config", "vllm", "--no-enable-chunked-prefill"]  # see engines/vllm.py
    log = demo / "vllm-server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=demo, stdout=file, stderr=file, start_new_session=True, env=os.environ | VLLM_QUIET
        )
    try:
        wait_for_health(f"http://127.0.0.1:{port}/health", process, log)
        yield Server(f"http://127.0.0.1:{port}/v1", "m0", "adapter")
    finally:
        stop_session(process)


VLLM_QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def wait_for_health(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 200) -> None:
    for _ in range(int(seconds)):
        assert process.poll() is None, log.read_text()
        with suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(1)
    raise AssertionError(f"{url} does not answer after {seconds} s\n{log.read_text()}")


def stop_session(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and what it has started there."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    for number in range(40):
        if not session_members(process.pid):
            break
        if number == 20:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.5)
    process.wait()
    assert not session_members(process.pid)


def session_members(session: int) -> list[str]:
    """The command lines of the processes in a session, without zombies (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, member_of = stat.read_text().rpartition(")")[2].split()[:4]
            if int(member_of) == session and state != "Z":
                found.append((stat.parent / "cmdline").read_text().replace("\0", " "))
    return found
