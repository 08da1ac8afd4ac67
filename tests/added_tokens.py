"""Add tokens to the `tokenizer.json` of a folder, for tokenizers with as many tokens as a table has rows, or more."""

import json


def add_token(folder, text):
    """Give a control token the id after the last one."""
    path, content = _read(folder)
    like = content["added_tokens"][-1]
    content["added_tokens"].append({**like, "id": len(content["model"]["vocab"]), "content": text})
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def fill_table(folder, rows):
    """Give every row of a table a token; they are words, since transformers takes control tokens from `tokenizer_config.json` too."""
    path, content = _read(folder)
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"filler-{token}": token for token in range(len(vocabulary), rows)}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _read(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    assert {*vocabulary.values(), *(token["id"] for token in content["added_tokens"])} == set(range(len(vocabulary)))
    return path, content
