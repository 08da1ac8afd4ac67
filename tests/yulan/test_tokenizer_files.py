"""Copying tokenizer files: to the letter, but for references to code and for templates that were not trained."""

import json

import pytest
from transformers import AutoTokenizer

from finetune.errors import CheckpointError
from finetune.yulan.tokenizer_files import (
    add_keys,
    copy_tokenizer,
    describe_lost_legacy,
    holds_other_template,
    read_tokenizer_files,
    remove_keys,
)

CONFIG = (
    '{\n  "a" : [1, {"chat_template": "inner"}],\n  "chat_template": "x \\" } , {",\n  "legacy": true, "b": "é"\n}\n'
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CONFIG, '{\n  "a" : [1, {"chat_template": "inner"}],\n  "legacy": true, "b": "é"\n}\n'),
        ('{"chat_template": [1, 2], "a": 1}', '{ "a": 1}'),
        ('{"a": 1,\n"chat_template": null\n}', '{"a": 1\n}'),
        ('{"chat_template": ""}', "{}"),
        ('{ "a":  1.0 }', '{ "a":  1.0 }'),
    ],
)
def test_a_key_is_taken_out_and_the_rest_stays(text, expected):
    found = remove_keys(text, {"chat_template"})
    assert found == expected
    content = json.loads(text)
    content.pop("chat_template", None)
    assert json.loads(found) == content


@pytest.mark.parametrize("text", [CONFIG, "{}", '{ "a":  1.0 }\n', '{"chat": [1]\n}'])
def test_a_key_is_added_and_taken_out_again(text):
    added = {"chat_template": 'x "é" }\n', "other": ["<a>"]}
    text = remove_keys(text, {"chat_template"})
    found = add_keys(text, added)
    assert json.loads(found) == {**json.loads(text), **added}
    assert remove_keys(found, set(added)) == text or json.loads(text) == {}


def test_what_transformers_5_saves_gets_the_names_that_transformers_4_knows(tmp_path):
    """transformers 4 refuses the class `TokenizersBackend`, a list under `extra_special_tokens`, and to generate with token types."""
    text = (
        '{\n  "backend": "tokenizers",\n  "extra_special_tokens": ["<a>"],\n  "tokenizer_class": "TokenizersBackend"\n}'
    )
    (tmp_path / "tokenizer_config.json").write_text(text)
    expected = {"backend": "tokenizers", "tokenizer_class": "PreTrainedTokenizerFast"}
    expected |= {"model_input_names": ["input_ids", "attention_mask"], "additional_special_tokens": ["<a>"]}
    (copy := tmp_path / "copy").mkdir()
    copy_tokenizer(tmp_path, copy, "x")
    assert json.loads((copy / "tokenizer_config.json").read_text()) == {**expected, "chat_template": "x"}
    assert read_tokenizer_files(copy) == read_tokenizer_files(tmp_path)


def test_only_the_trained_template_is_left(tmp_path):
    (source := tmp_path / "source").mkdir()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("other")
    (source / "tokenizer_config.json").write_bytes(CONFIG.encode())
    (source / "chat_template.jinja").write_text("other")
    (source / "tokenizer.json").write_bytes(b"{ }\r\n")
    (copy := tmp_path / "copy").mkdir()
    copy_tokenizer(source, copy, "trained\n")
    assert {path.name for path in copy.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert (copy / "chat_template.jinja").read_bytes() == b"trained\n"
    assert json.loads((copy / "tokenizer_config.json").read_text())["chat_template"] == "trained\n"
    assert (copy / "tokenizer.json").read_bytes() == b"{ }\r\n"
    assert (holds_other_template(source), holds_other_template(copy)) == (True, False)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": }'])
def test_a_damaged_configuration_is_one_message(tmp_path, text):
    (tmp_path / "tokenizer_config.json").write_text(text)
    (tmp_path / "copy").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: is not valid JSON"):
        copy_tokenizer(tmp_path, tmp_path / "copy")


def test_a_tokenizer_that_transformers_5_saved_anew_has_lost_legacy(nano_llama, byte_level_base, tmp_path):
    """The library drops the key, and then reads the header of a turn as other tokens than before."""
    first = AutoTokenizer.from_pretrained(nano_llama)
    first.save_pretrained(tmp_path)
    text = "<|start_header_id|>user"
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize(text) != first.tokenize(text)
    assert describe_lost_legacy(tmp_path).startswith(
        "tokenizer_config.json has no key `legacy`: transformers 5 loses it"
    )
    assert describe_lost_legacy(nano_llama) is None
    assert describe_lost_legacy(byte_level_base) is None
    config = tmp_path / "tokenizer_config.json"
    content = json.loads(config.read_text())
    for mended in ({"legacy": True}, {"legacy": False}):  # the second is a choice, and every version reads it
        config.write_text(json.dumps({**content, **mended}))
        assert describe_lost_legacy(tmp_path) is None
