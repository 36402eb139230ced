"""One transformer block, over the tokens [history | noisy].

# B batch, L tokens, D width, H heads, K head dim, T text tokens, S segments: row 0 history, row 1 noisy
Source: Diffusers HeliosTransformerBlock, HeliosAttnProcessor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_engine.config import ModelConfig
from helios_engine.ops import reference as ops
from helios_engine.ops.attention import Attention

_MAX_HISTORY_SCALE = 10.0


@dataclass(frozen=True, slots=True)
class Modulation:
    """A block's AdaLN rows, float32 [2, D] each; weights are 1 + scale."""

    attention_bias: Tensor
    attention_weight: Tensor
    attention_gate: Tensor
    feed_forward_bias: Tensor
    feed_forward_weight: Tensor
    feed_forward_gate: Tensor


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
        self.text_norm: nn.LayerNorm | None = None
        if config.cross_attn_norm:
            self.text_norm = nn.LayerNorm(dim, config.eps, dtype=torch.float32)
        self.cross_q = nn.Linear(dim, dim, dtype=dtype)
        self.cross_kv = nn.Linear(dim, 2 * dim, dtype=dtype)
        self.cross_norm_q = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.cross_norm_k = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.cross_out = nn.Linear(dim, dim, dtype=dtype)
        self.ffn_up = nn.Linear(dim, config.ffn_dim, dtype=dtype)
        self.ffn_down = nn.Linear(config.ffn_dim, dim, dtype=dtype)

    def history_scale(self) -> Tensor | None:
        """Factor of each head's history keys [H] float32, or None where the model has none."""
        if self.history_key_scale is None:
            return None
        scale = 1.0 + torch.sigmoid(self.history_key_scale) * (_MAX_HISTORY_SCALE - 1.0)
        return scale.expand(self.num_heads)

    def project(self, x_BLD: Tensor, rotation_LK: Tensor, rows: Modulation, *, num_history: int) -> Tensor:
        """Normalised, rotated q, k and plain v of some rows, side by side: [B, L, 3 D]."""
        h_BLD = ops.norm_scale_shift(
            x_BLD, rows.attention_weight, rows.attention_bias, num_history=num_history, eps=self.eps
        )
        qkv = self.qkv(h_BLD)
        q, k, _ = qkv.chunk(3, dim=-1)
        ops.rms_norm_rope_(q, self.norm_q, rotation_LK, eps=self.eps)
        self._finish_keys_(k, rotation_LK, num_history)
        return qkv

    def project_skipping_queries(
        self, x_BLD: Tensor, rotation_LK: Tensor, rows: Modulation, *, num_history: int
    ) -> Tensor:
        """As project, but the history rows' queries are left unset."""
        dim = x_BLD.size(-1)
        qkv = x_BLD.new_empty(*x_BLD.shape[:2], 3 * dim)
        history_BLD = ops.norm_scale_shift(
            x_BLD[:, :num_history], rows.attention_weight, rows.attention_bias, num_history=num_history, eps=self.eps
        )
        qkv[:, :num_history, dim:] = F.linear(history_BLD, self.qkv.weight[dim:], self.qkv.bias[dim:])
        self._finish_keys_(qkv[:, :num_history, dim : 2 * dim], rotation_LK[:num_history], num_history)
        qkv[:, num_history:] = self.project(x_BLD[:, num_history:], rotation_LK[num_history:], rows, num_history=0)
        return qkv

    def _finish_keys_(self, k_BLD: Tensor, rotation_LK: Tensor, num_history: int) -> None:
        scale = self.history_scale()
        ops.rms_norm_rope_(
            k_BLD, self.norm_k, rotation_LK, eps=self.eps, history_scale_H=scale, num_history=num_history
        )

    def attend_self_(
        self,
        x_BlD: Tensor,
        qkv_BlD: Tensor,
        rows: Modulation,
        *,
        num_history: int,
        noisy_only: bool,
        attend: Callable[..., Tensor],
    ) -> None:
        """x += gate * self-attention, for all rows or for the noisy ones alone.

        attend(qkv [B, l, 3, H, K], noisy_only=...) gives the attended rows; it may talk to other ranks.
        """
        qkv = qkv_BlD.unflatten(-1, (3, self.num_heads, self.head_dim))
        skipped = num_history if noisy_only else 0
        attended = self.out(attend(qkv, noisy_only=noisy_only).flatten(2))
        ops.gated_residual_(x_BlD[:, skipped:], attended, rows.attention_gate, num_history=num_history - skipped)

    def text_keys_values(self, text_BTD: Tensor) -> Tensor:
        """Keys and values of the prompt, side by side [B, T, 2 D]; they depend on nothing else."""
        kv = self.cross_kv(text_BTD)
        ops.rms_norm_(kv.chunk(2, dim=-1)[0], self.cross_norm_k, eps=self.eps)
        return kv

    def attend_text_(self, x_BLD: Tensor, text_kv_BTD: Tensor, *, attention: Attention) -> None:
        """x += cross-attention to the text. There is no mask: padding rows are attended to, as the model was trained."""
        h_BLD = x_BLD
        if self.text_norm is not None:
            weight, bias = (row.expand(2, -1) for row in (self.text_norm.weight, self.text_norm.bias))
            h_BLD = ops.norm_scale_shift(x_BLD, weight, bias, num_history=0, eps=self.eps)
        q_BLD = self.cross_q(h_BLD)
        ops.rms_norm_(q_BLD, self.cross_norm_q, eps=self.eps)
        k, v = text_kv_BTD.unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        attended = attention(q_BLD.unflatten(-1, (self.num_heads, self.head_dim)), k, v)
        ops.gated_residual_(x_BLD, self.cross_out(attended.flatten(2)), None, num_history=0)

    def feed_forward_(self, x_BLD: Tensor, rows: Modulation, *, num_history: int) -> None:
        """x += gate * feed-forward."""
        h_BLD = ops.norm_scale_shift(
            x_BLD, rows.feed_forward_weight, rows.feed_forward_bias, num_history=num_history, eps=self.eps
        )
        update = self.ffn_down(ops.gelu_(self.ffn_up(h_BLD)))
        ops.gated_residual_(x_BLD, update, rows.feed_forward_gate, num_history=num_history)

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
        if self.text_norm is not None:
            layers["norm2"] = self.text_norm
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
