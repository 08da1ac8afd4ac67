"""A dashboard's error is said with its key before step 1, and costs no run later; it was a traceback."""

import os
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from finetune.errors import TrainingError
from finetune.training.journal import reporters
from finetune.training.run import run_training


class Dashboard(TrainerCallback):
    """Fails at one event, and notes the others."""

    fails_at = "on_train_begin"

    def __init__(self):
        self.events = []

    def on_train_begin(self, *arguments, **options):
        self._note("on_train_begin")

    def on_log(self, *arguments, **options):
        self._note("on_log")

    def _note(self, event):
        self.events.append((event, os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES")))
        if event == self.fails_at:
            raise ConnectionError("http://tracking:5000 refused the connection\nmore")


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(reporters.INTEGRATION_TO_CALLBACK, "mlflow", Dashboard)


def test_a_dashboard_that_cannot_begin_is_refused_by_its_key(known, make_recipe, monkeypatch, tmp_path):
    monkeypatch.setattr("finetune.check.trainer.option_values._is_installed", lambda package: True)
    message = (
        r"^trainer.report_to: mlflow cannot begin \(http://tracking:5000 refused the connection\); mend that, or remove"
    )
    with pytest.raises(TrainingError, match=message):
        run_training(make_recipe("run", "trainer.report_to=mlflow"))
    assert not (tmp_path / "run").exists()


def test_a_dashboard_that_fails_later_costs_no_run(known, caplog, monkeypatch):
    monkeypatch.setattr(Dashboard, "fails_at", "on_log")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    dashboard, other = Dashboard(), TrainerCallback()
    reporters.guard_reporters(SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[dashboard, other])))
    dashboard.on_train_begin(None, None, None)
    for _ in range(3):
        dashboard.on_log(None, None, None)
    assert dashboard.events == [("on_train_begin", "2"), ("on_log", None)]
    assert [record.message for record in caplog.records] == [
        "mlflow gets no more of this run, which goes on without it (http://tracking:5000 refused the connection)"
    ]
    assert "on_log" not in vars(other)
