"""The table of training methods. It names classes and does not import them, so that a recipe is checked without torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.data.settings import RowShape
from finetune.recipe.owned_options import GRPO_OWNED, ONLINE_OWNED, PRETRAINING_OWNED, REFERENCE_OPTIONS, own

# What the base model is loaded as: a language model, or a model that gives a whole text one score.
Head = Literal["language", "score"]


@dataclass(frozen=True)
class Pretraining:
    """What `auto` in the sections optimizer and schedule stands for, for a method that trains on fully packed rows."""

    states: Literal["fresh", "published"]
    decay: Literal["none", "1-sqrt"]


# How a tokenized row is changed before TRL's collator reads it; see `training/preference/prepared_rows.py`.
RowAdapter = Literal["none", "join_prompts", "write_out_sides", "add_mismatched_answers"]


@dataclass(frozen=True)
class Method:
    """One training method: the shape of its rows, its trainer's classes, and the options that the kit sets.

    `columns`: the columns of the prepared rows that the trainer gets.
    `has_reference`: whether the loss compares with a reference model, which is the model as it is before step 1.
    `reference_columns`: the columns in which TRL keeps the reference model's log-probabilities that it computes before step 1.
    `smallest_batch`: the smallest micro-batch size that the loss can be computed on.
    `has_token_mean`: whether the loss holds a mean over the tokens of a batch, so that the held-out loss is measured row by row.
    `token_mean_losses`: those values of `loss_type` of which that is true.
    `adapt_rows`: how tokenized rows are changed for the TRL trainer.
    `maps_rows`: whether the trainer's constructor maps a function over the rows.
    `shuffles_once`: whether the trainer reads the rows in the same order in every epoch, so that the kit shuffles them before.
    `collator_class`: the collator of the trainer's module that its constructor must be given; empty where it makes its own.
    `scored_texts`: the number of texts for each row that are only scored, without gradients.
    `words`: the allowed values of options whose class does not list them.
    `defaults`: the kit's default options, which a recipe may change.
    `owned`: the options that a recipe may not set, each with what to do instead.
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
    has_token_mean: bool = False
    token_mean_losses: frozenset[str] = frozenset()
    adapt_rows: RowAdapter = "none"
    maps_rows: bool = False
    shuffles_once: bool = False
    collator_class: str = ""
    scored_texts: int = 0
    words: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    owned: Mapping[str, str] = field(default_factory=dict)
    pretraining: Pretraining | None = None

    @property
    def is_pretraining(self) -> bool:
        """Whether the rows are fully packed, and the sections optimizer and schedule apply."""
        return self.pretraining is not None

    @property
    def trains_reward_model(self) -> bool:
        """Whether the trained model gives texts a score, and cannot generate."""
        return self.head == "score"

    @property
    def is_online(self) -> bool:
        """Whether the model writes the answers that it is trained on, so that a row is only a prompt."""
        return self.shape == "prompt"

    @property
    def toggles_checkpointing(self) -> bool:
        """Whether the trainer switches gradient checkpointing off, and on for all layers (TRL 1.16: disable_gradient_checkpointing)."""
        return self.has_reference or self.is_online


SHARED_DEFAULTS: Mapping[str, Any] = {
    # Two checkpoints are enough to resume from, and do not fill a laptop's disk.
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


# Source: `GRPOTrainer._compute_loss` of TRL 1.16.
_ONLINE_WORDS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "grpo": {
        "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"),
        "importance_sampling_level": ("token", "sequence"),
        "scale_rewards": ("group", "batch", "none", True, False),
    }
}


def _make_online(name: str, owned: Mapping[str, str]) -> Method:
    """Return the row of an online method: its rows are prompts, and the model writes the answers."""
    return Method(
        name=name,
        shape="prompt",
        columns=("input_ids", "prompt", "answer", "origin"),
        trainer_module=f"trl.trainer.{name}_trainer",
        trainer_class=f"{name.upper()}Trainer",
        config_module=f"trl.trainer.{name}_config",
        config_class=f"{name.upper()}Config",
        has_reference=True,
        words=_ONLINE_WORDS.get(name, {}),
        # One answer to each held-out prompt is enough for the mean reward; TRL's default is as many as in training.
        defaults={**SHARED_DEFAULTS, "num_generations_eval": 1},
        owned={**own(*REFERENCE_OPTIONS), **owned},
    )


def _make_pretraining(name: str, pretraining: Pretraining) -> Method:
    """Return the row of a pre-training method, which uses transformers' own Trainer and the model's own loss."""
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
    """Return the row of a method whose trainer is in TRL's experimental namespace; a test fails when TRL moves it."""
    generates = ("generate_during_eval", "is_encoder_decoder", "max_completion_length")
    return Method(
        name=name,
        shape="pair",
        columns=_PAIR_COLUMNS,
        has_token_mean=True,  # the negative log-likelihood of the chosen answers
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
            words={"loss_type": ("nll", "dft")},  # TRL gives up "chunked_nll", which is the same as "nll"
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
            token_mean_losses=frozenset({"sft"}),
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
                "train_sampling_strategy": "the kit shuffles the rows once, by the seed; remove this key",
                "precompute_ref_batch_size": "KTO compares the answers of one micro-batch, so its size must stay the same; remove this key",
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
