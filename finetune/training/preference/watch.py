"""Warn when a preference run goes wrong in a way that its loss does not show."""

import logging
from collections import deque
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# The model hardly ever gives an answer that is e^20 times less likely than before training.
_MOST_NATS_LOST = 20.0
# The limit where the loss is a mean over the tokens of an answer.
_MOST_NATS_LOST_A_TOKEN = 1.0
# The losses of TRL's CPO that are sums over the tokens; its others, and ORPO, are means.
_SUMS = ("sigmoid", "hinge")
# The gradient of a logistic loss is sigmoid(-margin): at 20 it vanishes in float32 sums.
_LARGEST_MARGIN = 20.0
_LOGS = 3


class PreferenceWatch(TrainerCallback):
    """Warns when chosen answers become unlikely, or when the margins are so large that no gradient is left."""

    def __init__(self, has_reference: bool) -> None:
        self._has_reference = has_reference
        self._losses: deque[float] = deque(maxlen=_LOGS)
        self._margins: deque[float] = deque(maxlen=_LOGS)
        self._first: float | None = None
        self._said: set[str] = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Warn once of each fault that the last three logs show."""
        lost = self._measure_loss_of_chosen(args, logs or {})
        if lost is not None:
            self._losses.append(lost)
        if logs and "rewards/margins" in logs:
            self._margins.append(logs["rewards/margins"])
        sums = self._has_reference or getattr(args, "loss_type", None) in _SUMS
        limit, unit = (_MOST_NATS_LOST, "an answer") if sums else (_MOST_NATS_LOST_A_TOKEN, "a token")
        if len(self._losses) == _LOGS and min(self._losses) > limit:
            self._warn(
                "collapse",
                f"step {state.global_step}: the chosen answers have become unlikely, by {self._losses[-1]:.3g} nats "
                f"{unit} since training began; the loss still falls because the rejected answers become unlikely faster. Lower "
                "trainer.learning_rate, raise trainer.beta, or stop at an earlier checkpoint",
            )
        if len(self._margins) == _LOGS and min(self._margins) > _LARGEST_MARGIN:
            self._warn(
                "margin",
                f"step {state.global_step}: the rewards of chosen and rejected answers are {self._margins[-1]:.3g} apart, so "
                "nothing is left to learn from these rows; more steps only move the model further away. Stop at an earlier "
                "checkpoint, lower trainer.learning_rate, or raise trainer.beta",
            )

    def _measure_loss_of_chosen(self, args: Any, logs: dict[str, Any]) -> float | None:
        """Return by how many nats the chosen answers have become less likely, or None where the log does not tell."""
        if self._has_reference:
            return -logs["rewards/chosen"] / args.beta if "rewards/chosen" in logs else None
        if "logps/chosen" not in logs:
            return None
        self._first = logs["logps/chosen"] if self._first is None else self._first
        return self._first - float(logs["logps/chosen"])

    def _warn(self, fault: str, text: str) -> None:
        if fault not in self._said:
            self._said.add(fault)
            logger.warning("%s", text)
