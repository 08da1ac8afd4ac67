"""Make TRL's online trainers encode prompts as this kit does, and end answers at the template's stop tokens."""

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

from finetune.compat import replace_chat_template
from finetune.data.encoding.rendering import ChatTemplate, Messages, encode_prompt


def bind_template(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer whose `apply_chat_template` is the kit's own encoding of prompts.

    TRL asks the tokenizer for the tokens of a conversation. The library's method would turn a question that spells a control
    token into that token, and renders templates without their span marks differently.
    """
    bound = copy.copy(tokenizer)

    def encode(conversation: Sequence[Messages], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [encode_prompt(tokenizer, template, messages) for messages in conversation]}

    replace_chat_template(bound, encode)
    return bound


def set_stop_tokens(model: PreTrainedModel, stop_tokens: Sequence[int]) -> None:
    """Set the tokens that end an answer in the template; TRL reads them from the model's generation settings."""
    model.generation_config.eos_token_id = list(stop_tokens)


class PromptOrder(TrainerCallback):
    """Shuffle the prompts of each epoch by the seed and the number of the epoch.

    TRL's sampler draws one order after another from the same generator. A run that is resumed in its second epoch would repeat
    the order of the first (TRL 1.16, `RepeatSampler`).
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader[Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Seed the sampler before it draws the order of this epoch."""
        batches: Any = train_dataloader.batch_sampler if train_dataloader is not None else None
        while isinstance(batches, BatchSamplerShard):
            batches = batches.batch_sampler
        epoch = int((state.epoch or 0) + 1e-6)  # a sum of fractions, close to a whole number
        batches.sampler.generator.manual_seed(args.seed + epoch)
