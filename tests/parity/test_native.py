"""The native model against the authors' own arithmetic: 16 tiny checkpoints with logits, losses and hidden states."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.yulan.layout import read_config
from finetune.yulan.native.modeling import load_native
from finetune.yulan.tensors import open_tensors

CASES = [
    "a_stable",
    "b_annealing",
    "c2_untied_scale10_bf16",
    "c_untied_bf16",
    "d_mup_scales",
    "e_gemma_rms",
    "f_no_wesar_no_shrink",
    "g_no_norm_alpha",
    "h2_embedding_rmsln",
    "h3_embedding_ln",
    "h_qk_layernorm",
    "i_left_padded",
    "j_sharded",
    "k_packed_docs",
    "l_shrink_ge_1",
    "m_no_attention_bias",
]
# Who wrote the file, and where it lay: the only keys that a saved folder does not take over.
PROVENANCE = {"transformers_version", "_name_or_path"}


def test_every_case_is_listed(shared):
    manifest = json.loads((shared / "reference/oracle/MANIFEST.json").read_text())
    assert sorted(manifest) == CASES


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss_are_the_authors(shared, case, attention):
    folder = shared / "reference/oracle" / case
    expected = load_file(folder / "expected.safetensors")
    model = load_native(folder, dtype=torch.float32, attn_implementation=attention)
    given = {key: expected[key] for key in ("attention_mask", "position_ids") if key in expected}
    with torch.no_grad():
        output = model(input_ids=expected["input_ids"], labels=expected["labels"], **given)
    seen = given.get("attention_mask", torch.ones_like(expected["input_ids"])).bool()
    spread = expected["logits"][seen].std()
    assert (output.logits - expected["logits"])[seen].abs().max() / spread <= 1e-4
    assert output.loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5, rel=0)
    # The case can tell: without the z term the loss is another one.
    assert abs(output.loss.item() - expected["loss_ce"].item()) > 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_of_every_layer_are_the_authors(shared, attention):
    folder = shared / "reference/oracle/a_stable"
    expected = load_file(folder / "expected.safetensors")
    model = load_native(folder, attn_implementation=attention)
    last = []  # transformers puts the normalised states in the place of the last layer's
    model.model.layers[-1].register_forward_hook(lambda _, __, output: last.append(output))
    with torch.no_grad():
        *states, normed = model(input_ids=expected["input_ids"], output_hidden_states=True).hidden_states
    found = {f"hidden_states.{index}": state for index, state in enumerate([*states, *last])}
    found["hidden_states.norm"] = normed
    assert found.keys() == {name for name in expected if name.startswith("hidden_states")}
    for name, state in found.items():
        assert (state - expected[name]).abs().max() / expected[name].std() <= 1e-4, name


@pytest.mark.parametrize("case", CASES)
def test_a_saved_folder_equals_the_published_one(shared, case, tmp_path):
    source = shared / "reference/oracle" / case
    model = load_native(source)
    model.save_pretrained(tmp_path)
    # Plain transformers opens it too, without running the code that auto_map names in one of the cases.
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)
    before, after = read_config(source), read_config(tmp_path)
    assert {k: v for k, v in after.items() if k not in PROVENANCE} == {
        k: v for k, v in before.items() if k not in PROVENANCE
    }
    published, written = open_tensors(source), open_tensors(tmp_path)
    assert sorted(written.names) == sorted(published.names)
    for name in published.names:
        assert written.dtype(name) == published.dtype(name), name
        assert written.shape(name) == published.shape(name), name
        assert torch.equal(written.read(name), published.read(name)), name
