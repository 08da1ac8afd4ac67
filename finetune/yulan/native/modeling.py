"""The transformers models of the native architecture: Llama's modules, and those in which YuLan-Mini differs.

Importing this module registers the classes. After that, `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` load published
folders of both names (`yulanmini`, `miniyulan`) in any transformers code. `load_native` also loads the published folder whose
`config.json` is not valid JSON, and compares the tensors with the configuration first.

Source: github.com/RUC-GSAI/YuLan-Mini, pretrain/modeling_yulanmini.py at a6fea4b; technical report (arXiv 2412.17743),
section 2; WeSaR (arXiv 2410.05052).
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig, GenerationMixin
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from finetune.yulan.layout import check_tensors, list_native_tensors
from finetune.yulan.native.configuration import (
    CONFIG_CLASSES,
    MiniYuLanConfig,
    YuLanMiniConfig,
    compute_initial_std,
    load_native_config,
)
from finetune.yulan.native.layers import (
    ScaledEmbedding,
    YuLanMiniAttention,
    YuLanMiniDecoderLayer,
    YuLanMiniRMSNorm,
    make_alpha,
    multiply,
)
from finetune.yulan.native.native_loss import ZTerms, compute_fused_loss, compute_loss
from finetune.yulan.tensors import open_tensors


class YuLanMiniPreTrainedModel(LlamaPreTrainedModel):
    """The base class of both models: their configuration, the outputs that transformers can record, and initial weights."""

    config: YuLanMiniConfig
    _no_split_modules = ["YuLanMiniDecoderLayer"]  # noqa: RUF012 - transformers reads these as class attributes
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": YuLanMiniDecoderLayer,
        "attentions": YuLanMiniAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module as the authors do; transformers leaves loaded tensors unchanged."""
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("_alpha"):
                init.constant_(parameter, float(vars(self.config)[name]))
        if isinstance(module, nn.Linear):
            name = next((name for name, candidate in self.named_modules() if candidate is module), "")
            init.normal_(module.weight, mean=0.0, std=compute_initial_std(self.config, name))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=compute_initial_std(self.config, "embed_tokens"))
        elif isinstance(module, YuLanMiniRMSNorm):
            init.constant_(module.weight, 1.0 - module.offset)
        else:
            super()._init_weights(module)  # LayerNorms, and RoPE's buffers


