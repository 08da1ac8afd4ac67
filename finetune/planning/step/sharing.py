"""Count what one process holds when several share a run: its shares of sharded tensors, and its buffers for exchanging them.

Sources: ZeRO (arXiv 1910.02054), sections 3.1 and 5; DeepSpeed's documented defaults (docs/_pages/config-json.md);
`fully_shard` and `DistributedDataParallel` in torch 2.13. DeepSpeed was not run for this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune.errors import MachineError, describe_unknown_name
from finetune.files.resources import find_launch_file, list_launch_files
from finetune.models.engine import ENGINES, ZERO_STAGES, Engine
from finetune.models.engines.zero_stage import check_stage
from finetune.planning.step import tracker as phase
from finetune.planning.step.step_parts import ADAPTER, FROZEN_ADAPTER, GRADIENTS, OPTIMIZER, SCALES, WEIGHTS

BUCKETS, GATHERED, COPIES = "buckets of gradients", "gathered from other processes", "float32 copies of weights"
# DeepSpeed's defaults: elements of a bucket, elements that ZeRO-3 keeps gathered, elements up to which a tensor is not sharded.
_BUCKET, _MOST_GATHERED, _SMALLEST_SHARED = 500_000_000, 1_000_000_000, 100_000
_PHASES = (phase.FORWARD, phase.LOSS, phase.BACKWARD, phase.CHECKPOINTING, phase.STEP)
_BACKWARD = (phase.LOSS, phase.BACKWARD, phase.CHECKPOINTING)
# FSDP2 gathers the next layer while one runs; gradients are held twice, once as the copy that is sent.
_LAYERS_AT_ONCE = 2

# The parts whose floating-point tensors are sharded with the weights.
_SHARED_WEIGHTS = (WEIGHTS | {ADAPTER, FROZEN_ADAPTER}) - {SCALES}


@dataclass(frozen=True)
class Sharing:
    """How many processes share a run, and by which engine; `compute_bytes` is the size of one element of the compute dtype."""

    engine: Engine
    processes: int
    compute_bytes: int = 2

    @property
    def shares_weights(self) -> bool:
        """Tell whether a process keeps only a share of the weights."""
        return ENGINES[self.engine].shards_weights

    def count_share(self, tensor: torch.Tensor, part: str) -> int:
        """Count the bytes of a tensor that the first process keeps; no other keeps more."""
        size = tensor.untyped_storage().nbytes()
        is_weight = part in _SHARED_WEIGHTS
        if ENGINES[self.engine].is_deepspeed and (is_weight or part == GRADIENTS) and tensor.is_floating_point():
            size = tensor.numel() * self.compute_bytes  # DeepSpeed holds both in its compute dtype
        is_shared = part in (GRADIENTS, OPTIMIZER) or (is_weight and self.shares_weights)
        if self.engine in ("one", "ddp") or not is_shared or tensor.ndim == 0:
            return size
        if self.engine == "fsdp2":  # whole rows
            return size // tensor.shape[0] * -(-tensor.shape[0] // self.processes)
        if is_weight and tensor.numel() <= _SMALLEST_SHARED:
            return size
        return -(-tensor.numel() // self.processes) * (size // tensor.numel())

    def list_extras(self, model: torch.nn.Module) -> dict[str, dict[str, int]]:
        """Count what a process holds beyond its own tensors: phase -> part -> bytes; an upper bound where it varies."""
        if self.engine == "one":
            return {}
        sizes = _measure_model(model)
        if self.engine == "ddp":  # torch holds all gradients in buckets, beside those of the parameters
            return {name: {BUCKETS: sizes.gradient_bytes} for name in _PHASES}
        if self.engine == "fsdp2":
            return self._list_fsdp_extras(sizes)
        copies = 4 * -(-sizes.trained // self.processes)
        extras = {name: {COPIES: copies} for name in _PHASES}
        for name in _BACKWARD:
            extras[name][BUCKETS] = _BUCKET * self.compute_bytes
        if self.engine == "zero3":
            for name in (phase.FORWARD, *_BACKWARD):
                extras[name][GATHERED] = min(sizes.elements * self.compute_bytes, _MOST_GATHERED * self.compute_bytes)
        return extras

    def _list_fsdp_extras(self, sizes: "_Sizes") -> dict[str, dict[str, int]]:
        layer = _LAYERS_AT_ONCE * sizes.layer
        gradients = _LAYERS_AT_ONCE * sizes.layer_trained * self.compute_bytes
        table = sizes.table * self.compute_bytes
        # A trained table's gradient is whole until it is sent; the embedding's comes last, with the table gathered again.
        table_gradient = table if sizes.trains_tables else 0
        backward = max(layer + gradients, (table + 2 * table_gradient) if sizes.trains_tables else 0)
        return {
            phase.FORWARD: {GATHERED: max(layer, table)},
            phase.LOSS: {GATHERED: table + table_gradient},
            phase.BACKWARD: {GATHERED: backward},
            phase.CHECKPOINTING: {GATHERED: layer + gradients},
        }


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a model in elements, but for `layer` and `gradient_bytes`, which are bytes; `layer` is the largest one."""

    elements: int
    trained: int
    gradient_bytes: int
    layer: int
    layer_trained: int
    table: int
    trains_tables: bool


