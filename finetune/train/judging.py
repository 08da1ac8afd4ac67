"""RuleJudge the model's own answers by a recipe's rules, in the form that TRL's online trainers call."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import TrainingError
from finetune.recipe import RewardsSection
from finetune.train.rewards import RULES, Answer

COMPLETIONS_FILE = "completions.jsonl"
_SHOWN_ANSWERS = 4

RewardFunction = Callable[..., list[float]]


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer with its prompt's place and its rewards, unweighted."""

    origin: str
    question: str
    text: str
    tokens: int
    rewards: dict[str, float] = field(default_factory=dict)


class RuleJudge:
    """Turns a recipe's rules into TRL's reward functions, and remembers the last answers that were judged."""

    def __init__(self, section: RewardsSection, stop_tokens: Sequence[int]) -> None:
        self._section = section
        self._stop_tokens = frozenset(stop_tokens)
        self.answers: list[JudgedAnswer] = []

    def make_functions(self) -> list[RewardFunction]:
        """Return one function for each rule, under its name; TRL logs each as `rewards/<name>/mean`."""
        return [self._make_function(name) for name in self._section.rules]

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
        answer: Sequence[str | None],
        origin: Sequence[str],
        **_: object,
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
            for prompt, completion, ids, reference in zip(prompts, completions, completion_ids, answer, strict=True)
        ]
        if name == next(iter(self._section.rules)):
            pairs = zip(origin, answers, strict=True)
            self.answers = [JudgedAnswer(where, own.question, own.text, own.tokens) for where, own in pairs]
        rewards = [judge_answer(name, own, where) for own, where in zip(answers, origin, strict=True)]
        for judged, reward in zip(self.answers, rewards, strict=True):
            judged.rewards[name] = reward
        return rewards


def list_weights(section: RewardsSection) -> list[float]:
    """Return the weights of a judge's functions, in their order."""
    return [float(weight) for weight in section.rules.values()]


def judge_answer(name: str, answer: Answer, where: str) -> float:
    """Return what one rule gives for one answer.

    Raises:
        TrainingError: the rule fails, or gives no number; the message names the row.
    """
    advice = "mend the rule, or take it out of rewards.rules"
    try:
        reward = RULES[name].judge(answer)
    except Exception as error:  # a rule is anybody's code, and must not end a run in a traceback without the row
        raise TrainingError(
            f"{where}: the reward {name} failed on an answer to this row ({type(error).__name__}: {error}); {advice}"
        ) from error
    if not isinstance(reward, int | float) or not math.isfinite(reward):
        raise TrainingError(
            f"{where}: the reward {name} gave {reward!r} for an answer to this row; expected a finite number; {advice}"
        )
    return float(reward)


class CompletionWriter(TrainerCallback):
    """Append a few of the newest answers to `completions.jsonl` at every logged step, with what each was given."""

    def __init__(self, run: Path, judge: RuleJudge) -> None:
        self._file = run / COMPLETIONS_FILE
        self._judge = judge

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Drop what a stopped run had written beyond the checkpoint that this one goes on from."""
        if state.is_world_process_zero and self._file.is_file():
            lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            self._file.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Write the first answers of the newest batch, once for each step."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        with self._file.open("a", encoding="utf-8") as file:
            for answer in self._judge.answers[:_SHOWN_ANSWERS]:
                file.write(json.dumps({"step": state.global_step, **vars(answer)}, ensure_ascii=False) + "\n")
