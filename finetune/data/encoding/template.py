"""Find and check chat templates, and list their stop tokens.

Training, evaluation, chat and export use the same template, so that a model is asked in the form it was trained in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from finetune.data.encoding.rendering import (
    ChatTemplate,
    Messages,
    encode_conversations,
    render_conversations,
    render_prompt,
)
from finetune.data.formats.messages import THOUGHTS
from finetune.errors import TemplateError
from finetune.files.json_files import read_regular_text
from finetune.files.resources import list_templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = "yulan-mini"
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHOWN, _LONGEST_SHOWN = 20, 80
_SAMPLE: Messages = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
)


def find_template(choice: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return the template that a recipe names: `auto`, a shipped name, or a jinja file.

    `auto` takes the tokenizer's own template where its trained spans can be found, else `yulan-mini`.

    Raises:
        TemplateError: the template cannot be rendered, does not mark what is trained, or trains no stop token.
    """
    shipped = list_templates()
    if choice == "auto":
        return _find_own_template(tokenizer) or _check_template(
            _read_template(DEFAULT_TEMPLATE, shipped[DEFAULT_TEMPLATE]), tokenizer
        )
    path = shipped.get(choice, Path(choice))
    template = _read_template(choice if choice in shipped else str(path), path)
    if not _GENERATION_MARK.search(template.source):
        raise TemplateError(
            f"{path}: does not mark what is trained; put {{% generation %}} before the assistant's text and "
            "{% endgeneration %} after the token that ends its turn"
        )
    return _check_template(template, tokenizer)


def _read_template(name: str, path: Path) -> ChatTemplate:
    try:
        return ChatTemplate(name, read_regular_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{path}: the chat template cannot be read ({error})") from error


def _find_own_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    source = _read_own_source(tokenizer)
    if source is None:
        return None
    template = _name_own_template(source)
    try:
        return _check_template(template, tokenizer)
    except TemplateError as error:
        if template.name in list_templates():
            raise
        note = f"the tokenizer's own chat template cannot be trained with ({error}); using {DEFAULT_TEMPLATE} instead"
        fallback = list_templates()[DEFAULT_TEMPLATE].read_text(encoding="utf-8")
        return _check_template(ChatTemplate(DEFAULT_TEMPLATE, fallback, notes=(note,)), tokenizer)


def _read_own_source(tokenizer: PreTrainedTokenizerBase) -> str | None:
    source = tokenizer.chat_template
    if isinstance(source, dict):  # where there are several, this one is for chats
        source = source.get("default")
    return source if isinstance(source, str) and source.strip() else None


def _name_own_template(source: str) -> ChatTemplate:
    for name, path in list_templates().items():
        if path.read_text(encoding="utf-8") == source:
            return ChatTemplate(name, source)
    has_marks = _GENERATION_MARK.search(source) is not None
    return ChatTemplate("the tokenizer's own", source, "marks" if has_marks else "prefixes")


@dataclass(frozen=True)
class KeptTemplate:
    """A chat template to the letter, and as one that this kit can encode with, where it is one.

    `added` says that the tokenizer has none, and that `yulan-mini` fits it.
    """

    source: str | None
    template: ChatTemplate | None
    added: bool = False


def keep_template(tokenizer: PreTrainedTokenizerBase) -> KeptTemplate:
    """Return a tokenizer's own chat template, whether or not it can be trained with.

    Raises:
        TemplateError: it is no valid Jinja.
    """
    source = _read_own_source(tokenizer)
    if source is None:
        try:
            template = find_template(DEFAULT_TEMPLATE, tokenizer)
        except TemplateError:
            return KeptTemplate(None, None)
        return KeptTemplate(template.source, template, added=True)
    try:
        return KeptTemplate(source, _check_template(_name_own_template(source), tokenizer))
    except TemplateError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):  # no program can read it
            raise
        return KeptTemplate(source, None)


