"""An average is the mean of what exports would hold, rounded once; what differs in more than its weights is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.cli.main import main
from finetune.errors import ExportError, FinetuneError
from finetune.exporting.averaging import average_models
from finetune.exporting.merge import export_result
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.yulan.shards import StoredTensors, TensorSpec, write_shards


@pytest.fixture
def write_model(nano_llama, tmp_path):
    """Return a function that writes nano's Llama form with every weight multiplied, and settings changed."""

    def write(name, factor, dtype=torch.float32, **settings):
        folder = tmp_path / name
        folder.mkdir()
        for file in nano_llama.iterdir():
            if file.suffix != ".safetensors" and file.name != "manifest.json" and file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        tensors = {key: (tensor * factor).to(dtype) for key, tensor in load_all(nano_llama).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))
        return folder

    return write


def load_all(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def test_models_of_several_types_and_shards(write_model, nano_llama, tmp_path):
    half, double = write_model("half", 0.5), write_model("double", 2.0, torch.bfloat16)
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in load_all(half).items()]
    tensors = load_all(half)
    (half / "model.safetensors").unlink()
    write_shards(half, specs, StoredTensors(tensors), 2_000_000)
    report = average_models([str(half), str(double), "nano"], tmp_path / "mean")
    mean, base, rounded = load_all(tmp_path / "mean"), load_all(nano_llama), load_all(double)
    assert report.dtype == "float32" and mean.keys() == base.keys()
    for name, tensor in mean.items():
        expected = (base[name].double() * 1.5 + rounded[name].double()) / 3
        assert torch.equal(tensor, expected.float()), name
    assert json.loads((tmp_path / "mean/config.json").read_text())["rope_theta"] == json.loads(
        (nano_llama / "config.json").read_text()
    ).get("rope_theta", 10_000.0)
    AutoModelForCausalLM.from_pretrained(tmp_path / "mean")


def test_runs_are_merged_first(chain, tmp_path):
    """The mean of two runs, in bfloat16, by the command line; each run is exported in float32 to compare."""
    runs = [chain / "sft", chain / "dpo"]
    with pytest.raises(SystemExit) as ended:
        main(["average", *map(str, runs), "-o", str(tmp_path / "mean"), "--dtype", "bfloat16"])
    assert ended.value.code == 0
    exports = []
    for run in runs:
        export_result(open_result(run), tmp_path / run.name, ExportSettings("float32", verify=False))
        exports.append(load_all(tmp_path / run.name))
    mean = load_all(tmp_path / "mean")
    assert mean.keys() == exports[0].keys()
    for name, tensor in mean.items():
        expected = (exports[0][name].double() + exports[1][name].double()) / 2
        assert torch.equal(tensor, expected.bfloat16()), name
    assert any(not torch.equal(exports[0][name], exports[1][name]) for name in mean)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps (1e-06 and 1e-05)"),
        ({"rope_theta": 5e5, "rope_parameters": None}, "rope"),
    ],
)
def test_other_settings_are_refused(write_model, tmp_path, settings, named):
    with pytest.raises(ExportError, match="differ in ") as refused:
        average_models(["nano", str(write_model("other", 1.0, **settings))], tmp_path / "mean")
    assert named in str(refused.value) and not (tmp_path / "mean").exists()


def test_other_tokens_are_refused(write_model, tmp_path):
    other = write_model("other", 1.0)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = list(vocabulary)[-1]
    vocabulary["▁zzzz"] = vocabulary.pop(last)
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if last not in "".join(pair)]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ExportError, match="differ in their tokens"):
        average_models(["nano", str(other)], tmp_path / "mean")


@pytest.mark.parametrize("names", [["nano"], ["nano", "nanno"], ["nano", "runs/none"]])
def test_what_cannot_be_averaged_leaves_nothing(tmp_path, names, nano_llama):
    with pytest.raises(FinetuneError):
        average_models(names, tmp_path / "mean")
    assert list(tmp_path.iterdir()) == []
