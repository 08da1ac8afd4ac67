"""The table of training methods. It holds names only, so that a recipe can be checked without importing torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

RowKind = Literal["conversation", "preference", "labelled", "text"]


@dataclass(frozen=True)
class Method:
    """One method: the rows it takes, TRL's classes for it, and what the kit decides in their place.

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


_SHARED_DEFAULTS: Mapping[str, Any] = {
    # Two checkpoints are enough to go on from, and do not fill a laptop's disk.
    "save_total_limit": 2,
}

_OURS = "the kit owns this setting"
_SHARED_OWNED: Mapping[str, str] = {
    "output_dir": f"set output instead; {_OURS}",
    "seed": f"set seed instead; {_OURS}",
    "data_seed": f"set seed instead; {_OURS}",
    "max_length": f"set data.max_tokens instead; {_OURS}",
    "truncation_mode": f"set data.overflow instead; {_OURS}",
    "bf16": f"set model.dtype: bfloat16 instead; {_OURS}",
    "fp16": f"set model.dtype: float16 instead; {_OURS}",
    "bf16_full_eval": f"set model.dtype instead; {_OURS}",
    "fp16_full_eval": f"set model.dtype instead; {_OURS}",
    "model_init_kwargs": f"set the keys of the section model instead; {_OURS}",
    "chat_template_path": f"set data.template instead; {_OURS}",
    "eos_token": "the chat template decides what ends an answer; set data.template instead",
    "pad_token": "YuLan-Mini's own <pad> is used, and must be; remove this key",
    "trust_remote_code": "the kit never runs code from a checkpoint; remove this key",
    "resume_from_checkpoint": "run `finetune train RECIPE --resume` instead",
    "dataset_text_field": f"set data.columns instead; {_OURS}",
    "dataset_kwargs": f"the kit prepares the rows itself; {_OURS}",
    "dataset_num_proc": f"the kit prepares the rows itself; {_OURS}",
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
                "assistant_only_loss": "the chat template marks what is trained; remove this key",
                "completion_only_loss": "the chat template marks what is trained; remove this key",
            },
        ),
    )
}
