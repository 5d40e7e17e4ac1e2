"""Full, LoRA and QLoRA training in chains: what one step leaves, every other can start from."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import FAST, METHODS, Sgpo, greedy, read_lines, run, run_stage

from sgpo_cli.errors import SgpoError, UsageError

pytestmark = pytest.mark.model


@pytest.mark.parametrize("after", METHODS)
@pytest.mark.parametrize("before", METHODS)
@pytest.mark.parametrize("stage", [pytest.param("train-improver", marks=pytest.mark.slow), "dpo"])
def test_every_method_goes_on_from_every_other(
    starts: dict[str, Path], data: dict[str, str], tmp_path: Path, stage: str, before: str, after: str
) -> None:
    options = FAST | METHODS[after] | {"model_name_or_path": str(starts[before]), "dataset": data[stage]}
    facts = run_stage(stage, tmp_path / "out", **options)
    if stage == "dpo":
        assert facts["training"]["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert facts["training"]["method"] == after
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("adapter_model.safetensors" in names) == (after != "full")
    assert ("model.safetensors" in names) == (after == "full")
    assert not {"ref", "README.md.tmp", "model.tmp", "cache"} & names
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (starts[before] / name).read_bytes()
    assert greedy(tmp_path / "out") != greedy(starts[before])


ROAD = """\
run_dir: runs/road
x-small: &small {{per_device_train_batch_size: 16, max_length: 256, learning_rate: 1e-3, num_train_epochs: 1, bf16: false}}
steps:
  m0:       {{stage: sft, model_name_or_path: {made}/m0, dataset: {made}/world/sft, max_rows: 64, <<: *small, {sft}}}
  targets:  {{stage: make-targets, policy: ./m0, dataset: {made}/world/sft, teacher: demo, max_new_tokens: 80}}
  filtered: {{stage: filter-ppl, dataset: ./targets, policy: ./m0}}
  improver: {{stage: train-improver, model_name_or_path: ./m0, dataset: ./filtered, <<: *small, {improver}}}
  pairs:    {{stage: gen-pairs, policy: ./improver, dataset: {made}/world/prompts, max_new_tokens: 80}}
  m1:       {{stage: dpo, model_name_or_path: ./improver, dataset: ./pairs, <<: *small, {dpo}}}
  scores:   {{stage: evaluate, models: [./m0, ./improver, ./m1], dataset: {made}/world/heldout, judge: demo, max_new_tokens: 80}}
