"""LAMBADA: the last word of a passage, by its log-likelihood (harness) or generated (authors).

Source: lambada_openai of lm-evaluation-harness 0.4.13; LLMBox at 5a1cfe2 as the authors called it.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from finetune.evaluation.asking.asked_model import Likelihood
from finetune.evaluation.asking.generation import Generated
from finetune.evaluation.tasks.task_forms import Question, Row, Sample, Tools


def ask_likelihood(rows: Sequence[Row], exemplars: Sequence[Row], tools: Tools) -> list[Question]:
    """Divide each passage at its last space (U+0020 only); a passage without one is all answer."""
    return [Question(context, f" {word}") for context, word in map(_divide, rows)]


def score_likelihood(row: Row, found: Likelihood, tools: Tools) -> Sample:
    """Return the log-likelihood in nats, and whether every token of the word is the likeliest."""
    return {"loglikelihood": found.loglikelihood, "greedy": found.is_greedy}


def ask_word(rows: Sequence[Row], exemplars: Sequence[Row], tools: Tools) -> list[Question]:
    """Return the passages without their last word and without white space at either end."""
    return [Question(context.strip(), f" {word}") for context, word in map(_divide, rows)]


def score_word(row: Row, found: Sequence[Generated], tools: Tools) -> Sample:
    """Compare the first tokens of what was generated with the last word."""
    text, reference = found[0].text, f" {_divide(row)[1]}"
    extracted = take_word(text, reference, tools.tokenizer)
    return {
        "generated": text,
        "reference": reference,
        "extracted": extracted,
        "correct": extracted == reference.strip(),
    }


def take_word(text: str, reference: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of as many tokens as the reference has; `waterfall` gives `water` for the reference ` water`."""
    count = len(tokenizer.encode(reference, add_special_tokens=False))
    ids = tokenizer.encode(text, add_special_tokens=False)
    return str(tokenizer.decode(ids[:count])).strip()


def _divide(row: Row) -> tuple[str, str]:
    """Return a passage before its last space, and after it."""
    context, _, word = str(row["text"]).rpartition(" ")
    return context, word
