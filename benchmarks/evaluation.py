"""Compare whole evaluations with the results of the two harnesses, and their speed with lm-evaluation-harness.

    python benchmarks/evaluation.py                            # every row of every task: minutes on one core
    python benchmarks/evaluation.py --harness PYTHON

It needs the reference results beside the checkout (`--reference`); their `check.py` compares. PYTHON is that of an environment with lm_eval 0.4.13 and this
project's torch and transformers; then both evaluate the same passages with the same batch, one after the other.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finetune.evaluation.tasks.run_tasks import evaluate_tasks
from finetune.evaluation.tasks.task_settings import TaskSettings

SHARED = Path(__file__).parents[2] / "shared"
# Our task and protocol, the file of its rows, and the name of the reference.
CASES = (
    ("lambada", "harness", "lambada_like", "lambada"),
    ("lambada", "harness", "lambada_edge", "lambada_edge"),
    ("gsm8k", "harness", "gsm8k_eval", "gsm8k"),
    ("humaneval", "harness", "humaneval_eval", "humaneval"),
    ("lambada", "authors", "lambada_like", "lambada"),
    ("gsm8k", "authors", "gsm8k_eval", "gsm8k"),
    ("gsm8k", "authors", "gsm8k_eval", "gsm8k_0_shots"),
)
HARNESS_TASK = """
task: passages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def choose_exemplars(name: str, protocol: str, reference: Path, train: Path, folder: Path) -> Path | None:
    """Return the file of exemplars that a case of the reference was made with."""
    if name != "gsm8k":
        return None
    if protocol == "harness":
        return train
    prompts = json.loads((reference / "authors" / "prompts.json").read_text(encoding="utf-8"))
    prompt = prompts["gsm8k"]["8_shots_no_limit"]["rows"][0]["prompt"]
    parts = prompt.split("Answer the following question.\n\nQuestion: ")[1:-1]
    pairs = [part.removesuffix("\n\n").split("\nAnswer: ", 1) for part in parts]
    file = folder / "exemplars.jsonl"
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def compare(reference: Path, train: Path, folder: Path) -> bool:
    """Evaluate every case and compare it; return whether all are equal."""
    equal = True
    for task, protocol, data, name in CASES:
        exemplars = choose_exemplars(name, protocol, reference, train, folder)
        settings = TaskSettings((task,), protocol, data=reference / "data" / f"{data}.jsonl", exemplars=exemplars)
        start = time.perf_counter()
        output = folder / f"{protocol}-{name}"
        result = evaluate_tasks(str(reference / "models" / "half_memorised"), settings, output).tasks[task]
        seconds = time.perf_counter() - start
        samples = [json.loads(line) for line in Path(result.file).read_text(encoding="utf-8").splitlines()]
        file = output / "compared.json"
        file.write_text(
            json.dumps({name: {"metric": result.metric, "stderr": result.stderr, "n": result.n, "samples": samples}}),
            encoding="utf-8",
        )
        print(f"{protocol} {name}: {seconds:.0f} s", flush=True)
        command = [sys.executable, str(reference / "check.py"), str(file), "--protocol", protocol]
        equal &= subprocess.run(command, check=False).returncode == 0
    return equal


def race(reference: Path, harness: Path, folder: Path, batch: int) -> None:
    """Time both programs on the same passages, each in a process of its own."""
    rows = (reference / "data" / "lambada_like.jsonl").read_text(encoding="utf-8").splitlines() * 10
    data = folder / "passages.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "passages.yaml").write_text(HARNESS_TASK.format(file=data), encoding="utf-8")
    model = reference / "models" / "half_memorised"
    ours = [sys.executable, "-m", "finetune", "evaluate", str(model), "--tasks", "lambada"]
    ours += ["--task-data", str(data), "--batch-size", str(batch), "-o", str(folder / "ours")]
    theirs = [str(harness), "-m", "lm_eval", "--model", "hf", "--tasks", "passages", "--include_path", str(folder)]
    theirs += ["--model_args", f"pretrained={model},dtype=float32", "--batch_size", str(batch), "--device", "cpu"]
    for name, command in (("finetune evaluate", ours), ("lm_eval", theirs)):
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        print(f"{name}: {len(rows)} passages, batch {batch}: {seconds:.1f} s, {cpu:.1f} s of CPU", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, default=SHARED / "reference" / "evaluation")
    parser.add_argument("--train", type=Path, default=SHARED / "data" / "gsm8k_train.jsonl", help="GSM8K's train split")
    parser.add_argument("--harness", type=Path, help="the Python of an environment with lm_eval")
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    if not arguments.reference.is_dir():
        print(f"{arguments.reference} is not here; nothing is compared")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if arguments.harness:
            race(arguments.reference, arguments.harness, Path(folder), arguments.batch)
            return 0
        return 0 if compare(arguments.reference, arguments.train, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
