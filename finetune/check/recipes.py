"""Check a recipe against everything it names: methods, options, files, formats, templates. Never imports torch."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from finetune.check.adoption import adopt_earlier_run
from finetune.check.preference_methods import check_preference, settle_trainer
from finetune.check.pretraining_methods import check_pretraining, resolve_pretraining
from finetune.check.reward_section import check_rewards
from finetune.checkpoints.checkpoint_table import find_alias, is_hub_id, list_aliases
from finetune.data.formats.row_formats import FORMATS
from finetune.errors import RecipeError, describe_unknown_name
from finetune.files.resources import list_recipes, list_templates
from finetune.mixtures.matched import list_unknown_sources
from finetune.mixtures.published import describe_unknown_mixture, find_mixture
from finetune.recipe.batches import KIT_OPTIONS, list_batch_problems
from finetune.recipe.methods import METHODS, Method
from finetune.recipe.recipe_file import Draft, describe_unknown_key, read_recipe
from finetune.recipe.sections import LINEAR_LAYERS, AdapterSection, DataSection, Recipe, SourceSection
from finetune.recipe.trl_options import read_trainer_options

_SHORTEST_ROW = 8


def load_recipe(source: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, check it wholly, and return it with every path made absolute.

    A shipped recipe is also found by its name (`sft_qlora`) or as `recipes/sft_qlora.yaml`, from wherever the command runs.

    Raises:
        RecipeError: with every problem that was found, not only the first.
    """
    draft = adopt_earlier_run(read_recipe(find_recipe(source), overrides))
    if problems := list_problems(draft):
        raise RecipeError(str(source), problems)
    return resolve_recipe(draft)


def list_problems(draft: Draft) -> list[str]:
    """Return everything that is wrong with a recipe."""
    return [*draft.problems, *_check_recipe(draft)]


def find_recipe(source: Path) -> Path:
    """Return the file of a recipe: itself, or a shipped one of that name."""
    shipped = list_recipes()
    is_name = source.as_posix() in (source.stem, f"recipes/{source.stem}.yaml")
    return shipped[source.stem] if not source.is_file() and is_name and source.stem in shipped else source


def _check_recipe(draft: Draft) -> Iterator[str]:
    recipe = draft.recipe
    # A key that could not be read keeps its default here: its problem stands in the draft, and is not told twice.
    yield from _check_method(recipe)
    yield from _check_checkpoint(recipe)
    yield from _check_data(recipe, draft.source.parent)
    yield from _check_adapter(recipe)
    yield from check_pretraining(recipe, draft.source.parent)
    if recipe.method in METHODS:
        yield from check_rewards(recipe, METHODS[recipe.method])
    if recipe.answers < 0:
        yield f"answers: must be a number of tokens, or 0 for no answers before and after; found {recipe.answers}"
    if not -(2**31) <= recipe.seed < 2**31:
        yield f"seed: must lie between -2**31 and 2**31; found {recipe.seed}"


def _check_method(recipe: Recipe) -> Iterator[str]:
    method = METHODS.get(recipe.method)
    if method is None:
        yield f"method: {recipe.method!r} is {describe_unknown_name(recipe.method, METHODS)}"
        return
    yield from _check_trainer(recipe.trainer, method)
    yield from check_preference(recipe, method)


def _check_trainer(trainer: Mapping[str, object], method: Method) -> Iterator[str]:
    options = read_trainer_options(method.config_module, method.config_class)
    yield from list_batch_problems(trainer, method)
    for key, value in trainer.items():
        if key in KIT_OPTIONS:
            continue
        if key in method.owned:
            yield f"trainer.{key}: {method.owned[key]}"
        elif key not in options:
            yield f"trainer.{key}: {describe_unknown_key(key, {*options, *KIT_OPTIONS} - set(method.owned))}"
        elif key in method.words:
            yield from _check_words(key, value, method.words[key])
        elif expected := options[key].describe_mismatch(value):
            yield f"trainer.{key}: must be {expected}; found {value!r}"


def _check_words(key: str, value: object, known: Sequence[str]) -> Iterator[str]:
    """Check an option that takes a word or, for several losses together, a list of words."""
    for word in value if isinstance(value, list) else [value]:
        if word not in known:
            yield f"trainer.{key}: {word!r} is {describe_unknown_name(str(word), known)}"


