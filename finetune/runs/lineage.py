"""Find the base checkpoint, the tokenizer and the template of a run or its result, and check that they are the same ones."""

from dataclasses import replace
from pathlib import Path

from finetune.api_arguments import name_option
from finetune.checkpoints.finding import (
    find_base_folder,
    find_checkpoint,
    find_repository,
    find_text_files,
    fingerprint_checkpoint,
    pin_name,
)
from finetune.data.encoding.rendering import ChatTemplate
from finetune.errors import CheckpointError, ExportError, TemplateError
from finetune.files.json_files import read_json
from finetune.hub.faults import Asked
from finetune.recipe.sections import ModelSection, TrainedArchitecture
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.results import Lineage, Result, check_result_files
from finetune.runs.run_files import PEFT_CONFIG_FILE
from finetune.yulan.layout import find_architecture, parse_native_config, read_config
from finetune.yulan.llama_files import open_llama_tensors
from finetune.yulan.tokenizer_files import holds_tokenizer


def find_training_base(resolved: ResolvedRecipe) -> Path:
    """Find the folder of the weights that a run trains: of its base checkpoint, or of the run that it continues.

    Raises:
        FinetuneError: it cannot be found or read, or the base of the earlier run has changed since.
    """
    model, earlier = resolved.recipe.model, resolved.earlier
    if earlier is not None:
        check_result_files(earlier)
    if earlier is None:
        _check_trainable(find_checkpoint(model.checkpoint))
        return find_base_folder(model.checkpoint, model.architecture)
    return find_base(earlier) if earlier.is_adapter else find_base_folder(str(earlier.folder), model.architecture)


def find_text_base(resolved: ResolvedRecipe) -> Path:
    """Find a folder with configuration and tokenizer of what a run trains, for which no weights are fetched or folded.

    Raises:
        FinetuneError: it cannot be found or read.
    """
    model, earlier = resolved.recipe.model, resolved.earlier
    if earlier is None:
        folder = find_text_files(model.checkpoint)
        check_tokenizer(folder)
        read_config(folder)
        return folder
    lineage = earlier.lineage
    if not earlier.is_adapter:
        return earlier.folder
    if lineage is None:
        return find_base(earlier)
    base = Path(lineage.base)
    return base if base.is_dir() else find_text_files(pin_name(lineage.checkpoint, lineage.commit))


def check_tokenizer(folder: Path) -> None:
    """Check that a folder holds a tokenizer.

    Raises:
        CheckpointError: it holds none.
    """
    if not holds_tokenizer(folder):
        raise CheckpointError(
            f"{folder}: holds no tokenizer (no tokenizer.json and no tokenizer.model); copy the checkpoint's tokenizer files into it"
        )


def _check_trainable(folder: Path) -> None:
    """Look at a checkpoint before it is folded or loaded, which takes minutes and gigabytes.

    Raises:
        CheckpointError: it has no tokenizer, its sizes contradict each other, or tensors are missing.
    """
    check_tokenizer(folder)
    if find_architecture(folder) == "llama":
        open_llama_tensors(folder)
    else:
        parse_native_config(read_config(folder), folder)


def find_base(result: Result, base_model: str | None = None) -> Path:
    """Find the folder of the base that an adapter was trained on, and check its content; `base_model` names it instead.

    Raises:
        CheckpointError: the base cannot be found.
        ExportError: the folder holds other weights than those that the adapter was trained on.
    """
    lineage = result.lineage
    if lineage is None:
        # Not folded: PEFT trained this adapter on the folder as it is, in whatever architecture.
        return _find_peft_base(result.folder, base_model)
    base = Path(lineage.base)
    if base_model is not None:
        base = find_base_folder(base_model, lineage.architecture)
    elif not base.is_dir():
        base = find_base_folder(pin_name(lineage.checkpoint, lineage.commit), lineage.architecture)
    found = fingerprint_checkpoint(base)
    if found != lineage.base_fingerprint:
        raise ExportError(
            f"{result.folder}: this adapter was trained on other weights than {base} holds now "
            f"(fingerprint {found[:12]}, expected {lineage.base_fingerprint[:12]}); restore the checkpoint {lineage.checkpoint!r} that it was trained on"
        )
    return base


def recall_model(result: Result, base: Path) -> ModelSection:
    """Return the model settings with which the weights of a result were trained."""
    architecture: TrainedArchitecture = "native" if find_architecture(base) == "yulanmini" else "llama"
    lineage = result.lineage
    if lineage is None:
        return ModelSection(architecture=architecture)
    return ModelSection(
        architecture=architecture,
        quantize=lineage.quantize,
        max_positions=lineage.max_positions,
        rope_theta=lineage.rope_theta,
    )


def find_tokenizer_folder(result: Result | None, base: Path) -> Path:
    """Return the folder with tokenizer and template: that of the result where it has them, else that of the base."""
    return result.folder if result is not None and (result.folder / "tokenizer_config.json").is_file() else base


def check_template(result: Result, template: ChatTemplate) -> None:
    """Check that a template is the one that a result was trained with.

    Raises:
        TemplateError: it is another one.
    """
    if result.lineage is not None and template.fingerprint != result.lineage.template_fingerprint:
        raise TemplateError(
            f"{result.folder}: its chat template is not the one that it was trained with ({result.lineage.template}); "
            "restore chat_template.jinja, or train again"
        )


def find_base_name(result: Result) -> str | None:
    """Return the name of the first base checkpoint of a result, as its recipe or PEFT's configuration names it."""
    lineage = result.lineage
    if lineage is not None:
        return lineage.earlier[0].checkpoint if lineage.earlier else lineage.checkpoint
    content = read_json(result.folder / PEFT_CONFIG_FILE)
    name = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return name if isinstance(name, str) and name else None


def find_hub_base(lineage: Lineage) -> Asked | None:
    """Return the repository and the commit of the hub from which the first base of a result came, if it came from there."""
    first = lineage.earlier[0] if lineage.earlier else lineage
    asked = find_repository(first.checkpoint)
    return None if asked is None else replace(asked, revision=first.commit or asked.revision)


def name_base(lineage: Lineage) -> str:
    """Return the first base checkpoint of a result, with its commit on the hub where one is recorded."""
    first = lineage.earlier[0] if lineage.earlier else lineage
    return f"{first.checkpoint} (commit {first.commit})" if first.commit else first.checkpoint


def _find_peft_base(folder: Path, base_model: str | None) -> Path:
    """Find the base of an adapter that another tool wrote: the one that is given, or the one that its configuration names."""
    content = read_json(folder / PEFT_CONFIG_FILE)
    own = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    name = base_model or own
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{folder / PEFT_CONFIG_FILE}: names no base model (base_model_name_or_path is {own!r}); name it with {name_option('--base-model')}"
        )
    try:
        base = find_checkpoint(name if base_model is not None else pin_name(name, content.get("revision")))
        find_architecture(base)
    except CheckpointError as error:
        if base_model is not None:
            raise
        raise CheckpointError(
            f"{folder}: its base model {name!r} cannot be used: {error}\nIf the base lies somewhere else, or the adapter was trained on "
            f"a quantized form of it, name the full-precision base, a folder or a hub id, with {name_option('--base-model')}"
        ) from error
    return base