"""  # noqa: E501  # a recipe reads best with a step a line
LORA, QLORA = "use_peft: true, lora_r: 4", "load_in_4bit: true, lora_r: 4"
FULL = "learning_rate: 1e-4"


@pytest.mark.parametrize(
    ("sft", "improver", "dpo"),
    [
        pytest.param(LORA, QLORA, LORA, id="lora-qlora-lora"),
        pytest.param(LORA, LORA, LORA, id="lora", marks=pytest.mark.slow),
        pytest.param(QLORA, QLORA, QLORA, id="qlora", marks=pytest.mark.slow),
        pytest.param(FULL, LORA, FULL, id="full-lora-full", marks=pytest.mark.slow),
        pytest.param(QLORA, FULL, QLORA, id="qlora-full-qlora", marks=pytest.mark.slow),
    ],
)
def test_the_whole_road_with_adapters(demo: Path, tmp_path: Path, sft: str, improver: str, dpo: str) -> None:
    """Adapters answer, score, improve and are evaluated in every stage between sft and evaluate."""
    (tmp_path / "road.yaml").write_text(ROAD.format(made=demo / "runs/demo", sft=sft, improver=improver, dpo=dpo))
    result = run(tmp_path, "run", "road.yaml")
    assert result.returncode == 0, result.stderr
    facts = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/road/*/manifest.json")}
    assert facts["m1"]["training"]["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
    methods = {LORA: "lora", QLORA: "qlora", FULL: "full"}
    for name, options in (("m0", sft), ("improver", improver), ("m1", dpo)):
        assert facts[name]["training"]["method"] == methods[options]
    assert facts["filtered"]["rows_out"] > 0
    assert facts["pairs"]["rows_out"] > 0
    models = json.loads((tmp_path / "runs/road/scores/metrics.json").read_text())["models"]
    assert {entry["name"] for entry in models} == {"m0", "improver", "m1"}
    assert all("log_ppl" in row for row in read_lines(tmp_path / "runs/road/filtered/train.jsonl"))


def test_a_merged_adapter_answers_as_the_adapter(starts: dict[str, Path], tmp_path: Path) -> None:
    facts = run_stage("merge", tmp_path / "merged", model_name_or_path=str(starts["lora"]))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(facts["outputs"])
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert greedy(tmp_path / "merged") == greedy(starts["lora"])
    with pytest.raises(UsageError, match="nothing to merge"):
        run_stage("merge", tmp_path / "again", model_name_or_path=str(tmp_path / "merged"))


def test_the_merge_command_takes_the_adapter_as_its_argument(
    starts: dict[str, Path], tmp_path: Path, sgpo: Sgpo
) -> None:
    result = sgpo("merge", starts["lora"], "--output-dir", "full")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "full" / "model.safetensors").exists()
    refused = sgpo("merge", "--output-dir", "other")
    assert refused.returncode == 2
    assert "option 'model_name_or_path' is missing" in refused.stderr


def test_an_adapter_names_its_base_so_that_it_is_found_from_anywhere(
    starts: dict[str, Path],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = json.loads((starts["lora"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())
    monkeypatch.chdir(tmp_path)
    assert greedy(starts["lora"])


def test_the_base_of_an_adapter_is_gone(starts: dict[str, Path], data: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(starts["lora"], tmp_path / "adapter")
    for name in ("request.json", "manifest.json"):
        (tmp_path / "adapter" / name).unlink()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for stage, options in (("dpo", {"dataset": data["dpo"]} | FAST | METHODS["lora"]), ("merge", {})):
        with pytest.raises(UsageError, match=r"its base model .*gone is not there"):
            run_stage(stage, tmp_path / "out", model_name_or_path=str(tmp_path / "adapter"), **options)


def test_an_adapter_goes_on_in_its_own_shape(starts: dict[str, Path], data: dict[str, str], tmp_path: Path) -> None:
    options = FAST | METHODS["lora"] | {"lora_r": 8, "model_name_or_path": str(starts["lora"])}
    with pytest.raises(UsageError, match=r"--lora-r 8: the adapter .* has 4"):
        run_stage("dpo", tmp_path / "out", dataset=data["dpo"], **options)
    assert not (tmp_path / "out").exists()


def test_a_bf16_checkpoint_is_trained_in_fp32_and_saved_as_bf16(
    base: Path,
    data: dict[str, str],
    tmp_path: Path,
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    half = tmp_path / "half"
    shutil.copytree(base, half)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    options = {"model_name_or_path": str(half), "dataset": data["sft"], **FAST, "learning_rate": 1e-5}
    run_stage("sft", tmp_path / "m0", **options)
    weights = load_file(tmp_path / "m0" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "m0" / "config.json").read_text())["dtype"] == "bfloat16"
    states = sorted((tmp_path / "m0").glob("checkpoint-*/model.safetensors"))
    kept = load_file(states[-1])
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    for name, tensor in weights.items():  # four updates of 1e-5 are seen by the fp32 weights
        assert torch.equal(tensor, kept[name].to(torch.bfloat16))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m0").dtype == torch.bfloat16


def test_quantised_linear_layers_are_really_four_bits(
    base: Path,
    data: dict[str, str],
    tmp_path: Path,
) -> None:
    from bitsandbytes.nn import Linear4bit

    from sgpo_cli import training
    from sgpo_cli.recipe import build_config

    values = {"model_name_or_path": str(base), "dataset": data["dpo"], "output_dir": str(tmp_path / "out")}
    config = build_config("dpo", values | FAST | METHODS["qlora"], "test")
    job = training.prepare(config, tmp_path / "out")  # type: ignore[arg-type]
    model = job.start.load(job.method.dtype, job.method.quantization)
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 2 * 7  # two layers
    assert job.method.adapter is not None
    assert job.method.adapter.target_modules == "all-linear"


def test_the_card_tells_how_the_model_was_made_and_the_hub_gets_it(
    starts: dict[str, Path], data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        """Remembers what it is asked for."""

        def __init__(self, token: str | None = None) -> None:
            pass

        def create_repo(self, name: str, **options: Any) -> Any:
            calls.append((name, options))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    options = FAST | {"model_name_or_path": str(starts["lora"]), "dataset": data["dpo"], "use_peft": True}
    facts = run_stage("dpo", tmp_path / "m1", **options, push_to_hub=True, hub_model_id="me/m1", hub_private_repo=True)
    card = (tmp_path / "m1" / "README.md").read_text()
    assert [step["stage"] for step in facts["lineage"]] == ["sft", "dpo"]
    assert (tmp_path / "m1" / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "![Learning curves](learning_curves.png)" in card
    assert "- 16 of 16 rows" in card
    for part in ("| sft |", "| dpo |", "16", "learning_rate 0.005", "last loss: ", "trl 1.", "2507.20181"):
        assert part in card
    assert str(tmp_path) not in card  # no path of this machine
    (name, created), (_, uploaded) = calls
    assert (name, created["private"]) == ("me/m1", True)
    assert {"README.md", "adapter_model.safetensors", "learning_curves.png"} <= set(uploaded["allow_patterns"])
    assert "request.json" not in uploaded["allow_patterns"]


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"lora_target_modules": "nothing", "use_peft": True}])
def test_what_cannot_be_trained_is_a_users_error(
    starts: dict[str, Path], data: dict[str, str], tmp_path: Path, options: dict[str, Any]
) -> None:
    values = {"model_name_or_path": str(starts["full"]), "dataset": data["dpo"]} | FAST | options
    with pytest.raises(SgpoError) as refused:
        run_stage("dpo", tmp_path / "out", **values)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "out").exists()
