"""Reopen what lies beside the weights of an export: the tokens that were trained, one template, and one set of stop tokens."""

from pathlib import Path

from transformers import GenerationConfig

from finetune.data.encoding.rendering import ChatTemplate, encode_prompt
from finetune.data.encoding.template import find_template, list_stop_tokens
from finetune.data.encoding.text_samples import compare_samples
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.errors import ExportError
from finetune.exporting.merged import Subject
from finetune.files.json_files import read_json
from finetune.runs.trained_tokens import make_bundled_samples
from finetune.yulan.tokenizer_files import holds_other_template

_PROMPT = ({"role": "user", "content": "a"},)


def compare_tokens(folder: Path, subject: Subject) -> int:
    """Reopen tokenizer and template as anybody would and encode the rows anew that the run stored with their texts.

    A result without any is compared with the tokenizer that it was opened with, on bundled rows.

    Returns:
        The number of trained rows that were compared.

    Raises:
        ExportError: they become other tokens than were trained.
    """
    tokenizer = load_tokenizer(folder)
    template = find_template("auto", tokenizer)
    texts = subject.result.texts
    samples = texts or make_bundled_samples(load_tokenizer(subject.tokenizer_folder), subject.template)
    if fault := compare_samples(tokenizer, template, samples):
        raise ExportError(
            f"export: the reopened tokenizer does not give the tokens that were trained: {fault}; nothing was left in the output"
        )
    return len(texts)


def check_generation(folder: Path, template: ChatTemplate) -> None:
    """Reopen tokenizer and generation settings as a server does: the same prompt, and an end at every stop token.

    Raises:
        ExportError: an answer would not end where it was trained to, or be asked for in another form.
    """
    tokenizer = load_tokenizer(folder)
    written = GenerationConfig.from_pretrained(folder, local_files_only=True)
    stops = {written.eos_token_id} if isinstance(written.eos_token_id, int) else set(written.eos_token_id or ())
    faults = []
    if missing := sorted(set(list_stop_tokens(tokenizer, template)) - stops):
        faults.append(
            f"generation_config.json stops at {sorted(stops)} and lacks {missing}, which end a trained answer"
        )
    if (named := read_json(folder / "config.json").get("eos_token_id")) != sorted(stops):
        faults.append(f"config.json stops at {named}, generation_config.json at {sorted(stops)}")
    if written.pad_token_id in stops:
        faults.append(f"generation_config.json pads with the stop token {written.pad_token_id}")
    if holds_other_template(folder):
        faults.append("another chat template stands beside that of chat_template.jinja")
    asked = tokenizer.apply_chat_template(_PROMPT, add_generation_prompt=True, tokenize=True, return_dict=True)
    if asked["input_ids"] != encode_prompt(tokenizer, template, _PROMPT):
        faults.append("the written chat template does not render a prompt as it was trained")
    if faults:
        raise ExportError(f"export: {'; '.join(faults)}; nothing was left in the output")
