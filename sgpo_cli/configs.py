"""Every option that is ours, declared once: one dataclass per stage, one field per flag and recipe key.

`cli.py` builds the flags from the fields, `recipe.py` checks recipes against them, and the request of a
step (`artifacts.Request`) is made of their values. What stages share is in `options.py`. Options of TRL's
trainers are not listed: they pass through (`trl_options.py`).
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from sgpo_cli.guard_configs import CheckPairsConfig, CheckPolicyConfig
from sgpo_cli.options import (
    Count,
    DataConfig,
    Dtype,
    RemoteConfig,
    Share,
    StageConfig,
    Temperature,
    TopP,
    TrainConfig,
    WorldSize,
    option,
)


@dataclass(kw_only=True)
class MakeDemoConfig(StageConfig):
    """Make the demo world: data and an untrained tiny model."""

    num_sft: WorldSize = option("Prompts with a reference answer, for sft and make-targets.", 4000)
    num_prompts: WorldSize = option("Prompts alone, for gen-pairs.", 1500)
    num_heldout: WorldSize = option("Prompts for evaluate.", 400)
    num_labelled: Annotated[int, Gt(0)] | None = option(
        "Preference pairs of two references to SFT prompts, for offline DPO; none unless asked.", None
    )


@dataclass(kw_only=True)
class SftConfig(TrainConfig):
    """Fine-tune a base model on prompts and reference answers: the initial policy M0."""

    TRAINER: ClassVar[str] = "sft"


@dataclass(kw_only=True)
class MakeTargetsConfig(RemoteConfig):
    """The policy answers the prompts, a teacher improves its answers: targets for the improver."""

    DRY_RUN: ClassVar[bool] = True

    policy: str = option("The model that answers: M0.", kind="model")
    teacher: str = option(
        "Who improves the answers: openai:MODEL (any OpenAI-compatible server), hf:PATH_OR_NAME (a local model), "
        "self (the policy, seeing the reference), reference (the reference answer itself), demo or "
        "demo:JUNK_SHARE (the demo world's rule).",
        kind="teacher",
    )
    teacher_base_url: str = option("Address of the server of openai:MODEL.", "https://api.openai.com/v1", kind="url")
    teacher_api_key_env: str = option(
        "Environment variable that holds the API key; '' for none.", "OPENAI_API_KEY", kind="guard"
    )
    teacher_api_key_file: str | None = option("File that holds the API key, instead.", None, kind="guard")
    teacher_prompt: str = option("Text file with the teacher's instructions.", "teacher", kind="prompt")
    teacher_max_new_tokens: Count = option("Longest target, in tokens.", 1024)
    teacher_temperature: Temperature = option("Sampling temperature of the teacher; 0 is greedy.", 0.0)
    gates: list[str] = option(
        "Checks that a target must pass, of unchanged, copy, meta_talk, language, length_ratio; 'none' for none.",
        ["unchanged", "copy", "meta_talk", "language", "length_ratio"],
    )
    max_length_ratio: Annotated[float, Ge(1)] = option(
        "For the gate length_ratio: how many times longer or shorter than response and reference a target may be.", 3.0
    )
    batch_out: str | None = option(
        "Write the teacher's requests to this file, in the format of batch services, and stop.", None, kind="guard"
    )
    batch_in: str | None = option(
        "Read the teacher's answers from this file of a batch service; nothing is sent.", None, kind="guard"
    )

    def __post_init__(self) -> None:
        from sgpo_cli.gates import check_gates
        from sgpo_cli.teachers import check_teacher  # which reads this config

        super().__post_init__()
        check_teacher(self.teacher)
        check_gates(self.gates)


@dataclass(kw_only=True)
class FilterPplConfig(DataConfig):
    """Drop targets that the policy finds implausible."""

    policy: str = option("The model whose perplexity decides: M0.", kind="model")
    method: Literal["mad", "quantile", "max", "gap"] = option(
        "mad: log-perplexity above median + k robust deviations; quantile: the worst share; max: a fixed "
        "perplexity; gap: log-perplexity too far above that of the policy's own answer.",
        "mad",
    )
    k: Annotated[float, Gt(0)] = option("For mad: how many robust deviations (1.4826 MAD) above the median.", 8.0)
    quantile: Annotated[float, Gt(0), Le(1)] = option("For quantile: the share of rows to keep.", 0.9)
    max_ppl: Annotated[float, Gt(0)] = option("For max: the highest perplexity to keep.", 100.0)
    max_gap: float = option("For gap: the largest difference of log-perplexities to keep.", 2.0)
    batch_size: Count = option("Rows that are sorted by length and scored together.", 512)
    dtype: Dtype = option("Number format of the model: auto (the checkpoint's), float32, bfloat16 ...", "auto")
    chat_template_kwargs: dict[str, Any] = option("Settings for the chat template.", {})


@dataclass(kw_only=True)
class TrainImproverConfig(TrainConfig):
    """Teach the policy to improve its own answers, and to answer as before: the unified model M*."""

    TRAINER: ClassVar[str] = "sft"

    replay_ratio: Annotated[float, Ge(0)] = option("Rows prompt -> reference mixed in, per improver row.", 1.0)
    improver_prompt: str = option("Text file that asks for an improvement.", "improver", kind="prompt")
    max_unchanged_share: Annotated[float, Ge(0), Lt(1)] | None = option(
        "Rows whose target is the response as it was, of all: more are dropped, or the improver of a good policy "
        "learns only to copy.",
        None,
    )


@dataclass(kw_only=True)
class GenPairsConfig(RemoteConfig):
    """The model answers each prompt and improves its answer: chosen is the improvement. Other pairings are rivals."""

    policy: str = option("The model that answers; with pairing sgpo in both roles: M*.", kind="model")
    improver: str | None = option("The model that improves the answers; default: the policy.", None, kind="model")
    initial: str | None = option(
        "For synpo: the initial policy M0, whose answers are rejected; default: the policy.", None, kind="model"
    )
    pairing: Literal["sgpo", "spin", "distill", "synpo", "labelled", "best-worst"] = option(
        "Which two texts make a pair: sgpo (improvement over answer), spin (reference over answer), distill (target "
        "over response, as make-targets wrote them), synpo (improvement over the initial policy's answer), labelled "
        "(the data set's own chosen and rejected), best-worst (of --num-candidates answers, by --scorer).",
        "sgpo",
    )
    num_candidates: Count = option(
        "Answers for each prompt; each makes a pair of its own, except with best-worst, which makes one of them all.",
        1,
    )
    improvement_steps: Count = option("How often an answer is improved, each time from the improvement before.", 1)
    scorer: str | None = option(
        "For best-worst: reward:PATH_OR_NAME (a reward model), MODULE:FUNCTION (your own, of prompt and response) or "
        "demo (the demo world's rule).",
        None,
        kind="judge",
    )
    improver_temperature: Temperature = option("Sampling temperature of the improver; 0 is greedy.", 0.0)
    improver_top_p: TopP = option("Nucleus sampling of the improver.", 1.0)
    improver_prompt: str | None = option(
        "Text file that asks for an improvement; must be the one the model was trained with.",
        None,
        kind="prompt",
    )
    max_length_ratio: Annotated[float, Ge(1)] = option(
        "Drop pairs whose texts differ in length by more than this factor.", 3.0
    )

    def __post_init__(self) -> None:
        """Options that do not go together are refused with the recipe, not when the step's turn comes."""
        from sgpo_cli.pairing import check_options  # which reads this config

        super().__post_init__()
        check_options(self)


