"""An export gives the tokens that were trained: with a tokenizer of the published kind it gave others, and said it was equal."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from finetune.errors import CheckpointError, ExportError
from finetune.evaluation.token_loss import evaluate_path
from finetune.exporting import companions
from finetune.exporting.merge import describe_export, export_result
from finetune.exporting.verify import LogitVerifier
from finetune.models.opening import open_model
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.yulan.tokenizer_files import read_tokenizer_files

SETTINGS = ExportSettings("auto", "2GB")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
HEADER = "<|start_header_id|>user<|end_header_id|>"
QUESTIONS = (
    "the user asks",
    " the answer",
    "who\n\nasks",
    "你好",
    "the user spells </s> and <|eot_id|>",
    "  two spaces",
)


@pytest.fixture
def train_on(train, tmp_path):
    """Return a function that trains a few short rows on a base, and gives the run directory."""
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "the user"}] for text in QUESTIONS]
    turns[0].insert(0, {"role": "system", "content": "answer a user"})
    text = "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)
    (tmp_path / "short.jsonl").write_text(text, encoding="utf-8")

    def run(name, base, *overrides):
        data = ["data.train=short.jsonl", "data.eval=short.jsonl", "trainer.learning_rate=1e-2"]
        return train(name, f"model.checkpoint={base}", *data, *overrides)

    return run


def save_as_transformers_does(base, folder):
    """Write the tokenizer files that an older run, or TRL, leaves in the folder of an adapter."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("legacy_base", []),
        ("legacy_base", ["adapter.kind=none", "adapter.rank=16", "adapter.alpha=32"]),
        ("published_base", []),
    ],
    ids=["adapter", "all-weights", "published"],
)
def test_run_and_export_keep_the_tokenizer_to_the_letter(train_on, request, tmp_path, name, overrides):
    base = request.getfixturevalue(name)
    run = train_on("run", base, *overrides)
    report = export_result(open_result(run), tmp_path / "export", SETTINGS, LogitVerifier())
    assert report.verify.texts == len(QUESTIONS)
    assert f"gives the tokens that were trained, on {len(QUESTIONS)} rows" in describe_export(report)
    result = open_result(run)
    expected = {name: (base / name).read_bytes() for name in FILES}
    for folder in (result.folder, tmp_path / "export"):
        # transformers before 4.50 reads the template from tokenizer_config.json alone; nothing else is added.
        template = json.loads((folder / "tokenizer_config.json").read_bytes())["chat_template"]
        assert template == (folder / "chat_template.jinja").read_text(encoding="utf-8")
        assert read_tokenizer_files(folder) == expected
    assert "▁user" in AutoTokenizer.from_pretrained(tmp_path / "export").tokenize(HEADER)
    losses = [evaluate_path(str(path), [tmp_path / "short.jsonl"], 512) for path in (run, tmp_path / "export")]
    assert losses[1].loss == pytest.approx(losses[0].loss, abs=1e-4)
    assert losses[1].tokens == losses[0].tokens


def test_an_export_with_other_tokens_is_refused(train_on, legacy_base, tmp_path, monkeypatch):
    run = train_on("run", legacy_base)
    right = companions.copy_tokenizer

    def copy_badly(source, folder, template):
        right(source, folder, template)
        save_as_transformers_does(source, folder)

    monkeypatch.setattr(companions, "copy_tokenizer", copy_badly)
    # The sixth spells control tokens, and the text between them is always encoded by itself.
    with pytest.raises(ExportError, match=r"the reopened tokenizer does not give the tokens that were trained: 5 of 6"):
        export_result(open_result(run), tmp_path / "export", SETTINGS, LogitVerifier())
    assert not (tmp_path / "export").exists()


def forget_texts(run):
    for path in run.rglob("texts.json"):
        path.unlink()


def ways_to_use(run, train_on, tmp_path):
    """Return every way to go on with a run: each must refuse wrong tokens, before it leaves anything."""
    return (
        lambda: open_model(str(run)),
        lambda: export_result(open_result(run), tmp_path / "export", SETTINGS),
        lambda: train_on("second", run),
    )


@pytest.mark.parametrize("has_texts", [True, False], ids=["texts", "tokens-alone"])
def test_a_run_whose_tokenizer_was_saved_anew_is_refused_until_it_is_mended(train_on, legacy_base, tmp_path, has_texts):
    """So every run of before this test left its folder: `legacy: true` was dropped."""
    run = train_on("run", legacy_base)
    save_as_transformers_does(legacy_base, run / "adapter")
    if not has_texts:
        forget_texts(run)
    for use in ways_to_use(run, train_on, tmp_path):
        with pytest.raises(
            CheckpointError, match="its tokenizer files do not give the tokens that were trained"
        ) as caught:
            use()
    assert not (tmp_path / "export").exists()
    assert not (tmp_path / "second").exists()
    words = str(caught.value).partition("cp ")[2].split()
    assert words[-1] == str(run / "adapter")
    for file in words[:-1]:
        shutil.copy(file, words[-1])
    for use in ways_to_use(run, train_on, tmp_path):
        use()


def test_a_base_that_lost_legacy_is_named_when_it_is_trained_and_exported(train_on, legacy_base, tmp_path, caplog):
    """It is trained as transformers 5 reads it; other programs read it differently, and nobody was told."""
    save_as_transformers_does(legacy_base, legacy_base)
    run = train_on("run", legacy_base)
    said = [f"{folder}: tokenizer_config.json has no key `legacy`" for folder in (legacy_base, run / "adapter")]
    assert said[0] in caplog.text
    export_result(open_result(run), tmp_path / "export", SETTINGS)
    assert said[1] in caplog.text
    assert (
        "## Tokenizer\n\ntokenizer_config.json has no key `legacy`" in (tmp_path / "export" / "README.md").read_text()
    )


def test_a_run_without_stored_texts_still_opens(train_on, legacy_base, tmp_path):
    run = train_on("run", legacy_base)
    forget_texts(run)
    report = export_result(open_result(run), tmp_path / "export", SETTINGS, LogitVerifier())
    assert report.verify.texts == 0
    assert open_model(str(run)).answer("the user", 4).tokens


def test_an_adapter_of_peft_with_other_tokens_than_its_base_is_refused(legacy_base, tmp_path):
    """Nothing says which tokens it was trained with, and TRL saves the tokenizer as transformers does."""
    model = LlamaForCausalLM.from_pretrained(legacy_base)
    model.name_or_path = str(legacy_base)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    export_result(open_result(tmp_path / "adapter"), tmp_path / "first", SETTINGS, LogitVerifier())
    save_as_transformers_does(legacy_base, tmp_path / "adapter")
    with pytest.raises(
        CheckpointError, match=r"other tokens than those of its base.*With the base's, as is usual: cp "
    ):
        export_result(open_result(tmp_path / "adapter"), tmp_path / "second", SETTINGS, LogitVerifier())
    for name in FILES:
        shutil.copy(legacy_base / name, tmp_path / "adapter")
    export_result(open_result(tmp_path / "adapter"), tmp_path / "second", SETTINGS, LogitVerifier())
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == (legacy_base / "tokenizer.json").read_bytes()
