"""The user's path with a base on the hub: train, evaluate, export; what was fetched, and what is recorded."""

import json

import pytest
from finetune.checkpoints.finding import find_checkpoint
from finetune.evaluation.token_loss import evaluate_path
from finetune.exporting.merge import export_result
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result


def test_first(hub, nano, train, tmp_path):
    commit = hub.add_folder("someone/nano", nano)
    run = train("run", "model.checkpoint=someone/nano", "trainer.max_steps=2")
    record = json.loads((run / "run.json").read_text())
    assert record["hub"] == [{"kind": "model", "repository": "someone/nano", "revision": None, "commit": commit}]
    print([ (r.method, r.path) for r in hub.log])
