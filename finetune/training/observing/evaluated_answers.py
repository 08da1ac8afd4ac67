"""Answer the fixed prompts at each evaluation, so that the page of the run shows how the answers change."""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.files.json_files import continue_lines
from finetune.runs.run_files import EVALUATED_ANSWERS_FILE
from finetune.training.journal.answers import AnswerSheet
from finetune.training.journal.progress import is_preflight


class AnswerWriter(TrainerCallback):
    """Appends the answers at each evaluation to `answers_by_step.jsonl`, in the order of the prompts in `answers.json`.

    All prompts are one batch, so an evaluation costs at most as many forward passes of a token as an answer has tokens.
    """

    def __init__(self, run: Path, sheet: AnswerSheet, model: PreTrainedModel | PeftModel) -> None:
        self._file = run / EVALUATED_ANSWERS_FILE
        self._sheet = sheet
        self._model = model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remove the lines that a stopped run wrote after the checkpoint that this one continues from."""
        if state.is_world_process_zero:
            has_evaluated = any("eval_runtime" in entry for entry in state.log_history)
            continue_lines(self._file, state.global_step, is_expected=has_evaluated)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **kwargs: object,
    ) -> None:
        """Ask the model, and write one line."""
        if not state.is_world_process_zero or is_preflight(metrics):
            return
        line = {"step": state.global_step, "answers": self._sheet.ask(self._model)}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
