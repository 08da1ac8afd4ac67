"""A run stops at the first number that is NaN or infinite, and never writes weights with one."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ExportError, MachineError, TrainingError
from finetune.exporting.merge import export_result
from finetune.files.safety import manifests
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.runs.trainer_checkpoints import find_complete_checkpoint
from finetune.training import run as run_module
from finetune.training.run import run_training
from finetune.yulan.tensors import find_non_finite, open_tensor_files

SAVES = ["trainer.save_strategy=steps", "trainer.save_steps=1"]


def poison(monkeypatch, change):
    """Change the trainer of the next run just before it trains."""
    real = run_module._train

    def train(resolved, trainer, checkpoint):
        change(trainer)
        return real(resolved, trainer, checkpoint)

    monkeypatch.setattr(run_module, "_train", train)


def test_a_loss_between_two_logged_steps_stops_the_run(make_recipe, monkeypatch):
    """It was looked at only where it was logged: a run that diverged at its last step ended with exit 0."""

    def change(trainer):
        real = trainer.compute_loss

        def compute(*arguments, **options):
            loss = real(*arguments, **options)
            return loss * float("nan") if trainer.state.global_step == 2 else loss

        trainer.compute_loss = compute

    poison(monkeypatch, change)
    recipe = make_recipe("run", *SAVES, "trainer.logging_steps=50")
    with pytest.raises(
        TrainingError, match=r"step 3: the training loss is nan; lower trainer.* from before this step$"
    ):
        run_training(recipe)
    names = {path.name for path in recipe.output.iterdir()}
    assert {"checkpoint-1", "checkpoint-2"} <= names
    assert not names & {"checkpoint-3", "adapter", "model", ".lock"}


def test_a_gradient_that_is_no_number_stops_the_run_before_it_changes_the_weights(make_recipe, monkeypatch):
    kept = {}

    def change(trainer):
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        kept["model"] = trainer.model
        parameter.register_hook(lambda grad: grad * float("inf") if trainer.state.global_step == 1 else grad)

    poison(monkeypatch, change)
    with pytest.raises(TrainingError, match=r"step 2: the gradient norm is (nan|inf)"):
        run_training(make_recipe("run", *SAVES))
    assert all(parameter.isfinite().all() for parameter in kept["model"].parameters())


def test_a_checkpoint_with_weights_that_are_no_numbers_is_not_taken_for_whole(make_recipe, monkeypatch):
    """With one checkpoint kept, it replaced the last good one."""

    def change(trainer):
        real = trainer.save_model

        def save(*arguments, **options):
            if trainer.state.global_step == 3:
                next(p for p in trainer.model.parameters() if p.requires_grad).data[0, 0] = float("nan")
            real(*arguments, **options)

        trainer.save_model = save

    poison(monkeypatch, change)
    recipe = make_recipe("run", *SAVES, "trainer.save_total_limit=1")
    with pytest.raises(TrainingError, match="step 3: weights have become NaN or infinite"):
        run_training(recipe)
    assert find_complete_checkpoint(recipe.output).name == "checkpoint-2"


def test_a_loss_on_held_out_rows_that_is_no_number_stops_the_run(make_recipe, monkeypatch):
    def change(trainer):
        real = trainer.compute_loss

        def compute(model, *arguments, **options):
            found = real(model, *arguments, **options)
            if model.training or not trainer.state.global_step:
                return found
            return (found[0] * float("nan"), *found[1:]) if isinstance(found, tuple) else found * float("nan")

        trainer.compute_loss = compute

    poison(monkeypatch, change)
    overrides = ["trainer.eval_strategy=steps", "trainer.eval_steps=2"]
    with pytest.raises(TrainingError, match="step 2: the loss on held-out rows is nan"):
        run_training(make_recipe("run", *overrides))


def test_weights_that_are_no_numbers_are_never_written(make_recipe, monkeypatch):
    real = run_module._train

    def train(resolved, trainer, checkpoint):
        steps = real(resolved, trainer, checkpoint)
        next(p for p in trainer.model.parameters() if p.requires_grad).data[0, 0] = float("nan")
        return steps

    monkeypatch.setattr(run_module, "_train", train)
    recipe = make_recipe("run", "data.eval=[]")
    with pytest.raises(TrainingError, match="has become NaN or infinite, so no result was written"):
        run_training(recipe)
    assert not (recipe.output / "adapter").exists()


def test_a_killed_worker_of_the_loader_is_one_message(make_recipe, monkeypatch):
    def change(trainer):
        real = trainer.data_collator

        def collate(rows):
            if torch.utils.data.get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(rows)

        trainer.data_collator = collate

    poison(monkeypatch, change)
    with pytest.raises(MachineError, match="a process that loads batches was ended from outside"):
        run_training(make_recipe("run", "trainer.dataloader_num_workers=1"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_export_of_them_is_refused_also_without_a_comparison(train, tmp_path, value):
    run = train("run", "adapter.kind=none", "adapter.rank=16", "adapter.alpha=32", "trainer.max_steps=1")
    tensors = load_file(run / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, run / "model" / "model.safetensors", metadata={"format": "pt"})
    (run / "model" / manifests.MANIFEST_FILE).unlink()
    with pytest.raises(ExportError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinite values"):
        export_result(open_result(run), tmp_path / "export", ExportSettings(verify=False))
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (0, 4)])
def test_every_place_of_a_file_is_looked_at(tmp_path, dtype, shape):
    tensor = torch.ones(shape, dtype=dtype)
    save_file({"good": tensor, "whole": torch.ones(3, dtype=torch.int64)}, tmp_path / "a.safetensors")
    assert find_non_finite(open_tensor_files(tmp_path)) is None
    if tensor.numel():
        tensor.view(-1)[-1] = float("nan")
        save_file({"good": tensor}, tmp_path / "b.safetensors")
        assert find_non_finite(open_tensor_files(tmp_path)) == "good"
