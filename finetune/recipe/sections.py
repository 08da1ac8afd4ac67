"""The sections of a recipe as frozen dataclasses. `recipe_file.py` reads them, and `finetune/check` checks them.

`key_texts.py` explains each key.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from finetune.recipe.preparation.clean_section import CleanSection
from finetune.recipe.preparation.synthesize_section import EndpointSection, SynthesizeSection

TrainedArchitecture = Literal["llama", "native"]
DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
AdapterInit = Literal["default", "pissa", "olora", "eva", "corda", "loftq"]
# What `adapter.targets: all-linear` stands for.
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKEN_TABLES = ("embed_tokens", "lm_head")
# What `adapter.modules_to_save` may name, with PEFT's name for it: PEFT compares the ends of names, and all norms end in `norm`.
WHOLE_MODULES: Mapping[str, str] = {
    **{table: table for table in TOKEN_TABLES},
    "norm": "model.norm",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}
# The heads that PEFT adds to `modules_to_save` of a classifier or a reward model by itself.
SCORE_HEADS = ("classifier", "score")


@dataclass(frozen=True)
class Beginning:
    """What an adapter begins with.

    `starts_empty`: it changes nothing before step 1. `changes_base`: it begins with a part of the base weights, which is taken out of
    them. `holds_rounding`: it begins with a part of what nf4 rounds off, so it
    belongs to the quantized base and to no other.
    """

    starts_empty: bool = False
    changes_base: bool = False
    holds_rounding: bool = False


BEGINNINGS: Mapping[AdapterInit, Beginning] = {
    "default": Beginning(starts_empty=True),
    "pissa": Beginning(changes_base=True),
    "olora": Beginning(changes_base=True),
    "eva": Beginning(starts_empty=True),
    "corda": Beginning(changes_base=True),
    "loftq": Beginning(holds_rounding=True),
}


@dataclass(frozen=True)
class ModelSection:
    """The base checkpoint, and how its weights are held in memory."""

    checkpoint: str = "base"
    architecture: TrainedArchitecture = "llama"
    quantize: Literal["none", "int8", "nf4"] = "none"
    dtype: DtypeChoice = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    stream_layers: bool = False
    max_positions: int | None = None
    rope_theta: float | None = None
    speed: Literal["none", "auto"] = "none"


@dataclass(frozen=True)
class SourceSection:
    """One source of rows: a path or a data set of the hub, and how much of it is taken (by default all)."""

    path: str = ""
    hub: str = ""
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    weight: int | float | None = None
    rows: int | None = None


@dataclass(frozen=True)
class TaskSection:
    """A task that is evaluated while a run trains; `every` is a share of the run's steps, and null means its end."""

    name: str = ""
    limit: int | None = None
    every: float | None = None
    path: str = ""
    exemplars: str = ""
    chat: bool = False


@dataclass(frozen=True)
class DataSection:
    """The rows to train and evaluate on, and how they become tokens; `max_tokens` counts a whole row.

    A recipe sets either `train`, or `mixture` (a published one) with `sources` (the user's files for the names in it).
    """

    train: tuple[str | SourceSection, ...] = ()
    mixture: str | None = None
    sources: Mapping[str, str | SourceSection] = field(default_factory=dict)
    eval: tuple[str | SourceSection, ...] = ()
    held_out: int | float = 0
    tasks: tuple[str | TaskSection, ...] = ()
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str = "auto"
    system: str | None = None
    max_tokens: int = 2048
    overflow: Literal["error", "drop", "truncate", "split"] = "error"
    train_on: Literal["assistant", "last", "all"] = "assistant"
    substitute: Mapping[str, str] = field(default_factory=dict)
    deduplicate: bool = False
    bad_rows: Literal["error", "drop"] = "error"
    merge_turns: bool = False
    encoding: str = "utf-8"
    workers: int = 1
    seed: int | None = None


