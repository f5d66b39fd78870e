"""The settings of a run, defined once and light to import (no torch, no transformers).

`OrpoSettings` holds what this package adds to `transformers.TrainingArguments`; `orpo.ORPOConfig` inherits
from both, so a recipe and a Python script set the same flat keys. `Objective` is the resolved choice
of what is minimised. Reading a recipe: `orpo.settings.recipe`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args, get_type_hints

from orpo.errors import ConfigError
from orpo.settings.facts import Facts, TrlDefault, setting
from orpo.settings.inherited import INHERITED
from orpo.settings.kinds import usable
from orpo.settings.renamed import NO_EFFECT
from orpo.settings.values import check_values

ObjectiveName = Literal[
    "orpo", "sft", "tempered_odds", "simpo", "cpo_simpo", "cpo", "dpo", "response", "llamafactory"
]
Compares = Literal["odds", "means", "sums", "ratios"]
NllOn = Literal["full", "response", "assistant"]
NllReduction = Literal["token", "pair"]
TextRows = Literal["chat", "plain"]
LayoutName = Literal["shared", "packed", "padded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is minimised: `nll_weight * NLL + preference_weight * L` (docs/objective.md has the equations).

    Attributes:
        preference_weight: Weight of the term L that compares, ORPO's lambda, at least 0; 0 is supervised
            fine-tuning.
        nll_weight: Weight of the NLL term, at least 0; 0 trains on the comparison alone.
        compares: What of the two answers: `odds` (ORPO), `means` (mean log-probs, SimPO), `sums` (log-probs,
            CPO), `ratios` (log-probs over those of a reference model, DPO).
        scale: Factor on the difference inside the sigmoid: 1 in ORPO, the beta of all others.
        margin: What the scaled difference has to exceed; SimPO's gamma.
        label_smoothing: Share of the pairs taken to be labelled the wrong way round, in [0, 0.5).
        nll_on: Tokens in the NLL: `full` prompt and chosen answer, `response` the last answer alone,
            `assistant` every assistant turn of the chosen side.
        nll_reduction: `token` divides the NLL by the tokens of the whole optimizer step; `pair` takes each
            pair's token mean first and divides by the pairs.
    """

    preference_weight: float = 0.1
    nll_weight: float = 1.0
    compares: Compares = "odds"
    scale: float = 1.0
    margin: float = 0.0
    label_smoothing: float = 0.0
    nll_on: NllOn = "full"
    nll_reduction: NllReduction = "token"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss of a pair depends on what a reference model says of it."""
        return self.compares == "ratios" and self.preference_weight > 0


PRESETS: dict[ObjectiveName, Objective] = {
    "orpo": Objective(),
    "sft": Objective(preference_weight=0.0),
    "tempered_odds": Objective(preference_weight=1.0, nll_weight=0.0, scale=0.5),
    "simpo": Objective(preference_weight=1.0, nll_weight=0.0, compares="means", scale=2.0, margin=1.0),
    "cpo_simpo": Objective(preference_weight=1.0, compares="means", scale=2.0, margin=1.0, nll_on="response"),
    "cpo": Objective(preference_weight=1.0, compares="sums", scale=0.1, nll_on="response"),
    "dpo": Objective(preference_weight=1.0, nll_weight=0.0, compares="ratios", scale=0.1),
    "response": Objective(nll_on="response"),
    "llamafactory": Objective(nll_on="response", nll_reduction="pair"),
}
_WEIGHED = {"beta": "preference_weight", "odds_scale": "scale"}
"""Settings of ORPO's family, whose beta weighs the term; elsewhere it is the scale, as in the papers."""
_SCALED = {"beta": "scale"}
_WITH_MARGIN = {"beta": "scale", "simpo_gamma": "margin"}
_OF_SETTINGS: dict[ObjectiveName, dict[str, str]] = {
    **dict.fromkeys(["orpo", "response", "llamafactory"], _WEIGHED),
    **dict.fromkeys(["tempered_odds", "cpo", "dpo"], _SCALED),
    **dict.fromkeys(["simpo", "cpo_simpo"], _WITH_MARGIN),
    "sft": {},
}
"""Objective -> setting -> the part of it that the setting is."""
_OF_NLL = ("nll_on", "nll_reduction")


