"""GGUF files: what stands in them, to the bit, and what is refused. tests/runtimes/test_llama_cpp.py runs them in llama.cpp."""

import json
import re
import resource
from pathlib import Path
from typing import get_args

import gguf
import numpy
import pytest
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from jinja2.sandbox import ImmutableSandboxedEnvironment
from legacy_tokenizer import MERGES
from safetensors.torch import load_file, save_file

from finetune.cli.main import main
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.errors import CheckpointError, ExportError, OutputError, TemplateError
from finetune.exporting.gguf.conversion import convert_folder
from finetune.exporting.gguf.gguf_file import permute_heads, write_gguf
from finetune.exporting.gguf.llama_folder import open_llama_folder, remove_training_marks
from finetune.exporting.gguf.read_back import compare_file, read_header
from finetune.exporting.gguf.tensor_types import TENSOR_TYPES, quantize_rows
from finetune.exporting.gguf.vocabulary import read_vocabulary
from finetune.files.resources import list_templates
from finetune.files.sizes import describe_size
from finetune.runs.export_settings import GgufType
from finetune.yulan.nano import CONFIG

ROWS, HEADS, KV_HEADS = (CONFIG[key] for key in ("vocab_size", "num_attention_heads", "num_key_value_heads"))
HEAD_SIZE = CONFIG["hidden_size"] // HEADS


@pytest.fixture
def llama(legacy_base):
    """A folder with a small tokenizer of the published kind and a table with unused rows; nano's norms and biases are random."""
    return legacy_base


def read_fields(file):
    reader = GGUFReader(file)
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def permute_plainly(rows, heads):
    """Row by row: value i of the first half goes to 2i, value i of the second half to 2i + 1."""
    size = len(rows) // heads
    out = numpy.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return out


def test_the_types_are_the_same_everywhere(capsys):
    assert get_args(GgufType) == tuple(TENSOR_TYPES)
    with pytest.raises(SystemExit):
        main(["gguf", "--help"])
    assert f"type of the weights: {', '.join(TENSOR_TYPES)}" in " ".join(capsys.readouterr().out.split())


def test_q8_0_rounds_as_the_package_does():
    """Halves away from zero, blocks of zeros, and sizes from the smallest to the largest."""
    generator = numpy.random.default_rng(0)
    for size in (1e-9, 0.02, 1e3):
        rows = (generator.standard_normal((64, 320)) * size).astype(numpy.float32)
        rows[3], rows[5] = 0, 1.5
        rows[6:, ::32] = 127  # the scale is 1, so that these are halves
        rows[6:, 1::32] = generator.integers(-127, 127, (58, 10)) + 0.5
        kind = GGMLQuantizationType.Q8_0
        assert quantize_rows(rows, kind).tobytes() == gguf.quantize(rows, kind).tobytes()


def test_heads_are_permuted_by_the_plain_formula():
    rows = numpy.random.default_rng(0).normal(size=(3 * 8, 5)).astype(numpy.float32)
    assert (permute_heads(rows, 8) == permute_plainly(rows, 3)).all()
    assert (permute_heads(rows[:, 0], 8) == permute_plainly(rows[:, 0], 3)).all()


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_every_tensor_has_the_bits_of_gguf(llama, tmp_path, name):
    """Matrices in the type, norms and biases in float32, rows of q and k permuted, biases included."""
    convert_folder(llama, tmp_path / "m.gguf", name)
    source = load_file(llama / "model.safetensors")
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    names["output.weight"] = "lm_head.weight"
    parts = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
    parts |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {
        f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")
    }
    for layer in range(4):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"blk.{layer}.{ours}.{kind}"] = f"model.layers.{layer}.{theirs}.{kind}"
    names = {ours: theirs for ours, theirs in names.items() if theirs in source}
    assert found.keys() == names.keys()
    assert len(names) == len(source)
    for ours, theirs in names.items():
        rows = source[theirs].float().numpy()
        rows = (
            permute_plainly(rows, HEADS)
            if "attn_q" in ours
            else permute_plainly(rows, KV_HEADS)
            if "attn_k" in ours
            else rows
        )
        kind = TENSOR_TYPES[name].kind if rows.ndim == 2 else GGMLQuantizationType.F32
        assert found[ours].tensor_type == kind
        assert tuple(reversed(found[ours].shape.tolist())) == rows.shape
        assert found[ours].data.tobytes() == gguf.quantize(rows, kind).tobytes(), ours


