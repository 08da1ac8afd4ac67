"""Ask a model through a server, and compare its first answers with those of the same model here before any counts."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from finetune.errors import EndpointError, describe_count
from finetune.evaluation.asking.asked_model import AskedModel, Likelihood
from finetune.evaluation.asking.generation import Generated, Generation, Prompt, cut_at_stops, trace_greedy
from finetune.servers.connection import Connection, ReplyError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer")

NO_LIKELIHOODS = (
    "this server gives no log-likelihoods of a prompt (echo with logprobs), which the task needs; vLLM and SGLang give them, llama.cpp "
    "does not: leave the task or --engine out"
)
_COMPARED, _COMPARED_TOKENS = 20, 32
# Two programs that compute in the same type differ by so many nats; float32 on one side alone does not help.
_TOLERANCE = {torch.float32: 0.01}
_COARSE_TOLERANCE = 0.5
# OpenAI's own servers take no more; the text is cut at all of them here.
_MOST_STOPS = 4
_CONCURRENCY = 8
# A sum of probabilities may exceed 1 by so much.
_ROUNDING = 1e-6
_KEPT = "the samples so far are kept"
# The half of a character that more than one token holds.
_HALF = "\ufffd"


@dataclass
class ServedModel(AskedModel):
    """A model on a server that takes token ids (`/v1/completions`): vLLM, SGLang, llama.cpp. `loaded` is the same model here.

    Prompts are encoded here, so that they are those of a model in memory.
    """

    server: Connection | None = None
    name: str = ""
    where: str = "--engine"
    has_likelihoods: bool | None = field(default=None, init=False)
    compared: set[str] = field(default_factory=set, init=False)

    def measure(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Likelihood]]:
        """Yield the number and the log-likelihood of every pair of context and continuation.

        Raises:
            EndpointError: the server gives none, or other ones than the model here.
        """
        if not pairs:
            return
        if not self.gives_likelihoods():
            raise EndpointError(f"{self.where}: {NO_LIKELIHOODS}")
        self._compare("likelihoods", pairs, self._compare_likelihoods)
        yield from self._ask_all(pairs, self._measure_one)

    def generate(self, prompts: Sequence[Prompt], settings: Generation) -> Iterator[tuple[int, Generated]]:
        """Yield the number and the text of every prompt.

        Raises:
            EndpointError: the server fails, or writes other texts than the model here.
        """
        if not prompts:
            return
        cut = self.cut_prompts(prompts, settings)
        self._compare("texts", cut, lambda some: self._compare_texts(some, settings))
        yield from self._ask_all(cut, lambda prompt: self._generate_one(prompt, settings))

    def gives_likelihoods(self) -> bool:
        """Tell whether the server returns the log-likelihoods of a prompt's tokens."""
        if self.has_likelihoods is None:
            try:
                self.has_likelihoods = len(self._ask_scores([1, 2, 3])) > 2
            except (_RefusedError, _ShapeError):
                self.has_likelihoods = False
        return self.has_likelihoods

    def _ask_all(self, items: Sequence[Item], ask: Callable[[Item], Answer]) -> Iterator[tuple[int, Answer]]:
        with ThreadPoolExecutor(_CONCURRENCY) as pool:
            try:
                for start in range(0, len(items), _CONCURRENCY):
                    yield from enumerate(pool.map(ask, items[start : start + _CONCURRENCY]), start)
            finally:
                pool.shutdown(cancel_futures=True)

    def _measure_one(self, pair: tuple[list[int], list[int]]) -> Likelihood:
        context, continuation = pair
        # One place for the token that a server must generate; as many of the last ids as fit.
        ids = (context + continuation)[-(self.max_length - 1) :]
        scores = self._ask_scores(ids)[: len(ids)]
        if len(scores) != len(ids):
            raise EndpointError(f"{self.where}: the server returned {len(scores)} likelihoods for {len(ids)} tokens")
        kept = scores[len(ids) - len(continuation) :]
        if any(score is None for score, _ in kept):
            raise EndpointError(f"{self.where}: the server returned no likelihood for a token of a continuation")
        odd = [score for score, _ in kept if score is not None and not -math.inf < score <= _ROUNDING]
        if odd:
            raise EndpointError(
                f"{self.where}: the server returned {odd[0]} as the log-likelihood of a token, which must be a finite number of at most 0; "
                f"look at its log, and at its dtype and quantization; {_KEPT}"
            )
        total = sum(score for score, _ in kept if score is not None)
        return Likelihood(total, all(greedy for _, greedy in kept), len(context), len(continuation))

    def _generate_one(self, prompt: Prompt, settings: Generation) -> Generated:
        reply = self._ask(
            prompt.ids,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=prompt.seed % 2**31,
            **({"stop": list(settings.stops[:_MOST_STOPS])} if settings.stops else {}),
        )
        try:
            text = reply["choices"][0]["text"]
        except (LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise self._refuse_shape(json.dumps(reply))
        return Generated(cut_at_stops(text, settings.stops), len(prompt.ids))

    def _ask_scores(self, ids: list[int]) -> list[tuple[float | None, bool]]:
        """Return what the server says of each token of a prompt, and of one that it adds."""
        reply = self._ask(ids, max_tokens=1, echo=True, logprobs=1)
        try:
            return _read_likelihoods(reply)
        except (LookupError, TypeError, AttributeError, ValueError):
            raise self._refuse_shape(json.dumps(reply)) from None

    def _ask(self, ids: list[int], **options: Any) -> Any:
        assert self.server is not None
        create = self.server.client.completions.with_raw_response.create
        try:
            return self.server.read(create, model=self.name, prompt=ids, **options)
        except self.server.failures as error:
            fault = self.server.explain(error)
            text = f"{self.where}: {self.server.base_url} gave no answer: {fault.text}; {_KEPT}"
            raise (_RefusedError(text) if fault.kind == "refused" else EndpointError(text)) from None
        except ReplyError as error:
            raise self._refuse_shape(str(error)) from None

    def _refuse_shape(self, reply: str) -> "_ShapeError":
        assert self.server is not None
        shown = self.server.show(reply) or "nothing"
        return _ShapeError(
            f"{self.where}: the server's reply has another shape than OpenAI's completions: {shown}; look at its log; {_KEPT}"
        )

    def _compare(self, kind: str, items: Sequence[Item], compare: Callable[[Sequence[Item]], None]) -> None:
        """Compare answers to 20 requests of a kind with those of the model here, once."""
        if kind in self.compared:
            return
        step = max(1, len(items) // _COMPARED)
        some = items[::step][:_COMPARED]
        compare(some)
        self.compared.add(kind)
        logger.info("%s: %s of %s agree with the model here", self.where, kind, describe_count(len(some), "prompt"))

    def _compare_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> None:
        here = dict(super().measure(pairs))
        for index, there in self._ask_all(pairs, self._measure_one):
            difference = abs(there.loglikelihood - here[index].loglikelihood)
            if not difference <= self._tolerance + 0.01 * abs(here[index].loglikelihood):
                raise EndpointError(
                    f"{self.where}: the server's model is another one, or computes otherwise: of one of the first prompts it gives a "
                    f"log-likelihood of {there.loglikelihood:.4f}, and the model here {here[index].loglikelihood:.4f}; {_MEND}"
                )

    def _compare_texts(self, prompts: Sequence[Prompt], settings: Generation) -> None:
        settings = replace(settings, temperature=0.0, max_new_tokens=min(_COMPARED_TOKENS, settings.max_new_tokens))
        here = dict(super().generate(prompts, settings))
        for index, there in self._ask_all(prompts, lambda prompt: self._generate_one(prompt, settings)):
            if there.text == here[index].text:
                continue
            margin = self._find_margin(prompts[index], there.text, settings.max_new_tokens)
            if margin > self._tolerance:
                raise EndpointError(
                    f"{self.where}: the server's model is another one, or computes otherwise: to one of the first prompts it writes "
                    f"{there.text[:60]!r}, and the model here {here[index].text[:60]!r}, whose token is ahead by {margin:.3g} nats; {_MEND}"
                )

    @property
    def _tolerance(self) -> float:
        return _TOLERANCE.get(self.loaded.model.dtype, _COARSE_TOLERANCE)

    def _find_margin(self, prompt: Prompt, text: str, count: int) -> float:
        """Return by how many nats the likeliest token is ahead where a text leaves the model's own greedy one."""
        ids, margins = trace_greedy(self.loaded.model, self.loaded.tokenizer, self.loaded.stop_tokens, prompt, count)
        for place in range(len(ids)):
            own = str(self.loaded.tokenizer.decode(ids[: place + 1], skip_special_tokens=True)).rstrip(_HALF)
            if not text.startswith(own):
                # The same text may be divided otherwise for a token or two before it shows.
                return min(margins[max(0, place - 2) : place + 1])
        return min(margins[-2:])


_MEND = "start the server with the same weights, dtype and quantization, or leave --engine out; nothing was counted"


class _RefusedError(EndpointError):
    """The server refuses this request."""


class _ShapeError(EndpointError):
    """A reply does not hold what was asked for."""


def _read_likelihoods(reply: Any) -> list[tuple[float | None, bool]]:
    """Return the log-likelihood of each token, and whether it is the likeliest; the first token has none.

    Another shape raises a LookupError, a TypeError, an AttributeError or a ValueError.
    """
    found = reply["choices"][0]["logprobs"]
    pairs = zip(found["token_logprobs"], found["top_logprobs"], strict=True)
    return [(None, False) if score is None else _read_score(score, top) for score, top in pairs]


def _read_score(score: Any, top: Any) -> tuple[float, bool]:
    numbers = [score, *top.values()]
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise TypeError("a likelihood is no number")
    if any(math.isnan(number) for number in numbers):
        return math.nan, False
    return float(score), score >= max(numbers[1:])
