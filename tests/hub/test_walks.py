"""Walks of a user whose rows and base lie on the hub: what each verb fetches, and what works without the hub."""

import json
import shutil

import datasets
import huggingface_hub
import pytest

from finetune.cli.main import main
from finetune.data.reading import sources

TEXTS = {"config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}
ROWS = [{"prompt": f"Question {number}", "completion": f"Answer {number}"} for number in range(12)]
PAIRS = [{"prompt": f"Question {number}", "chosen": "Yes, it is.", "rejected": "No."} for number in range(12)]
SPLITS = {"train.jsonl", "test.jsonl"}
HUB = [
    "model.checkpoint=someone/nano",
    "data.train=[{hub: someone/rows}]",
    "data.eval=[{hub: someone/rows, split: test}]",
]


@pytest.fixture
def call(hub, nano, make_recipe, tmp_path, capsys, monkeypatch):
    """Return a function that runs a verb on a recipe with base and rows of the hub, or on a run, and gives status and text."""
    hub.add_folder("someone/nano", nano)
    for name, rows in (("someone/rows", ROWS), ("someone/pairs", PAIRS)):
        train = "".join(json.dumps(row) + "\n" for row in rows[:-2])
        test = "".join(json.dumps(row) + "\n" for row in rows[-2:])
        files = {"train.jsonl": train.encode(), "test.jsonl": test.encode(), "paper.pdf": b"x" * 99}
        hub.add(name, files, kind="datasets")
    make_recipe("run")
    monkeypatch.chdir(tmp_path)

    def run(verb, *words, settings=HUB):
        if not words:
            words = ("recipe.yaml", *(word for setting in settings for word in ("-s", setting)))
        sources._load_dataset.cache_clear()
        hub.forget()
        with pytest.raises(SystemExit) as ended:
            main([verb, *words])
        shown = capsys.readouterr()
        return ended.value.code, shown.out + shown.err

    return run


def test_a_run_on_rows_of_the_hub(call, hub, tmp_path, monkeypatch):
    status, text = call("train", settings=[*HUB, "trainer.max_steps=1"])
    assert status == 0, text
    assert hub.list_fetched() == TEXTS | SPLITS | {"model.safetensors"}
    run = tmp_path / "runs" / "recipe"
    places = json.loads((run / "run.json").read_text())["hub"]
    assert {(place["kind"], place["repository"]) for place in places} == {
        ("model", "someone/nano"),
        ("dataset", "someone/rows"),
    }
    # Everything is here now: the run is used, and its rows are read, without a request.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for words in (
        ("evaluate", str(run), "--data", "held.jsonl"),
        ("chat", str(run), "--prompt", "Who are you?", "--max-new-tokens", "2"),
        ("preview", str(run / "recipe.yaml")),
    ):
        status, text = call(*words)
        assert status == 0, text
        assert hub.log == []
    assert "Answer" in text
    shutil.rmtree(tmp_path / "own-cache")
    shutil.rmtree(tmp_path / "hub-cache")
    shutil.rmtree(tmp_path / "datasets-cache")
    status, text = call("preview")
    assert status == 2 and "someone/nano: the network is switched off by HF_HUB_OFFLINE" in text
    status, text = call("preview", settings=["model.checkpoint=nano", *HUB[1:]])
    assert status == 2 and "someone/rows/train" in text and "the network is switched off by HF_HUB_OFFLINE" in text
    assert hub.log == []


@pytest.mark.parametrize(
    ("verb", "fetched"),
    [("check", set()), ("preview", TEXTS | SPLITS), ("lint", TEXTS | SPLITS), ("plan", TEXTS)],
)
def test_a_verb_fetches_what_it_needs(call, hub, verb, fetched):
    """Issue 19, B12: 4.85 GB were fetched and folded to show rows. A plan reads no rows."""
    status, text = call(verb)
    assert status == 0, text
    assert hub.list_fetched() == fetched
    assert hub.log or verb == "check"


def test_pairs_of_the_hub(call, hub):
    pairs = [setting.replace("someone/rows", "someone/pairs") for setting in HUB]
    status, text = call("preview", settings=[*pairs, "method=dpo"])
    assert status == 0, text
    assert "Yes, it is." in text
    assert hub.list_fetched() == TEXTS | SPLITS
    status, text = call("preview", settings=[*HUB, "method=dpo"])
    assert status == 2 and "someone/rows/train" in text and "pair" in text


def test_a_split_that_is_not_there(call):
    status, text = call("preview", settings=[*HUB[:2], "data.eval=[{hub: someone/rows, split: dev}]"])
    assert status == 2 and "someone/rows/dev" in text and "test" in text and "name one with config: or split:" in text
