"""Find the files that a path with `*`, `?` or `[…]` means. Names that exist as they are written come first."""

from pathlib import Path

_SIGNS = "*?["


def has_signs(path: Path) -> bool:
    """Tell whether a path is a pattern: it holds a sign of one, and nothing of this name exists."""
    return any(sign in str(path) for sign in _SIGNS) and not path.exists()


def expand_pattern(path: Path) -> tuple[Path, list[Path]]:
    """Return the folder before the pattern, and the files that match, sorted; `**` stands for any number of folders.

    Folders that exist under the name that is written are taken by it, such as `runs[1]` in `runs[1]/*.jsonl`.
    """
    parts = path.parts[1:] if path.anchor else path.parts
    root, number = Path(path.anchor or "."), 0
    while number < len(parts) and (
        (root / parts[number]).is_dir() or not any(sign in parts[number] for sign in _SIGNS)
    ):
        root, number = root / parts[number], number + 1
    rest = "/".join(parts[number:])
    return root, sorted(entry for entry in root.glob(rest) if entry.is_file()) if rest else []
