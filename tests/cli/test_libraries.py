"""How libraries are loaded for a plan."""

import gc
import os
import subprocess
import sys

import pytest

from finetune.cli.main import main
from finetune.files.speed import load_for_plan


@pytest.mark.parametrize("asked", [None, "0"])
def test_loading_leaves_the_process_as_it_was(monkeypatch, asked):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if asked is not None:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", asked)
    with pytest.raises(ImportError), load_for_plan():
        assert not gc.isenabled() and os.environ["TORCHDYNAMO_DISABLE"] == "1"
        raise ImportError
    assert gc.isenabled() and os.environ.get("TORCHDYNAMO_DISABLE") == asked


def test_a_plan_loads_no_compiler_and_no_plots():
    """Each took a second or half of one: torch's compiler by way of bitsandbytes, matplotlib by the trainer's callbacks."""
    code = (
        "import sys\n"
        "from finetune.cli.main import main\n"
        "try: main(['plan', 'sft_qlora', '-s', 'model.checkpoint=nano', '--json'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([name for name in ('torch._inductor.compile_fx', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "1"}, "finetune check: "),  # it printed nothing
        ({"RANK": "1", "WORLD_SIZE": ""}, "finetune check: "),  # it was a traceback
        ({"RANK": "0", "WORLD_SIZE": "2"}, "finetune check: "),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "finetune check (process 1): "),  # its message was lost
        ({"RANK": "0", "WORLD_SIZE": "two"}, "finetune check: WORLD_SIZE: must be a number"),
    ],
)
def test_every_process_says_what_it_lacks(monkeypatch, capsys, tmp_path, variables, said):
    monkeypatch.setattr("atexit.register", lambda leave: None)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit) as end:
        main(["check", str(tmp_path / "gone.yaml")])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(said)
