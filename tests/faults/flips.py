"""Flip single bits in every kind of file that the kit keeps, and see that none of them changes a result silently."""

import os
import random
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
    once, cache = kinds["once"](), Path(os.environ["FINETUNE_CACHE"])
    once.clear()
    assert server.run(once.start, once.output.parent).status == 0
    expected = once.hash_results()

    def train_anew() -> bool:
        once.clear()
        return server.run(once.start, once.output.parent).status == 0 and once.hash_results() == expected

    for name in ("rows", "folds", "nano"):
        yield _flip(f"cached {name}", lambda name=name: cache / name, train_anew, tries)


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
        folder = restore()
        files = {
            path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and path.stat().st_size
        }
        file = generator.choice(sorted(files))
        place = flip_bit(file, generator)
        tally.tries += 1
        if not works():
            tally.note("another result", place, f"{file.relative_to(folder)}, bit {place}")
    return tally


def _keep(folder: Path) -> Path:
    """Copy a folder out of the way, to take it back later."""
    kept = folder.parents[1] / f"{folder.parent.name}.kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept)
    return kept


def _restore(folder: Path, kept: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
