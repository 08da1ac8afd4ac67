"""EVA, CorDA and LoftQ: what an adapter begins with, that it is trained, resumed to the bit and exported as it was trained."""

import shutil
from pathlib import Path

import bitsandbytes.functional
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import set_seed

from finetune.errors import ExportError, RecipeError, TrainingError
from finetune.exporting.averaging import average_models
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.models.adapters.beginnings import BeginningInputs, prepare_beginning
from finetune.models.adapters.row_texts import RowTexts, pad_texts
from finetune.models.loading import load_base
from finetune.models.lora import attach_adapter
from finetune.models.plain_adapter import describe_use, write_plain_adapter
from finetune.models.precision import Precision
from finetune.recipe.sections import AdapterSection, ModelSection
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.run import run_training

CPU = torch.device("cpu")
FAST = "trainer.learning_rate=1e-2"


def load(folder, quantize="none"):
    return load_base(folder, ModelSection(quantize=quantize), Precision(torch.float32, "no"), CPU)


def make_rows(count=40, length=24):
    """Return rows of random tokens, of which the second half is trained."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(110, 1290, (count, length), generator=generator).tolist()
    labels = [[-100] * (length // 2) + row[length // 2 :] for row in ids]
    return RowTexts(Dataset.from_dict({"input_ids": ids, "labels": labels}), seed=1)


def begin(folder, section, quantize="none", texts=None):
    set_seed(3)
    model = load(folder, quantize)
    texts = make_rows() if texts is None else texts
    apply = prepare_beginning(model, section, BeginningInputs(folder, texts))
    tuned = attach_adapter(model, section, folder)
    apply(tuned)
    return tuned


def list_layers(tuned):
    return [(name, module) for name, module in tuned.get_base_model().named_modules() if isinstance(module, LoraLayer)]


def multiply(layer):
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.scaling["default"] * (b @ a)


@pytest.mark.parametrize("alpha", [4, 16])
def test_loftq_begins_nearer_to_the_base_than_its_quantization(nano_llama, alpha):
    """The sum of quantized weight and adapter misses the base by what a rank of 4 cannot hold, and plain nf4 by more.

    PEFT's function leaves LoRA's scale out: with alpha 16 its adapter would be four times too large.
    """
    stored = load_file(nano_llama / "model.safetensors")
    layers = list_layers(begin(nano_llama, AdapterSection(rank=4, alpha=alpha, init="loftq"), "nf4"))
    assert len(layers) == 28
    for name, layer in layers:
        weight = layer.get_base_layer().weight
        rounded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        error = stored[f"{name}.weight"] - rounded
        left = torch.linalg.matrix_norm(error - multiply(layer)).item()
        assert left < 0.995 * torch.linalg.matrix_norm(error).item(), name
        best = torch.linalg.svdvals(error)[4:].square().sum().sqrt().item()
        assert left == pytest.approx(best, rel=1e-3), name


def test_eva_is_what_peft_finds(nano_llama):
    """The rows of A span what PEFT's own function finds with the same batches; B is zero, so nothing has changed."""
    section = AdapterSection(rank=4, init="eva", targets=("q_proj", "down_proj"), train_tokens=(104,))
    texts = make_rows(22)  # 264 trained tokens are one batch
    tuned = begin(nano_llama, section, texts=texts)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config={"rho": 1.0},
        task_type="CAUSAL_LM",
    )
    with pytest.warns(UserWarning, match="low_cpu_mem_usage"):
        other = get_peft_model(load(nano_llama), config)
    initialize_lora_eva_weights(other, [pad_texts(list(texts), CPU)], show_progress_bar=False)
    for (name, layer), (_, expected) in zip(list_layers(tuned), list_layers(other), strict=True):
        assert torch.allclose(layer.lora_A["default"].weight, expected.lora_A["default"].weight, atol=1e-5), name
        assert not layer.lora_B["default"].weight.any()
    assert len(list_layers(tuned)) == 8


def test_corda_takes_its_part_out_of_the_base(nano_llama):
    stored = load_file(nano_llama / "model.safetensors")
    tuned = begin(nano_llama, AdapterSection(rank=4, init="corda", targets=("v_proj", "down_proj")))
    ids = torch.arange(200, 216).reshape(1, 16)
    with torch.no_grad():
        whole = tuned.eval()(input_ids=ids).logits
        base = load(nano_llama).eval()(input_ids=ids).logits
    assert torch.allclose(whole, base, atol=1e-4)
    for name, layer in list_layers(tuned):
        part = multiply(layer).detach()
        assert part.abs().max() > 1e-3, name
        assert torch.allclose(layer.get_base_layer().weight + part, stored[f"{name}.weight"], atol=1e-5), name


def measure_rest(tuned, texts):
    """Return the share of a layer's output, in the mean over layers, that the base gives without the adapter's part."""
    shares = []

    def see(layer, inputs, output):
        shares.append((layer.get_base_layer()(inputs[0]).norm() / output.norm()).item())

    for _, layer in list_layers(tuned):
        layer.register_forward_hook(see)
    with torch.no_grad():
        tuned.eval()(**pad_texts(list(texts)[:8], CPU))
    return sum(shares) / len(shares)


def test_corda_keeps_more_of_the_outputs_than_pissa(nano_llama):
    """Its part of a weight is chosen by the inputs that the rows give: without that part less of the outputs is left."""
    texts = make_rows(120)
    left = {
        init: measure_rest(
            begin(nano_llama, AdapterSection(rank=8, init=init, targets=("q_proj", "o_proj")), texts=texts), texts
        )
        for init in ("corda", "pissa")
    }
    assert left["corda"] < left["pissa"]


