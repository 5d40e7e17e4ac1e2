"""gen-pairs: the model answers each prompt and improves its answer. Rows (prompt, chosen, rejected).

With several candidates per prompt, every candidate is a row of its own from here on, with its own id, seed and
pair; only best-worst puts those of a prompt together again. The manifest's `rows_in` counts the pairs that could
have been, its `prompts` the prompts that were read.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from sgpo_cli import prompts, quality
from sgpo_cli.artifacts import DATA_FILES
from sgpo_cli.batches import Row
from sgpo_cli.candidates import Candidates
from sgpo_cli.configs import GenPairsConfig
from sgpo_cli.dataset import forbidden_tokens, read_dataset, set_aside
from sgpo_cli.engines import Generation
from sgpo_cli.errors import UsageError
from sgpo_cli.generation import Lazy, Passes
from sgpo_cli.judges import Scores, open_scorer
from sgpo_cli.pairing import PAIRINGS, best_and_worst, pair_problem
from sgpo_cli.schema import CANDIDATE
from sgpo_cli.step import Outcome, Step


def run(config: GenPairsConfig, step: Step) -> None:
    pairing = PAIRINGS[config.pairing]
    request = prompts.improver_request(config.improver or config.policy, config.improver_prompt)
    prompted = read_dataset(config, ("prompt", *pairing.columns), config.policy)
    if config.num_candidates > 1:
        refuse_candidate_ids(prompted, config.num_candidates)
    rows = Lazy(len(prompted) * config.num_candidates, lambda place: candidate(prompted, place, config.num_candidates))
    forbidden = forbidden_tokens(config, config.policy)
    scorer = open_scorer(config.scorer, config, step, prompted) if config.scorer else None
    generated = Candidates(config, request)
    with step, Passes(step, config.batch_size) as passes:
        texts = generated.make(pairing.generated, passes, rows)
        if scorer:
            generated.close()
            answers = Lazy(len(rows), lambda place: {**rows[place], "response": texts["policy"][place].text})
            scores = scorer.score(passes, "scorer", answers)
            outcomes = _best_over_worst(config, prompted, texts["policy"], scores, forbidden)
        else:
            outcomes = _every_pair(config, rows, texts, forbidden)
        counts = step.write_rows(chain(set_aside(prompted), outcomes))
        facts = {"prompts": len(prompted), **passes.stats, **quality.facts(step.directory)}
        asked = {"improver_prompt": request} if "improver" in pairing.generated else {}
        step.finish(DATA_FILES, {**counts, **facts, **asked})


def candidate(prompted: Sequence[Row], place: int, count: int) -> Row:
    """The row of one of `count` candidates per prompt: the first keeps the prompt's id, others are ID#2, ID#3 ..."""
    row, number = prompted[place // count], place % count + 1
    return row if number == 1 else {**row, "id": f"{row['id']}#{number}"}


def refuse_candidate_ids(prompted: Sequence[Row], count: int) -> None:
    """Raises UsageError where an id is the one that another prompt's candidate could get."""
    for row in prompted:
        found = CANDIDATE.search(str(row["id"]))
        if found and 2 <= int(found[1]) <= count:
            raise UsageError(
                f"the id {row['id']!r} looks like that of another prompt's candidate: with --num-candidates {count} "
                "they end with #2, #3 ...",
                "give other ids, or none (--id-column names another column)",
            )


def _every_pair(
    config: GenPairsConfig, rows: Sequence[Row], texts: Mapping[str, Sequence[Generation]], forbidden: list[str]
) -> Iterator[Outcome]:
    """A pair per candidate, of generated texts and of those that the row brings."""
    pairing = PAIRINGS[config.pairing]
    for place, row in enumerate(rows):
        brought = {name: Generation(_plain(row[name]), "stop") for name in pairing.columns}
        made = {name: column[place] for name, column in texts.items()}
        yield _outcome(row, *pairing.choose(brought | made), config, forbidden)


def _plain(text: str | list[dict[str, str]]) -> str:
    return text if isinstance(text, str) else text[0]["content"]


def _best_over_worst(
    config: GenPairsConfig,
    prompted: Sequence[Row],
    answers: Sequence[Generation],
    scores: Scores,
    forbidden: list[str],
) -> Iterator[Outcome]:
    """A pair per prompt; the row keeps all its candidates, for other scorers."""
    for number, row in enumerate(prompted):
        own = slice(number * config.num_candidates, (number + 1) * config.num_candidates)
        scored = [{"text": text.text, "score": score} for text, score in zip(answers[own], scores[own], strict=True)]
        found = best_and_worst(answers[own], scores[own], forbidden)
        if isinstance(found, str):
            yield {"id": row["id"], "prompt": row["prompt"], "candidates": scored}, found
            continue
        pair, problem = _outcome(row, *PAIRINGS[config.pairing].choose(found), config, forbidden)
        yield {**pair, "candidates": scored}, problem


def _outcome(
    row: Row, chosen: Generation, rejected: Generation, config: GenPairsConfig, forbidden: list[str]
) -> Outcome:
    """A row that TRL's DPOTrainer takes as it is, and why it is dropped, if it is."""
    pair: dict[str, Any] = {"id": row["id"], "prompt": row["prompt"]}
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        pair[name] = [{"role": "assistant", "content": text.text}]
    return pair, pair_problem(chosen, rejected, config.max_length_ratio, forbidden)
