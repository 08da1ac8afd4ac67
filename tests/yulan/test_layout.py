"""Reading published folders: what is accepted, and what is refused with which sentence."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finetune.errors import CheckpointError, OutputError
from finetune.files.sizes import parse_size
from finetune.yulan.folding import fold_checkpoint
from finetune.yulan.layout import find_architecture, list_native_tensors, parse_native_config, read_config
from finetune.yulan.nano import CONFIG, build_nano
from finetune.yulan.shards import StoredTensors, TensorSpec, write_shards
from finetune.yulan.tensors import open_tensors, read_header


def test_stray_commas_are_read_and_strings_kept(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "x,}", "auto_map": {"b": [1, 2,],},\n}')
    assert read_config(tmp_path) == {"a": "x,}", "auto_map": {"b": [1, 2]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a": ', "is not valid JSON"), ("[1]", "must hold an object; found list"), (None, "holds no config.json")],
)
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "found"), [("miniyulan", "yulanmini"), ("yulanmini", "yulanmini"), ("llama", "llama")]
)
def test_architectures(tmp_path, model_type, found):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert find_architecture(tmp_path) == found


def test_another_architecture_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(CheckpointError, match="model_type is 'qwen2'; this kit reads llama, yulanmini and miniyulan"):
        find_architecture(tmp_path)


@pytest.mark.parametrize(
    ("value", "scale"), [(0.7, 0.7), (0, 0.0), (1, 1.0), (1.4, 1.0), (-0.5, 1.0), ("muparam", 0.5), (None, 1.0)]
)
def test_the_residual_scale_holds_in_its_range_only(tmp_path, value, scale):
    assert parse_native_config({**CONFIG, "hidden_states_shrink": value}, tmp_path).residual_scale == scale


def test_every_fault_of_a_configuration_comes_at_once(tmp_path):
    config = {
        **CONFIG,
        "rope_scaling": {"type": "linear"},
        "sliding_window": 4096,
        "hidden_size": 321,
        "scale_emb": "x",
    }
    del config["vocab_size"]
    with pytest.raises(CheckpointError) as caught:
        parse_native_config(config, tmp_path)
    for part in ("vocab_size", "not a multiple", "rope_scaling", "sliding window", "scale_emb must be a number"):
        assert part in str(caught.value)


def test_tensors_that_do_not_fit_are_named(tmp_path, nano):
    tensors = load_file(nano / "model.safetensors")
    del tensors["model.norm_alpha"]
    tensors["model.extra"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError) as caught:
        fold_checkpoint(tmp_path, tmp_path / "out")
    assert "1 missing (model.norm_alpha); 1 unexpected (model.extra); 1 of a wrong shape" in str(caught.value)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_alphas_may_be_scalars_or_vectors_of_one(tmp_path, nano, shape):
    tensors = load_file(nano / "model.safetensors")
    tensors = {name: t.reshape(shape) if name.endswith("_alpha") else t for name, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    fold_checkpoint(tmp_path, tmp_path / "out")
    fold_checkpoint(nano, tmp_path / "reference")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "reference"))
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../other.safetensors", "lies outside the folder"),
        ("/etc/passwd", "lies outside the folder"),
        ("a\\b.safetensors", "lies outside the folder"),
        ("weights.bin", "only .safetensors files are read"),
        ("gone.safetensors", "gone.safetensors that model.safetensors.index.json names is missing"),
    ],
)
def test_an_index_never_leads_elsewhere(tmp_path, shard, message):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError, match=message):
        open_tensors(tmp_path)


def test_an_index_must_fit_its_shards(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "x.safetensors")
    for weight_map, message in (
        ({"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}, "lacks 1 tensor .* \\(first: c\\)"),
        ({"a": "x.safetensors"}, "holds the tensor b, which .* places in no file"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header in its first 8 of 0 bytes"),
        (b"PK\x03\x04" + b"\xff" * 100, "is not a safetensors file"),
        (struct.pack("<Q", 50) + b"{}", "is truncated within its header"),
        (struct.pack("<Q", 2) + b"[]", "its header is damaged"),
        (struct.pack("<Q", 2) + b"{}" + b"surplus", "has 17 bytes where its header needs 10"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_tensors(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_read_back_as_written(tmp_path, dtype):
    tensors = {f"t{i}": torch.randn(3, i + 1).to(dtype) for i in range(4)} | {"scalar": torch.tensor(2.0).to(dtype)}
    specs = [TensorSpec(name, tuple(t.shape), dtype) for name, t in tensors.items()]
    size = write_shards(tmp_path, specs, StoredTensors(tensors), 10 * dtype.itemsize)
    assert size == sum(t.nbytes for t in tensors.values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 4  # of at most ten numbers: 3 + 6, 9, 12 alone, and the scalar
    ours = open_tensors(tmp_path)
    theirs = {name: t for file in files for name, t in load_file(file).items()}
    for name, tensor in tensors.items():
        assert torch.equal(ours.read(name), tensor)
        assert torch.equal(theirs[name], tensor)
    assert all(entry.start % dtype.itemsize == 0 for file in files for entry in read_header(file).values())


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("7", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 TBs", "0"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(OutputError, match="is not a size"):
        parse_size(text)


def test_the_written_configuration_is_llamas(nano_llama):
    ours = json.loads((nano_llama / "config.json").read_text())
    assert set(ours) - {"torch_dtype"} <= set(LlamaConfig().to_dict()) | {"rope_theta", "dtype"}
    config = LlamaConfig.from_pretrained(nano_llama)
    for key in set(ours) - {"torch_dtype", "dtype", "rope_theta"}:
        assert config.to_dict()[key] == ours[key], key
    assert config.rope_parameters["rope_theta"] == ours["rope_theta"] == 10000.0


def test_a_fold_takes_tokenizer_but_no_code(tmp_path, nano):
    source = tmp_path / "source"
    source.mkdir()
    for file in nano.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "modeling_yulanmini.py").write_text("raise SystemExit")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    fold_checkpoint(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == config
    with pytest.raises(CheckpointError, match="is stored as Llama already"):
        fold_checkpoint(tmp_path / "out", tmp_path / "again")


def test_nano_is_the_same_every_time(tmp_path, nano):
    text = tmp_path / "text.jsonl"
    text.write_text('{"messages": [{"role": "user", "content": "你好 hello 123"}]}\n', encoding="utf-8")
    build_nano(tmp_path / "first", [text])
    build_nano(tmp_path / "second", [text])
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    tensors = open_tensors(nano)
    assert set(tensors.names) == set(list_native_tensors(parse_native_config(CONFIG, nano)))
    assert sum(tensors.read(name).numel() for name in tensors.names) == 4479586
    assert sum(path.stat().st_size for path in nano.iterdir()) < 20e6


def test_nanos_tokenizer_is_shaped_like_the_real_one(nano_llama):
    tokenizer = AutoTokenizer.from_pretrained(nano_llama)
    names = {0: "<unk>", 1: "<s>", 2: "</s>", 102: "<pad>", 103: "<reasoning_step>", 104: "<|start_header_id|>"}
    names |= {105: "<|end_header_id|>", 106: "<|eot_id|>"}
    for number, name in names.items():
        assert tokenizer.convert_tokens_to_ids(name) == number
        assert tokenizer(name, add_special_tokens=False)["input_ids"] == [number]
    assert tokenizer("hi")["input_ids"][0] == 1
    assert tokenizer("hi")["input_ids"].count(1) == 1
    text = "量子力学 Ünïcödé 🙂\n\ttabs  and   spaces"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 1273


def test_nano_starts_without_knowledge(nano_llama):
    model = LlamaForCausalLM.from_pretrained(nano_llama)
    ids = torch.randint(107, 1273, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    # ln 1312 = 7.2 is the loss of an even guess; a tied table makes a random network repeat its input, which costs more.
    assert 7.2 < loss < 10