def test_metadata_of_a_published_tokenizer(llama, tmp_path):
    convert_folder(llama, tmp_path / "m.gguf", "q8_0")
    fields = read_fields(tmp_path / "m.gguf")
    tokens, types = fields.pop("tokenizer.ggml.tokens"), fields.pop("tokenizer.ggml.token_type")
    scores, template = fields.pop("tokenizer.ggml.scores"), fields.pop("tokenizer.chat_template")
    assert fields == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "YuLan-Mini, fine-tuned",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.vocab_size": ROWS,
        "llama.context_length": CONFIG["max_position_embeddings"],
        "llama.embedding_length": CONFIG["hidden_size"],
        "llama.block_count": CONFIG["num_hidden_layers"],
        "llama.feed_forward_length": CONFIG["intermediate_size"],
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_SIZE,
        "llama.attention.value_length": HEAD_SIZE,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": HEAD_SIZE,
        "llama.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 106,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 102,
    }
    assert len(tokens) == len(types) == len(scores) == ROWS
    assert tokens[104:110] == ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<0x00>", "<0x01>", "<0x02>"]
    assert [types[number] for number in (0, 1, 2, 3, 102, 106, 107, 362, 363, 398, ROWS - 1)] == [
        TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, TokenType.NORMAL, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 2,
        TokenType.NORMAL, TokenType.UNUSED, TokenType.UNUSED,
    ]  # fmt: skip
    assert tokens[398] == "[PAD398]"
    expected = {"".join(pair): -float(rank) for rank, pair in enumerate(MERGES)}
    assert {tokens[number]: scores[number] for number in range(390, 398)} == expected
    assert "generation" not in template.replace("add_generation_prompt", "").replace("generation marks", "")
    assert "bos_token" in template


def test_metadata_of_a_byte_level_tokenizer(byte_level_base, tmp_path):
    convert_folder(byte_level_base, tmp_path / "m.gguf", "f16")
    fields, content = read_fields(tmp_path / "m.gguf"), json.loads((byte_level_base / "tokenizer.json").read_text())
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in content["model"]["merges"]]
    assert not fields["tokenizer.ggml.add_space_prefix"]
    assert fields["general.file_type"] == 1


def test_a_head_that_differs_is_written_whatever_the_configuration_says(llama, tmp_path):
    # transformers keeps both tables of such a folder; the file had the embedding for a head.
    set_config(tie_word_embeddings=True)(llama)
    names = open_llama_folder(llama).names
    assert names["lm_head.weight"] == "output.weight"
    tensors = load_file(llama / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, llama / "model.safetensors")
    assert "lm_head.weight" not in open_llama_folder(llama).names


def test_a_template_that_cannot_be_trained_with_is_written_to_the_letter(llama, tmp_path):
    # The file had the kit's template, in which the model was never asked, and its Modelfile, too.
    own = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}{% endfor %}"
    (llama / "chat_template.jinja").write_text(own)
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 105, 10**6]}))
    convert_folder(llama, tmp_path / "m.gguf", "q4_0")
    fields, modelfile = read_fields(tmp_path / "m.gguf"), (tmp_path / "m.Modelfile").read_text()
    assert fields["tokenizer.chat_template"] == own
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (2, 105)
    assert "\nTEMPLATE" not in modelfile
    assert re.findall('stop "(.*)"', modelfile) == ["</s>", load_tokenizer(llama).convert_ids_to_tokens(105)]