def _check_template(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Render a small conversation, check its tokens, and return the template.

    Raises:
        TemplateError: see `find_template`.
    """
    encoded = encode_conversations(tokenizer, template, [_SAMPLE])[0]
    trained = [token for token, is_trained in zip(encoded.token_ids, encoded.trained, strict=True) if is_trained]
    if not trained:
        raise TemplateError(f"{template.name}: marks nothing of an assistant's turn as trained")
    if trained[-1] not in _list_control_tokens(tokenizer):
        ending = tokenizer.convert_ids_to_tokens(trained[-1])
        raise TemplateError(
            f"{template.name}: a trained answer ends in {ending!r}, which is no token that can stop generation; "
            "put the token that ends a turn inside the generation marks"
        )
    bos = tokenizer.bos_token_id  # there are tokenizers without one
    if bos is not None and (encoded.token_ids.count(bos) != 1 or encoded.token_ids[0] != bos):
        raise TemplateError(
            f"{template.name}: must render {tokenizer.bos_token} once, at the start ({{{{ bos_token }}}})"
        )
    for end in (position for position, turn in enumerate(_SAMPLE) if turn["role"] == "assistant"):
        _check_prompt(template, tokenizer, end)
    return template


def _check_prompt(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, end: int) -> None:
    """Check that the prompt as it is asked, with the trained text of the answer after it, is the text that is trained on.

    `end` is the position of the answer in the sample.

    Raises:
        TemplateError: there is no generation prompt, or it is another text than in training, or is trained itself.
    """
    rendered = render_conversations(tokenizer, template, [_SAMPLE[: end + 1]])
    (text,), start = rendered.texts, rendered.spans[0][-1][0]
    prompt = render_prompt(tokenizer, template, _SAMPLE[:end])
    bare = render_prompt(tokenizer, template, _SAMPLE[:end], add_generation_prompt=False)
    if prompt == bare and text[len(bare) :].lstrip().startswith(_list_spellings(tokenizer)):
        raise TemplateError(
            f"{template.name}: has no generation prompt; with add_generation_prompt it must end with the header of the answer, "
            f"{_show(text[len(bare) : text.index(_SAMPLE[end]['content'], len(bare))])}"
        )
    if not text.startswith(prompt):
        same = next(number for number, sign in enumerate(prompt) if text[number : number + 1] != sign)
        raise TemplateError(
            f"{template.name}: is asked in another text than it is trained in: the generation prompt ends in "
            f"{_show(prompt[same - _SHOWN : same + _SHOWN])}, where the training text reads {_show(text[same - _SHOWN : same + _SHOWN])}"
        )
    if start < len(prompt):
        raise TemplateError(
            f"{template.name}: trains the header of the answer, {_show(text[start : len(prompt)])}, which the generation prompt "
            "already gives; put {% generation %} after it"
        )
    if start > len(prompt):
        raise TemplateError(
            f"{template.name}: between the generation prompt and the trained text stands {_show(text[len(prompt) : start])}, which "
            "the model would have to write and never learns; put it into the generation prompt, or train it"
        )


def _list_spellings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return tuple(str(text) for text in tokenizer.added_tokens_decoder.values() if text.special)


def _show(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")


def list_rendered_thoughts(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> dict[str, bool]:
    """Return the keys of thoughts that a template renders, each with whether it does so in every answer or in the last only."""
    found: dict[str, bool] = {}
    # transformers gives a thought the names that templates know, so a key may be rendered that the source does not name.
    if not any(key in template.source for key in THOUGHTS):
        return found
    for key in THOUGHTS:
        sample = [{**turn, key: f"thought {number}"} for number, turn in enumerate(_SAMPLE)]
        (text,) = render_conversations(tokenizer, template, [sample]).texts
        rendered = [turn[key] in text for turn in sample if turn["role"] == "assistant"]
        if rendered[-1]:
            found[key] = all(rendered)
    return found


def _list_control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(token for token, text in added.items() if text.special)}


def list_stop_tokens(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> list[int]:
    """Return the ids of the tokens that end an answer: the tokenizer's eos, and the last token that the template trains."""
    encoded = encode_conversations(tokenizer, template, [_SAMPLE])[0]
    last = max(position for position, is_trained in enumerate(encoded.trained) if is_trained)
    eos = tokenizer.eos_token_id
    return sorted({encoded.token_ids[last]} | (set() if eos is None else {int(eos)}))


def list_template_tokens(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> list[int]:
    """Return the ids of the template's control tokens except bos. A base model may never have seen them."""
    encoded = encode_conversations(tokenizer, template, [_SAMPLE])[0]
    return sorted(set(encoded.token_ids) & _list_control_tokens(tokenizer) - {tokenizer.bos_token_id})
