"""One transformer block, over the tokens [history | noisy].

# B batch, L tokens, D width, H heads, K head dim, T text tokens, S segments: row 0 history, row 1 noisy
Source: Diffusers HeliosTransformerBlock, HeliosAttnProcessor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helios_engine.config import ModelConfig
from helios_engine.ops import native as ops
from helios_engine.ops.attention import Attention
from helios_engine.ops.fp8 import Fp8Linear
from helios_engine.ops.gemm import TunedGemms
from helios_engine.ops.reference import EightBitRows

Normed = Tensor | EightBitRows
_MAX_HISTORY_SCALE = 10.0


# What a block's weights can be divided into: a large layer each, with the small parameters used beside it.
PARTS = {
    "qkv": ("qkv", "norm_q", "norm_k", "history_key_scale"),
    "out": ("out",),
    "cross_kv": ("cross_kv", "cross_norm_k"),
    "cross_q": ("cross_q", "cross_norm_q"),
    "cross_out": ("cross_out",),
    "ffn_up": ("ffn_up",),
    "ffn_down": ("ffn_down",),
}


@dataclass(frozen=True, slots=True)
class Modulation:
    """A block's AdaLN rows, float32 [2, D] each; weights are 1 + scale.

    middle is the norm after self-attention: rows that attend to the text take the text norm's own weight and bias, the
    others already the feed-forward's. None where the model has no text norm.
    """

    attention_bias: Tensor
    attention_weight: Tensor
    attention_gate: Tensor
    feed_forward_bias: Tensor
    feed_forward_weight: Tensor
    feed_forward_gate: Tensor
    middle_weight: Tensor | None
    middle_bias: Tensor | None


class Block(nn.Module):
    """Self-attention over all tokens, cross-attention of the noisy tokens to the text, feed-forward.

    The three parts are separate calls that change x in place, because callers share, cache and skip them apart: the
    first block's history rows are the same in every step, the last block's need no query and no feed-forward.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads, self.head_dim, self.eps = config.num_attention_heads, config.attention_head_dim, config.eps
        self.qkv = nn.Linear(dim, 3 * dim, dtype=dtype)
        self.norm_q = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.norm_k = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.out = nn.Linear(dim, dim, dtype=dtype)
        self.history_key_scale: nn.Parameter | None = None
        if config.is_amplify_history:
            num_scales = self.num_heads if config.history_scale_mode == "per_head" else 1
            self.history_key_scale = nn.Parameter(torch.empty(num_scales, dtype=torch.float32))
        self.cross_q = nn.Linear(dim, dim, dtype=dtype)
        self.cross_kv = nn.Linear(dim, 2 * dim, dtype=dtype)
        self.cross_norm_q = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.cross_norm_k = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.cross_out = nn.Linear(dim, dim, dtype=dtype)
        self.ffn_up = nn.Linear(dim, config.ffn_dim, dtype=dtype)
        self.ffn_down = nn.Linear(config.ffn_dim, dim, dtype=dtype)
        self.fetch: Callable[[str], None] | None = None  # has a part's weights brought; see PARTS
        self.gemms: TunedGemms | None = None  # multiplies in torch's place

    def parts(self) -> dict[str, tuple[str, ...]]:
        """The names of every part's parameters, parts in the order they are computed with."""
        names = [name for name, _ in self.named_parameters()]
        return {part: tuple(name for name in names if name.split(".")[0] in members) for part, members in PARTS.items()}

    def _need(self, part: str) -> None:
        if self.fetch is not None:
            self.fetch(part)

    def history_scale(self) -> Tensor | None:
        """Factor of each head's history keys [H] float32, or None where the model has none."""
        if self.history_key_scale is None:
            return None
        scale = 1.0 + torch.sigmoid(self.history_key_scale) * (_MAX_HISTORY_SCALE - 1.0)
        return scale.expand(self.num_heads)

    def normed(self, x_BLD: Tensor, rows: Modulation, *, num_history: int) -> Normed:
        """x as project takes it."""
        return ops.norm_scale_shift(
            *(x_BLD, rows.attention_weight, rows.attention_bias),
            num_history=num_history,
            eps=self.eps,
            out=self._room_for(x_BLD),
        )

    def project(
        self,
        h_BLD: Normed,
        rotation_LK2: Tensor,
        *,
        num_history: int,
        first_query: int = 0,
        heads: tuple[int, ...] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Normalised, rotated q, k and plain v of normed rows, side by side: [B, L, 3 D], in out where it is given.

        Queries of the rows before first_query are neither normalised nor rotated: nobody reads them. heads asks for the
        flat send buffer of a head exchange instead (ops.qk_rms_norm_rope_pack).
        """
        self._need("qkv")
        # One product for all rows: leaving out the queries that nobody reads takes two, and a copy to join them.
        qkv = self._linear(self.qkv, h_BLD, out=out)
        rows = (qkv, self.norm_q, self.norm_k, rotation_LK2)
        scale = self.history_scale()
        if heads is not None:
            return ops.qk_rms_norm_rope_pack(
                *rows, heads, eps=self.eps, history_scale_H=scale, num_history=num_history, first_query=first_query
            )
        ops.qk_rms_norm_rope_(
            *rows, eps=self.eps, history_scale_H=scale, num_history=num_history, first_query=first_query
        )
        return qkv

    def attend_self_(
        self,
        x_BlD: Tensor,
        rows: Modulation,
        *,
        num_history: int,
        noisy_only: bool,
        attend: Callable[[], Tensor],
    ) -> Normed | None:
        """x += gate * self-attention, for all rows or for the noisy ones alone; returns those rows through the middle norm.

        attend() gives the attended rows [B, l, H, K]; it may talk to other ranks. Without a text norm nothing is returned.
        """
        skipped = num_history if noisy_only else 0
        attended = attend().flatten(2)
        self._need("out")
        update = self._linear(self.out, attended)
        del attended
        own, gate = x_BlD[:, skipped:], rows.attention_gate
        if rows.middle_weight is None:
            ops.gated_residual_(own, update, gate, num_history=num_history - skipped)
            return None
        return ops.residual_gate_norm_(
            *(own, update, gate, rows.middle_weight, rows.middle_bias),
            num_history=num_history - skipped,
            eps=self.eps,
            out=self._room_for(own),
        )

    def text_keys_values(self, text_BTD: Tensor) -> Tensor:
        """Keys and values of the prompt, side by side [B, T, 2 D]; they depend on nothing else."""
        self._need("cross_kv")
        kv = self.cross_kv(text_BTD)
        ops.rms_norm_(kv.chunk(2, dim=-1)[0], self.cross_norm_k, eps=self.eps)
        return kv

    def attend_text_(
        self,
        x_BLD: Tensor,
        h_BLD: Normed | None,
        text_kv_BTD: Tensor,
        rows: Modulation,
        *,
        num_history: int,
        attention: Attention,
    ) -> None:
        """x += cross-attention to the text; h, the same rows through the middle norm, becomes what feed_forward_ takes.

        There is no mask: padding rows are attended to, as the model was trained.
        """
        self._need("cross_q")
        q_BLD = self._linear(self.cross_q, x_BLD if h_BLD is None else h_BLD)
        ops.rms_norm_(q_BLD, self.cross_norm_q, eps=self.eps)
        k, v = text_kv_BTD.unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        attended = attention(q_BLD.unflatten(-1, (self.num_heads, self.head_dim)), k, v).flatten(2)
        self._need("cross_out")
        update = self._linear(self.cross_out, attended)
        del attended
        if h_BLD is None:
            ops.gated_residual_(x_BLD, update, None, num_history=0)
            return
        ops.residual_gate_norm_(
            *(x_BLD, update, None, rows.feed_forward_weight, rows.feed_forward_bias),
            num_history=num_history,
            eps=self.eps,
            out=h_BLD,
        )

    def feed_forward_(
        self, x_BLD: Tensor, h_BLD: Normed | None, rows: Modulation, following: Modulation | None, *, num_history: int
    ) -> Normed | None:
        """x += gate * feed-forward; returns x as the following block's project takes it, where there is one.

        h is x through the feed-forward's norm, or None to have it computed.
        """
        if h_BLD is None:
            h_BLD = ops.norm_scale_shift(
                *(x_BLD, rows.feed_forward_weight, rows.feed_forward_bias),
                num_history=num_history,
                eps=self.eps,
                out=self._room_for(x_BLD),
            )
        self._need("ffn_up")
        hidden = self._linear(self.ffn_up, h_BLD, gelu=True)
        self._need("ffn_down")
        update, gate = self._linear(self.ffn_down, hidden), rows.feed_forward_gate
        del hidden  # by far the largest
        if following is None:
            ops.gated_residual_(x_BLD, update, gate, num_history=num_history)
            return None
        return ops.residual_gate_norm_(
            *(x_BLD, update, gate, following.attention_weight, following.attention_bias),
            num_history=num_history,
            eps=self.eps,
            out=self._room_for(x_BLD),
        )

    def _room_for(self, x_BLD: Tensor) -> EightBitRows | None:
        """What a norm writes to: rows in 8 bits where the products read such, else None for rows like x's."""
        return EightBitRows.empty_like(x_BLD) if isinstance(self.qkv, Fp8Linear) else None

    def _linear(
        self, layer: nn.Linear | Fp8Linear, x: Normed, *, gelu: bool = False, out: Tensor | None = None
    ) -> Tensor | EightBitRows:
        """A layer's result, in out where it is given; or through tanh-GELU, and then as the next layer reads it."""
        if isinstance(layer, Fp8Linear):
            rows = layer(x, out)
            return ops.quantize_rows(rows, gelu=True) if gelu else rows
        if self.gemms is not None:
            return self.gemms(x, layer.weight, layer.bias, gelu=gelu, out=out)
        if out is not None:
            return ops.linear(x, layer.weight, layer.bias, out=out)
        return ops.linear_gelu(x, layer.weight, layer.bias) if gelu else layer(x)

    def to_fp8_(self) -> None:
        """Keep the large weights in 8 bits, but for the text's keys and values, which are made once."""
        for name in ("qkv", "out", "cross_q", "cross_out", "ffn_up", "ffn_down"):
            setattr(self, name, Fp8Linear(getattr(self, name)))

    def checkpoint_slots(self) -> dict[str, Tensor]:
        """Checkpoint name below "blocks.N." -> the tensor to fill, viewed in the checkpoint's shape."""
        slots = {
            "attn1.norm_q.weight": self.norm_q.data,
            "attn1.norm_k.weight": self.norm_k.data,
            "attn2.norm_q.weight": self.cross_norm_q.data,
            "attn2.norm_k.weight": self.cross_norm_k.data,
        }
        layers = {
            "attn1.to_out.0": self.out,
            "attn2.to_q": self.cross_q,
            "attn2.to_out.0": self.cross_out,
            "ffn.net.0.proj": self.ffn_up,
            "ffn.net.2": self.ffn_down,
        }
        for name, layer in layers.items():
            slots[f"{name}.weight"], slots[f"{name}.bias"] = layer.weight.data, layer.bias.data
        for prefix, layer, names in (("attn1", self.qkv, "qkv"), ("attn2", self.cross_kv, "kv")):
            for name, weight, bias in zip(
                names, layer.weight.data.chunk(len(names)), layer.bias.data.chunk(len(names)), strict=True
            ):
                slots[f"{prefix}.to_{name}.weight"], slots[f"{prefix}.to_{name}.bias"] = weight, bias
        if self.history_key_scale is not None:
            slots["attn1.history_key_scale"] = self.history_key_scale.data
        return slots
