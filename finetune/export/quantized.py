"""The weights that a quantized run really trained on: quantized and dequantized again, one tensor at a time.

Source: QLoRA (arXiv 2305.14314), section 3; LLM.int8() (arXiv 2208.07339), section 3. The arithmetic is bitsandbytes' own.
"""

import importlib

import torch


def is_quantized(name: str) -> bool:
    """Tell whether a tensor of the base is quantized in training: the linear layers are, tables, norms and biases are not."""
    return name.endswith("_proj.weight")


def requantize(weight: torch.Tensor, quantize: str, dtype: torch.dtype) -> torch.Tensor:
    """Return what a whole matrix is worth once it was quantized from `dtype`, in float32; `quantize` is nf4 or int8."""
    functional = importlib.import_module("bitsandbytes.functional")
    matrix = weight.to(dtype)
    if quantize == "nf4":
        packed, state = functional.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4")
        restored: torch.Tensor = functional.dequantize_4bit(packed, state)
        return restored.float()
    rows, scales, _ = functional.int8_vectorwise_quant(matrix.to(torch.float16))
    restored = functional.int8_vectorwise_dequant(rows, scales)
    return restored.float()
