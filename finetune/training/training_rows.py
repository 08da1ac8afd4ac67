"""Read the rows of a recipe and tokenize them."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase, TrainingArguments

from finetune.data.account import DataReport
from finetune.data.dataset import Splits, load_splits
from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.encoding.template import find_template
from finetune.data.settings import DataSettings, HubDataset, Source
from finetune.errors import describe_count
from finetune.files.cache import find_cache
from finetune.files.json_files import read_json
from finetune.mixtures.matched import match_sources
from finetune.mixtures.published import find_mixture
from finetune.recipe.sections import DataSection, Recipe, SourceSection
from finetune.recipe.trl_options import read_trainer_options
from finetune.rewards.rules import find_reference_rule
from finetune.runs.lineage import find_text_base
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.trained_tokens import open_tokenizer

_ANSWER_TOKENS = "max_completion_length"
_ANY_LENGTH = 2**31 - 1


def read_source_section(source: str | SourceSection) -> Source:
    """Return one source of rows from a checked recipe."""
    if isinstance(source, str):
        return Source(Path(source))
    is_hub = bool(source.hub)
    hub = HubDataset(source.hub, source.config, source.split or "train", source.revision)
    return Source(hub if is_hub else Path(source.path), source.weight, source.rows)


def read_training_sources(data: DataSection) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """Return the sources that a checked recipe trains on, and notes about them for a person.

    The shares of a published mixture become weights by amount of text, since the authors counted tokens, not rows.
    """
    mixture = find_mixture(data.mixture) if data.mixture else None
    if mixture is None:
        return tuple(map(read_source_section, data.train)), ()
    matched = match_sources(mixture, data.sources)
    sources = tuple(
        replace(read_source_section(data.sources[name]), weight=share, weigh_text=True)
        for name, share in matched.shares.items()
    )
    return sources, (matched.describe(),)


def prepare_rows(resolved: ResolvedRecipe) -> tuple[PreTrainedTokenizerBase, Splits]:
    """Return the tokenizer and the rows that a run of this recipe would train on; no weights are fetched or loaded."""
    _, tokenizer, template = open_data(resolved)
    return tokenizer, load_rows(resolved, find_text_base(resolved), tokenizer, template)


def load_rows(
    resolved: ResolvedRecipe, base: Path, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Splits:
    """Return the rows of a recipe as tokens; the report says where they are longer than the positions of `base`.

    Raises:
        FinetuneError: files or rows cannot be used.
    """
    splits = load_splits(read_data_settings(resolved), tokenizer, template, find_data_seed(resolved.recipe))
    notes = (*splits.report.notes, *_describe_positions(resolved, base, splits.report))
    return replace(splits, report=replace(splits.report, notes=notes))


def find_data_seed(recipe: Recipe) -> int:
    """Return the seed that draws a recipe's rows."""
    return recipe.seed if recipe.data.seed is None else recipe.data.seed


def count_step_rows(config: TrainingArguments) -> int:
    """Return how many rows an optimizer step takes from all processes."""
    return int(config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size)


def _describe_positions(resolved: ResolvedRecipe, base: Path, report: DataReport) -> tuple[str, ...]:
    """Return a sentence about rows, or prompts with their answers, that are longer than what the model was trained for."""
    method, section = resolved.method, resolved.recipe.model
    config = read_json(base / "config.json") or {}
    positions = section.max_positions or config.get("max_position_embeddings")
    if method.is_pretraining or not isinstance(positions, int):  # packed rows that are too long are an error
        return ()
    longest = max(split.longest for split in (report.train, report.evaluation) if split is not None)
    answer = 0
    if method.is_online:
        options = read_trainer_options(method.config_module, method.config_class)
        answer = resolved.recipe.trainer.get(_ANSWER_TOKENS, options[_ANSWER_TOKENS].default)
    if longest + answer <= positions:
        return ()
    rows = f"rows of up to {describe_count(longest, 'token')} exceed"
    cure = f"data.max_tokens: {positions}"
    if answer:
        rows = f"prompts of up to {describe_count(longest, 'token')} with answers of up to {answer:,} exceed"
        cure = f"data.max_tokens and trainer.{_ANSWER_TOKENS} to {positions:,} together"
    return (
        f"{rows} the {describe_count(positions, 'position')} that the base checkpoint was trained for; set {cure}, or extend its context by "
        "model.max_positions and model.rope_theta",
    )


def open_data(resolved: ResolvedRecipe) -> tuple[DataSettings, PreTrainedTokenizerBase, ChatTemplate]:
    """Return the data settings, the tokenizer and the template of a recipe; no row is read."""
    base = find_text_base(resolved)
    tokenizer = open_tokenizer(resolved.earlier, base)
    return read_data_settings(resolved), tokenizer, find_template(resolved.recipe.data.template, tokenizer)


def read_data_settings(resolved: ResolvedRecipe) -> DataSettings:
    """Return the settings for reading the rows of a recipe."""
    data = resolved.recipe.data
    train, notes = read_training_sources(data)
    held = (replace(read_source_section(source), split="evaluation") for source in data.eval)
    return DataSettings(
        train=tuple(replace(source, encoding=data.encoding) for source in train),
        shape=resolved.method.shape,
        needs_answer=find_reference_rule(resolved.recipe.rewards.rules),
        evaluation=tuple(replace(source, encoding=data.encoding) for source in held),
        held_out=data.held_out,
        format=data.format,
        columns=data.columns,
        system=data.system,
        # Documents of any length are packed into full rows.
        max_tokens=_ANY_LENGTH if resolved.method.is_pretraining else data.max_tokens,
        overflow=data.overflow,
        train_on=data.train_on,
        substitute=data.substitute,
        deduplicate=data.deduplicate,
        bad_rows=data.bad_rows,
        merge_turns=data.merge_turns,
        notes=notes,
        workers=data.workers,
        cache=find_cache() / "rows",
    )