def test_a_template_that_is_no_jinja_is_refused(llama, tmp_path):
    """It was written into the file without a word."""
    (llama / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(TemplateError, match="the chat template cannot be rendered"):
        convert_folder(llama, tmp_path / "m.gguf", "q4_0")
    assert not (tmp_path / "m.gguf").exists()


def test_rope_base_and_linear_scaling(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 490_000.0}
    for keys in (
        {"rope_parameters": rope},
        {"rope_parameters": None, "rope_theta": 490_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ):
        (llama / "config.json").write_text(json.dumps({**config, **keys}))
        (tmp_path / "m.gguf").unlink(missing_ok=True)
        write_gguf(tmp_path / "m.gguf", open_llama_folder(llama), TENSOR_TYPES["q4_0"])
        fields = read_fields(tmp_path / "m.gguf")
        found = [fields[f"llama.rope.{key}"] for key in ("freq_base", "scaling.type", "scaling.factor")]
        assert found == [490_000.0, "linear", 2.0]


@pytest.mark.parametrize("name", ["yulan-mini", "chatml"])
def test_a_template_without_marks_renders_the_same(name):
    source = list_templates()[name].read_text(encoding="utf-8")
    assert "{%- generation -%}" in source
    # As transformers treats them: the block's content, with the white space control of the marks.
    marked = source.replace("{%- generation -%}", "{%- if true -%}").replace("{%- endgeneration -%}", "{%- endif -%}")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": " be brief "},
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "  yes  ", "tool_calls": [call, call]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    values = {"messages": messages, "tools": [{"name": "f"}], "bos_token": "<s>", "eos_token": "</s>"}
    texts = [environment.from_string(text).render(**values) for text in (remove_training_marks(source), marked)]
    assert texts[0] == texts[1]
    assert "  yes  " in texts[0]


def test_reading_back_finds_one_wrong_byte(llama, tmp_path):
    source = open_llama_folder(llama)
    for name in TENSOR_TYPES:
        file = tmp_path / f"{name}.gguf"
        write_gguf(file, source, TENSOR_TYPES[name])
        assert compare_file(file, source, TENSOR_TYPES[name]) == 55
        _, tensors = read_header(file)
        for tensor in ("blk.2.attn_k.bias", "blk.1.ffn_down.weight"):
            content = bytearray(file.read_bytes())
            content[tensors[tensor].start + (6 if name != "f32" else 7)] ^= 0xF0
            damaged = tmp_path / "damaged.gguf"
            damaged.write_bytes(content)
            with pytest.raises(ExportError, match=f"1 tensor differs .* \\(first: {tensor}"):
                compare_file(damaged, source, TENSOR_TYPES[name])


def join_by_scores(text, pieces, scores):
    """Tokenize as llama.cpp's llm_tokenizer_spm_session does: join the two neighbours whose joint piece has the highest score."""
    parts = list(text)
    while True:
        pairs = [
            (scores[parts[i] + parts[i + 1]], -i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in pieces
        ]
        if not pairs:
            return parts
        place = -max(pairs)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def check_scores(folder, texts):
    tokenizer = load_tokenizer(folder)
    vocabulary = read_vocabulary(folder, tokenizer)
    scores = dict(zip(vocabulary.pieces, vocabulary.scores, strict=True))
    checked = 0
    for text in texts:
        spelt = "▁" + text.replace(" ", "▁")
        if text.startswith(" ") or not all(char in scores for char in spelt):
            continue
        checked += 1
        assert join_by_scores(spelt, scores.keys(), scores) == tokenizer.tokenize(text), text
    return checked


def test_scores_say_what_the_merges_say(llama):
    generator = numpy.random.default_rng(5)
    texts = ["".join(generator.choice(list("theusra "), 30)) for _ in range(200)]
    assert check_scores(llama, texts) > 100


def test_scores_say_what_the_merges_of_the_larger_tokenizer_say(published_base):
    generator = numpy.random.default_rng(5)
    words = [
        piece.replace("▁", "")
        for piece in json.loads((published_base / "tokenizer.json").read_text())["model"]["vocab"]
    ][400:]
    texts = ["".join(generator.choice(words, 8)) for _ in range(150)] + [
        " ".join(generator.choice(words, 8)) for _ in range(150)
    ]
    assert check_scores(published_base, texts) > 250


def change_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)  # it would win over tokenizer.json
    # A class that transformers does not rebuild from parts takes tokenizer.json as it is.
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))


