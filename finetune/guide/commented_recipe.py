"""Write a recipe's content as YAML, with a comment above every key."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from finetune.guide.recipe_copy import write_prose
from finetune.guide.recipe_keys import TRAINER
from finetune.recipe.key_texts import KEYS
from finetune.recipe.recipe_file import ACCUMULATION, BATCH

# What the options do that first recipes set. They belong to the trainer's library, so the table of keys does not explain them.
_OPTION_TEXTS: Mapping[str, str] = {
    "num_train_epochs": "How often every row is trained.",
    "learning_rate": "The highest learning rate of the schedule.",
    "lr_scheduler_type": "How the learning rate changes over the run.",
    "warmup_steps": "Below 1: the share of all steps in which the learning rate rises from 0.",
    "beta": "How strongly the model is held to its reference model.",
    "optim": "The optimizer.",
    BATCH: "The micro-batch size: rows that are on the device together.",
    ACCUMULATION: "How many micro-batches make one optimizer step.",
    "gradient_checkpointing": "Keep one tensor of each layer and compute the other activations again: less memory, more time.",
    "activation_offloading": "Keep activations in the host's memory until the backward pass needs them.",
    "use_cpu": "Train on the CPU, also where there is a GPU.",
}


def write_commented(content: Mapping[str, Any], head: str) -> str:
    """Return the text of a recipe; `head` becomes the comment at its top, a paragraph a line."""
    lines = [line for paragraph in head.splitlines() for line in write_prose(paragraph, "")]
    return "\n".join([*lines, *_write_keys(content, "", ""), ""])


def _write_keys(content: Mapping[str, Any], section: str, indent: str) -> Iterator[str]:
    for key, value in content.items():
        name = f"{section}.{key}" if section else key
        text = _OPTION_TEXTS.get(key, "") if section == TRAINER else ""
        yield from write_prose(KEYS.get(name, text), indent)
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _write_keys(value, name, f"{indent}  ")
        else:
            yield f"{indent}{key}: {_write_value(value)}"


def _write_value(value: Any) -> str:
    """Return a value as one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=2**16)
    return text.removesuffix("...\n").strip()
