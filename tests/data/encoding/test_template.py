"""Templates to tokens: exact ids, the stop token trained, the same text whether rendered whole or turn by turn."""

import json

import pytest
from token_texts import read_text

from finetune.data.encoding.gates import check_padding
from finetune.data.encoding.rendering import encode_conversations, encode_prompt
from finetune.data.encoding.template import find_template, list_stop_tokens, list_template_tokens
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.errors import TemplateError
from finetune.files.resources import find_demo_data, list_templates

CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "  Hi\n"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]
# What must come out, to the letter: the text, and the pieces of it that are trained. A new template needs its line here.
GOLDEN = {
    "yulan-mini": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n  Hi\n<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n你好！<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>",
        ["你好！<|eot_id|>", "2<|eot_id|>"],
        [2, 106],
    ),
    "chatml": (
        "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n  Hi\n<|im_end|>\n"
        "<|im_start|>assistant\n你好！<|im_end|></s>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|></s>\n",
        ["你好！<|im_end|></s>", "2<|im_end|></s>"],
        [2],
    ),
}
LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LINE_AFTER_STOP = LLAMA_LIKE.replace("<|eot_id|>{% endfor %}", "<|eot_id|>\n{% endfor %}")


@pytest.fixture
def tokenizer(nano_llama):
    return load_tokenizer(nano_llama)


def read_trained(tokenizer, encoded):
    """Return the trained runs of tokens, decoded."""
    runs, current = [], []
    for token, is_trained in [*zip(encoded.token_ids, encoded.trained, strict=True), (None, False)]:
        if is_trained:
            current.append(token)
        elif current:
            runs.append(read_text(tokenizer, current))
            current = []
    return runs


@pytest.mark.parametrize("name", list_templates())
def test_text_and_trained_spans_are_exact(tokenizer, name):
    text, trained, stop_tokens = GOLDEN[name]
    template = find_template(name, tokenizer)
    encoded = encode_conversations(tokenizer, template, [CONVERSATION])[0]
    assert read_text(tokenizer, encoded.token_ids) == text
    assert read_trained(tokenizer, encoded) == trained
    assert encoded.token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list_stop_tokens(tokenizer, template) == stop_tokens
    ends = [i for i, t in enumerate(encoded.trained) if t and not [*encoded.trained, False][i + 1]]
    assert [encoded.token_ids[i] for i in ends] == [max(stop_tokens)] * 2


def test_trained_ids_of_the_default_template_are_this_very_list(tokenizer):
    encoded = encode_conversations(
        tokenizer,
        find_template("yulan-mini", tokenizer),
        [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "ab"}]],
    )[0]
    # Behind a control token stands a space, and line breaks are bytes.
    pieces = ["▁", "<0x0A>", "<0x0A>", "?", "<|eot_id|>", "<|start_header_id|>", "▁assistant", "<|end_header_id|>"]
    pieces = ["<s>", "<|start_header_id|>", "▁", "user", "<|end_header_id|>", *pieces, *pieces[:3]]
    letters = ["ab"] if "ab" in tokenizer.get_vocab() else ["a", "b"]
    expected = tokenizer.convert_tokens_to_ids([*pieces, *letters, "<|eot_id|>"])
    assert encoded.token_ids == expected
    assert encoded.trained == [False] * (len(expected) - len(letters) - 1) + [True] * (len(letters) + 1)


@pytest.mark.parametrize("name", list_templates())
def test_every_prefix_renders_to_a_prefix(tokenizer, name):
    template = find_template(name, tokenizer)
    whole = encode_conversations(tokenizer, template, [CONVERSATION])[0].token_ids
    for turns in (3, 5):
        part = encode_conversations(tokenizer, template, [CONVERSATION[:turns]])[0].token_ids
        prompt = encode_prompt(tokenizer, template, CONVERSATION[: turns - 1])
        assert whole[: len(part)] == part
        assert part[: len(prompt)] == prompt


@pytest.mark.parametrize("name", list_templates())
def test_tokens_and_masks_are_those_of_transformers(tokenizer, name):
    """What TRL trains with assistant_only_loss, on every bundled row."""
    template = find_template(name, tokenizer)
    rows = [
        json.loads(line)["messages"]
        for file in ("demo.jsonl", "demo_eval.jsonl")
        for line in find_demo_data(file).read_text(encoding="utf-8").splitlines()
    ]
    for row, encoded in zip(rows, encode_conversations(tokenizer, template, rows), strict=True):
        theirs = tokenizer.apply_chat_template(
            row, chat_template=template.source, return_dict=True, return_assistant_tokens_mask=True
        )
        assert encoded.token_ids == theirs["input_ids"]
        assert encoded.trained == [bool(bit) for bit in theirs["assistant_masks"]]


