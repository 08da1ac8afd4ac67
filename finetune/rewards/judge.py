"""Open a trained reward model, and score texts with it: by itself, or with the base of the model that is being trained."""

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
from finetune.models.opening import load_trained
from finetune.recipe.methods import JUDGE_METHOD
from finetune.recipe.sections import JudgeSection
from finetune.runs.results import Result, open_result
from finetune.runs.run_files import PEFT_WEIGHTS_FILE

_HEAD = "base_model.model.score.weight"


@dataclass(frozen=True)
class Judge:
    """A reward model ready for use, with the tokenizer and the template that it reads texts in."""

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
    """A reward model that reads with the weights of the base that is being trained; adapter and head are its own."""

    model: PeftModel
    head: torch.Tensor
    pad_token: int
    rows_at_once: int

    def score(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the reward of each text, given as token ids from bos to the token that ends the answer."""
        starts = range(0, len(texts), self.rows_at_once)
        with torch.no_grad():
            return [
                score for start in starts for score in self._score_together(texts[start : start + self.rows_at_once])
            ]

    def _score_together(self, texts: Sequence[Sequence[int]]) -> list[float]:
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
    """Open a reward run as it was trained: its base in the run's quantization and type, with adapter and head.

    Raises:
        FinetuneError: it is no reward model, or its base or template is not the one that it was trained with.
    """
    if not result.is_reward_model:
        raise FinetuneError(f"{result.folder}: is no reward model; train one with method: {JUDGE_METHOD}")
    loaded = load_trained(result)
    loaded.model.config.pad_token_id = loaded.tokenizer.pad_token_id
    return Judge(loaded.model, loaded.tokenizer, loaded.template)


def check_judge(run: str, base: Path, template: ChatTemplate) -> None:
    """Compare the base and the template of a reward run with those of a run that it is to judge, by content.

    Raises:
        TrainingError: one of them is another.
    """
    lineage = open_result(Path(run)).lineage
    if lineage is None:
        raise TrainingError(f"rewards.judge.run: {run} does not say which base it belongs to")
    if lineage.base_fingerprint != fingerprint_checkpoint(base):
        raise TrainingError(
            f"rewards.judge.run: {run} was trained on {lineage.checkpoint} ({lineage.base}), and this run trains {base}, which "
            "holds other weights; the judge reads with the base of this run, so train both from the same checkpoint"
        )
    if lineage.template_fingerprint != template.fingerprint:
        raise TrainingError(
            f"rewards.judge.run: {run} reads texts in the template {lineage.template}, and this run writes them in "
            f"{template.name}; set data.template to the one that the judge was trained with"
        )


def fingerprint_judge(section: JudgeSection) -> str | None:
    """Return a hash of the weights of a recipe's judge, or None where it has none."""
    return hash_file(open_result(Path(section.run)).folder / PEFT_WEIGHTS_FILE) if section.run else None


def borrow_base(base: PreTrainedModel, run: str, pad_token: int, rows_at_once: int) -> BorrowingJudge:
    """Open a reward run on a base that is in memory already and has no adapter yet; both may then get their own.

    The layers' modules are made anew and what holds weights is shared: PEFT puts an adapter around a layer, in the module above it.
    Two adapters of one PEFT model would do without this, but must agree on which token rows they train (PEFT 0.21).
    """
    folder = open_result(Path(run)).folder
    shared = {id(module): module for module in base.modules() if next(module.children(), None) is None}
    config = LoraConfig.from_pretrained(folder)
    # The head is applied here: a language model has none for scores, and PEFT would look for one.
    config.task_type, config.modules_to_save = "CAUSAL_LM", None
    model = PeftModel.from_pretrained(copy.deepcopy(base, shared), folder, config=config)
    head = load_file(folder / PEFT_WEIGHTS_FILE)[_HEAD][0].float().to(base.device)
    return BorrowingJudge(model.eval(), head, pad_token, rows_at_once)
