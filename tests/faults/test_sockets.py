"""Nothing is sent anywhere: every verb runs while a guard watches all connections and look-ups of names."""

import json
import logging
import os
import subprocess
import sys

import pytest

from finetune.cli.verbs import VERBS
from finetune.files.resources import find_demo_data

# The demo strings train, export, evaluate and chat together, and takes a minute.
# `push` sends what it is told to; tests/hub watches what.
# `microanneal` trains twice and compares, all by the code of `train`, `fold` and `evaluate`.
NOT_RUN = {"demo", "push", "microanneal"}
# One process runs all command lines. The guard is an audit hook: it also sees what libraries do, and cannot be taken off.
SCRIPT = """
import json, sys
found = []

def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        found.append([event, repr(arguments[1])])
        raise OSError("the guard allows no connection")
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        found.append([event, repr(arguments[0])])
        raise OSError("the guard allows no look-up")

sys.addaudithook(guard)
from finetune.cli.main import main
statuses = {}
for line in json.loads(sys.argv[1]):
    try:
        main(line)
    except SystemExit as stopped:
        statuses[line[0]] = stopped.code
print("FOUND" + json.dumps([statuses, found]))
"""


def test_no_verb_opens_a_connection(nano_llama, tmp_path):
    lines = find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:8]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text('{"text": "Anna walked home."}\n')
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(
        f"data: {{train: {tmp_path / 'rows.jsonl'}, max_tokens: 128}}\nmodel: {{checkpoint: nano}}\nadapter: {{rank: 4, alpha: 8}}\n"
        "trainer: {max_steps: 1, per_device_train_batch_size: 2, gradient_checkpointing: false, disable_tqdm: true}\n"
        f"answers: 0\noutput: {run}\n"
    )
    commands = [
        ["checkpoints"],
        ["recipes"],
        [
            *("init", "--data", str(tmp_path / "rows.jsonl"), "--base", "nano", "--device", "cpu", "--yes"),
            *("-o", str(tmp_path / "first.yaml")),
        ],
        ["mixtures"],
        ["fold", "nano", "-o", str(tmp_path / "folded")],
        ["check", str(recipe)],
        ["preview", str(recipe)],
        ["lint", str(recipe)],
        ["clean", str(recipe), "-s", "clean.unreadable=true", "-o", str(tmp_path / "cleaned")],
        [
            *("synthesize", str(recipe), "-s", "endpoints={own: {model: nano}}", "-o", str(tmp_path / "written")),
            *("-s", "synthesize={job: answers, endpoint: own, max_tokens: 16, samples: 3, temperature: 2}"),
        ],
        ["plan", str(recipe)],
        ["doctor"],
        ["train", str(recipe)],
        ["sweep", str(recipe), "-s", "data.held_out=0.5", "-o", str(tmp_path / "sweep")],
        ["watch", str(run), "-o", str(tmp_path / "page.html")],
        ["export", str(run), "-o", str(tmp_path / "export")],
        ["average", str(run), "nano", "-o", str(tmp_path / "averaged")],
        ["gguf", str(tmp_path / "export"), "-o", str(tmp_path / "m.gguf"), "--type", "q8_0"],
        ["evaluate", str(run), "--data", str(tmp_path / "rows.jsonl")],
        [
            *("dynamics", "nano", str(run), "-o", str(tmp_path / "compared"), "--rows", str(tmp_path / "texts.jsonl")),
            *("--tasks", "lambada", "--task-data", str(tmp_path / "texts.jsonl")),
        ],
        ["chat", str(run), "--prompt", "Who are you?", "--max-new-tokens", "2"],
    ]
    assert {line[0] for line in commands} | NOT_RUN == {verb.name for verb in VERBS}
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    statuses, found = json.loads(done.stdout.rpartition("FOUND")[2])
    assert statuses == {line[0]: 0 for line in commands}, done.stderr
    assert found == []


@pytest.mark.parametrize(("choice", "is_found"), [({}, False), ({"USE_HUB_KERNELS": "YES"}, True)])
def test_the_package_that_fetches_native_code_is_not_found_by_programs_that_use_the_kit(tmp_path, choice, is_found):
    """Only the command line kept `kernels` from asking the hub; a program with `import finetune` did not."""
    (tmp_path / "kernels.py").write_text("")
    code = "import finetune\ntry:\n    import kernels\n    print(True)\nexcept ImportError:\n    print(False)"
    environment = {name: value for name, value in os.environ.items() if name != "USE_HUB_KERNELS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**environment, **choice, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.strip() == str(is_found), done.stderr


def test_nobody_is_told_to_install_a_package_that_is_kept_out(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    caplog.set_level(logging.WARNING, logger.name)  # the command line raises that of all libraries
    logger.warning("Failed to load %s. Please make sure you already `pip install kernels`", "CPU gemm_4bit_forward")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