@dataclass(kw_only=True)
class DpoConfig(TrainConfig):
    """Train the model to prefer its improvements; the reference is the frozen start model."""

    TRAINER: ClassVar[str] = "dpo"

    ref_model: str | None = option(
        "The frozen reference, such as M0 in every round; default: the model that training starts from.",
        None,
        kind="model",
    )
    improver_replay: Share | None = option(
        "For this share of the pairs, a further one that asks the improver: given the rejected answer, it shall "
        "prefer the chosen one to leaving it as it is.",
        None,
    )


@dataclass(kw_only=True)
class MergeConfig(StageConfig):
    """Merge an adapter into its base model: a full model, for tools that take no adapters."""

    POSITIONAL: ClassVar[str] = "model_name_or_path"

    model_name_or_path: str = option("The adapter: a step, a directory or a Hub name.", kind="model")
    dtype: Dtype = option("Number format to save: auto (the base checkpoint's), float32, bfloat16 ...", "auto")


@dataclass(kw_only=True)
class EvaluateConfig(RemoteConfig):
    """Models answer held-out prompts, as policy and as improver; a judge scores the answers, or compares them."""

    ALL_ANSWERS: ClassVar[tuple[str, ...]] = ("policy_sampled", "policy_greedy", "improver_sampled", "improver_greedy")

    models: list[str] = option(
        "The models to compare, or files of answers (AlpacaEval's, Arena-Hard's, or JSON lines with id or prompt, and "
        "response); on the command line, repeat the flag.",
        kind="answers",
    )
    judge: str = option(
        "Who judges: openai:MODEL (any OpenAI-compatible server), hf:PATH_OR_NAME (a local model), "
        "reward:PATH_OR_NAME (a reward model), MODULE:FUNCTION (your own, of prompt and response), demo (the demo "
        "world's rule).",
        "demo",
        kind="judge",
    )
    baseline: str | None = option(
        "The model that win rates are against: the name of one of the models, another model, or a file of answers.",
        None,
        kind="answers",
    )
    judge_mode: Literal["auto", "pairwise", "pointwise"] = option(
        "pairwise: a language model compares with the baseline's answer; pointwise: it gives 1 to 10; auto: pairwise "
        "when there is a baseline. Other judges always score, and scores are compared.",
        "auto",
    )
    judge_orders: Literal["both", "single"] = option(
        "For pairwise: ask with each answer first, and count what both agree on; or once, in an order drawn per row.",
        "both",
    )
    judge_prompt: str | None = option(
        "Text file with the judge's instructions; default: judge_pairwise or judge_pointwise.", None, kind="prompt"
    )
    judge_max_new_tokens: Count = option("Longest reply of the judge, in tokens; one cut there is invalid.", 1024)
    judge_temperature: Temperature = option("Sampling temperature of the judge; 0 is greedy.", 0.0)
    judge_base_url: str = option("Address of the server of openai:MODEL.", "https://api.openai.com/v1", kind="url")
    judge_api_key_env: str = option(
        "Environment variable that holds the API key; '' for none.", "OPENAI_API_KEY", kind="guard"
    )
    judge_api_key_file: str | None = option("File that holds the API key, instead.", None, kind="guard")
    answers: list[Literal["policy_sampled", "policy_greedy", "improver_sampled", "improver_greedy"]] = option(
        "Which answers to judge; repeat the flag. The improver improves the sampled answer of the policy.",
        list(ALL_ANSWERS),
    )
    lc_official: str | None = option(
        "AlpacaEval's df_gamed.csv or instruction_difficulty.csv, for its full length-controlled win rate on its own "
        "prompts.",
        None,
        kind="data",
    )
    improver_prompt: str | None = option(
        "Text file that asks for an improvement; default: the one a model was trained with.",
        None,
        kind="prompt",
    )

    def __post_init__(self) -> None:
        """`--baseline m0` is the model whose path ends with m0; what a language model does and is told is settled."""
        super().__post_init__()
        paths = {path.rstrip("/").rpartition("/")[2]: path for path in self.models}
        self.baseline = paths.get(self.baseline or "", self.baseline)
        talks = self.judge.startswith(("hf:", "openai:"))
        if self.judge_mode == "auto":
            self.judge_mode = "pairwise" if talks and self.baseline else "pointwise"
        if talks and self.judge_prompt is None:
            self.judge_prompt = f"judge_{self.judge_mode}"
        from sgpo_cli.judges import check_judge  # which reads this config

        check_judge(self)


STAGES: dict[str, type[StageConfig]] = {
    "make-demo": MakeDemoConfig,
    "sft": SftConfig,
    "make-targets": MakeTargetsConfig,
    "filter-ppl": FilterPplConfig,
    "train-improver": TrainImproverConfig,
    "gen-pairs": GenPairsConfig,
    "dpo": DpoConfig,
    "merge": MergeConfig,
    "evaluate": EvaluateConfig,
    "check-pairs": CheckPairsConfig,
    "check-policy": CheckPolicyConfig,
}
"""The subcommands; the module of a stage is `sgpo_cli.stages.<name with underscores>`."""
