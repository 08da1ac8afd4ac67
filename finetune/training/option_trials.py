"""Try options of the trainer on one number, before anything is loaded: the optimizer and the schedule with their arguments.

Whatever torch, transformers or bitsandbytes raise about them is then said with the key that caused it. Without this the error comes
after the rows were prepared and the model was loaded, and names no key.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from finetune.errors import RecipeError

_TRIED_STEPS = 10
# What torch's and bitsandbytes' optimizers say of a number.
_OPTIMIZER_WORDS = {
    "beta parameter at index 0": "adam_beta1",
    "beta parameter at index 1": "adam_beta2",
    "epsilon": "adam_epsilon",
    "learning rate": "learning_rate",
    "weight_decay": "weight_decay",
}
# These optimizers are built from the whole model.
_NEED_MODEL = ("lomo", "adalomo", "galore", "apollo", "layerwise")


def explain_refusal(error: Exception, trainer: Mapping[str, Any]) -> RecipeError:
    """Return an error about the section trainer, with the key that the library's message or one of the recipe's values points to."""
    text = str(error) if not isinstance(error, KeyError) else f"unknown: {error}"
    words = set(re.findall(r"\w+", text.lower()))
    named = [key for key in trainer if key in words] or [key for key, value in trainer.items() if _names(value, words)]
    return RecipeError("trainer", [f"trainer.{named[0]}: {text}" if named else text])


def _names(value: object, words: set[str]) -> bool:
    """Tell whether a text names a value of an option; short words such as `no` stand in any text."""
    values = value if isinstance(value, list) else list(value) if isinstance(value, dict) else [value]
    return any(
        isinstance(one, str) and len(one) > 2 and set(re.findall(r"\w+", one.lower())) <= words for one in values
    )


def check_optimizer(config: TrainingArguments, trainer: Mapping[str, Any]) -> None:
    """Build the optimizer and the schedule of a run on one number.

    Raises:
        RecipeError: a value or an argument is refused, or a package is missing; the message names the key.
    """
    number = torch.nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([number], lr=config.learning_rate)
    if not any(word in str(trainer.get("optim", "")) for word in _NEED_MODEL):
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(config)
            optimizer = kind([number], **options)
        except (ValueError, TypeError, ImportError, RuntimeError, KeyError, AttributeError, AssertionError) as error:
            raise RecipeError("trainer", [f"{_name_optimizer_key(str(error), trainer)}: {error}"]) from error
    try:
        get_scheduler(
            config.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=min(_TRIED_STEPS, config.get_warmup_steps(_TRIED_STEPS)),
            num_training_steps=_TRIED_STEPS,
            scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs or {}),
        )
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, AssertionError) as error:
        key = "lr_scheduler_kwargs" if config.lr_scheduler_kwargs else "lr_scheduler_type"
        raise RecipeError("trainer", [f"trainer.{key}: {config.lr_scheduler_type} refuses it ({error})"]) from error


def _name_optimizer_key(message: str, trainer: Mapping[str, Any]) -> str:
    """Return the key that an optimizer refuses: a number that the message names, else its arguments, else itself."""
    found = next((key for words, key in _OPTIMIZER_WORDS.items() if words in message), None)
    return f"trainer.{found or ('optim_args' if trainer.get('optim_args') else 'optim')}"
