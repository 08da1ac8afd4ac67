"""The table of training methods. It holds names only, so that a recipe can be checked without importing torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.data.settings import RowShape
from finetune.recipe.owned_options import GRPO_OWNED, ONLINE_OWNED, PRETRAINING_OWNED, REFERENCE_OPTIONS, own

# What the base is loaded as: a language model, or one number for a whole text.
Head = Literal["language", "score"]


@dataclass(frozen=True)
class Pretraining:
    """What `auto` means for a method whose rows are packed full, and whose optimizer and schedule are the kit's."""

    states: Literal["fresh", "published"]
    decay: Literal["none", "1-sqrt"]


# What a row of tokens becomes before TRL's collator reads it; `training/preference/prepared_rows.py` does it.
RowAdapter = Literal["none", "join_prompts", "write_out_sides", "add_mismatched_answers"]


@dataclass(frozen=True)
class Method:
    """One method: what its rows become, the trainer's classes for it, and what the kit decides in their place.

    `columns`: those of the prepared rows that the trainer is given.
    `has_reference`: its loss compares with a reference model, which is the model as it is before step 1.
    `reference_columns`: where TRL keeps the reference model's log-probabilities of a row that were computed before step 1.
    `smallest_batch`: how many rows of one micro-batch it compares at least.
    `adapt_rows`, `maps_rows`, `shuffles_once`, `collator_class`: what its TRL trainer needs of rows that are tokens already: how
    they are written out, whether its constructor maps over them, whether it reads them in one order, and the collator of its
    module that its constructor must be handed.
    `scored_texts`: how many texts a row adds that are scored and not learnt from.
    `words`: the values of options whose class does not say them.
    `defaults` are ours and a recipe may change them; `owned` maps the options that a recipe may not set to the place where that
    is decided.
    """

    name: str
    shape: RowShape
    columns: tuple[str, ...]
    trainer_module: str
    trainer_class: str
    config_module: str
    config_class: str
    head: Head = "language"
    has_reference: bool = False
    reference_columns: tuple[str, ...] = ()
    smallest_batch: int = 1
    adapt_rows: RowAdapter = "none"
    maps_rows: bool = False
    shuffles_once: bool = False
    collator_class: str = ""
    scored_texts: int = 0
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    owned: Mapping[str, str] = field(default_factory=dict)
    pretraining: Pretraining | None = None

    @property
    def is_pretraining(self) -> bool:
        """Whether rows are packed full, and the optimizer and the schedule are the kit's."""
        return self.pretraining is not None

    @property
    def trains_reward_model(self) -> bool:
        """Whether the model gives a text a score, and cannot generate."""
        return self.head == "score"

    @property
    def is_online(self) -> bool:
        """Whether the model writes the answers that it is trained on, so that a row is only a prompt."""
        return self.shape == "prompt"


SHARED_DEFAULTS: Mapping[str, Any] = {
    # Two checkpoints are enough to go on from, and do not fill a laptop's disk.
    "save_total_limit": 2,
}


_PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Source: the table of losses in TRL 1.16's DPOConfig and `DPOTrainer._compute_loss`.
_DPO_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
_F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


_PRETRAINING_DEFAULTS: Mapping[str, Any] = {**SHARED_DEFAULTS, "max_grad_norm": 1.0, "logging_steps": 10}


def _make_online(name: str, owned: Mapping[str, str]) -> Method:
    """Return a row for a method whose answers the model writes itself, to prompts."""
    return Method(
        name=name,
        shape="prompt",
        columns=("input_ids", "prompt", "answer", "origin"),
        trainer_module=f"trl.trainer.{name}_trainer",
        trainer_class=f"{name.upper()}Trainer",
        config_module=f"trl.trainer.{name}_config",
        config_class=f"{name.upper()}Config",
        has_reference=True,
        # One answer to each held-out prompt tells the mean reward; TRL would write as many as in training.
        defaults={**SHARED_DEFAULTS, "num_generations_eval": 1},
        owned={**own(*REFERENCE_OPTIONS), **owned},
    )


def _make_pretraining(name: str, pretraining: Pretraining) -> Method:
    """Return a row for transformers' own Trainer, whose loss is the model's."""
    return Method(
        name=name,
        shape="sequence",
        columns=("input_ids", "labels"),
        trainer_module="transformers",
        trainer_class="Trainer",
        config_module="transformers.training_args",
        config_class="TrainingArguments",
        defaults=_PRETRAINING_DEFAULTS,
        owned=PRETRAINING_OWNED,
        pretraining=pretraining,
    )


