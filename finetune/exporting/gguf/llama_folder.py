"""Open a Llama folder for writing as GGUF: weights, configuration, tokenizer and chat template, each checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.encoding.template import find_template, keep_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.formats.rows import TextSample
from finetune.errors import CheckpointError, ExportError, describe_count
from finetune.exporting.chat_form import ChatForm
from finetune.exporting.gguf.vocabulary import Vocabulary, read_vocabulary
from finetune.yulan.layout import find_architecture, read_config
from finetune.yulan.llama_files import DEFAULT_POSITIONS, HEAD, is_tied, open_llama_tensors, read_rope, ties_head
from finetune.yulan.tensors import TensorFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GENERATION_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


@dataclass(frozen=True)
class LlamaFolder:
    """A Llama folder whose parts fit one another; `names` maps its tensors to llama.cpp's names, in the order of layers.

    `rows` are rows that were trained, where the run that it was made of stored any.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: TensorFolder
    names: Mapping[str, str]
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    rows: tuple[TextSample, ...] = ()

    @property
    def head_dim(self) -> int:
        """The values of a head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def context(self) -> int:
        """The number of tokens that a text may have."""
        return int(self.config.get("max_position_embeddings") or DEFAULT_POSITIONS)

    @cached_property
    def form(self) -> ChatForm:
        """The chat template of the folder to the letter, or the kit's where it has none, and the tokens that end an answer."""
        kept = keep_template(self.tokenizer)
        return ChatForm(self.folder, kept.template, kept.source, kept.added)

    @cached_property
    def template(self) -> ChatTemplate:
        """The template that samples are encoded with: the folder's, or the kit's where its own cannot be encoded with."""
        return self.form.template or find_template("auto", self.tokenizer)

    @cached_property
    def stop_tokens(self) -> list[int]:
        """The ids of the tokens that end an answer."""
        # A generation_config.json may name tokens that there are not.
        return [token for token in self.form.list_stops(self.folder) if 0 <= token < len(self.vocabulary.pieces)]


def open_llama_folder(folder: Path, rows: tuple[TextSample, ...] = ()) -> LlamaFolder:
    """Open a folder and compare its configuration, its tensors and its tokenizer with one another; `rows` were trained.

    Raises:
        CheckpointError: the folder is not a checkpoint, or it is damaged.
        ExportError: it is no Llama model that llama.cpp can run, or its tokenizer cannot be expressed there.
    """
    if find_architecture(folder) != "llama":
        raise ExportError(
            f"{folder}: is stored in the native architecture; write the Llama form first: finetune fold {folder} -o DIR"
        )
    config = read_config(folder)
    tensors = open_llama_tensors(folder)
    _check_config(folder, config)
    names = _name_tensors(tensors, tied=is_tied(config))
    # transformers makes an empty tokenizer of LlamaTokenizer's settings alone.
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder}: holds no tokenizer.json, from which a GGUF file's vocabulary is made; copy it there"
        )
    tokenizer = load_tokenizer(folder)
    vocabulary = read_vocabulary(folder, tokenizer)
    if len(vocabulary.pieces) > config["vocab_size"]:
        raise ExportError(
            f"{folder}: the tokenizer has {describe_count(len(vocabulary.pieces), 'token')} and the table only {describe_count(config['vocab_size'], 'row')}; the two "
            "do not belong together"
        )
    return LlamaFolder(folder, config, tensors, names, tokenizer, vocabulary, rows)


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what a GGUF file of the architecture `llama` cannot say.

    Raises:
        ExportError: the message lists every fault.
    """
    faults, rope = [], read_rope(config)
    if config.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act is {config['hidden_act']!r}; llama.cpp computes silu")
    if rope["rope_type"] not in ("default", "linear"):
        faults.append(f"rope_type is {rope['rope_type']!r}; default and linear are known")
    if rope["rope_type"] == "linear" and not isinstance(rope.get("factor"), int | float):
        faults.append(f"the factor of linear RoPE is {rope.get('factor')!r}, and must be a number")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        faults.append("partial_rotary_factor is set; whole heads are turned here")
    if faults:
        raise ExportError(f"{folder / 'config.json'}: {'; '.join(faults)}")


def _name_tensors(tensors: TensorFolder, *, tied: bool) -> dict[str, str]:
    """Return llama.cpp's names by the folder's: the embedding, the layers in their order, the last norm, and a head of its own."""
    names = [name for name in tensors.names if name in _TOP_NAMES or _LAYER.fullmatch(name)]
    if ties_head(tensors, tied=tied):
        names = [name for name in names if name != HEAD]
    tops = list(_TOP_NAMES)

    def find_place(name: str) -> tuple[int, int, str]:
        layer = _LAYER.fullmatch(name)
        return (0, int(layer[1]), name) if layer else (tops.index(name) or -1, 0, name)

    return {name: _rename(name) for name in sorted(names, key=find_place)}


def _rename(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    found = _LAYER.fullmatch(name)
    assert found is not None
    return f"blk.{found[1]}.{_LAYER_NAMES[found[2]]}.{found[3]}"


def remove_training_marks(template: str) -> str:
    """Return a chat template without the marks of what is trained, which only transformers knows.

    Each becomes an empty comment, so that white space around it is treated as before.
    """
    return _GENERATION_MARK.sub(lambda mark: f"{{#{mark[1]} {mark[2]}#}}", template)
