"""Write docs/llms.txt: an index of the documentation for language models, from the lists of guides in README.md and docs/README.md.

    python docs/write_llms.py

The form is that of https://llmstxt.org: a title, a summary, and sections of links with a sentence each.
"""

import re
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent
HEAD = """# yulan-finetune

> Fine-tune YuLan-Mini, an open 2.4 B-parameter language model (Chinese and English), from any of its published checkpoints on one
> GPU, and export verified Llama weights and GGUF files. The command is `finetune`; a recipe is a YAML file.

AGENTS.md holds all that is needed to write a recipe: the commands, the formats of rows, and every key with its values.

## For assistants

- [AGENTS.md](../AGENTS.md): commands, shipped recipes, formats of rows, every key of a recipe

## Guides
"""
ROW = re.compile(r"^\| \[(.+?)\]\((.+?)\) \| (.+?) \|$", re.MULTILINE)


def list_lines() -> Iterator[str]:
    """Yield the lines of the index."""
    yield HEAD
    for title, link, text in ROW.findall((DOCS / "README.md").read_text(encoding="utf-8")):
        yield f"- [{title}]({link}): {text}"
    yield ""


if __name__ == "__main__":
    (DOCS / "llms.txt").write_text("\n".join(list_lines()), encoding="utf-8")
