"""What the tests of faster training share: a way that counts as faster, and as there."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
import transformers.modeling_flash_attention_utils as utils
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

from finetune.training.speed import flash_attention
from finetune.training.speed.ways import WAYS

PRODUCTS = "bfloat16 products"


@pytest.fixture(autouse=True)
def plain_processor(monkeypatch):
    """Let this processor have no instructions for bfloat16, whichever it is."""
    monkeypatch.setitem(WAYS, PRODUCTS, replace(WAYS[PRODUCTS], find_missing=lambda device: "an old processor"))


@pytest.fixture
def let_win(monkeypatch):
    """Return a function that lets a way count as faster, whatever the clock of a busy machine says."""

    def win(name):
        monkeypatch.setitem(WAYS, name, replace(WAYS[name], faster=math.inf))

    return win


@pytest.fixture
def install(monkeypatch):
    """Return a function that lets these ways count as installed here, and as faster, and leaves the others out."""

    def there(*names):
        for name, way in WAYS.items():
            missing = None if name in names else "left out"
            monkeypatch.setitem(WAYS, name, replace(way, faster=math.inf, find_missing=lambda device, m=missing: m))

    return there


def attend(query, key, value, scale, causal):
    """Return causal attention in float32, rounded at the end: (rows, tokens, heads, width), with fewer heads of keys and values."""
    assert causal
    key, value = (part.repeat_interleave(query.shape[2] // key.shape[2], dim=2).float() for part in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key) * scale
    tokens = torch.arange(query.shape[1])
    scores = scores.masked_fill(tokens[None, :] > tokens[:, None], -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).to(query.dtype)


@dataclass
class StandIn:
    """Plain arithmetic in the place of flash_attn's two functions: what they are asked is kept, as (number of documents, gradients on).

    `orders` holds whether passes with gradients were asked to add in the same order each time.
    """

    calls: list = field(default_factory=list)
    orders: set = field(default_factory=set)
    keeps_apart: bool = True

    def _keep(self, documents, has_gradients, deterministic):
        self.calls.append((documents, has_gradients))
        self.orders |= {deterministic} if has_gradients else set()

    def dense(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False):
        """Stand for `flash_attn_func`: rows of equal length without padding."""
        assert q.dtype == torch.bfloat16
        self._keep(len(q), torch.is_grad_enabled(), deterministic)
        return attend(q, k, v, softmax_scale, causal)

    def ragged(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        deterministic=False,
    ):
        """Stand for `flash_attn_varlen_func`: documents one after another, (tokens, heads, width)."""
        assert q.dtype == torch.bfloat16
        lengths = cu_seqlens_q.diff().tolist()
        assert sum(lengths) == len(q) == len(k)
        assert int(max_seqlen_q) == int(max_seqlen_k) == max(lengths)
        self._keep(len(lengths), torch.is_grad_enabled(), deterministic)
        if not self.keeps_apart:
            lengths = [len(q)]
        parts = zip(*(part.split(lengths) for part in (q, k, v)), strict=True)
        return torch.cat([attend(*(part[None] for part in three), softmax_scale, causal)[0] for three in parts])


@pytest.fixture
def flash(monkeypatch, install):
    """Let transformers' own flash attention, under another name, call a stand-in for the package; the way "flash attention" uses it.

    What transformers cuts, tells and puts back is its own code; only the two kernels are replaced.
    """
    stand_in = StandIn()
    functions = (stand_in.dense, stand_in.ragged, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *names, **options: functions)
    monkeypatch.setitem(AttentionInterface._global_mapping, "stand_in", flash_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "stand_in", flash_attention_mask)
    monkeypatch.setattr(flash_attention, "KERNEL", "stand_in")
    install("flash attention")
    return stand_in
