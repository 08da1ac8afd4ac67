"""The modules in which YuLan-Mini differs from Llama: norms, a scaled embedding, and factors on every projection.

Source: github.com/RUC-GSAI/YuLan-Mini, pretrain/modeling_yulanmini.py at a6fea4b.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from finetune.compat import name_attention
from finetune.yulan.layout import NativeConfig
from finetune.yulan.native.configuration import YuLanMiniConfig


def make_alpha(config: YuLanMiniConfig, name: str, shape: tuple[int, ...] = ()) -> nn.Parameter:
    """Make a trainable factor with its initial value from the configuration."""
    return nn.Parameter(torch.full(shape, float(vars(config)[name])))


def multiply(value: torch.Tensor, alpha: torch.Tensor | None) -> torch.Tensor:
    """Multiply a tensor by a factor, or return it unchanged if there is none.

    The factor is reshaped to a scalar, so that it never changes the tensor's type.
    """
    return value if alpha is None else value * alpha.reshape(())


class YuLanMiniRMSNorm(nn.Module):
    """RMSNorm multiplied by `ln_scale` and an alpha; `rms_type: gemma` stores the weight minus 1."""

    def __init__(self, native: NativeConfig) -> None:
        super().__init__()
        self.offset = 1.0 if native.gemma_norm else 0.0
        self.eps, self.ln_scale = native.rms_norm_eps, native.ln_scale
        self.weight = nn.Parameter(torch.full((native.hidden_size,), 1.0 - self.offset))

    def forward(
        self, states: torch.Tensor, alpha: torch.Tensor | None = None, *, rounds_once: bool = False
    ) -> torch.Tensor:
        """Normalise the last dimension in float32 or wider, and round to the input's type where the published runs do.

        They round after each factor. Only the norm after the last layer rounds once, at the end (`rounds_once`).
        """
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        dtype = wide.dtype if rounds_once else states.dtype
        if self.offset:
            normed = normed.to(dtype) * (self.weight + self.offset)
        else:
            normed = (normed * self.weight.to(wide.dtype)).to(dtype)
        return multiply(normed if self.ln_scale == 1 else normed * self.ln_scale, alpha).to(states.dtype)


class YuLanMiniHeadNorm(nn.Module):
    """A LayerNorm without bias for each head; their names `norms.N` are those of the published layout."""

    def __init__(self, heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norms = nn.ModuleList(nn.LayerNorm(head_dim, eps=eps, bias=False) for _ in range(heads))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise queries or keys of the shape (rows, heads, tokens, head_dim), all heads together."""
        weights = torch.stack([*self.norms.parameters()]).unsqueeze(1).to(states.dtype)
        return functional.layer_norm(states, states.shape[-1:], eps=self.eps) * weights


class ScaledEmbedding(nn.Embedding):
    """An embedding whose output is multiplied by `embed_scale`, and whose gradient is also multiplied by `gradient_scale`.

    The module applies the scale itself, so that `inputs_embeds` made with it are what the layers expect. PEFT reads
    `embed_scale` and scales the output of trained token rows by it too.
    """

    def __init__(self, rows: int, width: int, embed_scale: float, gradient_scale: float) -> None:
        super().__init__(rows, width)
        self.embed_scale = embed_scale
        # The published class applies it in this range only.
        self.gradient_scale = gradient_scale if 0 <= gradient_scale < 1 else 1.0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the scaled embeddings, (rows, tokens, width)."""
        states = super().forward(input_ids) * self.embed_scale
        if self.gradient_scale == 1.0:
            return states
        # The difference is exactly 0, so the output is unchanged and only the gradient is scaled.
        fixed = states.detach()
        return fixed + (states - fixed) * self.gradient_scale


class YuLanMiniAttention(LlamaAttention):
    """Llama's attention with an alpha on every projection, another logit scale and, with `qk_layernorm`, head norms."""

    def __init__(self, config: YuLanMiniConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        native = config.read_native(Path())
        # With attention_bias Llama's output projection has a bias too; here it has none.
        self.o_proj = nn.Linear(native.num_heads * native.head_dim, native.hidden_size, bias=False)
        self.scaling = math.sqrt(native.dim_model_base_attn) / native.head_dim
        for name in ("q_proj_alpha", "k_proj_alpha", "v_proj_alpha", "o_proj_alpha"):
            self.register_parameter(name, make_alpha(config, name, (1,)) if native.wesar else None)
        self.q_layernorm = self.k_layernorm = None
        if native.qk_layernorm:
            self.q_layernorm = YuLanMiniHeadNorm(native.num_heads, native.head_dim, native.layer_norm_eps)
            self.k_layernorm = YuLanMiniHeadNorm(native.num_key_value_heads, native.head_dim, native.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attention's output, (rows, tokens, width) like `hidden_states`, and the attention weights."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = multiply(self.q_proj(hidden_states), self.q_proj_alpha).view(heads).transpose(1, 2)
        key = multiply(self.k_proj(hidden_states), self.k_proj_alpha).view(heads).transpose(1, 2)
        value = multiply(self.v_proj(hidden_states), self.v_proj_alpha).view(heads).transpose(1, 2)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        # RoPE runs in float32 or wider and is rounded once, as in the published runs.
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key = (
            rotated.to(value.dtype)
            for rotated in apply_rotary_pos_emb(query.to(wide), key.to(wide), *position_embeddings)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name_attention(self.config), eager_attention_forward)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        mixed = mixed.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return multiply(self.o_proj(mixed), self.o_proj_alpha), weights


class YuLanMiniDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, with factors on the norms, on the MLP's input and output, and on both residual branches."""

    def __init__(self, config: YuLanMiniConfig, layer_idx: int) -> None:
        super().__init__()
        native = config.read_native(Path())
        self.residual_scale = native.residual_scale
        self.self_attn = YuLanMiniAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = YuLanMiniRMSNorm(native)
        self.post_attention_layernorm = YuLanMiniRMSNorm(native)
        for name in ("gate_up_proj_alpha", "down_proj_alpha"):
            self.register_parameter(name, make_alpha(config, name) if native.wesar else None)
        for name in ("input_layernorm_alpha", "post_attention_layernorm_alpha"):
            self.register_parameter(name, make_alpha(config, name) if native.norm_alphas else None)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the hidden states after this layer, (rows, tokens, width)."""
        normed = self.input_layernorm(hidden_states, self.input_layernorm_alpha)
        attended, _ = self.self_attn(normed, **kwargs)
        hidden_states = hidden_states + attended * self.residual_scale
        normed = self.post_attention_layernorm(hidden_states, self.post_attention_layernorm_alpha)
        mixed = multiply(self.mlp(multiply(normed, self.gate_up_proj_alpha)), self.down_proj_alpha)
        return hidden_states + mixed * self.residual_scale
