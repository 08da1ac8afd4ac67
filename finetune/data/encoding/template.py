"""Chat templates, and the one function that turns a conversation into tokens.

Training, evaluation, chat and export all go through here, so that a model is asked in the very form it was trained in.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from finetune.data.encoding.spellings import (
    Span,
    TokenSpans,
    compile_spellings,
    encode_hidden,
    encode_texts,
    find_spans,
    hide_spellings,
    holds_spelling,
    list_control_spellings,
)
from finetune.errors import TemplateError
from finetune.files.resources import list_templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = "yulan-mini"
Messages = Sequence[Mapping[str, Any]]
Tools = list[dict[str, Any]] | None
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SAMPLE: Messages = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
)


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and how its trained spans are found: by its generation marks, or by rendering prefixes."""

    name: str
    source: str
    spans: Literal["marks", "prefixes"] = "marks"
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of the source; two templates with the same one render the same."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens; `trained` says for each whether it is learnt."""

    token_ids: list[int]
    trained: list[bool]


def find_template(choice: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return the template of a recipe: `auto`, a shipped name, or a jinja file.

    `auto` takes the tokenizer's own template where what is trained can be told in it, else `yulan-mini`.

    Raises:
        TemplateError: the template cannot be rendered, or does not mark what is trained, or trains no stop token.
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
        return ChatTemplate(name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{path}: the chat template cannot be read ({error})") from error


def _find_own_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    source = tokenizer.chat_template
    if not isinstance(source, str) or not source.strip():
        return None
    for name, path in list_templates().items():
        if path.read_text(encoding="utf-8") == source:
            return _check_template(ChatTemplate(name, source), tokenizer)
    has_marks = _GENERATION_MARK.search(source) is not None
    template = ChatTemplate("the tokenizer's own", source, "marks" if has_marks else "prefixes")
    try:
        return _check_template(template, tokenizer)
    except TemplateError as error:
        note = f"the tokenizer's own chat template cannot be trained with ({error}); using {DEFAULT_TEMPLATE} instead"
        fallback = list_templates()[DEFAULT_TEMPLATE].read_text(encoding="utf-8")
        return _check_template(ChatTemplate(DEFAULT_TEMPLATE, fallback, notes=(note,)), tokenizer)


def _check_template(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Try the template on a small conversation and return it."""
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
    if encoded.token_ids.count(int(tokenizer.bos_token_id)) != 1 or encoded.token_ids[0] != tokenizer.bos_token_id:
        raise TemplateError(
            f"{template.name}: must render {tokenizer.bos_token} once, at the start ({{{{ bos_token }}}})"
        )
    return template


def _list_control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(token for token, text in added.items() if text.special)}


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    conversations: Sequence[Messages],
    tools: Sequence[Tools] = (),
) -> list[Encoded]:
    """Render and tokenize conversations together; a token is trained when any of its characters is.

    Raises:
        TemplateError: the template refuses a conversation.
    """
    rendered = render_conversations(tokenizer, template, conversations, tools)
    encoded = []
    for row in encode_rendered(tokenizer, rendered):
        trained = [False] * len(row.token_ids)
        for start, end in row.spans:
            trained[start:end] = [True] * (end - start)
        encoded.append(Encoded(row.token_ids, trained))
    return encoded


@dataclass(frozen=True)
class Rendered:
    """Conversations as texts; `hidden` says for each row what its half characters stand for (empty for nearly all)."""

    texts: list[str]
    spans: list[list[Span]]
    hidden: list[dict[str, str]]


def render_conversations(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    conversations: Sequence[Messages],
    tools: Sequence[Tools] = (),
) -> Rendered:
    """Render conversations with their trained spans, in characters.

    Raises:
        TemplateError: the template refuses a conversation.
    """
    pattern = compile_spellings(list_control_spellings(tokenizer))
    hidden: list[dict[str, str]] = [{} for _ in conversations]
    rows, row_tools = list(conversations), list(tools) or [None] * len(conversations)
    for number, messages in enumerate(rows):
        if holds_spelling(messages, row_tools[number], pattern):
            rows[number] = hide_spellings(messages, pattern, hidden[number])
            row_tools[number] = hide_spellings(row_tools[number], pattern, hidden[number])
    if not any(row_tools):
        return Rendered(*_render(tokenizer, template, rows, None), hidden)
    pairs = zip(rows, row_tools, strict=True)
    parts = [_render(tokenizer, template, [messages], own) for messages, own in pairs]
    return Rendered([texts[0] for texts, _ in parts], [spans[0] for _, spans in parts], hidden)


def tokenize_rendered(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> list[Any]:
    """Tokenize rendered conversations: all plain ones in one call, and those with spellings of control tokens apart."""
    plain = [text for text, marks in zip(rendered.texts, rendered.hidden, strict=True) if not marks]
    encodings = iter(encode_texts(tokenizer, plain) if plain else [])
    rows = zip(rendered.texts, rendered.spans, rendered.hidden, strict=True)
    return [encode_hidden(tokenizer, *row) if row[2] else next(encodings) for row in rows]


def read_tokens(rendered: Rendered, tokenized: Sequence[Any]) -> list[TokenSpans]:
    """Return tokens with their trained spans from what `tokenize_rendered` returned; it does not use the tokenizer."""
    rows = zip(tokenized, rendered.texts, rendered.spans, strict=True)
    return [found if isinstance(found, TokenSpans) else find_spans(found, text, spans) for found, text, spans in rows]


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> list[TokenSpans]:
    """Tokenize rendered conversations and find their trained spans."""
    return read_tokens(rendered, tokenize_rendered(tokenizer, rendered))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, messages: Messages, tools: Tools = None
) -> list[int]:
    """Return the tokens after which the assistant's answer is generated."""
    hidden: dict[str, str] = {}
    safe = hide_spellings([messages, tools], compile_spellings(list_control_spellings(tokenizer)), hidden)
    text = _render_one(tokenizer, template, safe[0], safe[1], add_generation_prompt=True)
    return encode_rendered(tokenizer, Rendered([text], [[]], [hidden]))[0].token_ids


def list_stop_tokens(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's eos, and the one that the template trains."""
    encoded = encode_conversations(tokenizer, template, [_SAMPLE])[0]
    last = max(position for position, is_trained in enumerate(encoded.trained) if is_trained)
    return sorted({int(tokenizer.eos_token_id), encoded.token_ids[last]})


def list_template_tokens(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> list[int]:
    """Return the control tokens that the template writes, without bos: those a base model may never have seen."""
    encoded = encode_conversations(tokenizer, template, [_SAMPLE])[0]
    return sorted(set(encoded.token_ids) & _list_control_tokens(tokenizer) - {int(tokenizer.bos_token_id)})


def _render(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, conversations: Sequence[Messages], tools: Tools
) -> tuple[list[str], list[list[Span]]]:
    if template.spans == "marks":
        try:
            texts, spans = _render_jinja(
                conversations=[list(messages) for messages in conversations],
                tools=tools,
                chat_template=template.source,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise _explain(template, error) from error
        return texts, [[(start, end) for start, end in found] for found in spans]
    texts = [_render_one(tokenizer, template, messages, tools) for messages in conversations]
    pairs = zip(conversations, texts, strict=True)
    return texts, [_find_spans(tokenizer, template, messages, text, tools) for messages, text in pairs]


def _render_one(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: Messages,
    tools: Tools = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    try:
        texts, _ = _render_jinja(
            conversations=[list(messages)],
            tools=tools,
            chat_template=template.source,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise _explain(template, error) from error
    return str(texts[0])


def _render_jinja(**options: Any) -> tuple[list[str], list[list[Span]]]:
    # Only here, as in `tokenizer.py`: an export loads transformers while its weights are on their way.
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(**options)
    return texts, spans


def _explain(template: ChatTemplate, error: Exception) -> TemplateError:
    line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return TemplateError(f"{template.name}{line}: the chat template cannot be rendered: {error}")


def _find_spans(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, messages: Messages, text: str, tools: Tools
) -> list[Span]:
    """Find each answer in a rendering: it begins where the prompt for it ends.

    Raises:
        TemplateError: a shorter conversation does not render to the beginning of a longer one.
    """
    spans = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render_one(tokenizer, template, messages[:position], tools, add_generation_prompt=True)
        after = _render_one(tokenizer, template, messages[: position + 1], tools)
        if not (after.startswith(before) and text.startswith(after)):
            raise TemplateError("it renders an earlier turn differently once another follows")
        # White space behind the stop token belongs to what follows.
        spans.append((len(before), len(after.rstrip())))
    return spans
