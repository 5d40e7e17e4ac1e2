"""Everything that needs torch, on an untrained tiny model of a standard architecture."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, chat, read_lines, run_stage, sentence, weights, write_lines

from sgpo_cli.errors import DivergedError, IncompleteError, SgpoError, UsageError
from sgpo_cli.recipe import build_config

pytestmark = pytest.mark.model


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": chat(n),
            "chosen": sentence(n + 1),
            "rejected": sentence(n + 3),
            "text": "not for TRL",
            "labels": [1],
        }
        for n in range(24)
    ]
    write_lines(tmp_path / "pairs.jsonl", rows)
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    rows = [{"prompt": sentence(n), "completion": sentence(n + 1), "text": "not for TRL"} for n in range(24)]
    write_lines(tmp_path / "answers.jsonl", rows)
    return tmp_path / "answers.jsonl"


class TestEngine:
    def test_greedy_batches_equal_single_greedy_generation(self, base: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from sgpo_cli.engines import Sampling, open_engine

        engine = open_engine("transformers", str(base))
        conversations = [chat(number) for number in range(12)]
        texts = [made.text for made in engine.generate(conversations, Sampling(16, temperature=0.0), range(12))]
        tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
        for conversation, text in zip(conversations, texts, strict=True):
            ids = tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            with torch.no_grad():
                output = model.generate(ids, max_new_tokens=16, do_sample=False)
            assert text == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    def test_the_seed_decides_and_the_checkpoints_generation_config_does_not(self, base: Path, tmp_path: Path) -> None:
        from sgpo_cli.engines import Sampling, open_engine

        copy = tmp_path / "copy"
        shutil.copytree(base, copy)
        config = json.loads((copy / "generation_config.json").read_text())
        settings = {"do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 5.0}
        (copy / "generation_config.json").write_text(json.dumps(config | settings))
        conversations = [chat(number) for number in range(4)]

        def texts(model: Path, seed: int) -> list[str]:
            seeds = range(10 * seed, 10 * seed + 4)
            made = open_engine("transformers", str(model)).generate(conversations, Sampling(16), seeds)
            return [each.text for each in made]

        assert texts(base, 1) == texts(base, 1) == texts(copy, 1)
        assert texts(base, 1) != texts(base, 2)

    def test_a_text_depends_on_its_own_seed_and_not_on_its_neighbours(self, base: Path) -> None:
        from sgpo_cli.engines import Sampling, open_engine

        engine, sampling = open_engine("transformers", str(base)), Sampling(12, temperature=1.3, top_p=0.9)
        conversations, seeds = [chat(number) for number in range(8)], list(range(8))
        together = engine.generate(conversations, sampling, seeds)
        backwards = engine.generate(conversations[::-1], sampling, seeds[::-1])
        assert together == backwards[::-1]
        assert together == [engine.generate([c], sampling, [s])[0] for c, s in zip(conversations, seeds, strict=True)]

    def test_tokens_are_drawn_as_often_as_the_model_says(self) -> None:
        import torch

        from sgpo_cli.engines import Sampling
        from sgpo_cli.engines.decoding import RowSampling

        scores = torch.tensor([2.0, 0.0, 1.0, -1.0, -torch.inf])
        for sampling, expected in (
            (Sampling(1), scores.softmax(-1)),
            (Sampling(1, temperature=0.5), (2 * scores).softmax(-1)),
            (Sampling(1, top_p=0.7), torch.tensor([0.7311, 0, 0.2689, 0, 0])),  # the two most likely, renormalised
        ):
            rows = 20_000
            drawn = RowSampling(sampling, range(rows))(torch.zeros(rows, 1), scores.repeat(rows, 1)).argmax(-1)
            shares = torch.bincount(drawn, minlength=5) / rows
            assert torch.allclose(shares, expected, atol=0.012)
            assert not shares[expected == 0].any()

    def test_a_text_cut_at_the_limit_says_so(self, base: Path) -> None:
        from sgpo_cli.engines import Sampling, open_engine

        (made,) = open_engine("transformers", str(base)).generate([chat(1)], Sampling(2, temperature=0.0), [0])
        assert (made.finish_reason, made.completion_tokens) == ("length", 2)

    def test_a_conversation_beyond_the_context_gets_no_text_and_disturbs_no_other(self, base: Path) -> None:
        from sgpo_cli.engines import Sampling, open_engine

        engine, greedy = open_engine("transformers", str(base)), Sampling(8, temperature=0.0)
        long = [{"role": "user", "content": "umbrella " * 2500}]
        first, second, third = engine.generate([chat(1), long, chat(2)], greedy, [0, 1, 2])
        assert (second.text, second.finish_reason) == ("", "too_long")
        assert [first, third] == engine.generate([chat(1), chat(2)], greedy, [0, 2])

    def test_unknown_engine_is_a_users_error(self) -> None:
        from sgpo_cli.engines import open_engine

        with pytest.raises(UsageError, match="no engine 'vlm'"):
            open_engine("vlm", "x")


def logged(directory: Path) -> list[dict[str, Any]]:
    """What a training has logged of each step, without the summary of how long it took."""
    return [entry for entry in json.loads((directory / "training_log.json").read_text()) if "loss" in entry]


class TestTraining:
    def test_first_dpo_loss_is_ln_2(self, base: Path, pairs: Path, tmp_path: Path) -> None:
        facts = run_stage("dpo", tmp_path / "m1", model_name_or_path=str(base), dataset=str(pairs), **SMALL)
        assert facts["training"]["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert (facts["rows_in"], facts["rows_out"]) == (24, 24)
        assert weights(tmp_path / "m1") != weights(base)

    def test_bfloat16_autocast_has_the_same_first_loss(self, base: Path, pairs: Path, tmp_path: Path) -> None:
        options = SMALL | {"bf16": True, "max_steps": 1}
        facts = run_stage("dpo", tmp_path / "m1", model_name_or_path=str(base), dataset=str(pairs), **options)
        assert facts["training"]["first_loss"] == pytest.approx(math.log(2), abs=1e-3)

    def test_a_reference_that_is_not_the_start_model_stops_training(self) -> None:
        from transformers import TrainerControl, TrainerState, TrainingArguments

        from sgpo_cli.checks import CheckReference

        def first(loss: float, reward: float, **options: bool) -> None:
            check, state = CheckReference(["sigmoid"], 0.1, **options), TrainerState(global_step=1)
            logs = {"loss": loss, "rewards/chosen": 0.0, "rewards/rejected": reward}
            check.on_log(TrainingArguments(use_cpu=True), state, TrainerControl(), logs)

        for rounded in (False, True):
            with pytest.raises(DivergedError, match=r"0\.7209"):
                first(0.7209, 0.5, rounded=rounded)
        first(0.6735, -0.04, rounded=True)  # what 16 bits do to log-probabilities that add up to some hundred nats
        with pytest.raises(DivergedError, match=r"0\.6735"):
            first(0.6735, -0.04)

    @pytest.mark.parametrize("stage", ["sft", "dpo"])
    def test_nan_stops_with_exit_8_and_no_model(
        self, base: Path, answers: Path, pairs: Path, tmp_path: Path, stage: str
    ) -> None:
        options = SMALL | {
            "learning_rate": 1e30,
            "logging_steps": 1,
            "dataset": str({"sft": answers}.get(stage, pairs)),
        }
        with pytest.raises(DivergedError, match=r"^step 2: \w+ is ") as stopped:  # the first update was made in step 1
            run_stage(stage, tmp_path / "m0", model_name_or_path=str(base), **options)
        assert stopped.value.exit_code == 8
        assert not (tmp_path / "m0" / "model.safetensors").exists()
        assert not (tmp_path / "m0" / "manifest.json").exists()

    def test_rows_that_do_not_fit_are_refused_before_training(self, base: Path, answers: Path, tmp_path: Path) -> None:
        options = SMALL | {"max_length": 12}
        with pytest.raises(UsageError, match=r"max_length 12: \d+ of 24 rows would be cut"):
            run_stage("sft", tmp_path / "m0", model_name_or_path=str(base), dataset=str(answers), **options)
        assert not (tmp_path / "m0").exists()

    def test_identical_pairs_are_dropped_and_counted(self, base: Path, pairs: Path, tmp_path: Path) -> None:
        rows = read_lines(pairs)
        rows[5]["rejected"] = rows[5]["chosen"] + " "
        write_lines(pairs, rows)
        options = SMALL | {"max_steps": 1}
        facts = run_stage("dpo", tmp_path / "m1", model_name_or_path=str(base), dataset=str(pairs), **options)
        assert facts["rejected"] == {"identical": 1}
        assert (facts["rows_in"], facts["rows_out"]) == (24, 23)

    @pytest.mark.parametrize("left", ["checkpoint-4", "checkpoint-6", "checkpoint-8"])
    def test_rows_grouped_by_length_are_seen_once_each_also_when_training_continues(
        self, base: Path, answers: Path, tmp_path: Path, left: str
    ) -> None:
        options = SMALL | {"save_steps": 2, "save_total_limit": 9, "num_train_epochs": 2}
        options |= {"train_sampling_strategy": "group_by_length"}
        options |= {"model_name_or_path": str(base), "dataset": str(answers)}
        run_stage("sft", tmp_path / "whole", **options)
        shutil.copytree(tmp_path / "whole", tmp_path / "again")
        for done in ("manifest.json", "model.safetensors"):
            (tmp_path / "again" / done).unlink()
        for checkpoint in (tmp_path / "again").glob("checkpoint-*"):
            if int(checkpoint.name[11:]) > int(left[11:]):
                shutil.rmtree(checkpoint)
        run_stage("sft", tmp_path / "again", **options)
        assert weights(tmp_path / "again") == weights(tmp_path / "whole")

    def test_training_continues_from_the_newest_whole_checkpoint_to_the_same_weights(
        self, base: Path, answers: Path, tmp_path: Path
    ) -> None:
        options = SMALL | {
            "save_steps": 2,
            "logging_steps": 4,
            "save_total_limit": 3,
            "model_name_or_path": str(base),
            "dataset": str(answers),
        }
        whole = tmp_path / "whole"
        facts = run_stage("sft", whole, **options)
        names = sorted(path.name for path in whole.glob("checkpoint-*"))
        assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        for damage in ("optimizer.pt", "scheduler.pt", "model.safetensors", "sgpo_seal.json"):
            again = tmp_path / damage
            shutil.copytree(whole, again)
            for done in ("manifest.json", "model.safetensors"):
                (again / done).unlink()
            shutil.rmtree(again / "checkpoint-6")
            half = (again / "checkpoint-4" / damage).read_bytes()
            (again / "checkpoint-4" / damage).write_bytes(half[: len(half) // 2])
            continued = run_stage("sft", again, **options)
            assert weights(again) == weights(whole)
            assert logged(again) == logged(whole)
            assert continued["training"]["tokens"] == facts["training"]["tokens"]

    def test_an_adapter_is_trained_generated_with_and_scored_with(
        self, base: Path, answers: Path, tmp_path: Path
    ) -> None:
        from sgpo_cli.engines import Sampling, open_engine
        from sgpo_cli.scoring import Scorer

        options = SMALL | {"use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 1e-2}
        adapter = tmp_path / "adapter"
        run_stage("sft", adapter, model_name_or_path=str(base), dataset=str(answers), **options)
        assert (adapter / "adapter_model.safetensors").exists()
        greedy = Sampling(8, temperature=0.0)
        adapted, plain = (
            open_engine("transformers", str(path)).generate([chat(1)], greedy, [0]) for path in (adapter, base)
        )
        assert adapted != plain
        row = ([chat(1)], [sentence(2)])
        assert Scorer(str(adapter)).score(*row)[0].log_ppl < Scorer(str(base)).score(*row)[0].log_ppl

    def test_the_saved_model_is_ready_for_others(self, base: Path, answers: Path, tmp_path: Path) -> None:
        options = SMALL | {"max_steps": 1}
        run_stage("sft", tmp_path / "m0", model_name_or_path=str(base), dataset=str(answers), **options)
        names = {path.name for path in (tmp_path / "m0").iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
        assert not {"training_args.bin", "ref", "model.tmp"} & names
        assert json.loads((tmp_path / "m0" / "config.json").read_text())["use_cache"] is True
        template = "chat_template.jinja"
        assert (tmp_path / "m0" / template).read_bytes() == (base / template).read_bytes()

    @pytest.mark.parametrize(
        "options",
        [
            {"lr_scheduler_type": "cosinus"},
            {"loss_type": "kto_pair"},
            {"optim": "adamv"},
            {"padding_free": "yes please"},
            {"use_peft": True, "lora_r": -1},
            {"per_device_train_batch_size": 0},
            {"report_to": "wandb"},
            {"chat_template_kwargs": 3},
        ],
    )
    def test_what_trl_would_refuse_is_a_users_error(
        self, base: Path, pairs: Path, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        with pytest.raises(SgpoError) as refused:
            run_stage("dpo", tmp_path / "m1", model_name_or_path=str(base), dataset=str(pairs), **(SMALL | options))
        assert refused.value.exit_code == 2
        assert not (tmp_path / "m1").exists()

    @pytest.mark.parametrize("name", ["learning_rate", "beta", "num_train_epochs"])
    @pytest.mark.parametrize("value", [0, -1, "nan", "inf"])
    def test_a_number_that_trains_nothing_is_refused_with_the_recipe(self, name: str, value: object) -> None:
        with pytest.raises(UsageError, match=f"^test: option '{name}': expected a number above 0, got "):
            build_config("dpo", {name: value}, "test")

    @pytest.mark.parametrize("value", [0, -2])
    @pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"])
    def test_a_count_that_trains_nothing_is_refused_with_the_recipe(self, name: str, value: int) -> None:
        with pytest.raises(UsageError, match=f"^test: option '{name}': expected at least 1.*, got {value}"):
            build_config("sft", {name: value}, "test")

    @pytest.mark.parametrize(
        ("given", "message", "hint"),
        [
            ("nosuch", "--report-to nosuch: unknown", "one of none, all, .*tensorboard"),
            (["none", "wandb"], "--report-to none: unknown", "one of none, all"),
            ("tensorboard", "--report-to tensorboard: .*requires tensorboard", "^pip install tensorboard"),
            ("wandb", "--report-to wandb: .*requires wandb", "^pip install wandb"),
        ],
    )
    def test_a_tracker_that_cannot_be_used_is_refused_before_anything_is_loaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | list[str], message: str, hint: str
    ) -> None:
        from transformers.integrations import integration_utils

        from sgpo_cli.trainer_options import arguments

        monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
        monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
        options = {"model_name_or_path": "none", "dataset": "none", "output_dir": "m1", "bf16": False}
        for allowed in ("none", "all", ["none"]):
            arguments(build_config("dpo", options | {"report_to": allowed}, "test"), tmp_path)
        with pytest.raises(UsageError, match=message) as refused:
            arguments(build_config("dpo", options | {"report_to": given}, "test"), tmp_path)
        assert re.search(hint, refused.value.hint)


class TestCheckpoints:
    """What a checkpoint must have lost or kept to be resumed from; none of it needs a model."""

    NAMES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")

    def make(self, directory: Path, step: int) -> Path:
        from sgpo_cli.checkpoints import seal

        checkpoint = directory / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name in self.NAMES:
            (checkpoint / name).write_bytes(f"{name} of step {step}".encode())
        seal(checkpoint)
        return checkpoint

    @pytest.mark.parametrize("name", [*NAMES, "sgpo_seal.json"])
    @pytest.mark.parametrize("damage", ["missing", "half", "empty"])
    def test_a_damaged_checkpoint_is_never_resumed_from(self, tmp_path: Path, name: str, damage: str) -> None:
        from sgpo_cli.checkpoints import newest_whole

        older, newer = self.make(tmp_path, 5), self.make(tmp_path, 10)
        assert newest_whole(tmp_path) == newer
        content = (newer / name).read_bytes()
        (newer / name).write_bytes(content[: len(content) // 2] if damage == "half" else b"")
        if damage == "missing":
            (newer / name).unlink()
        assert newest_whole(tmp_path) == older
        (older / name).unlink()
        assert newest_whole(tmp_path) is None

    def test_one_of_another_number_of_processes_is_refused(self, tmp_path: Path) -> None:
        from sgpo_cli.checkpoints import newest_whole, seal
        from sgpo_cli.errors import StaleError

        checkpoint = self.make(tmp_path, 5)
        (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
        (checkpoint / "rng_state_1.pth").write_bytes(b"of another rank")
        seal(checkpoint)
        with pytest.raises(StaleError, match="made by 2 processes, these are 1"):
            newest_whole(tmp_path)


class TestSelfChecks:
    """What would only be noticed after hours."""

    def _copy(self, base: Path, directory: Path, template: str | None = None, **tokenizer: Any) -> Path:
        shutil.copytree(base, directory)
        if template is not None:
            (directory / "chat_template.jinja").write_text(template)
        config = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps(config | tokenizer))
        return directory

    def test_a_template_that_does_not_end_the_turn_is_refused(self, base: Path, answers: Path, tmp_path: Path) -> None:
        template = (base / "chat_template.jinja").read_text().replace("<|im_end|>", "")
        model = self._copy(base, tmp_path / "endless", template)
        with pytest.raises(UsageError, match=r"only 0% of the answers end .*<\|im_end\|>"):
            run_stage("sft", tmp_path / "m0", model_name_or_path=str(model), dataset=str(answers), **SMALL)
        assert not (tmp_path / "m0").exists()

    @pytest.mark.parametrize("times", [2])
    def test_two_starts_of_a_text_are_refused(self, base: Path, answers: Path, tmp_path: Path, times: int) -> None:
        template = "<|im_start|>" * (times - 1) + (base / "chat_template.jinja").read_text()
        model = self._copy(base, tmp_path / "double", template, bos_token="<|im_start|>")
        with pytest.raises(UsageError, match=r"times the token <\|im_start\|> that starts a text"):
            run_stage("sft", tmp_path / "m0", model_name_or_path=str(model), dataset=str(answers), **SMALL)

    def test_the_manifest_has_a_look_at_the_result(self, base: Path, answers: Path, tmp_path: Path) -> None:
        options = SMALL | {"num_train_epochs": 40, "learning_rate": 3e-3}
        facts = run_stage("sft", tmp_path / "m0", model_name_or_path=str(base), dataset=str(answers), **options)
        look = facts["training"]["smoke"]
        assert (look["prompts"], look["stopped"], look["repetitive"]) == (8, 8, 0)
        assert facts["training"]["ended_share"] == 1.0

    def test_what_is_repetitive(self) -> None:
        from sgpo_cli.smoke import is_repetitive

        assert is_repetitive([1, 2, 3] * 10)
        assert not is_repetitive(range(30))
        assert not is_repetitive([7, 7, 7])

    def test_template_settings_must_be_the_same_in_every_step(
        self, base: Path, answers: Path, pairs: Path, tmp_path: Path
    ) -> None:
        thinking = {"chat_template_kwargs": {"enable_thinking": False}}
        m0 = str(tmp_path / "m0")
        options = SMALL | {"max_steps": 1}
        run_stage("sft", tmp_path / "m0", model_name_or_path=str(base), dataset=str(answers), **options, **thinking)
        with pytest.raises(UsageError, match=r'm0 was made with .*\{"enable_thinking": false\}, this step has \{\}'):
            run_stage("dpo", tmp_path / "m1", model_name_or_path=m0, dataset=str(pairs), **options)
        run_stage("dpo", tmp_path / "m1", model_name_or_path=m0, dataset=str(pairs), **options, **thinking)


class TestReferenceCache:
    def test_a_run_that_continues_does_not_compute_the_reference_again(
        self, base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from trl import DPOTrainer

        calls: list[int] = []
        compute = DPOTrainer.compute_ref_log_probs

        def counted(self: Any, model: Any, inputs: Any) -> Any:
            calls.append(1)
            return compute(self, model, inputs)

        monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", counted)
        options = SMALL | {"model_name_or_path": str(base), "dataset": str(pairs), "num_train_epochs": 2}
        options |= {"save_steps": 4, "logging_steps": 1, "learning_rate": 1e-3}
        whole = run_stage("dpo", tmp_path / "whole", **options)
        assert len(calls) == 2  # 24 pairs, four times four at once
        assert not (tmp_path / "whole" / "cache").exists()
        assert whole["training"]["first_loss"] == pytest.approx(math.log(2), abs=1e-3)

        from sgpo_cli import training

        def stop(trainer: Any, directory: Path) -> None:
            fit(trainer, directory)
            raise DivergedError("stopped after the last checkpoint")

        fit = training.fit
        monkeypatch.setattr(training, "fit", stop)
        with pytest.raises(DivergedError):
            run_stage("dpo", tmp_path / "again", **options)
        shutil.rmtree(tmp_path / "again" / "checkpoint-12")
        monkeypatch.setattr(training, "fit", fit)
        calls.clear()
        run_stage("dpo", tmp_path / "again", **options)
        assert not calls
        assert weights(tmp_path / "again") == weights(tmp_path / "whole")

    def test_precomputed_and_computed_references_train_the_same(self, base: Path, pairs: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        options = SMALL | {"model_name_or_path": str(base), "dataset": str(pairs), "max_steps": 3}
        options |= {"train_sampling_strategy": "sequential", "learning_rate": 1e-4}
        write_lines(pairs, sorted(read_lines(pairs), key=lambda row: -len(row["prompt"][0]["content"])))
        for name, once in (("once", True), ("each", False)):
            run_stage("dpo", tmp_path / name, **options, precompute_ref_log_probs=once, max_rows=4)
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "each"))
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-5


class TestTeachers:
    @pytest.mark.parametrize("teacher", ["self", "reference", "hf"])
    def test_local_teachers_make_targets(self, base: Path, answers: Path, tmp_path: Path, teacher: str) -> None:
        """An untrained model never ends a text, so no row can be kept, and each needs its reason."""
        spec = f"hf:{base}" if teacher == "hf" else teacher
        options = {"policy": str(base), "dataset": str(answers), "max_new_tokens": 12, "teacher_max_new_tokens": 12}
        with pytest.raises(IncompleteError, match="no row is left"):
            run_stage("make-targets", tmp_path / "targets", teacher=spec, **options)
        rejects = read_lines(tmp_path / "targets" / "rejects.jsonl")
        assert len(rejects) == 24
        assert all(row["reason"] for row in rejects)
        if teacher == "reference":
            assert all(row["target"] == row["reference"] for row in rejects)
        else:
            assert all(row["target"] for row in rejects)
