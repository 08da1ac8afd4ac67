"""Flip single bits in every kind of file that the kit keeps, and see that none of them changes a result silently."""

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from injector import Server
from kinds import Kind, make_export
from tries import Tally


def flip_bit(file: Path, generator: random.Random) -> int:
    """Flip one bit of a file and return its place."""
    content = bytearray(file.read_bytes())
    place = generator.randrange(8 * len(content))
    content[place // 8] ^= 1 << (place % 8)
    file.write_bytes(content)
    return place


def flip_everywhere(server: Server, kinds: Mapping[str, Callable[[], Kind]], tries: int) -> Iterator[Tally]:
    """Flip single bits and yield the counts of each kind of file: adapters, states, checkpoints, cached rows, folds and `nano`.

    A damaged adapter or state must be refused; a damaged cache must be made again and a damaged checkpoint passed over, both with the
    same result as before.
    """
    yield from _flip_runs(server, kinds["short"](), tries)
    yield _flip_states(server, kinds["pretrain"](), tries)
    yield from _flip_caches(server, kinds["once"](), Path(os.environ["FINETUNE_CACHE"]), tries)


def _flip_caches(server: Server, once: Kind, cache: Path, tries: int) -> list[Tally]:
    """Flip a bit in each kind of cached folder at the same time; all must be made again, or the result is another."""
    shutil.rmtree(cache)  # so that it holds only what this run reads
    once.clear()
    assert server.run(once.start, once.output.parent).status == 0
    expected, generator = once.hash_results(), random.Random(3)
    tallies = {name: Tally(f"cached {name}", "one bit") for name in ("rows", "folds", "nano")}
    for _ in range(tries):
        places = {name: _flip_one(cache / name, generator, ("**/*",)) for name in tallies}
        once.clear()
        outcome = server.run(once.start, once.output.parent)
        for name, tally in tallies.items():
            tally.tries += 1
            tally.stopped += re.search(rf"/{name}/\w+: the cache is damaged", outcome.text) is not None
            if outcome.status != 0 or once.hash_results() != expected:
                tally.note("another result", tally.tries, f"{places[name]}\n{outcome.text}")
    return list(tallies.values())


def _flip_runs(server: Server, short: Kind, tries: int) -> Iterator[Tally]:
    """Flip bits in the adapter of a run, which must not be exported then, and in its last checkpoint."""
    short.clear()
    assert server.run(short.start, short.output.parent).status == 0
    expected, kept = short.hash_results(), _keep(short.output)
    export = make_export(short.output.parents[1], short.output)

    def restore_adapter() -> Path:
        _restore(short.output, kept)
        return short.output / "adapter"

    def refuse() -> bool:
        export.clear()
        return server.run(export.start, export.output.parent).status == 2 and not export.output.exists()

    def restore_checkpoint() -> Path:
        _restore(short.output, kept)
        shutil.rmtree(short.output / "adapter")
        return short.output / "checkpoint-2"

    def resume() -> bool:
        return server.run(short.resume, short.output.parent).status == 0 and short.hash_results() == expected

    yield _flip("adapter", restore_adapter, refuse, tries, ("*.safetensors", "adapter_config.json", "manifest.json"))
    yield _flip("checkpoint", restore_checkpoint, resume, tries)
    shutil.rmtree(kept)


def _flip_states(server: Server, pretrain: Kind, tries: int) -> Tally:
    """Flip bits in the optimizer states that a run has saved; the next run must refuse them."""
    pretrain.clear()
    assert server.run(pretrain.start, pretrain.output.parent).status == 0
    kept, model = _keep(pretrain.output), pretrain.output / "model"
    output = pretrain.output.with_name("second")
    second = [
        *pretrain.start,
        "-s",
        f"model.checkpoint={model}",
        "-s",
        f"optimizer.states={model}",
        "-s",
        f"output={output}",
    ]
    whole = server.run(second, output.parent)
    assert whole.status == 0, whole.text

    def restore() -> Path:
        shutil.rmtree(output, ignore_errors=True)
        _restore(pretrain.output, kept)
        return model

    def start() -> bool:
        return server.run(second, output.parent).status == 2 and not output.exists()

    tally = _flip("optimizer states", restore, start, tries, ("global_step*/**/*.pt", "manifest.json"))
    shutil.rmtree(kept)
    return tally


def _flip(
    name: str, restore: Callable[[], Path], works: Callable[[], bool], tries: int, patterns: tuple[str, ...] = ("**/*",)
) -> Tally:
    """Flip a bit of a file below the folder that `restore` returns, `tries` times; count where it does not come out right."""
    tally, generator = Tally(name, "one bit"), random.Random(3)
    for _ in range(tries):
        place = _flip_one(restore(), generator, patterns)
        tally.tries += 1
        if not works():
            tally.note("another result", tally.tries, place)
    return tally


def _flip_one(folder: Path, generator: random.Random, patterns: tuple[str, ...]) -> str:
    """Flip a bit of some file below a folder, and say where."""
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and path.stat().st_size}
    file = generator.choice(sorted(files))
    return f"{file.relative_to(folder)}, bit {flip_bit(file, generator)}"


def _keep(folder: Path) -> Path:
    """Copy a folder out of the way, to take it back later."""
    kept = folder.parents[1] / f"{folder.parent.name}.kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept)
    return kept


def _restore(folder: Path, kept: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
