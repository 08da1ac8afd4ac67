"""Compare a GGUF file in llama.cpp with the folder it was made of in transformers: tokens, logits, answers."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from finetune.api_arguments import name_option
from finetune.data.encoding.rendering import encode_prompt
from finetune.data.encoding.text_samples import render_sample
from finetune.errors import ExportError, describe_count
from finetune.exporting.gguf.llama_folder import LlamaFolder
from finetune.exporting.gguf.tensor_types import TensorType
from finetune.exporting.proof import BINDING, LlamaCppScores, has_binding
from finetune.runs.export_settings import ExportSettings
from finetune.runs.trained_tokens import make_bundled_samples

_CONTEXTS, _QUESTIONS, _LONGEST = 12, 8, 32
_CONTEXT_TOKENS = 192
# Beyond these something other than rounding is wrong, in nats. Trained weights are far below them: docs/export.md has figures.
_MOST_KL = {"f32": 1e-5, "f16": 0.01, "bf16": 0.02, "q8_0": 0.02}
_MOST_KL_BELOW_8_BITS = 1.0


@dataclass
class LlamaCppProver:
    """Runs files in llama.cpp, and the folder that they were made of once in transformers."""

    _expected: dict[Path, _Expected] = field(default_factory=dict)

    def compare(self, file: Path, source: LlamaFolder, chosen: TensorType) -> LlamaCppScores:
        """Run a file in llama.cpp and compare it with its folder.

        Raises:
            ExportError: it does not open there, its tokens differ, or its logits differ by more than the rounding of its type.
        """
        if source.folder not in self._expected:
            self._expected[source.folder] = _expect(source)
        return _compare(file, chosen, self._expected[source.folder])


def make_prover(settings: ExportSettings) -> LlamaCppProver | None:
    """Return what runs the GGUF files of an export in llama.cpp, where there are any, and a binding is installed."""
    return LlamaCppProver() if settings.gguf and settings.verify and has_binding() else None


@dataclass(frozen=True)
class _Expected:
    """What a file must give in llama.cpp, from the folder in transformers."""

    job: dict[str, Any]
    ids: list[list[int]]
    rows: list[list[int]]
    prompts: list[list[int]]
    answers: list[list[int]]
    stops: list[int]
    scores: torch.Tensor


def _expect(source: LlamaFolder) -> _Expected:
    """Run the folder in transformers, in float32, once for all types."""
    samples = make_bundled_samples(source.tokenizer, source.template)
    rows = [sample for sample in samples if sample.row["messages"][-1]["role"] == "assistant"]
    chats = [[dict(turn) for turn in sample.row["messages"][:-1]] for sample in rows[:_QUESTIONS]]
    prompts = [encode_prompt(source.tokenizer, source.template, chat) for chat in chats]
    sides = [side for sample in rows for side in sample.token_ids][:_CONTEXTS]
    contexts = [list(ids[: min(_CONTEXT_TOKENS, 8 + 2 * len(ids) // 3)]) for ids in sides]
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in contexts]
        answers = [_generate(model, ids, source) for ids in prompts]
    texts = make_texts([str(token) for token in source.tokenizer.all_special_tokens])
    texts = [texts[number] for number in _keep_agreed(source, texts)]
    trained = _expect_rows(source)
    job = {
        "texts": texts,
        "rows": [text for text, _ in trained],
        # A template that this kit cannot encode with is in the file to the letter, and is not rendered here.
        "chats": chats if source.form.template is not None else [],
        "questions": prompts,
        "contexts": contexts,
        "longest": _LONGEST,
        "vocabulary": source.config["vocab_size"],
        "forced": source.tokenizer("\n", add_special_tokens=False).input_ids[-1],
        "threads": torch.get_num_threads(),
        "context": max(len(ids) for ids in [*prompts, *contexts]) + _LONGEST + 8,
    }
    scores = torch.stack(logits).double().log_softmax(-1)
    return _Expected(
        job=job,
        ids=source.tokenizer(texts).input_ids,
        rows=[ids for _, ids in trained],
        prompts=prompts if source.form.template is not None else [],
        answers=answers,
        stops=source.stop_tokens,
        scores=scores,
    )


def _generate(model: Any, ids: list[int], source: LlamaFolder) -> list[int]:
    answer = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=_LONGEST,
        do_sample=False,
        eos_token_id=source.stop_tokens,
        pad_token_id=source.tokenizer.pad_token_id,
    )
    return list(answer[0, len(ids) :].tolist())


def _keep_agreed(source: LlamaFolder, texts: Sequence[str]) -> list[int]:
    """Return the numbers of the texts on whose tokens the libraries agree.

    transformers 5 puts no second space before a text that begins with one; llama.cpp, transformers 4 and tokenizer.json put it.
    """
    if not source.vocabulary.adds_space:
        return list(range(len(texts)))
    written = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
    pairs = zip(source.tokenizer(list(texts)).input_ids, written.encode_batch(list(texts)), strict=True)
    return [number for number, (ids, encoding) in enumerate(pairs) if ids == encoding.ids]


def _expect_rows(source: LlamaFolder) -> list[tuple[str, list[int]]]:
    """Return the texts of the rows that the run stored, each with the tokens that were trained, where the libraries agree on them."""
    pairs: list[tuple[str, list[int]]] = []
    for sample in source.rows:
        texts = render_sample(source.tokenizer, source.template, sample)
        pairs += zip(texts, sample.token_ids, strict=True) if texts is not None else []
    return [pairs[number] for number in _keep_agreed(source, [text for text, _ in pairs])] if pairs else []


def make_texts(control: Sequence[str]) -> list[str]:
    """Return more than 200 different texts: English, Chinese, code, digits, white space, symbols and control tokens."""
    parts = (
        "The quick brown fox doesn't jump over the lazy dog's back.",
        "请用中文回答：机器学习是什么？它和统计学有何不同？",
        "def add(a, b):\n    return a + b  # sum\n\n\nprint(add(1,2))",
        "In 1984, 3.14159 * 2 = 6.28318; call +86-10-12345678.",
        "a  b   c\t\td\n\n  e \r\n f    ",
        "naïve café — “quotes” … 😀👍🏽 Привет ١٢٣ 日本語ｶﾅ",
        '{"key": [1, -2.5e-3, null], "x": "\\n"}',
        "x",
    )
    texts = [*parts, *(f"{first} {second}" for first, second in product(parts, parts) if first != second)]
    texts += [f"{first}{second}" for first, second in product(parts, parts)]
    texts += [f"{part[:cut]}" for part in parts for cut in range(2, 14, 2)]
    texts += [f"{token}{part}{token}" for token in control for part in parts]
    texts += [f"{token} \n{part}" for token in control for part in parts[:3]]
    return list(dict.fromkeys(texts))


def _compare(file: Path, chosen: TensorType, expected: _Expected) -> LlamaCppScores:
    """Run a file in llama.cpp and compare it.

    Raises:
        ExportError: it does not open there, its tokens differ, or its logits differ by more than the rounding of its type.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run_worker({**expected.job, "file": str(file), "output": name}, file)
        found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
        # llama.cpp sums probabilities in float32, so that they add up to 1 only nearly.
        scores = torch.from_numpy(numpy.load(folder / "scores.npy")).double().log_softmax(-1)
    _check_ids(file, expected, found)
    difference = (scores - expected.scores).abs()
    kl = float((expected.scores.exp() * (expected.scores - scores)).sum(-1).mean())
    pairs = list(zip(expected.answers, found["answers"], strict=True))
    ended = [answer for ids, answer in pairs if ids[-1] in expected.stops]
    result = LlamaCppScores(
        version=version(BINDING),
        texts=len(expected.ids),
        max_abs=float(difference.max()),
        spread=float(expected.scores.std(-1).mean()),
        kl=max(0.0, kl),
        contexts=len(scores),
        answers=len(pairs),
        same_answers=sum(_cut(ids, expected) == _cut(answer["ids"], expected) for ids, answer in pairs),
        stopped=sum(answer["stopped"] for answer in ended),
        stopped_there=len(ended),
        rows=len(expected.rows),
    )
    limit = _MOST_KL.get(chosen.name, _MOST_KL_BELOW_8_BITS)
    if not result.kl <= limit:
        raise ExportError(
            f"{file.name}: llama.cpp answers differently: KL {result.kl:.2g} > {limit:g} nats for {chosen.name}, log-probabilities differ by "
            f"up to {result.max_abs:.2g}; nothing was left"
        )
    return result


