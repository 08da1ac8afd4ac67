"""Flip single bits in every kind of file that the kit keeps, and see that none of them changes a result silently."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from injector import Server
from kinds import Kind, make_export


def flip_bit(file: Path, generator: random.Random) -> int:
    """Flip one bit of a file and return its place."""
    content = bytearray(file.read_bytes())
    place = generator.randrange(8 * len(content))
    content[place // 8] ^= 1 << (place % 8)
    file.write_bytes(content)
    return place


def flip_places(
    server: Server, kind: Kind, folders: dict[str, Path], tries: int, note: Callable[[str, str, str], None]
) -> dict[str, int]:
    """Flip bits in the cache, in a checkpoint and in the adapter of a finished run; `note` gets what must not happen.

    A damaged cache must be made again and a damaged checkpoint passed over, both with the same result as before; a damaged adapter
    must be refused.
    """
    kind.clear()
    assert server.run(kind.start, kind.output.parent).status == 0
    expected, generator = kind.hash_results(), random.Random(3)
    kept = kind.output.parent / "kept"
    shutil.copytree(kind.output, kept)
    done = {}
    for name, cache in folders.items():
        done[name] = tries
        for _ in range(tries):
            kind.clear()
            file = generator.choice(sorted(path for path in cache.rglob("*") if path.is_file() and path.stat().st_size))
            place = flip_bit(file, generator)
            outcome = server.run(kind.start, kind.output.parent)
            if outcome.status != 0 or kind.hash_results() != expected:
                note(name, f"{file.name}, bit {place}", outcome.text)
    done["checkpoint"] = tries
    for _ in range(tries):
        _restore(kind, kept)
        shutil.rmtree(kind.output / "adapter")
        checkpoint = kind.output / "checkpoint-4"
        file = generator.choice(
            sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
        )
        place = flip_bit(file, generator)
        outcome = server.run(kind.resume, kind.output.parent)
        if outcome.status != 0 or kind.hash_results() != expected:
            note("checkpoint", f"{file.name}, bit {place}", outcome.text)
    done["adapter"] = tries
    for _ in range(tries):
        _restore(kind, kept)
        adapter = kind.output / "adapter"
        file = generator.choice(
            [adapter / "adapter_model.safetensors", adapter / "adapter_config.json", adapter / "manifest.json"]
        )
        place = flip_bit(file, generator)
        export = make_export(kind.output.parents[1], kind.output)
        export.clear()
        outcome = server.run(export.start, export.output.parent)
        if outcome.status != 2:
            note("adapter", f"{file.name}, bit {place}", outcome.text)
    shutil.rmtree(kept)
    return done


def _restore(kind: Kind, kept: Path) -> None:
    kind.clear()
    shutil.copytree(kept, kind.output)
