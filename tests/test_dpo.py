"""DPO against another reference than its start model, and with pairs for the improver role."""

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, chat, run_stage, sentence, weights, write_lines

from sgpo_cli import prompts
from sgpo_cli.errors import UsageError
from sgpo_cli.recipe import build_config

pytestmark = pytest.mark.model

FAST = SMALL | {"learning_rate": 5e-3, "logging_steps": 1, "max_length": 256}
LORA = {"use_peft": True, "lora_r": 4}
PAIRS = 4  # one batch: the first loss is that of all of them


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("data")
    rows = {
        "train-improver": [
            {"prompt": chat(n), "response": sentence(n + 1), "reference": sentence(n + 2), "target": sentence(n + 3)}
            for n in range(16)
        ],
        "dpo": [{"prompt": chat(n), "chosen": sentence(n + 1), "rejected": sentence(n + 3)} for n in range(PAIRS)],
    }
    for stage, each in rows.items():
        write_lines(directory / f"{stage}.jsonl", each)
    return {stage: str(directory / f"{stage}.jsonl") for stage in rows}


@pytest.fixture(scope="module")
def improvers(base: Path, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with both roles, full and as an adapter on the base."""
    directory = tmp_path_factory.mktemp("improvers")
    for name, options in (("full", {}), ("lora", LORA)):
        values = {"model_name_or_path": str(base), "dataset": data["train-improver"]}
        run_stage("train-improver", directory / name, **(FAST | options | values))
    return {name: directory / name for name in ("full", "lora")}


def dpo(output: Path, start: Path, data: dict[str, str], **options: Any) -> dict[str, Any]:
    return run_stage("dpo", output, **(FAST | {"model_name_or_path": str(start), "dataset": data["dpo"]} | options))


def loss_of(policy: Path, reference: Path, beta: float = 0.1) -> float:
    """The sigmoid loss of DPO on the pairs (arXiv 2305.18290, equation 7), from our own log-probabilities."""
    from sgpo_cli.scoring import Scorer

    texts = [(chat(n), sentence(n + 1), sentence(n + 3)) for n in range(PAIRS)]
    margins = [0.0] * PAIRS
    for model, sign in ((policy, 1), (reference, -1)):
        scorer = Scorer(str(model), "float32", {})
        for column, side in ((1, 1), (2, -1)):
            scores = scorer.score([each[0] for each in texts], [str(each[column]) for each in texts])
            for place, score in enumerate(scores):
                margins[place] += sign * side * -score.log_ppl * score.tokens
    return sum(math.log1p(math.exp(-beta * margin)) for margin in margins) / PAIRS


@pytest.mark.parametrize("once", [True, False], ids=["precomputed", "at each step"])
def test_the_reference_can_be_another_model(
    base: Path, improvers: dict[str, Path], data: dict[str, str], tmp_path: Path, once: bool
) -> None:
    facts = dpo(tmp_path / "m1", improvers["full"], data, ref_model=str(base), precompute_ref_log_probs=once)
    expected = loss_of(improvers["full"], base)
    assert abs(expected - math.log(2)) > 0.01
    assert facts["training"]["first_loss"] == pytest.approx(expected, abs=2e-3)
    assert set(facts["inputs"]) == {"dataset", "model_name_or_path", "ref_model"}


def test_the_start_model_named_as_reference_is_the_default(
    improvers: dict[str, Path], data: dict[str, str], tmp_path: Path
) -> None:
    default = dpo(tmp_path / "a", improvers["full"], data)
    named = dpo(tmp_path / "b", improvers["full"], data, ref_model=str(improvers["full"]))
    assert default["training"]["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert named["training"]["first_loss"] == default["training"]["first_loss"]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.parametrize(("start", "reference"), [("lora", "base"), ("full", "lora")])
def test_adapters_have_other_references_too(
    base: Path, improvers: dict[str, Path], data: dict[str, str], tmp_path: Path, start: str, reference: str
) -> None:
    models = improvers | {"base": base}
    options = LORA if start == "lora" else {}
    facts = dpo(tmp_path / "m1", models[start], data, ref_model=str(models[reference]), **options)
    expected = loss_of(models[start], models[reference])
    assert facts["training"]["first_loss"] == pytest.approx(expected, abs=2e-3)


def test_beside_a_model_in_four_bits_the_reference_is_in_four_bits(
    base: Path, improvers: dict[str, Path], data: dict[str, str], tmp_path: Path
) -> None:
    options = {"load_in_4bit": True, "lora_r": 4}
    facts = dpo(tmp_path / "m1", improvers["full"], data, ref_model=str(base), **options)
    assert abs(facts["training"]["first_loss"] - math.log(2)) > 1e-3
    with pytest.raises(UsageError, match=r"--ref-model .*lora: an adapter cannot be merged into a quantised model"):
        dpo(tmp_path / "m2", improvers["full"], data, ref_model=str(improvers["lora"]), **options)


def test_a_reference_with_other_tokens_is_refused(
    improvers: dict[str, Path], data: dict[str, str], tmp_path: Path
) -> None:
    from sgpo_cli.demo.model import build_base

    build_base(tmp_path / "other", ["quite other words, in quite another order"], seed=1)
    with pytest.raises(UsageError, match=r"--ref-model .*other: its tokenizer has other tokens"):
        dpo(tmp_path / "m1", improvers["full"], data, ref_model=str(tmp_path / "other"))
    assert not (tmp_path / "m1").exists()


def test_pairs_for_the_improver_role(improvers: dict[str, Path], data: dict[str, str], tmp_path: Path) -> None:
    from sgpo_cli.stages.dpo import examples

    values = {"model_name_or_path": str(improvers["full"]), "dataset": data["dpo"], "output_dir": str(tmp_path / "x")}
    config = build_config("dpo", values | {"improver_replay": 0.5}, "test")
    rows, _, facts = examples(config)  # type: ignore[arg-type]
    plain, asked = rows[:PAIRS], rows[PAIRS:]
    assert len(asked) == 2 == facts["improver_rows"]
    request = prompts.load("improver")
    for row in asked:
        (pair,) = (each for each in plain if each["rejected"] == row["rejected"])
        assert row["chosen"] == pair["chosen"]
        assert row["prompt"] == prompts.improve(pair["prompt"], pair["rejected"][0]["content"], request)
    made = dpo(tmp_path / "m1", improvers["full"], data, improver_replay=1.0)
    assert (made["rows_out"], made["improver_rows"]) == (2 * PAIRS, PAIRS)
    assert made["improver_prompt"] == request


def test_a_model_that_never_was_an_improver_cannot_replay_it(base: Path, data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--improver-replay: .*base has no improver_prompt in its manifest"):
        dpo(tmp_path / "m1", base, data, improver_replay=0.5)
