"""Send a run's adapter, or a folder that an export wrote, to the hub."""

import tempfile
from pathlib import Path

from finetune.errors import ExportError
from finetune.files.json_files import read_json, write_json
from finetune.hub.uploads import PushReport, check_push, push_folder
from finetune.models.plain_adapter import write_plain_adapter
from finetune.runs.lineage import find_hub_base
from finetune.runs.results import Result, is_result, open_result
from finetune.runs.run_files import EXPORT_REPORT_FILE, PEFT_CONFIG_FILE


def push_result(path: Path, repository: str, *, public: bool = False) -> PushReport:
    """Send the adapter of a run as plain LoRA, or an export or adapter folder as it is.

    Raises:
        ExportError: all weights were trained, so that an export must come first, or the adapter is no plain LoRA.
        HubError: the hub cannot be reached, or refuses it.
    """
    check_push(repository)
    if (path / EXPORT_REPORT_FILE).is_file() or not is_result(path):
        return push_folder(path, repository, public=public)
    result = open_result(path)
    if not result.is_adapter:
        raise ExportError(
            f"{path}: all weights were trained; export them, which compares them too: finetune export {path} -o FOLDER --push {repository}"
        )
    with tempfile.TemporaryDirectory(prefix="yulan-finetune-") as place:
        folder = Path(place, "adapter")
        write_plain_adapter(result, folder)
        _name_base(folder, result)
        return push_folder(folder, repository, public=public)


def _name_base(folder: Path, result: Result) -> None:
    """Name the base of an adapter as the hub knows it; a folder of this machine says nothing to others."""
    lineage, config = result.lineage, read_json(folder / PEFT_CONFIG_FILE)
    base = find_hub_base(lineage) if lineage is not None else None
    if base is not None:
        config = {**config, "base_model_name_or_path": base.repository, "revision": base.revision}
    elif Path(str(config.get("base_model_name_or_path"))).is_absolute():
        config = {**config, "base_model_name_or_path": None}
    write_json(folder / PEFT_CONFIG_FILE, config)
