"""Universal checkpoints of every kind are read to the same tensors, and damaged ones refused without running anything."""

import json
import random
import shutil

import pytest
import torch

from finetune.cli.main import main
from finetune.errors import CheckpointError
from finetune.yulan.native.modeling import load_native
from finetune.yulan.states.optimizer_states import (
    OptimizerStates,
    ParameterState,
    StateGroup,
    check_parameters,
    load_file,
    open_states,
    read_state,
)
from finetune.yulan.states.state_files import write_states
from finetune.yulan.states.state_report import report_states

NAME = "model.norm.weight"
PARTS = ("fp32", "exp_avg", "exp_avg_sq")


@pytest.fixture
def universal(shared):
    return shared / "reference" / "universal"


@pytest.fixture
def folder(tmp_path):
    """Small states of three parameters at step 7, in two groups; one parameter is tied and another a scalar."""
    tensors = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(SHAPES.items(), 1)}
    write_states(
        tmp_path, 7, GROUPS, lambda name: ParameterState(tensors[name], tensors[name] * 0.1, tensors[name] * 0.01, 7)
    )
    return tmp_path


SHAPES = {NAME: (4,), "model.embed_tokens.weight": (5, 4), "lm_head_alpha": ()}
GROUPS = (
    StateGroup(("model.embed_tokens.weight",), 1e-2, (0.9, 0.95), 1e-15, 0.1),
    StateGroup((NAME, "lm_head_alpha"), 5e-3, (0.9, 0.95), 1e-15, 0.0),
)


def find_part(folder, name=NAME, part="exp_avg"):
    return folder / "global_step7_universal" / "zero" / name / f"{part}.pt"


def assert_equal_states(one, other):
    assert (one.step, one.groups) == (other.step, other.groups)
    for name, shape in one.shapes.items():
        first, second = (read_state(states, name, torch.Size(shape)) for states in (one, other))
        assert first.step == second.step == one.step
        for part in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(vars(first)[part], vars(second)[part]), (name, part)


