"""Find again what a result belongs to: its base by content, its tokenizer, its template; and what a run begins with."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from finetune.data.encoding.rendering import ChatTemplate
from finetune.errors import CheckpointError, ExportError, TemplateError
from finetune.recipe.sections import ModelSection, TrainedArchitecture
from finetune.checkpoints.finding import find_base_folder, find_checkpoint, fingerprint_checkpoint
from finetune.files.json_files import read_json
from finetune.runs.results import Result, find_earlier
from finetune.yulan.layout import find_architecture

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run begins with: the folder of its base's weights, and the result of an earlier run that it goes on from."""

    base: Path
    earlier: Result | None = None

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter that goes on, if there is one."""
        return self.earlier.folder if self.earlier is not None and self.earlier.kind == "adapter" else None

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies, with the template of an earlier run."""
        return self.base if self.earlier is None else find_tokenizer_folder(self.earlier, self.base)


def find_start(section: ModelSection) -> Start:
    """Return what a recipe's `model` section starts from: a checkpoint, or an earlier run with its base.

    Raises:
        FinetuneError: it cannot be found or read, or the base of the earlier run is not what that was trained on.
    """
    earlier = find_earlier(section.checkpoint)
    if earlier is None:
        return Start(find_base_folder(section.checkpoint, section.architecture))
    if earlier.kind == "adapter":
        return Start(find_base(earlier), earlier)
    return Start(find_base_folder(str(earlier.folder), section.architecture), earlier)




def find_base(result: Result) -> Path:
    """Return the folder that an adapter was trained on, after comparing its content.

    Raises:
        CheckpointError: the base cannot be found.
        ExportError: a base is there but holds other weights than the adapter was trained on.
    """
    origin = result.origin
    if origin is None:
        # As it is: an adapter whose base is a native folder was trained on the native model.
        return find_checkpoint(_read_peft_base(result.folder))
    base = Path(origin.base)
    if not base.is_dir():
        base = find_base_folder(origin.checkpoint, origin.architecture)
    found = fingerprint_checkpoint(base)
    if found != origin.base_fingerprint:
        raise ExportError(
            f"{result.folder}: this adapter was trained on other weights than {base} holds now "
            f"(content {origin.base_fingerprint[:12]}, found {found[:12]}); restore the checkpoint {origin.checkpoint!r} that it was trained on"
        )
    return base


def recall_model(result: Result, base: Path) -> ModelSection:
    """Return how the weights of a result were opened for its training."""
    architecture: TrainedArchitecture = "native" if find_architecture(base) == "yulanmini" else "llama"
    origin = result.origin
    if origin is None:
        return ModelSection(architecture=architecture)
    return ModelSection(
        architecture=architecture,
        quantize=origin.quantize,
        max_positions=origin.max_positions,
        rope_theta=origin.rope_theta,
    )


def find_tokenizer_folder(result: Result, base: Path) -> Path:
    """Return where a result's tokenizer lies: its own folder, or its base for one that came without."""
    return result.folder if (result.folder / "tokenizer_config.json").is_file() else base


def check_template(result: Result, template: ChatTemplate) -> None:
    """Compare the template that was found with the one that a result was trained with.

    Raises:
        TemplateError: it is another one.
    """
    if result.origin is not None and template.fingerprint != result.origin.template_fingerprint:
        raise TemplateError(
            f"{result.folder}: its chat template is not the one that it was trained with ({result.origin.template}); "
            "restore chat_template.jinja, or train again"
        )


def _read_peft_base(folder: Path) -> str:
    name = (read_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: does not say which base the adapter belongs to; set its base_model_name_or_path"
        )
    return str(name)