def leave_apart(content):
    """Merge b and c before a and b: then a and bc are neighbours whose joint text is a piece, and no merge joins them."""
    vocabulary = content["model"]["vocab"]
    for piece in ("bc", "ab", "abc"):
        vocabulary[piece] = len(vocabulary)
    content["model"]["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]
    for piece in ("er", "▁u", "▁us", "▁user", "th", "the", "▁the", "▁a"):
        content["model"]["vocab"].pop(piece)
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    content["model"]["vocab"] = numbers


REFUSED = {
    "Unigram": (lambda c: c.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], *([t["content"], 0.0] for t in c["added_tokens"][1:])], "byte_fallback": False}), "its model is Unigram"),
    "normalizer": (lambda c: c.update(normalizer={"type": "NFKC"}), "it changes a text by NFKC"),
    "first": (lambda c: c.update(normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}), "legacy: false"),
    "ignored merges": (lambda c: c["model"].update(ignore_merges=True), "ignore_merges is True"),
    "stripped": (lambda c: c["added_tokens"][3].update(lstrip=True), "'<pad>' is lstrip"),
    "apart": (leave_apart, "'abc' would be joined from 'a' and 'bc'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_llama_cpp_cannot_express(llama, tmp_path, name):
    change, reason = REFUSED[name]
    change_tokenizer(llama, change)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ExportError, match="cannot express this tokenizer") as error:
        convert_folder(llama, tmp_path / "m.gguf", "q8_0")
    assert reason in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_byte_level_tokenizer_with_other_words_is_refused(byte_level_base, tmp_path):
    change_tokenizer(byte_level_base, lambda content: content["pre_tokenizer"].update(add_prefix_space=True))
    with pytest.raises(ExportError, match="cuts words in a way that has no name there"):
        convert_folder(byte_level_base, tmp_path / "m.gguf", "q8_0")


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def drop_bias(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, folder / "model.safetensors")


def write_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][7, 7] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def set_config(**keys):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **keys}))

    return change


