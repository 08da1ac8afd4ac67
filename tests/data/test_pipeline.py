"""What becomes of rows between file and batch: which answers are trained, what is left out, and that nothing leaks."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from token_texts import read_text
from transformers import LlamaForCausalLM

from finetune.data.dataset import load_splits
from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.data.encoding.rendering import encode_prompt
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError, MachineError


@pytest.fixture(scope="module")
def tokenizer(nano_llama):
    return load_tokenizer(nano_llama)


@pytest.fixture
def load(tokenizer, tmp_path):
    """Return a function that prepares rows with settings."""

    def run(rows, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_splits(
            DataSettings((Source(path),), **settings), tokenizer, find_template("yulan-mini", tokenizer), 0
        )

    return run


def chat(*texts):
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def read_trained(row, tokenizer):
    """Return the trained runs of a row as texts."""
    runs, previous = [], IGNORED_LABEL
    for label in row["labels"]:
        if label != IGNORED_LABEL:
            runs = [*runs, [label]] if previous == IGNORED_LABEL else [*runs[:-1], [*runs[-1], label]]
        previous = label
    return [read_text(tokenizer, run) for run in runs]


TWO = chat("one", "first", "two", "second")


def test_which_answers_are_trained(load, tokenizer):
    def trained(row, **settings):
        return read_trained(load([row], **settings).train[0], tokenizer)

    assert trained(TWO) == ["first<|eot_id|>", "second<|eot_id|>"]
    assert trained(TWO, train_on="last") == ["second<|eot_id|>"]
    silenced = json.loads(json.dumps(TWO))
    silenced["messages"][1]["train"] = False
    assert trained(silenced) == ["second<|eot_id|>"]
    (everything,) = trained(TWO, train_on="all")
    assert everything.startswith("<|start_header_id|>user") and everything.endswith("second<|eot_id|>")


def test_spelled_control_tokens_and_jinja_stay_plain_text(load, tokenizer):
    text = "</s> <|eot_id|> {{ 7 * 6 }} {% for x in y %}<s>"
    splits = load([chat(text, text)])
    row = splits.train[0]
    ids = row["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(106) == 2  # the two that the template writes
    assert ids.count(tokenizer.eos_token_id) == 0
    assert tokenizer.decode(ids).count(text) == 2
    assert any("1 row spells control tokens in its text" in note for note in splits.report.notes)
    plain = load([chat("hello", "world")]).train[0]["input_ids"]
    expected = tokenizer.apply_chat_template(
        chat("hello", "world")["messages"], chat_template=find_template("yulan-mini", tokenizer).source
    )["input_ids"]
    assert plain == expected


def test_placeholders_are_filled(load, tokenizer):
    row = load([chat("Who?", "I am {{name}} by {{ author }}.")], substitute={"name": "Lan", "author": "us"}).train[0]
    assert read_trained(row, tokenizer) == ["I am Lan by us.<|eot_id|>"]


def test_duplicates_and_false_labels_are_left_out_and_counted(load):
    splits = load([TWO, chat("a", "b"), TWO, TWO], deduplicate=True)
    assert splits.report.train.rows == 2
    assert splits.report.left_out == {"duplicates": 2}
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, False)]
    splits = load(rows)
    assert (splits.report.train.rows, splits.report.left_out) == (1, {"labelled false": 2})


def test_long_texts_are_split_without_losing_a_token(load, tokenizer):
    text = " ".join(str(number) for number in range(200))
    splits = load([{"text": text}], max_tokens=32, overflow="split")
    pieces = [row["input_ids"] for row in splits.train]
    assert len(pieces) > 5
    assert all(piece[0] == tokenizer.bos_token_id and len(piece) <= 32 for piece in pieces)
    joined = [token for piece in pieces for token in piece[1:]]
    assert joined == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    report = splits.report.train
    assert report.rows_read + report.parts == report.rows + report.dropped


def test_answers_that_all_lose_their_end_are_refused(load):
    with pytest.raises(DataError, match="every answer loses its end and its stop token"):
        load([chat("a", "word " * 200)], max_tokens=40, overflow="truncate")


PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad answer"}


def test_pairs_share_their_prompt(load, tokenizer):
    row = load([PAIR], shape="pair").train[0]
    template = find_template("yulan-mini", tokenizer)
    assert row["prompt_ids"] == encode_prompt(tokenizer, template, [{"role": "user", "content": "Q"}])
    assert tokenizer.decode(row["chosen_ids"]) == "good<|eot_id|>"
    assert tokenizer.decode(row["rejected_ids"]) == "bad answer<|eot_id|>"
    assert row["input_ids"] == row["prompt_ids"] + row["chosen_ids"]


def test_supervised_training_learns_the_chosen_side(load, tokenizer):
    splits = load([PAIR])
    assert read_trained(splits.train[0], tokenizer) == ["good<|eot_id|>"]
    assert "prompt_ids" not in splits.train.column_names
    assert any("1 row is a pair" in note for note in splits.report.notes)


def test_the_account_of_pairs_counts_both_sides(load):
    row, report = load([PAIR], shape="pair").train[0], load([PAIR], shape="pair").report.train
    prompt, chosen, rejected = (len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert (report.tokens, report.trained_tokens) == (2 * prompt + chosen + rejected, chosen + rejected)
    assert report.longest == prompt + max(chosen, rejected)


def test_a_pair_becomes_two_labelled_answers(load, tokenizer):
    labelled = {"prompt": "Q", "completion": "so so", "label": False}
    rows = load([PAIR], shape="labelled").train
    found = [(tokenizer.decode(row["completion_ids"]), row["label"]) for row in rows]
    assert found == [("good<|eot_id|>", True), ("bad answer<|eot_id|>", False)]
    row = load([labelled, {**labelled, "label": True}], shape="labelled").train[0]
    assert (tokenizer.decode(row["completion_ids"]), row["label"]) == ("so so<|eot_id|>", False)
    assert row["input_ids"] == row["prompt_ids"] + row["completion_ids"]


def test_answers_of_one_label_teach_nothing(load):
    rows = [{"prompt": "Q", "completion": "A", "label": True}] * 3
    with pytest.raises(DataError, match=r"all 3 answers are labelled true; .* add rows with label: false"):
        load(rows, shape="labelled")
    notes = load([*rows, {**rows[0], "label": False}], shape="labelled").report.notes
    assert "3 answers are liked and 1 is not; trainer.undesirable_weight: 3 gives both sides the same weight" in notes


def test_both_sides_of_a_pair_are_cut_and_counted(load, tokenizer):
    long = {"prompt": "Q", "chosen": "good " * 30, "rejected": "bad"}
    limit = len(load([PAIR], shape="pair").train[0]["prompt_ids"]) + 5
    splits = load([long, PAIR], shape="pair", max_tokens=limit, overflow="truncate")
    row = splits.train[0]
    assert len(row["prompt_ids"] + row["chosen_ids"]) == limit
    assert tokenizer.decode(row["rejected_ids"]) == "bad<|eot_id|>"
    assert (splits.report.train.truncated, splits.report.train.answers_cut) == (1, 1)
    # Sides that are equal up to the cut teach nothing any more.
    equal = {"prompt": "Q", "chosen": "good " * 30 + "end", "rejected": "good " * 30}
    assert load([equal, PAIR], shape="pair", max_tokens=limit, overflow="truncate").report.train.dropped == 1
    assert load([long, PAIR], shape="pair", max_tokens=limit, overflow="drop").report.train.dropped == 1
    with pytest.raises(DataError, match="1 of 2 rows is longer"):
        load([long, PAIR], shape="pair", max_tokens=limit)


def test_spellings_of_control_tokens_stay_text_on_both_sides(load, tokenizer):
    row = load([{"prompt": "<s>", "chosen": "a<|eot_id|>b", "rejected": "<|eot_id|>"}], shape="pair").train[0]
    stop = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1
    for side, text in (("chosen_ids", "a<|eot_id|>b"), ("rejected_ids", "<|eot_id|>")):
        assert row[side].count(stop) == 1
        assert row[side][-1] == stop
        assert tokenizer.decode(row[side][:-1]) == text


@pytest.mark.parametrize(
    ("shape", "bad", "fault"),
    [
        ("pair", {**PAIR, "rejected": "good"}, "chosen and rejected are the same"),
        ("pair", {"prompt": "Q", "chosen": "good"}, "has no 'rejected', which the format preference needs"),
        ("pair", {**PAIR, "rejected": None}, "rejected"),
        (
            "pair",
            {"chosen": chat("Q", "A")["messages"], "rejected": chat("other", "A")["messages"]},
            "chosen and rejected answer different prompts (they differ from a user message on)",
        ),
        (
            "pair",
            {"chosen": chat("Q", "A", "R", "B")["messages"], "rejected": chat("Q", "X", "R", "Y")["messages"]},
            "chosen and rejected differ before their last answer",
        ),
        ("labelled", {"prompt": "Q", "completion": "A", "label": "yes"}, "; expected true or false"),
        ("labelled", {"prompt": "Q", "completion": "A", "label": 2}, "label is a number; expected true or false"),
    ],
)
def test_bad_pairs_are_named_with_file_and_line(load, shape, bad, fault):
    good = PAIR if shape == "pair" else {"prompt": "Q", "completion": "A", "label": True}
    with pytest.raises(DataError, match=re.escape(fault)) as caught:
        load([good, bad], shape=shape)
    assert "rows.jsonl, line 2: " in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "row", "needs"),
    [
        ("pair", chat("Q", "A"), "needs pairs: chosen and rejected, with or without a prompt"),
        ("labelled", chat("Q", "A"), "needs labelled answers"),
        ("sequence", {"prompt": "Q"}, "needs an answer to each prompt"),
    ],
)
def test_a_method_says_which_rows_it_needs(load, shape, row, needs):
    with pytest.raises(DataError, match=needs):
        load([row], shape=shape)


def test_the_cache_gives_the_same_rows_and_sees_every_change(load, tmp_path):
    cache = tmp_path / "cache"
    first, again = load([TWO], cache=cache), load([TWO], cache=cache)
    assert again.report == first.report
    assert again.train[:] == first.train[:]
    assert len(list(cache.iterdir())) == 1
    load([chat("other", "row")], cache=cache)
    load([TWO], cache=cache, train_on="last")
    assert len(list(cache.iterdir())) == 3


def test_a_packed_row_is_read_like_its_rows_alone(load, nano_llama):
    """Packing without this trains every row on its neighbours: reported against several trainers."""
    model = LlamaForCausalLM.from_pretrained(nano_llama, attn_implementation="sdpa").eval()
    rows = [row["input_ids"] for row in load([TWO, chat("a", "b"), chat("who are you?", "me")]).train]
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[position for row in rows for position in range(len(row))]])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows])
    assert (packed - alone).abs().max() <= 1e-5 * max(1.0, alone.std().item())


def test_held_out_rows_are_the_same_whenever_they_are_drawn(load):
    rows = [chat(f"question {number}", f"answer {number}") for number in range(20)]
    first, second = load(rows, held_out=0.25), load(rows, held_out=5)
    assert first.evaluation["origin"] == second.evaluation["origin"]
    assert len(first.evaluation) == 5
    assert not set(first.evaluation["origin"]) & set(first.train["origin"])
    assert replace(first.report, fingerprint="") == replace(second.report, fingerprint="")


@pytest.mark.parametrize("shape", ["sequence", "pair", "labelled"])
def test_rows_are_the_same_whoever_prepares_them(load, shape, monkeypatch, unguarded_script):
    """A person's script without `if __name__ == "__main__"` ran in every process, and the run ended for want of memory, it said."""
    monkeypatch.setattr("finetune.data.encoding.workers.BATCH_ROWS", 4)  # several batches for each process
    pairs = [{"prompt": f"Q{n}", "chosen": f"yes {n} </s>", "rejected": f"no {n}"} for n in range(30)]
    alone = load(pairs, shape=shape)
    together = load(pairs, shape=shape, workers=2)
    assert together.report == alone.report
    assert together.train[:] == alone.train[:]
    assert any("rows spell control tokens" in note for note in together.report.notes)
    assert not unguarded_script.exists()


def test_a_process_that_ends_is_told(load, monkeypatch):
    monkeypatch.setattr("finetune.data.encoding.workers._start_worker", sys.exit)
    with pytest.raises(MachineError, match=r"data\.workers: a process that prepares rows was ended from outside"):
        load([TWO], workers=2)
