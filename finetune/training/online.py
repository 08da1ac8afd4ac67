"""What TRL's online trainers need to ask in our form: prompts in exactly our tokens, answers that end at our stop tokens."""

import copy
from collections.abc import Sequence
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from finetune.data.encoding.rendering import ChatTemplate, Messages, encode_prompt


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


class PromptOrder(TrainerCallback):
    """Give every epoch an order of prompts that follows from the seed and its number alone.

    TRL's sampler draws the orders one after the other, so a run that is resumed in its second epoch would go through the
    order of the first again (TRL 1.16, `RepeatSampler`).
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader[Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Seed the sampler before it draws."""
        batches: Any = train_dataloader.batch_sampler if train_dataloader is not None else None
        while isinstance(batches, BatchSamplerShard):
            batches = batches.batch_sampler
        epoch = int((state.epoch or 0) + 1e-6)  # a whole number that was summed up of steps
        batches.sampler.generator.manual_seed(args.seed + epoch)
