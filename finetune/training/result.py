"""Write the result of a run: the trained adapter or model, with its tokenizer, its lineage and sample rows.

Every checkpoint of the trainer gets the same files, so that it can be exported and used as the end of the run can.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.checkpoints.finding import find_named_commit
from finetune.checkpoints.hub_names import name_datasets
from finetune.data.encoding.template import list_stop_tokens
from finetune.errors import TrainingError
from finetune.files.folders import write_folder
from finetune.files.safety.manifests import write_manifest
from finetune.models.engine import ENGINES, find_engine
from finetune.models.lora import save_adapter, subtract_initial
from finetune.models.plain_adapter import describe_use
from finetune.runs.results import EarlierRun, Lineage, SampleRow, list_checked_files, write_lineage
from finetune.runs.run_files import (
    ADAPTER_FOLDER,
    MODEL_FOLDER,
    PEFT_CONFIG_FILE,
    PEFT_WEIGHTS_FILE,
    PISSA_START_FOLDER,
)
from finetune.training.journal.answers import answer_rows
from finetune.training.pretraining.state_loading import save_states
from finetune.training.setup import Setup
from finetune.yulan.tensors import find_non_finite, name_dtype, open_tensor_files

logger = logging.getLogger(__name__)

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
            if recipe.adapter.changes_base:
                subtract_initial(folder, run / PISSA_START_FOLDER)
        else:
            model.save_pretrained(folder, state_dict=weights)
        if recipe.optimizer.save_states:
            save_states(folder, trainer.optimizer)
        rows = _choose_sample_rows(setup.sample_rows)
        if setup.resolved.method.is_online:
            rows = _answer_sample_rows(setup, model)
        _write_origin(folder, setup, rows)
        _check_numbers(folder)
        write_manifest(folder, list_checked_files(folder))
    if isinstance(model, PeftModel) and not setup.resolved.method.trains_reward_model:
        logger.info("adapter: %s", describe_use(run / ADAPTER_FOLDER).replace("export RUN", f"export {run}"))
    (run / "README.md").unlink(missing_ok=True)  # TRL's card would describe the run as an upload to the hub


class CheckpointOrigin(TrainerCallback):
    """Writes beside the weights of each checkpoint where they come from, and the tokenizer files as the run's result has them.

    The trainer saves the tokenizer anew, which can change its tokens. PiSSA's factors belong to a changed base; a checkpoint keeps
    them for resuming, and holds the equal adapter of the unchanged base in `adapter/`.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Complete the checkpoint that was just written."""
        setup, run = self._setup, self._setup.resolved.output
        checkpoint = run / f"checkpoint-{state.global_step}"
        # Rotation may have removed it: the trainer keeps the best one instead where the limit is 1.
        if not state.is_world_process_zero or not checkpoint.is_dir():
            return
        if setup.resolved.method.is_online:
            rows = [SampleRow(ids, ids) for ids in _choose_prompts(setup)["input_ids"]]
        else:
            rows = _choose_sample_rows(setup.sample_rows)
        if not setup.resolved.recipe.adapter.changes_base:
            _write_origin(checkpoint, setup, rows)
            return
        # What a stopped run left there is of the same step, but of other weights where the checkpoint was incomplete.
        shutil.rmtree(checkpoint / ADAPTER_FOLDER, ignore_errors=True)
        with write_folder(checkpoint / ADAPTER_FOLDER) as folder:
            for name in (PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE):
                shutil.copyfile(checkpoint / name, folder / name)
            subtract_initial(folder, run / PISSA_START_FOLDER)
            _write_origin(folder, setup, rows)


def _write_origin(folder: Path, setup: Setup, rows: Sequence[SampleRow]) -> None:
    """Write the tokenizer files, the lineage and the sample rows beside trained weights."""
    for name, content in setup.tokenizer_files.items():
        (folder / name).write_bytes(content)
    write_lineage(folder, _describe_lineage(setup), rows, setup.splits.samples)


def _check_numbers(folder: Path) -> None:
    """Check that the weights of a result, as they were written, are whole and are numbers.

    Raises:
        TrainingError: some are empty, NaN or infinite.
    """
    tensors = open_tensor_files(folder)
    if (empty := next((name for name, entry in tensors.entries.items() if 0 in entry.shape), None)) is not None:
        raise TrainingError(
            f"{empty} was saved empty, because its values lie in other processes, so no result was written; launch with "
            "recipes/accelerate/fsdp2.yaml, and please report the engine's settings"
        )
    if (name := find_non_finite(tensors)) is not None:
        raise TrainingError(
            f"{name} has become NaN or infinite, so no result was written; lower trainer.learning_rate, and start again with "
            "another output, or go back to an earlier checkpoint in the run directory"
        )


def _describe_lineage(setup: Setup) -> Lineage:
    """Return where the result comes from: its base checkpoint, its template, its method, and the runs before this one."""
    model, earlier, runs = setup.resolved.recipe.model, setup.resolved.earlier, tuple[EarlierRun, ...]()
    checkpoint, commit = model.checkpoint, find_named_commit(model.checkpoint)
    if earlier is not None and earlier.lineage is not None:
        before = earlier.lineage
        runs = (*before.earlier, EarlierRun(before.checkpoint, before.method, checkpoint, before.commit))
        if (
            earlier.is_adapter
        ):  # it belongs to the same base, which is found again by the name in the first run's recipe
            checkpoint, commit = before.checkpoint, before.commit
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
        commit=commit,
        datasets=name_datasets(setup.resolved.recipe),
        init=setup.resolved.recipe.adapter.init,
    )


def _answer_sample_rows(setup: Setup, model: PreTrainedModel | PeftModel) -> list[SampleRow]:
    """Return held-out prompts with the model's own answers, or the prompts alone where its weights are sharded."""
    rows = _choose_prompts(setup)
    if ENGINES[find_engine()].shards_weights:
        return [SampleRow(ids, ids) for ids in rows["input_ids"]]
    return answer_rows(model, setup.tokenizer, list_stop_tokens(setup.tokenizer, setup.template), rows)


def _choose_prompts(setup: Setup) -> Dataset:
    return setup.sample_rows.select(range(min(_ANSWERED_ROWS, len(setup.sample_rows))))


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
