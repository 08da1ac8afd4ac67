"""Open a trained reward model and score texts with it: by itself, or as a judge that shares the base model of a run."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.checkpoints.finding import fingerprint_checkpoint
from finetune.data.encoding.rendering import ChatTemplate
from finetune.errors import FinetuneError, TrainingError
from finetune.files.cache import hash_file
from finetune.models.adapter_config import read_adapter_config
from finetune.models.opening import load_trained
from finetune.recipe.methods import JUDGE_METHOD
from finetune.recipe.sections import SCORE_HEADS, JudgeSection
from finetune.runs.results import Result, check_result_files, open_result
from finetune.runs.run_files import PEFT_WEIGHTS_FILE
from finetune.yulan.tensors import read_header

_HEAD = "base_model.model.score.weight"


@dataclass(frozen=True)
class Judge:
    """A reward model ready for use, with its tokenizer and the template of its texts."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate

    def score(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the reward of each text, given as token ids from bos to the token that ends the answer."""
        ids, mask = _pad_texts(texts, int(self.tokenizer.pad_token_id), self.model.device)
        with torch.inference_mode():
            scores: list[float] = self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
        return scores


@dataclass(frozen=True)
class BorrowingJudge:
    """A reward model that shares the base model of a run; adapter and head are its own."""

    model: PeftModel
    head: torch.Tensor
    pad_token: int
    batch_size: int

    def score(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the reward of each text, given as token ids from bos to the token that ends the answer."""
        starts = range(0, len(texts), self.batch_size)
        with torch.no_grad():
            return [score for start in starts for score in self._score_batch(texts[start : start + self.batch_size])]

    def _score_batch(self, texts: Sequence[Sequence[int]]) -> list[float]:
        ids, mask = _pad_texts(texts, self.pad_token, self.head.device)
        layers = self.model.get_base_model().model
        hidden = layers(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(texts), device=hidden.device), mask.sum(dim=1) - 1]
        scores: list[float] = (last.float() @ self.head).tolist()
        return scores


def _pad_texts(texts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[pad] * (longest - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=device)
    return ids, mask


def open_judge(result: Result) -> Judge:
    """Open a reward model as it was trained: its base in the run's quantization and dtype, with adapter and head.

    Raises:
        FinetuneError: it is no reward model, or its base or template is not the one that it was trained with.
    """
    if not result.is_reward_model:
        raise FinetuneError(f"{result.folder}: is no reward model; train one with method: {JUDGE_METHOD}")
    loaded = load_trained(result)
    loaded.model.config.pad_token_id = loaded.tokenizer.pad_token_id
    return Judge(loaded.model, loaded.tokenizer, loaded.template)


def check_judge(run: str, base: Path, template: ChatTemplate) -> None:
    """Check by content that a reward model has the base and the template of the run whose answers it will score.

    Raises:
        FinetuneError: one of them differs, or the reward model is damaged.
    """
    lineage = _open_whole(run).lineage
    if lineage is None:
        raise TrainingError(
            f"rewards.judge.run: {run} does not say on which base checkpoint it was trained; give a run that this kit trained"
        )
    if lineage.base_fingerprint != fingerprint_checkpoint(base):
        raise TrainingError(
            f"rewards.judge.run: {run} was trained on {lineage.checkpoint} ({lineage.base}), and this run trains {base}, which "
            "holds other weights; the judge shares the base model of this run, so train both from the same base checkpoint"
        )
    if lineage.template_fingerprint != template.fingerprint:
        raise TrainingError(
            f"rewards.judge.run: {run} was trained with the template {lineage.template}, and this run uses "
            f"{template.name}; set data.template to the one that the judge was trained with"
        )


def _open_whole(run: str) -> Result:
    """Open a reward model's result after looking at its files, which PEFT would read unchecked."""
    result = open_result(Path(run))
    check_result_files(result)
    read_adapter_config(result.folder)
    if _HEAD not in read_header(result.folder / PEFT_WEIGHTS_FILE):
        raise TrainingError(f"rewards.judge.run: {result.folder} holds no head of a reward model; train it again")
    return result


def fingerprint_judge(section: JudgeSection) -> str | None:
    """Return a hash of the weights of the recipe's judge, or None where the recipe has none."""
    return hash_file(_open_whole(section.run).folder / PEFT_WEIGHTS_FILE) if section.run else None


def borrow_base(base: PreTrainedModel, run: str, pad_token: int, batch_size: int) -> BorrowingJudge:
    """Open a reward model on a base model that is in memory and has no adapter yet; the base may get another adapter later.

    Modules that hold weights are shared, and the modules around them are copied, since PEFT puts an adapter into the module above a
    layer. One PEFT model with two adapters would not do: both would have to train the same token rows (PEFT 0.21).
    """
    folder = open_result(Path(run)).folder
    shared = {id(module): module for module in base.modules() if next(module.children(), None) is None}
    config = LoraConfig.from_pretrained(folder)
    # The head is applied by `BorrowingJudge`; PEFT would look for one in the language model, which has none for scores.
    config.task_type = "CAUSAL_LM"
    config.modules_to_save = [name for name in config.modules_to_save or () if name not in SCORE_HEADS] or None
    model = PeftModel.from_pretrained(copy.deepcopy(base, shared), folder, config=config)
    head = load_file(folder / PEFT_WEIGHTS_FILE)[_HEAD][0].float().to(base.device)
    return BorrowingJudge(model.eval(), head, pad_token, batch_size)
