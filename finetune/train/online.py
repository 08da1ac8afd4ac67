"""What TRL's online trainers need to ask in our form: prompts in exactly our tokens, answers that end at our stop tokens."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.data.template import ChatTemplate, Messages, encode_prompt


def bind_template(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer whose chat template is our own encoding of prompts.

    TRL asks a tokenizer for the tokens of a conversation. The library's method would turn a control token's spelling in a
    question into the token itself, and renders templates without their span marks differently; ours does neither.
    """
    bound = copy.copy(tokenizer)

    def apply_chat_template(conversation: Sequence[Messages], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [encode_prompt(tokenizer, template, messages) for messages in conversation]}

    bound.apply_chat_template = apply_chat_template
    return bound


def set_stop_tokens(model: PreTrainedModel, stop_tokens: Sequence[int]) -> None:
    """Let generation end where an answer ends in our template; TRL reads it from the model."""
    model.generation_config.eos_token_id = list(stop_tokens)