def _make_experimental(
    name: str,
    module: str,
    class_prefix: str,
    owned: tuple[str, ...],
    *,
    words: Mapping[str, tuple[str, ...]] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Method:
    """Return a row for a trainer of TRL's experimental namespace; a test fails first when one moves."""
    generates = ("generate_during_eval", "is_encoder_decoder", "max_completion_length")
    return Method(
        name=name,
        shape="pair",
        columns=_PAIR_COLUMNS,
        adapt_rows="write_out_sides",
        maps_rows=True,
        trainer_module=f"trl.experimental.{module}.{module}_trainer",
        trainer_class=f"{class_prefix}Trainer",
        config_module=f"trl.experimental.{module}.{module}_config",
        config_class=f"{class_prefix}Config",
        words=words or {},
        defaults={**SHARED_DEFAULTS, **(defaults or {})},
        owned=own("max_length", "dataset_num_proc", *generates, *owned),
    )


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="sft",
            shape="sequence",
            columns=("input_ids", "labels"),
            trainer_module="trl.trainer.sft_trainer",
            trainer_class="SFTTrainer",
            config_module="trl.trainer.sft_config",
            config_class="SFTConfig",
            defaults=SHARED_DEFAULTS,
            owned=own(
                "max_length",
                "truncation_mode",
                "chat_template_path",
                "eos_token",
                "pad_token",
                "dataset_text_field",
                "dataset_kwargs",
                "dataset_num_proc",
                "assistant_only_loss",
                "completion_only_loss",
            ),
        ),
        Method(
            name="dpo",
            shape="pair",
            columns=_PAIR_COLUMNS,
            trainer_module="trl.trainer.dpo_trainer",
            trainer_class="DPOTrainer",
            config_module="trl.trainer.dpo_config",
            config_class="DPOConfig",
            has_reference=True,
            reference_columns=("ref_chosen_logps", "ref_rejected_logps"),
            defaults=SHARED_DEFAULTS,
            words={"loss_type": _DPO_LOSSES, "f_divergence_type": _F_DIVERGENCES},
            owned=own(
                "max_length", "truncation_mode", "pad_token", "padding_free", "dataset_num_proc", *REFERENCE_OPTIONS
            ),
        ),
        Method(
            name="kto",
            shape="labelled",
            columns=("prompt_ids", "completion_ids", "label"),
            trainer_module="trl.trainer.kto_trainer",
            trainer_class="KTOTrainer",
            config_module="trl.trainer.kto_config",
            config_class="KTOConfig",
            has_reference=True,
            reference_columns=("ref_logps", "ref_KL_logps"),
            smallest_batch=2,
            adapt_rows="add_mismatched_answers",
            shuffles_once=True,
            collator_class="DataCollatorForUnpairedPreference",
            scored_texts=1,
            defaults=SHARED_DEFAULTS,
            owned={
                **own("max_length", "dataset_num_proc", *REFERENCE_OPTIONS),
                "train_sampling_strategy": "rows are shuffled once, by the seed, and then read in order; remove this key",
                "precompute_ref_batch_size": "answers are compared within the batches of the training; remove this key",
            },
        ),
        _make_experimental("orpo", "orpo", "ORPO", ("padding_value",)),
        _make_experimental("cpo", "cpo", "CPO", (), words={"loss_type": ("sigmoid", "hinge", "ipo")}),
        # SimPO is TRL's CPO with another loss and without its second term. Source: SimPO (arXiv 2405.14734), equation 6.
        _make_experimental(
            "simpo",
            "cpo",
            "CPO",
            (),
            words={"loss_type": ("simpo",)},
            defaults={"loss_type": "simpo", "cpo_alpha": 0.0},
        ),
        Method(
            name="reward",
            shape="pair",
            columns=_PAIR_COLUMNS,
            trainer_module="trl.trainer.reward_trainer",
            trainer_class="RewardTrainer",
            config_module="trl.trainer.reward_config",
            config_class="RewardConfig",
            head="score",
            adapt_rows="join_prompts",
            defaults=SHARED_DEFAULTS,
            owned=own("max_length", "pad_token", "eos_token", "chat_template_path", "dataset_num_proc"),
        ),
        _make_online("grpo", {**ONLINE_OWNED, **GRPO_OWNED}),
        _make_online("rloo", ONLINE_OWNED),
        _make_pretraining("pretrain", Pretraining(states="fresh", decay="none")),
        _make_pretraining("anneal", Pretraining(states="published", decay="1-sqrt")),
    )
}
# The method of a recipe that names none.
DEFAULT_METHOD = METHODS["sft"]


def name_methods(fits: Callable[[Method], bool]) -> str:
    """Return the names of the methods that fit, as a message lists them: `grpo or rloo`."""
    return " or ".join(name for name, method in METHODS.items() if fits(method))


# Which method trains the judge of another's answers.
JUDGE_METHOD = name_methods(lambda method: method.trains_reward_model)
