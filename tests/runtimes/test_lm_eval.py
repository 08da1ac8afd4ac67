"""Tasks of lm-evaluation-harness, asked by its own command line and by `finetune evaluate --tasks lm_eval:…`: every sample is the same."""

import json
import random

import pytest

OPTIONS = {
    "choices": """
output_type: multiple_choice
num_fewshot: 1
fewshot_split: test
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "words": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: [".", "\\n\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def tasks(tmp_path):
    """Write three tasks with rows of random words; return their folder."""
    draw = random.Random(5)
    words = ["river", "stone", "seven", "paint", "cold", "window", "they", "walks", "and", "under", "green", "9"]
    rows = [
        {
            "question": " ".join(draw.choices(words, k=draw.randint(3, 40))),
            "choices": draw.sample(words, 3),
            "label": draw.randrange(3),
        }
        for _ in range(12)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = json.dumps({"test": str(folder / "rows.jsonl")})
    for name, options in OPTIONS.items():
        head = f"task: own_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {source}}}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(head + options)
    return folder


def read_samples(file):
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def flatten(value):
    """Return the numbers and texts of nested answers; numbers come as text from one side."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in flatten(part)]
    if str(value) in ("True", "False"):
        return [str(value)]
    try:
        return [float(value)]
    except ValueError:
        return [value]


def test_every_sample_is_that_of_its_own_command_line(tasks, tmp_path, run_in, nano_llama):
    names = [f"own_{name}" for name in OPTIONS]
    asked = ",".join(f"lm_eval:{name}" for name in names)
    ours = run_in(
        "lm_eval",
        "-m",
        "finetune",
        "evaluate",
        nano_llama,
        "--tasks",
        asked,
        "--task-data",
        tasks,
        "-o",
        tmp_path / "ours",
    )
    assert ours.returncode == 0, ours.stderr[-2000:]
    model = f"pretrained={nano_llama},dtype=float32"
    common = ("--include_path", tasks, "--model_args", model, "--batch_size", "4", "--device", "cpu", "--log_samples")
    theirs = run_in(
        "lm_eval",
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--tasks",
        ",".join(names),
        *common,
        "--output_path",
        tmp_path / "theirs",
    )
    assert theirs.returncode == 0, theirs.stderr[-2000:]
    figures = json.loads(next((tmp_path / "theirs").rglob("results_*.json")).read_text())["results"]
    found = json.loads((tmp_path / "ours" / "results.json").read_text())["tasks"]
    for name in names:
        expected = read_samples(next((tmp_path / "theirs").rglob(f"samples_{name}_*.jsonl")))
        samples = read_samples(tmp_path / "ours" / f"lm_eval-{name}.jsonl")
        assert len(samples) == len(expected) == 12
        for sample, other in zip(samples, expected, strict=True):
            assert sample["prompt_hash"] == other["prompt_hash"]
            assert flatten(sample["resps"]) == pytest.approx(flatten(other["resps"]), abs=1e-4), name
        for metric, value in found[f"lm_eval:{name}"]["metric"].items():
            assert value == pytest.approx(figures[name][f"{metric},none"], rel=1e-5), (name, metric)


MISTAKES = {
    "name": ("lm_eval:own_choises", "'lm_eval:own_choises' is an unknown task; did you mean 'own_choices'?"),
    "hub": ("lm_eval:hellaswag", "lm_eval:hellaswag: the task or its rows cannot be read"),
    "code": ("lm_eval:mbpp_plus", "lm_eval:mbpp_plus runs generated code without a sandbox"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message(tasks, tmp_path, run_in, nano_llama, mistake):
    name, message = MISTAKES[mistake]
    done = run_in(
        "lm_eval",
        "-m",
        "finetune",
        "evaluate",
        nano_llama,
        "--tasks",
        name,
        "--task-data",
        tasks,
        "-o",
        tmp_path / "out",
    )
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
