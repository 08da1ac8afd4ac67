"""Every key of a row is used, named, or refused: nothing that a person wrote into a row vanishes without a word."""

import pytest

from finetune.data.formats.row_formats import FORMATS, choose_format, read_row
from finetune.data.formats.row_keys import describe_unused
from finetune.data.formats.rows import Row, hash_row
from finetune.errors import DataError, Place

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
WORSE, SYSTEM = {"role": "assistant", "content": "B"}, {"role": "system", "content": "S"}
TOOL = {"name": "add", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SAMPLES = {
    "sharegpt_preference": {"conversations": [{"from": "human", "value": "Q"}], "chosen": "A", "rejected": "B"},
    "preference": {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
    "labelled_messages": {"messages": [USER, ANSWER], "label": True},
    "labelled": {"prompt": "Q", "completion": "A", "label": True},
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "output": "A"},
    "prompt_completion": {"prompt": "Q", "completion": "A"},
    "text": {"text": "T"},
    "tokens": {"input_ids": [1, 2]},
    "prompt": {"prompt": "Q"},
}
OPTIONAL = {"system": "S", "tools": [TOOL], "functions": [TOOL], "input": "I", "history": [["q", "a"]], "answer": "42"}
OPTIONAL |= {"prompt": "P", "instruction": "P"}
MASKS = ("labels", "attention_mask", "assistant_masks", "completion_mask")


def read(raw, columns=None, rendered=None):
    place = Place("f", 7)
    return read_row(choose_format("auto", columns or {}, raw, place), columns or {}, raw, place, rendered or {})


def refuse(raw, columns=None, rendered=None):
    with pytest.raises(DataError) as caught:
        read(raw, columns, rendered)
    assert str(caught.value).startswith("f, line 7: ")
    return caught.value.fault


@pytest.mark.parametrize("name", FORMATS)
def test_every_key_of_a_format_is_used_or_refused(name):
    """A new optional key is tested for free: beside a row of the format, it changes the row or stops it."""
    plain = read(SAMPLES[name])
    for key in set(FORMATS[name].optional) - {*MASKS}:
        raw = {**SAMPLES[name], key: OPTIONAL[key]}
        try:
            found = read_row(FORMATS[name], {}, raw, Place("f", 7))
        except DataError as error:
            assert key in error.fault or "prompt" in error.fault
        else:
            assert hash_row(found) != hash_row(plain), f"{key} is dropped"
            assert found.unused == ()


@pytest.mark.parametrize("name", FORMATS)
def test_every_other_key_is_named(name):
    assert read({**SAMPLES[name], "zeta": 1, "alpha": ["x"], "empty": "", "none": None}).unused == ("alpha", "zeta")


@pytest.mark.parametrize("name", [name for name in FORMATS if "system" in FORMATS[name].optional])
def test_system_beside_any_chat_is_the_system_message(name):
    assert read({**SAMPLES[name], "system": "S"}).messages[0] == SYSTEM
    assert read({**SAMPLES[name], "sys": "S"}, {"system": "sys"}).messages[0] == SYSTEM
    assert read({**SAMPLES[name], "system": " "}).messages[0]["role"] != "system"
    assert "map it with data.columns: {system: system_prompt}" in refuse({**SAMPLES[name], "system_prompt": "S"})


@pytest.mark.parametrize(
    "raw",
    [
        {"messages": [SYSTEM, USER, ANSWER]},
        {"prompt": [SYSTEM, USER], "completion": "A"},
        {"prompt": [SYSTEM, USER], "chosen": "A", "rejected": "B"},
        {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WORSE]},
    ],
)
def test_two_system_messages_must_agree(raw):
    assert read({**raw, "system": "S"}) == read(raw)
    assert "keep one of them" in refuse({**raw, "system": "other"})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("key", ["images", "image", "videos", "audio"])
def test_what_is_no_text_is_refused(name, key):
    assert f"has {key!r}" in refuse({**SAMPLES[name], key: ["cat.png"]})
    assert read({**SAMPLES[name], key: []}) == read(SAMPLES[name])