@dataclass
class OrpoSettings:
    """Settings beyond those of `transformers.TrainingArguments`; every one is optional."""

    # Model
    model_name_or_path: str | None = setting(None, "Hub name or local folder.", resume="derived")
    model_revision: str | None = setting(
        None,
        "Branch, tag or commit of a hub model.",
        trl=TrlDefault("main", "unset is the default branch, and also fits a local folder"),
        resume="built in",
    )
    dtype: str | None = setting(
        None,
        "Weights: float32, bfloat16, float16, auto. Unset: float32 master weights for full fine-tuning, "
        "bfloat16 (where the hardware has it) for a frozen base under LoRA.",
        resume="derived",
        trl=TrlDefault(
            "float32", "unset: float32 for full fine-tuning; the frozen base under LoRA is held in bfloat16"
        ),
    )
    attn_implementation: str | None = setting(
        None, "Attention outside of packed training (generation, fallback).", resume="free", evaluation=True
    )
    trust_remote_code: bool = setting(
        False, "Allow code from the model's repository.", resume="free", evaluation=True
    )
    model_init_kwargs: dict[str, Any] | str | None = setting(
        None, "Further arguments of from_pretrained.", loading=True, resume="built in"
    )
    disable_dropout: bool = setting(True, "Set every dropout of the model to 0, that of whole layers too.")
    chat_template: str | None = setting(None, "Jinja template, a file, or one of our named templates.")
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None, "Arguments of the chat template: enable_thinking, reasoning_effort, ...", resume="derived"
    )
    template_date: str | None = setting(
        None,
        "Date that chat templates write, YYYY-MM-DD. Unset: the day on which the run starts.",
        evaluation=True,
    )
    resize_embeddings: bool = setting(
        False, "Add the template's special tokens to the vocabulary and train them.", resume="built in"
    )
    # LoRA
    use_peft: bool = setting(
        False, "Train a LoRA adapter instead of all weights.", loading=True, resume="built in"
    )
    lora_r: int = setting(16, "LoRA rank.", at_least=1, resume="built in", only_with=("use_peft",))
    lora_alpha: int = setting(
        32, "LoRA scale: updates are scaled by alpha / r.", at_least=1, only_with=("use_peft",)
    )
    lora_dropout: float = setting(
        0.0,
        "Dropout on the adapter's input, in [0, 1).",
        at_least=0,
        below=1,
        trl=TrlDefault(0.05, "noise that preference pairs, seen one to three times, do not need"),
        only_with=("use_peft",),
    )
    lora_target_modules: list[str] | str | None = setting(
        "all-linear",
        "Module names that get an adapter; all-linear: every linear layer and the experts of a mixture, "
        "without vocabulary and routers.",
        trl=TrlDefault(None, "every linear layer, on models PEFT has no table for too"),
        resume="built in",
        only_with=("use_peft",),
    )
    lora_target_parameters: list[str] | None = setting(
        None,
        "Weights outside of linear layers that get one, as in experts stored as one tensor.",
        resume="built in",
        only_with=("use_peft",),
    )
    lora_modules_to_save: list[str] | None = setting(
        None, "Modules trained in full alongside the adapter.", resume="built in", only_with=("use_peft",)
    )
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(r).", only_with=("use_peft",))
    use_dora: bool = setting(False, "Weight-decomposed LoRA.", resume="built in", only_with=("use_peft",))
    adapter_name_or_path: str | None = setting(
        None, "Continue training this adapter.", loading=True, resume="built in"
    )
    load_in_4bit: bool = setting(
        False, "QLoRA: NF4 base weights (bitsandbytes).", loading=True, resume="built in"
    )
    load_in_8bit: bool = setting(False, "8-bit base weights (bitsandbytes).", loading=True, resume="built in")
    # Data
    dataset_name: list[str] | str | dict[str, float] | None = setting(
        None,
        "Hub name(s) or local jsonl, json, parquet, csv, arrow file(s); a mapping gives weights.",
        resume="derived",
    )
    dataset_config: str | None = setting(None, "Configuration of a hub data set.", resume="derived")
    dataset_train_split: str = setting("train", "Split of a hub data set to train on.", resume="derived")
    dataset_test_split: str | None = setting(
        None,
        "Split of a hub data set to evaluate on.",
        resume="free",
        trl=TrlDefault("test", "unset: 5 % of the prompts are held out, which every data set has"),
    )
    eval_dataset_name: list[str] | str | None = setting(None, "Held-out pairs.", resume="free")
    eval_split: float = setting(
        0.05,
        "Share of the prompts held out where no evaluation data is given, in [0, 1); 0: none.",
        at_least=0,
        below=1,
        resume="free",
        not_with=("eval_dataset_name", "dataset_test_split"),
    )
    data_format: str | None = setting(None, "Name of the row format; unset: detected.", resume="derived")
    text_rows: TextRows | None = setting(
        None,
        "Rows of plain texts: `chat` reads prompt and answers as turns, `plain` takes them as is. Unset: "
        "chat where the model has a chat template and the answers do not continue their prompts' text.",
        resume="derived",
        evaluation=True,
    )
    columns: dict[str, str | None] | None = setting(
        None,
        "Our column name -> the data's column name; null: that column is not read.",
        resume="derived",
    )
    max_length: int | None = setting(
        2048,
        "Longest side, prompt + response, in tokens.",
        at_least=2,
        evaluation=True,
        trl=TrlDefault(
            1024, "longer answers are dropped, never cut, and packed pairs have no padding to pay for"
        ),
    )
    on_bad_row: Literal["stop", "skip"] = setting("stop", "What to do with a malformed row.", resume="free")
    sft_rows: Literal["drop", "use"] = setting(
        "drop", "Rows without a rejected answer: `use` trains their NLL alone.", resume="derived"
    )
    max_dropped: float = setting(
        0.1,
        "Largest share of rows that may be dropped without stopping, in [0, 1].",
        at_least=0,
        at_most=1,
        resume="free",
    )
    dataset_num_proc: int | None = setting(None, "Processes that tokenize.", at_least=1, resume="free")
    streaming: bool = setting(False, "Read the data as it comes; needs max_steps.")
    shuffle_buffer: int = setting(
        10_000, "Rows held for shuffling when streaming.", at_least=1, only_with=("streaming",)
    )
    # Objective
    objective: ObjectiveName = setting(
        "orpo",
        "What is minimised: a named set of the settings below (docs/objective.md).",
        resume="derived",
        evaluation=True,
    )
    beta: float | None = setting(
        None,
        "As in the paper of the objective: the weight of ORPO's odds-ratio term (0.1), or the scale inside "
        "the sigmoid (tempered_odds 0.5, simpo and cpo_simpo 2, cpo and dpo 0.1).",
        at_least=0,
        evaluation=True,
        trl=TrlDefault(0.1, "unset: the value that `objective` has, 0.1 for the default one"),
    )
    nll_weight: float | None = setting(
        None,
        "Weight of the NLL term (orpo, sft, cpo_simpo and cpo 1, where TRL says cpo_alpha; simpo, "
        "tempered_odds and dpo 0).",
        at_least=0,
        evaluation=True,
    )
    odds_scale: float | None = setting(
        None, "Scale of the log odds ratio inside the sigmoid of ORPO (1).", above=0, evaluation=True
    )
    simpo_gamma: float | None = setting(
        None, "Target reward margin of simpo and cpo_simpo (1).", at_least=0, evaluation=True
    )
    label_smoothing: float | None = setting(
        None,
        "Share of the pairs taken to be labelled the wrong way round, in [0, 0.5) (0).",
        at_least=0,
        below=0.5,
        evaluation=True,
    )
    nll_on: NllOn | None = setting(None, "Tokens in the NLL (full).", evaluation=True)
    nll_reduction: NllReduction | None = setting(None, "How the NLL is averaged (token).", evaluation=True)
    stages: list[dict[str, Any]] | None = setting(
        None,
        "Several objectives one after the other in one run, in place of `objective`: a list of the settings "
        "of each and its share of the steps, [{objective: sft, share: 0.1}, {objective: tempered_odds}].",
        evaluation=True,
    )
    # Engine
    tokens_per_micro_batch: int | None = setting(
        None,
        "Most tokens in one forward and backward pass; unset: from the memory there is.",
        at_least=2,
        resume="free",
    )
    layout: LayoutName | None = setting(
        None, "Unset: shared, or what the start-up probe finds exact for the model.", resume="free"
    )
    logits_memory_mib: int | None = setting(
        None,
        "Largest chunk of logits alive, in MiB (1024 on CUDA, else 128).",
        at_least=1,
        resume="free",
        evaluation=True,
    )
    optimizer_in_backward: bool = setting(
        False,
        "Let the optimizer use up each gradient in the backward pass and free it: the same weights, without "
        "memory for gradients where a step is one micro-batch. One process, max_grad_norm: 0.",
        resume="free",
    )
    # Watching
    early_stopping_patience: int | None = setting(
        None, "Stop after this many evaluations without improvement.", at_least=1, resume="free"
    )
    num_samples: int | None = setting(
        None,
        "Answers generated from held-out prompts at each evaluation. Unset: `orpo train` generates 3 short "
        "ones before and after training.",
        at_least=0,
        resume="free",
    )
    max_completion_length: int | None = setting(
        None,
        "Tokens of a generated sample.",
        at_least=1,
        resume="free",
        only_with=("generate_during_eval", "num_samples"),
    )
    generate_during_eval: bool = setting(False, "Same as num_samples: 4.", resume="free")
    fail_if_worse: bool = setting(
        True, "Exit with status 3 where the result is worse than its base on held-out pairs.", resume="free"
    )
    dry_run: bool = setting(
        False, "Check recipe, data and model, print the plan, stop.", resume="free", in_recipe="never"
    )
    force: bool = setting(
        False,
        "Resume although the recipe has changed, with the changes from there on.",
        resume="free",
        in_recipe="never",
    )

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> Self:
        """Our own settings of a recipe; those of `TrainingArguments` in it are left out.

        Raises:
            ConfigError: A value is not of its setting's type.
        """
        made = cls(**{f.name: recipe[f.name] for f in fields(OrpoSettings) if f.name in recipe})
        made.convert_values()
        return made

    def convert_values(self) -> None:
        """Convert our own settings to their types, as values of a recipe are.

        Raises:
            ConfigError: A value cannot be converted.
        """
        for name, kind in _kinds().items():
            setattr(self, name, usable(name, getattr(self, name), kind))