def _check_checkpoint(recipe: Recipe) -> Iterator[str]:
    name = recipe.model.checkpoint
    start = find_alias(name)
    if recipe.model.architecture == "native" and start is not None and start.architecture == "llama":
        yield f"model.architecture: {name} is published as Llama, so there is nothing native to train; remove this key"
    if Path(name).expanduser().is_dir() or start or is_hub_id(name):
        return
    if name.startswith((".", "/", "~")):
        yield f"model.checkpoint: there is no folder {name}"
    else:
        yield (
            f"model.checkpoint: {name!r} is {describe_unknown_name(name, list_aliases())}; "
            "a hub id (owner/repository) or a local folder works too"
        )


def _check_data(recipe: Recipe, folder: Path) -> Iterator[str]:
    data = recipe.data
    if data.mixture is not None or data.sources:
        yield from _check_mixture(data, folder)
    elif not data.train:
        yield "data.train: is missing; name at least one data file"
    for key, sources in (("train", data.train), ("eval", data.eval)):
        for number, source in enumerate(sources, 1):
            if isinstance(source, SourceSection):
                yield from _check_source(source, f"data.{key}[{number}]", folder)
            elif find_file(source, folder) is None:
                yield f"data.{key}: {source} does not exist{_suggest_file(source, folder)}"
    if data.format != "auto" and data.format not in FORMATS:
        yield f"data.format: {data.format!r} is {describe_unknown_name(data.format, ['auto', *FORMATS])}"
    yield from _check_template(data.template, folder)
    if data.eval and data.held_out:
        yield "data.held_out: data.eval names files to evaluate on already; set one of the two"
    if data.held_out < 0 or (isinstance(data.held_out, float) and data.held_out >= 1):
        yield f"data.held_out: must be a share below 1 (such as 0.05) or a whole number of rows; found {data.held_out}"
    if data.max_tokens < _SHORTEST_ROW:
        yield f"data.max_tokens: must be at least {_SHORTEST_ROW}; found {data.max_tokens}"
    if data.workers < 1:
        yield f"data.workers: must be at least 1; found {data.workers}"


def _check_mixture(data: DataSection, folder: Path) -> Iterator[str]:
    if data.train:
        yield "data.train: data.mixture and data.sources say what to train on already; set one of the two"
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        if isinstance(source, SourceSection):
            yield from _check_source(source, key, folder)
            if source.weight is not None or source.rows is not None:
                yield f"{key}: takes no weight and no number of rows; data.mixture decides how much of it is taken"
        elif find_file(source, folder) is None:
            yield f"{key}: {source} does not exist{_suggest_file(source, folder)}"
    if data.mixture is None:
        yield "data.mixture: is missing; data.sources needs a published mixture, such as phase25 (`finetune mixtures` lists them)"
        return
    mixture = find_mixture(data.mixture)
    if mixture is None:
        yield f"data.mixture: {data.mixture!r} is {describe_unknown_mixture(data.mixture)}"
    elif not data.sources:
        yield f"data.sources: is missing; give files for names of {mixture.name}, such as {{fineweb-edu: web/*.jsonl, code: mine.parquet}}"
    else:
        yield from (f"data.sources.{name}: {reason}" for name, reason in list_unknown_sources(mixture, data.sources))


def _check_source(source: SourceSection, name: str, folder: Path) -> Iterator[str]:
    if bool(source.path) == bool(source.hub):
        yield f"{name}: needs one of path (files) and hub (a data set's owner/name)"
    elif source.path and find_file(source.path, folder) is None:
        yield f"{name}.path: {source.path} does not exist{_suggest_file(source.path, folder)}"
    elif source.hub and not is_hub_id(source.hub):
        yield f"{name}.hub: must read owner/name; found {source.hub!r}"
    for key in ("config", "split", "revision"):
        if source.path and getattr(source, key) is not None:
            yield f"{name}.{key}: belongs to a data set of the hub; remove it, or give hub instead of path"
    if source.weight is not None and source.rows is not None:
        yield f"{name}: takes a weight or a number of rows, not both"
    if source.weight is not None and source.weight <= 0:
        yield f"{name}.weight: must be above 0; found {source.weight}"
    if source.rows is not None and source.rows < 1:
        yield f"{name}.rows: must be at least 1; found {source.rows}"


def _check_template(template: str, folder: Path) -> Iterator[str]:
    if template == "auto" or template in list_templates():
        return
    if template.endswith((".jinja", ".j2")) or "/" in template:
        if find_file(template, folder) is None:
            yield f"data.template: {template} does not exist{_suggest_file(template, folder)}"
        return
    yield f"data.template: {template!r} is {describe_unknown_name(template, ['auto', *list_templates()])}"


