"""Find the shipped recipes, templates and data by name, in a checkout and in an installed wheel."""

from pathlib import Path

from finetune.errors import RecipeError, describe_unknown_name, find_close_match

_PACKAGE = Path(__file__).resolve().parents[1]


def find_resource_folder(name: str) -> Path:
    """Return the folder `recipes` or `templates`: in a wheel it is inside the package, in a checkout beside it."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def list_templates() -> dict[str, Path]:
    """Return the shipped chat templates: name -> file."""
    return {path.stem: path for path in sorted(find_resource_folder("templates").glob("*.jinja"))}


def list_recipes() -> dict[str, Path]:
    """Return the shipped recipes for each method: name -> file."""
    return {path.stem: path for path in sorted(find_resource_folder("recipes").glob("*.yaml"))}


def list_all_recipes() -> dict[str, Path]:
    """Return every shipped recipe, with those for each size of GPU: name, such as `sft_qlora` or `tiers/8gb` -> file."""
    files = (find_resource_folder("recipes") / "tiers").glob("*.yaml")
    tiers = sorted(files, key=lambda path: (len(path.stem), path.stem))  # 6gb before 12gb
    return {**list_recipes(), **{f"tiers/{path.stem}": path for path in tiers}}


def list_launch_files() -> dict[str, Path]:
    """Return the shipped configurations of accelerate: name, such as `accelerate/fsdp2` -> file."""
    return {f"accelerate/{path.stem}": path for path in sorted(_find_launch_folder().glob("*.yaml"))}


def find_launch_file(name: Path) -> Path:
    """Return a configuration of accelerate: the given path, or the shipped one of that name or path (`fsdp2`)."""
    if name.is_file():
        return name
    return list_launch_files().get(f"accelerate/{name_recipe(name).removeprefix('accelerate/')}", name)


def _find_launch_folder() -> Path:
    return find_resource_folder("recipes") / "accelerate"


def name_recipe(source: Path) -> str:
    """Return the name of a shipped recipe from its path: `sft_qlora` for `recipes/sft_qlora.yaml`."""
    return source.as_posix().removeprefix("recipes/").removesuffix(".yaml")


def find_close_recipe(name: str) -> str | None:
    """Return the shipped recipe that a name means: in other case, without its folder, or nearly right; None where none is close."""
    shipped = list_all_recipes()
    for known in shipped:
        if name.lower() in (known.lower(), known.rpartition("/")[2].lower()):
            return known
    return find_close_match(name.lower(), shipped)


def find_shipped_recipe(name: Path) -> Path:
    """Return the file of a shipped recipe.

    Raises:
        RecipeError: no shipped recipe has this name; the message names the closest one.
    """
    shipped = list_all_recipes()
    if name_recipe(name) not in shipped:
        nearest = describe_unknown_name(find_close_recipe(name_recipe(name)) or name_recipe(name), shipped)
        raise RecipeError(str(name), [nearest.replace("unknown", "no shipped recipe has this name", 1)])
    return shipped[name_recipe(name)]


def find_recipe(source: Path) -> Path:
    """Return the file of a recipe: the given path, with or without `.yaml`, or else the shipped recipe of that name."""
    own = (source, Path(f"{source}.yaml"))
    shipped = list_all_recipes().get(name_recipe(source), source)
    try:
        return next((path for path in own if path.is_file()), shipped)
    except OSError:  # such as a name that is too long for a file; reading it says what is wrong
        return source


def find_demo_data(name: str) -> Path:
    """Return a bundled data file, such as `demo.jsonl`."""
    return find_resource_folder("recipes") / "data" / name