@cache
def _kinds() -> dict[str, Any]:
    """The type of each of our own settings."""
    hints = get_type_hints(OrpoSettings)
    return {f.name: hints[f.name] for f in fields(OrpoSettings)}


ONE_WEIGHT_AT_A_TIME = frozenset(
    {"adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"}
)
"""Values of `optim` whose optimizer does to a weight what depends on its own gradient and state alone."""
_NO_LENGTH = "streaming: the length of the data is not known; set max_steps"

OWN: dict[str, Facts] = {f.name: f.metadata["help"] for f in fields(OrpoSettings)}
FACTS: dict[str, Facts] = OWN | {name: inherited.facts for name, inherited in INHERITED.items()}
"""Setting -> facts; a setting of `TrainingArguments` that is not here has none that are not the default."""


def settings_where(holds: Callable[[Facts], bool]) -> set[str]:
    """Names of the settings whose facts are so."""
    return {name for name, facts in FACTS.items() if holds(facts)}


def is_in_use(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a setting has an effect, which some have never, and some only with another one."""
    return name not in NO_EFFECT and not _why_idle(name, settings)


def idle_lines(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """A line for each setting that is not at its default, and has no effect beside the others."""
    set_here = [name for name, value in settings.items() if value != defaults[name]]
    return [f"{name}: no effect {why}" for name in set_here if (why := _why_idle(name, settings))]


_OF_THE_HUB = {
    "model_revision": ("model_name_or_path",),
    "dataset_config": ("dataset_name", "eval_dataset_name"),
}
"""Setting -> those whose names on the hub it is about."""


def _why_idle(name: str, settings: Mapping[str, Any]) -> str:
    """Why a setting has no effect beside the others; empty where it may have one."""
    facts = FACTS.get(name, Facts())
    for other in facts.not_with:
        if settings.get(other.partition(": ")[0]) is not None and _holds(other, settings):
            return f"with {other}"
    if name in _OF_THE_HUB and _all_local(name, settings):
        return f"on {settings[_OF_THE_HUB[name][0]]}, which is not on the hub"
    needed = facts.only_with
    if not needed or any(_holds(other, settings) for other in needed):
        return ""
    if needed[0] == "use_peft" and settings.get("adapter_name_or_path"):
        return "on the adapter of adapter_name_or_path, which has its own"
    if needed[0] == "dataloader_num_workers":
        return "without dataloader_num_workers above 0"
    return f"without {needed[0]}" if ":" in needed[0] else f"without {needed[0]}: true"


def _holds(needed: str, settings: Mapping[str, Any]) -> bool:
    """Whether a setting is on, or has the value asked for as `name: value`; what is left open may get it."""
    name, asks, wanted = needed.partition(": ")
    value = settings.get(name)
    if asks:
        return value is None or getattr(value, "value", value) == wanted
    return value > 0 if isinstance(value, (int, float)) else bool(value)


def _all_local(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether all that a setting of the hub is about is here: a model, or files of data.

    A folder of data may have configurations too.
    """
    given = [settings.get(other) for other in _OF_THE_HUB[name]]
    names = [one for value in given if value for one in ([value] if isinstance(value, str) else value)]
    paths = [Path(str(one)).expanduser() for one in names]
    is_model = name == "model_revision"
    return bool(paths) and all(path.is_file() or (is_model and path.is_dir()) for path in paths)


def inherited_by_evaluation(recipe: Mapping[str, Any], given: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a run that `orpo eval` takes over.

    Args:
        recipe: Of the run.
        given: Names of settings that take the place of the run's: another objective has settings of its own.
    """
    names = settings_where(lambda facts: facts.evaluation)
    if not {"objective", "stages"}.isdisjoint(given):
        names -= _ALL_PARTS | {"objective", "stages"}
    return {name: value for name, value in recipe.items() if name in names and value is not None}


def resolve_objective(settings: OrpoSettings) -> tuple[Objective, list[str]]:
    """The preset named by `settings.objective`, with every explicit key put over it; of stages the last one.

    Returns:
        The objective, and one line for each explicit key that differs from a preset other than `orpo`,
        or that is of an NLL which weighs nothing.

    Raises:
        ConfigError: The preset is unknown or has no such setting, or nothing would be trained.
    """
    if settings.stages is not None:
        return resolve_stages(settings)[-1].objective, []
    name = settings.objective
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"objective: {name!r} is not one of {', '.join(PRESETS)}")
    preset, parts = PRESETS[name], _parts(name)
    for key in _ALL_PARTS - parts.keys():
        if getattr(settings, key):
            having = ", ".join(other for other in PRESETS if key in _parts(other))
            raise ConfigError(f"{key}: {getattr(settings, key)}: objective {name} has none; {having} do")
    explicit = {key: value for key in parts if (value := getattr(settings, key)) is not None}
    objective = replace(preset, **{parts[key]: value for key, value in explicit.items()})
    notices = [
        f"{key}: no effect with nll_weight: 0"
        if key in _OF_NLL and objective.nll_weight == 0
        else f"{key}: {value} beats {getattr(preset, parts[key])}, the value in objective: {name}"
        for key, value in explicit.items()
        if value != getattr(preset, parts[key])
        and (name != "orpo" or (key in _OF_NLL and objective.nll_weight == 0))
    ]
    if objective.scale == 0:
        raise ConfigError(f"beta: 0 would leave nothing of the comparison in objective: {name}; raise it")
    if objective.preference_weight == 0 and objective.nll_weight == 0:
        raise ConfigError("beta and nll_weight are both 0: nothing would be trained; raise one of them")
    return objective, notices


def objective_keys(settings: OrpoSettings) -> dict[str, Any]:
    """The settings that make up the objective, each with the value in effect; none where there are stages."""
    if settings.stages is not None:
        return {}
    objective, _ = resolve_objective(settings)
    return {key: getattr(objective, part) for key, part in _parts(settings.objective).items()}


class Stage(NamedTuple):
    """A part of a run.

    Attributes:
        name: Of its objective.
        objective: What it minimises.
        share: Of the run's steps, above 0.
    """

    name: str
    objective: Objective
    share: float


def resolve_stages(settings: OrpoSettings) -> tuple[Stage, ...]:
    """The stages of a run, in order: one with all its steps where `settings.stages` is not set.

    The objective's settings beside `stages` hold in every stage whose objective has them, unless it says
    otherwise.

    Raises:
        ConfigError: A stage cannot be read or trained, or their shares do not make a run.
    """
    if settings.stages is None:
        return (Stage(settings.objective, resolve_objective(settings)[0], 1.0),)
    if settings.objective != "orpo":
        raise ConfigError(f"objective: {settings.objective}: name it in stages, which are set too")
    if not isinstance(settings.stages, Sequence) or isinstance(settings.stages, (str, bytes)):
        raise ConfigError(f"stages: {settings.stages!r} is no list; write [{{objective: sft}}, ...]")
    if not settings.stages:
        raise ConfigError("stages: there is none in the list; leave it out, or name one")
    stages = [_stage(number, entry, settings) for number, entry in enumerate(settings.stages, start=1)]
    shares = [entry.get("share") for entry in settings.stages]
    used = {key for name, _ in stages for key in _parts(name)}
    if unused := sorted(key for key in _ALL_PARTS - used if getattr(settings, key)):
        raise ConfigError(f"{unused[0]}: {getattr(settings, unused[0])}: no objective in stages has it")
    if sum(objective.needs_reference for _, objective in stages) > 1:
        raise ConfigError(
            "stages: dpo is there more than once; a run keeps one reference, the model as that stage"
            " begins, so train the later one as a run of its own"
        )
    return tuple(Stage(*one, share) for one, share in zip(stages, _whole_run(shares), strict=True))


def _stage(number: int, entry: Any, settings: OrpoSettings) -> tuple[ObjectiveName, Objective]:
    """Name and objective of an entry of `stages`, the settings beside it included."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"stages: stage {number} is {entry!r}; {_STAGE_HAS}, as {{objective: sft}}")
    if not entry.keys() - {"share"}:
        raise ConfigError(f"stages: stage {number} names no objective; {_STAGE_HAS}, as {{objective: sft}}")
    if unknown := sorted(map(str, entry.keys() - _ALL_PARTS - {"objective", "share"})):
        raise ConfigError(f"stages: stage {number} has {', '.join(unknown)}; {_STAGE_HAS}")
    own = {key: value for key, value in entry.items() if key != "share" and value is not None}
    try:
        _check_types(own)
        name: ObjectiveName = own.get("objective", "orpo")
        beside = {key: getattr(settings, key) for key in _parts(name)}
        return name, resolve_objective(OrpoSettings(**(beside | own)))[0]
    except ConfigError as error:
        raise ConfigError(f"stages: stage {number}: {error}") from None


def _check_types(stage: Mapping[str, Any]) -> None:
    """Check the values of a stage, whose types nothing has converted."""
    words = {"objective": ObjectiveName, "nll_on": NllOn, "nll_reduction": NllReduction}
    for key, value in stage.items():
        OWN[key].check(key, value)
        if key in words and value not in get_args(words[key]):
            raise ConfigError(f"{key}: {value!r} is not one of {', '.join(get_args(words[key]))}")
        if key not in words and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"{key}: {value!r} is no number")


_STAGE_HAS = "it has an objective, its settings and a share"


def _whole_run(shares: Sequence[Any]) -> list[float]:
    """The shares with the one that is left open filled in."""
    given = [share for share in shares if share is not None]
    if not all(type(share) in (int, float) and 0 < share <= 1 for share in given):
        raise ConfigError(f"stages: shares are {given}; each is above 0 and at most 1")
    left = 1 - sum(given)
    num_open = len(shares) - len(given)
    if num_open > 1 or (num_open == 1 and left <= 1e-9) or (num_open == 0 and abs(left) > 1e-9):
        raise ConfigError(
            f"stages: shares {given} of {len(shares)} stages; they add up to 1, and one may be left open"
        )
    return [left if share is None else float(share) for share in shares]


class Schedule:
    """Which stage each optimizer step of a run belongs to.

    Attributes:
        stages: In order.
        starts: The first step of each, counted from 0.
        reference_start: That of the stage that needs a reference model; None where none does.
    """

    def __init__(self, stages: Sequence[Stage], num_steps: int) -> None:
        """Divide `num_steps` steps, at least one for each stage.

        Raises:
            ConfigError: There are fewer steps than stages.
        """
        if num_steps < len(stages):
            raise ConfigError(f"stages: {len(stages)} stages cannot share {num_steps} steps")
        self.stages = tuple(stages)
        starts, share = [0], 0.0
        for number, stage in enumerate(stages[:-1], start=1):
            share += stage.share
            start = max(round(share * num_steps), starts[-1] + 1)
            starts.append(min(start, num_steps - len(stages) + number))
        self.starts = tuple(starts)
        needing = [
            start for start, stage in zip(starts, stages, strict=True) if stage.objective.needs_reference
        ]
        self.reference_start = needing[0] if needing else None

    def at(self, step: int) -> Stage:
        """The stage of a step, counted from 0."""
        return self.stages[bisect.bisect_right(self.starts, step) - 1]


def _parts(name: ObjectiveName) -> dict[str, str]:
    """Setting -> the part of an objective that it is, for those that the objective of this name has."""
    smoothed = {"label_smoothing": "label_smoothing"} if _OF_SETTINGS[name] else {}
    return _OF_SETTINGS[name] | smoothed | {key: key for key in ("nll_weight", *_OF_NLL)}


_ALL_PARTS = frozenset(key for name in PRESETS for key in _parts(name))


def check_settings(settings: OrpoSettings) -> None:
    """Check every range, and the combinations that cannot work. Reads inherited settings where there are any.

    Raises:
        ConfigError: Naming the key, its value and what is accepted.
    """
    for key, facts in FACTS.items():
        facts.check(key, getattr(settings, key, None))
    resolve_objective(settings)
    _check_date(settings.template_date)
    check_values(vars(settings))
    if settings.load_in_4bit and settings.load_in_8bit:
        raise ConfigError("load_in_4bit and load_in_8bit are both set; choose one")
    if (settings.load_in_4bit or settings.load_in_8bit) and not (
        settings.use_peft or settings.adapter_name_or_path
    ):
        raise ConfigError(
            "quantized weights cannot be trained; add use_peft: true, or drop load_in_4bit/8bit"
        )
    _check_reference(settings)
    if settings.optimizer_in_backward and hasattr(settings, "max_grad_norm"):
        _check_in_backward(vars(settings))
    if settings.streaming and getattr(settings, "max_steps", 1) <= 0:
        raise ConfigError(_NO_LENGTH)


def _check_reference(settings: OrpoSettings) -> None:
    """What cannot work with a reference model."""
    *_, last = stages = [stage.objective.needs_reference for stage in resolve_stages(settings)]
    if settings.streaming and any(stages):
        raise ConfigError("streaming: objective dpo scores all pairs once before its steps; read them whole")
    if settings.stages and getattr(settings, "ignore_data_skip", False):
        raise ConfigError("ignore_data_skip: a resumed run would begin with its first stage; leave it out")
    if last and not stages[0] and getattr(settings, "lr_scheduler_type", None) == "reduce_lr_on_plateau":
        raise ConfigError(
            "lr_scheduler_type: reduce_lr_on_plateau needs a loss at each evaluation, and that of dpo is not"
            " known before its stage begins; choose another schedule"
        )


def _check_in_backward(settings: Mapping[str, Any]) -> None:
    """What cannot be where each weight moves before the gradients of others are known."""
    norm, optim = settings.get("max_grad_norm"), settings.get("optim")
    optim = getattr(optim, "value", optim)
    if norm != 0:
        raise ConfigError(
            f"optimizer_in_backward: max_grad_norm is {'on by default' if norm is None else norm}, and clips"
            " by the norm of all gradients before any weight moves; set max_grad_norm: 0, or leave"
            " optimizer_in_backward out"
        )
    if optim is not None and optim not in ONE_WEIGHT_AT_A_TIME:
        known = ", ".join(sorted(ONE_WEIGHT_AT_A_TIME))
        raise ConfigError(
            f"optimizer_in_backward: optim: {optim} is not known to take one weight at a time; {known} do"
        )
    reasons = {
        "fp16": "looks for infinite gradients of all weights before any moves; bf16 does not",
        "deepspeed": "has an optimizer step of its own; leave one of the two out",
        "fsdp": "adds up the gradients of several processes; leave one of the two out",
    }
    for key, reason in reasons.items():
        if settings.get(key):
            raise ConfigError(f"optimizer_in_backward: {key} {reason}")


def check_processes(settings: OrpoSettings, number: int) -> None:
    """Check what `number` processes cannot do together.

    Raises:
        ConfigError: A setting is for one process.
    """
    if settings.optimizer_in_backward and number > 1:
        raise ConfigError(
            f"optimizer_in_backward: {number} processes add up their gradients after the backward pass; leave"
            " it out, fsdp cuts weights and gradients over the processes"
        )


def _check_date(text: str | None) -> None:
    try:
        date.fromisoformat("2000-01-01" if text is None else text)
    except (TypeError, ValueError):
        raise ConfigError(f"template_date: {text!r} is no date; write it as 2026-11-27") from None


def check_recipe(recipe: Mapping[str, Any]) -> None:
    """Check ranges and combinations of a recipe's settings, inherited ones included.

    Raises:
        ConfigError: As `check_settings`.
    """
    for key, value in recipe.items():
        FACTS.get(key, Facts()).check(key, value)
    check_values(recipe)
    settings = OrpoSettings.from_recipe(recipe)
    check_settings(settings)
    if settings.optimizer_in_backward:
        _check_in_backward(recipe)
    if settings.streaming and recipe.get("max_steps", -1) <= 0:
        raise ConfigError(_NO_LENGTH)
