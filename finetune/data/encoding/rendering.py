"""Render conversations with a chat template, find their trained spans, and turn them into tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

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
from finetune.files.terminal import limit_seconds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What a template of somebody else can end in, besides its own errors: a division by zero, endless recursion or loops.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TimeoutError,
    TypeError,
    ValueError,
)
_MOST_SECONDS = 8.0

Messages = Sequence[Mapping[str, Any]]
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template. Its trained spans are found by its generation marks, or by rendering prefixes of a conversation."""

    name: str
    source: str
    spans: Literal["marks", "prefixes"] = "marks"
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of the source: templates with the same fingerprint render the same."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens. `trained` says for each token whether it is trained; both have shape `(tokens,)`."""

    token_ids: list[int]
    trained: list[bool]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    conversations: Sequence[Messages],
    tools: Sequence[Tools] = (),
) -> list[Encoded]:
    """Render and tokenize conversations. A token is trained where any of its characters is.

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
    """Conversations as texts, with their trained spans in characters.

    `hidden` maps the lone surrogates in each text to the spellings of control tokens that they stand for. It is empty for
    most rows.
    """

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
    """Tokenize rendered conversations: those with hidden spellings one by one, all others in one call."""
    plain = [text for text, marks in zip(rendered.texts, rendered.hidden, strict=True) if not marks]
    encodings = iter(encode_texts(tokenizer, plain) if plain else [])
    rows = zip(rendered.texts, rendered.spans, rendered.hidden, strict=True)
    return [encode_hidden(tokenizer, *row) if row[2] else next(encodings) for row in rows]


def read_tokens(rendered: Rendered, tokenized: Sequence[Any]) -> list[TokenSpans]:
    """Return tokens with their trained spans, from the result of `tokenize_rendered`. It does not use the tokenizer."""
    rows = zip(tokenized, rendered.texts, rendered.spans, strict=True)
    return [found if isinstance(found, TokenSpans) else find_spans(found, text, spans) for found, text, spans in rows]


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> list[TokenSpans]:
    """Tokenize rendered conversations and find their trained spans."""
    return read_tokens(rendered, tokenize_rendered(tokenizer, rendered))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, messages: Messages) -> list[int]:
    """Return the token ids of a prompt, up to where the assistant's answer begins."""
    hidden: dict[str, str] = {}
    safe = hide_spellings(messages, compile_spellings(list_control_spellings(tokenizer)), hidden)
    text = _render_one(tokenizer, template, safe, add_generation_prompt=True)
    return encode_rendered(tokenizer, Rendered([text], [[]], [hidden]))[0].token_ids


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Return the text of a prompt, up to where the assistant's answer begins."""
    return _render_one(tokenizer, template, messages, add_generation_prompt=add_generation_prompt)


def _render(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, conversations: Sequence[Messages], tools: Tools
) -> tuple[list[str], list[list[Span]]]:
    if template.spans == "marks":
        try:
            with limit_seconds(_MOST_SECONDS):
                texts, spans = render_jinja_template(
                    conversations=[list(messages) for messages in conversations],
                    tools=tools,
                    chat_template=template.source,
                    return_assistant_tokens_mask=True,
                    **tokenizer.special_tokens_map,
                )
        except _FAILURES as error:
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
        with limit_seconds(_MOST_SECONDS):
            texts, _ = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=template.source,
                add_generation_prompt=add_generation_prompt,
                **tokenizer.special_tokens_map,
            )
    except _FAILURES as error:
        raise _explain(template, error) from error
    return str(texts[0])


def _explain(template: ChatTemplate, error: Exception) -> TemplateError:
    line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return TemplateError(f"{template.name}{line}: the chat template cannot be rendered: {error}")


def _find_spans(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, messages: Messages, text: str, tools: Tools
) -> list[Span]:
    """Find the answers in a rendering, in characters. Each begins where the prompt before it ends.

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
        # White space after the stop token belongs to the next turn.
        spans.append((len(before), len(after.rstrip())))
    return spans
