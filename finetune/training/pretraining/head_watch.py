"""Log the norm of `lm_head` and the z term of the loss, which grow before a deep cool-down goes wrong."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.runs.run_files import HEAD_NORM, Z_TERM
from finetune.yulan.native.modeling import YuLanMiniForCausalLM


class HeadWatch(TrainerCallback):
    """Adds both figures to every logged training step; a model without z term has the norm alone."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **kwargs: object,
    ) -> None:
        """Add the norm after this step, and the mean z term since the last log, of this process's tokens."""
        if logs is None or "loss" not in logs or model is None:
            return
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        found = {HEAD_NORM: measure_head(inner)}
        terms = inner.z_terms if isinstance(inner, YuLanMiniForCausalLM) else None
        if terms is not None and (mean := terms.take_mean()) is not None:
            found[Z_TERM] = mean
        logs.update(found)
        if state.log_history:  # the trainer's own copy of these logs, which its checkpoints keep
            state.log_history[-1].update(found)


@torch.no_grad()
def measure_head(model: Any) -> float:
    """Return the norm of the head as the model uses it, after the factors of a native checkpoint."""
    weight: nn.Parameter = model.get_output_embeddings().weight
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)
    factor = _find_factor(model) if isinstance(model, YuLanMiniForCausalLM) else 1.0
    return float(_whole(norm)) * factor


def _find_factor(model: YuLanMiniForCausalLM) -> float:
    alpha = model.lm_head_alpha
    return model.logit_scale * (1.0 if alpha is None else abs(float(_whole(alpha.detach()))))


def _whole(number: torch.Tensor) -> torch.Tensor:
    return number.full_tensor() if isinstance(number, DTensor) else number
