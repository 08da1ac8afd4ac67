"""Write what a run has trained, so that an export, an evaluation or another run can take it from there."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from finetune.checkpoints.finding import fingerprint_checkpoint
from finetune.data.dataset import Splits
from finetune.data.encoding.template import list_stop_tokens
from finetune.files.folders import write_folder
from finetune.models.lora import save_adapter, subtract_start
from finetune.recipe.methods import METHODS
from finetune.runs.results import Origin, SampleRow, Stage, write_origin
from finetune.train.journal.answers import answer_rows, is_sharded
from finetune.train.pretraining.state_loading import save_states
from finetune.train.setup import Setup

PISSA_START = "pissa-start"
# What an export is compared on. The real model needs minutes for so many on a processor.
_ANSWERED_ROWS = 8
_SAMPLE_ROWS, _SAMPLE_TOKENS, _LONGEST_SAMPLE = 64, 8192, 1024


def write_result(
    run: Path,
    setup: Setup,
    model: PreTrainedModel | PeftModel,
    trainer: Trainer,
    weights: dict[str, torch.Tensor] | None,
) -> None:
    """Write `adapter/` or `model/` of a run directory; `weights` in place of the model's own where they were gathered."""
    recipe = setup.recipe
    trained = "adapter" if isinstance(model, PeftModel) else "model"
    with write_folder(run / trained) as folder:
        if isinstance(model, PeftModel):
            save_adapter(model, folder, weights)
            if recipe.adapter.init == "pissa":
                subtract_start(folder, run / PISSA_START)
        else:
            model.save_pretrained(folder, state_dict=weights)
        if recipe.optimizer.save_states:
            save_states(folder, trainer.optimizer)
        setup.tokenizer.save_pretrained(folder)
        rows = _choose_sample_rows(setup.splits)
        if METHODS[recipe.method].is_online:
            rows = _answer_sample_rows(setup, model, trainer)
        write_origin(folder, _describe_origin(setup), rows)
    (run / "README.md").unlink(missing_ok=True)  # TRL's card would describe the run as an upload to the hub


def _describe_origin(setup: Setup) -> Origin:
    checkpoint, earlier, stages = setup.recipe.model.checkpoint, setup.begin.earlier, tuple[Stage, ...]()
    if earlier is not None and earlier.origin is not None:
        before = earlier.origin
        stages = (*before.earlier, Stage(before.checkpoint, before.method, checkpoint))
        if earlier.kind == "adapter":  # its base goes on too, and is found by the name that it was first started by
            checkpoint = before.checkpoint
    return Origin(
        checkpoint=checkpoint,
        base=str(setup.begin.base),
        base_fingerprint=fingerprint_checkpoint(setup.begin.base),
        quantize=setup.recipe.model.quantize,
        dtype=str(setup.precision.weights).removeprefix("torch."),
        template=setup.template.name,
        template_fingerprint=setup.template.fingerprint,
        method=setup.recipe.method,
        architecture=setup.recipe.model.architecture,
        earlier=stages,
        max_positions=setup.recipe.model.max_positions,
        rope_theta=setup.recipe.model.rope_theta,
    )


def _answer_sample_rows(setup: Setup, model: PreTrainedModel | PeftModel, trainer: Trainer) -> list[SampleRow]:
    """Return held-out prompts with the model's own answers, or the prompts alone where its weights lie apart."""
    rows = setup.splits.train if setup.splits.evaluation is None else setup.splits.evaluation
    rows = rows.select(range(min(_ANSWERED_ROWS, len(rows))))
    if is_sharded(trainer):
        return [SampleRow(ids, ids) for ids in rows["input_ids"]]
    return answer_rows(model, setup.tokenizer, list_stop_tokens(setup.tokenizer, setup.template), rows)


def _choose_sample_rows(splits: Splits) -> list[SampleRow]:
    """Return held-out rows, or rows of the training where there are none."""
    rows = splits.train if splits.evaluation is None else splits.evaluation
    chosen: list[SampleRow] = []
    tokens = 0
    for row in rows.select(range(min(_SAMPLE_ROWS, len(rows)))):
        sample = SampleRow(row["input_ids"][:_LONGEST_SAMPLE], row["labels"][:_LONGEST_SAMPLE])
        tokens += len(sample.input_ids)
        if chosen and tokens > _SAMPLE_TOKENS:
            break
        chosen.append(sample)
    return chosen
