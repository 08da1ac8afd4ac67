"""The table of training methods. It holds names only, so that a recipe can be checked without importing torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.train.online_options import GRPO_OWNED, ONLINE_OWNED

RowKind = Literal["conversation", "preference", "labelled", "text", "prompt"]


@dataclass(frozen=True)
class Pretraining:
    """What `auto` means for a method whose rows are packed full, and whose optimizer and schedule are the kit's."""

    states: Literal["fresh", "published"]
    decay: Literal["none", "1-sqrt"]


@dataclass(frozen=True)
class Method:
    """One method: the rows it takes, the trainer's classes for it, and what the kit decides in their place.

    `defaults` are ours and a recipe may change them; `owned` maps the options that a recipe may not set to the
    place where that is decided.
    """

    name: str
    row_kind: RowKind
    trainer_class: str
    config_module: str
    config_class: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    owned: Mapping[str, str] = field(default_factory=dict)
    trainer_module: str = "trl"
    pretraining: Pretraining | None = None

    @property
    def is_online(self) -> bool:
        """Whether the model writes the answers that it is trained on, so that a row is only a prompt."""
        return self.row_kind == "prompt"


_SHARED_DEFAULTS: Mapping[str, Any] = {
    # Two checkpoints are enough to go on from, and do not fill a laptop's disk.
    "save_total_limit": 2,
}

_OURS = "the kit owns this setting"
_SHARED_OWNED: Mapping[str, str] = {
    "output_dir": f"set output instead; {_OURS}",
    "seed": f"set seed instead; {_OURS}",
    "data_seed": f"set seed instead; {_OURS}",
    "bf16": f"set model.dtype: bfloat16 instead; {_OURS}",
    "fp16": f"set model.dtype: float16 instead; {_OURS}",
    "bf16_full_eval": f"set model.dtype instead; {_OURS}",
    "fp16_full_eval": f"set model.dtype instead; {_OURS}",
    "resume_from_checkpoint": "run `finetune train RECIPE --resume` instead",
    "remove_unused_columns": f"the kit prepares the rows itself; {_OURS}",
    "label_names": f"the kit prepares the rows itself; {_OURS}",
    "length_column_name": f"the kit prepares the rows itself; {_OURS}",
    "prediction_loss_only": f"evaluation keeps losses only, never logits; {_OURS}",
    "include_for_metrics": f"evaluation keeps losses only, never logits; {_OURS}",
    "batch_eval_metrics": f"evaluation keeps losses only, never logits; {_OURS}",
    "do_train": "`finetune train` trains; remove this key",
    "do_eval": "set data.eval or data.held_out instead; remove this key",
    "do_predict": "use `finetune evaluate`; remove this key",
    "local_rank": "the launcher decides this; remove this key",
    "use_liger_kernel": "TRL computes the loss in chunks by itself; remove this key",
    "liger_kernel_config": "TRL computes the loss in chunks by itself; remove this key",
}

# These TRL's classes have beyond transformers' own.
_TRL_OWNED: Mapping[str, str] = {
    "max_length": f"set data.max_tokens instead; {_OURS}",
    "truncation_mode": f"set data.overflow instead; {_OURS}",
    "model_init_kwargs": f"set the keys of the section model instead; {_OURS}",
    "chat_template_path": f"set data.template instead; {_OURS}",
    "eos_token": "the chat template decides what ends an answer; set data.template instead",
    "pad_token": "YuLan-Mini's own <pad> is used, and must be; remove this key",
    "trust_remote_code": "the kit never runs code from a checkpoint; remove this key",
    "dataset_text_field": f"set data.columns instead; {_OURS}",
    "dataset_kwargs": f"the kit prepares the rows itself; {_OURS}",
    "dataset_num_proc": f"the kit prepares the rows itself; {_OURS}",
}

