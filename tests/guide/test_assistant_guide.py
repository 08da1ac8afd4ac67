"""AGENTS.md and docs/llms.txt are what the kit's tables say, so that a coding assistant reads nothing that is out of date."""

import runpy
from pathlib import Path

from finetune.check.recipes import load_recipe
from finetune.cli.verbs import VERBS
from finetune.guide.assistant_guide import render_assistant_guide
from finetune.recipe.key_texts import KEYS

ROOT = Path(__file__).parents[2]


def test_the_page_is_written_anew_by_make_keys():
    assert (ROOT / "AGENTS.md").read_text(encoding="utf-8") == render_assistant_guide(VERBS)


def test_it_names_every_verb_and_every_key():
    page = render_assistant_guide(VERBS)
    assert [verb.name for verb in VERBS if f"- `{verb.name}`: {verb.help}" not in page] == []
    sections = {name.rpartition(".")[0] for name in KEYS} | {"stages"}
    keys = [name for name in KEYS if name not in sections and not name.startswith("stages.")]
    assert [name for name in keys if f"- `{name}` (" not in page] == []


def test_its_recipe_can_be_trained(tmp_path):
    page = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    (tmp_path / "my.jsonl").write_text('{"prompt": "Q", "completion": "A"}\n')
    (tmp_path / "my.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    assert load_recipe(tmp_path / "my.yaml").recipe.adapter.rank == 16


def test_the_index_lists_every_guide():
    written = (ROOT / "docs/llms.txt").read_text(encoding="utf-8")
    assert written == "\n".join(runpy.run_path(str(ROOT / "docs/write_llms.py"))["list_lines"]())
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"]({page.name})" not in written] == ["README.md"]
