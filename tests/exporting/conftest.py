"""Adapters as PEFT writes them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM


@pytest.fixture(scope="session")
def make_adapter(nano_llama):
    """Return a function that writes an adapter of nano with every number random; `options` are those of `LoraConfig`."""

    def make(folder, **options):
        model = LlamaForCausalLM.from_pretrained(nano_llama)
        model.name_or_path = str(nano_llama)
        options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options}
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                noise = 0.05 * torch.randn(parameter.shape, generator=generator)
                parameter.data = parameter.data + noise if "magnitude" in name or "head" in name else noise
        tuned.save_pretrained(folder, save_embedding_layers=False)
        return folder

    return make
