"""Check the trainer's options that need evaluations: they contradict each other, or there is nothing to measure.

transformers refuses most of these in its own words, and some only after the model is loaded. Never imports torch.
Source of the defaults and rules: `SFTConfig` of TRL 1.16 and `TrainingArguments` of transformers 5.23, where evaluations by steps
follow `logging_steps`.
"""

from collections.abc import Iterator, Mapping

from finetune.recipe.sections import DataSection

_BEST, _SAVES, _EVALUATES = "load_best_model_at_end", "save_strategy", "eval_strategy"
# Schedules that lower the rate when the held-out loss does not fall.
_WATCHING_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


def check_evaluations(trainer: Mapping[str, object], data: DataSection) -> Iterator[str]:
    """Yield why evaluations cannot be made, or the best checkpoint cannot be chosen by them."""
    wants = list(_list_wishes(trainer))
    measures = [*wants, *(["eval_on_start"] if trainer.get("eval_on_start") else [])]
    has_rows = bool(data.eval or data.held_out)
    if measures and not has_rows:
        yield f"trainer.{measures[0]}: needs held-out rows to measure; set data.eval or data.held_out"
    elif wants and trainer.get(_EVALUATES) == "no":
        yield f"trainer.{wants[0]}: needs evaluations, and eval_strategy is no; set eval_strategy and save_strategy to steps or epoch, or remove this key"
    elif trainer.get(_BEST):
        yield from _check_moments(trainer)
    if not has_rows and trainer.get(_EVALUATES, "no") != "no":
        yield f"trainer.{_EVALUATES}: needs held-out rows to measure; set data.eval or data.held_out, or remove this key"
    if trainer.get(_SAVES) == "best" and has_rows and not (trainer.get(_BEST) or trainer.get("metric_for_best_model")):
        yield f"trainer.{_SAVES}: best needs to know by what; set trainer.metric_for_best_model, such as loss, or {_BEST}: true"
    if "early_stopping_patience" in trainer and not trainer.get(_BEST):
        yield (
            "trainer.early_stopping_patience: needs load_best_model_at_end: true, so that the run ends with its best weights; set "
            "that, and eval_strategy and save_strategy to the same word"
        )


def _list_wishes(trainer: Mapping[str, object]) -> Iterator[str]:
    """Yield the options of a recipe that need evaluations during the run."""
    if trainer.get(_BEST):
        yield _BEST
    if trainer.get("lr_scheduler_type") in _WATCHING_SCHEDULES:
        yield "lr_scheduler_type"
    if trainer.get(_SAVES) == "best":
        yield _SAVES


def _check_moments(trainer: Mapping[str, object]) -> Iterator[str]:
    """Yield why the best step would not be one whose weights are saved."""
    evaluates, saves = trainer.get(_EVALUATES, "epoch"), trainer.get(_SAVES, "steps")
    if saves == "best":
        return
    if evaluates != saves:
        default = "" if _SAVES in trainer else " (the default)"
        yield (
            f"trainer.{_BEST}: the best step can be one whose weights are not saved, since eval_strategy is {evaluates} and "
            f"save_strategy {saves}{default}; set both to the same word, or save_strategy: best"
        )
    elif saves == "steps" and (steps := _read_steps(trainer))[0] != steps[1]:
        yield (
            "trainer.{}: the best step can be one whose weights are not saved, since evaluations come every {} steps "
            "and checkpoints every {}; set eval_steps and save_steps to the same number".format(_BEST, *steps)
        )


def _read_steps(trainer: Mapping[str, object]) -> tuple[object, object]:
    """Return how often a run evaluates and how often it saves, where it does both by steps."""
    return trainer.get("eval_steps", trainer.get("logging_steps", 10)), trainer.get("save_steps", 500)
