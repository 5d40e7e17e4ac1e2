"""vLLM for real, on the CPU and in an environment of its own (`tests/vllm_env.sh` makes one)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, VLLM_QUIET, Server, read_lines, run, session_members, stop_session, write_lines

from sgpo_cli.devices import own_devices
from sgpo_cli.errors import UsageError

CPU_OPTIONS = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "max_model_len": 512}
LEAKY = {"temperature": 0.1, "top_k": 1, "repetition_penalty": 5.0, "max_new_tokens": 3}
Texts = dict[str, tuple[str, str]]


class TestDevices:
    def test_each_rank_has_its_own(self) -> None:
        assert [own_devices("0,1,2,3", rank, 1) for rank in range(4)] == ["0", "1", "2", "3"]
        assert [own_devices("4,5,6,7", rank, 2) for rank in range(2)] == ["4,5", "6,7"]
        assert own_devices("GPU-3a,GPU-7c", 1, 1) == "GPU-7c"

    def test_a_choice_that_was_made_stays(self) -> None:
        assert own_devices("3", 3, 1) == "3"
        assert own_devices(own_devices("0,1,2,3", 2, 1), 2, 1) == "2"

    def test_too_few_are_a_users_error(self) -> None:
        with pytest.raises(UsageError, match="local rank 1 needs 2 GPUs of its own, and the machine's ranks see 3"):
            own_devices("0,1,2", 1, 2)


@pytest.mark.model
def test_without_vllm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from sgpo_cli.engines import open_engine

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match="needs the package vllm") as refused:
        open_engine("vllm", "x")
    assert "pip install 'sgpo[vllm]'" in refused.value.hint


@pytest.fixture(scope="session")
def prompts(demo: Path) -> Path:
    sizes = ["--num-prompts", 500, "--num-sft", 8, "--num-heldout", 8, "--seed", 5]
    result = run(demo, "make-demo", *sizes, "--output-dir", "world500")
    assert result.returncode == 0, result.stderr
    return demo / "world500" / "prompts"


def gen_pairs(directory: Path, output: Path, python: str, *options: object, **engine: object) -> Texts:
    """Answer and improvement by id, of the rows that became pairs and of those that did not."""
    own = ["--max-new-tokens", 60, "--batch-size", 500, "--dtype", "float32", "--control-tokens", "keep"]
    if python != sys.executable:
        own += ["--engine", "vllm", "--engine-options", json.dumps(CPU_OPTIONS | engine)]
    result = run(
        directory,
        *("gen-pairs", "--recipe", "demo.yaml", *own, *options, "--output-dir", output),
        python=python,
        timeout=800,
        PYTHONPATH=str(ROOT),
    )
    assert result.returncode == 0, result.stderr
    rows = read_lines(output / "train.jsonl") + read_lines(output / "rejects.jsonl")
    return {row["id"]: (row["rejected"][0]["content"], row["chosen"][0]["content"]) for row in rows}


def share_equal(one: Texts, other: Texts) -> float:
    assert one.keys() == other.keys()
    return sum(one[key][role] == other[key][role] for key in one for role in (0, 1)) / (2 * len(one))


@pytest.mark.slow
@pytest.mark.timeout(
    2400
)  # with the fixtures: a demo run, an adapter, a server; vLLM starts in 15 s, but not on a busy machine
class TestOffline:
    @pytest.mark.parametrize("kind", ["model", "adapter"])
    def test_greedy_texts_are_those_of_the_transformers_engine(
        self, demo: Path, adapter: Path, prompts: Path, vllm_python: str, tmp_path: Path, kind: str
    ) -> None:
        """Also with a generation_config that asks for other things, which vLLM would follow by itself."""
        plain = adapter if kind == "adapter" else demo / "runs/demo/improver"
        leaky = tmp_path / "leaky"
        shutil.copytree(plain, leaky, ignore=shutil.ignore_patterns("checkpoint-*"))
        config = plain / "generation_config.json"
        ours = json.loads(config.read_text()) if config.exists() else {}
        (leaky / config.name).write_text(json.dumps(ours | LEAKY))
        greedy = ["--dataset", prompts, "--temperature", 0]
        theirs = gen_pairs(demo, tmp_path / "transformers", sys.executable, *greedy, "--policy", plain)
        unsealed = ["--improver-prompt", "improver", "--policy", leaky]
        for name in ("manifest.json", "request.json"):  # its digests are no longer true
            (leaky / name).unlink()
        made = gen_pairs(demo, tmp_path / "vllm", vllm_python, *greedy, *unsealed)
        assert len(made) == 500
        assert share_equal(made, theirs) >= 0.99

    def test_a_text_depends_on_its_prompt_and_seed_alone(
        self, demo: Path, prompts: Path, vllm_python: str, tmp_path: Path
    ) -> None:
        options = ["--dataset", prompts, "--max-rows", 200, "--temperature", 1, "--improver-temperature", 1]
        together = gen_pairs(demo, tmp_path / "a", vllm_python, *options)
        in_batches = gen_pairs(demo, tmp_path / "b", vllm_python, *options, "--batch-size", 9)
        assert share_equal(together, in_batches) >= 0.99
        other_seed = gen_pairs(demo, tmp_path / "c", vllm_python, *options, "--seed", 2)
        assert share_equal(together, other_seed) < 0.5

    def test_a_prompt_beyond_the_context_disturbs_no_other(self, demo: Path, vllm_python: str, tmp_path: Path) -> None:
        rows = [{"id": f"p{n}", "prompt": f"I lost my umbrella number {n}."} for n in range(6)]
        rows[3]["prompt"] = "umbrella " * 600
        write_lines(tmp_path / "with.jsonl", rows)
        write_lines(tmp_path / "without.jsonl", rows[:3] + rows[4:])
        made, plain = (
            gen_pairs(demo, tmp_path / name, vllm_python, "--temperature", 0, "--dataset", tmp_path / f"{name}.jsonl")
            for name in ("with", "without")
        )
        assert made.pop("p3") == ("", "")
        assert made == plain
        reasons = {row["id"]: row["reason"] for row in read_lines(tmp_path / "with" / "rejects.jsonl")}
        assert reasons["p3"] == "too_long"

    def test_targets_and_scores_of_several_models_are_made_in_one_process(
        self, demo: Path, vllm_python: str, tmp_path: Path
    ) -> None:
        """make-targets with the policy as teacher; evaluate opens one engine after the other."""
        engine = ["--engine", "vllm", "--engine-options", json.dumps(CPU_OPTIONS)]
        for stage, step, options in (
            ("make-targets", "targets", ["--teacher", "self", "--max-rows", 40, "--teacher-max-new-tokens", 60]),
            ("evaluate", "scores", []),
        ):
            output = tmp_path / step
            command = [stage, "--recipe", "demo.yaml", *engine, *options, "--output-dir", output]
            result = run(demo, *command, python=vllm_python, timeout=800, PYTHONPATH=str(ROOT))
            assert result.returncode == 0, result.stderr
            assert "INFO" not in result.stdout + result.stderr
            manifest = json.loads((output / "manifest.json").read_text())
            assert manifest["rows_in"] == {"make-targets": 40, "evaluate": 72}[stage]
            assert manifest["completion_tokens"] > 0
            assert manifest["versions"]["vllm"]

    def test_one_step_of_a_recipe_runs_in_the_other_environment(self, demo: Path, vllm_python: str) -> None:
        step = {"stage": "gen-pairs", "policy": "./improver", "dataset": "./world/prompts", "max_new_tokens": 80}
        step |= {"engine": "vllm", "engine_options": CPU_OPTIONS, "launch": vllm_python}
        recipe = demo / "two-environments.yaml"
        recipe.write_text((demo / "demo.yaml").read_text() + f"  elsewhere: {json.dumps(step)}\n")
        result = run(demo, "run", recipe.name, timeout=800, PYTHONPATH=str(ROOT))
        assert result.returncode == 0, result.stderr
        manifest = json.loads((demo / "runs/demo/elsewhere/manifest.json").read_text())
        assert manifest["versions"]["vllm"]
        assert manifest["rows_in"] == 48

    @pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
    def test_no_process_is_left_when_it_is_stopped(
        self, demo: Path, prompts: Path, vllm_python: str, tmp_path: Path, end: signal.Signals
    ) -> None:
        """With two workers, the only processes there are besides the stage's own."""
        output, log = tmp_path / "pairs", tmp_path / "log"
        options = json.dumps(CPU_OPTIONS | {"tensor_parallel_size": 2})
        command = [vllm_python, "-m", "sgpo_cli", "gen-pairs", "--recipe", "demo.yaml", "--dataset", str(prompts)]
        command += ["--engine", "vllm", "--engine-options", options, "--batch-size", "2", "--output-dir", str(output)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "0|0"} | VLLM_QUIET
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=demo, stdout=file, stderr=file, start_new_session=True, env=environment
            )
        try:
            while not any(part.stat().st_size for part in output.glob("parts/*")):  # the first texts are there
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
            assert len(session_members(process.pid)) >= 3
            process.send_signal(end)
            assert process.wait(timeout=60) == (143 if end == signal.SIGTERM else -9)
            for _ in range(60):
                if not session_members(process.pid):
                    break
                time.sleep(0.5)
            assert not session_members(process.pid)
        finally:
            stop_session(process)


