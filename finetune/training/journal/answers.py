"""Record the model's answers to a few prompts before step 1, at each evaluation and after the last step."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.data.encoding.rendering import ChatTemplate, encode_prompt
from finetune.data.encoding.template import list_stop_tokens
from finetune.errors import describe_count
from finetune.files.json_files import explain_damage, read_json, write_json
from finetune.runs.results import SampleRow
from finetune.runs.run_files import ANSWERS_FILE, ANSWERS_PAGE, FIXED_ORIGIN, describe_origin

logger = logging.getLogger(__name__)

_QUESTIONS = (
    "Who are you? Answer in two sentences.",
    "小明有十二个苹果，吃了五个，又买了三个，现在有几个？请写出过程。",
)
_OWN_PROMPTS, _LONGEST_PROMPT = 2, 512
_SAMPLE_TOKENS = 64
_UNKNOWN = "(not known)"


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids; `origin` says which row it comes from."""

    token_ids: list[int]
    origin: str


@dataclass(frozen=True)
class Sample:
    """One prompt with its greedy answers before and after training; the answers are without control tokens.

    The one before is unknown where the file was removed before the run was resumed.
    """

    origin: str
    prompt: str
    before: str | None
    after: str | None = None


def choose_prompts(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, rows: Dataset) -> list[Prompt]:
    """Return two fixed questions and the first prompts of the run's rows: the tokens before a row's first trained one."""
    prompts = [
        Prompt(encode_prompt(tokenizer, template, [{"role": "user", "content": question}]), FIXED_ORIGIN)
        for question in _QUESTIONS
    ]
    for row in rows.select(range(min(_OWN_PROMPTS, len(rows)))):
        labels = row["labels"]
        end = next((place for place, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))
        if 1 < end <= _LONGEST_PROMPT:
            prompts.append(Prompt(row["input_ids"][:end], row["origin"]))
    return prompts


def answer_prompts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_tokens: Sequence[int],
    prompts: Sequence[Prompt],
    max_tokens: int,
) -> list[list[int]]:
    """Generate one answer to each prompt, all in one batch, by the likeliest token each time.

    Answers are token ids and include the stop token. The model keeps its mode, and no random number is drawn.
    """
    longest = max(len(prompt.token_ids) for prompt in prompts)
    padding = [longest - len(prompt.token_ids) for prompt in prompts]
    ids = [
        [int(tokenizer.pad_token_id)] * count + prompt.token_ids for count, prompt in zip(padding, prompts, strict=True)
    ]
    mask = [[0] * count + [1] * (longest - count) for count in padding]
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(stop_tokens),
        pad_token_id=tokenizer.pad_token_id,
    )
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
        )
    model.train(was_training)
    return [_cut_behind_stop(answer, stop_tokens) for answer in output[:, longest:].tolist()]


def answer_rows(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[int], rows: Dataset
) -> list[SampleRow]:
    """Return sample rows made of prompts and the model's own answers, for a run whose rows hold prompts only."""
    prompts = [Prompt(row["input_ids"], row["origin"]) for row in rows]
    answers = answer_prompts(model, tokenizer, stop_tokens, prompts, _SAMPLE_TOKENS)
    return [
        SampleRow([*prompt.token_ids, *answer], [IGNORED_LABEL] * len(prompt.token_ids) + answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _cut_behind_stop(answer: list[int], stop_tokens: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(answer) if token in stop_tokens), len(answer) - 1)
    return answer[: end + 1]


class AnswerSheet:
    """Writes the answers of one run to `answers.json` before and after training, and both to `answers.md`."""

    def __init__(
        self, run: Path, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, rows: Dataset, max_tokens: int
    ) -> None:
        self._run = run
        self._tokenizer = tokenizer
        self._stop_tokens = list_stop_tokens(tokenizer, template)
        self._prompts = choose_prompts(tokenizer, template, rows)
        self._max_tokens = max_tokens

    def write_before(self, model: PreTrainedModel | PeftModel) -> None:
        """Generate the answers before step 1 and write them."""
        write_json(self._run / ANSWERS_FILE, [asdict(sample) for sample in self._pair(self.ask(model))])

    def check_before(self) -> None:
        """Check what a run that goes on wrote before its step 1, and say where it is missing.

        Raises:
            FinetuneError: the file is damaged.
        """
        if not (self._run / ANSWERS_FILE).is_file():
            logger.warning("%s is missing: the answers before the training are not known", self._run / ANSWERS_FILE)
        self._read_before()

    def _read_before(self) -> list[Sample]:
        kept = read_json(self._run / ANSWERS_FILE)
        if kept is None:
            return self._pair([None] * len(self._prompts))
        with explain_damage(self._run / ANSWERS_FILE):
            return [Sample(**{**one, "after": None}) for one, _ in zip(kept, self._prompts, strict=True)]

    def _pair(self, answers: Sequence[str | None]) -> list[Sample]:
        return [
            Sample(prompt.origin, str(self._tokenizer.decode(prompt.token_ids)), answer)
            for prompt, answer in zip(self._prompts, answers, strict=True)
        ]

    def write_after(self, model: PreTrainedModel | PeftModel) -> None:
        """Generate the answers after the last step and write them beside those from before."""
        kept, answers = self._read_before(), self.ask(model)
        samples = [replace(one, after=answer) for one, answer in zip(kept, answers, strict=True)]
        write_json(self._run / ANSWERS_FILE, [asdict(sample) for sample in samples])
        (self._run / ANSWERS_PAGE).write_text(_render_page(samples, self._max_tokens), encoding="utf-8")

    def ask(self, model: PreTrainedModel | PeftModel) -> list[str]:
        """Return the model's answers to the prompts, in their order."""
        answers = answer_prompts(model, self._tokenizer, self._stop_tokens, self._prompts, self._max_tokens)
        return [self._decode(answer) for answer in answers]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True)).strip()


def _render_page(samples: Sequence[Sample], max_tokens: int) -> str:
    """Return the samples as Markdown; every text is indented, so that nothing in it is read as mark-up."""
    lines = [
        f"# Answers before and after\n\nThe likeliest token each time, at most {describe_count(max_tokens, 'token')}."
    ]
    for sample in samples:
        lines.append(f"## {describe_origin(sample.origin)}")
        before = _UNKNOWN if sample.before is None else sample.before
        for title, text in (("asked", sample.prompt), ("before", before), ("after", sample.after or "")):
            lines += [f"{title}:", "\n".join(f"    {line}" for line in text.splitlines() or ["(nothing)"])]
    return "\n\n".join(lines) + "\n"
