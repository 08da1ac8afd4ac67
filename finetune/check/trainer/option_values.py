"""The ranges of the trainer's numbers, and the packages that some of its words need. Never imports torch.

The classes of transformers and TRL state no ranges: a value outside ends in an error of torch after the model is loaded, or trains
nothing. Sources: torch's optimizers, transformers 5.23 `TrainingArguments`, TRL 1.16.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import describe_unknown_name
from finetune.files.folders import expand_home
from finetune.recipe.methods import Method
from finetune.recipe.recipe_file import CHECKPOINTING_OPTIONS, EVERY_N_LAYERS, NEWER_NAMES


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have, and their description."""

    text: str
    holds: Callable[[float], bool]


_POSITIVE = Range("above 0", lambda value: value > 0)
_NOT_NEGATIVE = Range("at least 0", lambda value: value >= 0)
_COUNT = Range("at least 1", lambda value: value >= 1)
# What no machine can hold: beyond it, the first loss or the start of the processes takes all memory before anything is said.
MOST_PROCESSES = 1024
_ROWS = Range("at least 1 and at most 1,048,576", lambda value: 1 <= value <= 1 << 20)
_PROCESSES = Range(f"at least 0 and at most {MOST_PROCESSES:,}", lambda value: 0 <= value <= MOST_PROCESSES)
_MOMENT = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
_SHARE = Range("between 0 and 1", lambda value: 0 <= value <= 1)
_TOP_P = Range("above 0, at most 1", lambda value: 0 < value <= 1)
_RANGES: Mapping[str, Range] = {
    "num_train_epochs": _POSITIVE,
    "max_steps": Range("at least 1, or -1 to count epochs", lambda value: value >= 1 or value == -1),
    **dict.fromkeys(
        (
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
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _ROWS),
    "dataloader_num_workers": _PROCESSES,
    **dict.fromkeys(("temperature", "repetition_penalty", "discopop_tau"), _POSITIVE),
    **dict.fromkeys(
        ("logging_steps", "eval_steps", "save_steps"),
        Range(
            "a whole number of steps, or a share of the run below 1",
            lambda value: value > 0 and (value < 1 or value % 1 == 0),
        ),
    ),
    **dict.fromkeys(
        (
            "learning_rate",
            "weight_decay",
            "adam_epsilon",
            "max_grad_norm",
            "warmup_steps",
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
_CHECKPOINTING_KEYS = (
    "use_reentrant",
    "preserve_rng_state",
    "determinism_check",
    "debug",
    "early_stop",
    EVERY_N_LAYERS,
)
_CHECKPOINTING_OPTIONS = (CHECKPOINTING_OPTIONS, NEWER_NAMES[CHECKPOINTING_OPTIONS])
_FILES = ("accelerator_config",)
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
_REPORT_WORDS = (*_REPORT_PACKAGES, "kubeflow", "all", "none")
# Variables by which a reporter is logged in or needs no login, a file in the home folder in which it keeps a login, and its command.
_LOGINS: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "comet_ml": (("COMET_API_KEY", "COMET_OFFLINE_DIRECTORY"), ".comet.config", "comet login"),
    "neptune": (("NEPTUNE_API_TOKEN", "NEPTUNE_MODE"), "", "export NEPTUNE_API_TOKEN=…"),
    "swanlab": (("SWANLAB_API_KEY", "SWANLAB_MODE"), ".swanlab", "swanlab login"),
    "wandb": (("WANDB_API_KEY", "WANDB_MODE"), ".netrc", "wandb login"),
}
_BITSANDBYTES = ("ademamix", "adamw_bnb", "adamw_8bit", "paged_", "lion_", "rmsprop_bnb")
# Optimizers, by the beginning of their words, that no run of this kit can be made with.
_UNFIT_OPTIMIZERS: Mapping[str, str] = {
    "adamw_apex_fused": "apex is not kept any more",
    "adamw_anyprecision": "torchdistx is not kept any more",
    "adamw_torch_4bit": "torchao's optimizers change the class of trained tensors, which this kit saves",
    "adamw_torch_8bit": "torchao's optimizers change the class of trained tensors, which this kit saves",
    "adamw_torch_xla": "it is for TPUs",
    "adamw_torch_npu_fused": "it is for Ascend processors",
    "galore_": "it projects the gradients of whole weights, and its state cannot be resumed here",
    "apollo_": "it projects the gradients of whole weights, and its state cannot be resumed here",
    "lomo": "it steps within the backward pass, so that gradients can be neither accumulated nor checked",
    "adalomo": "it steps within the backward pass, so that gradients can be neither accumulated nor checked",
    "grokadamw": "it needs the loss of every step, which no trainer here gives it",
    "schedule_free_": "its weights between steps are not those that are evaluated and saved",
    "stable_adamw": "its package has not been tried with this kit",
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
        if key in _CHECKPOINTING_OPTIONS:
            for name in set(value or ()) - set(_CHECKPOINTING_KEYS):
                yield f"trainer.{key}.{name}: {describe_unknown_name(name, _CHECKPOINTING_KEYS, 'unknown key')}"


def list_package_problems(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of a recipe whose packages are not installed here."""
    reports = trainer.get("report_to", ())
    for word in [reports] if isinstance(reports, str) else reports if isinstance(reports, list) else ():
        if word not in _REPORT_WORDS:
            yield f"trainer.report_to: {word!r} is {describe_unknown_name(str(word), _REPORT_WORDS)}"
            continue
        packages = _REPORT_PACKAGES.get(word, ())
        if packages and not any(map(_is_installed, packages)):
            yield f"trainer.report_to: {word} needs the package {packages[0]}, which is not installed; install it, or remove this key"
        variables, file, command = _LOGINS.get(word, ((), "", ""))
        is_known = any(os.environ.get(name) for name in variables) or bool(file and (Path.home() / file).exists())
        if variables and not is_known and any(map(_is_installed, packages)):
            yield f"trainer.report_to: {word} is not logged in; run `{command}`, or remove this key"
    optimizer = str(trainer.get("optim", ""))
    unfit = next((reason for start, reason in _UNFIT_OPTIMIZERS.items() if optimizer.startswith(start)), None)
    if unfit is not None:
        yield f"trainer.optim: {optimizer} cannot be used: {unfit}; set adamw_torch, or paged_adamw_8bit for less memory"
    elif optimizer.startswith(_BITSANDBYTES) and not _is_installed("bitsandbytes"):
        yield f"trainer.optim: {optimizer} needs the package bitsandbytes, which is not installed; install it, or set adamw_torch"


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
