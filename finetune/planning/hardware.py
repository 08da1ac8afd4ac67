"""The GPUs that a plan can be made for, and what their memory holds besides tensors. Never imports torch."""

import re
from dataclasses import dataclass

from finetune.errors import MachineError, describe_unknown_name
from finetune.files.sizes import GIB, MIB

# The CUDA context with the kernels that a run loads: 426 MiB before the first kernel (pull request 1053 of
# unslothai/unsloth-zoo), about 400 MB with few kernels (issue 109888 of pytorch/pytorch). No run of ours has shown more yet.
CONTEXT_BYTES = 512 * MIB
# The workspaces of cuBLAS on the newest cards: 32 MiB for each of the two threads that compute, the second of which runs the backward
# pass, and 2 MiB beside them. Source: aten/src/ATen/cuda/CublasHandlePool.cpp of torch 2.13, and benchmarks/gpu.md.
CUBLAS_BYTES = 66 * MIB
# NCCL's channels between processes, 4 MiB each by default (NCCL_BUFFSIZE). Their number depends on the wiring, so this is an assumption.
NCCL_BYTES = 256 * MIB
# The share of live tensors that the caching allocator may hold in gaps. With segments that grow, which `finetune` asks for, an H100
# held 3 % (one row of 2,048 tokens) to 9 % (packed rows) more than it had given out, some of which it would have freed in need.
# Segments of a fixed size held 2 to 25 % more, and 36 % for DPO (benchmarks/gpu.md).
FRAGMENTATION = 0.05
# The share of the published rate that training reaches. An assumption: kernels of usual shapes reach 30 to 50 %.
UTILISATION = 0.35


@dataclass(frozen=True)
class Card:
    """One GPU: memory in GiB as sold, dense 16-bit matrix TFLOPS with float32 sums as published."""

    name: str
    memory_gib: float
    tflops: float
    has_bf16: bool = True

    @property
    def memory_bytes(self) -> int:
        """Return the memory in bytes."""
        return int(self.memory_gib * GIB)


# Source: NVIDIA's data sheets, and for GeForce the whitepapers of each architecture (Turing, Ampere GA102, Ada, Blackwell).
# A100, H100, L40S, RTX 3090, 4090 and 5090 agree with tables that other kits publish. The other GeForce cards from Ampere on
# follow the rule that those keep: twice the published float32 rate. The rest is unchecked.
# Laptop cards are listed at their highest power; most are sold with less.
CARDS: tuple[Card, ...] = (
    Card("RTX 2060", 6, 25.8, has_bf16=False),
    Card("RTX 3050", 8, 18.2),
    Card("RTX 3060", 12, 25.5),
    Card("RTX 3080", 10, 59.5),
    Card("RTX 3090", 24, 71.0),
    Card("RTX 4050 Laptop", 6, 24.3),
    Card("RTX 4060 Laptop", 8, 29.1),
    Card("RTX 4060", 8, 30.2),
    Card("RTX 4060 Ti 16GB", 16, 44.1),
    Card("RTX 4070", 12, 58.3),
    Card("RTX 4080", 16, 97.5),
    Card("RTX 4090", 24, 165.2),
    Card("RTX 5060", 8, 38.4),
    Card("RTX 5070", 12, 61.7),
    Card("RTX 5080", 16, 112.6),
    Card("RTX 5090", 32, 209.5),
    Card("T4", 16, 65.0, has_bf16=False),
    Card("V100", 32, 125.0, has_bf16=False),
    Card("L4", 24, 121.0),
    Card("A10", 24, 125.0),
    Card("L40S", 48, 362.0),
    Card("A100 40GB", 40, 312.0),
    Card("A100", 80, 312.0),
    Card("A800", 80, 312.0),
    Card("H100", 80, 989.0),
    Card("H200", 141, 989.0),
)
# A plan that names no card gives times for these.
TYPICAL_CARDS = ("RTX 4060 Laptop", "RTX 3090", "RTX 4090", "A100", "H100")


def find_card(name: str) -> Card:
    """Return a card by its name; upper and lower case and the maker's name make no difference.

    Raises:
        MachineError: the table has no such card.
    """
    wanted = _simplify(name)
    for card in CARDS:
        if _simplify(card.name) == wanted:
            return card
    close = describe_unknown_name(wanted, [_simplify(card.name) for card in CARDS])
    raise MachineError(f"the GPU {name!r} is {close}; or give its memory, such as 8GB")


def _simplify(name: str) -> str:
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    return " ".join(word for word in words if word not in ("nvidia", "geforce", "gpu", "tesla"))
