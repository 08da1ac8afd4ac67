"""Rows in the shapes of other projects train as they are, or one sentence says what to set, and then they train.

What is expected is written by hand: each row's messages, rendered by `rendered.py`. The rows are short ones of our own.
"""

import json

import pytest
from datasets import Dataset
from rendered import chat, load, read_pair, read_sequence, render, render_pair, say, write

from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.errors import DataError

Q, A, B, C = "What is the sea?", "Salt water.", "A kind of soup.", "Deep blue."
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
BARE = TOOL["function"]
CALL, RESULT = {"name": "tide", "arguments": {"port": "Oslo"}}, '{"metres": 2}'
CALLED = [
    say("user", Q),
    {**say("assistant", ""), "calls": [("tide", {"port": "Oslo"})]},
    say("tool", RESULT),
    say("assistant", A),
]
TEXT_CALLS = "calls of tools are trained as the texts that they are: they stand in no tool_calls"

# name: (row, settings that the row needs, messages, tools, notes about it)
SEQUENCES = {
    "FastChat": (
        {"id": "identity_0", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        {},
        chat(Q, A),
        None,
        ["keys not used: id (1 row)"],
    ),
    "FastChat, a greeting first": (
        {
            "conversations": [
                {"from": "gpt", "value": "Hello!"},
                {"from": "human", "value": Q},
                {"from": "gpt", "value": A},
            ]
        },
        {},
        [{**say("assistant", "Hello!"), "untrained": True}, *chat(Q, A)],
        None,
        [
            "an answer stands before the first question; it answers nothing, so only data.train_on: all trains it (1 row)"
        ],
    ),
    "MedicalGPT": (
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": Q},
                {"from": "gpt", "value": A},
            ]
        },
        {},
        chat(Q, A, system="S"),
        None,
        [],
    ),
    "BELLE": ({"instruction": Q, "input": "", "output": A}, {}, chat(Q, A), None, []),
    "BELLE, multi-turn": (
        {"id": "1", "conversations": [{"from": "human", "value": Q}, {"from": "assistant", "value": A}]},
        {},
        chat(Q, A),
        None,
        ["keys not used: id (1 row)"],
    ),
    "Firefly": (
        {"kind": "NLI", "input": Q, "target": A},
        {"columns": {"prompt": "input", "completion": "target"}},
        chat(Q, A),
        None,
        ["keys not used: kind (1 row)"],
    ),
    "Firefly, multi-turn": (
        {"conversation_id": 1, "conversation": [{"human": Q, "assistant": A}, {"human": "And?", "assistant": C}]},
        {"columns": {"messages": "conversation"}},
        chat(Q, A, "And?", C),
        None,
        ["keys not used: conversation_id (1 row)"],
    ),
    "ToolBench": (
        {
            "id": "x",
            "conversations": [
                {"from": "system", "value": "You are AutoGPT."},
                {"from": "user", "value": Q},
                {"from": "assistant", "value": "Thought: look.\nAction: tide\nAction Input: {}"},
                {"from": "function", "value": RESULT},
                {"from": "assistant", "value": A},
            ],
        },
        {},
        [
            *chat(Q, "Thought: look.\nAction: tide\nAction Input: {}", system="You are AutoGPT."),
            say("tool", RESULT),
            say("assistant", A),
        ],
        None,
        ["keys not used: id (1 row)", f"{TEXT_CALLS} (1 row)"],
    ),
    "OpenAI": (
        {
            "messages": [
                {"role": "developer", "content": "S"},
                {"role": "user", "content": [{"type": "text", "text": Q}]},
                {"role": "assistant", "content": B, "weight": 0},
                {"role": "user", "content": "Really?"},
                {"role": "assistant", "content": A, "weight": 1},
            ],
            "parallel_tool_calls": False,
        },
        {},
        [say("system", "S"), say("user", Q), {**say("assistant", B), "untrained": True}, *chat("Really?", A)],
        None,
        ["keys not used: parallel_tool_calls (1 row)"],
    ),
    "OpenAI, tools": (
        {
            "messages": [
                say("user", Q),
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {**CALL, "arguments": '{"port": "Oslo"}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": RESULT},
                say("assistant", A),
            ],
            "tools": [TOOL],
        },
        {},
        CALLED,
        [TOOL],
        [],
    ),
    "LLaMA-Factory, tools": (
        {
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": RESULT},
                {"from": "gpt", "value": A},
            ],
            "tools": json.dumps([BARE]),
        },
        {},
        CALLED,
        [BARE],
        [],
    ),
    "LLaMA-Factory, version 1": (
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "value": "S"}], "loss_weight": 0.0},
                {"role": "user", "content": [{"type": "text", "value": Q}], "loss_weight": 0.0},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_call", "value": json.dumps(CALL)}],
                    "loss_weight": 1.0,
                },
                {"role": "tool", "content": [{"type": "text", "value": RESULT}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": A}], "loss_weight": 1.0},
            ]
        },
        {},
        [say("system", "S"), *CALLED],
        None,
        [],
    ),
    "LLaMA-Factory, history": (
        {"instruction": Q, "input": "Briefly.", "output": A, "system": "S", "history": [["Hi", "Hello."]]},
        {},
        chat("Hi", "Hello.", f"{Q}\nBriefly.", A, system="S"),
        None,
        [],
    ),
    "ms-swift": (
        {
            "messages": [
                say("user", Q),
                say("tool_call", json.dumps(CALL)),
                say("tool_response", RESULT),
                {**say("assistant", A), "loss": True},
            ]
        },
        {},
        CALLED,
        None,
        [],
    ),
    "ms-swift 2": (
        {"system": "S", "history": [["Hi", "Hello."]], "query": Q, "response": A},
        {"columns": {"prompt": "query", "completion": "response"}},
        chat("Hi", "Hello.", Q, A, system="S"),
        None,
        [],
    ),
    "unsloth": (
        {"conversations": [say("user", Q), say("assistant", A)], "source": "x", "score": 5.2},
        {},
        chat(Q, A),
        None,
        ["keys not used: score (1 row), source (1 row)"],
    ),
    "OpenOrca": (
        {"id": "flan.1", "system_prompt": "S", "question": Q, "response": A},
        {"columns": {"system": "system_prompt", "prompt": "question", "completion": "response"}},
        chat(Q, A, system="S"),
        None,
        ["keys not used: id (1 row)"],
    ),
    "Hermes": (
        {
            "conversations": [
                {"from": "system", "value": "S <tools></tools>"},
                {"from": "human", "value": Q},
                {"from": "gpt", "value": "<tool_call>\n{}\n</tool_call>"},
                {"from": "tool", "value": "<tool_response>\n2\n</tool_response>"},
                {"from": "gpt", "value": A},
            ],
            "category": "tides",
        },
        {},
        [
            *chat(Q, "<tool_call>\n{}\n</tool_call>", system="S <tools></tools>"),
            say("tool", "<tool_response>\n2\n</tool_response>"),
            say("assistant", A),
        ],
        None,
        ["keys not used: category (1 row)", f"{TEXT_CALLS} (1 row)"],
    ),
    "Gemini": ({"messages": [say("user", Q), say("model", A)]}, {}, chat(Q, A), None, []),
    "ShareGPT, one speaker twice": (
        {
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "human", "value": "Please."},
                {"from": "gpt", "value": A},
            ]
        },
        {"merge_turns": True},
        chat(f"{Q}\n\nPlease.", A),
        None,
        [],
    ),
}
# name: (row, settings, the prompt's messages, tools, notes)
PAIRS = {
    "HH-RLHF": (
        {
            "chosen": f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {Q}\n\nAssistant: {A}",
            "rejected": f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {Q}\n\nAssistant: {B}",
        },
        {},
        chat("Hi", "Hello.", Q),
        None,
        ["chosen, rejected: texts with Human: and Assistant: are read as turns (1 row)"],
    ),
    "UltraFeedback, binarized": (
        {
            "prompt": Q,
            "prompt_id": "1",
            "chosen": chat(Q, A),
            "rejected": chat(Q, B),
            "messages": chat(Q, A),
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        {},
        chat(Q),
        None,
        ["keys not used: messages (1 row), prompt_id (1 row), score_chosen (1 row), score_rejected (1 row)"],
    ),
    "Orca pairs": (
        {"system": "S", "question": Q, "chosen": A, "rejected": B},
        {"columns": {"prompt": "question"}},
        chat(Q, system="S"),
        None,
        [],
    ),
    "Argilla": (
        {"system": "S", "input": Q, "chosen": A, "rejected": B, "rating": [9.0, 8.0], "chosen_score": 9.0},
        {"columns": {"prompt": "input"}},
        chat(Q, system="S"),
        None,
        ["keys not used: chosen_score (1 row), rating (1 row)"],
    ),
    "ms-swift": ({"messages": chat(Q, A), "rejected_response": B}, {}, chat(Q), None, []),
    "ms-swift, messages": ({"messages": chat(Q, A), "rejected_messages": chat(Q, B)}, {}, chat(Q), None, []),
    "OpenAI": (
        {
            "input": {"messages": chat(Q, system="S"), "tools": [TOOL], "parallel_tool_calls": True},
            "preferred_output": [say("assistant", A)],
            "non_preferred_output": [say("assistant", B)],
        },
        {},
        chat(Q, system="S"),
        [TOOL],
        ["keys not used: input.parallel_tool_calls (1 row)"],
    ),
    "LLaMA-Factory, ranked": ({"instruction": Q, "input": "", "output": [A, B]}, {}, chat(Q), None, []),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": [{"from": "human", "value": Q}],
            "chosen": {"from": "gpt", "value": A},
            "rejected": {"from": "gpt", "value": B},
        },
        {},
        chat(Q),
        None,
        [],
    ),
    "LLaMA-Factory, version 1": (
        {
            "chosen_messages": [
                {"role": "user", "content": [{"type": "text", "value": Q}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": A}], "loss_weight": 1.0},
            ],
            "rejected_messages": [
                {"role": "user", "content": [{"type": "text", "value": Q}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": B}], "loss_weight": 1.0},
            ],
        },
        {},
        chat(Q),
        None,
        [],
    ),
    "MedicalGPT": (
        {"system": "", "history": [["Hi", "Hello."]], "question": Q, "response_chosen": A, "response_rejected": B},
        {"columns": {"prompt": "question", "chosen": "response_chosen", "rejected": "response_rejected"}},
        chat("Hi", "Hello.", Q),
        None,
        [],
    ),
    "a table with JSON": (
        {"chosen": json.dumps(chat(Q, A)), "rejected": json.dumps(chat(Q, B))},
        {},
        chat(Q),
        None,
        [f"{side} holds messages as JSON text, and is read as messages (1 row)" for side in ("chosen", "rejected")],
    ),
}
# name: (row, shape, what the sentence says); what cannot be trained as it is
REFUSED = {
    "MOSS": (
        {"conversation_id": "1", "meta_instruction": "S", "chat": {"turn_1": {"Human": Q, "MOSS": A}}},
        "sequence",
        "a form of their own (MOSS); write them as messages, each with role and content",
    ),
    "MOSS, first version": (
        {"prefix": "S", "plain_text": f"[Human]: {Q}<eoh>"},
        "sequence",
        "(MOSS); write them as messages",
    ),
    "BFCL": ({"id": "simple_0", "question": [[say("user", Q)]], "function": [BARE]}, "sequence", "{prompt: question,"),
    "UltraFeedback": (
        {"source": "x", "instruction": Q, "completions": [{"response": A, "overall_score": 8}, {"response": B}]},
        "pair",
        "completions holds several answers; give each row the best of them as chosen and another as rejected",
    ),
    "Argilla, several": ({"prompt_": Q, "responses": [A, B]}, "pair", "responses holds several answers"),
    "LLaMA-Factory, three answers": ({"instruction": Q, "output": [A, B, C]}, "pair", "output is a list of 3 (text)"),
    "Firefly": (
        {"kind": "NLI", "input": Q, "target": A},
        "sequence",
        "data.columns: {prompt: input, completion: target}",
    ),
    "Firefly, multi-turn": (
        {"conversation": [{"human": Q, "assistant": A}]},
        "sequence",
        "data.columns: {messages: conversation}",
    ),
    "OpenOrca": (
        {"system_prompt": "S", "question": Q, "response": A},
        "sequence",
        "data.columns: {system: system_prompt, prompt: question, completion: response}",
    ),
    "ms-swift 2": ({"query": Q, "response": A}, "sequence", "data.columns: {prompt: query, completion: response}"),
    "ms-swift 2, pairs": (
        {"query": Q, "response": A, "rejected_response": B},
        "pair",
        "data.columns: {prompt: query, chosen: response, rejected: rejected_response}",
    ),
    "MedicalGPT": (
        {"question": Q, "response_chosen": A, "response_rejected": B},
        "pair",
        "data.columns: {prompt: question, chosen: response_chosen, rejected: response_rejected}",
    ),
    "Orca pairs": ({"question": Q, "chosen": A, "rejected": B}, "pair", "data.columns: {prompt: question}"),
    "Argilla": ({"input": Q, "chosen": A, "rejected": B}, "pair", "data.columns: {prompt: input}"),
    "ShareGPT, one speaker twice": (
        {"conversations": [{"from": "human", "value": Q}, {"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        "sequence",
        "set data.merge_turns: true",
    ),
    "classes": ({"text_": Q, "prompt": Q, "completion": A, "label": "sea"}, "labelled", "its label is 'sea'"),
}


@pytest.fixture
def tokenizer(nano_llama):
    return load_tokenizer(nano_llama)


@pytest.mark.parametrize("name", SEQUENCES)
def test_conversations(tokenizer, tmp_path, name):
    row, settings, messages, tools, notes = SEQUENCES[name]
    splits = load(write(tmp_path / "rows.jsonl", [row]), tokenizer, **settings)
    assert read_sequence(splits.train[0], tokenizer) == render(messages, tools)
    assert list(splits.report.notes) == notes


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(tokenizer, tmp_path, name):
    row, settings, prompt, tools, notes = PAIRS[name]
    splits = load(write(tmp_path / "rows.jsonl", [row]), tokenizer, shape="pair", **settings)
    assert read_pair(splits.train[0], tokenizer) == render_pair(prompt, A, B, tools)
    assert list(splits.report.notes) == notes


@pytest.mark.parametrize("name", REFUSED)
def test_one_sentence_says_what_to_do(tokenizer, tmp_path, name):
    row, shape, sentence = REFUSED[name]
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "rows.jsonl", [row]), tokenizer, shape=shape)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 1: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_same_rows_in_every_kind_of_file(tokenizer, tmp_path, name):
    """CSV holds lists as JSON in a text, and a saved data set in Arrow's structs: the same tokens come out."""
    row, settings, messages, tools, _ = SEQUENCES[name]
    write(tmp_path / "rows.json", json.dumps([row]))
    # Arrow cannot hold a text beside a list, nor an object without keys.
    endings = ["json"] if name.startswith("OpenAI") else ["json", "parquet"]
    if "parquet" in endings:
        Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    for ending in endings:
        splits = load(tmp_path / f"rows.{ending}", tokenizer, **settings)
        assert read_sequence(splits.train[0], tokenizer) == render(messages, tools), ending


def walk(value, path=()):
    """Yield the path of every key of a row that holds something."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, dict | list) and inner:
            yield from walk(inner, (*path, key))
        elif inner not in (None, "", [], {}) and isinstance(key, str):
            yield (*path, key)


def change(row, path):
    """Return a copy of a row whose value at a path is another of the same kind, and that value."""
    copy = json.loads(json.dumps(row))
    target = copy
    for key in path[:-1]:
        target = target[key]
    old = target[path[-1]]
    target[path[-1]] = not old if isinstance(old, bool) else old + 1 if isinstance(old, int | float) else f"{old}zzz"
    return copy


# The ids that link a call with its result: the results stand in the order of their calls, which is checked.
LINKS = {"id", "tool_call_id", "type"}
ALL = {
    f"{kind}, {name}": (case, shape)
    for kind, table, shape in (("chat", SEQUENCES, "sequence"), ("pair", PAIRS, "pair"))
    for name, case in table.items()
}


@pytest.mark.parametrize("name", ALL)
def test_no_key_vanishes(tokenizer, tmp_path, name):
    """Each key that holds something is changed: the rows change, or are refused, or the key is named."""
    (row, settings, *_, notes), shape = ALL[name]
    before = load(write(tmp_path / "rows.jsonl", [row]), tokenizer, shape=shape, **settings).report
    named = next((note for note in notes if note.startswith("keys not used: ")), "")
    vanished = []
    for path in walk(row):
        try:
            after = load(write(tmp_path / "rows.jsonl", [change(row, path)]), tokenizer, shape=shape, **settings).report
        except DataError:
            continue
        told = " ".join((named, *after.notes))
        is_named = any(f"{key} (" in told or f"{key} of the" in told for key in path if isinstance(key, str))
        if after.fingerprint == before.fingerprint and not is_named and path[-1] not in LINKS:
            vanished.append(path)
    assert vanished == []
