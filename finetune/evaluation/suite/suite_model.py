"""Answer the requests of lm-evaluation-harness with a model in memory, and keep every answer as it comes."""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from finetune.data.encoding.rendering import render_prompt
from finetune.errors import FinetuneError
from finetune.evaluation.asking.asked_model import AskedModel
from finetune.evaluation.asking.generation import Generation, Prompt
from finetune.evaluation.tasks.task_results import SampleFile

_KEY_DIGITS = 15
# Options of generation that mean nothing where the likeliest token is taken.
_SAMPLING = frozenset({"do_sample", "top_p", "top_k", "min_p", "use_cache", "eos_token_id"})
Answers = Iterator[tuple[int, Any]]


def make_suite_model(asked: AskedModel, answers: SampleFile) -> Any:
    """Return a model as lm-evaluation-harness calls it; a request that `answers` holds is not asked again."""
    base = importlib.import_module("lm_eval.api.model").LM
    model = type("ModelInMemory", (_Requests, base), {})()
    model.asked, model.answers = asked, answers
    return model


class _Requests:
    """The methods of `lm_eval.api.model.LM` that answer requests; it must stand before that class among the bases."""

    asked: AskedModel
    answers: SampleFile

    @property
    def tokenizer_name(self) -> str:
        """Return a name for its cache of requests, which is not used."""
        return "memory"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text; without a generation prompt its last turn is the beginning of the answer."""
        loaded = self.asked.loaded
        turns = chat_history if add_generation_prompt else chat_history[:-1]
        text = render_prompt(loaded.tokenizer, loaded.template, turns)
        return text if add_generation_prompt else text + chat_history[-1]["content"]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether it is the likeliest."""

        def ask(contents: Sequence[Any], keys: Sequence[int]) -> Answers:
            pairs = [self.asked.encode_pair(context, continuation) for context, continuation in contents]
            for index, found in self.asked.measure(pairs):
                yield index, [found.loglikelihood, found.is_greedy]

        return [(value, greedy) for value, greedy in self._answer("loglikelihood", requests, ask)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-likelihood of each whole text in nats; long texts are divided into windows."""
        return self._answer("loglikelihood_rolling", requests, self._ask_rolling)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return a text for each prompt, as its task's options say."""
        return self._answer("generate_until", requests, self._ask_texts)

    def _answer(
        self, kind: str, requests: Sequence[Any], ask: Callable[[Sequence[Any], Sequence[int]], Answers]
    ) -> list[Any]:
        contents = [list(request.args) for request in requests]
        keys = _list_keys(kind, contents)
        missing = [index for index, key in enumerate(keys) if key not in self.answers.samples]
        found = ask([contents[index] for index in missing], [keys[index] for index in missing])
        for place, answer in tqdm(found, total=len(missing), desc=kind, disable=None):
            self.answers.add(keys[missing[place]], {"kind": kind, "answer": answer})
        return [self.answers.samples[key]["answer"] for key in keys]

    def _ask_rolling(self, contents: Sequence[Any], keys: Sequence[int]) -> Answers:
        """Source: `loglikelihood_rolling` of lm-evaluation-harness 0.4.13 (models/huggingface.py)."""
        tools, tokenizer = importlib.import_module("lm_eval.utils"), self.asked.loaded.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        windows: list[tuple[int, tuple[list[int], list[int]]]] = [
            (index, tools.make_disjoint_window(window))
            for index, (text,) in enumerate(contents)
            for window in tools.get_rolling_token_windows(self.asked.encode(text), first, self.asked.max_length, 1)
        ]
        left, sums = [0] * len(contents), [0.0] * len(contents)
        for index, _ in windows:
            left[index] += 1
        yield from ((index, 0.0) for index, count in enumerate(left) if not count)
        for place, found in self.asked.measure([window for _, window in windows]):
            index = windows[place][0]
            sums[index] += found.loglikelihood
            left[index] -= 1
            if not left[index]:
                yield index, sums[index]

    def _ask_texts(self, contents: Sequence[Any], keys: Sequence[int]) -> Answers:
        groups: dict[Generation, list[int]] = {}
        for index, (_, options) in enumerate(contents):
            groups.setdefault(self._read_options(options), []).append(index)
        for settings, places in groups.items():
            prompts = [Prompt(self.asked.encode(contents[index][0]), keys[index]) for index in places]
            for place, found in self.asked.generate(prompts, settings):
                yield places[place], found.text

    def _read_options(self, options: dict[str, Any]) -> Generation:
        """Read a task's options of generation; the end of text is a stop too.

        Raises:
            FinetuneError: an option cannot be followed.
        """
        read = importlib.import_module("lm_eval.models.utils").normalize_gen_kwargs(options)
        temperature = float(read.pop("temperature", 0.0))
        stops, limit = read.pop("until", []), int(read.pop("max_gen_toks"))
        if other := set(read) - (_SAMPLING if temperature == 0 else {"do_sample", "use_cache", "eos_token_id"}):
            raise FinetuneError(
                f"--tasks: a task of lm_eval asks for the option {min(other)} of generation, which this kit does not offer"
            )
        end = self.asked.loaded.tokenizer.eos_token
        listed = [stops] if isinstance(stops, str) else [*stops, *([end] if end else [])]
        return Generation(limit, tuple(stop for stop in listed if stop), temperature)


def _list_keys(kind: str, contents: Sequence[Any]) -> list[int]:
    """Return a number for each request, by its content and, where one is asked several times, by its place among those."""
    seen: dict[str, int] = {}
    keys = []
    for content in contents:
        text = json.dumps([kind, content], sort_keys=True, default=str)
        seen[text] = number = seen.get(text, -1) + 1
        keys.append(int(hashlib.sha256(f"{number} {text}".encode()).hexdigest()[:_KEY_DIGITS], 16))
    return keys
