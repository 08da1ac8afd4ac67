"""Write the result of a run: the trained adapter or model, with its tokenizer, its lineage and sample rows."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from finetune.data.encoding.template import list_stop_tokens
from finetune.errors import TrainingError
from finetune.files.folders import write_folder
from finetune.files.safety.manifests import write_manifest
from finetune.models.lora import save_adapter, subtract_initial
from finetune.runs.results import EarlierRun, Lineage, SampleRow, list_checked_files, write_lineage
from finetune.runs.run_files import ADAPTER_FOLDER, MODEL_FOLDER, PISSA_START_FOLDER
from finetune.training.journal.answers import answer_rows, is_sharded
from finetune.training.pretraining.state_loading import save_states
from finetune.training.setup import Setup
from finetune.yulan.tensors import find_non_finite, name_dtype, open_tensor_files

# An export is compared on these rows. On a CPU the real model takes minutes for so many.
_ANSWERED_ROWS = 8
_SAMPLE_ROWS, _SAMPLE_TOKENS, _LONGEST_SAMPLE = 64, 8192, 1024


def write_result(
    run: Path,
    setup: Setup,
    model: PreTrainedModel | PeftModel,
    trainer: Trainer,
    weights: dict[str, torch.Tensor] | None,
) -> None:
    """Write `adapter/` or `model/` into a run directory; `weights` are the gathered ones where the model was sharded."""
    recipe = setup.resolved.recipe
    trained = ADAPTER_FOLDER if isinstance(model, PeftModel) else MODEL_FOLDER
    with write_folder(run / trained) as folder:
        if isinstance(model, PeftModel):
            save_adapter(model, folder, weights)
            if recipe.adapter.init == "pissa":
                subtract_initial(folder, run / PISSA_START_FOLDER)
        else:
            model.save_pretrained(folder, state_dict=weights)
        if recipe.optimizer.save_states:
            save_states(folder, trainer.optimizer)
        for name, content in setup.tokenizer_files.items():
            (folder / name).write_bytes(content)
        rows = _choose_sample_rows(setup.sample_rows)
        if setup.resolved.method.is_online:
            rows = _answer_sample_rows(setup, model, trainer)
        write_lineage(folder, _describe_lineage(setup), rows, setup.splits.samples)
        _check_numbers(folder)
        write_manifest(folder, list_checked_files(folder))
    (run / "README.md").unlink(missing_ok=True)  # TRL's card would describe the run as an upload to the hub


def _check_numbers(folder: Path) -> None:
    """Check that the weights of a result, as they were written, are numbers.

    Raises:
        TrainingError: some are NaN or infinite.
    """
    if (name := find_non_finite(open_tensor_files(folder))) is not None:
        raise TrainingError(
            f"{name} has become NaN or infinite, so no result was written; lower trainer.learning_rate, and start again with "
            "another output, or go back to an earlier checkpoint in the run directory"
        )


def _describe_lineage(setup: Setup) -> Lineage:
    """Return where the result comes from: its base checkpoint, its template, its method, and the runs before this one."""
    model, earlier, runs = setup.resolved.recipe.model, setup.resolved.earlier, tuple[EarlierRun, ...]()
    checkpoint = model.checkpoint
    if earlier is not None and earlier.lineage is not None:
        before = earlier.lineage
        runs = (*before.earlier, EarlierRun(before.checkpoint, before.method, checkpoint))
        if (
            earlier.is_adapter
        ):  # it belongs to the same base, which is found again by the name in the first run's recipe
            checkpoint = before.checkpoint
    return Lineage(
        checkpoint=checkpoint,
        base=str(setup.base),
        base_fingerprint=setup.base_fingerprint,
        quantize=model.quantize,
        dtype=name_dtype(setup.precision.weights),
        template=setup.template.name,
        template_fingerprint=setup.template.fingerprint,
        method=setup.resolved.method.name,
        architecture=model.architecture,
        earlier=runs,
        max_positions=model.max_positions,
        rope_theta=model.rope_theta,
    )


def _answer_sample_rows(setup: Setup, model: PreTrainedModel | PeftModel, trainer: Trainer) -> list[SampleRow]:
    """Return held-out prompts with the model's own answers, or the prompts alone where its weights are sharded."""
    rows = setup.sample_rows.select(range(min(_ANSWERED_ROWS, len(setup.sample_rows))))
    if is_sharded(trainer):
        return [SampleRow(ids, ids) for ids in rows["input_ids"]]
    return answer_rows(model, setup.tokenizer, list_stop_tokens(setup.tokenizer, setup.template), rows)


def _choose_sample_rows(rows: Dataset) -> list[SampleRow]:
    """Return the first rows, up to a number of rows and of tokens; very long rows are cut."""
    chosen: list[SampleRow] = []
    tokens = 0
    for row in rows.select(range(min(_SAMPLE_ROWS, len(rows)))):
        sample = SampleRow(row["input_ids"][:_LONGEST_SAMPLE], row["labels"][:_LONGEST_SAMPLE])
        tokens += len(sample.input_ids)
        if chosen and tokens > _SAMPLE_TOKENS:
            break
        chosen.append(sample)
    return chosen
