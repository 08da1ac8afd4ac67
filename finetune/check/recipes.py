"""Check a recipe against the things that it names: methods, options, files, formats, templates. Never imports torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune.api_arguments import require_list, require_path
from finetune.check.adapter_section import check_adapter_section
from finetune.check.adoption import adopt_earlier_run
from finetune.check.data_section import check_data_section, find_file, resolve_source, resolve_task
from finetune.check.preference_methods import check_batch, check_reference, check_shape, settle_trainer
from finetune.check.preparation.clean_checks import check_clean, settle_clean
from finetune.check.preparation.synthesize_checks import (
    check_clean_judge,
    check_endpoints,
    check_synthesize,
    settle_endpoints,
    settle_synthesize,
)
from finetune.check.pretraining_methods import check_pretraining, check_unused, resolve_pretraining
from finetune.check.reward_section import check_rewards
from finetune.check.trainer.trainer_section import check_trainer
from finetune.checkpoints.checkpoint_table import find_alias, is_hub_id, list_aliases
from finetune.errors import FinetuneError, RecipeError, describe_unknown_name
from finetune.files.folders import expand_home
from finetune.files.resources import find_recipe, list_templates
from finetune.models.adapter_config import read_adapter_config
from finetune.recipe.methods import METHODS, name_methods
from finetune.recipe.recipe_file import Draft, draft_recipe
from finetune.recipe.sections import ModelSection, Recipe, RewardsSection
from finetune.recipe.yaml_loader import load_recipe_file
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.results import Result, find_earlier

_LONGEST_NAME = 255
# More than any published checkpoint reads; without a limit an answer that never stops would never end.
_MOST_ANSWER_TOKENS = 1 << 17


def load_recipe(source: str | Path, overrides: str | Sequence[str] = ()) -> ResolvedRecipe:
    """Read a recipe, check all of it, and return it with absolute paths, its method and its base checkpoint.

    `source` is a file or the name of a shipped recipe (`sft_qlora`). Each override reads `section.key=value`.

    Raises:
        ArgumentError: an argument has a wrong type.
        RecipeError: with every problem that was found, not only the first; or the recipe is a chain of several runs.
    """
    file = find_recipe(require_path("recipe", source, "the path or the name of a recipe (str or pathlib.Path)"))
    content = load_recipe_file(file)
    if "stages" in content:
        problem = "stages: this recipe is a chain, but a recipe of one run is needed here; run the chain with `finetune train`"
        raise RecipeError(str(source), [problem])
    overrides = [overrides] if isinstance(overrides, str) else overrides
    overrides = require_list(
        "load_recipe: overrides", overrides, "a text such as 'trainer.max_steps=2', or a list of such texts"
    )
    return resolve_draft(draft_recipe(file, content, overrides), str(source))


def resolve_draft(draft: Draft, name: str) -> ResolvedRecipe:
    """Check a draft, and return it with absolute paths, its method and its base checkpoint; `name` names it in messages.

    Raises:
        RecipeError: with every problem that was found.
    """
    try:
        earlier = find_earlier(draft.recipe.model.checkpoint)
        if earlier is not None and earlier.is_adapter:
            read_adapter_config(earlier.folder)
    except FinetuneError as error:
        earlier, draft = None, draft.add_problems(f"model.checkpoint: {error}")
    if earlier is not None:
        draft = adopt_earlier_run(draft, earlier, draft.given)
    if problems := list_problems(draft, earlier):
        raise RecipeError(name, problems)
    settled = settle_recipe(draft)
    if problems := list(_list_unwritable(asdict(settled))):
        raise RecipeError(name, problems)
    return resolve_names(settled, earlier, draft.given)


def _list_unwritable(content: Any, key: str = "") -> Iterator[str]:
    """Yield a problem for each text that is no UTF-8: Python reads such a file name, and no record could hold it."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _list_unwritable(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _list_unwritable(value, key)
    elif isinstance(content, str) and any("\ud800" <= letter <= "\udfff" for letter in content):
        yield f"{key}: {content!a} is no UTF-8; rename the file or the folder"


def resolve_names(recipe: Recipe, earlier: Result | None = None, given: frozenset[str] = frozenset()) -> ResolvedRecipe:
    """Return a checked recipe with its method and the table entry of its base checkpoint."""
    checkpoint = find_alias(recipe.model.checkpoint)
    return ResolvedRecipe(recipe, METHODS[recipe.method], checkpoint, earlier, given)


def list_problems(draft: Draft, earlier: Result | None) -> list[str]:
    """Return all problems of a recipe; `earlier` is the result of the run that it continues."""
    return [*draft.problems, *_check_recipe(draft, earlier)]