class YuLanMiniModel(YuLanMiniPreTrainedModel):
    """The model from token ids to the last hidden states, without the head."""

    def __init__(self, config: YuLanMiniConfig) -> None:
        super().__init__(config)
        native = config.read_native(Path())
        # Without WeSaR the authors' class does not scale the embedding's gradient either.
        shrink = config.shrink_alpha if native.wesar else 1.0
        self.embed_tokens = ScaledEmbedding(native.vocab_size, native.hidden_size, native.scale_emb, shrink)
        self.embedding_layernorm: nn.Module | None = None
        if native.embedding_norm == "layer":
            self.embedding_layernorm = nn.LayerNorm(native.hidden_size, eps=native.layer_norm_eps, bias=False)
        elif native.embedding_norm == "rms":
            self.embedding_layernorm = YuLanMiniRMSNorm(native)
        self.layers = nn.ModuleList(YuLanMiniDecoderLayer(config, index) for index in range(native.num_layers))
        self.norm = YuLanMiniRMSNorm(native)
        self.register_parameter("norm_alpha", make_alpha(config, "norm_alpha") if native.norm_alphas else None)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]  # transformers' decorators carry no types
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states, (rows, tokens, width); `inputs_embeds` must come from `embed_tokens`.

        A row may hold several packed documents: a new one begins where `position_ids` start again. This works only without
        cached tokens, and with an attention mask that is absent or all ones.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embedding_layernorm is not None:
            states = self.embedding_layernorm(states)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(states.shape[1], device=states.device).unsqueeze(0) + seen
        elif attention_mask is not None and past_key_values is None and bool((attention_mask == 1).all()):
            attention_mask = None  # transformers looks for packed documents only where no mask is given
        # The mask is made before the cache, because with a cache, even an empty one, transformers sees one document in a row.
        # By place, since transformers 5.24 has another name for the fourth.
        mask = create_causal_mask(self.config, states, attention_mask, past_key_values, position_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        rotation = self.rotary_emb(states, position_ids=position_ids)
        for layer in self.layers:
            states = layer(
                states,
                attention_mask=mask,
                position_embeddings=rotation,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        states = self.norm(states, self.norm_alpha, rounds_once=True)
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=past_key_values)


class YuLanMiniForCausalLM(YuLanMiniPreTrainedModel, GenerationMixin):
    """The language model: it computes logits and the loss with its z term, and generates."""

    config: YuLanMiniConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: YuLanMiniConfig) -> None:
        super().__init__(config)
        native = config.read_native(Path())
        self.model = YuLanMiniModel(config)
        self.lm_head = nn.Linear(native.hidden_size, native.vocab_size, bias=False)
        self.register_parameter("lm_head_alpha", make_alpha(config, "lm_head_alpha") if native.wesar else None)
        self.logit_scale = native.dim_model_base_logits / native.hidden_size
        self.loss_function = functools.partial(compute_loss, z_loss=config.z_loss)
        # The default of `skip_logits` in `forward`.
        self.skips_logits = False
        # Where it is set, training without logits adds the z terms of its tokens to it.
        self.z_terms: ZTerms | None = None
        # A hook, because trainers with a fused head multiply the inner model's last hidden state by lm_head.weight themselves.
        self.model.register_forward_hook(self._scale_last_state)
        self.post_init()

    def _scale_last_state(
        self, _: nn.Module, args: tuple[Any, ...], output: BaseModelOutputWithPast
    ) -> BaseModelOutputWithPast:
        """Multiply the last hidden state by the head's factors; the recorded `hidden_states` do not have these factors."""
        output.last_hidden_state = multiply(output.last_hidden_state * self.logit_scale, self.lm_head_alpha)
        return output

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits of the shape (rows, tokens, vocabulary) and, with labels, the loss; the parameters are transformers'.

        With labels and `skip_logits` (Liger's name) the result has no logits, and the loss holds only a few of them at a time.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = loss = None
        if labels is not None and (self.skips_logits if skip_logits is None else skip_logits):
            terms = self.z_terms if self.training else None
            loss = compute_fused_loss(states, self.lm_head.weight, labels, self.config.z_loss, z_terms=terms, **kwargs)
        else:
            logits = self.lm_head(states)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MiniYuLanModel(YuLanMiniModel):
    """The inner model under its other published name."""

    config: MiniYuLanConfig


class MiniYuLanModelForCausalLM(YuLanMiniForCausalLM):
    """The language model under its other published name."""

    config: MiniYuLanConfig


class _FitAlpha(ConversionOps):
    """Reshape a stored alpha to the model's shape, because the same alpha was published as `[]` and as `[1]`."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        shape = kwargs["model"].get_parameter(kwargs["full_layer_name"]).shape
        return {target_patterns[0]: tensor.reshape(shape) if tensor.numel() == 1 else tensor}

    @property
    def reverse_op(self) -> "_FitAlpha":
        return self


for _name in CONFIG_CLASSES:
    register_checkpoint_conversion_mapping(_name, [WeightConverter("_alpha", "_alpha", [_FitAlpha()])], overwrite=True)
AutoModel.register(YuLanMiniConfig, YuLanMiniModel)
AutoModel.register(MiniYuLanConfig, MiniYuLanModel)
AutoModelForCausalLM.register(YuLanMiniConfig, YuLanMiniForCausalLM)
AutoModelForCausalLM.register(MiniYuLanConfig, MiniYuLanModelForCausalLM)


def load_native(folder: Path, *, config: YuLanMiniConfig | None = None, **options: Any) -> YuLanMiniForCausalLM:
    """Load a native checkpoint; `options` are those of `from_pretrained` (`dtype`, `attn_implementation`, …).

    `config` replaces the folder's own; it may differ only in its positions and RoPE.

    Raises:
        CheckpointError: the configuration cannot be read or used, or the tensors do not fit it.
    """
    config = load_native_config(folder) if config is None else config
    optional = frozenset({"lm_head.weight"}) if config.tie_word_embeddings else frozenset()
    check_tensors(open_tensors(folder), list_native_tensors(config.read_native(folder)), optional)
    if not (folder / "generation_config.json").is_file():
        # Otherwise transformers reads config.json again, which fails where that is not valid JSON.
        options.setdefault("generation_config", GenerationConfig.from_model_config(config))
    model: YuLanMiniForCausalLM = AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    return model


def flatten_alphas(model: nn.Module) -> None:
    """Reshape every alpha from `[]` to `[1]`, because FSDP2 shards the first dimension.

    The model computes the same, and the saved alphas can be loaded again.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 0:
                flat = nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad)
                module.register_parameter(name, flat)
