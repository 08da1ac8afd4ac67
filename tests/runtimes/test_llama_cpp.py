"""GGUF files in llama.cpp: the command itself proves each, in an environment with the binding."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

# F32: figures of the issue; the others are about ten times what random weights of nano give.
MOST_KL = {"f32": 1e-6, "f16": 1e-6, "bf16": 1e-4, "q8_0": 2e-3, "q5_1": 0.04, "q4_0": 0.1}


def make_ready(folder):
    """Give norms and biases random values; let the end of a turn become likely at some word or other, so that answers end."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
    tensors["lm_head.weight"][106] *= 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def convert(run_in, folder, file, name):
    ended = run_in("llama_cpp", "-m", "finetune", "gguf", folder, "-o", file, "--type", name, "--json")
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)["llama_cpp"]


@pytest.mark.parametrize("name", MOST_KL)
def test_a_published_tokenizer(run_in, legacy_base, tmp_path, name):
    found = convert(run_in, make_ready(legacy_base), tmp_path / "m.gguf", name)
    assert found["texts"] >= 200
    assert found["kl"] <= MOST_KL[name]
    if name == "f32":
        assert found["max_abs"] <= 1e-4 * found["spread"]
        assert (found["same_answers"], found["answers"]) == (8, 8)
        assert 0 < found["stopped_there"] == found["stopped"]


def test_the_larger_published_tokenizer_with_unused_rows(run_in, published_base, tmp_path):
    """A table longer than the tokenizer did not load: llama.cpp wants a token for each row."""
    folder = make_ready(published_base)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][-16:]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "vocab_size": 6016, "rope_parameters": None, "rope_theta": 490000.0})
    )
    found = convert(run_in, folder, tmp_path / "m.gguf", "f32")
    assert found["texts"] >= 200
    assert found["max_abs"] <= 1e-4 * found["spread"]
    assert found["same_answers"] == found["answers"] == 8


def test_a_byte_level_tokenizer(run_in, nano_llama, tmp_path):
    found = convert(run_in, nano_llama, tmp_path / "m.gguf", "f32")
    assert found["texts"] >= 200
    assert found["max_abs"] <= 1e-4 * found["spread"]


def test_a_wrong_order_of_rows_is_found(run_in, legacy_base, tmp_path):
    """The proof must be able to fail: with q's and k's rows as they are, llama.cpp computes something else."""
    folder = make_ready(legacy_base)
    program = (
        "import sys; from pathlib import Path; from finetune.exporting.gguf import gguf_file, conversion, llama_cpp\n"
        "gguf_file.permute_heads = lambda rows, size: rows\n"
        "conversion.compare_file = lambda *parts: 1\n"
        "conversion.convert_folder(Path(sys.argv[1]), Path(sys.argv[2]), 'f32', llama_cpp.LlamaCppProver())"
    )
    ended = run_in("llama_cpp", "-c", program, folder, tmp_path / "m.gguf")
    assert "llama.cpp answers differently: KL" in ended.stderr
    assert not (tmp_path / "m.gguf").exists()


def test_a_file_that_llama_cpp_cannot_open(run_in, legacy_base, tmp_path):
    """The binding's process ends, and the command says so; the command itself goes on to its end."""
    program = (
        "import sys; from pathlib import Path; from finetune.exporting.gguf import metadata, conversion, llama_cpp\n"
        "metadata._add_vocabulary = lambda writer, source: None\n"
        "conversion.convert_folder(Path(sys.argv[1]), Path(sys.argv[2]), 'f32', llama_cpp.LlamaCppProver())"
    )
    ended = run_in("llama_cpp", "-c", program, legacy_base, tmp_path / "m.gguf")
    assert "cannot run it (status" in ended.stderr
    assert not (tmp_path / "m.gguf").exists()
