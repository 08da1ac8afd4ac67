"""Read what a launch says about DeepSpeed: the stage of ZeRO, and settings in DeepSpeed's file that the recipe decides.

Source: `DeepSpeedPlugin.__post_init__` of accelerate 1.15, which prefers the file to accelerate's own settings.
"""

import base64
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import MachineError

_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_NOTHING = ("", "none")
_STAGES = (2, 3)
# Keys of DeepSpeed's file that must leave the value to the recipe, each with the recipe's key.
_LEFT_TO_RECIPE: Mapping[str, str] = {
    "train_batch_size": "trainer.per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "trainer.per_device_train_batch_size",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "gradient_clipping": "trainer.max_grad_norm",
    "bf16.enabled": "model.dtype",
    "fp16.enabled": "model.dtype",
    "optimizer": "trainer.optim",
    "scheduler": "trainer.lr_scheduler_type",
}
# DeepSpeed builds these itself where the file names them.
_BUILT = ("optimizer", "scheduler")


def read_stage() -> int:
    """Return the stage of ZeRO, 2 or 3, that this process was launched with.

    Raises:
        MachineError: it is another stage, or DeepSpeed's file cannot be read.
    """
    return check_stage(os.environ.get(_FILE, "none"), os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def check_stage(file: str, stage: object) -> int:
    """Return the stage that DeepSpeed's file names, or `stage` where there is no such file.

    Raises:
        MachineError: it is neither 2 nor 3, or the file cannot be read.
    """
    found, where = stage, "zero_stage in accelerate's configuration"
    if (content := read_file(file)) is not None:
        found, where = look_up(content, "zero_optimization.stage"), f"zero_optimization.stage in {file}"
    if str(found) not in map(str, _STAGES):
        raise MachineError(f"{where} is {found!r}; set 2 or 3, or launch with recipes/accelerate/ddp.yaml")
    return int(str(found))


def read_file(name: str) -> Mapping[str, Any] | None:
    """Return the content of the file that accelerate's `deepspeed_config_file` names; None where that is empty or `none`.

    Raises:
        MachineError: it cannot be read.
    """
    if name in _NOTHING:
        return None
    try:
        # accelerate also takes the content itself, in base64.
        text = Path(name).read_text(encoding="utf-8") if Path(name).exists() else base64.urlsafe_b64decode(name)
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise MachineError(f"deepspeed_config_file: {name}: cannot be read as DeepSpeed's JSON ({error})") from error
    if not isinstance(content, dict):
        raise MachineError(f"deepspeed_config_file: {name}: must be a JSON object, as DeepSpeed documents it")
    return content


def look_up(content: Mapping[str, Any], path: str) -> Any:
    """Return the value at a path such as `zero_optimization.stage`, or None."""
    found: Any = content
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def list_contradictions() -> Iterator[str]:
    """Yield the settings of this launch that the recipe decides, or without which no result could be saved."""
    content = read_file(os.environ.get(_FILE, "none"))
    if content is None:
        saves = os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false").lower() == "true"
        if read_stage() == 3 and not saves:
            yield "zero3_save_16bit_model: must be true in accelerate's configuration, so that whole weights can be saved"
        return
    for path, key in _LEFT_TO_RECIPE.items():
        found = look_up(content, path)
        if path in _BUILT:
            if found is not None:
                yield f"{path} in DeepSpeed's file: {key} in the recipe decides; remove it from the file"
        elif found not in (None, "auto", False):
            yield f'{path} in DeepSpeed\'s file: {key} in the recipe decides; set "auto"; found {found!r}'
    if look_up(content, "gradient_accumulation_steps") is None:  # accelerate would take 1
        yield 'gradient_accumulation_steps in DeepSpeed\'s file: is missing; set "auto"'
    saving = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if read_stage() == 3 and look_up(content, saving) is not True:
        yield f"{saving} in DeepSpeed's file: must be true, so that whole weights can be saved"
