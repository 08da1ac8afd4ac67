"""Follow every live storage of a training step, on real tensors or on ones without content, and split its peak into parts."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.compat import identify_storage, load_dispatch_mode, load_fake_tensors

FakeTensor, _ = load_fake_tensors()
DispatchMode: Any = load_dispatch_mode()
# What a kernel allocates for itself while it runs: its arguments and outputs -> bytes.
KernelWorkspace = Callable[[Sequence[Any], Any], int]
# The bytes that a process keeps of a tensor that counts for a part.
Share = Callable[[torch.Tensor, str], int]
# What takes the place of an operation that cannot run without content: its arguments -> its output.
Substitute = Callable[[Sequence[Any]], Any]

FORWARD, LOSS, BACKWARD, AGAIN, STEP = "forward", "loss", "backward", "recomputation", "optimizer step"
# The CUDA allocator hands out multiples of this. Source: kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp.
_BLOCK_BYTES = 512
_GET_DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True)
class Peak:
    """The moment with the most live bytes: its parts sum to `bytes`; `rounding` is what blocks of 512 bytes would add."""

    bytes: int
    parts: Mapping[str, int]
    rounding: int
    stage: str


class MemoryTracker(DispatchMode):
    """Log every storage that appears or dies, under the stage that is set when it appears.

    A storage's part is decided afterwards, since what it is for shows only later: a gradient begins as a workspace,
    a kept activation as one of many.
    """

    def __init__(
        self,
        workspaces: Mapping[Any, KernelWorkspace] | None = None,
        substitutes: Mapping[Any, Substitute] | None = None,
        share: Share | None = None,
    ) -> None:
        super().__init__()
        self.stage = FORWARD
        self._is_paused = False
        self._workspaces = workspaces or {}
        self._substitutes = substitutes or {}
        self._share = share
        self._events: list[tuple[int, int]] = []  # number of a storage, and +1 or -1
        self._sizes: list[int] = []
        self._stages: list[str] = []
        self._parts: dict[int, str] = {}
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and log the storages of what it returns."""
        if func is _GET_DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for more often than all else together
        substitute = self._substitutes.get(func)
        if self._is_paused:
            return substitute(args) if substitute else func(*args, **(kwargs or {}))
        output = substitute(args) if substitute else func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self._log(output)
        elif isinstance(output, list | tuple):
            for item in output:
                if isinstance(item, torch.Tensor):
                    self._log(item)
        if (workspace := self._workspaces.get(func)) is not None:
            self._log_passing(workspace(args, output))
        return output

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Follow nothing for a while."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def adopt(self, tensor: torch.Tensor, part: str) -> None:
        """Count a tensor from here on, and for a part, whenever it was made; where processes share it, only this one's share."""
        number = self._log(tensor)
        self._parts[number] = part
        if self._share is not None:
            self._sizes[number] = self._share(tensor, part)

    def adopt_live(self, stage: str, part: str) -> None:
        """Count for a part what was made in a stage and is still live, unless it has a part already."""
        for number, _ in self._live.values():
            if self._stages[number] == stage:
                self._parts.setdefault(number, part)

    def adopt_stage(self, stage: str, part: str) -> None:
        """Count for a part all that was made in a stage, unless it has a part already."""
        for number, made_in in enumerate(self._stages):
            if made_in == stage:
                self._parts.setdefault(number, part)

    def find_peak(self, default_part: str, extras: Mapping[str, Mapping[str, int]] | None = None) -> Peak:
        """Replay the log and return its highest moment; what has no part counts for `default_part`.

        `extras` are bytes that are live all through a stage without being of any storage: stage -> part -> bytes.
        """
        extras = extras or {}
        added = {name: sum(parts.values()) for name, parts in extras.items()}
        live = highest = moment = 0
        for index, (number, sign) in enumerate(self._events):
            live += sign * self._sizes[number]
            total = live + added.get(self._stages[number], 0)
            if sign > 0 and total > highest:
                highest, moment = total, index
        alive: set[int] = set()
        for number, sign in self._events[: moment + 1]:
            (alive.add if sign > 0 else alive.discard)(number)
        parts: dict[str, int] = {}
        for number in alive:
            part = self._parts.get(number, default_part)
            parts[part] = parts.get(part, 0) + self._sizes[number]
        stage = self._stages[self._events[moment][0]] if self._events else ""
        for part, size in extras.get(stage, {}).items():
            parts[part] = parts.get(part, 0) + size
        rounding = sum(-self._sizes[number] % _BLOCK_BYTES for number in alive)
        return Peak(highest, parts, rounding, stage)

    def find_largest(self, part: str) -> int:
        """Return the most bytes that a part ever had at one moment, at the peak or not."""
        live = highest = 0
        for number, sign in self._events:
            if self._parts.get(number) == part:
                live += sign * self._sizes[number]
                highest = max(highest, live)
        return highest

    def _log(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = identify_storage(storage)
        known = self._live.get(key)
        if known is not None:
            return known[0]
        number = self._append(storage.nbytes())

        def forget(_: object) -> None:
            del self._live[key]
            self._events.append((number, -1))

        self._live[key] = (number, weakref.ref(storage, forget))
        return number

    def _log_passing(self, size: int) -> None:
        number = self._append(size)
        self._events.append((number, -1))

    def _append(self, size: int) -> int:
        number = len(self._sizes)
        self._sizes.append(size)
        # Backward runs without recording gradients; what records them is a layer that is computed a second time.
        runs_again = self.stage == BACKWARD and torch.is_grad_enabled()
        self._stages.append(AGAIN if runs_again else self.stage)
        self._events.append((number, 1))
        return number
