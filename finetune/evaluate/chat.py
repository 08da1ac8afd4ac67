"""Open a run or a model for use, and answer with the very template that it was trained with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from finetune.data.encoding.rendering import encode_prompt
from finetune.errors import FinetuneError
from finetune.models.opening import LoadedModel


@dataclass(frozen=True)
class Answer:
    """An answer; `stopped_by` is the stop token that ended it, or `max_tokens`."""

    text: str
    tokens: int
    stopped_by: str


def answer(
    loaded: LoadedModel, messages: Sequence[Mapping[str, str]], max_new_tokens: int, temperature: float = 0.0
) -> Answer:
    """Generate the assistant's next turn; temperature 0 takes the likeliest token each time.

    Raises:
        FinetuneError: the number of new tokens or the temperature makes no sense.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise FinetuneError(
            f"an answer needs at least 1 new token and a temperature of 0 or more; found {max_new_tokens} and {temperature}"
        )
    prompt = torch.tensor([encode_prompt(loaded.tokenizer, loaded.template, messages)], device=loaded.model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        bos_token_id=loaded.tokenizer.bos_token_id,
        eos_token_id=list(loaded.stop_tokens),
        pad_token_id=loaded.tokenizer.pad_token_id,
    )
    with torch.inference_mode():
        output = loaded.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config
        )
    tokens: list[int] = output[0, prompt.shape[1] :].tolist()
    stopped = tokens[-1] in loaded.stop_tokens
    text = loaded.tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=True)
    return Answer(
        str(text), len(tokens), loaded.tokenizer.convert_ids_to_tokens(tokens[-1]) if stopped else "max_tokens"
    )
