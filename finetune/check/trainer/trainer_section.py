"""Check the section `trainer` of a recipe against the installed configuration class of its method. Never imports torch."""

from collections.abc import Iterator, Mapping, Sequence

from finetune.check.trainer.evaluations import check_evaluations
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
    yield from check_evaluations(trainer, data)
    if "dataloader_prefetch_factor" in sound and not trainer.get("dataloader_num_workers"):
        yield "trainer.dataloader_prefetch_factor: has no effect without processes that load rows; set dataloader_num_workers too, or remove this key"


def _check_words(key: str, value: object, known: Sequence[object]) -> Iterator[str]:
    """Check an option that takes a word, or a list of words to combine several losses."""
    for word in value if isinstance(value, list) else [value]:
        if word not in known:
            yield f"trainer.{key}: {word!r} is {describe_unknown_name(str(word), [str(name) for name in known])}"
