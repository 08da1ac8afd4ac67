"""The imports of the package point one way: a stage never knows the stages after it."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from finetune.recipe.methods import METHODS

PACKAGE = Path(__file__).parents[1] / "finetune"
MODULES = sorted(PACKAGE.rglob("*.py"))
# From the ground up: a room may import the rooms above it in this list, and its own modules.
ROOMS = (
    "errors",
    "api_arguments",
    "files",
    "compat",
    "hub",
    "servers",
    "yulan",
    "data",
    "mixtures",
    "recipe",
    "checkpoints",
    "runs",
    "models",
    "rewards",
    "evaluation",
    "check",
    "guide",
    "watching",
    "training",
    "planning",
    "exporting",
    "growth",
    "synthesis",
    "cleaning",
    "pipeline",
    "api",
    "cli",
    "__main__",
)
RANK = {name: rank for rank, name in enumerate(ROOMS)}
MOST_MODULES, MOST_LINES = 9, 300
# A system's own modules are imported where the system has them; types only where they are read.
TOP_BLOCKS = ("sys.platform != 'win32'", "TYPE_CHECKING")
YULAN_MAY_IMPORT = {"errors", "files", "compat", "yulan"}


def list_imports(tree):
    """Yield every name of ours that a module imports, as `finetune.x.y`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [str(node.module)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "finetune")


def name_room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_module(path):
    return ".".join(("finetune", *path.relative_to(PACKAGE).with_suffix("").parts))


@pytest.mark.parametrize("path", MODULES, ids=name_module)
def test_imports_point_to_earlier_rooms(path):
    room = name_room(path)
    if path == PACKAGE / "__init__.py":
        # For type checkers alone: tests/test_api.py holds that nothing is loaded.
        assert list(list_imports(ast.parse(path.read_text(encoding="utf-8")))) == [
            "finetune.api",
            "finetune.check.recipes",
        ]
        return
    assert room in RANK, f"{room} has no place in ROOMS"
    for name in list_imports(ast.parse(path.read_text(encoding="utf-8"))):
        target = name.split(".")[1]
        assert RANK[target] <= RANK[room], f"{name_module(path)} imports {name}, which comes later"
        if room == "yulan":
            assert target in YULAN_MAY_IMPORT, f"{name_module(path)} imports {name}"


def test_few_modules_of_training_are_doors():
    """Other rooms know how to start a run, build its trainer and read its rows; how a run works is training's own."""
    doors = {
        name
        for path in MODULES
        if name_room(path) != "training"
        for name in list_imports(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[1] == "training"
    }
    assert doors <= {f"finetune.training.{name}" for name in ("run", "trainer", "training_rows")}


@pytest.mark.parametrize("path", [m for m in MODULES if name_room(m) != "cli"], ids=name_module)
def test_imports_stand_at_the_top(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) in TOP_BLOCKS]
    top = {id(node) for node in [*tree.body, *(inner for block in blocks for inner in block.body)]}
    inner = [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in top
    ]
    assert not inner, f"{name_module(path)} imports inside a block in lines {inner}"


def test_imports_have_no_circle():
    graph = {name_module(path): set(list_imports(ast.parse(path.read_text(encoding="utf-8")))) for path in MODULES}
    finished: set[str] = set()

    def visit(module, trail):
        assert module not in trail, f"circle: {' -> '.join([*trail, module])}"
        if module in finished:
            return
        for target in graph.get(module, ()):
            visit(target, [*trail, module])
        finished.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize(
    "path", [m for m in MODULES if m.name == "__init__.py" and m.parent != PACKAGE], ids=name_module
)
def test_packages_are_empty(path):
    assert path.read_text(encoding="utf-8") == ""


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=lambda folder: folder.name)
def test_rooms_stay_small(folder):
    modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES, f"{folder.name} holds {len(modules)} modules; is it one room?"
    for path in modules:
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= MOST_LINES, f"{name_module(path)} has {lines} lines; does it do one thing?"


def test_module_names_do_not_collide():
    names = Counter(path.stem for path in MODULES if not path.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


# Here "reward" is the name of a number that TRL logs.
TELLS_REWARDS = {
    "finetune.runs.summary",
    "finetune.training.journal.loss_plot",
    "finetune.training.journal.summarising",
    "finetune.watching.panels",
    "finetune.watching.run_view",
}


@pytest.mark.parametrize(
    "line",
    [
        'is_kto = method.name == "kto"',
        'maps = name in ("orpo", "cpo")',
        'BETA = {"grpo": 0.0}',
        'row = METHODS["sft"]',
        'row = METHODS.get("rloo")',
        'MAPPED = ("orpo", "cpo")',
        'match name:\n    case "kto": pass',
    ],
)
def test_the_name_of_a_method_is_found(line):
    assert {name for name, _ in list_compared_names(ast.parse(line))} & set(METHODS)


def list_compared_names(tree):
    """Yield every string that is compared, that looks something up, or that stands in a table, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            parts = [item for item in node.elts if isinstance(item, ast.Constant)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            parts = node.args[:1]
        elif isinstance(node, ast.match_case):
            parts = [node.pattern]
        else:
            continue
        for constant in (inner for part in parts for inner in ast.walk(part) if isinstance(inner, ast.Constant)):
            yield constant.value, constant.lineno


@pytest.mark.parametrize("path", [m for m in MODULES if m != PACKAGE / "recipe" / "methods.py"], ids=name_module)
def test_no_module_compares_the_name_of_a_method(path):
    """What is special about a method is a field of its row."""
    names = set(METHODS) - ({"reward"} if name_module(path) in TELLS_REWARDS else set())
    found = [line for value, line in list_compared_names(ast.parse(path.read_text(encoding="utf-8"))) if value in names]
    assert not found, f"{name_module(path)} compares the name of a method in lines {found}"
