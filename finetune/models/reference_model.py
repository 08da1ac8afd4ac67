"""Set up the reference model of preference losses: the model as it is before step 1, without a second copy of its weights.

TRL adds to every adapter a frozen copy named `ref`. A new adapter changes nothing yet, so the base model with the adapter off is
the same reference model, and the copy is dropped. A run that continues an adapter, or begins with PiSSA, keeps it. Where all
weights are trained, the log-probabilities of the reference model are computed once before step 1.
"""

import torch
from peft import PeftModel

from finetune.errors import describe_count
from finetune.models.adapters.whole_modules import widen_copies
from finetune.runs.resolved_recipe import ResolvedRecipe

REFERENCE, _TRAINED = "ref", "default"


def describe_reference(resolved: ResolvedRecipe, rows: int) -> str:
    """Say what the reference model of a recipe is, and what it costs."""
    once = f"computed once before step 1, with one pass over {describe_count(rows, 'row')}, and kept with the prepared rows"
    if resolved.trains_all_weights:
        return f"reference model: its log-probabilities are {once}; no second copy of the weights is held"
    if resolved.recipe.trainer.get("precompute_ref_log_probs"):
        return f"reference model: its log-probabilities are {once}"
    if resolved.adapter_starts_empty:
        return "reference model: the base model with the adapter off; it takes no memory"
    return (
        "reference model: the base model with a frozen copy of the adapter; there is no second copy of the base model"
    )


def settle_reference(model: PeftModel, *, drop: bool) -> None:
    """Drop TRL's frozen copy of the adapter, or make it equal to the adapter to the bit.

    TRL copies only parameters with `.default.` inside their names. It leaves out trained token rows, whose names end in `.default`.
    """
    if REFERENCE not in model.peft_config:
        return
    if drop:
        model.delete_adapter(REFERENCE)
        model.set_adapter(_TRAINED)
        return
    widen_copies(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parts = name.split(".")
            if _TRAINED in parts:
                parameters[".".join(REFERENCE if part == _TRAINED else part for part in parts)].copy_(parameter)
