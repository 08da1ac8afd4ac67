"""Find how an export is asked and where its answers end: in the form that a run trained, or as a folder of another tool brings it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.encoding.template import find_template, keep_template, list_stop_tokens
from finetune.data.encoding.tokenizer import load_tokenizer_file
from finetune.files.json_files import read_json
from finetune.runs.lineage import check_template, find_tokenizer_folder
from finetune.runs.results import Result
from finetune.yulan.tokenizer_files import TEMPLATE_FILE, holds_tokenizer


@dataclass(frozen=True)
class ChatForm:
    """The chat template that is written, `source`, to the letter; `template` is None where this kit cannot encode with it.

    `tokenizer_folder` is None, and nothing is written, where the base has no tokenizer. `added` says that the template is this kit's
    own, because neither adapter nor base has one.
    """

    tokenizer_folder: Path | None
    template: ChatTemplate | None
    source: str | None
    added: bool = False

    @property
    def name(self) -> str:
        """The template's name for a person."""
        if self.template is not None:
            return f"{self.template.name}, which this export adds" if self.added else self.template.name
        return "none" if self.source is None else "the base's own"

    def list_stops(self, base: Path) -> list[int]:
        """Return the ids of all tokens that end an answer; `base` is the folder of the base."""
        stops = (
            set(_read_stops(base))
            if self.added or self.template is None or self.template.spans == "prefixes"
            else set()
        )
        if self.tokenizer_folder is None:
            return sorted(stops)
        tokenizer = load_tokenizer_file(self.tokenizer_folder, needs_padding=False)
        if self.template is not None:
            stops |= set(list_stop_tokens(tokenizer, self.template))
            # Turns of other roles end in it, also where a template's answers do not.
            stops |= {tokenizer.get_vocab().get("<|eot_id|>", -1)} - {-1}
        elif tokenizer.eos_token_id is not None:
            stops.add(int(tokenizer.eos_token_id))
        return sorted(stops)


def find_chat_form(result: Result, base: Path) -> ChatForm:
    """Return the form of a run, after a check that it is the trained one, or that of an adapter of another tool and its base.

    Raises:
        TemplateError: a run was trained with another template.
    """
    folder = find_tokenizer_folder(result, base)
    if result.lineage is not None:
        template = find_template("auto", load_tokenizer_file(folder))
        check_template(result, template)
        return ChatForm(folder, template, template.source)
    if not holds_tokenizer(folder):
        return ChatForm(None, None, None)
    tokenizer = load_tokenizer_file(folder, needs_padding=False)
    own = result.folder / TEMPLATE_FILE
    if own.is_file():  # beside an adapter without tokenizer files of its own
        tokenizer.chat_template = own.read_text(encoding="utf-8")
    elif not tokenizer.chat_template and folder != base and holds_tokenizer(base):
        tokenizer.chat_template = load_tokenizer_file(base, needs_padding=False).chat_template
    kept = keep_template(tokenizer)
    return ChatForm(folder, kept.template, kept.source, kept.added)


def _read_stops(base: Path) -> Iterator[int]:
    for name in ("generation_config.json", "config.json"):
        stops = (read_json(base / name) or {}).get("eos_token_id")
        yield from stops if isinstance(stops, list) else [] if stops is None else [stops]