def _check_adapter(recipe: Recipe) -> Iterator[str]:
    adapter, quantize = recipe.adapter, recipe.model.quantize
    if adapter.kind == "none":
        for key, value in vars(adapter).items():
            if key != "kind" and value != vars(AdapterSection())[key]:
                yield f"adapter.{key}: has no effect where adapter.kind is none; remove it"
        if quantize != "none":
            yield f"model.quantize: {quantize} weights cannot be trained in full; set adapter.kind: lora, or quantize: none"
        return
    yield from _check_lora(adapter)
    if adapter.init == "pissa" and quantize != "none":
        yield (
            "adapter.init: pissa changes the base weights at the start, which quantized ones do not allow; "
            f"set model.quantize: none, or remove init; found quantize: {quantize}"
        )


def _check_lora(adapter: AdapterSection) -> Iterator[str]:
    if adapter.rank < 1:
        yield f"adapter.rank: must be at least 1; found {adapter.rank}"
    if adapter.alpha <= 0:
        yield f"adapter.alpha: must be above 0; found {adapter.alpha}"
    if not 0 <= adapter.dropout < 1:
        yield f"adapter.dropout: must be at least 0 and below 1; found {adapter.dropout}"
    if not adapter.targets:
        yield "adapter.targets: is empty; use all-linear, or names such as q_proj"
    for target in adapter.targets:
        if target == "lm_head":
            yield "adapter.targets: lm_head cannot carry LoRA (TRL's loss reads its weight directly); use adapter.train_tokens"
        elif target not in LINEAR_LAYERS and adapter.targets != ("all-linear",):
            yield f"adapter.targets: {target!r} is {describe_unknown_name(target, LINEAR_LAYERS)}; or all-linear alone"
    if any(token < 0 for token in adapter.train_tokens) or len(set(adapter.train_tokens)) < len(adapter.train_tokens):
        yield f"adapter.train_tokens: must be token ids, each once; found {list(adapter.train_tokens)}"
    if adapter.init == "pissa" and adapter.dora:
        yield "adapter.dora: cannot be combined with init: pissa; choose one"


def find_file(name: str, folder: Path) -> Path | None:
    """Return the file that a recipe names: beside the recipe first, then from where the command runs."""
    path = Path(name).expanduser()
    candidates = [path] if path.is_absolute() else [folder / path, path]
    return next((candidate.resolve() for candidate in candidates if _is_data(candidate)), None)


def _is_data(path: Path) -> bool:
    if path.exists():
        return True
    is_glob = any(sign in path.name for sign in "*?[")
    return is_glob and path.parent.is_dir() and any(path.parent.glob(path.name))


def _suggest_file(name: str, folder: Path) -> str:
    if is_hub_id(name) and not Path(name).suffix:
        return f"; a data set of the hub is written {{hub: {name}}}"
    path = Path(name).expanduser()
    for parent in dict.fromkeys([folder / path.parent, path.parent]):
        if parent.is_dir():
            names = [entry.name for entry in parent.iterdir() if entry.is_file()]
            if matches := difflib.get_close_matches(path.name, names, n=1):
                return f"; {(path.parent / matches[0]).as_posix()} does"
    return f" (looked in {folder.resolve()} and {Path.cwd()})"


def _resolve_source(source: str | SourceSection, folder: Path) -> str | SourceSection:
    if isinstance(source, str):
        return str(find_file(source, folder))
    return replace(source, path=str(find_file(source.path, folder))) if source.path else source


def resolve_recipe(draft: Draft) -> Recipe:
    """Return a recipe without problems, with absolute paths and the method's defaults."""
    recipe, folder = draft.recipe, draft.source.parent
    data = replace(
        recipe.data,
        train=tuple(_resolve_source(source, folder) for source in recipe.data.train),
        eval=tuple(_resolve_source(source, folder) for source in recipe.data.eval),
        sources={name: _resolve_source(source, folder) for name, source in recipe.data.sources.items()},
    )
    if recipe.data.template != "auto" and recipe.data.template not in list_templates():
        data = replace(data, template=str(find_file(recipe.data.template, folder)))
    model, checkpoint = recipe.model, Path(recipe.model.checkpoint).expanduser()
    if checkpoint.is_dir() and find_alias(recipe.model.checkpoint) is None:  # an alias wins; ./base is the folder
        model = replace(model, checkpoint=str(checkpoint.resolve()))
    judge = recipe.rewards.judge
    if judge.run:
        judge = replace(judge, run=str(Path(judge.run).expanduser().resolve()))
    output = Path(recipe.output).expanduser() if recipe.output else Path("runs", draft.source.stem)
    settled = settle_trainer(recipe, METHODS[recipe.method])
    rewards = replace(recipe.rewards, judge=judge)
    resolved = replace(settled, model=model, data=data, rewards=rewards, output=str(output.resolve()))
    return resolve_pretraining(resolved, folder)