_IN_OPTIMIZER = "the section optimizer decides this"
_IN_SCHEDULE = "the section schedule decides this"
_PRETRAINING_DEFAULTS: Mapping[str, Any] = {**_SHARED_DEFAULTS, "max_grad_norm": 1.0, "logging_steps": 10}
_PRETRAINING_OWNED: Mapping[str, str] = {
    **_SHARED_OWNED,
    "learning_rate": f"set optimizer.learning_rate instead; {_IN_OPTIMIZER}",
    "weight_decay": f"set optimizer.weight_decay instead; {_IN_OPTIMIZER}",
    "adam_beta1": f"{_IN_OPTIMIZER}, as the authors did: 0.9; remove this key",
    "adam_beta2": f"{_IN_OPTIMIZER}, as the authors did: 0.95; remove this key",
    "adam_epsilon": f"{_IN_OPTIMIZER}, as the authors did: 1e-15; remove this key",
    "optim": f"set optimizer.moments instead; {_IN_OPTIMIZER}",
    "optim_args": f"{_IN_OPTIMIZER}; remove this key",
    "optim_target_modules": f"{_IN_OPTIMIZER}; remove this key",
    "lr_scheduler_type": f"set schedule.decay instead; {_IN_SCHEDULE}",
    "lr_scheduler_kwargs": f"set schedule.decay_start and decay_end instead; {_IN_SCHEDULE}",
    "warmup_steps": f"set schedule.warmup instead; {_IN_SCHEDULE}",
    "max_steps": f"set schedule.length instead; {_IN_SCHEDULE}",
    "num_train_epochs": f"set schedule.length instead; {_IN_SCHEDULE}",
    "include_num_input_tokens_seen": f"tokens are always counted; {_OURS}",
    "neftune_noise_alpha": "is for supervised tuning; remove this key",
    "label_smoothing_factor": "the loss is the authors', with its z term; remove this key",
    "load_best_model_at_end": "a schedule ends where it ends; remove this key",
    "auto_find_batch_size": "the batch belongs to the schedule; remove this key",
}


def _make_online(name: str, owned: Mapping[str, str]) -> Method:
    """Return a row for a method whose answers the model writes itself, to prompts."""
    return Method(
        name=name,
        row_kind="prompt",
        trainer_module="trl",
        trainer_class=f"{name.upper()}Trainer",
        config_module=f"trl.trainer.{name}_config",
        config_class=f"{name.upper()}Config",
        # One answer to each held-out prompt tells the mean reward; TRL would write as many as in training.
        defaults={**_SHARED_DEFAULTS, "num_generations_eval": 1},
        owned={
            **_SHARED_OWNED,
            "model_init_kwargs": _TRL_OWNED["model_init_kwargs"],
            "trust_remote_code": _TRL_OWNED["trust_remote_code"],
            **owned,
        },
    )


def _make_pretraining(name: str, pretraining: Pretraining) -> Method:
    """Return a row for transformers' own Trainer, whose loss is the model's."""
    return Method(
        name=name,
        row_kind="text",
        trainer_module="transformers",
        trainer_class="Trainer",
        config_module="transformers.training_args",
        config_class="TrainingArguments",
        defaults=_PRETRAINING_DEFAULTS,
        owned=_PRETRAINING_OWNED,
        pretraining=pretraining,
    )


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="sft",
            row_kind="conversation",
            trainer_class="SFTTrainer",
            config_module="trl.trainer.sft_config",
            config_class="SFTConfig",
            defaults=_SHARED_DEFAULTS,
            owned={
                **_SHARED_OWNED,
                **_TRL_OWNED,
                "assistant_only_loss": "the chat template marks what is trained; remove this key",
                "completion_only_loss": "the chat template marks what is trained; remove this key",
            },
        ),
        _make_online("grpo", {**ONLINE_OWNED, **GRPO_OWNED}),
        _make_online("rloo", ONLINE_OWNED),
        _make_pretraining("pretrain", Pretraining(states="fresh", decay="none")),
        _make_pretraining("anneal", Pretraining(states="published", decay="1-sqrt")),
    )
}
