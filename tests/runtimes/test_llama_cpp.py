"""GGUF files in llama.cpp: the command itself proves each, in an environment with the binding."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from finetune.data.encoding.rendering import encode_prompt
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer

# Q8_0 has the figure; the others are about ten times what random weights of nano give.
MOST_KL = {"f32": 1e-8, "f16": 1e-6, "bf16": 1e-4, "q8_0": 2e-3, "q5_1": 0.04, "q4_0": 0.1}


def make_ready(folder):
    """Give norms and biases random values, and let the end of a turn take the place of a token that answers come to."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = load_tokenizer(folder)
    prompt = encode_prompt(tokenizer, find_template("auto", tokenizer), [{"role": "user", "content": "Who are you?"}])
    model = LlamaForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=[]
    )
    tensors["lm_head.weight"][106] = 1.01 * tensors["lm_head.weight"][answer[0, -1]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def convert(run_in, folder, file, name):
    ended = run_in("llama_cpp", "-m", "finetune", "gguf", folder, "-o", file, "--type", name, "--json")
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)["llama_cpp"]


ALL_TYPES = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from finetune.exporting.gguf import conversion, llama_cpp
prover, folder = llama_cpp.LlamaCppProver(), Path(sys.argv[1])
found = {name: conversion.convert_folder(folder, Path(sys.argv[2]) / f"{name}.gguf", name, prover) for name in sys.argv[3:]}
print(json.dumps({name: asdict(report.llama_cpp) for name, report in found.items()}))
"""


def test_every_type_with_a_published_tokenizer(run_in, legacy_base, tmp_path):
    ended = run_in("llama_cpp", "-c", ALL_TYPES, make_ready(legacy_base), tmp_path, *MOST_KL)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert all(scores["texts"] >= 200 for scores in found.values())
    assert {name: scores["kl"] for name, scores in found.items() if not scores["kl"] <= MOST_KL[name]} == {}
    exact = found["f32"]
    assert exact["max_abs"] <= 1e-4 * exact["spread"]
    assert (exact["same_answers"], exact["answers"]) == (8, 8)
    assert 0 < exact["stopped_there"] == exact["stopped"]
    assert found["q4_0"]["kl"] > 10 * found["q8_0"]["kl"] > 10 * exact["kl"]


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


WITH_ROWS = """
import json, sys
from dataclasses import asdict, replace
from pathlib import Path
from finetune.data.encoding.text_samples import encode_sample
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.formats.rows import TextSample
from finetune.exporting.gguf import conversion, llama_cpp, llama_folder
folder, output, spoilt = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "spoilt"
tokenizer = load_tokenizer(folder)
turns = [{"role": "user", "content": "theus 12"}, {"role": "assistant", "content": "你好 user"}]
tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
rows = [
    TextSample("conversation", "sequence", {"messages": [{"role": "system", "content": "a"}, *turns]}, []),
    TextSample("conversation", "sequence", {"messages": turns, "tools": [tool]}, []),
    TextSample("preference", "pair", {"messages": turns[:1], "chosen": turns[1:], "rejected": [{**turns[1], "content": "x"}]}, []),
    TextSample("text", "sequence", {"text": "the user's text"}, []),
    TextSample("prompt", "prompt", {"messages": turns[:1], "answer": "x"}, []),
    # Training reads a spelt control token as plain text; no program can be asked that, so the row is left out.
    TextSample("conversation", "sequence", {"messages": [{**turns[0], "content": "what is <|eot_id|>?"}, turns[1]]}, []),
]
template = find_template("auto", tokenizer)
rows = [replace(row, token_ids=encode_sample(tokenizer, template, row)) for row in rows]
if spoilt:
    rows[2].token_ids[1][-2] += 1
source = llama_folder.open_llama_folder(folder, tuple(rows))
report = conversion.write_file(source, output / "m.gguf", "f32", llama_cpp.LlamaCppProver(), verify=True)
print(json.dumps(asdict(report.llama_cpp)), conversion.describe_scores(report.llama_cpp), sep="\\n")
"""


@pytest.mark.parametrize("kind", ["whole", "spoilt"])
def test_rows_that_were_trained_become_the_same_tokens(run_in, legacy_base, tmp_path, kind):
    """The proof compared bundled texts only: what a run was really trained on might have become other tokens there."""
    ended = run_in("llama_cpp", "-c", WITH_ROWS, legacy_base, tmp_path, kind)
    if kind == "spoilt":
        assert "llama.cpp gives other tokens for a row than were trained ('<s><|start_header_id|>user" in ended.stderr
        return
    assert ended.returncode == 0, ended.stderr
    found, text = ended.stdout.splitlines()
    assert json.loads(found)["rows"] == 6  # a pair has two sides
    assert "texts and 6 trained rows are equal" in text


def test_an_export_of_a_run_is_proved_on_its_own_rows(run_in, train, tmp_path):
    run = train("run")
    command = ["-m", "finetune", "export", run, "-o", tmp_path / "export", "--gguf", "q8_0", "--json"]
    ended = run_in("llama_cpp", *command)
    assert ended.returncode == 0, ended.stderr
    scores = json.loads(ended.stdout)["gguf"][0]["llama_cpp"]
    assert scores["rows"] == len(json.loads((run / "adapter" / "texts.json").read_text())) > 0
    assert f", and {scores['rows']} stored rows become the tokens that were trained" in (
        tmp_path / "export" / "README.md"
    ).read_text(encoding="utf-8")


def test_a_byte_level_tokenizer(run_in, byte_level_base, tmp_path):
    found = convert(run_in, byte_level_base, tmp_path / "m.gguf", "f32")
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
