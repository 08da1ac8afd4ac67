"""Make the reward functions of TRL's online trainers from a recipe's rules and its judge, which is a reward model."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import TrainingError
from finetune.files.json_files import continue_lines
from finetune.recipe.sections import RewardsSection
from finetune.rewards.rules import RULES, Answer
from finetune.runs.run_files import COMPLETIONS_FILE

_SHOWN_ANSWERS = 4

# The name of the judge's reward, beside the names of the rules.
JUDGE = "judge"

RewardFunction = Callable[..., list[float]]
Score = Callable[[Sequence[Sequence[int]]], list[float]]


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer with its rewards, unweighted; `origin` is the row of its prompt."""

    origin: str
    question: str
    text: str
    tokens: int
    rewards: dict[str, float] = field(default_factory=dict)


class AnswerRewards:
    """Turns a recipe's rules and judge into TRL's reward functions, and keeps the newest answers with their rewards."""

    def __init__(self, section: RewardsSection, stop_tokens: Sequence[int], score: Score | None) -> None:
        self._section = section
        self._stop_tokens = frozenset(stop_tokens)
        self._first = next(iter(list_weights(section)))
        self._score = score
        self.answers: list[JudgedAnswer] = []

    def make_functions(self) -> list[RewardFunction]:
        """Return one function for each reward, under its name; TRL logs each as `rewards/<name>/mean`."""
        return [self._make_function(name) for name in list_weights(self._section)]

    def _make_function(self, name: str) -> RewardFunction:
        def function(**columns: Any) -> list[float]:
            return self._judge(name, **columns)

        function.__name__ = name
        return function

    def _judge(
        self,
        name: str,
        prompts: Sequence[Sequence[Mapping[str, str]]],
        completions: Sequence[Sequence[Mapping[str, str]]],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float]:
        answers = [
            Answer(
                question=prompt[-1]["content"],
                text=completion[-1]["content"],
                reference=reference,
                tokens=len(ids),
                is_truncated=not ids or ids[-1] not in self._stop_tokens,
                wanted_tokens=self._section.length_tokens,
            )
            for prompt, completion, ids, reference in zip(
                prompts, completions, completion_ids, columns["answer"], strict=True
            )
        ]
        origins: Sequence[str] = columns["origin"]
        if name == self._first:
            pairs = zip(origins, answers, strict=True)
            self.answers = [JudgedAnswer(where, own.question, own.text, own.tokens) for where, own in pairs]
        if name == JUDGE:
            texts = [[*prompt, *ids] for prompt, ids in zip(columns["input_ids"], completion_ids, strict=True)]
            rewards = self._score_texts(texts, origins)
        else:
            rewards = [judge_answer(name, own, where) for own, where in zip(answers, origins, strict=True)]
        for judged, reward in zip(self.answers, rewards, strict=True):
            judged.rewards[name] = reward
        return rewards

    def _score_texts(self, texts: Sequence[Sequence[int]], origins: Sequence[str]) -> list[float]:
        judge, scores = self._section.judge, self._score(texts) if self._score else []
        for score, where in zip(scores, origins, strict=True):
            if not math.isfinite(score):
                raise TrainingError(
                    f"{where}: the judge gave {score!r} for an answer to this row; expected a finite number; "
                    f"measure {judge.run} on pairs with `finetune evaluate`"
                )
        lowest, highest = judge.clip
        return [min(max(score, lowest), highest) for score in scores]


def list_weights(section: RewardsSection) -> dict[str, float]:
    """Return the weight of each reward by its name, in the order of the reward functions; the judge's comes last."""
    weights = {name: float(weight) for name, weight in section.rules.items()}
    return {**weights, JUDGE: section.judge.weight} if section.judge.run else weights


def judge_answer(name: str, answer: Answer, where: str) -> float:
    """Return the reward of one rule for one answer.

    Raises:
        TrainingError: the rule fails, or gives no finite number; the message names the row.
    """
    advice = "fix the rule, or remove it from rewards.rules"
    try:
        reward = RULES[name].judge(answer)
    except Exception as error:  # a rule may be a user's code, and its error must name the row
        raise TrainingError(
            f"{where}: the reward {name} failed on an answer to this row ({type(error).__name__}: {error}); {advice}"
        ) from error
    if not isinstance(reward, int | float) or not math.isfinite(reward):
        raise TrainingError(
            f"{where}: the reward {name} gave {reward!r} for an answer to this row; expected a finite number; {advice}"
        )
    return float(reward)


class CompletionWriter(TrainerCallback):
    """Appends a few of the newest answers to `completions.jsonl` at every logged step, with their rewards."""

    def __init__(self, run: Path, rewards: AnswerRewards) -> None:
        self._file = run / COMPLETIONS_FILE
        self._rewards = rewards

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remove the lines that a stopped run wrote after the checkpoint that this one continues from."""
        if state.is_world_process_zero:
            has_logged = any("loss" in entry for entry in state.log_history)
            continue_lines(self._file, state.global_step, is_expected=has_logged)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Write the first answers of the newest batch, once for each logged step."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        with self._file.open("a", encoding="utf-8") as file:
            for answer in self._rewards.answers[:_SHOWN_ANSWERS]:
                file.write(json.dumps({"step": state.global_step, **vars(answer)}, ensure_ascii=False) + "\n")
