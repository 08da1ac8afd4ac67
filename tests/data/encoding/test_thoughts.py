"""What the assistant thought before its answer is trained where the chat template renders it, and refused elsewhere."""

import json

import pytest
from token_texts import read_text

from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template, list_rendered_thoughts
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError

TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>' -}}
{%- if message.role == 'assistant' -%}{%- generation -%}
{%- if message.reasoning_content and CONDITION -%}{{- '(' + message.reasoning_content + ')' -}}{%- endif -%}
{{- message.content + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}{{- message.content + '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>' -}}{%- endif -%}
"""


@pytest.fixture
def tokenizer(nano_llama):
    return load_tokenizer(nano_llama)


@pytest.fixture
def open_template(tokenizer, tmp_path):
    """Return a function that makes a template that renders thoughts under a condition."""

    def run(condition):
        (tmp_path / "own.jinja").write_text(TEMPLATE.replace("CONDITION", condition), encoding="utf-8")
        return find_template(str(tmp_path / "own.jinja"), tokenizer)

    return run


def chat(*thoughts):
    answers = [
        {"role": "assistant", "content": "A", **({"reasoning_content": text} if text else {})} for text in thoughts
    ]
    return {"messages": [turn for answer in answers for turn in ({"role": "user", "content": "Q"}, answer)]}


def load(tmp_path, tokenizer, template, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    row = load_splits(DataSettings((Source(tmp_path / "rows.jsonl"),)), tokenizer, template, 0).train[0]
    return read_text(tokenizer, [label for label in row["labels"] if label >= 0]), row["input_ids"]


@pytest.mark.parametrize(("condition", "rendered"), [("true", True), ("loop.last", False)])
def test_which_thoughts_a_template_renders(tokenizer, open_template, condition, rendered):
    assert list_rendered_thoughts(tokenizer, open_template(condition)) == dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"), rendered
    )


@pytest.mark.parametrize("name", ["yulan-mini", "chatml"])
def test_the_shipped_templates_render_none(tokenizer, name):
    assert list_rendered_thoughts(tokenizer, find_template(name, tokenizer)) == {}


def test_thoughts_are_trained_where_the_template_renders_them(tmp_path, tokenizer, open_template):
    every, last = "(Hm.)A<|eot_id|>(So.)A<|eot_id|>", "A<|eot_id|>(So.)A<|eot_id|>"
    assert load(tmp_path, tokenizer, open_template("true"), chat("Hm.", "So."))[0] == every
    assert load(tmp_path, tokenizer, open_template("loop.last"), chat("", "So."))[0] == last
    with pytest.raises(DataError, match="line 1: message 2 has 'reasoning_content'"):
        load(tmp_path, tokenizer, open_template("loop.last"), chat("Hm.", "So."))


def test_two_different_thoughts_are_refused(tmp_path, tokenizer, open_template):
    row = chat("Hm.")
    row["messages"][1]["thinking"] = "Another."
    with pytest.raises(DataError, match="message 2 has reasoning_content and thinking with different texts"):
        load(tmp_path, tokenizer, open_template("true"), row)


def test_a_thought_that_spells_a_control_token_is_plain_text(tmp_path, tokenizer, open_template):
    text, ids = load(tmp_path, tokenizer, open_template("true"), chat("It ends in <|eot_id|>."))
    assert text == "(It ends in <|eot_id|>.)A<|eot_id|>"
    assert ids.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 2


def test_a_prompt_with_thoughts_is_refused(tmp_path, tokenizer, open_template):
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat("Hm.", "")) + "\n", encoding="utf-8")
    settings = DataSettings((Source(tmp_path / "rows.jsonl"),), shape="prompt")
    with pytest.raises(DataError, match="holds thoughts; a prompt is plain turns"):
        load_splits(settings, tokenizer, open_template("true"), 0)