def test_images_of_a_message_are_refused():
    assert "message 1 has 'images'" in refuse({"messages": [{**USER, "images": ["cat.png"]}, ANSWER]})


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning", "thoughts"])
@pytest.mark.parametrize("place", ["messages", "completion", "chosen", "conversations"])
def test_thoughts_are_rendered_or_refused(key, place):
    answer = {**ANSWER, key: "Hm."}
    raw = {
        "messages": {"messages": [USER, answer]},
        "completion": {"prompt": [USER], "completion": [answer]},
        "chosen": {"chosen": [USER, answer], "rejected": [USER, WORSE]},
        "conversations": {
            "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", key: "Hm."}]
        },
    }[place]
    fault = refuse(raw)
    assert repr(key) in fault and "template" in fault
    row = read(raw, rendered={key: False})
    assert (row.chosen or row.messages)[-1] == answer
    assert row.unused == ()


def test_thoughts_before_the_last_answer_need_a_template_that_renders_them():
    raw = {"messages": [USER, {**ANSWER, "thinking": "Hm."}, USER, ANSWER]}
    assert "message 2 has 'thinking'" in refuse(raw, rendered={"thinking": False})
    assert read(raw, rendered={"thinking": True}).messages[1]["thinking"] == "Hm."


def test_keys_within_messages_are_named():
    turn = {**USER, "content": [{"type": "text", "text": "Q", "cache": 1}], "foo": 1, "name": "Ann", "none": None}
    calls = {**ANSWER, "tool_calls": [{**CALL, "id": "1", "bar": 2}]}
    result = {"role": "tool", "content": "1", "tool_call_id": "1", "name": "add"}
    row = read({"messages": [turn, calls, result, {**ANSWER, "foo": 2}]})
    assert row.unused == ("messages.content.cache", "messages.foo", "messages.name", "messages.tool_calls.bar")
    assert describe_unused({"system": 3, "images": 1}) == ("keys not used: images (1 row), system (3 rows)",)
    assert describe_unused({}) == ()


