"""Reopen what lies beside the weights of an export: the tokens that were trained, one template, and one set of stop tokens."""

from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig

from finetune.data.encoding.rendering import encode_prompt
from finetune.data.encoding.template import find_template
from finetune.data.encoding.text_samples import compare_samples
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.errors import ExportError
from finetune.exporting.chat_form import ChatForm
from finetune.exporting.merged import Subject
from finetune.files.json_files import read_json
from finetune.runs.trained_tokens import encode_bundled_texts, make_bundled_samples
from finetune.yulan.tokenizer_files import holds_other_template

_PROMPT = ({"role": "user", "content": "a"},)


def compare_tokens(folder: Path, subject: Subject) -> int:
    """Reopen tokenizer and template as anybody would and encode the rows anew that the run stored with their texts.

    A result without any is compared with the tokenizer that it was opened with, on bundled rows, or on bundled texts where its
    template cannot be encoded with.

    Returns:
        The number of trained rows that were compared.

    Raises:
        ExportError: they become other tokens than were trained.
    """
    form, texts = subject.form, subject.result.texts
    if form.tokenizer_folder is None:
        return 0
    tokenizer, opened = (load_tokenizer(path, needs_padding=False) for path in (folder, form.tokenizer_folder))
    fault: object = None
    if form.template is None:
        if encode_bundled_texts(tokenizer) != encode_bundled_texts(opened):
            fault = "bundled texts become other tokens"
    else:
        template = form.template if subject.result.lineage is None else find_template("auto", tokenizer)
        fault = compare_samples(tokenizer, template, texts or make_bundled_samples(opened, form.template))
    if fault:
        raise ExportError(
            f"export: the reopened tokenizer does not give the tokens that were trained: {fault}; nothing was left in the output"
        )
    return len(texts)


def check_generation(folder: Path, subject: Subject) -> None:
    """Reopen tokenizer and generation settings as a server does: the same prompt, and an end at every stop token.

    Raises:
        ExportError: an answer would not end where it was trained to, or be asked for in another form.
    """
    form = subject.form
    written = GenerationConfig.from_pretrained(folder, local_files_only=True)
    stops = {written.eos_token_id} if isinstance(written.eos_token_id, int) else set(written.eos_token_id or ())
    faults = []
    if missing := sorted(set(form.list_stops(subject.base)) - stops):
        faults.append(
            f"generation_config.json stops at {sorted(stops)} and lacks {missing}, which end a trained answer"
        )
    if ((named := (read_json(folder / "config.json") or {}).get("eos_token_id")) or []) != sorted(stops):
        faults.append(f"config.json stops at {named}, generation_config.json at {sorted(stops)}")
    if written.pad_token_id in stops and not _pads_with_stop(subject, stops):
        faults.append(f"generation_config.json pads with the stop token {written.pad_token_id}")
    if form.tokenizer_folder is not None:
        faults += _list_template_faults(folder, form)
    if faults:
        raise ExportError(f"export: {'; '.join(faults)}; nothing was left in the output")


def _pads_with_stop(subject: Subject, stops: set[int]) -> bool:
    """Tell whether the base of an adapter that was trained elsewhere pads with a stop token itself."""
    folder = subject.form.tokenizer_folder
    if subject.result.lineage is not None or folder is None:
        return False
    return load_tokenizer(folder, needs_padding=False).pad_token_id in stops


def _list_template_faults(folder: Path, form: ChatForm) -> Iterator[str]:
    tokenizer = load_tokenizer(folder, needs_padding=False)
    if holds_other_template(folder):
        yield "another chat template stands beside that of chat_template.jinja"
    if tokenizer.chat_template != form.source:
        yield "the written chat template is another one"
    elif form.template is not None:
        asked = tokenizer.apply_chat_template(_PROMPT, add_generation_prompt=True, tokenize=True, return_dict=True)
        if asked["input_ids"] != encode_prompt(tokenizer, form.template, _PROMPT):
            yield "the written chat template does not render a prompt as it was trained"
