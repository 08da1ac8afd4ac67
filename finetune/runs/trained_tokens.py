"""Open the tokenizer of a result, and make sure that it gives the tokens that were trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.encoding.template import find_template, keep_template
from finetune.data.encoding.text_samples import compare_samples, encode_header, encode_sample
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.formats.row_formats import FORMATS, read_row
from finetune.data.formats.rows import TextSample
from finetune.data.reading.arrow_rows import require_row
from finetune.data.reading.raw_files import read_file
from finetune.errors import CheckpointError, TemplateError
from finetune.files.resources import find_demo_data
from finetune.runs.lineage import find_tokenizer_folder
from finetune.runs.results import Result
from finetune.yulan.tokenizer_files import read_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.data.encoding.rendering import ChatTemplate

_BUNDLED_ROWS = 16


def open_tokenizer(result: Result | None, base: Path, *, needs_padding: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a result, or of the base where there is no result, and encode the stored rows anew.

    Raises:
        CheckpointError: it cannot be read, or gives other tokens than were trained.
    """
    tokenizer = load_tokenizer(find_tokenizer_folder(result, base), needs_padding=needs_padding)
    if result is not None:
        check_trained_tokens(result, base, tokenizer)
    return tokenizer


def has_files_of_base(result: Result, base: Path) -> bool:
    """Tell whether the tokenizer files of a result are those of its base to the letter, or the base has none."""
    origin = _find_origin(result, base)
    return origin is None or read_tokenizer_files(find_tokenizer_folder(result, base)) == read_tokenizer_files(origin)


def check_trained_tokens(result: Result, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare a result's tokenizer with what was trained: with rows that are stored as texts, as far as there are any.

    An older run stored only tokens, and a folder that PEFT wrote elsewhere none. There the base's own tokenizer is the measure,
    and it is a fault where the base's files begin the stored rows as they were trained and the result's own do not. It is
    refused, and not mended in passing: other programs read the same folder, and would go on with the wrong tokens.

    Raises:
        CheckpointError: it gives other tokens.
    """
    folder = find_tokenizer_folder(result, base)
    origin = _find_origin(result, base)
    fault: object
    if result.texts:
        template = find_template("auto", tokenizer)
        if fault := compare_samples(tokenizer, template, result.texts):
            raise CheckpointError(
                f"{folder}: its tokenizer files do not give the tokens that were trained: {fault}; "
                + _advise(result, origin, template)
            )
        return
    if origin is None or has_files_of_base(result, base):
        return
    theirs = load_tokenizer(origin, needs_padding=False)
    if result.rows:
        _check_beginnings(result, origin, (tokenizer, theirs), find_template("auto", tokenizer))
    elif fault := _compare_with_base(tokenizer, theirs):
        raise CheckpointError(
            f"{folder}: its tokenizer files give other tokens than those of its base, and the folder does not say with which "
            f"the adapter was trained: {fault} (here the tokens of the base stand for the trained ones). With the base's, "
            f"as is usual: {_list_copies(origin, folder)}; else put the files of this folder beside the base's weights"
        )


def _check_beginnings(
    result: Result,
    origin: Path,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    template: ChatTemplate,
) -> None:
    """Count the stored rows that begin as each of the two tokenizers, the result's own and the base's, would begin them."""
    own, theirs = (_count_beginnings(tokenizer, template, result) for tokenizer in tokenizers)
    if own < theirs:
        raise CheckpointError(
            f"{result.folder}: its tokenizer files do not give the tokens that were trained: {theirs} of {len(result.rows)} "
            f"stored rows begin as the files of the base would begin them, and {own} as these do; "
            f"{_list_copies(origin, result.folder)}"
        )


def _count_beginnings(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, result: Result) -> int:
    headers = []
    for role in ("system", "user"):
        try:
            headers.append(encode_header(tokenizer, template, role))
        except TemplateError:  # there are templates without a system turn
            continue
    return sum(any(row.input_ids[: len(header)] == header for header in headers) for row in result.rows)


def _advise(result: Result, origin: Path | None, template: ChatTemplate) -> str:
    if origin is not None and compare_samples(load_tokenizer(origin), template, result.texts) is None:
        return f"the files of its base do: {_list_copies(origin, result.folder)}"
    return "restore the files that it was trained with, or the version of transformers (run.json names it)"


def _list_copies(origin: Path, folder: Path) -> str:
    own, theirs = read_tokenizer_files(folder), read_tokenizer_files(origin)
    names = [name for name, content in theirs.items() if own.get(name) != content]
    return f"cp {' '.join(str(origin / name) for name in names)} {folder}"


def _find_origin(result: Result, base: Path) -> Path | None:
    """Return the folder whose tokenizer a result was trained with, or None where it has none or is gone."""
    folder = base
    if not result.is_adapter:
        folder = Path(result.lineage.base) if result.lineage is not None else result.folder
    return folder if (folder / "tokenizer_config.json").is_file() else None


def _compare_with_base(tokenizer: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> object:
    """Compare the tokens of bundled rows, or of bundled texts where the template is not one that rows can be encoded with."""
    template = keep_template(tokenizer).template
    if template is not None:
        return compare_samples(tokenizer, template, make_bundled_samples(theirs, template))
    same = encode_bundled_texts(tokenizer) == encode_bundled_texts(theirs)
    return None if same else "bundled texts become other tokens"


def encode_bundled_texts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of the texts of bundled conversations, without any template."""
    raw = list(read_file(find_demo_data("demo_eval.jsonl")))[:_BUNDLED_ROWS]
    rows = [read_row(FORMATS["messages"], {}, require_row(row), place) for place, row in raw]
    return [list(tokenizer(message["content"])["input_ids"]) for row in rows for message in row.messages]


def make_bundled_samples(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> list[TextSample]:
    """Return bundled conversations with the tokens that a tokenizer gives, for a result that came without any rows."""
    raw = list(read_file(find_demo_data("demo_eval.jsonl")))[:_BUNDLED_ROWS]
    samples = []
    for place, row in raw:
        messages = read_row(FORMATS["messages"], {}, require_row(row), place).messages
        bare = TextSample("conversation", "sequence", {"messages": messages}, [])
        samples.append(TextSample(bare.kind, bare.shape, bare.row, encode_sample(tokenizer, template, bare)))
    return samples
