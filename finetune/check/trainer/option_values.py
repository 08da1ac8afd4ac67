"""The ranges of the trainer's numbers, and the packages that some of its words need. Never imports torch.

The classes of transformers and TRL state no ranges: a value outside ends in an error of torch after the model is loaded, or trains
nothing. Sources: torch's optimizers, transformers 5.23 `TrainingArguments`, TRL 1.16.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import describe_unknown_name
from finetune.files.folders import expand_home
from finetune.recipe.methods import Method


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have, and their description."""

    text: str
    holds: Callable[[float], bool]


_POSITIVE = Range("above 0", lambda value: value > 0)
_NOT_NEGATIVE = Range("at least 0", lambda value: value >= 0)
_COUNT = Range("at least 1", lambda value: value >= 1)
_MOMENT = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
_SHARE = Range("between 0 and 1", lambda value: 0 <= value <= 1)
_TOP_P = Range("above 0, at most 1", lambda value: 0 < value <= 1)
_RANGES: Mapping[str, Range] = {
    "num_train_epochs": _POSITIVE,
    "max_steps": Range("at least 1, or -1 to count epochs", lambda value: value >= 1 or value == -1),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "save_total_limit",
            "num_generations_eval",
            "num_iterations",
            "max_completion_length",
            "steps_per_generation",
            "generation_batch_size",
            "pad_to_multiple_of",
            "dataloader_prefetch_factor",
            "torch_empty_cache_steps",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        ("logging_steps", "eval_steps", "save_steps", "temperature", "repetition_penalty", "discopop_tau"), _POSITIVE
    ),
    **dict.fromkeys(
        (
            "learning_rate",
            "weight_decay",
            "adam_epsilon",
            "max_grad_norm",
            "warmup_steps",
            "dataloader_num_workers",
            "neftune_noise_alpha",
            "eval_delay",
            "dataloader_timeout",
            "top_k",
            "epsilon",
            "epsilon_high",
            "cpo_alpha",
            "rpo_alpha",
            "simpo_gamma",
            "desirable_weight",
            "undesirable_weight",
            "center_rewards_coefficient",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _MOMENT),
    "num_generations": Range("at least 2, since answers to one prompt are compared", lambda value: value >= 2),
    "ld_alpha": _SHARE,
    "label_smoothing": Range("at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
    "warmup_ratio": _SHARE,
    "min_p": _SHARE,
    "top_p": _TOP_P,
}
# Words of options whose class does not list them, and the keys that torch's gradient checkpointing takes.
_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")
_WORDS: Mapping[str, tuple[str, ...]] = {"log_level": _LEVELS, "log_level_replica": _LEVELS}
_CHECKPOINTING_KEYS = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")
_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
# The preference losses divide by it, or lose every gradient. An online method may leave its KL term out.
_BETA = {False: _POSITIVE, True: _NOT_NEGATIVE}

# What transformers imports when an option has this word, or a word that begins like this.
_REPORT_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub", "mlflow"),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
_OPTIMIZER_PACKAGES: Mapping[str, str] = {
    "adamw_apex_fused": "apex",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "ademamix": "bitsandbytes",
    "adamw_bnb": "bitsandbytes",
    "adamw_8bit": "bitsandbytes",
    "paged_": "bitsandbytes",
    "lion_": "bitsandbytes",
    "rmsprop_bnb": "bitsandbytes",
    "galore_": "galore_torch",
    "apollo_": "apollo_torch",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free_": "schedulefree",
    "stable_adamw": "optimi",
}


def list_range_problems(trainer: Mapping[str, Any], method: Method) -> Iterator[str]:
    """Yield the numbers of a recipe that no run can have."""
    for key, value in trainer.items():
        allowed = _BETA[method.is_online] if key == "beta" else _RANGES.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or allowed is None:
            continue
        if not math.isfinite(value) or not allowed.holds(value):
            yield f"trainer.{key}: must be {allowed.text}; found {value}"


def list_word_problems(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Yield words that no library knows, and files that do not exist."""
    for key, value in trainer.items():
        if key in _WORDS and value not in _WORDS[key]:
            yield f"trainer.{key}: {value!r} is {describe_unknown_name(str(value), _WORDS[key])}"
        if key in _FILES and isinstance(value, str) and not expand_home(value).is_file():
            yield f"trainer.{key}: there is no file {value}"
    for name in trainer.get("gradient_checkpointing_kwargs") or ():
        if name not in _CHECKPOINTING_KEYS:
            yield f"trainer.gradient_checkpointing_kwargs.{name}: {describe_unknown_name(name, _CHECKPOINTING_KEYS, 'unknown key')}"


def list_package_problems(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of a recipe whose packages are not installed here."""
    reports = trainer.get("report_to", ())
    for word in [reports] if isinstance(reports, str) else reports if isinstance(reports, list) else ():
        packages = _REPORT_PACKAGES.get(word, ())
        if packages and not any(map(_is_installed, packages)):
            yield f"trainer.report_to: {word} needs the package {packages[0]}, which is not installed; install it, or remove this key"
    optimizer = trainer.get("optim")
    if isinstance(optimizer, str):
        package = next((name for start, name in _OPTIMIZER_PACKAGES.items() if optimizer.startswith(start)), None)
        if package is not None and not _is_installed(package):
            yield f"trainer.optim: {optimizer} needs the package {package}, which is not installed; install it, or set adamw_torch"
    if trainer.get("deepspeed") and not _is_installed("deepspeed"):
        yield (
            "trainer.deepspeed: needs the package deepspeed, which is not installed; launch with "
            "`accelerate launch --config_file recipes/accelerate/zero2.yaml` once it is, or remove this key"
        )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