@pytest.mark.parametrize("source", [LLAMA_LIKE, LINE_AFTER_STOP])
def test_a_template_without_marks_is_marked_by_its_prefixes(tokenizer, source):
    tokenizer.chat_template = source
    template = find_template("auto", tokenizer)
    assert (template.name, template.spans, template.notes) == ("the tokenizer's own", "prefixes", ())
    encoded = encode_conversations(tokenizer, template, [CONVERSATION])[0]
    assert read_trained(tokenizer, encoded) == ["你好！<|eot_id|>", "2<|eot_id|>"]
    if source == LLAMA_LIKE:
        shipped = encode_conversations(tokenizer, find_template("yulan-mini", tokenizer), [CONVERSATION])[0]
        assert encoded == shipped


@pytest.mark.parametrize(
    "source",
    [
        LLAMA_LIKE.replace("{{ m.content }}", "{{ m.content if loop.last else '…' }}"),  # rewrites earlier turns
        LLAMA_LIKE.replace("<|eot_id|>", "\n"),  # nothing that could stop
        LLAMA_LIKE.replace("{{ bos_token }}", ""),
        "{% for m in messages %}{{ m.content }",
    ],
)
def test_a_template_that_cannot_be_marked_gives_way_aloud(tokenizer, source):
    tokenizer.chat_template = source
    template = find_template("auto", tokenizer)
    assert template.name == "yulan-mini"
    assert "cannot be trained with" in template.notes[0]


def test_without_a_template_the_default_is_taken(tokenizer):
    assert find_template("auto", tokenizer).name == "yulan-mini"
    tokenizer.chat_template = list_templates()["chatml"].read_text(encoding="utf-8")
    assert find_template("auto", tokenizer).name == "chatml"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LLAMA_LIKE, r"does not mark what is trained; put \{% generation %\} before"),
        (
            "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}</s>{% endfor %}",
            "a trained answer ends in '▁d', which is no token that can stop generation",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endfor %}",
            "must render <s>",
        ),
        ("{{ bos_token }}{% generation %}{% endgeneration %}", "marks nothing of an assistant's turn as trained"),
        ("{% generation %}\n{% for %}{% endgeneration %}", "line 2: the chat template cannot be rendered"),
        ("{{ bos_token }}{% generation %}{{ raise_exception('no') }}{% endgeneration %}", "cannot be rendered: no"),
        ("{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}", "cannot be rendered: access to attribute"),
    ],
)
def test_a_template_file_must_be_right(tokenizer, tmp_path, source, message):
    (tmp_path / "mine.jinja").write_text(source, encoding="utf-8")
    with pytest.raises(TemplateError, match=message):
        find_template(str(tmp_path / "mine.jinja"), tokenizer)


def test_a_template_file_is_used(tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        list_templates()["chatml"].read_text(encoding="utf-8").replace("im_start", "turn"), encoding="utf-8"
    )
    template = find_template(str(path), tokenizer)
    assert template.name == str(path)
    assert template.fingerprint != find_template("chatml", tokenizer).fingerprint


def test_text_is_never_run_as_a_template(tokenizer):
    payload = "{{ bos_token }}{% for x in [1] %}{{ ''.__class__ }}{% endfor %}"
    row = [{"role": "user", "content": payload}, {"role": "assistant", "content": payload}]
    encoded = encode_conversations(tokenizer, find_template("yulan-mini", tokenizer), [row])[0]
    assert tokenizer.decode(encoded.token_ids).count(payload) == 2
    assert encoded.token_ids.count(1) == 1


def test_the_tokens_of_a_template(tokenizer):
    assert list_template_tokens(tokenizer, find_template("yulan-mini", tokenizer)) == [104, 105, 106]
    assert list_template_tokens(tokenizer, find_template("chatml", tokenizer)) == [2]


def test_padding_must_not_stop(tokenizer):
    """pad = eos: the stop token would be masked, and the model never stop (unsloth 416, trl 1623)."""
    check_padding(tokenizer, [2, 106])
    tokenizer.pad_token = "</s>"
    with pytest.raises(TemplateError, match="the padding token '</s>' is also a stop token"):
        check_padding(tokenizer, [2, 106])
