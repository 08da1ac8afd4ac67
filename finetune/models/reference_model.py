"""What preference losses compare with: the start of the run, without a second copy of its weights.

TRL gives every adapter that it is handed a twin named `ref`, a copy of the start. A fresh adapter changes nothing yet, so the
base with the adapter off is the same reference, and the twin is dropped. Going on with an adapter, or from PiSSA, needs it.
Where all weights are trained, the log-probabilities of the start are computed once, before step 1.
"""

import torch
from peft import PeftModel

from finetune.runs.resolved_recipe import ResolvedRecipe

REFERENCE, _TRAINED = "ref", "default"


def describe_reference(resolved: ResolvedRecipe, rows: int) -> str | None:
    """Return what the reference model of a recipe is and costs, or None where its loss has none."""
    if not resolved.method.has_reference:
        return None
    once = f"computed once before step 1, with one pass over {rows:,} rows, and kept with the prepared rows"
    if resolved.trains_all_weights:
        return f"reference: log-probabilities of the start, {once}; so no second copy of the weights is held"
    if resolved.recipe.trainer.get("precompute_ref_log_probs"):
        return f"reference: log-probabilities of the start, {once}"
    if resolved.adapter_starts_empty:
        return "reference: the base with the adapter off; it takes no memory"
    return "reference: a frozen copy of the adapter as it is now; of the base there is no second copy"


def settle_reference(model: PeftModel, *, drop: bool) -> None:
    """Drop the twin of an adapter that changes nothing yet, or make it equal to the start to the bit.

    TRL copies only what has `.default.` within its name, and so leaves out trained token rows, whose names end in it.
    """
    if REFERENCE not in model.peft_config:
        return
    if drop:
        model.delete_adapter(REFERENCE)
        model.set_adapter(_TRAINED)
        return
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parts = name.split(".")
            if _TRAINED in parts:
                parameters[".".join(REFERENCE if part == _TRAINED else part for part in parts)].copy_(parameter)
