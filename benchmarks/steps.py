"""Compare the kit with a plain TRL script on the processor: time of a step, and of a whole command of one step beside `trl sft`.

    python benchmarks/steps.py [--repeats 3] [--steps 6]

Both train the same rows with the same LoRA adapter, batch and float32 weights: on nano, and on a random model of 200 million weights.
The kit also trains with `model.speed: auto`, which computes products in bfloat16 where the processor has instructions for them. The
programs take turns, each in a process of its own. Other programs on the machine stretch the clock, so processor time is given
beside it, and the ratios are of processor time. The results are steps.md and steps.json beside this file.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_parts.cases import write_conversations
from gpu_parts.clock import watch_trainers
from gpu_parts.settings import Setting
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.checkpoints.finding import as_llama, find_checkpoint
from finetune.yulan.tokenizer_files import copy_tokenizer

HERE = Path(__file__).parent
TEMPLATE = HERE.parent / "templates" / "yulan-mini.jinja"
MODELS = {"nano": Setting(256, 2, False), "200 million weights": Setting(256, 2, False)}
PLAIN = "plain TRL"
# What each program sets besides the recipe; nothing is set for the plain script.
PROGRAMS: Mapping[str, Sequence[str]] = {
    "ours": (),
    "ours, model.speed: auto": ("model.dtype=auto", "model.speed=auto"),
    PLAIN: (),
}
LORA = {"r": 16, "lora_alpha": 32}


def make_bases(folder: Path) -> dict[str, Path]:
    """Make the Llama folders of both models, with the chat template that both programs use."""
    nano = as_llama(find_checkpoint("nano"))
    sizes = {"hidden_size": 960, "intermediate_size": 2400, "num_attention_heads": 15, "num_key_value_heads": 3}
    config = LlamaConfig.from_pretrained(nano, num_hidden_layers=21, head_dim=64, **sizes)
    bases = {name: folder / str(number) for number, name in enumerate(MODELS)}
    for name, base in bases.items():
        model = LlamaForCausalLM.from_pretrained(nano) if name == "nano" else LlamaForCausalLM(config)
        model.save_pretrained(base)
        copy_tokenizer(nano, base, TEMPLATE.read_text(encoding="utf-8"))
    return bases


def train_ours(base: Path, rows: Path, output: Path, steps: int, more: Sequence[str]) -> None:
    """Train with the shipped recipe for LoRA, and more overrides."""
    import finetune
    from finetune.check.recipes import load_recipe
    from finetune.files.resources import list_recipes

    overrides = [*list_overrides(base, rows, output, steps), *more]
    finetune.train(load_recipe(list_recipes()["sft_lora"], overrides), force=True)


def list_overrides(base: Path, rows: Path, output: Path, steps: int) -> list[str]:
    """Return what makes the shipped recipe the run of the plain script."""
    return [
        f"model.checkpoint={base}",
        "model.dtype=float32",
        f"data.train={rows}",
        "data.held_out=0",
        f"output={output}",
        "answers=0",
        f"adapter.rank={LORA['r']}",
        f"adapter.alpha={LORA['lora_alpha']}",
        "adapter.train_tokens=[]",
        f"trainer.max_steps={steps}",
        "trainer.warmup_steps=0",
        "trainer.per_device_train_batch_size=2",
        "trainer.gradient_accumulation_steps=1",
        "trainer.save_strategy=no",
        "trainer.disable_tqdm=true",
    ]


def train_plain(base: Path, rows: Path, output: Path, steps: int) -> None:
    """Train as the documentation of TRL does, with its defaults."""
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=2e-4,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        assistant_only_loss=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = SFTTrainer(
        model=str(base),
        args=config,
        train_dataset=load_dataset("json", data_files=str(rows), split="train"),
        peft_config=LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()


def run_child(program: str, base: Path, rows: Path, output: Path, steps: int) -> None:
    """Train in this process, and print the seconds of all steps as JSON."""
    with watch_trainers() as watch:
        if program == PLAIN:
            train_plain(base, rows, output, steps)
        else:
            train_ours(base, rows, output, steps, PROGRAMS[program])
    print(json.dumps({"wall": watch.seconds, "processor": watch.processor_seconds}))


def measure_steps(base: Path, rows: Path, program: str, steps: int) -> dict[str, list[float]]:
    """Train in a process of its own; return the seconds of all steps but the first two."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, "--child", program, str(base), str(rows), f"{folder}/run"]
        done = subprocess.run([*command, str(steps)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return {name: values[2:] for name, values in found.items()}


def measure_command(command: Sequence[str]) -> tuple[float, float]:
    """Run a command; return its seconds by the clock and of the processor, with its child processes."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, processor


def measure_first_step(base: Path, rows: Path, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds of whole commands that train one step and write its result, for `finetune train` and `trl sft`."""
    scripts = Path(sys.executable).parent
    found: dict[str, list[tuple[float, float]]] = {"finetune train": [], "trl sft": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            overrides = [part for key in list_overrides(base, rows, Path(folder) / "ours", 1) for part in ("-s", key)]
            ours = [sys.executable, "-m", "finetune", "train", "sft_lora", *overrides]
            theirs = f"{scripts}/trl sft --model_name_or_path {base} --dataset_name {rows.parent} --max_steps 1 --output_dir {folder}/trl"
            theirs += " --use_peft --lora_r 16 --lora_alpha 32 --lora_target_modules all-linear --per_device_train_batch_size 2"
            theirs += " --report_to none --save_strategy no --use_cpu true --bf16 false"
            found["finetune train"].append(measure_command(ours))
            found["trl sft"].append(measure_command(theirs.split()))
    return found


def describe(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; float32, LoRA of rank 16 on all linear layers, "
        "2 rows of 256 tokens. `model.speed: auto` rounds the factors of products to bfloat16.",
        "",
        "| model | program | a step, processor s | of plain TRL | a step, s | of plain TRL |",
        "|---|---|---|---|---|---|",
    ]
    for model, found in results["steps"].items():
        medians = {
            program: [statistics.median(values[clock]) for clock in ("processor", "wall")]
            for program, values in found.items()
        }
        for program, figures in medians.items():
            pairs = zip(figures, medians[PLAIN], strict=True)
            cells = " | ".join(f"{value:.3f} | {value / plain:.2f}" for value, plain in pairs)
            lines.append(f"| {model} | {program} | {cells} |")
    lines += ["", "| a command of one step on nano | processor s | s |", "|---|---|---|"]
    whole = {
        name: [statistics.median(pair[clock] for pair in pairs) for clock in (1, 0)]
        for name, pairs in results["first step"].items()
    }
    lines += [f"| `{name}` | {processor:.1f} | {seconds:.1f} |" for name, (processor, seconds) in whole.items()]
    ours, theirs = whole["finetune train"], whole["trl sft"]
    lines += [
        "",
        f"`finetune train` takes {ours[0] / theirs[0]:.2f} x the processor time of `trl sft`, and {ours[1] / theirs[1]:.2f} x its time.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure everything, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        program, *paths, steps = arguments.child
        run_child(program, *map(Path, paths), int(steps))
        return
    results: dict[str, Any] = {"steps": {}, "first step": {}}
    with tempfile.TemporaryDirectory() as folder:
        bases = make_bases(Path(folder) / "bases")
        for name, setting in MODELS.items():
            rows = Path(folder) / name.split()[0] / "train.jsonl"
            rows.parent.mkdir()
            write_conversations(rows, setting, bases[name])
            found: dict[str, dict[str, list[float]]] = {program: {"wall": [], "processor": []} for program in PROGRAMS}
            for _ in range(arguments.repeats):
                for program in PROGRAMS:
                    for clock, values in measure_steps(bases[name], rows, program, arguments.steps).items():
                        found[program][clock] += values
            results["steps"][name] = found
        results["first step"] = measure_first_step(
            bases["nano"], Path(folder) / "nano" / "train.jsonl", arguments.repeats
        )
    (HERE / "steps.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (HERE / "steps.md").write_text(describe(results), encoding="utf-8")
    print(describe(results))


if __name__ == "__main__":
    main()
