"""Open a trained reward model, and score texts with it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.data.template import ChatTemplate, find_template
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import FinetuneError
from finetune.recipe import ModelSection
from finetune.train.methods import METHODS
from finetune.train.model import choose_device, choose_precision, load_base
from finetune.train.origin import Result
from finetune.train.record import check_template, find_base, find_tokenizer_folder


@dataclass(frozen=True)
class Judge:
    """A reward model ready for use, with the tokenizer and the template that it reads texts in."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate

    def score(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the reward of each text, given as token ids from bos to the token that ends the answer."""
        longest = max(map(len, texts))
        pad = int(self.tokenizer.pad_token_id)
        ids = torch.tensor([[*text, *[pad] * (longest - len(text))] for text in texts], device=self.model.device)
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=self.model.device)
        with torch.inference_mode():
            scores: list[float] = self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
        return scores


def is_judge(result: Result) -> bool:
    """Tell whether a result is a reward model, which scores texts and cannot speak."""
    origin = result.origin
    return origin is not None and origin.method in METHODS and METHODS[origin.method].head == "score"


def open_judge(result: Result) -> Judge:
    """Open a reward run as it was trained: its base in the run's quantization and type, with adapter and head.

    Raises:
        FinetuneError: it is no reward model, or its base or template is not the one that it was trained with.
    """
    origin = result.origin
    if origin is None or not is_judge(result):
        raise FinetuneError(f"{result.folder}: is no reward model; train one with method: reward")
    device = choose_device()
    precision = choose_precision(origin.dtype, device, False)
    base = find_base(result) if result.kind == "adapter" else result.folder
    model: PreTrainedModel | PeftModel = load_base(
        base, ModelSection(quantize=origin.quantize), precision, device, head="score"
    )
    if result.kind == "adapter":
        model = PeftModel.from_pretrained(model, result.folder)
    tokenizer = load_tokenizer(find_tokenizer_folder(result, base))
    model.config.pad_token_id = tokenizer.pad_token_id
    template = find_template("auto", tokenizer)
    check_template(result, template)
    return Judge(model.eval(), tokenizer, template)
