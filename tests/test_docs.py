"""The guides: short, every link and path leads somewhere, every command and recipe that they name works."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import finetune
from finetune.cli.parser import make_parser

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md", "recipes/mixtures/README.md")
] + GUIDES
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SHIPPED = {path.stem for path in RECIPES}
# What stands for a recipe of the reader's own, and the file of that name in a run directory.
PLACEHOLDERS = {"RECIPE", "my.yaml", "recipe.yaml"}
METHODS = "sft|dpo|kto|orpo|cpo|simpo|reward|grpo|rloo"
FOLDERS = "finetune|tests|benchmarks|examples|recipes|templates|docs"


def name_page(path):
    return path.relative_to(ROOT).as_posix()


def list_blocks(text):
    """Return the lines of code and those of prose; code is fenced, or indented by four spaces after an empty line."""
    code, prose, is_fenced, is_indented = [], [], False, False
    before = ""
    for line in text.splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced:
            code.append(line)
        else:
            is_indented = line.startswith("    ") and (is_indented or not before.strip())
            (code if is_indented else prose).append(line.strip() if is_indented else line)
        before = line
    return code, prose


def list_commands(path):
    """Return the arguments of every `finetune` command in a page's code, or in the comments at the top of a recipe."""
    text = path.read_text(encoding="utf-8")
    code = list_blocks(text)[0] if path.suffix == ".md" else re.findall(r"^# +(finetune .*)$", text, re.MULTILINE)
    commands = []
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        start = re.match(r"(?:\.venv/bin/)?finetune |accelerate launch .* -m finetune ", line)
        if start:
            commands.append(tuple(shlex.split(line[start.end() :], comments=True)))
    return commands


COMMANDS = [(path, command) for path in [*PAGES, *RECIPES] for command in list_commands(path)]
WITH_SHIPPED = sorted(
    {command for _, command in COMMANDS if len(command) > 1 and (command[1] in SHIPPED or "recipes/" in command[1])}
)


def list_anchors(path):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = [
        line.lstrip("#").strip() for line in list_blocks(path.read_text(encoding="utf-8"))[1] if line.startswith("#")
    ]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 140 and not line.startswith("|")] == []


@pytest.mark.parametrize("path", PAGES, ids=name_page)
def test_links_lead_somewhere(path):
    prose = "\n".join(list_blocks(path.read_text(encoding="utf-8"))[1])
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in list_anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", PAGES, ids=name_page)
def test_paths_exist(path):
    text = path.read_text(encoding="utf-8")
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)", text)
    assert [name for name in paths if not (ROOT / name).exists()] == []
    modules = re.findall(r"import (finetune(?:\.\w+)+)", text)
    assert [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=name_page)
def test_recipes_exist(path):
    text = path.read_text(encoding="utf-8")
    homes = (ROOT, path.parent, ROOT / "recipes", ROOT / "recipes" / "accelerate")
    files = set(re.findall(r"[\w/.]*\w\.yaml", text)) - PLACEHOLDERS
    assert [name for name in files if not any((home / name).is_file() for home in homes)] == []
    named = set(re.findall(rf"`((?:{METHODS})_(?:q?lora|full))`", text))
    assert named <= SHIPPED


def test_every_guide_is_listed():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in GUIDES if path.name != "README.md" and f"]({path.name})" not in text] == []
    listed = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert [name for name in sorted(SHIPPED) if f"[`{name}`]({name}.yaml)" not in listed] == []


def parse(command):
    return make_parser().parse_args(command)


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[f"{path.stem}: {' '.join(c)}" for path, c in COMMANDS])
def test_commands_parse(path, command, capsys):
    try:
        parsed = parse(command)
    except SystemExit as ended:
        assert ended.code == 0, capsys.readouterr().err  # --help and --version end here
        return
    recipe = getattr(parsed, "recipe", None)
    if recipe is None and command[0] == "recipes" and len(command) > 1:
        recipe = command[1]
    if recipe is not None and str(recipe) not in PLACEHOLDERS:
        assert str(recipe) in SHIPPED or (ROOT / recipe).is_file()


@pytest.mark.parametrize("path", PAGES, ids=name_page)
def test_verbs_in_prose_exist(path):
    """A verb between backticks need not be a whole command."""
    prose = "\n".join(list_blocks(path.read_text(encoding="utf-8"))[1])
    wrong = []
    for verb in set(re.findall(r"`finetune ([a-z]+)", prose)):
        try:
            parse([verb, "--help"])
        except SystemExit as ended:
            if ended.code != 0:
                wrong.append(verb)
    assert wrong == []


@pytest.mark.parametrize("command", WITH_SHIPPED, ids=" ".join)
def test_shipped_recipes_take_the_keys_that_the_guides_set(command, tmp_path):
    settings = [command[place + 1] for place, word in enumerate(command) if word == "-s"]
    for setting in settings:
        key, _, value = setting.partition("=")
        if key.endswith(("data.train", "data.eval")):
            (tmp_path / value).touch()
    recipe = command[1] if command[1] in SHIPPED else str(ROOT / command[1])
    arguments = [word for setting in settings for word in ("-s", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "check", recipe, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_public_functions_exist():
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names = set(re.findall(r"^\| `finetune\.(\w+)`", text, re.MULTILINE))
    assert names == set(finetune.__all__)
    assert [name for name in names if not callable(getattr(finetune, name))] == []
