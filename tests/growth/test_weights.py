"""The statistics of weights, compared with torch's own on whole tensors of the model as it computes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import CheckpointError
from finetune.exporting.merge import export_result
from finetune.growth.weights.singular_values import find_largest
from finetune.growth.weights.weight_changes import read_weights
from finetune.growth.weights.weight_statistics import find_kind, measure_weights, read_statistics
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.yulan.folding import fold_checkpoint


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.fixture
def native(nano, tmp_path):
    """Nano with alphas that all differ, one of them negative."""
    folder = tmp_path / "native"
    shutil.copytree(nano, folder, ignore=shutil.ignore_patterns("manifest.json"))
    count = iter(range(1000))

    def change(name, tensor):
        if not name.endswith("_alpha"):
            return tensor
        return torch.full_like(tensor, (-1 if "layers.1.self_attn.v" in name else 1) * (0.5 + next(count) / 50))

    change_tensors(folder, change)
    return folder


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (5, 5), (64, 320), (320, 64), (200, 200)])
@pytest.mark.parametrize("kind", ["noise", "low rank", "one large", "zero"])
def test_the_largest_singular_value_is_that_of_torch(shape, kind):
    torch.manual_seed(0)
    rows, columns = shape
    matrix = torch.randn(shape)
    if kind == "low rank":
        matrix = torch.randn(rows, 2) @ torch.randn(2, columns)
    elif kind == "one large":
        matrix += 10 * torch.outer(torch.randn(rows), torch.randn(columns))
    elif kind == "zero":
        matrix.zero_()
    expected = float(torch.linalg.svdvals(matrix)[0])
    assert find_largest(matrix) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_statistics_are_those_of_the_folded_tensors(native, tmp_path):
    fold_checkpoint(native, tmp_path / "llama", "float32")
    folded, stored = load_file(tmp_path / "llama" / "model.safetensors"), load_file(native / "model.safetensors")
    measure_weights(str(native), tmp_path / "of_native")
    measure_weights(str(tmp_path / "llama"), tmp_path / "of_llama")
    found = read_statistics(tmp_path / "of_native")
    assert {one.name for one in found} == {name for name in folded if not name.endswith("o_proj.bias")}
    plain = {one.name: one for one in read_statistics(tmp_path / "of_llama")}
    for one in found:
        tensor = folded[one.name].double()
        assert one.norm == pytest.approx(float(tensor.norm()), rel=2e-6), one.name
        assert one.rms == pytest.approx(float(tensor.square().mean().sqrt()), rel=2e-6)
        if find_kind(one.name).is_decomposed:
            largest = float(torch.linalg.svdvals(tensor)[0])
            assert one.largest == pytest.approx(largest, rel=1e-4)
            assert one.stable_rank == pytest.approx((one.norm / one.largest) ** 2)
        else:
            assert one.largest is None
        other = plain[one.name]
        assert (other.scale, other.alpha) == (1.0, None)
        assert other.norm == pytest.approx(one.norm, rel=2e-6)
    value = next(one for one in found if one.name == "model.layers.1.self_attn.v_proj.weight")
    assert value.alpha == value.scale == float(stored["model.layers.1.self_attn.v_proj_alpha"]) < 0
    down = next(one for one in found if one.name == "model.layers.3.mlp.down_proj.weight")
    assert (down.kind, down.layer) == ("down", 3)
    assert down.scale == pytest.approx(down.alpha / 2)  # 1 / sqrt(4 layers)


def test_changes_are_those_of_the_folded_tensors(native, tmp_path):
    """Nano's matrices are sampled, so cosines are those of some rows; a sign that an alpha changes counts."""
    shutil.copytree(native, tmp_path / "later")
    torch.manual_seed(1)

    def change(name, tensor):
        if name.endswith("layers.2.self_attn.v_proj_alpha"):
            return -tensor
        return (
            tensor + 0.3 * tensor.float().std() * torch.randn(tensor.shape).to(tensor.dtype)
            if tensor.dim() > 1
            else tensor
        )

    change_tensors(tmp_path / "later", change)
    exact = {}
    for name in ("native", "later"):
        fold_checkpoint(tmp_path / name, tmp_path / f"{name}-llama", "float32")
        measure_weights(str(tmp_path / name), tmp_path / f"{name}-out")
        exact[name] = load_file(tmp_path / f"{name}-llama" / "model.safetensors")
    for entry in read_weights(tmp_path / "later-out", tmp_path / "native-out"):
        name = entry.statistics.name
        before, after = (exact[one][name].double().flatten() for one in ("native", "later"))
        cosine = float(torch.dot(before, after) / before.norm() / after.norm())
        change_ratio = float((after - before).norm() / before.norm())
        assert entry.since.cosine == pytest.approx(cosine, abs=0.004), name
        assert entry.since.change == pytest.approx(change_ratio, abs=0.01), name
        if name == "model.embed_tokens.weight":  # the whole table is kept
            rows = torch.cosine_similarity(exact["native"][name].double(), exact["later"][name].double(), dim=1)
            assert entry.since.row_cosine == pytest.approx(float(rows.mean()), rel=1e-6)
            assert entry.since.cosine == pytest.approx(cosine, rel=1e-6)
    flipped = {
        entry.statistics.name: entry.since for entry in read_weights(tmp_path / "later-out", tmp_path / "native-out")
    }
    assert flipped["model.layers.2.self_attn.v_proj.weight"].cosine < -0.9
    assert flipped["model.layers.2.self_attn.k_proj.weight"].cosine > 0.9
    assert all(entry.since is None for entry in read_weights(tmp_path / "later-out", None))


