"""The names that other tools give to what a recipe can say: a key that is unknown here is answered with ours.

Sources of the names: PEFT's `LoraConfig`, transformers 4's `TrainingArguments`, and the configuration files of LLaMA-Factory, axolotl,
unsloth and ms-swift.
"""

import difflib
from collections.abc import Iterable, Mapping

from finetune.errors import describe_unknown_name

_MOST_SHOWN = 5
_NAMES: Mapping[str, str] = {
    # model
    "base_model": "model.checkpoint",
    "model_name_or_path": "model.checkpoint",
    "model_name": "model.checkpoint",
    "model_id": "model.checkpoint",
    "load_in_4bit": "model.quantize: nf4",
    "load_in_8bit": "model.quantize: int8",
    "quantization_bit": "model.quantize: nf4 or int8",
    "quantization": "model.quantize",
    "torch_dtype": "model.dtype",
    "flash_attn": "model.attention",
    "flash_attention": "model.attention",
    "attn_implementation": "model.attention",
    "rope_scaling": "model.rope_theta and model.max_positions",
    # data
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train: {hub: owner/name}",
    "train_file": "data.train",
    "eval_dataset": "data.eval",
    "val_size": "data.held_out",
    "val_set_size": "data.held_out",
    "cutoff_len": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "max_seq_len": "data.max_tokens",
    "max_length": "data.max_tokens",
    "sequence_len": "data.max_tokens",
    "seq_len": "data.max_tokens",
    "model_max_length": "data.max_tokens",
    "template": "data.template",
    "chat_template": "data.template",
    "train_on_inputs": "data.train_on: all",
    "train_on_prompt": "data.train_on: all",
    "mask_history": "data.train_on: last",
    "system_prompt": "data.system",
    "preprocessing_num_workers": "data.workers",
    "dataset_num_proc": "data.workers",
    "sample_packing": "trainer.packing",
    # adapter
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "lora_target": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "lora_target_linear": "adapter.targets: all-linear",
    "modules_to_save": "adapter.modules_to_save",
    "lora_modules_to_save": "adapter.modules_to_save",
    "additional_target": "adapter.modules_to_save",
    "use_rslora": "adapter.rslora",
    "use_dora": "adapter.dora",
    "pissa_init": "adapter.init: pissa",
    "init_lora_weights": "adapter.init",
    "finetuning_type": "adapter.kind",
    "train_type": "adapter.kind",
    "tuner_type": "adapter.kind",
    "peft_type": "adapter.kind",
    "layers_pattern": "adapter.layers",
    "lorap_lr_ratio": "adapter.loraplus_ratio",
    "trainable_token_indices": "adapter.train_tokens",
    "layers_to_transform": "adapter.layers",
    "loraplus_lr_ratio": "adapter.loraplus_ratio",
    # method, rewards and run
    "stage": "method",
    "rl": "method",
    "rlhf_type": "method",
    "pref_beta": "trainer.beta",
    "pref_loss": "trainer.loss_type",
    "reward_funcs": "rewards.rules",
    "reward_model": "rewards.judge.run",
    "output_dir": "output",
    # trainer
    "batch_size": "trainer.per_device_train_batch_size",
    "micro_batch_size": "trainer.per_device_train_batch_size",
    "train_batch_size": "trainer.per_device_train_batch_size",
    "per_gpu_train_batch_size": "trainer.per_device_train_batch_size",
    "num_epochs": "trainer.num_train_epochs",
    "epochs": "trainer.num_train_epochs",
    "lr": "trainer.learning_rate",
    "lr_scheduler": "trainer.lr_scheduler_type",
    "optimizer": "trainer.optim",
    "warmup_ratio": "trainer.warmup_steps (a number below 1 is a share of all steps)",
    "evaluation_strategy": "trainer.eval_strategy",
    "group_by_length": "trainer.train_sampling_strategy: group_by_length",
    "no_cuda": "trainer.use_cpu",
    "fp16": "model.dtype: float16",
    "bf16": "model.dtype: bfloat16",
    "early_stopping": "trainer.early_stopping_patience",
    "wandb_project": "trainer.report_to: wandb",
    "gradient_clipping": "trainer.max_grad_norm",
    "neftune_alpha": "trainer.neftune_noise_alpha",
}
_HAS_NO_BIASES = "the linear layers of this model have no biases, and an adapter gives them none; remove this key"
# Keys of other tools that have no counterpart here, and what to do instead.
_ABSENT: Mapping[str, str] = {
    "bias": _HAS_NO_BIASES,
    "lora_bias": _HAS_NO_BIASES,
    "exclude_modules": "name the layers that are to be trained in adapter.targets instead",
    "target_parameters": "it is for the experts of other models, and this one has none; take adapter.targets",
    "layer_replication": "an adapter of this kit adds no layers; remove this key",
    "task_type": "it follows from the method; remove this key",
}


def find_own_name(key: str) -> str | None:
    """Return what another tool's name is called in a recipe, or None where it is no such name."""
    return _NAMES.get(key)


def _name_option(own: str) -> str:
    return own.removeprefix("trainer.").partition(":")[0].partition(" ")[0]


def describe_unknown_option(key: str, known: Iterable[str]) -> str:
    """Say that a key is unknown, with its own name here, its nearest known keys, or, of a few keys, all of them."""
    names = sorted(known)
    own = find_own_name(key)
    if key in _ABSENT:
        return f"unknown key; {_ABSENT[key]}"
    # An option that the method's trainer does not have is no help.
    if own is not None and not (
        own.startswith("trainer.") and "learning_rate" in names and _name_option(own) not in names
    ):
        return f"unknown key; this is {own} here"
    if len(names) <= _MOST_SHOWN * 4:
        return describe_unknown_name(key, names, "unknown key")
    near = difflib.get_close_matches(key.lower(), names, n=_MOST_SHOWN, cutoff=0.5)
    if near and difflib.SequenceMatcher(None, key, near[0]).ratio() >= 0.7:
        return f"unknown key; did you mean {near[0]!r}?"
    if near:
        return f"unknown key; the closest {'is' if len(near) == 1 else 'are'} {', '.join(near)}"
    return "unknown key; `finetune recipes --keys` explains the kit's own, and the documentation of TRL the others"
