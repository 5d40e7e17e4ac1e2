"""filter-ppl's scores: what counts, how many tokens at a time, memory that runs out, and the rule that drops rows."""

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import chat, read_lines, run_stage, sentence, write_lines

from sgpo_cli.configs import FilterPplConfig
from sgpo_cli.devices import is_out_of_memory
from sgpo_cli.errors import ResourceError
from sgpo_cli.stages.filter_ppl import rule

PROMPTS, TEXTS = [chat(n) for n in range(20)], [sentence(n + 2) for n in range(20)]


def plain_log_ppl(model: Any, tokenizer: Any, prompt: list[dict[str, str]], text: str) -> tuple[float, list[int]]:
    """Of one row by itself, all logits at once; and the tokens that count."""
    import torch

    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}], return_dict=False)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, len(asked) - 1 : -1]
    picked = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[len(asked) :])[:, None])
    return -float(picked.mean()), ids[len(asked) :]


@pytest.mark.model
class TestScorer:
    @pytest.mark.parametrize("budget", [1, 100, 8192])
    def test_perplexities_equal_those_of_single_rows(self, base: Path, budget: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from sgpo_cli.scoring import Scorer

        scorer = Scorer(str(base))
        scorer.token_budget = budget
        tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
        for prompt, text, score in zip(PROMPTS, TEXTS, scorer.score(PROMPTS, TEXTS), strict=True):
            expected, tokens = plain_log_ppl(model, tokenizer, prompt, text)
            assert math.exp(score.log_ppl) == pytest.approx(math.exp(expected), rel=1e-5)
            assert score.tokens == len(tokens)
            assert tokenizer.eos_token_id in tokens

    def test_logits_are_made_for_what_counts_only_and_a_chunk_at_a_time(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sgpo_cli import scoring

        monkeypatch.setattr(scoring, "CHUNK_TOKENS", 16)
        scorer = scoring.Scorer(str(base))
        seen: list[int] = []
        head = scorer._model.get_output_embeddings()
        head.register_forward_hook(lambda module, given, made: seen.append(made.shape[0]))
        scores = scorer.score(PROMPTS, TEXTS)
        assert max(seen) == 16
        assert sum(seen) == sum(score.tokens for score in scores)

    def test_the_budget_is_halved_when_memory_runs_out_and_the_manifest_says_so(
        self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch

        from sgpo_cli.scoring import Scorer

        rows = [
            {"id": str(n), "prompt": prompt, "target": text}
            for n, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True))
        ]
        write_lines(tmp_path / "targets.jsonl", rows)
        whole = run_stage("filter-ppl", tmp_path / "a", dataset=str(tmp_path / "targets.jsonl"), policy=str(base))
        sums = Scorer._sums

        def small_machine(self: Scorer, part: Any) -> list[float]:
            if len(part) > 6:
                torch.empty(1 << 60)
            return sums(self, part)

        monkeypatch.setattr(Scorer, "_sums", small_machine)
        shrunk = run_stage("filter-ppl", tmp_path / "b", dataset=str(tmp_path / "targets.jsonl"), policy=str(base))
        assert "out_of_memory" not in whole
        assert shrunk["out_of_memory"] == 2  # 20 rows, 10, 5
        for one, other in zip(*(read_lines(tmp_path / name / "train.jsonl") for name in "ab"), strict=True):
            assert one.pop("log_ppl") == pytest.approx(other.pop("log_ppl"), abs=2e-6)
            assert one == other

    def test_a_row_that_does_not_fit_by_itself_ends_the_step(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sgpo_cli.scoring import Scorer

        def full(self: Scorer, part: Any) -> list[float]:
            raise MemoryError

        monkeypatch.setattr(Scorer, "_sums", full)
        scorer = Scorer(str(base))
        scorer.token_budget = 1000
        with pytest.raises(ResourceError, match="one row of"):
            scorer.score(PROMPTS, TEXTS)
        assert scorer.out_of_memory > 0

    def test_other_errors_are_not_taken_for_a_lack_of_memory(self) -> None:
        import torch

        with pytest.raises(RuntimeError) as caught:
            torch.empty(1 << 60)
        assert is_out_of_memory(caught.value)
        assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
        assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.model
def test_a_stopped_run_continues_to_the_same_bytes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sgpo_cli.scoring import Scorer

    rows = [
        {"prompt": prompt, "target": text, "response": "no", "note": [n]}
        for n, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True))
    ]
    write_lines(tmp_path / "targets.jsonl", rows)
    options = {"dataset": str(tmp_path / "targets.jsonl"), "policy": str(base), "method": "gap", "batch_size": 8}
    run_stage("filter-ppl", tmp_path / "whole", **options)
    score, calls = Scorer.score, []

    def stopped(self: Scorer, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, *arguments)

    monkeypatch.setattr(Scorer, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_stage("filter-ppl", tmp_path / "parts", **options)
    facts = run_stage("filter-ppl", tmp_path / "parts", **options)
    assert len(calls) == 2 + 1 + 2 * 2  # target and response of three batches, one of them interrupted
    for name in ("train.jsonl", "rejects.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    made = read_lines(tmp_path / "whole" / "train.jsonl") + read_lines(tmp_path / "whole" / "rejects.jsonl")
    assert facts["rows_in"] == len(made) == 20
    assert {"note", "log_ppl", "target_tokens", "response_log_ppl", "response_tokens"} <= set(made[0])


@pytest.mark.parametrize(
    ("options", "dropped", "threshold"),
    [
        ({"method": "mad", "k": 3.0}, [9.0], 2.5 + 3 * 1.4826 * 1.25),
        ({"method": "quantile", "quantile": 0.5}, [3.0, 4.0, 9.0], 2.0),
        ({"method": "max", "max_ppl": math.exp(3.5)}, [4.0, 9.0], 3.5),
    ],
)
def test_what_is_implausible(options: dict[str, Any], dropped: list[float], threshold: float) -> None:
    values = [4.0, 1.0, 9.0, 2.0, 3.0, 1.5]
    config = FilterPplConfig(dataset="d", policy="p", output_dir="o", **options)
    too_high, found = rule(config, values)
    assert found == pytest.approx(threshold, abs=1e-6)
    assert sorted(value for value in values if too_high({"log_ppl": value})) == dropped
