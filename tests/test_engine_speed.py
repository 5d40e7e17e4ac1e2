"""The transformers engine's batches: rows leave when they have ended, and memory may run out."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import chat, read_lines, run_stage, write_lines

from sgpo_cli.errors import ResourceError

pytestmark = pytest.mark.model
ENDS = [0, 1, 2]


def tiny(architecture: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, MambaConfig, MistralConfig

    common = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    configs = {
        "attention": MistralConfig(**common, **attention, sliding_window=None),
        "sliding window": MistralConfig(**common, **attention, sliding_window=6),
        "state space": MambaConfig(**common, pad_token_id=None),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[architecture]).eval()
    model.generation_config = GenerationConfig()
    return model


def whole(ids: list[int]) -> list[int]:
    """Up to the first end token."""
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in ENDS), len(ids))]


PROMPTS = [[3 + (7 * row + 3 * place) % 37 for place in range(2 + row % 9)] for row in range(16)]


@pytest.mark.parametrize("architecture", ["attention", "sliding window", "state space"])
def test_rows_that_leave_a_batch_change_nothing_for_the_others(architecture: str) -> None:
    from sgpo_cli.engines import Sampling
    from sgpo_cli.engines.decoding import decode

    model, sampling = tiny(architecture), Sampling(20, temperature=2.0)
    together = decode(model, PROMPTS, sampling, range(16), ENDS, 3)
    alone = [decode(model, [prompt], sampling, [row], ENDS, 3)[0] for row, prompt in enumerate(PROMPTS)]
    assert [whole(ids) for ids in together] == [whole(ids) for ids in alone]
    assert len({len(whole(ids)) for ids in together}) > 4  # they did leave


def test_no_more_than_half_of_the_work_is_for_rows_that_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    from sgpo_cli.engines import Sampling
    from sgpo_cli.engines.decoding import decode

    model, computed = tiny("attention"), []
    forward = type(model).forward

    def counted(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        computed.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    counted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", counted)
    made = decode(model, PROMPTS, Sampling(60, 2.0), range(16), ENDS, 3)
    needed = sum(len(whole(ids)) for ids in made)
    assert needed <= sum(computed) <= 2 * needed
    assert sum(computed) < 0.6 * len(computed) * len(PROMPTS)  # what a batch that keeps all its rows computes


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of the prompts in each batch that is decoded."""
    from sgpo_cli.engines import transformers

    seen: list[list[int]] = []
    decode = transformers.decode

    def noted(model: Any, prompts: list[list[int]], *args: Any) -> list[list[int]]:
        seen.append([len(ids) for ids in prompts])
        return decode(model, prompts, *args)

    monkeypatch.setattr(transformers, "decode", noted)
    return seen


def test_batches_hold_prompts_of_a_length_and_change_no_text(base: Path, batches: list[list[int]]) -> None:
    from sgpo_cli.engines import Sampling, open_engine
    from sgpo_cli.engines.transformers import TransformersEngine

    engine, greedy = open_engine("transformers", str(base)), Sampling(8, temperature=0.0)
    assert isinstance(engine, TransformersEngine)
    conversations = [chat(number) for number in range(24)]
    at_once = engine.generate(conversations, greedy, range(24))
    assert len(batches) == 1
    engine.batch_tokens = 5 * 40
    in_parts = engine.generate(conversations, greedy, range(24))
    assert in_parts == at_once
    lengths = [length for batch in batches[1:] for length in batch]
    assert len(batches) == 4
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch) == 1 or len(batch) * (max(batch) + 8) <= 200 for batch in batches[1:])
    assert in_parts == [engine.generate([each], greedy, [0])[0] for each in conversations]


