"""Let a model score answers from 1 to 5 for instruction following, informativeness and truthfulness.

Source: YuLan-Mini (arXiv 2412.17743), post-training.
"""

from collections.abc import Callable, Mapping, Sequence

from finetune.synthesis.endpoints.endpoint import Endpoint
from finetune.synthesis.endpoints.questioning import Request, Skip
from finetune.synthesis.prompts import Prompt, read_scores
from finetune.synthesis.reading_answers import ask_until_read

Conversation = Sequence[Mapping[str, str]]
# A later attempt is drawn, because the likeliest answer would come again.
_LATER_TEMPERATURE = 0.7


def make_judge_request(prompt: Prompt, turns: Conversation, max_tokens: int, attempt: int) -> Request:
    """Return the question to a judge about the last answer of a conversation."""
    shown = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]
    temperature = _LATER_TEMPERATURE if attempt else 0.0
    return Request((("user", prompt.render(turns=shown)),), max_tokens, temperature, attempt)


def judge_conversations(
    endpoint: Endpoint,
    prompt: Prompt,
    count: int,
    read: Callable[[int], Conversation],
    max_tokens: int,
    attempts: int,
) -> list[dict[str, float] | Skip]:
    """Return the scores of the last answer of `count` conversations, or why there are none; `read` returns one by its number.

    Raises:
        EndpointError: the judge cannot be asked, or a limit is reached.
    """
    return ask_until_read(
        endpoint,
        count,
        lambda number, attempt: make_judge_request(prompt, read(number), max_tokens, attempt),
        lambda _, text: read_scores(text),
        attempts,
    )


def mean_score(scores: Mapping[str, float]) -> float:
    """Return the mean of the scores."""
    return sum(scores.values()) / len(scores)
