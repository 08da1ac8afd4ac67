"""Open a run or a model for use, and generate answers with the template that it was trained with."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetune.api_arguments import require_count, require_turns
from finetune.checkpoints.finding import as_llama, find_checkpoint, fingerprint_checkpoint
from finetune.data.encoding.rendering import ChatTemplate, encode_prompt
from finetune.data.encoding.template import find_template, list_stop_tokens
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.errors import ArgumentError, FinetuneError
from finetune.files.cache import hash_file
from finetune.files.folders import expand_home
from finetune.models.loading import load_base
from finetune.models.lora import apply_adapter
from finetune.models.precision import choose_device, choose_precision
from finetune.models.streaming.from_disk import read_stored, stream_model
from finetune.recipe.methods import Head
from finetune.recipe.sections import ModelSection
from finetune.runs.lineage import check_template, find_base, find_tokenizer_folder, recall_model
from finetune.runs.results import Result, check_result_files, is_result, list_checked_files, open_result
from finetune.runs.run_files import name_inner_run
from finetune.runs.trained_tokens import check_trained_tokens
from finetune.yulan.llama_files import open_llama_tensors
from finetune.yulan.tensors import open_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """What a model answered; `stopped_by` is the stop token that ended it, or `max_tokens`."""

    text: str
    tokens: int
    stopped_by: str


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, with its tokenizer, its template and the tokens that end an answer."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    stop_tokens: tuple[int, ...]

    def answer(
        self, messages: str | Sequence[Mapping[str, str]], max_new_tokens: int = 512, temperature: float = 0.0
    ) -> Reply:
        """Generate the assistant's next turn, to a question or to a whole conversation.

        Temperature 0 takes the likeliest token each time.

        Raises:
            FinetuneError: the messages are none, the number of new tokens is below 1, or the temperature below 0.
        """
        turns = require_turns("answer: messages", messages)
        require_count("answer: max_new_tokens", max_new_tokens)
        if not isinstance(temperature, int | float) or not temperature >= 0:
            raise ArgumentError(f"answer: temperature: must be a number of 0 or more; found {temperature!r}")
        prompt = torch.tensor([encode_prompt(self.tokenizer, self.template, turns)], device=self.model.device)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=list(self.stop_tokens),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config
            )
        tokens: list[int] = output[0, prompt.shape[1] :].tolist()
        stopped = tokens[-1] in self.stop_tokens
        text = self.tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=True)
        ended_by = self.tokenizer.convert_ids_to_tokens(tokens[-1]) if stopped else "max_tokens"
        return Reply(str(text), len(tokens), ended_by)


def open_model(name: str, *, streams: bool = False) -> LoadedModel:
    """Open a run, with its base model and adapter as they were trained, or a model by alias, hub id or folder.

    `streams` saves memory on a CPU, for a model that makes a few passes over long rows: matrices that are computed with in float32 stay
    on the disk, and each is read anew for every pass. The outputs have the same bits.

    Raises:
        FinetuneError: there is nothing of that name, or its template is not the one that it was trained with.
    """
    path = expand_home(name)
    if path.is_dir() and is_result(path):
        return open_trained(open_result(path), streams=streams)
    if path.is_dir() and not (path / "config.json").is_file() and (hint := name_inner_run(path)):
        raise FinetuneError(f"{name}: is neither a run directory nor a model; {hint}")
    folder = as_llama(find_checkpoint(name))
    model = _load(folder, ModelSection(), "auto", "language", None, streams=streams)
    return _complete(model, load_tokenizer(folder, needs_padding=False))


def open_trained(result: Result, *, streams: bool = False) -> LoadedModel:
    """Open a language model as it was trained: its base in the run's quantization and dtype, with the adapter.

    `streams` is that of `open_model`.

    Raises:
        FinetuneError: it is a reward model, or the base or the template is not the one that it was trained with.
    """
    if result.is_reward_model:
        raise FinetuneError(
            f"{result.folder}: is a reward model, which scores texts and cannot generate answers; "
            "`finetune evaluate` measures it on pairs"
        )
    return load_trained(result, streams=streams)


def load_trained(result: Result, *, streams: bool = False) -> LoadedModel:
    """Load a result as it was trained; a reward model gets its head for scores.

    Raises:
        FinetuneError: the base or the template is not the one that it was trained with.
    """
    check_result_files(result)
    lineage = result.lineage
    base = find_base(result) if result.is_adapter else result.folder
    tokenizer = load_tokenizer(find_tokenizer_folder(result, base), needs_padding=lineage is not None)
    check_template(result, find_template("auto", tokenizer))
    check_trained_tokens(result, base, tokenizer)
    head: Head = "language" if result.method is None else result.method.head
    dtype = "auto" if lineage is None else lineage.dtype
    adapter = result.folder if result.is_adapter else None
    return _complete(_load(base, recall_model(result, base), dtype, head, adapter, streams=streams), tokenizer)


def _load(
    base: Path, section: ModelSection, dtype: str, head: Head, adapter: Path | None, *, streams: bool
) -> PreTrainedModel | PeftModel:
    device = choose_device()
    precision = choose_precision(dtype, device, False)
    can_stream = device.type == "cpu" and precision.weights == torch.float32 and section.quantize == "none"
    if streams and can_stream and head == "language":
        tensors = open_tensors(base) if section.architecture == "native" else open_llama_tensors(base)
        model = load_base(base, section, precision, torch.device("meta"))
        streamed: PreTrainedModel | PeftModel = stream_model(model, read_stored(tensors), device, adapter)
        return streamed
    model = load_base(base, section, precision, device, head)
    return model if adapter is None else apply_adapter(model, adapter)


def _complete(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    template = find_template("auto", tokenizer)
    for note in template.notes:
        logger.warning("%s", note)
    return LoadedModel(model.eval(), tokenizer, template, tuple(list_stop_tokens(tokenizer, template)))


def fingerprint_model(name: str) -> str:
    """Return a hash of the weights of a run or a model.

    Raises:
        FinetuneError: there is no such model.
    """
    path = expand_home(name)
    if not (path.is_dir() and is_result(path)):
        return fingerprint_checkpoint(find_checkpoint(name))
    result = open_result(path)
    digest = hashlib.sha256((result.lineage.base_fingerprint if result.lineage else "").encode())
    for file in list_checked_files(result.folder):
        digest.update(f"{file.name}:{hash_file(file)}\n".encode())
    return digest.hexdigest()
