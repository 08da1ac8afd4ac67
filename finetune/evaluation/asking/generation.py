"""Generate texts for a batch of prompts, until a stop string, a stop token or a limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

# A stop string is looked for in its own number of tokens and two more, because a model may divide the same text otherwise.
_SPARE_TOKENS = 2


@dataclass(frozen=True)
class Generation:
    """How a text is generated; temperature 0 takes the likeliest token. `samples` texts are drawn for each prompt."""

    max_new_tokens: int
    stops: tuple[str, ...] = ()
    temperature: float = 0.0
    samples: int = 1


@dataclass(frozen=True)
class Prompt:
    """The ids of a prompt, and the seed of what is drawn for it."""

    ids: list[int]
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """A generated text, cut before the first stop string."""

    text: str
    prompt_tokens: int


@torch.no_grad()  # a model that trains on may keep tensors of these passes
def generate_batch(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_tokens: Sequence[int],
    prompts: Sequence[Prompt],
    settings: Generation,
) -> list[Generated]:
    """Generate one text for each prompt; the texts are those of each prompt alone, but for rounding."""
    longest = max(len(prompt.ids) for prompt in prompts)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_tokens[0]
    gaps = [longest - len(prompt.ids) for prompt in prompts]
    ids = torch.tensor([[padding] * gap + prompt.ids for gap, prompt in zip(gaps, prompts, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(set(stop_tokens)),
        pad_token_id=padding,
        bos_token_id=tokenizer.bos_token_id,
    )
    device = model.device
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        stopping_criteria=[_Stops(tokenizer, settings.stops, longest)] if settings.stops else None,
        logits_processor=[_Draws([prompt.seed for prompt in prompts], settings.temperature)]
        if settings.temperature
        else None,
    )
    texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [
        Generated(cut_at_stops(text, settings.stops), len(prompt.ids))
        for text, prompt in zip(texts, prompts, strict=True)
    ]


@torch.no_grad()
def trace_greedy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_tokens: Sequence[int],
    prompt: Prompt,
    count: int,
) -> tuple[list[int], list[float]]:
    """Return the likeliest next tokens, stop token included, and by how many nats each is ahead of the second likeliest."""
    ids = torch.tensor([prompt.ids], device=model.device)
    config = GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=sorted(set(stop_tokens)),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_tokens[0],
        bos_token_id=tokenizer.bos_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    best = [step[0].float().topk(2).values for step in output.logits]
    return output.sequences[0, ids.shape[1] :].tolist(), [float(two[0] - two[1]) for two in best]


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of the stop strings."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


class _Stops(StoppingCriteria):
    """Ends each row of a batch at its own stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], start: int) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, start
        encoded = [tokenizer.encode(stop, add_special_tokens=False) for stop in stops]
        self.window = max(map(len, encoded)) + _SPARE_TOKENS
        self.ended: list[bool] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return for each row whether it has ended."""
        self.ended = self.ended or [False] * len(input_ids)
        tails = self.tokenizer.batch_decode(input_ids[:, max(self.start, input_ids.shape[1] - self.window) :])
        self.ended = [
            ended or any(stop in tail for stop in self.stops) for ended, tail in zip(self.ended, tails, strict=True)
        ]
        return torch.tensor(self.ended, device=input_ids.device)


class _Draws(LogitsProcessor):
    """Adds noise to the logits, so that their maximum is a draw at a temperature.

    The noise is Gumbel's; see https://arxiv.org/abs/1411.0030. Each row has a generator of its own, so that what is drawn for a prompt
    does not depend on the other prompts of its batch.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits with noise, as float32 of shape (rows, tokens)."""
        drawn = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=one) for one in self.generators])
        return scores.float() / self.temperature - drawn.log().to(scores.device)
