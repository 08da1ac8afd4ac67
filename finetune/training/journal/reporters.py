"""Keep a run apart from the dashboards that `trainer.report_to` names: what they raise is said with that key."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from finetune.errors import TrainingError

logger = logging.getLogger(__name__)

_BEGIN = "on_train_begin"
# MLflow tries a server that does not answer for several minutes. A variable that a person has set stays.
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
                with _lose_patience() if event == _BEGIN else contextlib.nullcontext():
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


@contextlib.contextmanager
def _lose_patience() -> Iterator[None]:
    added = {name: text for name, text in _PATIENCE.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _describe(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
