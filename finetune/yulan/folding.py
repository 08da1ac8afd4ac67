"""Fold a checkpoint of the native architecture into plain Llama weights, exactly.

Every factor of the native forward pass (muP scales, WeSaR alphas, residual and norm scales) is multiplied into a weight that
Llama has too, so the Llama model computes the same function. The arithmetic runs in float64 and is rounded once, to the type that
is written.

Source: the forward pass of the authors' model class (RUC-GSAI/YuLan-Mini); technical report (arXiv 2412.17743), section 2.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.errors import CheckpointError
from finetune.files.folders import check_links, write_folder
from finetune.files.json_files import write_json
from finetune.yulan.layout import (
    NativeConfig,
    check_tensors,
    find_architecture,
    list_native_tensors,
    parse_native_config,
    read_config,
)
from finetune.yulan.shards import Piece, TensorSpec, write_shards
from finetune.yulan.tensors import WEIGHT_DTYPES, TensorFolder, name_dtype, open_tensors
from finetune.yulan.tokenizer_files import copy_tokenizer

DEFAULT_SHARD_BYTES = 2 * 10**9
PAD_TOKEN, EOS_TOKEN, END_OF_TURN = 102, 2, 106
_TIED_COPY = frozenset({"lm_head.weight"})
_EMBEDDING_NORM = "model.embedding_layernorm.weight"
RowMap = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FoldReport:
    """The result of a fold; `bytes` is the size of the weights."""

    output: Path
    dtype: str
    tensors: int
    bytes: int
    seconds: float


def fold_checkpoint(
    source: Path, output: Path, dtype: str = "auto", max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> FoldReport:
    """Write the Llama form of a native checkpoint; `dtype="auto"` keeps the type in which its matrices are stored.

    Raises:
        CheckpointError: the checkpoint cannot be read, is Llama already, or has no Llama form.
        OutputError: the output folder is not empty or cannot be written.
    """
    started = time.monotonic()
    if find_architecture(source) == "llama":
        raise CheckpointError(f"{source}: is stored as Llama already, so there is nothing to fold; use it as it is")
    check_links(source)
    fold = Fold.open(source)
    chosen = fold.tensors.dtype("model.embed_tokens.weight") if dtype == "auto" else WEIGHT_DTYPES[dtype]
    specs = [TensorSpec(name, shape, chosen) for name, shape in list_llama_tensors(fold.config).items()]
    with write_folder(output) as folder:
        size = write_shards(folder, specs, FoldedTensors(fold, chosen), max_shard_bytes)
        write_llama_config(folder, fold.config, chosen)
        copy_tokenizer(source, folder)
    return FoldReport(output, name_dtype(chosen), len(specs), size, round(time.monotonic() - started, 3))


@dataclass(frozen=True)
class Fold:
    """An opened native checkpoint whose tensors can be read in their Llama form; `alphas` and `embedding_norm` are in memory."""

    config: NativeConfig
    tensors: TensorFolder
    alphas: Mapping[str, float]
    embedding_norm: torch.Tensor | None

    @classmethod
    def open(cls, source: Path) -> "Fold":
        """Open a native checkpoint, and check that it is complete and can be folded.

        Raises:
            CheckpointError: see `fold_checkpoint`.
        """
        config = parse_native_config(read_config(source), source)
        if config.qk_layernorm:
            raise CheckpointError(
                f"{source}: qk_layernorm normalises queries and keys, which Llama cannot express; this checkpoint cannot be folded"
            )
        tensors = open_tensors(source)
        check_tensors(tensors, list_native_tensors(config), _TIED_COPY if config.tied else frozenset())
        alphas = {name: float(tensors.read(name).double()) for name in tensors.names if name.endswith("_alpha")}
        norm = None if config.embedding_norm == "none" else tensors.read(_EMBEDDING_NORM).double()
        return cls(config, tensors, alphas, norm)

    def find_stored_name(self, name: str) -> str:
        """Return the name of the native tensor from which a Llama tensor is computed."""
        return "model.embed_tokens.weight" if name == "lm_head.weight" and self.config.tied else name

    def read_rows(self, piece: Piece) -> torch.Tensor:
        """Read the native rows from which rows of a Llama tensor are computed."""
        if piece.name.endswith(
            "o_proj.bias"
        ):  # Llama's attention_bias adds a bias here; the native architecture has none
            return torch.zeros(piece.stop - piece.start)
        return self.tensors.read_rows(self.find_stored_name(piece.name), piece.start, piece.stop)

    def fold_rows(self, name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Compute rows of a Llama tensor from native rows, in float64, and round them once.

        Raises:
            CheckpointError: the stored rows are damaged, or too large for `dtype`.
        """
        folded = self._find_row_map(name)(rows.double()).to(dtype)
        # Minimum and maximum are NaN if any number is, and computing them needs no second copy.
        if not torch.stack(torch.aminmax(folded)).isfinite().all():
            raise CheckpointError(
                f"{self.tensors.folder}: {self.find_stored_name(name)} gives NaN or infinite values as {dtype}; "
                "download it again, or if that does not help, fold with --dtype float32"
            )
        return folded

    def find_alpha(self, name: str) -> float | None:
        """Return the stored alpha of a Llama tensor, or None where it has none: those in the configuration are initial values only."""
        return self.alphas.get(_name_alpha(name))

    def find_factor(self, name: str) -> float:
        """Return the number that a Llama tensor's rows are multiplied by, after any norm or shift."""
        config, alpha = self.config, self.find_alpha(name)
        alpha = 1.0 if alpha is None else alpha
        if name == "model.embed_tokens.weight":
            return config.scale_emb
        if name == "lm_head.weight":
            return alpha * config.dim_model_base_logits / config.hidden_size
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return alpha * config.residual_scale
        if "norm" in name:
            return config.ln_scale * alpha
        if ".q_proj." in name:
            # The native model scales attention logits by sqrt(dim_model_base_attn) / head_dim, Llama by 1 / sqrt(head_dim).
            return alpha * math.sqrt(config.dim_model_base_attn / config.head_dim)
        return alpha

    def is_multiple(self, name: str) -> bool:
        """Tell whether a Llama tensor is the stored one times `find_factor`, and nothing else."""
        if name == "model.embed_tokens.weight":
            return self.embedding_norm is None
        return not (self.config.gemma_norm and "norm" in name)

    def _find_row_map(self, name: str) -> RowMap:
        """Return the function that folds rows of a tensor; it never mixes numbers of different rows."""
        if name == "model.embed_tokens.weight":
            return self._map_embedding()
        if name.endswith("o_proj.bias"):
            return lambda rows: rows
        factor = self.find_factor(name)
        if "norm" in name:
            return lambda rows: self._shift_norm(rows) * factor
        return lambda rows: rows * factor

    def _map_embedding(self) -> RowMap:
        config, weight = self.config, self.embedding_norm
        if weight is None:
            return lambda rows: rows * config.scale_emb

        # These norms act on each row of the embedding table alone, so the table can hold the normalised rows.
        def normalise(rows: torch.Tensor) -> torch.Tensor:
            rows = rows * config.scale_emb
            if config.embedding_norm == "layer":
                rows = rows - rows.mean(dim=1, keepdim=True)
                return rows * (rows.square().mean(dim=1, keepdim=True) + config.layer_norm_eps).rsqrt() * weight
            scale = self._shift_norm(weight) * config.ln_scale
            return rows * (rows.square().mean(dim=1, keepdim=True) + config.rms_norm_eps).rsqrt() * scale

        return normalise

    def _shift_norm(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 1 if self.config.gemma_norm else weight


@dataclass(frozen=True)
class FoldedTensors:
    """The Llama tensors of a fold, as a source of rows for `write_shards`."""

    fold: Fold
    dtype: torch.dtype

    def needs_whole(self, name: str) -> bool:
        """Return False: the fold never mixes numbers of different rows."""
        return False

    def make_rows(self, piece: Piece) -> torch.Tensor:
        """Read native rows and fold them.

        Raises:
            CheckpointError: see `Fold.fold_rows`.
        """
        return self.fold.fold_rows(piece.name, self.fold.read_rows(piece), self.dtype)


def _name_alpha(name: str) -> str:
    """Return the name of the native alpha that belongs to a Llama tensor."""
    module = name.rpartition(".")[0]
    if module.endswith((".gate_proj", ".up_proj")):
        return f"{module.rpartition('.mlp.')[0]}.gate_up_proj_alpha"
    return f"{module.replace('.mlp.down_proj', '.down_proj')}_alpha"


def list_llama_tensors(config: NativeConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the folded model's tensors, in the order of the layers."""
    width, inner = config.hidden_size, config.intermediate_size
    rows = config.num_heads * config.head_dim
    key_rows = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (width,)
        for name, extents in {
            "q": (rows, width),
            "k": (key_rows, width),
            "v": (key_rows, width),
            "o": (width, rows),
        }.items():
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = extents
            if config.attention_bias:
                shapes[f"{prefix}.self_attn.{name}_proj.bias"] = extents[:1]
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
        for name, extents in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = extents
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def write_llama_config(folder: Path, config: NativeConfig, dtype: torch.dtype) -> None:
    """Write `config.json` and `generation_config.json` of the folded model."""
    content = describe_llama_config(config, dtype)
    tokens: dict[str, Any] = {
        name: content[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in content
    }
    stops = [EOS_TOKEN, END_OF_TURN] if config.vocab_size > END_OF_TURN else [EOS_TOKEN]
    write_json(folder / "config.json", content)
    write_json(folder / "generation_config.json", {**tokens, "eos_token_id": stops})


def describe_llama_config(config: NativeConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of `config.json` of the folded model."""
    tokens: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": EOS_TOKEN}
    if config.vocab_size > END_OF_TURN:
        tokens["pad_token_id"] = PAD_TOKEN
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        # Both forms: transformers 4.x and mlx-lm read only the first, transformers 5 writes only the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        # Both names, because servers with an older transformers read only the first.
        "torch_dtype": name_dtype(dtype),
        "dtype": name_dtype(dtype),
        **tokens,
    }
