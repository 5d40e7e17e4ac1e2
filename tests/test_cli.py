"""The command line: fast help, every option documented, mistakes answered with a suggestion."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Sgpo

from sgpo_cli import trl_options
from sgpo_cli.configs import STAGES
from sgpo_cli.options import own_options
from sgpo_cli.yaml12 import parse

HEAVY = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "openai", "numpy", "pandas"}


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = "import sys; import sgpo_cli.cli, sgpo_cli.pipeline, sgpo_cli.rows; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not HEAVY & set(loaded.split())


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], 0.3), (["dpo", "--help"], 0.5)])
def test_help_is_fast(sgpo: Sgpo, arguments: list[str], limit: float) -> None:
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        assert sgpo(*arguments).returncode == 0
        seconds.append(time.monotonic() - started)
    # A machine that is busy with other things gets twice the time, and the best of five counts; what is guarded is an
    # import of torch.
    assert min(seconds) < 2 * limit


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_has_a_flag_with_help(sgpo: Sgpo, stage: str) -> None:
    shown = sgpo(stage, "--help").stdout
    for name, field in own_options(STAGES[stage]).items():
        assert "--" + name.replace("_", "-") in shown
        assert field.metadata["help"].endswith(".")
    assert str(STAGES[stage].__doc__).split(":")[0].split(",")[0] in " ".join(shown.split())


def test_every_field_of_trls_configs_is_an_option() -> None:
    from dataclasses import fields

    from trl import DPOConfig, ModelConfig, SFTConfig

    for trainer, config in (("sft", SFTConfig), ("dpo", DPOConfig)):
        theirs = {field.name for part in (config, ModelConfig) for field in fields(part) if field.init}
        assert theirs - set(trl_options.OURS) == set(trl_options.options(trainer))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dpo --learning-rat 1", "unknown option 'learning_rat' (did you mean 'learning_rate'?)"),
        ("dpo --learning-rate fast", "option 'learning_rate': expected float, got 'fast'"),
        ("dpo --resume-from-checkpoint x", "unknown option 'resume_from_checkpoint'"),
        ("dpo --bf16 maybe", "option 'bf16': expected bool | None, got 'maybe'"),
        ("dpo --loss-type kto_pair", "unknown loss 'kto_pair'"),
        ("dpo --learning-rate 1 --learning-rate 2", "option 'learning_rate': expected float, got ['1', '2']"),
        ("filter-ppl --policy model --dataset d.jsonl --output-dir o --quantile 0", "option 'quantile'"),
        ("gen-pairs --temprature 1", "unknown option 'temprature' (did you mean 'temperature'?)"),
        ("gen-pairs stray", "unexpected argument 'stray'"),
        ("gen-pairs", "is missing"),
        ("gen-pairs --policy model --dataset d.jsonl --output-dir o --temperature hot", "got 'hot'"),
        ("gen-pairs --policy model --dataset d.jsonl --output-dir o --dtype float12", "option 'dtype'"),
        ("gen-pairs --policy model --dataset d.jsonl --output-dir o --seed 99999999999", "option 'seed'"),
        ("gen-pairs --policy model --dataset /dev/null --output-dir o", "/dev/null"),
        ("evaluate --models a,b --dataset d.jsonl --output-dir o", "a,b: no such file or directory"),
        ("evaluate --models model --dataset d.jsonl --output-dir o --engine echo", "not a letter"),
        ("gen-pairs --policy model --dataset d.jsonl --output-dir o --engine vlm", "no engine 'vlm'"),
        ("gen-pairs --policy model --dataset d.jsonl --output-dir o --pairing spo", "got 'spo'"),
        ("gen-pairs --policy model --dataset ./no/d.jsonl --output-dir o", "./no/d.jsonl: no such file"),
        ("gen-pairs --policy ./nowhere --dataset d.jsonl --output-dir o", "./nowhere: no such file or directory"),
        ("gen-pairs --policy empty --dataset d.jsonl --output-dir o", "empty: not a model, it has no config.json"),
        ("gen-pairs --policy model --dataset d.jsonl --output-dir o --chat-template-kwargs {a", "not valid YAML"),
        ("make-targets --policy model --dataset d.jsonl --output-dir o --teacher gpt", "no teacher 'gpt'"),
        ("make-targets --policy model --dataset d.jsonl --output-dir o --teacher demo:2", "share of junk from 0 to 1"),
        (
            "make-targets --policy model --dataset d.jsonl --output-dir o --teacher self",
            "d.jsonl:1 column 'reference'",
        ),
        (
            "make-targets --policy model --dataset d.jsonl --output-dir o --teacher self --teacher-prompt no.txt",
            "no.txt",
        ),
        ("evaluate --models model --dataset d.jsonl --output-dir o --judge gpt", "no judge 'gpt'"),
        ("evaluate --models model --models other/model --dataset d.jsonl --output-dir o", "other/model"),
        ("dpo --step m1", "--step and --run-dir need --recipe"),
        ("dpo --recipe none.yaml", "none.yaml: No such file"),
        ("run none.yaml", "none.yaml: No such file"),
        ("gen-pairs --recipe r.yaml --step targets", "step targets runs make-targets, not gen-pairs"),
        ("gen-pairs --recipe r.yaml --step pears", "no step 'pears' (did you mean 'pairs'?)"),
        ("gen-pairs --recipe r.yaml", "has steps pairs, more of stage gen-pairs"),
        ("run r.yaml --from pears", "no step 'pears'"),
        ("run r.yaml", "steps.more.dataset: nowhere.jsonl: no such file"),
    ],
)
def test_mistakes_end_with_exit_2_one_message_and_nothing_written(
    world: Path, sgpo: Sgpo, arguments: str, message: str
) -> None:
    (world / "d.jsonl").write_text('{"prompt": "Who is there?"}\n')
    (world / "empty").mkdir()
    (world / "r.yaml").write_text(
        "run_dir: runs\nsteps:\n"
        "  targets: {stage: make-targets, policy: model, dataset: sft.jsonl, teacher: reference, engine: echo}\n"
        "  pairs: {stage: gen-pairs, policy: model, dataset: d.jsonl, engine: echo}\n"
        "  more: {stage: gen-pairs, policy: model, dataset: nowhere.jsonl, engine: echo}\n"
    )
    before = sorted(world.rglob("*"))
    result = sgpo(*arguments.split())
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(world.rglob("*")) == before


def test_a_flag_beats_the_recipe(echo_recipe: Path, sgpo: Sgpo) -> None:
    assert sgpo("gen-pairs", "--recipe", "echo.yaml", "--max-rows", 5, "--output-dir", "five").returncode == 0
    assert len((echo_recipe.parent / "five" / "train.jsonl").read_text().splitlines()) == 5


def test_trl_flags_reach_trl_in_either_spelling() -> None:
    from sgpo_cli.cli import trailing_options

    given = ["--learning-rate", "1e-4", "--num_train_epochs=2", "--use-peft", "--no-bf16", "--report-to", "a", "b"]
    values = trl_options.check("dpo", trailing_options(given), "test")
    assert values == {
        "learning_rate": 1e-4,
        "num_train_epochs": 2.0,
        "use_peft": True,
        "bf16": False,
        "report_to": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a":\t1}', {"a": 1}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        ("{enable_thinking: false}", {"enable_thinking": False}),
        ("{a: no, b: 1e-5}", {"a": "no", "b": 1e-5}),
    ],
)
def test_maps_on_the_command_line_are_json_or_as_in_a_recipe(text: str, value: object) -> None:
    assert parse(text) == value


def test_lists_on_the_command_line_are_flags_again_values_or_as_in_a_recipe() -> None:
    from sgpo_cli.cli import trailing_options

    for given in (
        ["--loss-type", "sigmoid", "--loss-type", "sft"],
        ["--loss-type", "sigmoid", "sft"],
        ["--loss-type=sigmoid", "--loss-type=sft"],
        ["--loss-type", "[sigmoid, sft]"],
        ["--loss-type", '["sigmoid", "sft"]'],
    ):
        values = trl_options.check("dpo", trailing_options(given), "test")
        assert values == {"loss_type": ["sigmoid", "sft"]}


def test_version(sgpo: Sgpo) -> None:
    assert sgpo("--version").stdout.startswith("sgpo 0.")
