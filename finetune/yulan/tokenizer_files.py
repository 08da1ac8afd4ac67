"""Copy a checkpoint's tokenizer files to the letter: the library's own saving drops keys that change the tokens.

`save_pretrained` of transformers 5 leaves out `legacy: true`, so that the tokenizer that is read again puts no space before the
text behind a control token, and gives other ids than those that were trained.
"""

import json
import re
from collections.abc import Set as AbstractSet
from pathlib import Path

from finetune.errors import CheckpointError

TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    _CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_BLANK = re.compile(r"\s*")


def copy_tokenizer(source: Path, folder: Path, template: str | None = None) -> None:
    """Copy a checkpoint's tokenizer files, without the references to code that some carry.

    With a `template`, it is the only one that is written: whatever templates the checkpoint has are left out.

    Raises:
        CheckpointError: `tokenizer_config.json` is damaged.
    """
    for name, content in read_tokenizer_files(source, keeps_template=template is None).items():
        (folder / name).write_bytes(content)
    if template is not None:
        (folder / TEMPLATE_FILE).write_bytes(template.encode())


def read_tokenizer_files(folder: Path, *, keeps_template: bool = False) -> dict[str, bytes]:
    """Return the content of a folder's tokenizer files by name, as `copy_tokenizer` writes them.

    Raises:
        CheckpointError: `tokenizer_config.json` is damaged.
    """
    names = (*_TOKENIZER_FILES, TEMPLATE_FILE) if keeps_template else _TOKENIZER_FILES
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if _CONFIG_FILE in files:
        unwanted = {"auto_map"} if keeps_template else {"auto_map", "chat_template"}
        try:
            files[_CONFIG_FILE] = remove_keys(files[_CONFIG_FILE].decode(), unwanted).encode()
        except ValueError as error:
            raise CheckpointError(f"{folder / _CONFIG_FILE}: is not valid JSON ({error}); download it again") from error
    return files


def holds_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def has_template(folder: Path) -> bool:
    """Tell whether a folder holds a chat template in any other place than `chat_template.jinja`."""
    content = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
    return "chat_template" in content or any((folder / "additional_chat_templates").glob("*"))


def remove_keys(text: str, unwanted: AbstractSet[str]) -> str:
    """Return the text of a JSON object without some of its own keys; every other character stays.

    Raises:
        ValueError: it is not the text of a JSON object.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    if not unwanted & content.keys():
        return text
    decoder = json.JSONDecoder()
    start = text.index("{") + 1
    head, kept = text[:start], []
    while True:
        key, end = decoder.raw_decode(text, _skip_blank(text, start))
        _, end = decoder.raw_decode(text, _skip_blank(text, _skip_blank(text, end) + 1))
        if key not in unwanted:
            kept.append(text[start:end])
        after = _skip_blank(text, end)
        if text[after] != ",":
            return f"{head}{','.join(kept)}{text[end:]}"
        start = after + 1


def _skip_blank(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    return position if found is None else found.end()