@pytest.mark.slow
@pytest.mark.timeout(
    2400
)  # with the fixtures: a demo run, an adapter, a server; vLLM starts in 15 s, but not on a busy machine
class TestServer:
    @pytest.mark.parametrize("kind", ["model", "adapter"])
    def test_it_answers_as_the_transformers_engine_does(
        self, demo: Path, adapter: Path, vllm_server: Server, kind: str
    ) -> None:
        from openai import OpenAI

        from sgpo_cli.engines import Sampling, open_engine

        path, name = (
            (adapter, vllm_server.adapter) if kind == "adapter" else (demo / "runs/demo/m0", vllm_server.model)
        )
        conversations = [[{"role": "user", "content": f"I lost my umbrella number {n}."}] for n in range(8)]
        with pytest.MonkeyPatch.context() as patch, OpenAI(base_url=vllm_server.url, api_key="none") as client:
            patch.chdir(demo)  # the adapter names its base relative to where it was trained
            theirs = open_engine("transformers", str(path)).generate(conversations, Sampling(40, 0.0), [0] * 8)
            made = [
                client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=40)
                for messages in conversations
            ]
        assert [each.choices[0].message.content for each in made] == [each.text for each in theirs]
        assert [each.choices[0].finish_reason for each in made] == [each.finish_reason for each in theirs]

    def test_pairs_and_targets_come_from_it_as_from_the_local_model(
        self, demo: Path, vllm_server: Server, tmp_path: Path
    ) -> None:
        model, world = demo / "runs/demo/m0", demo / "runs/demo/world"
        pairs = ("gen-pairs", "--dataset", world / "prompts", "--temperature", 0, "--max-new-tokens", 60)
        remote = ("--engine", "openai", "--base-url", vllm_server.url, "--policy", vllm_server.model)
        for name, more in (("remote", remote), ("local", ("--policy", model, "--dtype", "float32"))):
            result = run(tmp_path, *pairs, *more, "--max-length-ratio", 50, "--output-dir", name)
            assert result.returncode == 0, result.stderr
        assert read_lines(tmp_path / "remote/train.jsonl") == read_lines(tmp_path / "local/train.jsonl")
        targets = ("make-targets", "--policy", model, "--dataset", world / "sft", "--max-rows", 40, "--gates", "none")
        teacher = ("--teacher", f"openai:{vllm_server.model}", "--teacher-base-url", vllm_server.url)
        (tmp_path / "short.txt").write_text("Improve the answer.")  # our own is too long for this server's context
        limits = ("--max-new-tokens", 60, "--teacher-max-new-tokens", 40, "--teacher-prompt", "short.txt")
        result = run(tmp_path, *targets, *teacher, *limits, "--output-dir", "targets")
        assert result.returncode in (0, 3), result.stderr  # a tiny teacher may never come to an end
        assert len((tmp_path / "targets/paid/rank-0000.jsonl").read_text().splitlines()) == 40
