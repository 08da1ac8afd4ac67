"""The template `yulan-mini`, written down a second time without Jinja, to hold the first against it."""

import json

from token_texts import read_text

from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template
from finetune.data.settings import DataSettings, Source

END = "<|eot_id|>"


def say(role, text):
    """Return a message."""
    return {"role": role, "content": text}


def chat(*texts, system=None):
    """Return messages of the user and the assistant by turns, with a system message before them."""
    turns = [say(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]
    return ([say("system", system)] if system else []) + turns


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def render(messages, tools=None):
    """Return the text of a conversation, and its trained parts: what the assistant says and the token that ends it."""
    text, trained = "<s>", []
    listed = "Tools:\n" + json.dumps(tools, ensure_ascii=False) if tools else ""
    if tools and messages[0]["role"] != "system":
        messages = [say("system", listed), *messages]
    elif tools:
        messages = [say("system", messages[0]["content"] + "\n\n" + listed), *messages[1:]]
    for message in messages:
        calls = [
            "<tool_call>" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "</tool_call>"
            for name, arguments in message.get("calls", ())
        ]
        body = "\n".join([message["content"]] * bool(message["content"]) + calls) + END
        text += header(message["role"]) + body
        if message["role"] == "assistant" and not message.get("untrained"):
            trained.append(body)
    return text, trained


def write(path, content):
    """Write rows as JSON lines, or bytes or a text as they are."""
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def load(path, tokenizer, encoding="utf-8", template="yulan-mini", **settings):
    """Return the splits of a file or folder."""
    settings = DataSettings((Source(path, encoding=encoding),), **{"max_tokens": 20_000, **settings})
    return load_splits(settings, tokenizer, find_template(template, tokenizer), 0)


def read_sequence(row, tokenizer):
    """Return the text of a row, and the texts of its trained runs."""
    runs, before = [], -100
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label != -100 and before == -100:
            runs.append([])
        if label != -100:
            runs[-1].append(token)
        before = label
    return read_text(tokenizer, row["input_ids"]), [read_text(tokenizer, run) for run in runs]


def read_pair(row, tokenizer):
    """Return the texts of a pair's prompt, chosen answer and rejected answer."""
    return tuple(read_text(tokenizer, row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


def render_pair(prompt, chosen, rejected, tools=None):
    """Return the same three texts by hand."""
    return render(prompt, tools)[0] + header("assistant"), chosen + END, rejected + END