def _check_recipe(draft: Draft, earlier: Result | None) -> Iterator[str]:
    recipe, folder, method = draft.recipe, draft.source.parent, METHODS.get(draft.recipe.method)
    # A key that could not be read has its default here; the draft already holds its problem.
    if method is None:
        yield f"method: {recipe.method!r} is {describe_unknown_name(recipe.method, METHODS)}"
    else:
        yield from check_trainer(recipe.trainer, method, recipe.data)
        yield from check_shape(recipe.data, method)
        yield from check_batch(recipe.trainer, method)
        continues_adapter = earlier is not None and earlier.is_adapter
        yield from check_reference(recipe.trainer, recipe.adapter, method, continues_adapter=continues_adapter)
        if method.trains_reward_model and recipe.model.architecture == "native":
            yield "model.architecture: a reward model can be trained only on Llama weights; remove this key"
    yield from _check_checkpoint(recipe.model)
    yield from check_data_section(recipe.data, folder)
    if recipe.data.tasks and method is not None and method.trains_reward_model:
        yield "data.tasks: a reward model gives no text and no likelihood; remove this key"
    yield from check_adapter_section(recipe.adapter, recipe.model, method.head if method else "language")
    yield from check_clean(recipe.clean, folder)
    yield from check_clean_judge(recipe.clean, recipe.endpoints, folder)
    yield from check_endpoints(recipe.endpoints)
    yield from check_synthesize(recipe.synthesize, recipe.endpoints)
    if method is not None and method.pretraining is not None:
        yield from check_pretraining(recipe, method.pretraining, folder)
    elif method is not None:
        yield from check_unused(recipe.optimizer, recipe.schedule)
    if method is not None and method.is_online:
        yield from check_rewards(recipe, method, earlier)
    elif method is not None and recipe.rewards != RewardsSection():
        online = name_methods(lambda other: other.is_online)
        yield f"rewards: has no effect on {method.name}; remove it, or set method: {online}"
    if str(expand_home(recipe.output)).startswith("~"):
        yield f"output: there is no user of this name; found {recipe.output}"
    if any(len(part.encode(errors="surrogatepass")) > _LONGEST_NAME for part in Path(recipe.output).parts):
        yield f"output: a name in it is longer than {_LONGEST_NAME} bytes, the most that file systems take; found {recipe.output}"
    if not 0 <= recipe.answers <= _MOST_ANSWER_TOKENS:
        yield f"answers: must be a number of tokens, or 0 to keep no answers, at most {_MOST_ANSWER_TOKENS:,}; found {recipe.answers}"
    if recipe.row_losses is not None and recipe.row_losses < 0:
        yield f"row_losses: must be a number of rows, or 0 to measure none; found {recipe.row_losses}"
    if not -(2**31) <= recipe.seed < 2**31:
        yield f"seed: must lie between -2**31 and 2**31; found {recipe.seed}"
    if recipe.data.seed is not None and not -(2**31) <= recipe.data.seed < 2**31:
        yield f"data.seed: must lie between -2**31 and 2**31; found {recipe.data.seed}"


def _check_checkpoint(model: ModelSection) -> Iterator[str]:
    name = model.checkpoint
    row = find_alias(name)
    if model.architecture == "native" and row is not None and row.architecture == "llama":
        yield f"model.architecture: {name} is published as Llama weights, so it cannot be trained as native; remove this key"
    if expand_home(name).is_dir() or row or is_hub_id(name):
        return
    if name.startswith((".", "/", "~")):
        yield f"model.checkpoint: there is no folder {name}"
    else:
        yield (
            f"model.checkpoint: {name!r} is {describe_unknown_name(name, list_aliases())}; "
            "a hub id (owner/repository) or a local folder works too"
        )


def settle_recipe(draft: Draft) -> Recipe:
    """Return the recipe of a draft without problems, with absolute paths and the method's defaults."""
    recipe, folder = draft.recipe, draft.source.parent
    data = replace(
        recipe.data,
        train=tuple(resolve_source(source, folder) for source in recipe.data.train),
        eval=tuple(resolve_source(source, folder) for source in recipe.data.eval),
        tasks=tuple(resolve_task(task, folder) for task in recipe.data.tasks),
        sources={name: resolve_source(source, folder) for name, source in recipe.data.sources.items()},
    )
    if recipe.data.template != "auto" and recipe.data.template not in list_templates():
        data = replace(data, template=str(find_file(recipe.data.template, folder)))
    model, checkpoint = recipe.model, expand_home(recipe.model.checkpoint)
    if checkpoint.is_dir() and find_alias(recipe.model.checkpoint) is None:  # an alias wins; ./base is the folder
        model = replace(model, checkpoint=str(checkpoint.resolve()))
    judge = recipe.rewards.judge
    if judge.run:
        judge = replace(judge, run=str(expand_home(judge.run).resolve()))
    output = expand_home(recipe.output) if recipe.output else Path("runs", draft.source.stem)
    method = METHODS[recipe.method]
    trainer = settle_trainer(recipe.trainer, recipe.adapter, method)
    rewards = replace(recipe.rewards, judge=judge)
    settled = replace(
        recipe,
        model=model,
        data=data,
        trainer=trainer,
        rewards=rewards,
        clean=settle_clean(recipe.clean, folder),
        synthesize=settle_synthesize(recipe.synthesize),
        endpoints=settle_endpoints(recipe.endpoints),
        output=str(output.resolve()),
    )
    return settled if method.pretraining is None else resolve_pretraining(settled, method.pretraining, folder)
