"""The options of the guard's two checks: what they look at, and the limits of their rules (`guard.py`)."""

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge

from sgpo_cli.options import Count, DataConfig, Dtype, RemoteConfig, Share, option

SCORERS = "reward:PATH_OR_NAME (a reward model), MODULE:FUNCTION (your own), demo (the demo world's rule)"


@dataclass(kw_only=True)
class CheckPairsConfig(DataConfig):
    """Before a DPO: are its pairs healthy? Otherwise the run stops, and the last good model is its result."""

    policy: str = option("The model that DPO would train, in both roles: M*.", kind="model")
    previous: str | None = option("The last good model; default: the policy.", None, kind="model")
    judge: str | None = option(f"Who judges: {SCORERS}. Default: the policy as improver.", None, kind="judge")
    sample: Count = option("How many pairs to look at, drawn by the seed.", 400)
    min_win_share: Share = option("Spent below: better pairs, of those that are better or worse.", 0.75)
    min_better_share: Share = option("Spent below: prompts whose answer was improved.", 0.05)
    min_pairs: Count = option("Spent below: pairs.", 30)
    max_bad_share: Share = option("Broken above: pairs that were cut, empty or the like; repetitive texts.", 0.25)
    max_length_ratio: Annotated[float, Ge(1)] = option("Broken beyond: typical length of chosen over rejected.", 4.0)
    min_log_prob_gap: float = option(
        "Without a judge, broken below: log-probability per token, under the policy, of chosen above rejected.", -0.3
    )
    batch_size: Count = option("Rows per batch.", 64)
    dtype: Dtype = option("Number format of the model: auto (the checkpoint's), float32, bfloat16 ...", "auto")
    chat_template_kwargs: dict[str, Any] = option("Settings for the chat template.", {})


@dataclass(kw_only=True)
class CheckPolicyConfig(RemoteConfig):
    """After a DPO: did policy or improver fall? Then the run stops, and the last good model is its result."""

    model: str = option("The new model.", kind="model")
    previous: str = option("The last good model.", kind="model")
    judge: str | None = option(f"Who judges: {SCORERS}. Default: the last good model as improver.", None, kind="judge")
    tolerance: Annotated[float, Ge(0)] = option("Judge's points that are no fall, even when they are certain.", 0.02)
    max_lost_share: Share = option("Without a judge, broken above: answers that the improver finds worse.", 0.1)
    max_surprise: float = option(
        "Without a judge, broken above: log-perplexity under the last good model, above its own answers'.", 1.0
    )
    max_bad_rise: Share = option("Broken above: more answers that are empty, cut, repetitive or the like.", 0.05)
    max_length_ratio: Annotated[float, Ge(1)] = option(
        "Broken beyond: typical length over the previous answer's.", 4.0
    )
