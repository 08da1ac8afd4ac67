"""Keep the documents of packed rows apart in a kernel that gets no mask.

`sdpa` and `eager` get a mask that transformers makes from the positions. Its flash kernels read the positions themselves, but only of
a batch of one row: in a batch of several packed rows, every document would see those before it in its row.

Source: _is_packed_sequence and _flash_attention_forward in transformers/modeling_flash_attention_utils.py of 5.23.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from finetune.compat import name_attention

# The kernels that get a mask.
_MASKED = frozenset({"sdpa", "eager"})


def keep_documents_apart(model: Any) -> Callable[[], None]:
    """Tell the kernel of a model, before every pass, where documents begin; return the function that ends this."""
    handle = model.base_model.register_forward_pre_hook(_add_starts, with_kwargs=True)
    remove: Callable[[], None] = handle.remove
    return remove


def _add_starts(module: nn.Module, arguments: Any, values: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Add to positions without a mask where each document begins in the tokens of all rows, and how long the longest is."""
    positions = values.get("position_ids")
    is_told = values.get("cu_seq_lens_q") is not None or values.get("attention_mask") is not None
    has_cache = values.get("past_key_values") is not None
    if positions is None or is_told or has_cache or name_attention(module.config) in _MASKED:
        return None
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions)
    more = {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": int(longest),
        "max_length_k": int(longest),
    }
    return arguments, {**values, **more}
