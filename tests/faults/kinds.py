"""The kinds of work that faults are injected into, on nano: how each is started, resumed, and what must come out of it."""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.files.resources import find_demo_data

_TRAINER = (
    "{max_steps: 4, learning_rate: 2e-3, per_device_train_batch_size: 4, logging_steps: 1, save_steps: 2, eval_strategy: 'no', "
    "lr_scheduler_type: constant, gradient_checkpointing: false, disable_tqdm: true}"
)


@dataclass(frozen=True)
class Kind:
    """One kind of work; `output` is the folder that it writes, `results` the files in it that must be equal to the bit."""

    name: str
    start: list[str]
    output: Path
    results: Sequence[str] = ("**/*.safetensors",)
    resumes: bool = True
    cache: Path | None = None

    @property
    def resume(self) -> list[str]:
        """The command line with which a person goes on."""
        return [*self.start, "--resume"] if self.resumes else self.start

    def clear(self) -> None:
        """Remove what an earlier try has left, with the cache where it is part of the kind."""
        self.clear_output()
        if self.cache is not None:
            shutil.rmtree(self.cache, ignore_errors=True)

    def clear_output(self) -> None:
        """Remove the output and what was begun beside it, as a person does who starts anew."""
        shutil.rmtree(self.output, ignore_errors=True)
        for left in self.output.parent.glob(f".{self.output.name}.*"):
            shutil.rmtree(left, ignore_errors=True)

    def hash_results(self) -> dict[str, str]:
        """Return the hashes of the results by name; checkpoints on the way do not count."""
        found = {
            path for pattern in self.results for path in self.output.glob(pattern) if "checkpoint-" not in str(path)
        }
        return {
            str(path.relative_to(self.output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)
        }


def make_rows(folder: Path) -> None:
    """Write the few rows that all kinds train on."""
    for name, source, count in (("rows.jsonl", "demo.jsonl", 16), ("pairs.jsonl", "pairs.jsonl", 16)):
        lines = find_demo_data(source).read_text(encoding="utf-8").splitlines(keepends=True)[:count]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    texts = [
        f'{{"text": "{line} {line} {line}"}}\n' for line in ("one two three four five", "six seven eight nine ten") * 40
    ]
    (folder / "texts.jsonl").write_text("".join(texts), encoding="utf-8")


def make_training(name: str, work: Path, text: str, results: Sequence[str] = ("**/*.safetensors",)) -> Kind:
    """Return a kind that trains a recipe; its folder is the only thing in its parent."""
    recipe, output = work / f"{name}.yaml", work / name / "run"
    output.parent.mkdir(exist_ok=True)
    recipe.write_text(f"{text}\noutput: {output}\n", encoding="utf-8")
    return Kind(name, ["train", str(recipe)], output, results)


def make_kinds(work: Path) -> dict[str, Callable[[], Kind]]:
    """Return what makes each kind; `work` is an empty folder."""
    make_rows(work)
    sft = f"data: {{train: {work / 'rows.jsonl'}, max_tokens: 128}}\nanswers: 4\n"
    lora = f"{sft}model: {{checkpoint: nano}}\nadapter: {{rank: 4, alpha: 8}}\ntrainer: {_TRAINER}"
    full = f"{sft}model: {{checkpoint: nano}}\nadapter: {{kind: none}}\ntrainer: {_TRAINER}"
    nf4 = lora.replace("{checkpoint: nano}", "{checkpoint: nano, quantize: nf4}")
    dpo = (
        f"method: dpo\ndata: {{train: {work / 'pairs.jsonl'}, max_tokens: 128}}\nanswers: 0\nmodel: {{checkpoint: nano}}\n"
        f"adapter: {{rank: 4, alpha: 8}}\ntrainer: {_TRAINER}"
    )
    pretrain = (
        f"method: pretrain\ndata: {{train: {work / 'texts.jsonl'}, max_tokens: 32}}\nanswers: 0\n"
        "model: {checkpoint: nano, architecture: native}\nadapter: {kind: none}\nschedule: {length: 4, warmup: 1}\n"
        "optimizer: {states: fresh, save_states: true}\ntrainer: {per_device_train_batch_size: 2, logging_steps: 1, save_steps: 2, "
        "eval_strategy: 'no', gradient_checkpointing: false, disable_tqdm: true}"
    )
    chain = (
        f"{lora.replace('answers: 4', 'answers: 0')}\nstages:\n  - name: first\n  - {{name: second, seed: 43}}\n"
        "  - {name: merged, export: {verify: false}}"
    )
    texts = {"lora": lora, "nf4": nf4, "full": full, "dpo": dpo, "chain": chain}
    makers: dict[str, Callable[[], Kind]] = {}
    for name, text in texts.items():
        makers[name] = lambda name=name, text=text: make_training(name, work, text)
    makers["pretrain"] = lambda: make_training("pretrain", work, pretrain, ("**/*.safetensors", "**/*.pt"))
    short = (
        lora.replace("max_steps: 4", "max_steps: 2")
        .replace("save_steps: 2", "save_steps: 1")
        .replace("answers: 4", "answers: 0")
    )
    evaluated = lora.replace("max_tokens: 128}", "max_tokens: 128, held_out: 4}").replace(
        "eval_strategy: 'no'", "eval_strategy: steps, eval_steps: 2, load_best_model_at_end: true"
    )
    kept = ("**/*.safetensors", "answers_by_step.jsonl")
    makers["evaluated"] = lambda: make_training("evaluated", work, evaluated, kept)
    reward = dpo.replace("method: dpo", "method: reward")
    makers["judge"] = lambda: make_training("judge", work, reward)
    makers["short"] = lambda: make_training("short", work, short)
    once = short.replace("max_steps: 2", "max_steps: 1").replace("save_steps: 1", "save_strategy: 'no'")
    makers["once"] = lambda: make_training("once", work, once)
    makers["cold"] = lambda: _make_cold(work, lora.replace("max_steps: 4", "max_steps: 1"))
    makers["fold"] = lambda: _make_fold(work)
    return makers


def find_cold_cache(work: Path) -> Path:
    """Return the cache that the kind "cold" begins without, and fills."""
    return work / "cold" / "cache"


def _make_cold(work: Path, text: str) -> Kind:
    kind = make_training("cold", work, text)
    return dataclasses.replace(kind, cache=find_cold_cache(work))


def _make_fold(work: Path) -> Kind:
    output = work / "fold" / "out"
    output.parent.mkdir(exist_ok=True)
    return Kind("fold", ["fold", "nano", "-o", str(output)], output, ("*",), resumes=False)


def make_export(work: Path, run: Path) -> Kind:
    """Return the kind that exports a finished run."""
    output = work / "export" / "out"
    output.parent.mkdir(exist_ok=True)
    return Kind("export", ["export", str(run), "-o", str(output), "--no-verify"], output, resumes=False)
