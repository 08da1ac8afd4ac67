"""What preference losses compare with: the start of the run, without a second copy of its weights.

TRL gives every adapter that it is handed a twin named `ref`, a copy of the start. A fresh adapter changes nothing yet, so the
base with the adapter off is the same reference, and the twin is dropped. Going on with an adapter, or from PiSSA, needs it.
"""

import torch
from peft import PeftModel

REFERENCE, _TRAINED = "ref", "default"


def settle_reference(model: PeftModel, starts_from_base: bool) -> None:
    """Drop the twin of an adapter that changes nothing yet, or make it equal to the start to the bit.

    TRL copies only what has `.default.` within its name, and so leaves out trained token rows, whose names end in it.
    """
    if REFERENCE not in model.peft_config:
        return
    if starts_from_base:
        model.delete_adapter(REFERENCE)
        model.set_adapter(_TRAINED)
        return
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parts = name.split(".")
            if _TRAINED in parts:
                twin = ".".join(REFERENCE if part == _TRAINED else part for part in parts)
                parameters[twin].copy_(parameter)