def copy_case(universal, tmp_path):
    copied = shutil.copytree(universal / "case", tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (copied, *copied.rglob("*")):
        path.chmod(0o755)
    return copied


def test_what_is_written_is_read_back(folder):
    states = open_states(folder)
    assert (states.step, states.groups) == (7, GROUPS)
    assert states.shapes == SHAPES
    state = read_state(states, NAME, torch.Size([4]))
    assert (state.weight.tolist(), state.step) == ([1.0] * 4, 7)
    assert torch.equal(state.exp_avg_sq, torch.full((4,), 0.01))


def test_the_groups_are_those_of_the_file(universal):
    expected = json.loads((universal / "expected.json").read_text())
    for case in ("case", "case_fp32"):
        states = open_states(universal / case)
        assert states.step == 10
        found = [(group.lr, group.weight_decay, list(group.names)) for group in states.groups]
        assert found == [(g["lr"], g["weight_decay"], g["params"]) for g in expected["cases"][case]["groups"]]
        assert {(group.betas, group.eps) for group in states.groups} == {((0.9, 0.95), 1e-15)}


def test_alphas_without_dimensions_are_the_same_tensors(universal):
    assert_equal_states(open_states(universal / "case"), open_states(universal / "variants" / "alphas_0dim_no_cat_dim"))
    assert report_states(universal / "variants" / "alphas_0dim_no_cat_dim").variant_notes == (
        "18 alphas are stored without cat_dim",
    )


def test_storages_of_a_gpu_and_a_wrong_step_elsewhere_change_nothing(universal, tmp_path):
    copied = copy_case(universal, tmp_path)
    variants = universal / "variants"
    shutil.copyfile(
        variants / "mp_rank_00_model_states.cuda0_tags.pt",
        copied / "global_step10_universal" / "mp_rank_00_model_states.pt",
    )
    shutil.copyfile(variants / "trainer_state.readme_style.json", copied / "trainer_state.json")
    assert_equal_states(open_states(universal / "case"), open_states(copied))
    assert report_states(copied).variant_notes == (
        "trainer_state.json says step 0; the kit uses the optimizer state's own step, 10",
    )


def test_a_tied_head_without_moments_and_absent_steps_are_left_aside(folder):
    root = folder / "global_step7_universal"
    model = torch.load(root / "mp_rank_00_model_states.pt")
    model["param_shapes"][0]["lm_head.weight"] = torch.Size([5, 4])
    torch.save(model, root / "mp_rank_00_model_states.pt")
    (root / "zero" / "lm_head.weight").mkdir()
    torch.save({"cat_dim": 0, "param": torch.zeros(5, 4)}, root / "zero" / "lm_head.weight" / "fp32.pt")
    for name in SHAPES:
        find_part(folder, name, "step").unlink()
    states = open_states(folder)
    assert (states.step, set(states.shapes)) == (7, set(SHAPES))
    assert read_state(states, NAME, torch.Size([4])).step == 7
    assert report_states(folder).variant_notes == (
        "lm_head.weight is tied and has no moments of its own; the kit ignores its folder",
        "3 parameters have no step of their own; the kit uses 7",
    )


def test_states_are_those_of_their_model_or_refused(universal):
    model = load_native(universal / "case", dtype=torch.float32)
    states = open_states(universal / "case")
    check_parameters(states, model)
    shapes = dict(states.shapes)
    shapes["model.extra"] = (3,)
    for changed, message in (
        (shapes, r"model\.extra is not the model's \(1 such\)"),
        ({k: v for k, v in states.shapes.items() if k != NAME}, r"model\.norm\.weight is missing \(1 such\)"),
        ({**states.shapes, NAME: (5,)}, r"model\.norm\.weight is misshapen: \[5\], the model's is \[96\]"),
    ):
        other = type(states)(states.folder, states.step, states.groups, changed)
        with pytest.raises(CheckpointError, match=message):
            check_parameters(other, model)


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def damage_file(path, damage):
    if damage == "hostile":
        torch.save({"param": Hostile()}, path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "garbage":
        path.write_bytes(b"not a pickle" * 100)
    elif damage == "shape":
        torch.save({"param": torch.zeros(3)}, path)
    elif damage == "type":
        torch.save({"param": torch.zeros(4, dtype=torch.bfloat16)}, path)
    elif damage == "nan":
        torch.save({"param": torch.full((4,), torch.nan)}, path)
    elif damage == "sparse":
        torch.save({"param": torch.zeros(4).to_sparse()}, path)
    elif damage == "meta":
        torch.save({"param": torch.zeros(4, device="meta")}, path)
    else:
        path.unlink()


@pytest.mark.parametrize(
    "damage", ["hostile", "truncated", "garbage", "shape", "type", "nan", "sparse", "meta", "absent"]
)
@pytest.mark.parametrize("part", ["fp32", "exp_avg_sq"])
def test_a_bad_state_file_is_refused(folder, capsys, part, damage):
    damage_file(find_part(folder, part=part), damage)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight") as caught:
        read_state(open_states(folder), NAME, torch.Size([4]))
    assert len(str(caught.value).splitlines()) == 1
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["hostile", "truncated", "garbage", "shape", "absent"])
@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero/optimizer_state.pt"])
def test_the_command_line_refuses_a_bad_folder(folder, capsys, file, damage):
    damage_file(folder / "global_step7_universal" / file, damage)
    with pytest.raises(SystemExit) as ended:
        main(["checkpoints", "--states", str(folder)])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert "global_step7_universal" in printed.err


def change_model(folder, change):
    path = folder / "global_step7_universal" / "mp_rank_00_model_states.pt"
    model = torch.load(path)
    change(model)
    torch.save(model, path)


ODD_SHAPES = {
    "number": {3: torch.Size([1])},
    "nul": {"a\0b": torch.Size([1])},
    "long": {"a" * 5000: torch.Size([1])},
    "text": {NAME: ("4",)},
    "fraction": {NAME: (6.5,)},
    "below": {NAME: (-4,)},
    "nested": {NAME: ((4,),)},
}


@pytest.mark.parametrize("odd", ODD_SHAPES)
def test_odd_names_and_shapes_are_refused(folder, odd):
    """They ended in tracebacks of json, of the file system or of a sum."""
    change_model(folder, lambda model: model["param_shapes"][1].update(ODD_SHAPES[odd]))
    with pytest.raises(CheckpointError, match="global_step7_universal"):
        open_states(folder)


@pytest.mark.parametrize("step", [torch.inf, -torch.inf, torch.nan, "seven", -1])
@pytest.mark.parametrize("own", [True, False])
def test_steps_that_are_no_number_are_refused(folder, step, own):
    """An infinite one was an OverflowError."""
    for name in SHAPES:
        torch.save(step, find_part(folder, name, "step")) if own else find_part(folder, name, "step").unlink()
    change_model(folder, lambda model: model.update(global_steps=step))
    with pytest.raises(CheckpointError):
        open_states(folder)


def test_huge_learning_rates_are_refused(folder):
    change_model(folder, lambda model: model["lr_scheduler"].update(base_lrs=[10**400, 1e-2]))
    with pytest.raises(CheckpointError, match="is not the optimizer state of a universal checkpoint"):
        open_states(folder)


def test_a_parameter_in_two_groups_is_refused(folder):
    """AdamW refused it, with a traceback, when everything had been loaded."""
    change_model(folder, lambda model: model["param_shapes"][0].update({NAME: torch.Size([4])}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight stands in two groups"):
        open_states(folder)


def test_a_group_of_a_tied_head_alone_is_left_out(folder):
    def add_group(model):
        model["param_shapes"].append({"lm_head.weight": torch.Size([5, 4])})
        model["lr_scheduler"]["base_lrs"].append(1e-2)

    change_model(folder, add_group)
    path = folder / "global_step7_universal" / "zero" / "optimizer_state.pt"
    groups = torch.load(path)
    groups["param_groups"].append(groups["param_groups"][0])
    torch.save(groups, path)
    assert open_states(folder).groups == GROUPS


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_file_is_told_before_anything_is_loaded(folder, part):
    find_part(folder, part=part).unlink()
    with pytest.raises(CheckpointError, match=rf"model\.norm\.weight/{part}\.pt is missing \(1 such.*states: fresh"):
        open_states(folder)


def test_means_of_squares_below_zero_are_refused(folder):
    torch.save({"param": torch.tensor([1.0, -1e-9, 0.0, 1.0])}, find_part(folder, part="exp_avg_sq"))
    with pytest.raises(CheckpointError, match="holds second moments below 0"):
        read_state(open_states(folder), NAME, torch.Size([4]))


@pytest.mark.parametrize("modern", [True, False])
def test_whatever_byte_is_damaged_it_is_read_or_refused(folder, modern):
    """Pickles with a wrong byte failed in ways that were not thought of: IndexError, struct.error, AssertionError."""
    path = find_part(folder, part="fp32")
    torch.save({"cat_dim": 0, "param": torch.ones(4)}, path, _use_new_zipfile_serialization=modern)
    good, generator = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(good)
        for _ in range(3):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            load_file(path)
        except CheckpointError:
            refused += 1
    assert 0 < refused < 400


@pytest.mark.parametrize("pointer", ["../elsewhere", "/etc", "", "\x00", "nowhere"])
def test_a_pointer_that_leads_elsewhere_is_refused(folder, pointer):
    (folder / "latest_universal").write_text(pointer)
    with pytest.raises(CheckpointError):
        open_states(folder)


@pytest.mark.parametrize("name", ["../../secret", "a/b", "..", ""])
def test_a_name_that_leads_out_of_the_folder_is_refused(folder, name):
    path = folder / "global_step7_universal" / "mp_rank_00_model_states.pt"
    model = torch.load(path)
    model["param_shapes"][0] = {name: torch.Size([1]), **model["param_shapes"][0]}
    torch.save(model, path)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        open_states(folder)


@pytest.mark.parametrize("change", [{"lr": float("nan")}, {"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": float("inf")}])
def test_impossible_groups_are_refused(folder, change):
    root = folder / "global_step7_universal"
    model, groups = torch.load(root / "mp_rank_00_model_states.pt"), torch.load(root / "zero" / "optimizer_state.pt")
    if "lr" in change:
        model["lr_scheduler"]["base_lrs"][0] = change["lr"]
    groups["param_groups"][0].update(change)
    torch.save(model, root / "mp_rank_00_model_states.pt")
    torch.save(groups, root / "zero" / "optimizer_state.pt")
    with pytest.raises(CheckpointError, match="AdamW cannot have"):
        open_states(folder)


def test_a_folder_without_states_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="holds no optimizer state "):
        open_states(tmp_path)


def test_the_command_line_shows_what_a_folder_holds(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["checkpoints", "--states", str(folder), "--json"])
    assert not ended.value.code
    report = json.loads(capsys.readouterr().out)
    assert (report["step"], report["parameters"], report["optimizer"]) == (7, 25, "AdamW")
    assert report["groups"][1] == {
        "lr": 5e-3,
        "weight_decay": 0.0,
        "betas": [0.9, 0.95],
        "eps": 1e-15,
        "parameters": 5,
        "tensors": 2,
    }


@pytest.mark.parametrize(
    ("values", "is_fine"),
    [([3e38, 3e38], True), ([-3e38, -3e38, 1.0], True), ([torch.inf, -torch.inf], False), ([0.0, torch.inf], False)],
)
def test_only_values_that_are_not_finite_are_refused(tmp_path, values, is_fine):
    """Their sum tells it quickly, but the sum of huge ones overflows."""
    folder = tmp_path / "zero" / "w"
    folder.mkdir(parents=True)
    for part in ("fp32", "exp_avg"):
        torch.save({"param": torch.tensor(values)}, folder / f"{part}.pt")
    torch.save({"param": torch.tensor(values).abs()}, folder / "exp_avg_sq.pt")
    states = OptimizerStates(tmp_path, 3, (), {"w": (len(values),)})
    if is_fine:
        assert read_state(states, "w", torch.Size([len(values)])).weight.tolist() == pytest.approx(values)
    else:
        with pytest.raises(CheckpointError, match="holds values that are not finite"):
            read_state(states, "w", torch.Size([len(values)]))