@dataclass(frozen=True)
class AdapterSection:
    """The weights that are trained: a LoRA adapter, or all weights (`kind: none`)."""

    kind: Literal["lora", "none"] = "lora"
    rank: int = 16
    alpha: int | float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False
    dora: bool = False
    init: AdapterInit = "default"
    train_tokens: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    loraplus_ratio: float | None = None

    @property
    def trains_all_weights(self) -> bool:
        """Whether there is no adapter."""
        return self.kind == "none"

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """The names of the linear layers that get an adapter."""
        return LINEAR_LAYERS if self.targets == ("all-linear",) else self.targets

    @property
    def trains_tables(self) -> bool:
        """Whether an adapter trains token tables, whole or some rows of them."""
        return bool(self.train_tokens) or any(table in self.modules_to_save for table in TOKEN_TABLES)

    @property
    def beginning(self) -> Beginning:
        """What the adapter begins with."""
        return BEGINNINGS[self.init]

    @property
    def changes_base(self) -> bool:
        """Whether the adapter begins with a part of the base weights, which are changed before step 1."""
        return self.beginning.changes_base


@dataclass(frozen=True)
class JudgeSection:
    """The reward model that scores the answers: the folder of its run. Its score is clipped to `clip`, then weighted.

    Source of the default range: YuLan-Mini (arXiv 2412.17743), post-training.
    """

    run: str = ""
    weight: float = 1.0
    clip: tuple[float, ...] = (-20.0, 10.0)


@dataclass(frozen=True)
class RewardsSection:
    """What scores the answers of an online method: rules with their weights, a reward model, or both.

    `length_tokens` belongs to the rule `length`.
    """

    rules: Mapping[str, float] = field(default_factory=dict)
    length_tokens: int | None = None
    judge: JudgeSection = field(default_factory=JudgeSection)


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW of the methods `pretrain` and `anneal`; the method or the optimizer state decides what `auto` and null stand for.

    `states` is `fresh` (zero moments), `published` (the optimizer state in the checkpoint's own folder), or a folder.
    """

    states: str = "auto"
    learning_rate: float | None = None
    weight_decay: float | None = None
    moments: Literal["float32", "8bit", "cpu"] = "float32"
    save_states: bool = False


@dataclass(frozen=True)
class ScheduleSection:
    """The length and the learning-rate schedule of `pretrain` and `anneal`; all numbers are in `unit`.

    `count` says where 0 is: at the first step of this run, or at the first step of the training that the optimizer state
    comes from. A decay without a range lasts from the end of the warm-up to the end of the run.
    """

    unit: Literal["steps", "tokens"] = "steps"
    count: Literal["run", "states"] = "run"
    length: int | float | None = None
    warmup: int | float = 0
    decay: Literal["auto", "none", "1-sqrt", "linear", "cosine"] = "auto"
    decay_start: int | float | None = None
    decay_end: int | float | None = None


@dataclass(frozen=True)
class Recipe:
    """One run; `trainer` holds options of the configuration class of the method's trainer.

    `answers` is the most tokens of each answer that the run keeps from before, during and after the training; 0 keeps no answers.
    `row_losses` is the most training rows whose loss is measured before and after the training: 0 measures none, None follows from how long
    the run is.
    `clean` and `synthesize` belong to the verbs of these names, with their `endpoints`; training reads none of them.
    """

    method: str = "sft"
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    rewards: RewardsSection = field(default_factory=RewardsSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    clean: CleanSection = field(default_factory=CleanSection)
    synthesize: SynthesizeSection = field(default_factory=SynthesizeSection)
    endpoints: Mapping[str, EndpointSection] = field(default_factory=dict)
    answers: int = 64
    row_losses: int | None = None
    output: str = ""
    seed: int = 42


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML with every default written out; reading it gives the same recipe."""
    return dump_plain(to_plain(recipe))


def dump_plain(content: Mapping[str, Any]) -> str:
    """Return dicts, lists and scalars as YAML, in their own order."""
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=100)


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as dicts, lists and scalars, without the sections for preparing rows that set nothing."""
    empty = {"clean": CleanSection(), "synthesize": SynthesizeSection(), "endpoints": {}}
    given = {name: value for name, value in vars(recipe).items() if name not in empty or value != empty[name]}
    return {name: _to_plain(value) for name, value in given.items()}


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _to_plain(inner) for name, inner in vars(value).items()}
    if isinstance(value, Mapping):
        return {name: _to_plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(inner) for inner in value]
    return value