@pytest.mark.parametrize("norm", ["embedding_rmsln", "embedding_ln"])
def test_norms_that_are_no_factor_are_folded_first(nano, tmp_path, norm):
    """The embedding is then no multiple of the stored table, and gemma's norms are no multiple of the stored weights."""
    folder = tmp_path / "native"
    shutil.copytree(nano, folder, ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, norm: True, "rms_type": "gemma"}))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embedding_layernorm.weight"] = torch.rand(config["hidden_size"]).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fold_checkpoint(folder, tmp_path / "llama", "float32")
    folded = load_file(tmp_path / "llama" / "model.safetensors")
    measure_weights(str(folder), tmp_path / "out")
    for one in read_statistics(tmp_path / "out"):
        assert one.norm == pytest.approx(float(folded[one.name].double().norm()), rel=2e-6), one.name


def test_an_adapter_counts_as_merged(train, tmp_path):
    run = train("run", "trainer.learning_rate=0.1")
    export_result(open_result(run), tmp_path / "export", ExportSettings("float32", verify=False))
    measure_weights(str(run), tmp_path / "of_run")
    measure_weights(str(tmp_path / "export"), tmp_path / "of_export")
    measure_weights("nano", tmp_path / "of_nano")
    exported = {one.name: one for one in read_statistics(tmp_path / "of_export")}
    for one in read_statistics(tmp_path / "of_run"):
        assert one.norm == pytest.approx(exported[one.name].norm, rel=1e-6), one.name
        assert one.largest == (exported[one.name].largest and pytest.approx(exported[one.name].largest, rel=1e-6))
    same = read_weights(tmp_path / "of_export", tmp_path / "of_run")
    assert all(
        entry.since.cosine > 0.999999 for entry in same if entry.statistics.kind != "o bias"
    )  # zeros, in exports alone
    moved = [entry for entry in read_weights(tmp_path / "of_run", tmp_path / "of_nano") if entry.since.change > 1e-3]
    assert {entry.statistics.kind for entry in moved} == {"q", "k", "v", "o", "gate", "up", "down"}


def test_nan_is_one_message_and_leaves_nothing(native, tmp_path):
    change_tensors(
        native, lambda name, tensor: tensor * float("nan") if name.endswith("2.self_attn.k_proj.weight") else tensor
    )
    with pytest.raises(CheckpointError, match=r"layers.2.self_attn.k_proj.weight holds NaN or infinite values"):
        measure_weights(str(native), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_tables_of_other_sizes_are_not_compared(native, tmp_path):
    measure_weights(str(native), tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    change_tensors(tmp_path / "other", lambda name, tensor: tensor[:-1].clone() if "embed_tokens" in name else tensor)
    found = {entry.statistics.name: entry.since for entry in read_weights(tmp_path / "out", tmp_path / "other")}
    assert found["model.embed_tokens.weight"] is None
    assert found["lm_head.weight"].cosine == pytest.approx(1.0)
