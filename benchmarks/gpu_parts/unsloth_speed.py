"""Train the rows of the comparison with Unsloth, in the way of its documentation; a process of its own, as it replaces parts of libraries.

Source: https://unsloth.ai/docs/get-started/fine-tuning-llms-guide and the signatures of Unsloth 2026.10.9.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path

from gpu_parts.lines import explain, is_measured, read_lines, write_line
from gpu_parts.settings import ALPHA, RANK, TEMPLATE, Setting, list_trl_options, parse_arguments

NAME = "Unsloth"
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VERSIONS = (
    "unsloth",
    "unsloth_zoo",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "bitsandbytes",
    "xformers",
    "flash_attn",
)


def find_reason() -> str | None:
    """Import Unsloth, which has to come before transformers; return why it cannot be measured, or None."""
    if importlib.util.find_spec("unsloth") is None:
        return "unsloth is not installed"
    try:
        importlib.import_module("unsloth")
    except Exception as error:
        return explain(error)
    return None


def train_unsloth(base: Path, rows: Path, output: Path, setting: Setting) -> None:
    """Train a 4-bit base with Unsloth's own gradient checkpointing and TRL's trainer, on the answers only."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base),
        max_seq_length=setting.tokens,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        fix_tokenizer=False,  # a mended tokenizer splits the headers into other tokens
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=LINEAR_LAYERS,
        bias="none",
        use_gradient_checkpointing="unsloth",
    )
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    conversations = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    options = list_trl_options(output, setting, torch.cuda.is_available())
    # A few hundred rows: more processes take longer to start.
    config = SFTConfig(**options, dataset_num_proc=1)
    rows_of_texts = Dataset.from_list(conversations)
    SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows_of_texts, args=config).train()


def read_versions() -> dict[str, str]:
    """Return the versions of the libraries that this process uses; they differ from those of the other programs."""
    found = {}
    for name in VERSIONS:
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    """Measure Unsloth at every setting, or write in one line why not."""
    arguments = parse_arguments(argparse.ArgumentParser(description=__doc__))
    if reason := find_reason():
        write_line(arguments.output, {"name": f"{NAME}: all settings", "skipped": reason})
        return
    from gpu_parts.timing import measure_program  # imports transformers, of which Unsloth has replaced parts now

    arguments.base, arguments.output = arguments.base.resolve(), arguments.output.resolve()
    work = Path(os.environ["UNSLOTH_COMPILE_LOCATION"])
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)  # it also writes beside where it runs
    measure_program(NAME, train_unsloth, arguments)
    if any(is_measured(row) for row in read_lines(arguments.output)):
        write_line(arguments.output, {"name": f"{NAME}: versions", "versions": read_versions()})


if __name__ == "__main__":
    main()
