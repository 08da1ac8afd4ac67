"""Where the shipped recipes and templates are, in a checkout and in an installed wheel, and what they are called."""

from pathlib import Path

from finetune.errors import RecipeError, describe_unknown_name

_PACKAGE = Path(__file__).resolve().parents[1]


def find_resource_folder(name: str) -> Path:
    """Return the folder `recipes` or `templates`: inside the package where installed, beside it in a checkout."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def list_templates() -> dict[str, Path]:
    """Return the shipped chat templates: name -> file."""
    return {path.stem: path for path in sorted(find_resource_folder("templates").glob("*.jinja"))}


def list_recipes() -> dict[str, Path]:
    """Return the shipped recipes for each method: name -> file."""
    return {path.stem: path for path in sorted(find_resource_folder("recipes").glob("*.yaml"))}


def list_all_recipes() -> dict[str, Path]:
    """Return every shipped recipe, those for each size of card too: `sft_qlora`, `tiers/8gb` -> file."""
    files = (find_resource_folder("recipes") / "tiers").glob("*.yaml")
    tiers = sorted(files, key=lambda path: (len(path.stem), path.stem))  # 6gb before 12gb
    return {**list_recipes(), **{f"tiers/{path.stem}": path for path in tiers}}


def name_recipe(source: Path) -> str:
    """Return the name that a path would have as a shipped recipe: `sft_qlora` of `recipes/sft_qlora.yaml`."""
    return source.as_posix().removeprefix("recipes/").removesuffix(".yaml")


def find_shipped_recipe(name: Path) -> Path:
    """Return the file of a shipped recipe.

    Raises:
        RecipeError: there is none of this name; the message has the nearest one.
    """
    shipped = list_all_recipes()
    if name_recipe(name) not in shipped:
        nearest = describe_unknown_name(name_recipe(name), shipped)
        raise RecipeError(str(name), [nearest.replace("unknown", "no shipped recipe has this name", 1)])
    return shipped[name_recipe(name)]


def find_recipe(source: Path) -> Path:
    """Return the file of a recipe: itself, with or without `.yaml`, or else the shipped one of that name."""
    own = (source, Path(f"{source}.yaml"))
    shipped = list_all_recipes().get(name_recipe(source), source)
    return next((path for path in own if path.is_file()), shipped)


def find_demo_data(name: str) -> Path:
    """Return a bundled data file, such as `demo.jsonl`."""
    return find_resource_folder("recipes") / "data" / name
