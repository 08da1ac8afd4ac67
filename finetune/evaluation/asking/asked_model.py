"""Ask a model: log-likelihoods of given texts, and generated texts, in batches of similar length."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import psutil
import torch

from finetune.data.encoding.rendering import render_prompt
from finetune.evaluation.asking.generation import Generated, Generation, Prompt, generate_batch
from finetune.models.opening import LoadedModel
from finetune.models.row_loss import split_model

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# More rows at once gain nothing on a CPU, and little on a GPU.
_MOST_ROWS = {"cpu": 16, "cuda": 128}
_SPARE_LENGTH = 32
_SHARE_OF_FREE_MEMORY = 0.5


@dataclass(frozen=True)
class Likelihood:
    """The log-likelihood of a continuation in nats; `is_greedy` says whether each of its tokens is the likeliest."""

    loglikelihood: float
    is_greedy: bool
    context_tokens: int
    continuation_tokens: int


@dataclass
class AskedModel:
    """A model that answers prompts as they are or, with `chat`, in its template; `batch_size` None takes what memory allows."""

    loaded: LoadedModel
    batch_size: int | None = None
    chat: bool = False
    max_length: int = field(init=False)

    def __post_init__(self) -> None:
        """Read the number of positions from the model's configuration."""
        self.max_length = int(self.loaded.model.config.max_position_embeddings)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text with the beginning that the tokenizer adds, unless the text brings it itself.

        Source: `tok_encode` of lm-evaluation-harness 0.4.13. Spellings of control tokens become control tokens.
        """
        bos = self.loaded.tokenizer.bos_token
        begins = bos is not None and text.startswith(str(bos))
        return list(self.loaded.tokenizer.encode(text, add_special_tokens=not (begins or self.chat), verbose=False))

    def render(self, prompt: str) -> str:
        """Return the prompt as it is or, with `chat`, as a user's message in the template."""
        if not self.chat:
            return prompt
        message = [{"role": "user", "content": prompt}]
        return render_prompt(self.loaded.tokenizer, self.loaded.template, message)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and of its continuation, cut where the context alone ends.

        White space at the end of the context belongs to the continuation. An empty context is the token that begins every text.

        Source: `_encode_pair` and `loglikelihood` of lm-evaluation-harness 0.4.13.
        """
        tokenizer = self.loaded.tokenizer
        if not context:
            ids = list(tokenizer.encode(continuation, add_special_tokens=False, verbose=False))
            first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            return (ids[:1], ids[1:]) if ids[:1] == [first] else ([first], ids)
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        ids = self.encode(stripped)
        return ids, self.encode(stripped + continuation)[len(ids) :]

    def gives_likelihoods(self) -> bool:
        """Tell whether `measure` can be asked: a model in memory always can, a server not always."""
        return True

    def measure(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Likelihood]]:
        """Yield the number and the log-likelihood of every pair of context and continuation, the longest first."""
        lengths = [min(len(context) + len(continuation) - 1, self.max_length) for context, continuation in pairs]
        yield from self._run_batches(lengths, lambda batch: self._measure_batch([pairs[index] for index in batch]))

    def generate(self, prompts: Sequence[Prompt], settings: Generation) -> Iterator[tuple[int, Generated]]:
        """Yield the number and the text of every prompt, the longest first."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        cut = self.cut_prompts(prompts, settings)
        lengths = [min(len(prompt.ids) + settings.max_new_tokens, self.max_length) for prompt in cut]
        yield from self._run_batches(
            lengths,
            lambda batch: generate_batch(
                model, tokenizer, self.loaded.stop_tokens, [cut[index] for index in batch], settings
            ),
        )

    def cut_prompts(self, prompts: Sequence[Prompt], settings: Generation) -> list[Prompt]:
        """Return the ends of prompts that leave room for the text."""
        room = self.max_length - settings.max_new_tokens
        return [Prompt(prompt.ids[-room:] if room > 0 else prompt.ids, prompt.seed) for prompt in prompts]

    def _run_batches(
        self, lengths: Sequence[int], run: Callable[[Sequence[int]], list[Answer]]
    ) -> Iterator[tuple[int, Answer]]:
        """Run batches of falling length; halve the batches where the GPU's memory is too small."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        most, start = len(order), 0
        while start < len(order):
            size = min(most, self.batch_size or self._fit_batch(lengths[order[start]]))
            # Short rows beside a long one would be mostly padding.
            least = lengths[order[start]] // 2 - _SPARE_LENGTH
            batch = [index for index in order[start : start + size] if lengths[index] >= least]
            size = len(batch)
            try:
                answers = run(batch)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                torch.cuda.empty_cache()
                most = size // 2
                logger.info("%s rows at once do not fit the memory; continuing with %s", size, most)
                continue
            yield from zip(batch, answers, strict=True)
            start += size

    def _fit_batch(self, length: int) -> int:
        """Return how many rows of a length in tokens fit half of the memory that is free."""
        config, device = self.loaded.model.config, self.loaded.model.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        head = config.hidden_size // config.num_attention_heads
        keys = 2 * config.num_hidden_layers * config.num_key_value_heads * head
        # Keys and values of all layers; of one layer the hidden states and the MLP; attention scores of one layer.
        numbers = keys + 8 * config.hidden_size + 3 * config.intermediate_size + config.num_attention_heads * length
        need = length * numbers * 4 + 8 * config.vocab_size
        return max(1, min(_MOST_ROWS.get(device.type, 16), int(free * _SHARE_OF_FREE_MEMORY / need)))

    @torch.no_grad()  # a model that trains on may keep tensors of these passes
    def _measure_batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        backbone, head = split_model(self.loaded.model)
        device = self.loaded.model.device
        inputs = [(context + continuation)[-(self.max_length + 1) :][:-1] for context, continuation in pairs]
        longest = max(map(len, inputs))
        # Padding stands on the right, where no position before it attends to it.
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in inputs], device=device)
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
        found = []
        for row, states, (context, continuation) in zip(inputs, hidden, pairs, strict=True):
            kept = states[len(row) - len(continuation) : len(row)] if continuation else states[:0]
            targets = torch.tensor(continuation, dtype=torch.long, device=device)
            logits = torch.log_softmax(head(kept).float(), dim=-1)
            chosen = logits.gather(-1, targets[:, None])
            is_greedy = bool((logits.argmax(-1) == targets).all())
            found.append(Likelihood(float(chosen.sum()), is_greedy, len(context), len(continuation)))
        return found


def to_bits(likelihood: Likelihood) -> float:
    """Return the negative log-likelihood in bits."""
    return -likelihood.loglikelihood / math.log(2)
