"""The plan as a person and a program get it: verdict, parts, work, times."""

import json

import pytest
import torch

from finetune.cli.main import main
from finetune.errors import MachineError
from finetune.files.sizes import GIB, parse_memory
from finetune.pipeline import memory_ladder as ladder
from finetune.planning.doctor import describe_machine, examine_machine
from finetune.planning.duration import count_matrix_weights, count_work, estimate_time
from finetune.planning.forecast import Target, make_plan
from finetune.planning.hardware import CARDS, CONTEXT_BYTES, CUBLAS_BYTES, TYPICAL_CARDS, UTILISATION, find_card
from finetune.yulan.layout import PUBLISHED_SIZES
from tests.planning.conftest import set_batch


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    output = capsys.readouterr()
    return stop.value.code, output.out, output.err


NANO = ("plan", "sft_lora", "-s", "model.checkpoint=nano", "-s", "data.max_tokens=256")


def test_plan_prints_one_object_whose_parts_sum(capsys):
    code, out, _ = run(capsys, *NANO, "--memory", "2GB", "--json")
    plan = json.loads(out)
    assert code == 0
    assert sum(plan["parts"].values()) == plan["peak_bytes"]
    assert plan["parts"]["CUDA context and cuBLAS"] == CONTEXT_BYTES + CUBLAS_BYTES
    assert (plan["fits"], plan["memory_bytes"], plan["suggestions"]) == (True, 2 * GIB, [])
    assert plan["step"]["tokens"] == 256 * 1 * 16
    assert [time["card"] for time in plan["times"]] == list(TYPICAL_CARDS)


def test_plan_says_what_is_too_much_and_what_would_help(capsys):
    _, out, _ = run(capsys, *NANO, "--memory", "512MB")
    assert "does not fit: 0." in out and "of 0.50 GiB" in out
    assert "model.quantize=nf4" in out and "trainer.activation_offloading=true" in out
    assert "-s model.stream_layers=true: layers of the base wait in the host's memory" in out
    assert "estimates: published peak rates x 35%" in out


def test_plan_for_a_cpu_counts_tensors_only(capsys):
    _, out, _ = run(capsys, *NANO, "-s", "trainer.use_cpu=true", "--json")
    plan = json.loads(out)
    assert plan["device"] == "cpu" and plan["peak_bytes"] == plan["tensor_bytes"] and plan["times"] == []


def test_plan_for_one_card_takes_its_memory(capsys):
    _, out, _ = run(capsys, *NANO, "--gpu", "nvidia geforce RTX 4060 laptop GPU", "--json")
    plan = json.loads(out)
    assert plan["memory_bytes"] == 8 * GIB and [time["card"] for time in plan["times"]] == ["RTX 4060 Laptop"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "lots"), "memory: 'lots' is not a memory size; write one such as 8GB"),
        (("--gpu", "RTX 4061"), "did you mean 'rtx 4060'"),
        (("-s", "model.checkpont=x"), "did you mean 'checkpoint'"),
    ],
)
def test_plan_refuses_what_it_does_not_know(capsys, arguments, message):
    code, _, err = run(capsys, *NANO, *arguments)
    assert code == 2 and message in err


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_by_its_name(card):
    assert find_card(f"NVIDIA GeForce {card.name.upper()}") is card
    assert 6 <= card.memory_gib <= 200 and 10 < card.tflops < 3000


def test_memory_is_read_by_powers_of_two():
    assert parse_memory("8GB") == parse_memory("8 gib") == 8 * GIB
    assert parse_memory("24.5gb") == int(24.5 * GIB)
    with pytest.raises(MachineError):
        parse_memory("0GB")


def test_matrices_are_counted_as_published():
    linear, table, width = count_matrix_weights(PUBLISHED_SIZES)
    layer = 1920 * 1920 * 2 + 1920 * 384 * 2 + 3 * 1920 * 4800
    assert (linear, table, width) == (56 * layer, 99_000 * 1920, 1920)


def test_work_follows_what_is_trained(make_recipe):
    linear, table, width = count_matrix_weights(PUBLISHED_SIZES)
    attention = 2 * 1024 * width * 56

    def count(name, *overrides):
        recipe = make_recipe(name, "data.max_tokens=1024", *overrides)
        return count_work(set_batch(recipe, 2, 3), PUBLISHED_SIZES)

    full = count("sft_full", "trainer.gradient_checkpointing=false")
    tokens = 2 * 3 * 1024
    assert full.tokens == tokens
    assert full.flops == int(tokens * (6 * linear + 3.5 * attention + 8 * table))
    lora = count("sft_lora", "adapter.train_tokens=[]")
    assert lora.flops == int(tokens * (6 * linear + 4.5 * attention + 6 * table))  # layers again, weights not
    some = count("sft_lora", "adapter.train_tokens=[]", "trainer.gradient_checkpointing_kwargs={every_n_layers: 4}")
    assert some.flops == int(tokens * (4.5 * linear + 3.75 * attention + 6 * table))  # a quarter of the layers again
    time = estimate_time(full, find_card("A100"))
    assert time.seconds_per_step == pytest.approx(full.flops / (312e12 * UTILISATION))
    assert time.tokens_per_second == pytest.approx(tokens / time.seconds_per_step)


def test_a_plan_counts_the_copies_of_a_fast_adapter(make_recipe):
    """Two bytes for each copied number, and two for its gradient: the trained token rows of the recipe are counted as well."""
    gpu = Target(is_gpu=True)
    plain, fast = (make_plan(make_recipe("sft_qlora", *more), gpu) for more in ([], ["model.speed=auto"]))
    assert fast.tensor_bytes - plain.tensor_bytes == 4 * fast.trainable_parameters


def test_fit_changes_what_keeps_the_training_first(capsys):
    many = ("-s", "trainer.per_device_train_batch_size=8", "-s", "trainer.gradient_checkpointing=false")
    _, out, _ = run(capsys, *NANO, *many, "-s", "adapter.train_tokens=[]", "--memory", "700MB", "--fit", "--json")
    plan = json.loads(out)
    assert plan["fits"]
    first = plan["changes"][0]["change"]
    assert first["settings"] == {
        "trainer.per_device_train_batch_size": 1,
        "trainer.gradient_accumulation_steps": 8 * 16,
    }
    assert first["keeps_training"]
    for step in plan["changes"]:
        assert step["after"] < step["before"]
    assert plan["changes"][-1]["after"] == plan["peak_bytes"] <= plan["memory_bytes"]


def test_fit_gives_up_at_the_smallest_plan(capsys):
    code, out, _ = run(capsys, *NANO, "--memory", "300MB", "--fit")
    assert code == 0 and "does not fit" in out and "(alters the training)" in out


def test_fit_needs_something_to_fit(capsys):
    code, _, err = run(capsys, *NANO, "--fit")
    assert code == 2 and "--memory 8GB" in err


def test_training_refuses_what_cannot_fit_before_loading(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(ladder, "choose_device", lambda use_cpu: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * 2**20, GIB))
    arguments = ["train", *NANO[1:], "-s", f"output={tmp_path / 'run'}"]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "does not fit" in err and "--force" in err and "model.quantize=nf4" in err
    assert not (tmp_path / "run").exists()


def test_doctor_reports_what_runs_here(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert {"device", "memory_bytes", "bf16", "quantization", "attention", "advice"} <= set(report)
    assert report["memory_bytes"] > GIB and "sdpa" in report["attention"] and report["advice"]
    text = describe_machine(examine_machine())
    assert report["device"] in text and "what `auto` becomes here" in text
