"""Watch a trainer from outside: the time of each step, the kernels of one, and the peak of the device's memory while it trains."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

# How many kernels are named, those that take the most time of a step.
_LONGEST = 12


def synchronize() -> None:
    """Wait until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_peaks() -> tuple[int, int]:
    """Return the peak of the allocated and of the reserved bytes since the last reset, and reset it."""
    if not torch.cuda.is_available():
        return 0, 0
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return peaks


def read_context() -> int:
    """Return the bytes of the card that are in use outside the allocator; with one process on the card, its CUDA context."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


@dataclass
class Watch(TrainerCallback):
    """The seconds and tokens of every step, the losses, and the peaks before and during the training."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loading: tuple[int, int] = (0, 0)
    training: tuple[int, int] = (0, 0)
    context: int = 0
    started: float = 0.0
    processor_started: float = 0.0
    profiled_step: int | None = None
    kernels: int = 0
    busy_seconds: float = 0.0
    longest: list[tuple[float, int, str]] = field(default_factory=list)
    profiler: Any = None
    counter: Any = None

    def on_step_begin(self, *arguments: Any, model: Any = None, **values: Any) -> None:
        """Start the clock, and count the tokens that reach the model."""
        self.tokens.append(0)
        if self.counter is None and model is not None:
            self.counter = model.get_input_embeddings().register_forward_pre_hook(self._count_tokens)
        synchronize()
        if len(self.seconds) == self.profiled_step and torch.cuda.is_available():
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()
        self.started, self.processor_started = time.perf_counter(), time.process_time()

    def on_step_end(self, *arguments: Any, **values: Any) -> None:
        """Stop the clock."""
        synchronize()
        seconds = time.perf_counter() - self.started
        if self.profiler is None:
            self.seconds.append(seconds)
            self.processor_seconds.append(time.process_time() - self.processor_started)
            return
        self.profiler.stop()
        for event in self.profiler.key_averages():
            if event.device_type == torch.autograd.DeviceType.CUDA:  # the others are calls that start kernels
                self.kernels += event.count
                self.busy_seconds += event.self_device_time_total / 1e6
                self.longest.append((event.self_device_time_total / 1e6, event.count, event.key))
        self.longest = sorted(self.longest, reverse=True)[:_LONGEST]
        self.profiler, self.profiled_step = None, None

    def _count_tokens(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.tokens[-1] += inputs[0].numel()

    def on_train_end(self, *arguments: Any, **values: Any) -> None:
        """Leave the model as it was."""
        if self.counter is not None:
            self.counter.remove()

    def on_log(self, *arguments: Any, logs: dict[str, Any] | None = None, **values: Any) -> None:
        """Keep the loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


@contextlib.contextmanager
def watch_trainers(profiled_step: int | None = None) -> Iterator[Watch]:
    """Let every trainer that trains inside this context report to the watch; the profiled step counts kernels and no time."""
    watch, train = Watch(profiled_step=profiled_step), Trainer.train

    def watched(self: Trainer, *arguments: Any, **values: Any) -> Any:
        watch.loading = read_peaks()
        self.add_callback(watch)
        try:
            return train(self, *arguments, **values)
        finally:
            watch.context = read_context()
            watch.training = read_peaks()

    Trainer.train = watched
    try:
        yield watch
    finally:
        Trainer.train = train
