"""Add control tokens to the `tokenizer.json` of a folder, for tokenizers with as many tokens as a table has rows, or more."""

import json


def add_tokens(folder, *texts):
    """Give texts the ids after the last one."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    known = {*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])}
    assert known == set(range(len(known)))
    like = content["added_tokens"][-1]
    content["added_tokens"] += [{**like, "id": id_, "content": text} for id_, text in enumerate(texts, len(known))]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return len(known) + len(texts)


def fill_table(folder, rows):
    """Add tokens until every row of a table has one."""
    add_tokens(folder, *(f"<|filler_{number}|>" for number in range(rows - add_tokens(folder))))
