"""Check the section `trainer` of a recipe against the installed configuration class of its method. Never imports torch."""

from collections.abc import Iterator, Mapping, Sequence

from finetune.check.trainer.option_values import list_package_problems, list_range_problems, list_word_problems
from finetune.errors import describe_unknown_name
from finetune.recipe.batches import KIT_OPTIONS, list_batch_problems, list_checkpointing_problems
from finetune.recipe.foreign_names import describe_unknown_option
from finetune.recipe.methods import Method
from finetune.recipe.sections import DataSection
from finetune.recipe.trl_options import read_trainer_options
from finetune.recipe.yaml_loader import describe_value


def check_trainer(trainer: Mapping[str, object], method: Method, data: DataSection) -> Iterator[str]:
    """Yield the problems of the section."""
    options = read_trainer_options(method.config_module, method.config_class)
    yield from list_batch_problems(trainer, method)
    yield from list_checkpointing_problems(trainer, method)
    sound = {}
    for key, value in trainer.items():
        if key in KIT_OPTIONS:
            continue
        if key in method.owned:
            yield f"trainer.{key}: {method.owned[key]}"
        elif key not in options:
            yield f"trainer.{key}: {describe_unknown_option(key, {*options, *KIT_OPTIONS} - set(method.owned))}"
        elif key in method.words:
            yield from _check_words(key, value, method.words[key])
        elif expected := options[key].describe_mismatch(value):
            yield f"trainer.{key}: must be {expected}; found {describe_value(value)}"
        else:
            sound[key] = value
    yield from list_range_problems(sound, method)
    yield from list_word_problems(sound)
    yield from list_package_problems(sound)
    yield from _check_best(trainer, data)


def _check_best(trainer: Mapping[str, object], data: DataSection) -> Iterator[str]:
    """Yield why the best checkpoint cannot be chosen: there is nothing to measure, or nothing to go back to."""
    wants = [key for key in ("load_best_model_at_end", "early_stopping_patience") if trainer.get(key)]
    if wants and not data.eval and not data.held_out:
        yield f"trainer.{wants[0]}: needs held-out rows to measure; set data.eval or data.held_out"
    if trainer.get("load_best_model_at_end") and trainer.get("eval_strategy") == "no":
        yield "trainer.load_best_model_at_end: needs evaluations; set eval_strategy and save_strategy to steps or epoch, or remove this key"
    if trainer.get("load_best_model_at_end") and (steps := _find_uneven_steps(trainer)) is not None:
        yield (
            "trainer.load_best_model_at_end: the best step can be one whose weights are not saved, since evaluations come every {} steps "
            "and checkpoints every {}; set eval_steps and save_steps to the same number".format(*steps)
        )
    if "early_stopping_patience" in trainer and not trainer.get("load_best_model_at_end"):
        yield (
            "trainer.early_stopping_patience: needs load_best_model_at_end: true, so that the run ends with its best weights; set "
            "that, and eval_strategy and save_strategy to the same word"
        )


def _find_uneven_steps(trainer: Mapping[str, object]) -> tuple[object, object] | None:
    """Return how often a run evaluates and how often it saves, where it does both by steps and not at the same ones.

    Source of the defaults: `SFTConfig` of TRL, and `TrainingArguments` of transformers, where evaluations follow `logging_steps`.
    """
    if (trainer.get("eval_strategy"), trainer.get("save_strategy", "steps")) != ("steps", "steps"):
        return None
    evaluates = trainer.get("eval_steps", trainer.get("logging_steps", 10))
    saves = trainer.get("save_steps", 500)
    return None if evaluates == saves else (evaluates, saves)


def _check_words(key: str, value: object, known: Sequence[object]) -> Iterator[str]:
    """Check an option that takes a word, or a list of words to combine several losses."""
    for word in value if isinstance(value, list) else [value]:
        if word not in known:
            yield f"trainer.{key}: {word!r} is {describe_unknown_name(str(word), [str(name) for name in known])}"