BROKEN = {
    "no config": (remove("config.json"), CheckpointError, "holds no config.json"),
    "no weights": (remove("model.safetensors"), CheckpointError, "holds no weights"),
    "no tokenizer": (remove("tokenizer.json"), CheckpointError, "holds no tokenizer.json"),
    "truncated": (truncate, CheckpointError, "truncated or damaged"),
    "half": (drop_tensor, CheckpointError, r"1 missing \(model.layers.2.mlp.up_proj.weight\)"),
    "NaN": (write_nan, ExportError, "model.layers.3.mlp.up_proj.weight holds NaN"),
    "foreign": (set_config(model_type="qwen3"), CheckpointError, "model_type is 'qwen3'"),
    "other sizes": (set_config(hidden_size=512), CheckpointError, "the tensors do not fit config.json"),
    "no sizes": (set_config(hidden_size="many"), CheckpointError, "hidden_size must be a whole number"),
    # These were written as if nothing were missing, or with biases that transformers leaves out.
    "no bias": (drop_bias, CheckpointError, r"1 missing \(model.layers.1.self_attn.k_proj.bias\)"),
    "unused biases": (set_config(attention_bias=False), CheckpointError, "16 unknown"),
    "no MLP biases": (set_config(mlp_bias=True), CheckpointError, "12 missing"),
    # transformers takes `rope_scaling` where both forms are there; the other one was written.
    "two ropes": (set_config(rope_scaling={"type": "dynamic", "factor": 2.0}), ExportError, "rope_type is 'dynamic'"),
    "no factor": (set_config(rope_scaling={"type": "linear"}), ExportError, "factor of linear RoPE is None"),
    "half heads turned": (set_config(partial_rotary_factor=0.5), ExportError, "partial_rotary_factor is set"),
    # These were tracebacks.
    "rope of text": (set_config(rope_parameters="x"), CheckpointError, "rope_parameters must be an object"),
    "no base of rope": (
        set_config(rope_parameters=None, rope_theta=None),
        CheckpointError,
        "rope_theta must be a number; found None",
    ),
    "rope": (set_config(rope_parameters={"rope_type": "yarn"}), ExportError, "rope_type is 'yarn'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_written_leaves_nothing(llama, tmp_path, name):
    change, kind, message = BROKEN[name]
    change(llama)
    with pytest.raises(kind, match=message):
        convert_folder(llama, tmp_path / "out" / "m.gguf", "q8_0")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q4_k_m", "q4_k_m stores blocks of 256 values, and the rows of YuLan-Mini have 1,920 and 4,800"),
        ("Q6_K", "take q8_0"),
        ("iq2_xxs", "take q4_0"),
        ("IQ1_S", "take q4_0"),
        ("q8", "'q8' is unknown; did you mean 'q8_0'?"),
    ],
)
def test_a_wrong_type(llama, tmp_path, capsys, name, message):
    for command in (
        ["gguf", llama, "-o", tmp_path / "m.gguf", "--type", name],
        ["export", "none", "-o", tmp_path / "e", "--gguf", name],
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(part) for part in command])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert message in said
        assert "export: gguf" not in said  # the verb stands before the message already
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_is_there_stays(llama, tmp_path):
    for name in ("m.gguf", "m.Modelfile"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(OutputError, match=f"{name}: exists already"):
            convert_folder(llama, tmp_path / "m.gguf", "q8_0")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    with pytest.raises(OutputError, match=r"name the file m\.gguf"):
        convert_folder(llama, tmp_path / "m.bin", "q8_0")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        # An empty name was a traceback, and `..` was told to become "...gguf".
        (".", "name the file mine.gguf"),
        ("/", "name the file mine.gguf"),
        ("..", "name the file mine.gguf"),
        # A folder of the name `~` was made.
        ("~nobody-here/m.gguf", "~nobody-here/m.gguf: there is no user of this name"),
    ],
)
def test_a_file_without_a_name_of_its_own_is_refused(llama, tmp_path, monkeypatch, capsys, output, message):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with pytest.raises(SystemExit) as ended:
        main(["gguf", str(llama), "-o", output, "--type", "q8_0"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(work.iterdir()) == []


def test_a_python_program_replaces_its_home_itself(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="~ is not replaced here; write /"):
        convert_folder(llama, Path("~/m.gguf"), "q8_0")
    assert not (tmp_path / "~").exists()


def test_a_run_is_to_be_exported_first(tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(ExportError, match=r"is a run or an adapter.*run -o DIR --gguf q8_0"):
        convert_folder(tmp_path / "run", tmp_path / "m.gguf", "q8_0")


@pytest.fixture
def small_files():
    """Let no file of this process grow above 1 MiB; to a program that is the same as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing(llama, tmp_path, capsys, small_files):
    with pytest.raises(SystemExit) as ended:
        main(["gguf", str(llama), "-o", str(tmp_path / "out" / "m.gguf"), "--type", "f32"])
    assert ended.value.code == 2
    assert "m.gguf: cannot be written" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_the_modelfile(llama, tmp_path):
    convert_folder(llama, tmp_path / "m.gguf", "q4_0")
    assert (tmp_path / "m.Modelfile").read_text() == (
        'FROM ./m.gguf\nPARAMETER stop "</s>"\nPARAMETER stop "<|eot_id|>"\nPARAMETER num_ctx 2048\n'
        "# Without tools: Ollama writes their JSON in another way.\n"
        'TEMPLATE """{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}'
        '<|start_header_id|>assistant<|end_header_id|>\n\n"""\n'
    )


def as_jinja(template):
    """Write those words of Go's language that the kit uses in Jinja: range, if eq, end, and fields of a message."""
    open_blocks = []

    def turn(word):
        text = word[1].strip(" -")
        if text == "end":
            return f"{{% end{open_blocks.pop()} %}}"
        if text == "range .Messages":
            open_blocks.append("for")
            return "{% for message in messages %}"
        if found := re.fullmatch(r'if eq \.Role "(\w+)"', text):
            open_blocks.append("if")
            return f"{{% if message.role == '{found[1]}' %}}"
        return f"{{{{ message.{ {'.Role': 'role', '.Content': 'content'}[text] } }}}}"

    return re.sub(r"\{\{(.*?)\}\}", turn, template)


@pytest.mark.parametrize("name", list_templates())
def test_every_shipped_template_renders_the_same_in_ollamas_language(llama, tmp_path, name):
    """Ollama puts bos before it. A new template needs a row, or this test must say why it has none."""
    source = list_templates()[name].read_text(encoding="utf-8")
    (llama / "chat_template.jinja").write_text(source, encoding="utf-8")
    convert_folder(llama, tmp_path / "m.gguf", "q4_0")
    modelfile = (tmp_path / "m.Modelfile").read_text(encoding="utf-8")
    written = modelfile.partition('TEMPLATE """')[2].removesuffix('"""\n')
    messages = [
        {"role": "system", "content": " be brief "},
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "  yes  "},
        {"role": "user", "content": "你好 {{ .Role }}"},
    ]
    values = {"messages": messages, "bos_token": "", "eos_token": "</s>", "add_generation_prompt": True}
    trained = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        remove_training_marks(source)
    )
    found = ImmutableSandboxedEnvironment(keep_trailing_newline=True).from_string(as_jinja(written))
    assert found.render(messages=messages) == trained.render(**values)
    assert ('PARAMETER stop "<|im_end|>"' in modelfile) == (name == "chatml")
    assert 'PARAMETER stop "</s>"' in modelfile


