"""Find the base checkpoint, the tokenizer and the template of a run or its result, and check that they are the same ones."""

from pathlib import Path

from finetune.checkpoints.finding import find_base_folder, find_checkpoint, fingerprint_checkpoint
from finetune.data.encoding.rendering import ChatTemplate
from finetune.errors import CheckpointError, ExportError, TemplateError
from finetune.files.json_files import read_json
from finetune.recipe.sections import ModelSection, TrainedArchitecture
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.results import Result, check_result_files
from finetune.runs.run_files import PEFT_CONFIG_FILE
from finetune.yulan.layout import find_architecture


def find_training_base(resolved: ResolvedRecipe) -> Path:
    """Find the folder of the weights that a run trains: of its base checkpoint, or of the run that it continues.

    Raises:
        FinetuneError: it cannot be found or read, or the base of the earlier run has changed since.
    """
    model, earlier = resolved.recipe.model, resolved.earlier
    if earlier is not None:
        check_result_files(earlier)
    if earlier is None:
        return find_base_folder(model.checkpoint, model.architecture)
    return find_base(earlier) if earlier.is_adapter else find_base_folder(str(earlier.folder), model.architecture)


def find_base(result: Result) -> Path:
    """Find the folder of the base that an adapter was trained on, and check its content.

    Raises:
        CheckpointError: the base cannot be found.
        ExportError: the folder holds other weights than those that the adapter was trained on.
    """
    lineage = result.lineage
    if lineage is None:
        # Not folded: PEFT trained this adapter on the folder as it is, in whatever architecture.
        return find_checkpoint(_read_peft_base(result.folder))
    base = Path(lineage.base)
    if not base.is_dir():
        base = find_base_folder(lineage.checkpoint, lineage.architecture)
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


def _read_peft_base(folder: Path) -> str:
    name = (read_json(folder / PEFT_CONFIG_FILE) or {}).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: does not name the base model of the adapter; set its base_model_name_or_path"
        )
    return str(name)