@pytest.mark.parametrize(
    "legacy",
    [
        [USER, {**ANSWER, "function_call": {"name": "add", "arguments": '{"a": 1}'}}],
        [USER, {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": {"a": 1}}}],
        [
            USER,
            {"role": "assistant", "function_call": {"name": "add", "arguments": {"a": 1}}},
            {"role": "function", "name": "add", "content": "1"},
            ANSWER,
        ],
    ],
)
def test_openais_older_form_of_calls_becomes_the_new_one(legacy):
    row = read({"messages": legacy, "functions": [TOOL]})
    assert row.messages[1]["tool_calls"] == [CALL]
    assert row.tools == [{"type": "function", "function": TOOL}]
    assert [message["role"] for message in row.messages[2:]] in ([], ["tool", "assistant"])
    assert row.unused == ()


def test_both_forms_of_calls_are_refused():
    both = {**ANSWER, "tool_calls": [CALL], "function_call": CALL["function"]}
    assert "keep one of them" in refuse({"messages": [USER, both]})
    assert "keep one of them" in refuse({"messages": [USER, ANSWER], "tools": [TOOL], "functions": [TOOL]})


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_calls_beside_a_sharegpt_turn_are_refused(key):
    turn = {"from": "gpt", "value": "A", key: [CALL] if key == "tool_calls" else CALL["function"]}
    assert f"message 2 has {key}" in refuse({"conversations": [{"from": "human", "value": "Q"}, turn]})


@pytest.mark.parametrize("key", ["args", "parameters", "input"])
def test_arguments_under_another_name_are_refused(key):
    calls = [{"name": "add", key: {"a": 1}}]
    assert key in refuse({"messages": [USER, {**ANSWER, "tool_calls": calls}]})


@pytest.mark.parametrize(
    ("raw", "columns"),
    [
        ({"instruction": "Q", "input": "I", "output": "A"}, {"prompt": "instruction", "completion": "output"}),
        ({"instruction": "Q", "input": "I", "output": "A"}, {}),
        ({"prompt": "Q", "input": "I", "completion": "A"}, {}),
        ({"instruction": "Q", "input": "I", "chosen": "A", "rejected": "B"}, {}),
        ({"q": "Q", "input": "I", "chosen": "A", "rejected": "B"}, {"prompt": "q"}),
        ({"prompt": "Q", "input": "I", "completion": "A", "label": True}, {}),
        ({"prompt": "Q", "input": "I"}, {}),
    ],
)
def test_input_is_part_of_every_question_that_is_text(raw, columns):
    assert read(raw, columns).messages[0] == {"role": "user", "content": "Q\nI"}


@pytest.mark.parametrize(
    "raw", [{"prompt": [USER], "completion": "A"}, {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}]
)
def test_input_that_belongs_to_no_text_is_refused(raw):
    assert "input" in refuse({**raw, "input": "I"})


EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.mark.parametrize(
    ("prompt", "begin", "expected"),
    [
        ([SYSTEM], [USER], [SYSTEM, USER]),
        (EARLIER, [USER], [*EARLIER, USER]),
        ([SYSTEM, *EARLIER], [USER], [SYSTEM, *EARLIER, USER]),
        ([SYSTEM, USER], [USER], [SYSTEM, USER]),
        ([*EARLIER, USER], [USER], [*EARLIER, USER]),
        ([*EARLIER, USER], [], [*EARLIER, USER]),
        ("Q", [USER], [USER]),
        ("Q ", [SYSTEM, USER], [SYSTEM, USER]),
        ([USER], [*EARLIER, USER], [*EARLIER, USER]),
    ],
)
def test_all_of_a_pairs_prompt_is_asked(prompt, begin, expected):
    row = read({"prompt": prompt, "chosen": [*begin, ANSWER], "rejected": [*begin, WORSE]})
    assert row == Row(expected, [ANSWER], [WORSE])


def test_a_pairs_prompt_that_its_answers_do_not_begin_with_is_refused():
    raw = {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}
    assert "make them agree" in refuse({**raw, "prompt": "Another"})
    assert "one prompt" in refuse({**SAMPLES["sharegpt_preference"], "prompt": "Q"})


def test_a_key_that_another_column_hides_is_named():
    assert read({"prompt": "old", "question": "Q", "completion": "A"}, {"prompt": "question"}).unused == ("prompt",)


@pytest.mark.parametrize("key", MASKS)
def test_masks_of_tokens_are_honoured_or_refused(key):
    assert read({"input_ids": [3, 4], key: [3, 4]}) == Row(token_ids=[3, 4])
    assert key in refuse({"input_ids": [3, 4], key: [0, 4]})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_no_json_are_refused(number):
    places = [
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "add", "arguments": {"a": [number]}}]}]},
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "add", "arguments": '{"a": NaN}'}]}]},
        {"messages": [USER, {**ANSWER, "function_call": {"name": "add", "arguments": {"a": number}}}]},
        {"messages": [USER, ANSWER], "tools": [{"name": "add", "parameters": {"minimum": number}}]},
        {"messages": [USER, ANSWER], "tools": '[{"name": "add", "parameters": {"minimum": Infinity}}]'},
    ]
    assert ["NaN or Infinity" in refuse(raw) for raw in places] == [True] * len(places)


def test_nulls_that_json_holds_are_kept():
    row = read({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "add", "arguments": {"a": None}}]}]})
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}


@pytest.mark.parametrize(
    "tools",
    [
        ['{"name": "add", "parameters": {"type": "object"}}'],
        '[{"name": "add", "parameters": "{\\"type\\": \\"object\\"}"}]',
    ],
)
def test_tools_that_are_stored_as_json_are_read(tools):
    assert read({"messages": [USER, ANSWER], "tools": tools}).tools == [TOOL]
