"""Score answers by the reward rules, by a judge, or by a reward model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.encoding.rendering import encode_conversations
from finetune.errors import EndpointError
from finetune.recipe.preparation.synthesize_section import EndpointSection, SynthesizeSection
from finetune.rewards.judge import Judge, open_judge
from finetune.rewards.reward_functions import judge_answer
from finetune.rewards.rules import Answer
from finetune.runs.results import open_result
from finetune.synthesis.endpoints.endpoint import Endpoint, open_endpoint
from finetune.synthesis.endpoints.questioning import Written
from finetune.synthesis.judging import judge_conversations, mean_score
from finetune.synthesis.prompts import Prompt

Turns = Sequence[Mapping[str, str]]
_JUDGE_TOKENS = 128


@dataclass(frozen=True)
class AnswerToScore:
    """One answer to a prompt; `where` names the row of the prompt in messages."""

    where: str
    turns: Turns
    written: Written
    reference: str | None


@dataclass(frozen=True)
class Scored:
    """The score of an answer and its parts by name; None where a judge gave none."""

    score: float | None
    parts: Mapping[str, float] = field(default_factory=dict)


class Scorer:
    """Scores answers as the section says."""

    def __init__(self, section: SynthesizeSection, endpoints: Mapping[str, EndpointSection]) -> None:
        self._section = section
        self.judge: Endpoint | None = open_endpoint(section.judge, endpoints) if section.judge else None
        self._reward: Judge | None = open_judge(open_result(Path(section.reward_run))) if section.reward_run else None

    def score(self, answers: Sequence[AnswerToScore]) -> list[Scored]:
        """Return a score for each answer: the weighted sum of the rules, the mean of the judge's scores, or the reward.

        Raises:
            FinetuneError: a rule fails, or the judge cannot be asked.
        """
        if self.judge is not None:
            return self._ask_judge(self.judge, answers)
        if self._reward is not None:
            return [self._read_reward(self._reward, answer) for answer in answers]
        return [self._apply_rules(answer) for answer in answers]

    def close(self) -> None:
        """Close the judge's endpoint."""
        if self.judge is not None:
            self.judge.close()

    def _apply_rules(self, answer: AnswerToScore) -> Scored:
        written = answer.written
        judged = Answer(
            str(answer.turns[-1]["content"]),
            written.text,
            answer.reference,
            written.answer_tokens,
            written.is_cut,
            self._section.length_tokens,
        )
        parts = {name: judge_answer(name, judged, answer.where) for name in self._section.rules}
        return Scored(sum(weight * parts[name] for name, weight in self._section.rules.items()), parts)

    def _ask_judge(self, judge: Endpoint, answers: Sequence[AnswerToScore]) -> list[Scored]:
        found = judge_conversations(
            judge,
            Prompt("judge", "quality"),
            len(answers),
            lambda number: add_answer(answers[number].turns, answers[number].written.text),
            _JUDGE_TOKENS,
            self._section.attempts,
        )
        return [Scored(mean_score(scores), scores) if isinstance(scores, dict) else Scored(None) for scores in found]

    def _read_reward(self, judge: Judge, answer: AnswerToScore) -> Scored:
        turns = [dict(turn) for turn in add_answer(answer.turns, answer.written.text)]
        (encoded,) = encode_conversations(judge.tokenizer, judge.template, [turns], [None])
        (score,) = judge.score([encoded.token_ids])
        if score != score:
            raise EndpointError(f"{answer.where}: {self._section.reward_run} gave no number for an answer to this row")
        return Scored(score, {"reward_model": score})


def add_answer(turns: Turns, text: str) -> list[Mapping[str, str]]:
    """Return a conversation with an answer of the assistant at its end."""
    return [*turns, {"role": "assistant", "content": text}]
