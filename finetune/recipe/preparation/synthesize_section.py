"""The sections `endpoints` and `synthesize` of a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Job = Literal["none", "answers", "questions", "variations", "pairs"]


@dataclass(frozen=True)
class EndpointSection:
    """A model that writes or judges: on an OpenAI-compatible server at `base_url`, or here where there is none.

    Prices are for a million tokens, in any currency; `max_cost` is in the same.
    """

    model: str = ""
    base_url: str = ""
    key_variable: str = ""
    concurrency: int = 8
    timeout_seconds: float = 120.0
    retries: int = 5
    max_requests: int | None = None
    max_tokens_total: int | None = None
    max_cost: float | None = None
    prompt_price: float = 0.0
    answer_price: float = 0.0


@dataclass(frozen=True)
class SynthesizeSection:
    """What `finetune synthesize` writes; the name of a job turns it on."""

    job: Job = "none"
    endpoint: str = ""
    samples: int = 1
    temperature: float = 0.7
    max_tokens: int = 512
    system: str | None = None
    keep: Literal["verified", "best", "all"] = "all"
    rules: Mapping[str, float] = field(default_factory=dict)
    length_tokens: int | None = None
    judge: str = ""
    reward_run: str = ""
    margin: float = 0.0
    variations: tuple[str, ...] = ()
    attempts: int = 3