RUNS = {
    "eva": ["adapter.init=eva", "adapter.train_tokens=[104,105]", "adapter.targets=[q_proj]"],
    "corda": ["adapter.init=corda", "adapter.rslora=true", "adapter.targets=[q_proj,down_proj]"],
    "loftq": ["adapter.init=loftq", "model.quantize=nf4", "adapter.targets=[q_proj,down_proj]"],
}


@pytest.mark.parametrize("init", RUNS)
def test_a_run_is_resumed_to_the_bit_and_exported_as_it_was_trained(train, tmp_path, init):
    settings = [*RUNS[init], FAST, "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.max_steps=2"]
    straight = train("run", *settings)
    first = load_file(straight / "adapter" / "adapter_model.safetensors")
    for name in ("adapter", "checkpoint-2"):
        shutil.rmtree(straight / name)
    train("run", *settings, resume=True)
    second = load_file(straight / "adapter" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    base = "dequantized" if init == "loftq" else "full"
    report = export_result(
        open_result(straight), tmp_path / "export", ExportSettings("float32", base=base), LogitVerifier()
    )
    assert report.verify.max_abs <= 1e-4
    assert report.verify.effect_kl > 1e-4


def test_a_loftq_adapter_belongs_to_its_quantized_base(train, make_recipe, tmp_path):
    """Merged into the full base, what was rounded off would be there twice: it stayed silent in other tools."""
    run = train("run", *RUNS["loftq"], "trainer.max_steps=1")
    result = open_result(run)
    for base in ("full", "auto"):
        with pytest.raises(ExportError, match=f"--base {base}: the adapter began with loftq.*use --base dequantized"):
            export_result(result, tmp_path / "export", ExportSettings(base=base), LogitVerifier())
    with pytest.raises(ExportError, match="belongs to that quantized base alone"):
        write_plain_adapter(result, tmp_path / "plain")
    with pytest.raises(ExportError, match="export it first, and average the exports"):
        average_models([str(run), str(run)], tmp_path / "mean")
    assert "belongs to that quantized base alone" in describe_use(run / "adapter")
    later = make_recipe("later", f"model.checkpoint={run}")
    assert (later.recipe.adapter.init, later.recipe.model.quantize) == ("loftq", "nf4")
    with pytest.raises(RecipeError, match=r"adapter.init: .* was trained with loftq, and its adapter must keep that"):
        make_recipe("other", f"model.checkpoint={run}", "adapter.init=default")
    assert open_result(Path(run_training(later).run)).lineage.init == "loftq"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["adapter.init=loftq"], "what 4 bits round off the base weights; set model.quantize: nf4.*found model.quantize: none"),
        (["adapter.init=loftq", "model.quantize=int8"], "found model.quantize: int8"),
        (["adapter.init=corda", "model.quantize=nf4"], "corda changes the base weights before step 1"),
        (["adapter.init=loftq", "model.quantize=nf4", "adapter.dora=true"], "adapter.dora: cannot be combined with adapter.init: loftq"),
        (["adapter.init=gaussian"], "adapter.init: must be one of default, pissa, olora, eva, corda, loftq; found 'gaussian'"),
    ],
)  # fmt: skip
def test_beginnings_that_cannot_be(make_recipe, settings, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe("run", *settings)


@pytest.mark.parametrize("init", ["eva", "corda", "pissa"])
def test_a_rank_beyond_the_layers(nano_llama, init):
    with pytest.raises(
        TrainingError,
        match=f"adapter.rank: {init} finds at most 64 directions in a layer of this base; lower the rank; found 65",
    ):
        begin(nano_llama, AdapterSection(rank=65, init=init))


def test_too_few_rows_for_eva_end(nano_llama):
    """PEFT passes over batches of fewer tokens than the rank, and goes round for ever where there are no others."""
    with pytest.raises(
        TrainingError, match=r"eva needs at least 16 trained tokens, adapter.rank, and the rows have fewer"
    ):
        begin(nano_llama, AdapterSection(rank=16, init="eva"), texts=make_rows(1))


def test_directions_that_do_not_settle_end(nano_llama, monkeypatch):
    monkeypatch.setattr("finetune.models.adapters.beginnings._MOST_PASSES", 1)
    with pytest.raises(TrainingError, match="the directions of eva still change after 1 pass over 2 batches"):
        begin(nano_llama, AdapterSection(rank=4, init="eva"))


def test_texts_of_every_shape_of_rows():
    pairs = Dataset.from_dict({"prompt_ids": [[1, 2]], "chosen_ids": [[3]], "rejected_ids": [[4, 5]]})
    answers = Dataset.from_dict({"prompt_ids": [[1, 2]], "completion_ids": [[3]], "label": [True]})
    prompts = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[-100] * 3]})
    assert [text.ids for rows in (pairs, answers, prompts) for text in RowTexts(rows, 0)] == [[1, 2, 3]] * 3
    assert [text.trained for rows in (pairs, answers) for text in RowTexts(rows, 0)] == [[False, False, True]] * 2
    batch = pad_texts(
        [*RowTexts(pairs, 0), *RowTexts(Dataset.from_dict({"input_ids": [[7]], "labels": [[7]]}), 0)], CPU
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 3], [7, -100, -100]]
