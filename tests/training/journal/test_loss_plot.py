"""What a run draws of what it logged."""

import json

import pytest
from matplotlib.image import imread

from finetune.training.journal import loss_plot as plot


def draw(run, line, title="a run"):
    """Draw a run of two steps and return the height of the picture in pixels."""
    lines = [{"step": step, "loss": 1.0 / step, **line} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    plot.draw_losses(run, title)
    return imread(run / "loss.png").shape[0]


@pytest.mark.parametrize(
    ("line", "panels"),
    [({}, 0), ({"kl": 0.1}, 1), ({"reward": 0.5, "kl": 0.1}, 2), ({"rewards/margins": 1.0, "rewards/chosen": 1.0}, 2)],
)
def test_what_is_logged_is_drawn_once(tmp_path, line, panels):
    """The distance from the start had two panels in every run that logged it."""
    assert draw(tmp_path, line) == round(120 * (4 + 2.2 * panels))


def test_a_title_is_no_formula_and_needs_no_font(tmp_path):
    """A run from the folder `a$x^$b` was a traceback after its last step, and Chinese names printed a warning for each letter."""
    assert draw(tmp_path, {}, "sft of a$x^$b, 学习") == 480