def test_export_writes_gguf_files_beside_the_weights(make_adapter, tmp_path, capsys):
    adapter, output = make_adapter(tmp_path / "adapter"), tmp_path / "export"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(adapter), "-o", str(output), "--gguf", "q8_0", "--gguf", "f32", "--json"])
    assert ended.value.code == 0
    report = json.loads(capsys.readouterr().out)["gguf"]
    assert [(file["type"], file["output"], file["tensors"]) for file in report] == [
        ("q8_0", str(output / "model-q8_0.gguf"), 55),
        ("f32", str(output / "model-f32.gguf"), 55),
    ]
    assert {path.name for path in output.glob("model-*")} == {
        f"model-{name}.{ending}" for name in ("q8_0", "f32") for ending in ("gguf", "Modelfile")
    }
    merged = load_file(output / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].numpy()
    found = {tensor.name: tensor for tensor in GGUFReader(output / "model-f32.gguf").tensors}
    assert (found["blk.1.ffn_up.weight"].data == merged).all()
    assert [file["output"] for file in json.loads((output / "export.json").read_text())["gguf"]] == [
        "model-q8_0.gguf",
        "model-f32.gguf",
    ]
    size = (output / "model-q8_0.gguf").stat().st_size
    # Q8_0 has a scale of two bytes and 32 values of one byte; what is not a matrix is in float32. The rest is the vocabulary.
    merged_shapes = [tensor.shape for tensor in load_file(output / "model.safetensors").values()]
    weights = sum(shape.numel() * 34 // 32 if len(shape) == 2 else shape.numel() * 4 for shape in merged_shapes)
    assert weights < report[0]["bytes"] == size < weights + 100_000
    assert f"| `model-q8_0.gguf` | {describe_size(size)} | all 55 tensors |" in (output / "README.md").read_text()


def test_the_command_proves_by_reading_back(llama, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["gguf", str(llama), "-o", str(tmp_path / "m.gguf"), "--type", "q5_1"])
    assert ended.value.code == 0
    assert "all 55 tensors lie within half a step of q5_1 of their source" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def without_binding(monkeypatch):
    """These tests are about the files; where a binding is installed, it would run each of them."""
    monkeypatch.setattr("finetune.exporting.proof.BINDING", "no_binding_here")
