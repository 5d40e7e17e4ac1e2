"""The texts that make pairs, written by the models that are asked for, one model in memory at a time."""

from collections.abc import Collection, Sequence

from sgpo_cli import prompts
from sgpo_cli.batches import Row
from sgpo_cli.configs import GenPairsConfig
from sgpo_cli.engines import Engine, Generation, LazyEngine, Sampling
from sgpo_cli.engines.base import AsksServer
from sgpo_cli.generation import Lazy, Passes, seeds_for
from sgpo_cli.remote.connect import open_generation


class Candidates:
    """What the models of a step write; a wrong engine is refused at once, a model is loaded when it is due.

    Args:
        request: what asks the improver.
    """

    def __init__(self, config: GenPairsConfig, request: str) -> None:
        self._config, self._request = config, request
        self._sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
        self._model, self._engine = config.policy, open_generation(config, config.policy)

    def make(self, names: Collection[str], passes: Passes, rows: Sequence[Row]) -> dict[str, Sequence[Generation]]:
        """A text per row for each name of `pairing.Pairing.generated`."""
        texts: dict[str, Sequence[Generation]] = {}
        if "policy" in names:
            texts["policy"] = self._answers("policy", self._config.policy, passes, rows)
        if "improver" in names:
            texts["improver"] = self._improvements(texts["policy"], passes, rows)
        if "initial" in names:
            initial = self._config.initial or self._config.policy
            same = initial == self._config.policy  # in the first round: what was improved is M0's own answer
            texts["initial"] = texts["policy"] if same else self._answers("initial", initial, passes, rows)
        return texts

    def close(self) -> None:
        """Give the memory of the model back."""
        if isinstance(self._engine, LazyEngine):
            self._engine.unload()

    def _answers(self, name: str, model: str, passes: Passes, rows: Sequence[Row]) -> Sequence[Generation]:
        asked = Lazy(len(rows), lambda place: rows[place]["prompt"])
        return passes.generate(name, self._of(model), asked, self._sampling, seeds_for(rows, self._config.seed, name))

    def _improvements(
        self, answers: Sequence[Generation], passes: Passes, rows: Sequence[Row]
    ) -> Sequence[Generation]:
        config = self._config
        engine = self._of(config.improver or config.policy)
        sampling = Sampling(config.max_new_tokens, config.improver_temperature, config.improver_top_p)
        texts = answers
        for number in range(1, config.improvement_steps + 1):
            parts = ("improver",) if number == 1 else ("improver", str(number))
            asked = self._requests(rows, texts)
            texts = passes.generate("-".join(parts), engine, asked, sampling, seeds_for(rows, config.seed, *parts))
        return texts

    def _requests(self, rows: Sequence[Row], texts: Sequence[Generation]) -> Sequence[list[dict[str, str]]]:
        return Lazy(len(rows), lambda place: prompts.improve(rows[place]["prompt"], texts[place].text, self._request))

    def _of(self, model: str) -> Engine | AsksServer:
        """The engine of a model; that of another one is put away first."""
        if model != self._model:
            self.close()
            self._model, self._engine = model, open_generation(self._config, model)
        return self._engine
