"""Estimates of memory and time, against what is counted and measured."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import Sgpo, chat, sentence, write_lines

from sgpo_cli.errors import UsageError

pytestmark = pytest.mark.model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def llama_3_8b() -> object:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


def test_a_known_model_has_its_known_size() -> None:
    from sgpo_cli.memory import GIB, Load, Shape, state_bytes

    shape = Shape.from_config(llama_3_8b())  # type: ignore[arg-type]
    assert shape.parameters == 8_030_261_248  # of the published model
    load = Load(sequences=2, tokens=2048, checkpointing=True, reference=False, half_weights=True)
    # Full: 16 bytes a parameter; LoRA r 16 of all linear layers has 41.9 M parameters.
    assert state_bytes(shape, "full", load) / GIB == pytest.approx(16 * 8.03e9 / GIB, rel=0.001)
    assert 16 * shape.linear_widths == 41_943_040
    assert state_bytes(shape, "lora", load) / GIB == pytest.approx(2 * 8.03e9 / GIB, rel=0.05)
    assert 5 < state_bytes(shape, "qlora", load) / GIB < 6.5
    assert (shape.queries, shape.keys, shape.head, shape.tied) == (4096, 1024, 128_256 * 4096, False)


def test_counted_states_are_those_of_a_real_training_step(base: Path) -> None:
    """Weights, gradients and optimizer of the tiny model, tensor by tensor."""
    import torch
    from transformers import AutoModelForCausalLM

    from sgpo_cli.memory import Load, Shape, state_bytes

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    grads = [weights.grad for weights in model.parameters() if weights.grad is not None]
    counted = sum(tensor.nbytes for tensor in [*model.parameters(), *grads, *moments])
    shape = Shape.of(str(base))
    load = Load(sequences=1, tokens=8, checkpointing=False, reference=False, half_weights=False)
    assert state_bytes(shape, "full", load) == counted


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_the_peak_of_a_real_training(
    monkeypatch: pytest.MonkeyPatch, kind: str, method: str, checkpointing: bool
) -> None:
    """A smaller version of benchmarks/memory_estimate.py, whose JSON has more methods, sizes and lengths."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from memory_estimate import Case, compare

    row = compare(Case(kind, method, checkpointing, hidden=128, intermediate=448, layers=4, heads=4, tokens=96))
    assert row["ratio"] == pytest.approx(1, abs=0.1)
    assert row["ratio_beyond_states"] == pytest.approx(1, abs=0.1)


def test_the_benchmark_has_the_estimates_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from memory_estimate import MIB, Case, estimate

    found = json.loads((BENCHMARKS / "memory_estimate.json").read_text())
    assert all(0.9 < ratio < 1.1 for values in found["ranges"].values() for ratio in values)
    for row in found["cases"]:
        case = Case(**{field.name: row[field.name] for field in fields(Case)})
        assert sum(estimate(case)) / MIB == pytest.approx(row["estimated_mib"], abs=0.06)


def test_sharding_and_checkpointing_save_memory() -> None:
    from sgpo_cli.memory import Load, Shape, activation_bytes, total_bytes

    shape = Shape.from_config(llama_3_8b())  # type: ignore[arg-type]
    kept, again = (Load(2, 2048, checkpointing, False, True) for checkpointing in (False, True))
    for method in ("lora", "qlora"):
        assert activation_bytes(shape, method, again) < activation_bytes(shape, method, kept) / 5
    assert total_bytes(shape, "full", again, 8) < total_bytes(shape, "full", again) / 4


def test_a_dry_run_says_what_fits_and_writes_nothing(base: Path, tmp_path: Path, sgpo: Sgpo) -> None:
    rows = [{"prompt": chat(n), "chosen": sentence(n + 1), "rejected": sentence(n + 3)} for n in range(6)]
    write_lines(tmp_path / "pairs.jsonl", rows)
    command = ["dpo", "--dataset", "pairs.jsonl", "--model-name-or-path", base, "--output-dir", "m1", "--dry-run"]
    result = sgpo(*command, "--use-peft", "--global-batch-size", 16)
    assert result.returncode == 0, result.stderr
    for line in (
        "6 rows",
        "16 rows per optimizer step: 8 x 2 accumulated x 1 processes",
        "QLoRA r 16",
        "time: 3 epochs",
    ):
        assert line in result.stdout
    (lora,) = (line for line in result.stdout.splitlines() if "LoRA r 16" in line and "this step" in line)
    assert "fits on 16 GB" in lora
    assert not (tmp_path / "m1").exists()
    assert sgpo(*command, "--max-length", 4).returncode == 2


def test_the_time_of_a_plan_is_that_of_max_steps(base: Path, tmp_path: Path) -> None:
    from sgpo_cli.recipe import build_config
    from sgpo_cli.training_plan import plan

    rows = [{"prompt": chat(n), "chosen": [], "rejected": []} for n in range(6)]
    for n, row in enumerate(rows):
        row["chosen"] = [{"role": "assistant", "content": sentence(n + 1)}]
        row["rejected"] = [{"role": "assistant", "content": sentence(n + 3)}]

    def time(**options: object) -> str:
        given = {"model_name_or_path": str(base), "dataset": "pairs", "output_dir": str(tmp_path / "m1")}
        config = build_config("dpo", given | {"per_device_train_batch_size": 4} | options, "test")
        return list(plan(config, rows, {}))[-1].partition(", about")[0]  # type: ignore[arg-type]

    # An epoch has two steps, of 4 and of 2 rows; the reference is computed with the rows.
    options = {"precompute_ref_log_probs": False}
    epochs, steps = time(num_train_epochs=3, **options), time(max_steps=6, **options)
    assert epochs.startswith("time: 3 epochs are ")
    assert steps == epochs.replace("3 epochs", "6 steps")
    assert time(max_steps=1, **options) == time(num_train_epochs=0.5, **options).replace("0.5 epochs", "1 steps")
    assert time(max_steps=1) != time(max_steps=1, **options)  # by default it is computed once, for all rows


def test_a_config_of_no_model_is_a_users_error(tmp_path: Path) -> None:
    from sgpo_cli.memory import Shape

    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(UsageError):
        Shape.of(str(tmp_path))
