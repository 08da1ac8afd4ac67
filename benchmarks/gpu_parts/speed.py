"""Train the same rows with the kit or with a plain TRL script, and write tokens a second and the peak memory; started by gpu.py."""

import argparse
import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_parts.settings import ALPHA, RANK, STEPS, TEMPLATE, Setting, list_trl_options, parse_arguments
from gpu_parts.timing import Train, measure_program


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

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
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
    config = SFTConfig(**list_trl_options(output, setting, torch.cuda.is_available()))
    conversations = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(conversations),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if keeps_float32:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train()


def train_plain_float32(base: Path, rows: Path, output: Path, setting: Setting) -> None:
    """Train like `train_plain`, with the adapter in float32 as the kit keeps it; TRL rounds it to bfloat16."""
    train_plain(base, rows, output, setting, keeps_float32=True)


@dataclass(frozen=True)
class Program:
    """What trains, and the modules that it needs, imported before its turn to measure comes."""

    train: Train
    modules: tuple[str, ...]


_OURS, _PLAIN = ("finetune.training.run", "bitsandbytes"), ("trl.trainer.sft_trainer", "bitsandbytes")
PROGRAMS = {
    "ours": Program(train_ours, _OURS),
    "ours, speed auto": Program(train_fast, _OURS),
    "ours, no checkpointing": Program(train_roomy, _OURS),
    "plain TRL": Program(train_plain, _PLAIN),
    "plain TRL, float32 adapter": Program(train_plain_float32, _PLAIN),
}


def main() -> None:
    """Measure one program at every setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", choices=PROGRAMS, required=True)
    arguments = parse_arguments(parser)
    program = PROGRAMS[arguments.program]
    for module in program.modules:
        importlib.import_module(module)
    measure_program(arguments.program, program.train, arguments)


if __name__ == "__main__":
    main()
