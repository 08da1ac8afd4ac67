"""Train the same rows with the kit or with a plain TRL script, and write tokens a second and the peak memory; started by gpu.py."""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_parts.cases import MARK, count_template_tokens
from gpu_parts.clock import Watch, watch_trainers
from gpu_parts.lines import record

from finetune.data.encoding.tokenizer import load_tokenizer

# Rows of one length, so that a step of either program computes the same tokens.
STEPS, FIRST_MEASURED, PROFILED = 10, 3, 8


@dataclass(frozen=True)
class Setting:
    """What both programs train: the length of the rows, how many a step takes, and whether short ones are packed."""

    tokens: int
    batch: int
    packing: bool

    @property
    def name(self) -> str:
        """Return the setting as a few words."""
        return f"{self.batch} rows of {self.tokens:,} tokens" + (", packed from short rows" if self.packing else "")


REAL = (Setting(2048, 4, False), Setting(2048, 16, False), Setting(2048, 4, True))
SMALL = (Setting(256, 2, False), Setting(256, 2, True))


def write_conversations(path: Path, setting: Setting, base: Path) -> None:
    """Write enough rows for all steps: of the setting's length, or of a fourth of it where they are packed."""
    length = setting.tokens // 4 if setting.packing else setting.tokens
    count = setting.batch * STEPS * (4 if setting.packing else 1)
    answer = MARK * (length - count_template_tokens(load_tokenizer(base)))
    rows = (
        {"messages": [{"role": "user", "content": f"{number:04d}"}, {"role": "assistant", "content": answer}]}
        for number in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_ours(base: Path, rows: Path, output: Path, setting: Setting, *more: str) -> None:
    """Train with the kit, by the shipped recipe of quantized LoRA, and more overrides."""
    import finetune
    from finetune.check.recipes import load_recipe
    from finetune.files.resources import list_recipes

    overrides = [
        f"model.checkpoint={base}",
        f"data.train={rows}",
        f"data.max_tokens={setting.tokens}",
        "data.held_out=0",
        f"output={output}",
        "answers=0",
        "adapter.train_tokens=[]",
        f"trainer.max_steps={STEPS}",
        f"trainer.per_device_train_batch_size={setting.batch}",
        "trainer.gradient_accumulation_steps=1",
        f"trainer.packing={str(setting.packing).lower()}",
        "trainer.save_strategy=no",
        "trainer.disable_tqdm=true",
        *more,
    ]
    finetune.train(load_recipe(list_recipes()["sft_qlora"], overrides), force=True)


def train_fast(base: Path, rows: Path, output: Path, setting: Setting, *more: str) -> None:
    """Train with the kit and `model.speed: auto`, as in a run that is long enough to try it."""
    from finetune.training.speed import compiled_layers, speed_trial

    speed_trial.WORTHWHILE_SECONDS = 0
    if not torch.cuda.is_available():  # a rehearsal: the compiler itself takes a minute
        compiled_layers.COMPILER = {"backend": "aot_eager", "dynamic": True}
    train_ours(base, rows, output, setting, "model.speed=auto", *more)


def train_roomy(base: Path, rows: Path, output: Path, setting: Setting) -> None:
    """Train as `train_fast` without gradient checkpointing, as `trainer.auto` does on a card with room."""
    train_fast(base, rows, output, setting, "trainer.gradient_checkpointing=false")


def train_plain(base: Path, rows: Path, output: Path, setting: Setting, keeps_float32: bool = False) -> None:
    """Train as the documentation of TRL does: TRL, PEFT and bitsandbytes with their defaults, on the same 4-bit base."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    template = Path(__file__).parents[2] / "templates" / "yulan-mini.jinja"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = {"": 0} if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantized, dtype=torch.bfloat16, device_map=device
    )
    config = SFTConfig(
        output_dir=str(output),
        max_length=setting.tokens,
        packing=setting.packing,
        assistant_only_loss=True,
        max_steps=STEPS,
        per_device_train_batch_size=setting.batch,
        gradient_accumulation_steps=1,
        learning_rate=2e-4,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
    )
    conversations = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(conversations),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if keeps_float32:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train()


def train_plain_float32(base: Path, rows: Path, output: Path, setting: Setting) -> None:
    """Train like `train_plain`, with the adapter in float32 as the kit keeps it; TRL rounds it to bfloat16."""
    train_plain(base, rows, output, setting, keeps_float32=True)


PROGRAMS: dict[str, Callable[[Path, Path, Path, Setting], None]] = {
    "ours": train_ours,
    "ours, speed auto": train_fast,
    "ours, no checkpointing": train_roomy,
    "plain TRL": train_plain,
    "plain TRL, float32 adapter": train_plain_float32,
}


def describe_speed(watch: Watch, setting: Setting, flops: float) -> dict[str, Any]:
    """Return seconds a step, tokens a second, the share of the device's rate, and the peak memory, without the first steps.

    `flops` are those of one step, counted by `finetune plan` for rows that are all full.
    """
    measured = sorted(watch.seconds[FIRST_MEASURED:])
    median = measured[len(measured) // 2]
    return {
        "setting": setting.name,
        "seconds": median,
        "tokens_per_second": setting.tokens * setting.batch / median,
        "flops_per_second": flops / median,
        "allocated": watch.training[0],
        "reserved": watch.training[1],
        "kernels": watch.kernels,
        "busy_seconds": watch.busy_seconds,
        "longest_kernels": watch.longest,
        "all_seconds": watch.seconds,
        "losses": watch.losses,
    }


def count_step_flops(base: Path, setting: Setting) -> float:
    """Count the floating point operations of a step without the repeats of gradient checkpointing: six for a weight and token."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    width, depth = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    head_width = config.get("head_dim") or width // config["num_attention_heads"]
    layer = width * head_width * (heads + config["num_attention_heads"]) + 3 * width * config["intermediate_size"]
    weights = depth * layer + width * config["vocab_size"]
    # The base is frozen: two operations for the forward pass, two for the gradients of activations, none for those of weights.
    tokens = setting.tokens * setting.batch
    attention = 2 * depth * config["num_attention_heads"] * head_width * setting.tokens  # causal: half of 4 x tokens
    return float(tokens * (4 * weights + 3 * attention))


def main() -> None:
    """Measure one program at every setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--program", choices=PROGRAMS, required=True)
    parser.add_argument("--only", default="", help="a part of the names of some settings")
    arguments = parser.parse_args()
    base = arguments.base / "llama"
    for setting in SMALL if arguments.rehearse else REAL:
        if arguments.only not in setting.name:
            continue

        def measure(setting: Setting = setting) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder, watch_trainers(PROFILED) as watch:
                rows = Path(folder) / "rows.jsonl"
                write_conversations(rows, setting, base)
                PROGRAMS[arguments.program](base, rows, Path(folder) / "run", setting)
            return describe_speed(watch, setting, count_step_flops(base, setting))

        record(arguments.output, f"{arguments.program}: {setting.name}", measure)


if __name__ == "__main__":
    main()
