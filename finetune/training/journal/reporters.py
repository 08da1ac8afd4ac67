"""Keep a run apart from the dashboards that `trainer.report_to` names: what they raise is said with that key."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from finetune.errors import TrainingError
from finetune.files.launcher import add_variables

logger = logging.getLogger(__name__)

_BEGIN = "on_train_begin"
# MLflow tries a server that does not answer for several minutes.
_PATIENCE: Mapping[str, str] = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def guard_reporters(trainer: Trainer) -> None:
    """Let a dashboard that cannot begin be refused by its key before step 1, and one that fails later be left out of the run."""
    names = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
    for callback in trainer.callback_handler.callbacks:
        if (name := names.get(type(callback))) is not None:
            _guard(callback, name)


def _guard(callback: TrainerCallback, name: str) -> None:
    failed: list[Exception] = []

    def wrap(event: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            if failed:
                return None
            try:
                with add_variables(_PATIENCE) if event == _BEGIN else contextlib.nullcontext():
                    return call(*arguments, **options)
            except Exception as error:  # every dashboard has errors of its own
                failed.append(error)
                if event == _BEGIN:
                    raise TrainingError(
                        f"trainer.report_to: {name} cannot begin ({_describe(error)}); mend that, or remove this key"
                    ) from error
                logger.warning("%s gets no more of this run, which goes on without it (%s)", name, _describe(error))
            return None

        return guarded

    for event in dir(TrainerCallback):
        if event.startswith("on_"):
            setattr(callback, event, wrap(event, getattr(callback, event)))


def _describe(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
