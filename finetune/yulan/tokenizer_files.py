"""Copy a checkpoint's tokenizer files to the letter: the library's own saving drops keys that change the tokens.

`save_pretrained` of transformers 5 leaves out `legacy: true`, so that the tokenizer that is read again puts no space before the
text behind a control token, and gives other ids than those that were trained.

Only what keeps other versions from reading the same is changed. transformers 5 also saves the name of a class and a list that
transformers 4 does not know, and before 4.50 the chat template was read from `tokenizer_config.json` alone.
"""

import json
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from finetune.errors import CheckpointError
from finetune.files.json_files import read_json

TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_NEW_CLASS, _OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
_LEGACY_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_TEMPLATE_KEY = "chat_template"
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
    """Copy a checkpoint's tokenizer files, as `make_tokenizer_files` makes them.

    Raises:
        CheckpointError: `tokenizer_config.json` is damaged.
    """
    for name, content in make_tokenizer_files(source, template).items():
        (folder / name).write_bytes(content)


def make_tokenizer_files(source: Path, template: str | None = None) -> dict[str, bytes]:
    """Return a checkpoint's tokenizer files by name, without the references to code that some carry.

    With a `template`, it is the only one that they hold, in both places where programs look for it: whatever templates the
    checkpoint has are left out.

    Raises:
        CheckpointError: `tokenizer_config.json` is damaged.
    """
    files = read_tokenizer_files(source, keeps_template=template is None)
    if template is not None:
        files[TEMPLATE_FILE] = template.encode()
        if _CONFIG_FILE in files:
            files[_CONFIG_FILE] = add_keys(files[_CONFIG_FILE].decode(), {_TEMPLATE_KEY: template}).encode()
    return files


def read_tokenizer_files(folder: Path, *, keeps_template: bool = False) -> dict[str, bytes]:
    """Return the content of a folder's tokenizer files by name, as they are copied.

    Raises:
        CheckpointError: `tokenizer_config.json` is damaged.
    """
    names = (*_TOKENIZER_FILES, TEMPLATE_FILE) if keeps_template else _TOKENIZER_FILES
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if _CONFIG_FILE in files:
        unwanted = {"auto_map"} if keeps_template else {"auto_map", _TEMPLATE_KEY}
        try:
            text = remove_keys(files[_CONFIG_FILE].decode(), unwanted)
        except ValueError as error:
            raise CheckpointError(f"{folder / _CONFIG_FILE}: is not valid JSON ({error}); download it again") from error
        files[_CONFIG_FILE] = _use_names_of_all_versions(text).encode()
    return files


def describe_lost_legacy(folder: Path) -> str | None:
    """Return what a person must know of a tokenizer that has lost `legacy: true`, or None where it has not.

    transformers 5 leaves the key out when it saves a `LlamaTokenizer` anew. Its `tokenizer.json` still puts a space before every
    text, as Metaspace with the scheme `always` or as a normalizer that prepends, but the class does not ask it.
    """
    config = read_json(folder / _CONFIG_FILE) or {}
    if config.get("tokenizer_class") not in _LEGACY_CLASSES or "legacy" in config:
        return None
    content = json.dumps(read_json(folder / "tokenizer.json") or {}, ensure_ascii=False)
    if '"prepend_scheme": "always"' not in content and '"type": "Prepend"' not in content:
        return None
    return (
        f"{_CONFIG_FILE} has no key `legacy`: transformers 5 loses it when it saves a tokenizer. transformers 5 now puts no space "
        "before the text behind a control token, so that the headers of turns become other tokens than in transformers 4 and in "
        "programs that read tokenizer.json. Copy the published tokenizer_config.json into the base before you train; a model that "
        "is trained without it opens in transformers 5 only"
    )


def holds_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _use_names_of_all_versions(text: str) -> str:
    """Replace what transformers 5 writes and transformers 4 cannot read: the name of a class, and a list of tokens.

    The class that all versions know returns token types in transformers 4, which a Llama model refuses to generate with.
    """
    content, renamed = json.loads(text), dict[str, Any]()
    if content.get("tokenizer_class") == _NEW_CLASS:
        renamed["tokenizer_class"] = _OLD_CLASS
    if content.get("tokenizer_class") in (_NEW_CLASS, _OLD_CLASS) and "model_input_names" not in content:
        renamed["model_input_names"] = ["input_ids", "attention_mask"]
    removed = renamed.keys() & content.keys()
    if isinstance(tokens := content.get("extra_special_tokens"), list):
        removed.add("extra_special_tokens")
        if tokens:
            renamed["additional_special_tokens"] = tokens
    return add_keys(remove_keys(text, removed), renamed)


def holds_other_template(folder: Path) -> bool:
    """Tell whether a folder holds another chat template than that of its `chat_template.jinja`."""
    content = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
    path = folder / TEMPLATE_FILE
    template = path.read_bytes().decode() if path.is_file() else None
    return content.get(_TEMPLATE_KEY, template) != template or any((folder / "additional_chat_templates").glob("*"))


def add_keys(text: str, added: Mapping[str, Any]) -> str:
    """Return the text of a JSON object with more keys at its end, which it must not have; every other character stays."""
    head = text.rstrip().removesuffix("}").rstrip()
    for key, value in added.items():
        separator = "" if head.endswith("{") else ","
        head = f"{head}{separator}\n  {json.dumps(key)}: {json.dumps(value)}"
    return head + text[len(text.rstrip().removesuffix("}").rstrip()) :]


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
