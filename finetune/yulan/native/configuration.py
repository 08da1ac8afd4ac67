"""The transformers configurations of the native architecture, one for each of its two published names.

Published configurations have some keys without an effect here. They are kept, so that a saved folder equals the one that was read:

    embed_tokens_alpha, use_emb_alpha      the published class never creates such a parameter
    dim_model_base                         the published configuration class only checks it; the logits use dim_model_base_logits
    use_liger                              selected the authors' kernels, which compute the same
    gradient_checkpointing_step            selected the layers with gradient checkpointing; here transformers' switch decides
    dim_model_base_lr                      a learning rate, which only an optimizer uses
    num_steps_, num_epochs_trained_…       a record of the run that wrote the folder

Source: github.com/RUC-GSAI/YuLan-Mini (the configuration class beside pretrain/modeling_yulanmini.py); the published configurations.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from finetune.errors import CheckpointError
from finetune.yulan.layout import PUBLISHED_SIZES, NativeConfig, parse_native_config, read_config

ALPHAS = (
    "q_proj_alpha",
    "k_proj_alpha",
    "v_proj_alpha",
    "o_proj_alpha",
    "gate_up_proj_alpha",
    "down_proj_alpha",
    "input_layernorm_alpha",
    "post_attention_layernorm_alpha",
    "norm_alpha",
    "lm_head_alpha",
)
# Keys that the model uses in addition to NativeConfig; their values must be numbers.
_NUMBERS = (*ALPHAS, "z_loss", "shrink_alpha", "initializer_range", "init_scale_o", "attention_dropout")
_OPTIONAL_NUMBERS = ("dim_model_base_init", "dim_model_base_lmh")


class YuLanMiniConfig(PreTrainedConfig):
    """The published configuration; defaults are the sizes of the 2.42 B model and the published class's factors of 1.

    The `*_alpha` values are initial values. The forward pass of a loaded model uses only its parameters.

    Raises:
        CheckpointError: on construction, if values are impossible or set something that the published class cannot compute.
    """

    model_type = "yulanmini"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers reads it as a class attribute
    mlp_bias = False  # transformers' LlamaMLP reads it; this architecture has no such bias

    vocab_size: int = PUBLISHED_SIZES["vocab_size"]
    hidden_size: int = PUBLISHED_SIZES["hidden_size"]
    intermediate_size: int = PUBLISHED_SIZES["intermediate_size"]
    num_hidden_layers: int = PUBLISHED_SIZES["num_hidden_layers"]
    num_attention_heads: int = PUBLISHED_SIZES["num_attention_heads"]
    num_key_value_heads: int = PUBLISHED_SIZES["num_key_value_heads"]
    max_position_embeddings: int = 4_096
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-6
    rms_type: str = "llama"
    hidden_act: str = "silu"
    attention_bias: bool = True
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    use_sliding_window: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    scale_emb: float = 1.0
    shrink_alpha: float = 1
    hidden_states_shrink: float | str = 1
    ln_scale: float = 1
    dim_model_base_attn: float | None = None
    dim_model_base_logits: float | None = None
    qk_layernorm: bool = False
    embedding_ln: bool = False
    embedding_rmsln: bool = False
    z_loss: float = 1e-4

    wesar_weights: bool = True
    use_norm_alpha: bool = True
    q_proj_alpha: float = 1.0
    k_proj_alpha: float = 1.0
    v_proj_alpha: float = 1.0
    o_proj_alpha: float = 1.0
    gate_up_proj_alpha: float = 1.0
    down_proj_alpha: float = 1.0
    input_layernorm_alpha: float = 1.0
    post_attention_layernorm_alpha: float = 1.0
    norm_alpha: float = 1.0
    lm_head_alpha: float = 1.0

    initializer_range: float = 0.014434
    init_scale_o: float = 10.582218
    model_reproduce: str = "transformer"
    dim_model_base_init: float | None = None
    dim_model_base_lmh: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the values."""
        super().__post_init__(**kwargs)
        self.read_native(Path())

    def read_native(self, folder: Path) -> NativeConfig:
        """Return the values that the forward pass depends on; `folder` is named in the error message.

        Raises:
            CheckpointError: the values are impossible; the message lists every fault.
        """
        faults = [
            f"{name} must be a number; found {value!r}"
            for name in (*_NUMBERS, *_OPTIONAL_NUMBERS)
            if not _is_number(value := vars(self)[name]) and not (value is None and name in _OPTIONAL_NUMBERS)
        ]
        if faults:
            raise CheckpointError(f"{folder / 'config.json'}: {'; '.join(faults)}")
        return parse_native_config(self.to_published(), folder)

    def to_published(self) -> dict[str, Any]:
        """Return the values under their published names; transformers holds both RoPE keys in `rope_parameters`."""
        content = {**vars(self), "model_type": self.model_type}
        return _rename_published(content)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the content of a saved `config.json`: the published keys with the values that were read."""
        content = _rename_published(super().to_diff_dict())
        if "dtype" in content:
            content["torch_dtype"] = content.pop("dtype")
        if self.pad_token_id is None:
            content.pop("pad_token_id", None)  # the published files have no such key
        return content


class MiniYuLanConfig(YuLanMiniConfig):
    """The same configuration under the name that some checkpoints were published with."""

    model_type = "miniyulan"


CONFIG_CLASSES: Mapping[str, type[YuLanMiniConfig]] = {
    config.model_type: config for config in (YuLanMiniConfig, MiniYuLanConfig)
}
for _config in CONFIG_CLASSES.values():
    AutoConfig.register(_config.model_type, _config)


def load_native_config(folder: Path) -> YuLanMiniConfig:
    """Read a published folder's configuration, also with stray commas in its JSON, which transformers cannot read.

    Raises:
        CheckpointError: the configuration is missing, has impossible values, or is of another architecture.
    """
    content = read_config(folder)
    model_type = content.pop("model_type", None)
    if model_type not in CONFIG_CLASSES:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {model_type!r}; the native architecture is {' or '.join(CONFIG_CLASSES)}"
        )
    parse_native_config(content, folder)  # before the class checks the same values, so that an error names the folder
    return CONFIG_CLASSES[model_type](**content)


def compute_initial_std(config: YuLanMiniConfig, name: str) -> float:
    """Return the standard deviation of a matrix's initial values; `name` ends in the name of its module.

    In WeSaR the alphas hold the scales, so the published runs draw all matrices with `initializer_range`. The other cases are
    those of muP: the width relative to `dim_model_base_init`, and for the head `dim_model_base_lmh`.
    Source: `_init_weights` of pretrain/modeling_yulanmini.py at a6fea4b.
    """
    std, name = config.initializer_range, name.rpartition(".")[2]
    if name == "embed_tokens":
        return std if config.tie_word_embeddings else 1.0
    if config.model_reproduce == "transformer":
        return std
    if name == "lm_head":
        return std if config.tie_word_embeddings else std / math.sqrt(config.dim_model_base_lmh or 1)
    writes_residual = name in ("o_proj", "down_proj")
    if writes_residual:
        std /= config.init_scale_o
    if config.dim_model_base_init is None:
        return std
    width = config.hidden_size / config.dim_model_base_init
    if writes_residual and config.model_reproduce == "cerebras":
        width *= 2 * config.num_hidden_layers
    return std / math.sqrt(width)


def _rename_published(content: dict[str, Any]) -> dict[str, Any]:
    rope = content.pop("rope_parameters", None) or {}
    plain = rope.get("rope_type", "default") == "default"
    return {**content, "rope_theta": rope.get("rope_theta", 10_000.0), "rope_scaling": None if plain else rope}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
