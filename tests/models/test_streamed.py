"""Models whose matrices are read a layer at a time: the bits of whole models, and little in memory."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.models.lora import disable_adapter
from finetune.models.streaming.from_disk import read_stored, stream_model
from finetune.yulan.native.modeling import load_native
from finetune.yulan.tensors import open_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TOKENS = torch.arange(3, 40).unsqueeze(0)
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read_logits(model):
    with torch.inference_mode():
        return model(input_ids=TOKENS, use_cache=False).logits


def list_matrices(model):
    """Return the model's matrices that are no placeholders."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and "lora" not in name and parameter.untyped_storage().nbytes() > 4
    }


def adapt(model, folder, **options):
    options = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM", **options}
    tuned = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(folder)
    return tuned.eval()


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ({}, {}),
        (BIASED, {"use_dora": True, "bias": "all"}),
        ({}, {"trainable_token_indices": {"lm_head": [5, 9], "embed_tokens": [3]}}),
        ({}, {"target_modules": ["v_proj"], "target_parameters": ["mlp.up_proj.weight"]}),
        ({}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "layers_to_transform": [1]}),
        (TIED, {"modules_to_save": ["lm_head"]}),
        (TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (TIED, {"trainable_token_indices": [5, 9]}),
    ],
    ids=str,
)
def test_a_streamed_model_has_the_bits_of_the_whole_one(tmp_path, base, options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=100, num_hidden_layers=2, initializer_range=0.1, **sizes, **base)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    whole = adapt(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter", **options)
    empty = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map="meta")
    read = read_stored(open_tensors(tmp_path / "base"))
    streamed = stream_model(empty, read, torch.device("cpu"), tmp_path / "adapter")
    assert isinstance(streamed, PeftModel)
    logits = read_logits(streamed)
    assert torch.equal(logits, read_logits(whole))
    with disable_adapter(whole), disable_adapter(streamed):
        assert torch.equal(read_logits(streamed), read_logits(whole))
    assert not torch.equal(read_logits(LlamaForCausalLM.from_pretrained(tmp_path / "base")), logits)


def test_only_the_matrices_of_one_layer_are_in_memory(nano):
    whole = load_native(nano)
    streamed = stream_model(load_native(nano, device_map="meta"), read_stored(open_tensors(nano)), torch.device("cpu"))
    seen = []
    for unit in (streamed.model.embed_tokens, *streamed.model.layers, streamed.lm_head):
        unit.register_forward_pre_hook(lambda *_: seen.append(list_matrices(streamed)))
    assert torch.equal(read_logits(streamed), read_logits(whole))
    assert list_matrices(streamed) == set()
    layers = len(whole.model.layers)
    assert [len(names) for names in seen] == [1, *[7] * layers, 1]
    assert all(name.startswith("model.layers.1.") for name in seen[2])


def test_another_shape_is_an_error(nano_llama):
    tensors = open_tensors(nano_llama)
    config = LlamaConfig.from_pretrained(nano_llama, intermediate_size=64)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    streamed = stream_model(model, read_stored(tensors), torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"model.layers.0.mlp.gate_proj.weight is \[800, 320\], the model needs \[64, 320\]"
    ):
        read_logits(streamed)
