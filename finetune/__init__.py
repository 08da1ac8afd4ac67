"""Fine-tune YuLan-Mini from any of its published checkpoints, and export verified Llama-format models.

The public functions are imported at their first use, so importing this package imports neither torch nor other large libraries.
"""

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.api import (
        dynamics,
        evaluate,
        evaluate_tasks,
        export,
        fold,
        microanneal,
        open_model,
        plan,
        preview,
        sweep,
        train,
    )
    from finetune.check.recipes import load_recipe

# Set before any library reads them: libraries send no usage data unless the user asks for it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
# The package `kernels`, where it is installed, asks the hub for native code: bitsandbytes lets it on processors with AVX512-BF16 when
# it is imported, transformers when a model is built. Whoever wants that sets USE_HUB_KERNELS=YES; else importing `kernels` fails.
if os.environ.setdefault("USE_HUB_KERNELS", "NO").upper() not in ("1", "ON", "YES", "TRUE"):
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    # bitsandbytes then advises to install the package, which would not help.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in str(record.msg))
# torch keeps freed GPU memory in blocks of fixed size, of which a quarter lay idle at 28,672 tokens (benchmarks/gpu.md). Blocks that
# can grow leave next to nothing idle. Windows has none.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

__all__ = [
    "dynamics",
    "evaluate",
    "evaluate_tasks",
    "export",
    "fold",
    "load_recipe",
    "microanneal",
    "open_model",
    "plan",
    "preview",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # A recipe is checked without torch, so the function that reads it has a home of its own.
    home = "finetune.check.recipes" if name == "load_recipe" else "finetune.api"
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
