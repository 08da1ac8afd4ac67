"""`finetune clean` by the command line: every planted row is found by its step, and no row is lost or counted twice."""

import json
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from finetune.cleaning import clean_run
from finetune.cleaning.step_form import Drop, StepResult
from finetune.cleaning.step_table import Step
from finetune.cleaning.steps.answer_steps import share_out
from finetune.cli.main import main
from finetune.data.lint.near_duplicates import choose_bands
from finetune.models.opening import open_model

LONG = (
    "The {0} brown fox jumps over the lazy dog while seven wizards brew a pot of strong black tea near the old mill, and "
    "{0} of the neighbours bring bread, butter and a jar of honey from the bees behind the house on the hill."
)
HELD = "Natalia sold clips to forty-eight of her friends in April, and then she sold half as many clips in May."
RECIPE = """
model: {checkpoint: nano}
data: {train: [rows.jsonl, more.jsonl], max_tokens: 1024}
seed: 7
"""


def row(asked, said, **others):
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}], **others}


@pytest.fixture
def clean(capsys, tmp_path, monkeypatch, nano_llama):
    """Return a function that cleans rows by the command line; it gives the status, the result and the rows that were written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def run(lines, *settings, more=(), name="out"):
        for file, content in (("rows.jsonl", lines), ("more.jsonl", [*more, row("Was ist das?", "Das ist ein Haus.")])):
            texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in content]
            (tmp_path / file).write_text("\n".join(texts) + "\n", encoding="utf-8")
        options = [part for setting in settings for part in ("-s", setting)]
        with pytest.raises(SystemExit) as ended:
            main(["clean", "recipe.yaml", "-o", name, "--json", *options])
        shown = capsys.readouterr()
        if ended.value.code:
            return ended.value.code, shown.err, None
        written = [
            json.loads(line)
            for file in sorted((tmp_path / name).glob("*.jsonl"), reverse=True)
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        return 0, json.loads(shown.out), written

    return run


def name_dropped(report):
    return {step["name"]: step["kinds"] for step in report["steps"]}


def test_each_planted_row_leaves_by_its_step(clean, tmp_path):
    good = [row("Why is the sky blue?", "Air scatters blue light."), row("为什么天是蓝的？", "空气散射蓝光。")]
    planted = [
        "{broken",
        {"messages": [{"role": "assistant", "content": "I begin."}]},
        row("Say it loudly.", "It is wrong!!!!!!!!!!"),
        row("What is it called?", "å¾®è½¯å…¬å¸ is the name of it."),
        good[0],
        row("Tell me the story.", LONG.format("quick")),
        row("Tell me another story.", LONG.format("quick").replace("bread,", "bread and")),
        row("Copy this: " + HELD, "As you wish, here it is."),
        row("What is 6 x 7?", "It must be #### 41", answer="42"),
        row("What is 6 x 8?", "It must be #### 48", answer="48"),
    ]
    (tmp_path / "held.jsonl").write_text(json.dumps({"question": HELD}) + "\n", encoding="utf-8")
    status, report, written = clean(
        [*good, *planted],
        "clean.unreadable=true",
        "clean.rules=[repeated_punctuation, mojibake]",
        "clean.exact_duplicates=true",
        "clean.near_duplicates.threshold=0.7",
        "clean.decontaminate.against=held.jsonl",
        "clean.verify.answers=true",
    )
    assert status == 0
    assert name_dropped(report) == {
        "unreadable": {"role_order": 1, "unreadable": 1},
        "rules": {"mojibake": 1, "repeated_punctuation": 1},
        "exact_duplicates": {"duplicate": 1},
        "near_duplicates": {"near duplicate (trained)": 1},
        "decontaminate": {"shared with an evaluation set": 1},
        "verify": {"wrong answer": 1},
    }
    assert (report["rows_in"], report["rows_out"]) == (13, 5)
    assert report["files"] == {"rows.jsonl": 4, "more.jsonl": 1}
    assert [{key: value for key, value in line.items() if key != "provenance"} for line in written] == [
        *good,
        planted[5],
        planted[9],
        row("Was ist das?", "Das ist ein Haus."),
    ]
    passed = ["unreadable", "rules", "exact_duplicates", "near_duplicates", "decontaminate", "verify"]
    assert written[2]["provenance"] == {"file": "rows.jsonl", "line": 8, "passed": passed}
    shared = next(step for step in report["steps"] if step["name"] == "decontaminate")["examples"][0]
    assert "held.jsonl, line 1: natalia sold clips to forty eight of her friends in april and then" in shared["reason"]
    record = json.loads((tmp_path / "out" / "clean.json").read_text(encoding="utf-8"))
    assert record["rows_in"] == record["rows_out"] + sum(step["dropped"] for step in record["steps"])
    assert "<script" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_same_rows_are_cleaned_to_the_same_bytes(clean, tmp_path):
    lines = [row(f"What is {n} + {n}?", f"It is {2 * n}.") for n in range(40)]
    settings = ("clean.exact_duplicates=true", "clean.mix={shares: {Latin: 1}, rows: 20}")
    for name in ("one", "two"):
        assert clean(lines, *settings, name=name)[1]["rows_out"] == 20
    for file in ("rows.jsonl", "clean.json", "report.html"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_group_without_rows_is_an_error_that_names_what_was_found(clean, tmp_path):
    """It emptied the set, with status 0."""
    lines = [row("Why so?", "Because it is.", kind="talk")] * 3 + [row("为什么？", "因为是这样。", kind="talk")]
    status, text, _ = clean(lines, "clean.mix={key: kind, shares: {talk: 1, code: 1}}")
    assert status == 2 and not (tmp_path / "out").exists()
    assert "clean.mix.shares: no row is of the group code" in text
    assert "found are talk Latin (3), talk Chinese (1), Latin (1); take it out" in text


@pytest.mark.parametrize("unreadable", ["true", "false"])
def test_a_file_without_rows_is_an_error_and_no_row(clean, tmp_path, unreadable):
    """It counted as one row, and the message spoke of what follows in it."""
    (tmp_path / "none.jsonl").touch()
    settings = ("data.train=[rows.jsonl, none.jsonl]", f"clean={{exact_duplicates: true, unreadable: {unreadable}}}")
    status, text, _ = clean([row("a?", "b")], *settings)
    assert status == 2 and not (tmp_path / "out").exists()
    assert "none.jsonl: the file holds no rows; mend the file, or take it out of data.train" in text


def test_training_reads_what_was_cleaned_and_says_nothing_of_its_provenance(clean, tmp_path, capsys):
    clean([row("Why so?", "Because it is.")] * 2, "clean.exact_duplicates=true")
    with pytest.raises(SystemExit):
        main(["preview", "recipe.yaml", "-s", "data.train=out/rows.jsonl", "--json"])
    assert json.loads(capsys.readouterr().out)["counts"]["notes"] == []


def test_a_broken_row_is_an_error_where_no_step_leaves_it_out(clean, tmp_path):
    status, message, _ = clean(["{broken"], "clean.exact_duplicates=true")
    assert status == 2
    assert "rows.jsonl, line 1: broken JSON" in message and "set clean.unreadable: true" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more.jsonl", "recipe.yaml", "rows.jsonl"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("clean.rulez=[mojibake]", "clean.rulez: unknown key; did you mean 'rules'?"),
        ("clean.rules=[mojibak]", "clean.rules: 'mojibak' is no rule; did you mean 'mojibake'?"),
        ("clean.rules=[duplicate]", "it is a step of its own"),
        ("clean.near_duplicates={threshold: 0.8, compare: []}", "compare: names nothing; name at least one of trained"),
        ("clean.near_duplicates.threshold=80", "must be above 0 and at most 1, such as 0.8; found 80"),
        ("clean.decontaminate.against=gone.jsonl", "clean.decontaminate.against: gone.jsonl is no task"),
        ("clean.mix.shares={code: 0}", "clean.mix.shares.code: must be above 0"),
        ("seed=1", "clean: names no step; set at least one of unreadable, rules"),
        ("data.train={path: rows.jsonl, rows: 3}", "all rows are cleaned"),
    ],
)
def test_what_is_wrong_with_the_section_is_named(clean, setting, message):
    status, text, _ = clean([row("a?", "b")], setting)
    assert status == 2 and message in text


def test_of_rows_that_are_nearly_the_same_the_best_stays(clean):
    lines = [row(f"Story {n}?", LONG.format("quick"), quality=score) for n, score in enumerate([1, 3, 2])]
    settings = ("clean.near_duplicates={threshold: 0.8, best_by: quality}",)
    written = clean(lines, *settings)[2]
    assert [line.get("quality") for line in written] == [3, None]
    assert [line.get("quality") for line in clean(lines, "clean.near_duplicates.threshold=0.8", name="b")[2]] == [
        1,
        None,
    ]


def test_a_score_of_any_size_or_kind_orders_the_rows(clean):
    """A whole number of more digits than a float takes ended in a traceback."""
    scores = [3, "9", None, True, "nan", 10**400, -(10**400), [9]]
    lines = [row(f"Story {n}?", LONG.format("quick"), quality=score) for n, score in enumerate(scores)]
    written = clean(lines, "clean.near_duplicates={threshold: 0.8, best_by: quality}")[2]
    assert [line["messages"][0]["content"] for line in written] == ["Story 5?", "Was ist das?"]


def test_complexity_is_a_direct_computation_whatever_the_batch_size(clean, nano_llama, monkeypatch, tmp_path):
    lines = [row("Why? " * n, "Because of " + "this " * n) for n in (1, 9, 3, 20, 2)]
    found = []
    for size in (1, 3):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / f"cache{size}"))  # no loss from the other batch size
        monkeypatch.setattr(
            "finetune.cleaning.steps.complexity.find_cache", lambda size=size: tmp_path / f"losses{size}"
        )
        setting = f"clean.complexity={{drop_above: 100, length_weight: 0.01, loss_weight: 2, batch_size: {size}}}"
        written = clean(lines, setting, name=f"out{size}")[2]
        found.append([line["provenance"]["scores"] for line in written])
    loaded = open_model("nano")
    for line, one, three in zip(written, *found, strict=True):
        ids, labels = encode(loaded, line)
        with torch.no_grad():
            loss = loaded.model(input_ids=ids, labels=labels).loss.item()
        assert one["loss"] == pytest.approx(loss, abs=1e-5)
        assert three["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert one["complexity"] == pytest.approx(0.01 * ids.shape[1] + 2 * loss, abs=1e-4)


def encode(loaded, line):
    """Tokens and labels by the template itself: the answer is what the prompt is not."""
    render = loaded.tokenizer.apply_chat_template
    template = loaded.template.source
    ids = render(line["messages"], chat_template=template, return_dict=False)
    prompt = render(line["messages"][:1], chat_template=template, add_generation_prompt=True, return_dict=False)
    return torch.tensor([ids]), torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])


def test_rows_above_the_complexity_leave(clean):
    _, report, written = clean(
        [row("a?", "b")], "clean.complexity={drop_above: 0.5, length_weight: 0.01, loss_weight: 0}"
    )
    assert [line["provenance"]["scores"]["complexity"] < 0.5 for line in written] == [True, True]
    assert report["rows_out"] == 2


def test_a_step_that_loses_a_row_is_a_fault_of_the_kit(clean, monkeypatch, tmp_path):
    """A row that is named as dropped and was not there would make the counts wrong."""
    step = Step("unreadable", lambda section: True, lambda context, rows: StepResult({99: Drop("odd", "odd")}))
    monkeypatch.setattr(clean_run, "STEPS", (step,))
    with pytest.raises(RuntimeError, match="3 rows in, 3 out and 1 dropped"):
        clean([row("a?", "b")] * 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("found", "shares", "most", "counts"),
    [
        ({"a": 100, "b": 100}, {"a": 0.75, "b": 0.25}, None, {"a": 100, "b": 33}),
        ({"a": 39, "b": 61}, {"a": 0.39, "b": 0.61}, None, {"a": 39, "b": 61}),
        ({"a": 100, "b": 100, "c": 100}, {"a": 1, "b": 1, "c": 1}, 10, {"a": 4, "b": 3, "c": 3}),
        ({"a": 5, "b": 0}, {"a": 1, "b": 1}, None, {"a": 0, "b": 0}),
    ],
)
def test_shares_are_kept(found, shares, most, counts):
    assert share_out(found, shares, most) == counts


@pytest.mark.parametrize(("similar", "slots", "bands"), [(0.8, 128, 16), (0.5, 128, 64), (0.9, 256, 16), (1.0, 128, 1)])
def test_bands_find_what_is_similar(similar, slots, bands):
    assert choose_bands(similar, slots) == bands
    assert 1 - (1 - similar ** (slots // bands)) ** bands >= 0.94


@pytest.mark.parametrize(
    ("rule", "answer", "loose", "strict"),
    [
        ("too_long", "word " * 90, "80", "900"),
        ("mojibake", "It isnâ€™t so.", "1", "2"),
        ("repeated_punctuation", "It is so!!!!", "4", "5"),
        ("repeated_punctuation", "So it is!?!?!?", "4", "5"),
        ("one_word", "Certainly indeed.", "2", "1"),
        (
            "mixed_scripts",
            "天空是蓝色的，because short waves are scattered 所以我们看到 blue light from all sides of it 就是这样的",
            "0.3",
            "0.6",
        ),
        ("other_language", "我们都说很多不同的话，比如说这个 and that", "0.6", "0.99"),
    ],
)
def test_a_rule_has_its_threshold(clean, rule, answer, loose, strict):
    for value, left in ((loose, 1), (strict, 0)):
        settings = (f"clean.rules=[{rule}]", f"clean.thresholds.{rule}={value}")
        _, report, _ = clean([row("What do you say about this?", answer)], *settings, name=f"out{value}")
        assert (value, report["steps"][0]["dropped"]) == (value, left)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("clean.thresholds.one_word=3",),
            "clean.thresholds.one_word: has no effect, because clean.rules does not name",
        ),
        (
            ("clean.rules=[mojibake]", "clean.thresholds.mojibake=0"),
            "clean.thresholds.mojibake: must lie from 1 to 1,000,000; found 0",
        ),
        (
            ("clean.rules=[repeated_punctuation]", "clean.thresholds.repeated_punctuation=1"),
            "repeated_punctuation: must lie from 2 to 1,000,000; found 1",
        ),
        (("clean.rules=[mixed_scripts]", "clean.thresholds.mixed_scripts=3"), "must be a share above 0 and at most 1"),
        (
            ("clean.decontaminate.against=gsm9k",),
            "gsm9k is no task (lambada, gsm8k, ",
        ),
        (("clean.decontaminate={against: rows.jsonl, task_data: .}",), "has no effect, because against names no task"),
        (("clean.mix={classifier: gone, shares: {a: 1}}",), "clean.mix.classifier: gone does not exist"),
        (("clean.mix={classifier: ., shares: {a: 1}}",), "cannot be opened as a classifier"),
        (("clean.mix={classifier: ., key: kind, shares: {a: 1}}",), "kinds come from clean.mix.key already"),
    ],
)
def test_what_is_wrong_with_thresholds_tasks_and_classifiers_is_named(clean, settings, message):
    status, text, _ = clean([row("a?", "b")], *settings)
    assert status == 2 and message in text


def test_tasks_are_named_in_place_of_files(clean, tmp_path):
    (tmp_path / "tasks").mkdir()
    task = {"question": HELD, "answer": "It is 72. #### 72"}
    (tmp_path / "tasks" / "gsm8k_test.jsonl").write_text(json.dumps(task) + "\n", encoding="utf-8")
    lines = [row("Copy this: " + HELD, "As you wish."), row("Why so?", "Because it is.")]
    for number, data in enumerate(("tasks", "tasks/gsm8k_test.jsonl")):
        _, report, written = clean(
            lines, f"clean.decontaminate={{against: [gsm8k], task_data: {data}}}", name=f"out{number}"
        )
        assert len(written) == 2
    assert [line["messages"][0]["content"] for line in written] == ["Why so?", "Was ist das?"]
    assert "shared with an evaluation set: gsm8k, row 1: natalia sold" in report["steps"][0]["examples"][0]["reason"]


def test_a_task_that_cannot_be_fetched_is_one_message(clean, tmp_path):
    """The machine of the tests has no network, as in a room without one."""
    status, message, _ = clean([row("a?", "b")], "clean.decontaminate.against=gsm8k")
    assert status == 2 and "openai/gsm8k" in message and "clean.decontaminate.task_data names a file instead" in message
    assert not (tmp_path / "out").exists()


@pytest.fixture
def classifier(tmp_path, nano_llama):
    """A folder of a small classifier of three kinds, with drawn weights."""
    torch.manual_seed(3)
    names = dict(enumerate(("maths", "code", "talk")))
    config = LlamaConfig(
        vocab_size=AutoTokenizer.from_pretrained(nano_llama).vocab_size + 64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label=names,
        label2id={name: number for number, name in names.items()},
        max_position_embeddings=64,
    )
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=1.0)
    model.save_pretrained(tmp_path / "kinds")
    AutoTokenizer.from_pretrained(nano_llama).save_pretrained(tmp_path / "kinds")
    return tmp_path / "kinds"


def test_kinds_come_from_a_classifier_that_the_recipe_names(clean, classifier, monkeypatch, tmp_path):
    """Each row alone through the library's classes is the reference; padding and the cache change nothing."""
    monkeypatch.setattr("finetune.cleaning.steps.kinds.find_cache", lambda: tmp_path / "cache")
    ends = ("red", "of", "seven", "The", "Paris")
    lines = [row(f"Question {n}?", "So it is " * (n % 4 * 12) + ends[n % 5]) for n in range(24)]
    model, tokenizer = (
        LlamaForSequenceClassification.from_pretrained(classifier),
        AutoTokenizer.from_pretrained(classifier),
    )
    expected = []
    for line in lines:
        text = "\n".join(turn["content"] for turn in line["messages"])
        ids = tokenizer(text, truncation=True, max_length=64, return_tensors="pt").input_ids
        expected.append(model.config.id2label[model(input_ids=ids).logits[0].argmax().item()])
    (first, _), *others = Counter(expected).most_common()
    assert others  # else nothing would be told apart
    settings = f"clean.mix={{classifier: kinds, shares: {{{first}: 1}}}}"
    for name in ("one", "two"):
        written = clean(lines, settings, name=name)[2]
        of_rows = [line["messages"][0]["content"] for line in written if "Question" in line["messages"][0]["content"]]
        assert of_rows == [
            line["messages"][0]["content"] for line, kind in zip(lines, expected, strict=True) if kind == first
        ]
        monkeypatch.setattr("finetune.cleaning.steps.kinds.Classifier.name_labels", None)  # the cache knows all labels
    status, message, _ = clean(lines, "clean.mix={classifier: kinds, shares: {poetry: 1}}", name="three")
    assert status == 2 and "names no label of" in message and "code, maths, talk" in message


def test_a_checkpoint_without_a_trained_head_is_no_classifier(clean, nano_llama):
    """The library would draw the weights of the head, and kinds would be chance."""
    status, message, _ = clean([row("a?", "b")], f"clean.mix={{classifier: {nano_llama}, shares: {{LABEL_0: 1}}}}")
    assert status == 2 and "score.weight, so it is no trained classifier" in message