def _measure_model(model: torch.nn.Module) -> _Sizes:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers: dict[str, list[torch.nn.Parameter]] = {}
    tables: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            layers.setdefault(name.split(".layers.")[1].split(".")[0], []).append(parameter)
        elif parameter.ndim > 1:
            tables.append(parameter)
    return _Sizes(
        elements=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in trained),
        gradient_bytes=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        layer=max(sum(p.numel() * p.element_size() for p in layer) for layer in layers.values()),
        layer_trained=max(sum(p.numel() for p in layer if p.requires_grad) for layer in layers.values()),
        table=max(table.numel() for table in tables),
        trains_tables=any(table.requires_grad for table in tables),
    )


def read_sharing(path: Path) -> tuple[Engine, int]:
    """Read engine and number of processes from an accelerate configuration file, or a shipped one by its name.

    Raises:
        MachineError: the file cannot be read, or names an engine that this kit does not train with.
    """
    name, path = str(path), find_launch_file(path)
    if not path.is_file():
        known = [shipped.removeprefix("accelerate/") for shipped in list_launch_files()]
        raise MachineError(
            f"--accelerate: there is no file {name}, and it is {describe_unknown_name(name, known, 'no shipped configuration')}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MachineError(f"{path}: cannot be read as accelerate's configuration ({error})") from error
    if not isinstance(content, Mapping):
        raise MachineError(f"{path}: must be a mapping of keys to values, as in recipes/accelerate/fsdp2.yaml")
    count = content.get("num_processes") or 1
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise MachineError(f"{path}: num_processes: must be a whole number of at least 1; found {count!r}")
    return _read_engine(path, content), count


def _read_engine(path: Path, content: Mapping[str, Any]) -> Engine:
    kind = str(content.get("distributed_type", "NO")).upper()
    if kind == "FSDP":
        if (content.get("fsdp_config") or {}).get("fsdp_version") != 2:
            raise MachineError(f"{path}: FSDP 1 is not supported; set fsdp_version: 2 in fsdp_config")
        return "fsdp2"
    if kind == "DEEPSPEED":
        settings = content.get("deepspeed_config") or {}
        file, stage = settings.get("deepspeed_config_file") or "none", settings.get("zero_stage")
        return ZERO_STAGES[check_stage(str(file), stage)]
    if kind.startswith("MULTI"):
        return "ddp"
    if kind == "NO":
        return "one"
    raise MachineError(f"{path}: distributed_type {kind} is unknown; known are NO, MULTI_GPU, FSDP, DEEPSPEED")