def _cut(ids: Sequence[int], expected: _Expected) -> list[int]:
    """Return an answer without the token that ended it, which llama.cpp leaves out."""
    return [token for token in ids if token not in expected.stops]


def _run_worker(job: dict[str, Any], file: Path) -> None:
    """Run llama.cpp on a file in a process of its own.

    Raises:
        ExportError: it could not open the file, or ended with an error.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "finetune.exporting.gguf.llama_cpp_worker"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if ended.returncode:
        said = " / ".join(line.strip() for line in ended.stderr.splitlines()[-3:])
        raise ExportError(
            f"{file.name}: llama.cpp ({BINDING} {version(BINDING)}) cannot run it (status {ended.returncode}): {said[-400:]}; nothing was "
            f"left. {name_option('--no-verify')} writes the file unproved"
        )


def _check_ids(file: Path, expected: _Expected, found: dict[str, Any]) -> None:
    """Compare tokens of texts, of rows that were trained, and of conversations rendered with the template in the file.

    Raises:
        ExportError: they differ.
    """
    texts = zip(expected.job["texts"], expected.ids, found["ids"], strict=True)
    wrong = [(text, ids, got) for text, ids, got in texts if ids != got]
    if wrong:
        text, ids, got = wrong[0]
        raise ExportError(
            f"{file.name}: llama.cpp gives other tokens for {len(wrong)} of {describe_count(len(expected.ids), 'text')} (first: {text[:40]!r}: {got[:12]}, "
            f"trained with {ids[:12]}); nothing was left"
        )
    for text, ids, got in zip(expected.job["rows"], expected.rows, found["rows"], strict=True):
        if got[: len(ids)] != ids:
            place = next(place for place, (one, two) in enumerate(zip(ids, [*got, -1], strict=False)) if one != two)
            raise ExportError(
                f"{file.name}: llama.cpp gives other tokens for a row than were trained ({text[:40]!r}: from token {place} on "
                f"{got[place : place + 8]}, trained with {ids[place : place + 8]}); nothing was left"
            )
    for ids, got in zip(expected.prompts, found["prompts"], strict=True):
        # The server takes the template's bos away, and puts its own there when it tokenizes.
        if got not in (ids, ids[:1] + ids):
            raise ExportError(
                f"{file.name}: llama.cpp renders the chat template differently: {got[:16]}, trained with {ids[:16]}; nothing was left"
            )
