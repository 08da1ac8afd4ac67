"""Damaged and hostile base checkpoints are refused in one message before any library loads them."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.checkpoints.finding import as_llama
from finetune.errors import CheckpointError, FinetuneError
from finetune.yulan.llama_files import check_llama
from finetune.yulan.nano import CONFIG

WIDTH, ROWS = CONFIG["hidden_size"], CONFIG["vocab_size"]


@pytest.fixture
def base(nano_llama, tmp_path):
    return shutil.copytree(nano_llama, tmp_path / "base")


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_a_whole_folder_is_taken(base):
    check_llama(base)
    assert as_llama(base) == base


def rename(tensors):
    tensors["model.layers.0.mlp.up.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"1 missing \(model.norm.weight\)"),
        (lambda tensors: tensors.pop("lm_head.weight"), r"1 missing \(lm_head.weight\)"),
        (rename, r"1 missing \(model.layers.0.mlp.up_proj.weight\); 1 unknown \(model.layers.0.mlp.up.weight\)"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]], r"\d+ missing"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(WIDTH - 1)}),
            rf"model.norm.weight is \[{WIDTH - 1}\], expected \[{WIDTH}\]",
        ),
    ],
    ids=["norm", "head", "renamed", "nearly-all", "shape"],
)
def test_a_base_with_other_tensors_is_not_trained_on_random_weights(base, change, message):
    """transformers gave missing tensors random values, and the kit trained, chatted and evaluated on them."""
    change_tensors(base, change)
    with pytest.raises(CheckpointError, match=message):
        as_llama(base)


def test_a_tied_head_and_old_buffers_may_be_there_or_not(base):
    change_config(base, tie_word_embeddings=True)
    change_tensors(
        base, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)})
    )
    check_llama(base)
    change_tensors(base, lambda tensors: tensors.pop("lm_head.weight"))
    check_llama(base)


def test_a_reward_model_has_no_language_head(base):
    change_config(base, architectures=["LlamaForSequenceClassification"])
    change_tensors(
        base, lambda tensors: (tensors.pop("lm_head.weight"), tensors.update({"score.weight": torch.ones(1, WIDTH)}))
    )
    check_llama(base)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        check_llama(base, "language")
    change_tensors(base, lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        check_llama(base, "score")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_attention_heads": 5, "num_key_value_heads": 2},
            "num_attention_heads 5 is not a multiple of num_key_value_heads 2",
        ),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 1,000"),
        ({"hidden_size": str(WIDTH)}, "hidden_size must be a whole number"),
        ({"hidden_size": None}, "hidden_size must be a whole number"),
        ({"vocab_size": 10**30}, "vocab_size must be a whole number"),
        ({"vocab_size": ROWS + 1}, rf"expected \[{ROWS + 1}, {WIDTH}\]"),
        ({"pad_token_id": 5000}, f"pad_token_id must be a token below vocab_size {ROWS}"),
        ({"bos_token_id": 5000}, f"bos_token_id must be a token below vocab_size {ROWS}"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"hidden_act": {}}, "hidden_act must be a name"),
        ({"architectures": "Llama"}, "architectures must be a list"),
        ({"quantization_config": {"bits": 4}}, "give the full-precision checkpoint that they were made of"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(base, values, message):
    change_config(base, **values)
    with pytest.raises(CheckpointError, match=message):
        as_llama(base)


HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
CONTENTS = {
    "empty": b"",
    "eight-zeros": bytes(8),
    "cut": (len(HEADER) + 5).to_bytes(8, "little") + HEADER,
    "endless-header": b"\xff" * 7 + b"\x7f" + HEADER,
    "no-json": (4).to_bytes(8, "little") + b"{{{{",
    "a-list": (2).to_bytes(8, "little") + b"[]",
    "deep": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "another-type": len(HEADER.replace(b"F32", b"F8_")).to_bytes(8, "little")
    + HEADER.replace(b"F32", b"F8_")
    + bytes(4),
    "negative": b"\x3a\0\0\0\0\0\0\0" + HEADER.replace(b"[1]", b"[-1]").ljust(0x3A) + bytes(4),
    "overlong": len(HEADER.replace(b"[0,4]", b"[0,9]")).to_bytes(8, "little")
    + HEADER.replace(b"[0,4]", b"[0,9]")
    + bytes(4),
    "pickle": b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_damaged_weights_file_is_refused(base, name):
    (base / "model.safetensors").write_bytes(CONTENTS[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors|do not fit"):
        as_llama(base)


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "", "C:\\x.safetensors", "weights.bin"],
)
def test_an_index_that_leads_out_of_its_folder_is_refused_before_anything_is_read(base, shard, monkeypatch):
    (base / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **options: (opened.append(str(path)), real(path, *rest, **options))[1]
    )
    with pytest.raises(CheckpointError, match=r"outside the folder|only \.safetensors"):
        as_llama(base)
    assert not [path for path in opened if "secret" in path or "passwd" in path]


def test_pickled_weights_alone_are_never_opened(base, tmp_path):
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
    with pytest.raises(CheckpointError, match="holds only pickled weights"):
        as_llama(base)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"[" * 100_000, b"\xff\xfe", b"null"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_configuration_file_is_refused(base, name, content):
    (base / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        as_llama(base)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"model": {"type": "BPE"}}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_tokenizer_is_one_message(base, content):
    """transformers made a LlamaTokenizer without pieces or merges of a file that lacks them: no tokens, or one a character."""
    from finetune.data.encoding.tokenizer import load_tokenizer, load_tokenizer_file

    (base / "tokenizer.json").write_bytes(content)
    for load in (load_tokenizer, load_tokenizer_file):
        with pytest.raises(CheckpointError, match="read"):
            load(base)


def test_a_pattern_that_the_tokenizer_cannot_use_is_one_message(base):
    from finetune.data.encoding.tokenizer import load_tokenizer

    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}
    (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        load_tokenizer(base)


def test_a_side_file_that_leads_out_of_the_folder_is_not_copied(nano, tmp_path):
    """`fold` copied whatever `tokenizer.model` led to."""
    from finetune.yulan.folding import fold_checkpoint

    folder = shutil.copytree(nano, tmp_path / "native")
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(FinetuneError, match=r"tokenizer.model: is a link to .*secret, out of its folder"):
        fold_checkpoint(folder, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_the_links_of_the_hubs_cache_are_followed(nano, tmp_path):
    from finetune.yulan.folding import fold_checkpoint

    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    shutil.copytree(nano, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    fold_checkpoint(snapshot, tmp_path / "folded")
    assert (tmp_path / "folded" / "tokenizer.json").read_bytes() == (nano / "tokenizer.json").read_bytes()
