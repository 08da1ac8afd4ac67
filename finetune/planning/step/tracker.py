"""Log every storage of a training step, on real tensors or on ones without content, and split the peak into parts."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.compat import identify_storage, load_dispatch_mode, load_fake_tensors

FakeTensor, _ = load_fake_tensors()
DispatchMode: Any = load_dispatch_mode()
# Arguments and output of a kernel -> the bytes that it allocates for itself while it runs.
KernelWorkspace = Callable[[Sequence[Any], Any], int]
# A tensor and its part -> the bytes of it that one process keeps.
Share = Callable[[torch.Tensor, str], int]
# Arguments of an operation that cannot run without content -> its output.
Substitute = Callable[[Sequence[Any]], Any]

FORWARD, LOSS, BACKWARD, CHECKPOINTING, STEP = "forward", "loss", "backward", "gradient checkpointing", "optimizer step"
# The CUDA allocator hands out multiples of this. Source: kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp.
_BLOCK_BYTES = 512
_GET_DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True)
class Peak:
    """The moment with the most live bytes; `parts` sum to `bytes`, and `rounding` is what blocks of 512 bytes would add."""

    bytes: int
    parts: Mapping[str, int]
    rounding: int
    phase: str


class MemoryTracker(DispatchMode):
    """Log when every storage appears and is freed, and the phase in which it appears.

    The part that a storage counts for is set later, when its use is known: at first nothing tells a gradient from a workspace.
    """

    def __init__(
        self,
        workspaces: Mapping[Any, KernelWorkspace] | None = None,
        substitutes: Mapping[Any, Substitute] | None = None,
        share: Share | None = None,
    ) -> None:
        super().__init__()
        self.phase = FORWARD
        self._is_paused = False
        self._workspaces = workspaces or {}
        self._substitutes = substitutes or {}
        self._share = share
        self._events: list[tuple[int, int]] = []  # number of a storage, and +1 or -1
        self._sizes: list[int] = []
        self._phases: list[str] = []
        self._parts: dict[int, str] = {}
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and log the storages of what it returns."""
        if func is _GET_DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # called more often than all other operations together
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
            self._log_workspace(workspace(args, output))
        return output

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Log nothing inside this context."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def adopt(self, tensor: torch.Tensor, part: str) -> None:
        """Count a tensor for a part; of a tensor that processes share, only this one's share."""
        number = self._log(tensor)
        self._parts[number] = part
        if self._share is not None:
            self._sizes[number] = self._share(tensor, part)

    def adopt_live(self, phase: str, part: str) -> None:
        """Count for a part every live storage of a phase that has no part yet."""
        for number, _ in self._live.values():
            if self._phases[number] == phase:
                self._parts.setdefault(number, part)

    def adopt_phase(self, phase: str, part: str) -> None:
        """Count for a part every storage of a phase that has no part yet, live or freed."""
        for number, made_in in enumerate(self._phases):
            if made_in == phase:
                self._parts.setdefault(number, part)

    def find_peak(self, default_part: str, extras: Mapping[str, Mapping[str, int]] | None = None) -> Peak:
        """Replay the log and return the moment with the most live bytes; storages without a part count for `default_part`.

        `extras` are bytes beyond any storage that are live all through a phase: phase -> part -> bytes.
        """
        extras = extras or {}
        added = {name: sum(parts.values()) for name, parts in extras.items()}
        live = highest = moment = 0
        for index, (number, sign) in enumerate(self._events):
            live += sign * self._sizes[number]
            total = live + added.get(self._phases[number], 0)
            if sign > 0 and total > highest:
                highest, moment = total, index
        alive: set[int] = set()
        for number, sign in self._events[: moment + 1]:
            (alive.add if sign > 0 else alive.discard)(number)
        parts: dict[str, int] = {}
        for number in alive:
            part = self._parts.get(number, default_part)
            parts[part] = parts.get(part, 0) + self._sizes[number]
        phase = self._phases[self._events[moment][0]] if self._events else ""
        for part, size in extras.get(phase, {}).items():
            parts[part] = parts.get(part, 0) + size
        rounding = sum(-self._sizes[number] % _BLOCK_BYTES for number in alive)
        return Peak(highest, parts, rounding, phase)

    def find_largest(self, part: str) -> int:
        """Return the most bytes that a part has at any moment, at the peak or elsewhere."""
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

    def _log_workspace(self, size: int) -> None:
        number = self._append(size)
        self._events.append((number, -1))

    def _append(self, size: int) -> int:
        number = len(self._sizes)
        self._sizes.append(size)
        # In the backward pass gradients are recorded only where gradient checkpointing runs a layer forward once more.
        is_checkpointing = self.phase == BACKWARD and torch.is_grad_enabled()
        self._phases.append(CHECKPOINTING if is_checkpointing else self.phase)
        self._events.append((number, 1))
        return number
