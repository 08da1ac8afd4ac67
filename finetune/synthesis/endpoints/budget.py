"""Count requests, tokens and cost, and stop before a limit of the recipe is passed."""

import threading
from dataclasses import dataclass

from finetune.errors import EndpointError, describe_count
from finetune.recipe.preparation.synthesize_section import EndpointSection
from finetune.synthesis.endpoints.questioning import Request, Written

_MILLION = 1_000_000


@dataclass
class Spent:
    """What was asked of an endpoint in this run; answers from the cache cost nothing and are counted in `cached`."""

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        """The tokens of all prompts and answers."""
        return self.prompt_tokens + self.answer_tokens


class Budget:
    """The limits of an endpoint. Requests under way count with the most that they can cost."""

    def __init__(self, section: EndpointSection, name: str) -> None:
        self._section, self._name = section, name
        self._lock = threading.Lock()
        self._held_tokens, self._held_cost = 0, 0.0
        self.spent = Spent()

    def reserve(self, request: Request) -> None:
        """Count a request before it is sent.

        Raises:
            EndpointError: it could pass a limit.
        """
        section, spent = self._section, self.spent
        tokens, cost = self._estimate(request)
        with self._lock:
            limits = (
                ("max_requests", section.max_requests, spent.requests + 1),
                ("max_tokens_total", section.max_tokens_total, spent.tokens + self._held_tokens + tokens),
                ("max_cost", section.max_cost, spent.cost + self._held_cost + cost),
            )
            for key, limit, needed in limits:
                if limit is not None and needed > limit:
                    raise EndpointError(
                        f"endpoints.{self._name}.{key}: the limit of {limit:g} would be passed; so far {describe_count(spent.requests, 'request')}, "
                        f"{describe_count(spent.tokens, 'token')}, cost {spent.cost:.4g}. All answers are kept: raise the limit and run again"
                    )
            spent.requests += 1
            self._held_tokens += tokens
            self._held_cost += cost

    def settle(self, request: Request, written: Written | None) -> None:
        """Count what a request has cost; None for one that failed.

        Where the server does not say how many tokens there were, the most that there can have been count, so that limits hold.
        """
        tokens, cost = self._estimate(request)
        with self._lock:
            self._held_tokens -= tokens
            self._held_cost -= cost
            if written is not None:
                prompt, answer = written.prompt_tokens, written.answer_tokens
                if not prompt + answer:
                    prompt, answer = request.characters, request.max_tokens
                self.spent.prompt_tokens += prompt
                self.spent.answer_tokens += answer
                self.spent.cost += self._price(prompt, answer)

    def count_cached(self) -> None:
        """Count an answer that was known already."""
        with self._lock:
            self.spent.cached += 1

    def _estimate(self, request: Request) -> tuple[int, float]:
        # Rarely more than a token for each character, in any script.
        return request.characters + request.max_tokens, self._price(request.characters, request.max_tokens)

    def _price(self, prompt: int, answer: int) -> float:
        return (prompt * self._section.prompt_price + answer * self._section.answer_price) / _MILLION
