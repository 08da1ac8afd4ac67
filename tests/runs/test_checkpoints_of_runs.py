"""A checkpoint of a run is part of that run: it is opened with the run's base, positions, template and rows, and as exactly.

Each was once taken for an adapter of some other tool: PiSSA's factors were merged into the unchanged base, a raised RoPE base was
lost, and the base was not compared.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import ExportError, FinetuneError
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.files.safety.manifests import write_manifest
from finetune.models.opening import open_model
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.run import run_training

KEPT = ["trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.learning_rate=1e-2"]
SETTINGS = ExportSettings("float32")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.quantize=nf4"],
        ["adapter.init=pissa", "adapter.train_tokens=[104,105]"],
        ["adapter.kind=none", "adapter.rank=16", "adapter.alpha=32"],
        ["model.architecture=native", "model.rope_theta=20000", "model.max_positions=2048"],
    ],
    ids=["nf4", "pissa", "all weights", "native, longer"],
)
def test_the_last_checkpoint_exports_as_the_run_does(train, tmp_path, overrides):
    run = train("run", *KEPT, *overrides)
    exports = []
    for source in (run, run / "checkpoint-4"):
        report = export_result(open_result(source), tmp_path / f"of-{source.name}", SETTINGS, LogitVerifier())
        assert report.verify.max_abs <= 1e-4
        assert report.verify.texts > 0  # the run's own rows, so its tokenizer was compared too
        exports.append(tmp_path / f"of-{source.name}")
    first, second = (load_file(folder / "model.safetensors") for folder in exports)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (exports[0] / name).read_bytes() == (exports[1] / name).read_bytes(), name
    earlier = tmp_path / "earlier"
    export_result(open_result(run / "checkpoint-2"), earlier, SETTINGS)
    third = load_file(earlier / "model.safetensors")
    assert any(not torch.equal(tensor, third[name]) for name, tensor in first.items())


def test_the_base_of_a_checkpoint_is_compared(train, nano_llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(nano_llama, base)
    run = train("run", *KEPT, f"model.checkpoint={base}")
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(ExportError, match="was trained on other weights than"):
        export_result(open_result(run / "checkpoint-2"), tmp_path / "export", SETTINGS)


def test_tokenizer_files_of_a_checkpoint_are_those_of_the_base(train, legacy_base):
    """The trainer's own saving drops `legacy: true`."""
    run = train("run", *KEPT, f"model.checkpoint={legacy_base}", "data.template=yulan-mini", "data.max_tokens=512")
    own, theirs = (
        json.loads((path / "tokenizer_config.json").read_text()) for path in (run / "checkpoint-4", legacy_base)
    )
    template = (Path(__file__).parents[2] / "templates" / "yulan-mini.jinja").read_text()
    assert own == {**theirs, "chat_template": template}
    assert (run / "checkpoint-4" / "chat_template.jinja").read_text() == template
    assert open_model(str(run / "checkpoint-4")).answer("Who are you?", 4).tokens > 0


def test_an_unfinished_run_names_its_checkpoint(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.training.run.write_result", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_training(make_recipe("run", *KEPT))
    run = tmp_path / "run"
    with pytest.raises(
        FinetuneError, match=r"has not finished; resume .* or give its newest checkpoint instead, .*run/checkpoint-4"
    ):
        open_result(run)
    assert open_result(run / "checkpoint-4").lineage.method == "sft"


def test_a_run_continues_from_a_checkpoint(train):
    first = train("first", *KEPT, "adapter.init=pissa")
    second = train("second", f"model.checkpoint={first / 'checkpoint-2'}", "adapter.rank=8", "adapter.alpha=16")
    (earlier,) = open_result(second).lineage.earlier
    assert (earlier.method, Path(earlier.run).name) == ("sft", "checkpoint-2")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("trainer_state.json", r"this checkpoint is not whole \(trainer_state.json is missing\); use another"),
        ("finetune.json", r"this checkpoint is not whole \(finetune.json is missing\); use another"),
        (
            "manifest.json",
            r"this checkpoint is not whole \(it has no manifest.json, so it was not written to the end\)",
        ),
    ],
)
def test_half_a_checkpoint_is_refused(train, lost, message):
    checkpoint = train("run", *KEPT) / "checkpoint-4"
    (checkpoint / lost).unlink()
    with pytest.raises(FinetuneError, match=message):
        open_result(checkpoint)


def test_a_sealed_checkpoint_without_lineage_is_no_adapter_of_another_tool(train):
    checkpoint = train("run", *KEPT) / "checkpoint-4"
    (checkpoint / "finetune.json").unlink()
    write_manifest(checkpoint)
    with pytest.raises(FinetuneError, match=r"lacks finetune\.json"):
        open_result(checkpoint)