@pytest.mark.parametrize("kind", ["cuda", "cpu", "python"])
def test_out_of_memory_halves_the_batch_and_is_remembered(
    base: Path, batches: list[list[int]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import torch

    from sgpo_cli.engines import Sampling, open_engine, transformers

    errors = {
        "cuda": torch.OutOfMemoryError("CUDA out of memory."),
        "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        "python": MemoryError(),
    }
    decode, limit = transformers.decode, 6

    def scarce(model: Any, prompts: list[list[int]], *args: Any) -> list[list[int]]:
        if len(prompts) > limit:
            batches.append([len(ids) for ids in prompts])
            raise errors[kind]
        return decode(model, prompts, *args)

    engine, greedy = open_engine("transformers", str(base)), Sampling(4, temperature=0.0)
    assert isinstance(engine, transformers.TransformersEngine)
    conversations = [chat(number) for number in range(20)]
    plenty = engine.generate(conversations, greedy, range(20))
    monkeypatch.setattr(transformers, "decode", scarce)
    batches.clear()
    assert engine.generate(conversations, greedy, range(20)) == plenty
    assert [len(batch) for batch in batches[:3]] == [20, 10, 5]
    assert engine.out_of_memory == 2
    batches.clear()
    engine.generate(conversations, greedy, range(20))
    assert max(map(len, batches)) <= limit
    assert engine.out_of_memory == 2

    limit = 0
    with pytest.raises(ResourceError, match="out of memory with one prompt of") as refused:
        engine.generate(conversations, greedy, range(20))
    assert refused.value.exit_code == 7
    assert "--max-new-tokens" in refused.value.hint


def test_another_error_is_not_taken_for_a_lack_of_memory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgpo_cli.engines import Sampling, open_engine, transformers

    def broken(*args: Any) -> list[list[int]]:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(transformers, "decode", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        open_engine("transformers", str(base)).generate([chat(1)], Sampling(4), [0])


LIMITED = """
import os, re, resource
from pathlib import Path
from sgpo_cli.engines import Sampling, transformers
from sgpo_cli.cli import main

load = transformers.TransformersEngine.__init__

def load_and_limit(self, *args, **settings):
    load(self, *args, **settings)
    self._end = list(range(0, 720, 2))  # an untrained model does not end its texts
    self.generate([[{"role": "user", "content": "the small harbour"}]], Sampling(2), [0])  # libraries take theirs
    used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + (int(os.environ["MEBIBYTES"]) << 20),) * 2)

transformers.TransformersEngine.__init__ = load_and_limit
main()
"""


@pytest.mark.slow
def test_gen_pairs_under_a_memory_limit_ends_with_the_same_rows(base: Path, tmp_path: Path) -> None:
    """The limit is the system's (RLIMIT_AS), and the allocator that says no is torch's."""
    words = "the small harbour keeps every lost umbrella and lantern safe until somebody asks for it ".split()
    rows = [{"id": f"p{n}", "prompt": " ".join(words[(n + k) % 15] for k in range(200 + n))} for n in range(48)]
    write_lines(tmp_path / "prompts.jsonl", rows)
    options = ["gen-pairs", "--policy", base, "--dataset", "prompts.jsonl", "--improver-prompt", "improver"]
    options += ["--max-new-tokens", 20, "--temperature", 1, "--max-length-ratio", 50]

    def gen_pairs(name: str, mebibytes: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, *map(str, options), "--output-dir", name]
        environment = os.environ | {"MEBIBYTES": str(mebibytes)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    def texts(name: str) -> list[Any]:
        return read_lines(tmp_path / name / "train.jsonl") + read_lines(tmp_path / name / "rejects.jsonl")

    plenty, scarce, too_little = gen_pairs("plenty", 4096), gen_pairs("scarce", 64), gen_pairs("too_little", 1)
    assert (plenty.returncode, scarce.returncode) == (0, 0), plenty.stderr + scarce.stderr
    assert texts("plenty") == texts("scarce")
    facts = json.loads((tmp_path / "scarce" / "manifest.json").read_text())
    assert facts["out_of_memory"] > 0
    assert facts["batch_tokens"]["policy"] >= facts["batch_tokens"]["improver"] > 0
    assert "out of memory with 48 rows; from here on" in scarce.stderr
    assert "out_of_memory" not in json.loads((tmp_path / "plenty" / "manifest.json").read_text())
    assert too_little.returncode == 7, too_little.stderr
    assert "Traceback" not in too_little.stderr


def test_how_each_role_sampled_is_in_the_manifest(world: Path) -> None:
    options = {"policy": str(world / "model"), "dataset": str(world / "prompts.jsonl"), "engine": "echo"}
    options |= {"temperature": 0.7, "improver_temperature": 0.2, "top_p": 0.9, "max_new_tokens": 50}
    facts = run_stage("gen-pairs", world / "pairs", **options, improver_prompt="improver")
    assert facts["sampling"] == {
        "policy": {"max_new_tokens": 50, "temperature": 0.7, "top_p": 0.9},
        "improver": {"max_new_tokens": 50, "temperature": 0.2, "top_p": 1.0},
    }
    assert json.loads((world / "pairs" / "manifest.json").read_text())["sampling"] == facts["sampling"]
    assert "out_of_memory" not in facts
