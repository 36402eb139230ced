"""Self-attention over a sequence that several ranks hold: Ulysses, ring, and their product.

# B batch, l this rank's tokens [history | noisy], H all heads, h this rank's heads, K head dim, S a group's tokens

Ulysses trades tokens for heads: one exchange gives each rank all tokens of its group for its own heads, attention runs
locally, one exchange brings the rows back. A ring of such groups rotates keys and values and merges partial results.
Full attention does not care about token order and rotary positions are applied before, so both are exact.
Source: DeepSpeed Ulysses (arXiv 2309.14509), Ring Attention (arXiv 2310.01889), USP (arXiv 2405.07719).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helios_engine.ops import native as ops
from helios_engine.ops.attention import Attention
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.layout import TokenLayout


class SequenceAttention:
    """Attention of this rank's rows to the whole sequence."""

    def __init__(self, context: ContextParallel, attention: Attention, *, ring_method: str = "rotate") -> None:
        """ring_method: rotate passes keys and values round while attending; allgather collects them first."""
        self._context, self._attention, self._ring_method = context, attention, ring_method

    def check_tokens(self, num_tokens: int) -> None:
        """Raise ValueError where a sequence of this length cannot be shared out; every length can, here."""

    def __call__(self, qkv_Bl3HK: Tensor, layout: TokenLayout, *, noisy_only: bool) -> Tensor:
        """Attended rows [B, l, H, K] of this rank's tokens, or of its noisy ones [B, noisy, H, K] alone.

        qkv [B, l, 3, H, K] holds normalised and rotated rows; with noisy_only the history rows' queries are not read.
        """
        skipped = layout.history[self._context.sequence_rank] if noisy_only else 0
        q, k, v = qkv_Bl3HK.unbind(2)
        if layout.ulysses == 1:
            return self._over_ring(q[:, skipped:], k, v, layout)
        if noisy_only:
            q, k, v = self._scatter_heads_of_noisy(q[:, skipped:], k, v, layout)
        else:
            q, k, v = self._scatter_heads(qkv_Bl3HK, layout).unbind(2)
        out_BShK = self._over_ring(q, k, v, layout)
        rows = layout.noisy if noisy_only else tuple(layout.tokens(rank) for rank in range(layout.num_ranks))
        return self._gather_heads(out_BShK, layout, rows)

    def heads_to_pack(self, layout: TokenLayout) -> tuple[int, ...] | None:
        """The heads each destination gets, where the rows before the exchange may come packed; None where they may not."""
        return layout.heads if layout.ulysses > 1 else None

    def attend_packed(self, packed: Tensor, layout: TokenLayout, *, batch: int) -> Tensor:
        """As a call, of rows that ops.qk_rms_norm_rope_pack made: their exchange needs no packing of its own."""
        head_dim = packed.numel() // (layout.tokens(self._context.sequence_rank) * batch * 3 * layout.num_heads)
        q, k, v = self._exchange_heads(packed, layout, batch, head_dim).unbind(2)
        rows = tuple(layout.tokens(rank) for rank in range(layout.num_ranks))
        return self._gather_heads(self._over_ring(q, k, v, layout), layout, rows)

    def _members(self, layout: TokenLayout) -> range:
        return layout.group(self._context.sequence_rank)

    def _scatter_heads(self, qkv_Bl3HK: Tensor, layout: TokenLayout) -> Tensor:
        """q, k and v of all the group's tokens for this rank's heads, [B, S, 3, h, K]; rank-major token order."""
        token_first = qkv_Bl3HK.transpose(0, 1)
        pieces = [token_first[:, :, :, layout.head_slice(m)].reshape(-1) for m in range(layout.ulysses)]
        return self._exchange_heads(torch.cat(pieces), layout, qkv_Bl3HK.size(0), qkv_Bl3HK.size(-1))

    def _exchange_heads(self, packed: Tensor, layout: TokenLayout, batch: int, head_dim: int) -> Tensor:
        """The exchange itself: destination-major [l][B][3][heads of it][K] in, [B, S, 3, h, K] out."""
        own = layout.tokens(self._context.sequence_rank)
        heads = layout.heads[self._context.ulysses_rank]
        tokens = [layout.tokens(rank) for rank in self._members(layout)]
        received = self._context.all_to_all(
            packed,
            send_counts=[own * batch * 3 * count * head_dim for count in layout.heads],
            receive_counts=[count * batch * 3 * heads * head_dim for count in tokens],
            purpose="qkv",
        )
        return received.view(sum(tokens), batch, 3, heads, head_dim).transpose(0, 1)

    def _scatter_heads_of_noisy(
        self, q_BnHK: Tensor, k_BlHK: Tensor, v_BlHK: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same in one exchange, but queries of noisy tokens only: the last layer reads no others."""
        batch, num_queries, _, head_dim = q_BnHK.shape
        own = k_BlHK.size(1)
        q, kv = q_BnHK.transpose(0, 1), torch.stack([k_BlHK, v_BlHK], dim=2).transpose(0, 1)
        pieces = []
        for member in range(layout.ulysses):
            heads = layout.head_slice(member)
            pieces += [kv[:, :, :, heads].reshape(-1), q[:, :, heads].reshape(-1)]
        heads = layout.heads[self._context.ulysses_rank]
        members = self._members(layout)
        sizes = [(2 * layout.tokens(rank), layout.noisy[rank]) for rank in members]
        received = self._context.all_to_all(
            torch.cat(pieces),
            send_counts=[(2 * own + num_queries) * batch * count * head_dim for count in layout.heads],
            receive_counts=[sum(size) * batch * heads * head_dim for size in sizes],
            purpose="qkv",
        )
        unit = batch * heads * head_dim
        parts = received.split([rows * unit for size in sizes for rows in size])
        kv = torch.cat(
            [part.view(rows // 2, batch, 2, heads, head_dim) for part, (rows, _) in zip(parts[::2], sizes, strict=True)]
        )
        q = torch.cat(
            [part.view(rows, batch, heads, head_dim) for part, (_, rows) in zip(parts[1::2], sizes, strict=True)]
        ).transpose(0, 1)
        kv = kv.transpose(0, 1)
        return q, *kv.unbind(2)

    def _gather_heads(self, out_BShK: Tensor, layout: TokenLayout, rows: tuple[int, ...]) -> Tensor:
        """This rank's rows for all heads, [B, rows of this rank, H, K]; rows counts every rank's."""
        batch, _, heads, head_dim = out_BShK.shape
        own = rows[self._context.sequence_rank]
        received = self._context.all_to_all(
            out_BShK.transpose(0, 1).reshape(-1),
            send_counts=[rows[rank] * batch * heads * head_dim for rank in self._members(layout)],
            receive_counts=[own * batch * count * head_dim for count in layout.heads],
            purpose="out",
        )
        return ops.unpack_heads(received, (batch, own, layout.num_heads, head_dim), layout.heads)

    def _over_ring(self, q_BLhK: Tensor, k_BShK: Tensor, v_BShK: Tensor, layout: TokenLayout) -> Tensor:
        """Attention to the keys of every group of the ring; each round sends on what it attends to."""
        context = self._context
        ring = context.degrees.ring
        if ring == 1:
            return self._attention(q_BLhK, k_BShK, v_BShK)
        group_tokens = [
            sum(layout.tokens(rank) for rank in range(first, first + layout.ulysses))
            for first in range(0, layout.num_ranks, layout.ulysses)
        ]
        if self._ring_method == "allgather":
            own = torch.stack([k_BShK, v_BShK], dim=2)
            every = context.gather_rows(own.flatten(2), group_tokens, "ring", group="ring")
            k, v = every.unflatten(2, own.shape[2:]).unbind(2)
            return self._attention(q_BLhK, k, v)
        held = torch.stack([k_BShK, v_BShK])
        out = lse = None
        for turn in range(ring):
            arriving = None
            if turn + 1 < ring:
                shape = (2, held.size(1), group_tokens[(context.ring_rank - turn - 1) % ring], *held.shape[3:])
                arriving = context.rotate(held.view(-1), math.prod(shape), "ring")
            part, part_lse = self._attention.with_lse(q_BLhK, held[0], held[1])
            if out is None:
                # Contiguous, as merging wants them; backends hand over transposed views.
                out = part.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
                lse = part_lse.clone(memory_format=torch.contiguous_format)
            else:
                ops.merge_partials_(out, lse, part, part_lse)
            if arriving is not None:
                held = arriving.wait().view(shape)
        return out.to(q_BLhK.dtype)


def check_exchange(
    name: str, context: ContextParallel, *, num_heads: int, backend: str, ring_method: str = "rotate"
) -> None:
    """Raise ValueError where an exchange cannot run with these ranks, heads and this local attention, saying why."""
    if name == "xfuser":
        from helios_engine.parallel import xfuser

        if ring_method != "rotate":
            raise ValueError(f"ring_method {ring_method} has no effect on exchange xfuser; leave it out")
        xfuser.check(context, num_heads=num_heads, backend=backend)


def make_sequence_attention(
    context: ContextParallel, attention: Attention, *, ring_method: str, exchange: str
) -> SequenceAttention:
    """Self-attention by the exchange that was asked for and passed check_exchange."""
    if exchange == "xfuser":
        from helios_engine.parallel.xfuser import XfuserAttention

        return XfuserAttention(context, attention)
    return SequenceAttention(context, attention, ring_method=ring_method)
