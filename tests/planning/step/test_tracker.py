import pytest
import torch

from finetune.planning.step.tracker import FORWARD, LOSS, MemoryTracker


def test_peak_counts_storages_once_and_until_they_die():
    tracker = MemoryTracker()
    with tracker:
        first = torch.zeros(1000)
        view = first[:10].view(2, 5)
        second = torch.zeros(500, dtype=torch.float64)
        del first
        third = torch.zeros(100)  # the view keeps the first one alive
        del view, second
        fourth = torch.zeros(200)
    peak = tracker.find_peak("rest")
    assert peak.bytes == 4000 + 4000 + 400
    assert peak.parts == {"rest": 8400}
    assert peak.rounding == (-4000 % 512) * 2 + -400 % 512
    assert third.numel() + fourth.numel() == 300


def test_parts_are_told_afterwards_and_sum_to_the_peak():
    tracker = MemoryTracker()
    weight = torch.ones(256)
    tracker.adopt(weight, "weights")
    with tracker:
        kept = weight * 2
        gone = weight + kept
        del gone
        tracker.adopt_live(FORWARD, "kept")
        tracker.phase = LOSS
        gradient = torch.ones(256) + kept
        tracker.adopt(gradient, "gradients")
    tracker.adopt_phase(LOSS, "loss")
    peak = tracker.find_peak("rest")
    assert peak.bytes == 4 * 1024  # weights, kept, the ones, their sum
    assert peak.parts == {"weights": 1024, "kept": 1024, "loss": 1024, "gradients": 1024}
    assert peak.phase == LOSS
    assert tracker.find_largest("loss") == 1024


def test_kernels_count_with_what_they_allocate_for_themselves():
    tracker = MemoryTracker({torch.ops.aten.mm.default: lambda arguments, output: 10_000})
    with tracker:
        left = torch.ones(10, 10)
        product = left @ left
    assert tracker.find_peak("rest").bytes == 400 + 400 + 10_000
    assert product.shape == (10, 10)


def test_nothing_is_followed_in_a_pause():
    tracker = MemoryTracker()
    with tracker, tracker.pause():
        tensor = torch.zeros(100)
    assert tracker.find_peak("rest").bytes == 0
    assert tensor.sum() == 0


def test_substitutes_take_the_place_of_operations():
    tracker = MemoryTracker(
        substitutes={torch.ops.aten.neg.default: lambda arguments: arguments[0].new_full((3,), 7.0)}
    )
    with tracker:
        assert (-torch.zeros(3)).tolist() == pytest.approx([7, 7, 7])
