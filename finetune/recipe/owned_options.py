"""The options of the trainers' configuration classes that a recipe may not set, each with what to do instead."""

from collections.abc import Mapping

_VLLM = "the trained model generates the answers in this process; remove this key"
_PREPARES = "the kit prepares the rows itself; remove this key"
_LOSSES = "evaluation computes losses and keeps no logits; remove this key"
_COMPLETIONS = "the run directory holds completions.jsonl; remove this key"
_OURS = "the kit sets this option itself"
_PAD = "the kit always pads with YuLan-Mini's own <pad>; remove this key"
_LIGER = (
    "the loss is computed in tiles of logits without Liger's kernels; remove this key, and for less memory set "
    "gradient_checkpointing or activation_offloading"
)
_LAUNCHER = (
    "the launcher decides how processes share a run; launch with recipes/accelerate/fsdp2.yaml, zero2.yaml or zero3.yaml, where "
    "deepspeed_config_file names a file of DeepSpeed's"
)
# What a method with a reference model compares with.
_REFERENCE = "the reference model stays as it is before step 1, without a second copy of the weights; remove this key"
ONLINE_OWNED: Mapping[str, str] = {
    "reward_weights": f"set rewards.rules and rewards.judge.weight instead; {_OURS}",
    "chat_template_kwargs": "the kit renders the prompts itself; remove this key",
    "log_completions": _COMPLETIONS,
    "num_completions_to_print": _COMPLETIONS,
    "log_unique_prompts": _COMPLETIONS,
    "log_multimodal": "YuLan-Mini reads no images; remove this key",
    "router_aux_loss_coef": "YuLan-Mini has no experts; remove this key",
    **dict.fromkeys(
        (
            "use_vllm",
            "use_transformers_continuous_batching",
            "transformers_continuous_batching_config",
            "use_transformers_paged",
            "ds3_gather_for_generation",
            *(
                f"vllm_{name}"
                for name in [
                    "mode",
                    "model_impl",
                    "enable_sleep_mode",
                    "structured_outputs_regex",
                    "server_base_url",
                    "server_host",
                    "server_port",
                    "server_timeout",
                    "group_port",
                    "gpu_memory_utilization",
                    "max_model_length",
                    "tensor_parallel_size",
                ]
            ),
        ),
        _VLLM,
    ),
}
GRPO_OWNED: Mapping[str, str] = {
    "max_tool_calling_iterations": "the kit gives the prompts no tools; remove this key",
    "log_completions_hub_repo": "the kit uploads no answers; remove this key",
    **dict.fromkeys(
        (
            "vllm_importance_sampling_correction",
            "vllm_importance_sampling_mode",
            "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min",
            "vllm_importance_sampling_cap",
        ),
        _VLLM,
    ),
}


# Options that every configuration class has.
SHARED_OWNED: Mapping[str, str] = {
    "output_dir": f"set output instead; {_OURS}",
    "seed": f"set seed instead; {_OURS}",
    "data_seed": f"set seed instead; {_OURS}",
    "bf16": f"set model.dtype: bfloat16 instead; {_OURS}",
    "fp16": f"set model.dtype: float16 instead; {_OURS}",
    "bf16_full_eval": f"set model.dtype instead; {_OURS}",
    "fp16_full_eval": f"set model.dtype instead; {_OURS}",
    "resume_from_checkpoint": "run `finetune train RECIPE --resume` instead",
    "remove_unused_columns": _PREPARES,
    "label_names": _PREPARES,
    "length_column_name": _PREPARES,
    "prediction_loss_only": _LOSSES,
    "include_for_metrics": _LOSSES,
    "parallelism_config": "takes an object of accelerate, which a recipe cannot hold; launch with accelerate's own configuration instead",
    "batch_eval_metrics": _LOSSES,
    "logging_nan_inf_filter": "the log shows every loss as it is, so that a NaN is seen; remove this key",
    "do_train": "`finetune train` trains; remove this key",
    "do_eval": "set data.eval or data.held_out instead; remove this key",
    "do_predict": "use `finetune evaluate`; remove this key",
    "local_rank": "the launcher (accelerate or torchrun) sets this; remove this key",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "deepspeed": _LAUNCHER,
    "fsdp": _LAUNCHER,
    "fsdp_config": _LAUNCHER,
    "ddp_backend": "accelerate takes NCCL for GPUs and gloo for CPUs; remove this key",
}


# Options that only some of TRL's classes have.
_OWNED_IN_SOME: Mapping[str, str] = {
    "model_init_kwargs": f"set the keys of the section model instead; {_OURS}",
    "trust_remote_code": "the kit never runs code from a checkpoint; remove this key",
    "max_length": f"set data.max_tokens instead; {_OURS}",
    "truncation_mode": f"set data.overflow instead; {_OURS}",
    "chat_template_path": f"set data.template instead; {_OURS}",
    "eos_token": "the chat template decides which token ends an answer; set data.template instead",
    "pad_token": _PAD,
    "dataset_text_field": f"set data.columns instead; {_OURS}",
    "dataset_kwargs": _PREPARES,
    "dataset_num_proc": "set data.workers instead; the kit prepares the rows itself",
    "assistant_only_loss": "set data.train_on instead; the chat template marks the trained tokens",
    "completion_only_loss": "set data.train_on instead; the chat template marks the trained tokens",
    "padding_value": _PAD,
    "generate_during_eval": "use `finetune chat` or `finetune evaluate`; remove this key",
    "is_encoder_decoder": "YuLan-Mini is a decoder; remove this key",
    "max_completion_length": f"set data.max_tokens instead; {_OURS}",
    "padding_free": "TRL 1.16 does not support it for this method; remove this key",
    "sync_ref_model": _REFERENCE,
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
}


def own(*names: str) -> Mapping[str, str]:
    """Return the options of a TRL class that no recipe may set: those that every class has, and those in `names`."""
    everywhere = ("model_init_kwargs", "trust_remote_code")
    return {**SHARED_OWNED, **{name: _OWNED_IN_SOME[name] for name in (*everywhere, *names)}}


REFERENCE_OPTIONS = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")


_IN_OPTIMIZER = "the section optimizer decides this"


_IN_SCHEDULE = "the section schedule decides this"


PRETRAINING_OWNED: Mapping[str, str] = {
    **SHARED_OWNED,
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
    "include_num_input_tokens_seen": "the kit always counts the tokens; remove this key",
    "neftune_noise_alpha": "belongs to supervised fine-tuning; remove this key",
    "label_smoothing_factor": "the loss is the authors' cross entropy with a z term; remove this key",
    "load_best_model_at_end": "the result is the model at the end of the schedule; remove this key",
    "auto_find_batch_size": "the schedule depends on the effective batch size; remove this key",
}
