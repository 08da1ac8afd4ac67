"""`finetune clean --emit datatrove`: the pipeline runs, and what it leaves is what `finetune clean` leaves."""

import json
import os
import random
import sys

import pytest
from environments import find_python

from finetune.cli.main import main

RECIPE = """
model: {checkpoint: nano}
data: {train: [rows0.jsonl, rows1.jsonl, rows2.jsonl], max_tokens: 2048}
clean:
  unreadable: true
  rules: [repeated_punctuation]
  exact_duplicates: true
  near_duplicates: {threshold: 0.8}
  decontaminate: {against: held.jsonl}
  mix: {shares: {Latin: 1}}
"""
STEPS = ["unreadable", "rules", "exact_duplicates", "near_duplicates", "decontaminate"]
_DRAW = random.Random(3)
_WORDS = ["".join(_DRAW.choices("abcdefghijklmnopqrstuvwxyz", k=_DRAW.randint(2, 9))) for _ in range(3000)]


def say(count):
    return " ".join(_DRAW.choices(_WORDS, k=count))


def make_line(number, held, earlier):
    """A row of its own, or one of the kinds that a step drops."""
    kind = _DRAW.random()
    if kind < 0.1 and earlier:
        return json.dumps(_DRAW.choice(earlier))
    if kind < 0.14:
        return json.dumps({"prompt": f"Why so {number}", "completion": f"So!!!!!!!!!! {say(30)}"})
    if kind < 0.17:
        return json.dumps({"prompt": f"Say {_DRAW.choice(held)}", "completion": say(30)})
    if kind < 0.19:
        return "{broken"
    row = {"prompt": say(12), "completion": f"{say(60)} é中"}
    if kind < 0.5 and earlier:
        # 1 to 9 of 60 words are others: from about 0.9 to about 0.4 of the word groups are shared.
        words = _DRAW.choice(earlier)["completion"].split(" ")
        for _ in range(_DRAW.randint(1, 9)):
            words[_DRAW.randrange(len(words))] = say(1)
        row["completion"] = " ".join(words)
    earlier.append(row)
    return json.dumps(row)


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    shown = capsys.readouterr()
    return ended.value.code, json.loads(shown.out) if not ended.value.code else shown.err


@pytest.fixture
def recipe(tmp_path, monkeypatch, nano_llama):
    monkeypatch.chdir(tmp_path)
    _DRAW.seed(4)
    held, earlier = [say(20) for _ in range(5)], []
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in held))
    for file in range(3):
        lines = [make_line(number, held, earlier) for number in range(120)]
        (tmp_path / f"rows{file}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def read_rows(folder):
    return [line for file in sorted(folder.rglob("rows*.jsonl")) for line in file.read_text().splitlines()]


def test_the_pipeline_leaves_what_clean_leaves(recipe, tmp_path, capsys, run_in):
    status, report = call(capsys, "clean", "r.yaml", "--emit", "datatrove", "-o", "pipeline.py")
    assert (status, report["steps"]) == (0, STEPS)
    assert report["left_out"] == {"mix": "it asks a model, or needs all rows at once"}
    file = tmp_path / "pipeline.py"
    file.write_text(file.read_text().replace("WORKERS = -1", "WORKERS = 1"))
    done = run_in("datatrove", file)
    assert done.returncode == 0, done.stderr[-3000:]
    _, cleaned = call(capsys, "clean", "r.yaml", "-s", "clean.mix={}", "-o", "cleaned")
    dropped = {step["name"]: step["dropped"] for step in cleaned["steps"]}
    assert all(dropped.values()), dropped
    found = {
        name: sum(len(part.read_text().splitlines()) for part in (tmp_path / "pipeline-work/dropped" / name).iterdir())
        for name in STEPS[1:]
    }
    assert found == {name: dropped[name] for name in STEPS[1:]}
    # Pairs near the threshold were decided otherwise for 10 rows when the pipeline made signatures of its own.
    ours, theirs = read_rows(tmp_path / "cleaned"), read_rows(tmp_path / "pipeline-rows")
    assert theirs == ours and len(ours) > 150
    assert all(json.loads(line)["provenance"]["passed"] == STEPS for line in theirs)


SBATCH = """#!{python}
# A stand-in for Slurm's program: runs each task of a job at once, in a process of its own, and prints the job's number.
import os, re, subprocess, sys
text = open(sys.argv[-1]).read()
last = re.search(r"--array=0-(\\d+)", text)
for task in range(int(last[1]) + 1 if last else 1):
    variables = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "RUN_OFFSET": "0", "SLURM_NODELIST": "here"}}
    subprocess.run(["bash", sys.argv[-1]], env=variables, check=True, stdout=sys.stderr)
print("Submitted batch job 7")
"""
SRUN = '#!/bin/bash\nshift 3\nexec "$@"\n'


@pytest.mark.skipif(os.environ.get("FINETUNE_ALL_CASES") != "1", reason="a minute of processes: FINETUNE_ALL_CASES=1")
def test_the_jobs_of_slurm_leave_what_clean_leaves(recipe, tmp_path, capsys, monkeypatch, run_in):
    """Each task is a process that reads the pipeline back from a file, as Slurm's would; only Slurm itself is a stand-in."""
    settings = ("-s", "clean.near_duplicates={threshold: 0.7, permutations: 2}", "-s", "clean.mix={}")
    settings = (*settings, "-s", "data.train=[rows0.jsonl, rows1.jsonl]")
    assert call(capsys, "clean", "r.yaml", *settings, "--emit", "datatrove", "-o", "pipeline.py")[0] == 0
    file, programs = tmp_path / "pipeline.py", tmp_path / "programs"
    file.write_text(file.read_text().replace('EXECUTOR = "local"', 'EXECUTOR = "slurm"'))
    programs.mkdir()
    scripts_of_slurm = {
        "sbatch": SBATCH.format(python=sys.executable),
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho here\n",
    }
    for name, text in scripts_of_slurm.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    scripts = find_python("datatrove").parent if find_python("datatrove") else programs
    monkeypatch.setenv("PATH", f"{programs}:{scripts}:{os.environ['PATH']}")
    done = run_in("datatrove", file)
    assert done.returncode == 0, done.stderr[-3000:]
    call(capsys, "clean", "r.yaml", *settings, "-o", "cleaned")
    ours = read_rows(tmp_path / "cleaned")
    assert read_rows(tmp_path / "pipeline-rows") == ours and len(ours) > 100


def test_the_executors_of_clusters_take_the_pipeline(recipe, tmp_path, capsys, run_in):
    call(capsys, "clean", "r.yaml", "--emit", "datatrove", "-o", "pipeline.py")
    file = tmp_path / "pipeline.py"
    look = """
if __name__ == "looked_at":
    found = []
    for EXECUTOR in ("slurm", "ray", "local"):
        last, names = make_stages(), []
        while last is not None:
            names.append(type(last).__name__)
            last = last.depends
        found.append([len(names), *set(names)])
    print("found", found)
"""
    file.write_text(file.read_text() + look)
    done = run_in("datatrove", "-c", "import runpy; runpy.run_path('pipeline.py', run_name='looked_at')")
    assert done.returncode == 0, done.stderr[-3000:]
    kinds = ["SlurmPipelineExecutor", "RayPipelineExecutor", "LocalPipelineExecutor"]
    # read; sign, find, exact; sign and find for two parts; keep the first, near; write
    assert f"found {[[11, kind] for kind in kinds]}" in done.stdout
