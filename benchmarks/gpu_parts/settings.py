"""What every program of the comparison trains, and what one step computes; no library is imported here, as Unsloth has to be the first."""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The first steps are not measured; in the profiled one, the last, kernels are counted in place of time.
STEPS, FIRST_MEASURED, PROFILED = 9, 3, 8
RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
BASE_SECONDS = 120
TEMPLATE = Path(__file__).parents[2] / "templates" / "yulan-mini.jinja"


@dataclass(frozen=True)
class Setting:
    """What all programs train: the length of the rows, how many a step takes, and whether short ones are packed."""

    tokens: int
    batch: int
    packing: bool

    @property
    def name(self) -> str:
        """Return the setting as a few words."""
        return f"{self.batch} rows of {self.tokens:,} tokens" + (", packed from short rows" if self.packing else "")

    @property
    def step_tokens(self) -> int:
        """Return the tokens of one step."""
        return self.tokens * self.batch

    @property
    def row_tokens(self) -> int:
        """Return the length of one row of the file; four of them are packed into one."""
        return self.tokens // 4 if self.packing else self.tokens

    @property
    def row_count(self) -> int:
        """Return how many rows all steps take."""
        return self.step_tokens * STEPS // self.row_tokens

    @property
    def file(self) -> str:
        """Return the name of the file of rows."""
        return f"{self.batch}x{self.tokens}{'_packed' if self.packing else ''}.jsonl"


# The most important first, as a part may run out of time.
REAL = (Setting(2048, 4, False), Setting(2048, 4, True), Setting(2048, 16, False))
SMALL = (Setting(256, 2, False), Setting(256, 2, True))


def list_settings(is_rehearsal: bool) -> tuple[Setting, ...]:
    """Return the settings of the real size, or those of nano."""
    return SMALL if is_rehearsal else REAL


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the arguments of every program, and read them."""
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--missing", action="store_true", help="only what the output does not hold yet")
    parser.add_argument("--wait", action="store_true", help="start to measure when the standard input ends")
    parser.add_argument("--settings", type=int, default=None, help="how many settings, the first ones")
    return parser.parse_args()


def list_trl_options(output: Path, setting: Setting, on_gpu: bool) -> dict[str, Any]:
    """Return what the programs that use TRL's trainer set of `SFTConfig`, so that they train alike."""
    return {
        "output_dir": str(output),
        "max_length": setting.tokens,
        "packing": setting.packing,
        "assistant_only_loss": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": setting.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "bf16": True,
        "use_cpu": not on_gpu,
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        "disable_tqdm": True,
    }


def wait_for_base(base: Path) -> None:
    """Wait until the checkpoint is there; the part that makes it may run at the same time.

    Raises:
        TimeoutError: it did not come.
    """
    end = time.monotonic() + BASE_SECONDS
    while not (base / "rows").is_dir():
        if time.monotonic() > end:
            raise TimeoutError(f"{base} was not made within {BASE_SECONDS} seconds")
        time.sleep(0.2)


def count_step_flops(base: Path, setting: Setting) -> float:
    """Count the floating point operations of a step without the repeats of gradient checkpointing: six for a weight and token."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    width, depth = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    head_width = config.get("head_dim") or width // config["num_attention_heads"]
    layer = width * head_width * (heads + config["num_attention_heads"]) + 3 * width * config["intermediate_size"]
    weights = depth * layer + width * config["vocab_size"]
    # The base is frozen: two operations for the forward pass, two for the gradients of activations, none for those of weights.
    # Causal attention computes half of 4 x tokens, and packed rows see only themselves.
    attention = 2 * depth * config["num_attention_heads"] * head_width * setting.row_tokens
    return float(setting.step_tokens * (4 * weights + 3 * attention))
