import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import CheckpointError
from finetune.yulan.modeling import load_native
from finetune.yulan.optimizer_states import OptimizerStates, make_adamw, open_states, read_state
from finetune.yulan.schedules import compute_decay


@pytest.mark.parametrize("schedule", ["stable", "1sqrt"])
def test_fp32_training_goes_on_as_deepspeed_did(shared, schedule):
    root = shared / "reference" / "universal"
    expected = json.loads((root / "expected.json").read_text())
    model = load_native(root / "case_fp32", dtype=torch.float32)
    states = open_states(root / "case_fp32")
    optimizer = make_adamw(model, states)
    batches = load_file(root / "batches.safetensors")["input_ids"]
    for row in expected["cases"]["case_fp32"]["after_resume"][schedule]:
        factor = 1.0 if schedule == "stable" else compute_decay("1-sqrt", row["step"] - 1, 10, 30)
        for group, published in zip(optimizer.param_groups, states.groups, strict=True):
            group["lr"] = published.lr * factor
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(row["lr"])
        ids = batches[row["step"] - 1].long()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(row["loss"], abs=expected["tolerance"]["case_fp32"])
    if schedule == "stable":  # the uninterrupted run, whose end was kept, had no decay
        final = load_file(root / "expected_final_case_fp32.safetensors")
        for name, parameter in model.named_parameters():
            found = {"fp32": parameter, **optimizer.state[parameter]}
            for part in ("fp32", "exp_avg", "exp_avg_sq"):
                wanted = final[f"{part}/{name}"].reshape(parameter.shape)
                assert torch.allclose(found[part], wanted, rtol=0, atol=1e-5), (part, name)


def test_variants_are_read_to_the_same_tensors(shared):
    root = shared / "reference" / "universal"
    plain, variant = open_states(root / "case"), open_states(root / "variants" / "alphas_0dim_no_cat_dim")
    assert (plain.step, plain.groups) == (variant.step, variant.groups) and plain.step == 10
    for name, shape in plain.shapes.items():
        one, other = (read_state(states, name, torch.Size(shape)) for states in (plain, variant))
        assert one.step == other.step == 10
        for part in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(vars(one)[part], vars(other)[part]), (name, part)


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("damage", ["hostile", "truncated", "shape", "nan", "absent"])
def test_a_bad_state_file_is_refused(shared, tmp_path, capsys, damage):
    folder = shutil.copytree(
        shared / "reference" / "universal" / "case", tmp_path / "case", copy_function=shutil.copyfile
    )
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    name = "model.norm.weight"
    path = folder / "global_step10_universal" / "zero" / name / "exp_avg.pt"
    if damage == "hostile":
        torch.save({"param": Hostile()}, path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "shape":
        torch.save({"param": torch.zeros(3)}, path)
    elif damage == "nan":
        torch.save({"param": torch.full((96,), torch.nan)}, path)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        read_state(open_states(folder), name, torch.Size([96]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("values", "is_fine"),
    [([3e38, 3e38], True), ([-3e38, -3e38, 1.0], True), ([torch.inf, -torch.inf], False), ([0.0, torch.inf], False)],
)
def test_only_values_that_are_not_finite_are_refused(tmp_path, values, is_fine):
    """Their sum tells it quickly, but the sum of huge ones overflows."""
    folder = tmp_path / "zero" / "w"
    folder.mkdir(parents=True)
    for part in ("fp32", "exp_avg", "exp_avg_sq"):
        torch.save({"param": torch.tensor(values)}, folder / f"{part}.pt")
    states = OptimizerStates(tmp_path, 3, (), {"w": (len(values),)})
    if is_fine:
        assert read_state(states, "w", torch.Size([len(values)])).weight.tolist() == pytest.approx(values)
    else:
        with pytest.raises(CheckpointError, match="holds values that are not finite"):
            read_state(states, "w", torch.Size([len(values)]))
