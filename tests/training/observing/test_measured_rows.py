"""The losses of single rows: they name the bad rows, they are those of `evaluate`, and measuring them changes no bit of the training."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.cli.main import main
from finetune.errors import OutputError, RecipeError
from finetune.evaluation.pairs import evaluate_pairs
from finetune.evaluation.token_loss import evaluate_path
from finetune.runs.run_files import MEASURED_ROWS_FILE
from finetune.training.observing import measured_rows
from finetune.training.observing.measured_rows import MEASURES, _cut_pieces
from finetune.training.run import run_training

COLOURS = {"apple": "red", "leaf": "green", "sky": "blue", "snow": "white", "night": "black", "lemon": "yellow"}
QUESTIONS = (
    "What colour is the {}?",
    "Name the colour of the {}.",
    "Which colour has the {}?",
    "The {} is of what colour?",
)
ROWS, PLANTED = 300, 15


def read(run):
    return json.loads((run / MEASURED_ROWS_FILE).read_text(encoding="utf-8"))


def write_planted_rows(path, seed):
    """Write rows of which 5 % are bad, half of them garbled and half with the label of another; return their line numbers."""
    rng = random.Random(seed)
    bad = rng.sample(range(ROWS), PLANTED)
    rows = []
    for number in range(ROWS):
        thing = rng.choice(list(COLOURS))
        answer = f"It is {COLOURS[thing]}."
        if number in bad[::2]:
            answer = "".join(rng.choice("qxzjkvwbpgf ") for _ in range(12)).strip()
        elif number in bad:
            answer = f"It is {rng.choice([colour for name, colour in COLOURS.items() if name != thing])}."
        rows.append({"instruction": rng.choice(QUESTIONS).format(thing), "output": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {number + 1 for number in bad}


def test_the_rows_of_the_highest_loss_are_the_planted_ones(train, tmp_path, capsys):
    bad = write_planted_rows(tmp_path / "planted.jsonl", seed=1)
    run = train(
        "run",
        "data.train=planted.jsonl",
        f"row_losses={ROWS}",
        "trainer.max_steps=30",
        "trainer.learning_rate=1e-2",
        "trainer.per_device_train_batch_size=16",
    )
    content = read(run)
    assert len(content["rows"]) == ROWS
    ranked = content["rankings"][0]
    assert ranked["title"] == "Rows of the highest loss after the training" and len(ranked["rows"]) == 20
    found = {int(content["rows"][row["number"]]["origin"].rsplit(" ", 1)[1]) for row in ranked["rows"]}
    assert len(found & bad) >= 10
    # They are the losses that the result has, and `evaluate --worst` names the same rows.
    score = evaluate_path(str(run), [tmp_path / "planted.jsonl"], 128, worst=3)
    weighed = sum(row["after"] * row["trained"] for row in content["rows"])
    assert weighed / sum(row["trained"] for row in content["rows"]) == pytest.approx(score.loss, abs=1e-5)
    after = [content["rows"][row["number"]] for row in ranked["rows"][:3]]
    assert [row["origin"] for row in after] == [row.origin for row in score.worst]
    assert [row["after"] for row in after] == pytest.approx([row.value for row in score.worst], abs=1e-4)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run), "--data", str(tmp_path / "planted.jsonl"), "--worst", "2"])
    first, second, third = capsys.readouterr().out.split("\n\n── ")
    assert ended.value.code == 0 and first.startswith("loss ") and " ± " in first
    for row, shown in zip(score.worst, (second, third), strict=False):
        assert shown.startswith(f"{row.origin}: loss {row.value:.4g}\n") and "⟦" in shown


def test_losses_that_cannot_be_written_are_one_message_and_leave_nothing(train, tmp_path, monkeypatch):
    """It was a traceback: the only one of 269 refused operations."""

    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(measured_rows, "write_json", refuse)
    with pytest.raises(OutputError, match=r"permission denied .*row_losses\.json.*nothing was left there"):
        train("run", "row_losses=2")
    assert not (tmp_path / "run").exists()


def test_measuring_changes_nothing_of_the_training_and_a_resumed_run_keeps_what_was_measured_before(train):
    overrides = ["adapter.dropout=0.1", "trainer.save_strategy=steps", "trainer.save_steps=2"]
    silent, run = train("silent", *overrides), train("measured", *overrides, "row_losses=5")
    assert not (silent / MEASURED_ROWS_FILE).exists()
    first, second = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (silent, run))
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    whole = read(run)
    # Spread evenly over 32 rows.
    assert [row["origin"].rsplit(" ", 1)[1] for row in whole["rows"]] == ["1", "9", "17", "24", "32"]
    assert [len(ranking["rows"]) for ranking in whole["rankings"]] == [5, 5]
    pieces = whole["preview"][0]["pieces"]
    assert len(whole["preview"]) == 3 and {trained for _, trained in pieces} == {True, False}
    shutil.rmtree(run / "adapter")
    stopped = {**whole, "rows": [{**row, "after": None} for row in whole["rows"]], "rankings": []}
    (run / MEASURED_ROWS_FILE).write_text(json.dumps(stopped), encoding="utf-8")
    train("measured", *overrides, "row_losses=5", resume=True)
    assert read(run) == whole


def test_pairs_are_ranked_by_how_little_their_margin_grew(make_pairs_recipe, tmp_path):
    """A third pair is turned round: the training teaches the other two, so this one is learnt against."""
    (tmp_path / "turned.jsonl").write_text(
        "".join(
            json.dumps({"prompt": "Say yes or no.", "chosen": chosen, "rejected": rejected}) + "\n"
            for chosen, rejected in [("yes", "no"), ("yes", "no"), ("no", "yes"), ("yes", "no")]
        ),
        encoding="utf-8",
    )
    settings = ["data.train=turned.jsonl", "row_losses=9", "trainer.max_steps=6", "trainer.learning_rate=1e-2"]
    run = Path(run_training(make_pairs_recipe("run", "dpo", *settings)).run)
    content = read(run)
    (ranking,) = content["rankings"]
    assert ranking["title"] == "Pairs that were learnt least, or against" and ranking["rows"][0]["number"] == 2
    turned, other = content["rows"][2], content["rows"][0]
    # The same two answers the other way round: the margin has the other sign.
    assert (turned["before"], turned["after"]) == pytest.approx((-other["before"], -other["after"]), abs=1e-4)
    assert other["after"] > other["before"]
    assert [side["side"] for side in ranking["rows"][0]["sides"]] == ["chosen", "rejected"]
    (worst,) = evaluate_pairs(str(run), [tmp_path / "turned.jsonl"], 128, worst=1).worst
    assert worst.origin == turned["origin"] and worst.value < 0
    assert [side.side for side in worst.sides] == ["chosen", "rejected"]


@pytest.mark.parametrize(("liked", "expected"), [(True, -6.0), (False, 6.0)])
def test_the_value_of_a_labelled_answer_has_the_sign_of_its_label(liked, expected):
    assert MEASURES["labelled"].find_value([(2.0, 3)], {"label": liked}) == expected


def test_long_texts_are_shortened_in_their_middle():
    pieces = [("a" * 1000, False), ("b" * 901, True), ("c" * 500, False)]
    assert list(_cut_pieces(pieces)) == [
        (f"{'a' * 250} … {'a' * 250}", False),
        (f"{'b' * 450} … {'b' * 450}", True),
        ("c" * 500, False),
    ]
    assert next(iter(_cut_pieces(pieces * 3))) == ("… ", False) and len(list(_cut_pieces(pieces * 3))) == 7


def test_a_negative_number_of_rows_is_refused(tmp_path, make_recipe):
    with pytest.raises(RecipeError, match="row_losses: must be a number of rows, or 0"):
        make_recipe("run", "row_losses=-1")
