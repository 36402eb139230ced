"""The Helios transformer: latents, a timestep, a history and prompts in; one velocity per prompt out.

# B batch, N noisy tokens, L all tokens, l this rank's tokens, D width, K head dim, T text tokens
Source: arXiv 2603.04379; Diffusers HeliosTransformer3DModel.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from helios_engine.config import ModelConfig
from helios_engine.model import rope
from helios_engine.model.block import Block, Modulation, Normed
from helios_engine.model.cache import BoundedCache
from helios_engine.model.context import ChunkContext, StepRows, TextContext
from helios_engine.model.embed import Embedder, HistoryWindow, TimeRows
from helios_engine.model.offload import WeightRing
from helios_engine.model.reuse import Reuse
from helios_engine.ops import native as ops
from helios_engine.ops.attention import Attention
from helios_engine.ops.gemm import TunedGemms
from helios_engine.parallel.attention import SequenceAttention, make_sequence_attention
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.layout import TokenLayout
from helios_engine.trace import span

_SHAPES_KEPT = 24
# Rows of the model's width alive per token at a forward's peak: 2.14 GB for 11040 tokens of the 14 B model in bfloat16,
# counted on the meta device with plain torch's float32 copies. With the compiled operators it is 11, three of them the first
# block's q, k and v, which stay for a stage.
LIVE_WIDTHS = 19


@dataclass(frozen=True, slots=True)
class _Forward:
    """What one forward's blocks have in common."""

    layout: TokenLayout
    rotation: Tensor  # [l, K/2, 2] of this rank's tokens
    modulations: list[Modulation]
    context: ChunkContext
    reuse: Reuse | None


class Transformer(nn.Module):
    """The network without any notion of steps, chunks or ranks."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedder(config, dtype)
        self.blocks = nn.ModuleList([Block(config, dtype) for _ in range(config.num_layers)])
        self.modulation = nn.Parameter(torch.empty(config.num_layers, 6, config.dim, dtype=torch.float32))
        # Weight and bias of every block's norm before the text.
        self.text_norms: nn.Parameter | None = None
        if config.cross_attn_norm:
            self.text_norms = nn.Parameter(torch.empty(config.num_layers, 2, config.dim, dtype=torch.float32))
        self.output_modulation = nn.Parameter(torch.empty(2, config.dim, dtype=torch.float32))
        t, h, w = config.patch_size
        self.project_out = nn.Linear(config.dim, config.out_channels * t * h * w, dtype=dtype)
        self.attention: Attention | None = None  # this and the next two are set by connect
        self.parallel = ContextParallel.single()
        self._sequence_attention: SequenceAttention | None = None
        self._tables: BoundedCache[Tensor] = BoundedCache(_SHAPES_KEPT)
        self._layouts: BoundedCache[TokenLayout] = BoundedCache(_SHAPES_KEPT)
        self._history_rows: Tensor | None = None
        self._ring: WeightRing | None = None
        self._text_ring: WeightRing | None = None
        self._by_parts = False

    def connect(
        self,
        attention: Attention,
        parallel: ContextParallel,
        *,
        ring_method: str = "rotate",
        exchange: str = "packed",
        gemms: TunedGemms | None = None,
    ) -> None:
        """Choose how attention is computed, which ranks share the sequence and what multiplies; before the first forward."""
        self.attention, self.parallel = attention, parallel
        self.multiply_with(gemms)
        self._sequence_attention = make_sequence_attention(
            parallel, attention, ring_method=ring_method, exchange=exchange
        )

    def multiply_with(self, gemms: TunedGemms | None) -> None:
        """Let this multiply in the blocks; None leaves it to torch."""
        for block in self.blocks:
            block.gemms = gemms

    def offload(self, ring: WeightRing, text_ring: WeightRing | None, *, by_parts: bool) -> None:
        """Let the blocks take turns on the device: a share of ring per block, or per part of a block where by_parts.

        text_ring holds a share per block of what makes the text's keys and values, which are then made once per prompt
        and kept; None leaves that part to ring and has every forward make them again.
        """
        self._ring, self._text_ring, self._by_parts = ring, text_ring, by_parts
        if by_parts:
            parts = [part for part in self.blocks[0].parts() if text_ring is None or part != "cross_kv"]
            for index, block in enumerate(self.blocks):
                # Weakly, or blocks and ring would keep each other.
                block.fetch = functools.partial(_fetch, weakref.ref(ring), index * len(parts), parts)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the parts of a block that talk to no other rank; once for each shape of each stage, then for all blocks."""
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in self.blocks:
            for name in ("normed", "project", "attend_text_", "feed_forward_"):
                setattr(block, name, torch.compile(getattr(block, name), backend=backend, dynamic=False))

    def to_fp8_(self) -> None:
        """Keep the blocks' large weights in 8 bits; approximate."""
        for block in self.blocks:
            block.to_fp8_()

    def rest(self) -> None:
        """Nothing is computed for a while: blocks that take turns give their memory back."""
        for ring in (self._ring, self._text_ring):
            if ring is not None:
                ring.rest()

    def close(self) -> None:
        """Let go of what streams the blocks; no forward may follow."""
        if self._text_ring is not None:
            self._text_ring.close()
        if self._ring is not None:
            self._ring.close()

    def block(self, index: int) -> Block:
        """A block whose weights are there for what is computed next, or come part by part."""
        if self._ring is not None and not self._by_parts:
            self._ring.use(index)
        return self.blocks[index]

    def check_tokens(self, num_tokens: int) -> None:
        """Raise ValueError where a forward over so many tokens cannot be shared by these ranks."""
        self._sequence_attention.check_tokens(num_tokens)

    def encode_text(self, embeds_BTE: Tensor) -> TextContext:
        """The prompt's keys and values in every layer; once per prompt."""
        text_BTD = self.embed.text(embeds_BTE)
        if self._ring is not None and self._text_ring is None:
            return TextContext(None, text_BTD)
        layers = []
        for index, block in enumerate(self.blocks):
            if self._text_ring is not None:
                self._text_ring.use(index)
            layers.append(block.text_keys_values(text_BTD))
        return TextContext(tuple(layers))

    def prepare(self, window: HistoryWindow, texts: tuple[TextContext, ...]) -> ChunkContext:
        """This rank's history tokens, their positions and their part of the first block; once per chunk."""
        patches = self.embed.history_patches(window)
        if not patches:
            return ChunkContext(0, None, None, None, texts)
        total = sum(group.size(1) for _, group in patches)
        share = self._layout(total, 0).history_slice(self.parallel.sequence_rank)
        history_BlD = self.embed.history(patches, share)
        rows, columns = (size // 2 for size in window.short.shape[-2:])
        rotation = self._history_table(rows, columns, window)[share]
        num_history = history_BlD.size(1)
        first_qkv = None
        if self.config.zero_history_timestep:
            first = self._modulations(self._step_rows(self.embed.time(0.0)))[0]
            block = self.block(0)
            normed = block.normed(history_BlD, first, num_history=num_history)
            first_qkv = block.project(normed, rotation, num_history=num_history)
        return ChunkContext(total, history_BlD, rotation, first_qkv, texts)

    def with_room(self, context: ChunkContext, latents_BCTHW: Tensor) -> ChunkContext:
        """The same context with room behind the first block's q, k, v of the history, for those of latents of this size.

        Every step then computes its own rows where they are read, and copies nothing.
        """
        if context.first_qkv is None:
            return context
        own = self._layout(context.total_history, self._num_tokens(latents_BCTHW)).noisy[self.parallel.sequence_rank]
        batch, _, width = context.first_qkv.shape
        if context.first_qkv.size(1) == context.num_history + own:
            return context
        room = context.first_qkv.new_empty(batch, context.num_history + own, width)
        room[:, : context.num_history] = context.first_qkv[:, : context.num_history]
        return replace(context, first_qkv=room)

    def _num_tokens(self, latents_BCTHW: Tensor) -> int:
        frames, rows, columns = latents_BCTHW.shape[2:]
        return frames * (rows // 2) * (columns // 2)

    def forward(
        self, latents_BCTHW: Tensor, timestep: float, context: ChunkContext, reuse: Reuse | None = None
    ) -> tuple[Tensor, ...]:
        """One velocity per prompt, as rows [B, N, C * patch], channel fastest (ops.unpatchify); the same on every rank.

        Tokens are sharded here, once; inside the blocks only self-attention talks between ranks; the noisy rows are
        gathered at the end. When two halves of the ranks compute one guidance branch each, both are returned. reuse carries
        what earlier steps of the stage left, for the approximations of model/reuse.py.
        """
        return self.run(latents_BCTHW, self.embed.time(timestep), context, reuse)

    def run(
        self, latents_BCTHW: Tensor, time: TimeRows, context: ChunkContext, reuse: Reuse | None = None
    ) -> tuple[Tensor, ...]:
        """forward at a timestep that is embedded already: nothing below depends on a number of the host's."""
        step_rows = self._step_rows(time)
        if reuse is not None and reuse.uses_history:
            context = ChunkContext(0, None, None, None, context.texts)
        context = self.with_room(context, latents_BCTHW)
        layout = self._layout(context.total_history, self._num_tokens(latents_BCTHW))
        own = layout.noisy_slice(self.parallel.sequence_rank)
        num_history = context.num_history
        rotation = self.chunk_table(latents_BCTHW)[own]
        x_BlD = self.embed.noisy(latents_BCTHW, own, after=context.history_BlD)
        if context.history_BlD is not None:
            rotation = torch.cat([context.history_rotation, rotation])
        work = _Forward(layout, rotation, self._modulations(step_rows), context, reuse)
        # Text enters at the first block's cross-attention, so what comes before is shared by all prompts.
        with span("self_attention"):
            h_BlD = self._attend_self_(0, x_BlD, None, work)
        share_history = len(context.texts) > 1 and self.config.guidance_cross_attn and len(self.blocks) > 1
        if share_history and num_history:
            with span("feed_forward"):
                rows, h = work.modulations[0], None if h_BlD is None else h_BlD[:, :num_history]
                self.block(0).feed_forward_(x_BlD[:, :num_history], h, rows, None, num_history=num_history)
        branches = [
            self._finish(x_BlD, h_BlD, work, place, step_rows, history_done=share_history)
            for place in range(len(context.texts))
        ]
        del x_BlD, h_BlD  # every branch has its own
        # Blocks that take turns on the device serve all prompts at one visit; else a prompt at a time needs less memory.
        side_by_side = self._ring is not None and not self._by_parts
        outputs = [
            self.parallel.gather_rows(rows, layout.noisy, "gather")
            for rows in _results(branches, side_by_side=side_by_side)
        ]
        if reuse is not None:
            reuse.end()
        if self.parallel.degrees.cfg > 1:
            return self.parallel.exchange_branches(outputs[0], "branches")
        return tuple(outputs)

    def _finish(
        self,
        x_BlD: Tensor,
        h_BlD: Normed | None,
        work: _Forward,
        place: int,
        step_rows: StepRows,
        *,
        history_done: bool,
    ) -> Generator[None, None, Tensor]:
        """Everything after the first block's self-attention for one prompt, by its place among the texts: this rank's output
        rows. Rests after every block. x, and h, which is x through the first block's middle norm, are changed in place where
        no other prompt needs them.

        After a block's self-attention h holds its rows, all of them or in the last block the noisy ones, each ready for
        what comes next to it. After a feed-forward over all rows it is what the next block projects.
        """
        if len(work.context.texts) > 1:
            x_BlD, h_BlD = x_BlD.clone(), None if h_BlD is None else h_BlD.clone()
        num_history, text = work.context.num_history, work.context.texts[place]
        text_from = num_history if self.config.guidance_cross_attn else 0
        last, skipped_to = len(self.blocks) - 1, 0
        middle = None if work.reuse is None or not work.reuse.middles[place].is_on else work.reuse.middles[place]
        if middle is not None:
            middle.enter(x_BlD, num_history)
        for index in range(len(self.blocks)):
            if middle is not None and index == middle.begin and middle.skips(x_BlD, num_history, self.parallel.word):
                h_BlD, skipped_to = None, middle.end
            if index < skipped_to:
                continue
            if middle is not None and index == middle.end and not skipped_to:
                middle.leave(x_BlD)
            block, rows = self.block(index), work.modulations[index]
            if index:
                with span("self_attention"):
                    h_BlD = self._attend_self_(index, x_BlD, h_BlD, work, place)
            first = num_history if index == last else 0  # h's first row in x

            def part(start: int, h: Normed | None = h_BlD, first: int = first) -> Normed | None:
                return None if h is None else h[:, start - first :]

            with span("cross_attention"):
                start = max(first, text_from)
                block.attend_text_(
                    *(x_BlD[:, start:], part(start), text.of_block(index, block), rows),
                    num_history=num_history - start,
                    attention=self.attention,
                )
            with span("feed_forward"):
                start = num_history if index == last or (index == 0 and history_done) else 0
                following = work.modulations[index + 1] if start == 0 and index < last else None
                h_BlD = block.feed_forward_(
                    x_BlD[:, start:], part(start), rows, following, num_history=num_history - start
                )
            yield
        return self._output(x_BlD[:, num_history:], step_rows)

    def _attend_self_(
        self, index: int, x_BlD: Tensor, h_BlD: Normed | None, work: _Forward, place: int | None = None
    ) -> Normed | None:
        """One block's self-attention; h is x as the block projects it, or None to have it computed.

        place is the prompt's among the texts, None in the first block.
        """
        block, rows, context = self.block(index), work.modulations[index], work.context
        num_history = context.num_history
        # After the last block only noisy rows are read, so its history rows need keys and values alone.
        noisy_only = index == len(self.blocks) - 1
        sequence, layout = self._sequence_attention, work.layout
        if index == 0 and context.first_qkv is not None:
            noisy, qkv = block.normed(x_BlD[:, num_history:], rows, num_history=0), context.first_qkv
            block.project(noisy, work.rotation[num_history:], num_history=0, out=qkv[:, num_history:])
        else:
            if h_BlD is None:
                h_BlD = block.normed(x_BlD, rows, num_history=num_history)
            heads = None if noisy_only else sequence.heads_to_pack(layout)
            first_query = num_history if noisy_only else 0
            qkv = block.project(h_BlD, work.rotation, num_history=num_history, first_query=first_query, heads=heads)
        if work.reuse is not None and work.reuse.settings.history_refresh > 1:
            heads, dim = (block.num_heads, block.head_dim), block.num_heads * block.head_dim
            k, v = (
                work.reuse.keys_values(place, index, qkv[..., dim:], num_history).unflatten(-1, (2, *heads)).unbind(2)
            )
            q = qkv[:, num_history if noisy_only else 0 :, :dim].unflatten(-1, heads)
            attend = functools.partial(self.attention, q, k, v)
        elif qkv.ndim == 1:
            attend = functools.partial(sequence.attend_packed, qkv, layout, batch=x_BlD.size(0))
        else:
            qkv = qkv.unflatten(-1, (3, block.num_heads, block.head_dim))
            attend = functools.partial(sequence, qkv, layout, noisy_only=noisy_only)
        return block.attend_self_(x_BlD, rows, num_history=num_history, noisy_only=noisy_only, attend=attend)

    def _output(self, x_BND: Tensor, step_rows: StepRows) -> Tensor:
        weight_SD, bias_SD = (row.expand(2, -1) for row in step_rows.output)
        h_BND = ops.norm_scale_shift(x_BND, weight_SD, bias_SD, num_history=0, eps=self.config.eps)
        return self.project_out(h_BND)

    def _step_rows(self, time: TimeRows) -> StepRows:
        """Every norm's rows: history stands at timestep 0, noisy tokens at this one."""
        noisy_rows = self.modulation + time.rows.float()
        history_rows = noisy_rows
        if self.config.zero_history_timestep:
            if self._history_rows is None:
                self._history_rows = self.modulation + self.embed.time(0.0).rows.float()
            history_rows = self._history_rows
        rows = torch.stack([history_rows, noisy_rows], dim=2)  # [layers, 6, 2, D]
        rows[:, 1::3].add_(1)  # += would copy the rows to themselves afterwards
        bias, scale = self.output_modulation + time.embedding.float()
        return StepRows(rows, torch.stack([1 + scale, bias]))

    def _modulations(self, step_rows: StepRows) -> list[Modulation]:
        rows = step_rows.blocks
        middle = self._middle_rows(rows)
        return [Modulation(*layer.unbind(0), *m) for layer, m in zip(rows.unbind(0), middle, strict=True)]

    def _middle_rows(self, rows: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
        """(weight, bias) of every block's norm after self-attention, [2, D] each; see Modulation."""
        if self.text_norms is None:
            return [(None, None)] * len(self.blocks)
        middle = self.text_norms.unsqueeze(2).expand(-1, -1, 2, -1)  # [layers, weight and bias, 2, D]
        if self.config.guidance_cross_attn:
            feed_forward = rows[:, 3:5, 0].flip(1)  # weight, bias; an index list would be copied from the host
            middle = torch.stack([feed_forward, middle[:, :, 1]], dim=2)
        return [tuple(layer.unbind(0)) for layer in middle.unbind(0)]

    def _layout(self, num_history: int, num_noisy: int) -> TokenLayout:
        degrees = self.parallel.degrees
        ranks = self.parallel.sequence_size
        return self._layouts.get(
            (num_history, num_noisy, ranks, degrees.ulysses),
            lambda: TokenLayout.make(
                num_history, num_noisy, self.config.num_attention_heads, num_ranks=ranks, ulysses=degrees.ulysses
            ),
        )

    def chunk_table(self, latents_BCTHW: Tensor) -> Tensor:
        """Rotations of all noisy tokens of latents of this size, [N, K/2, 2]; made once and kept."""
        rows, columns = (size // 2 for size in latents_BCTHW.shape[-2:])
        return self._tables.get(
            ("chunk", rows, columns), lambda: self._as_table(rope.chunk_table(self.config, rows, columns))
        )

    def _history_table(self, rows: int, columns: int, window: HistoryWindow) -> Tensor:
        present = {name: getattr(window, name) is not None for name in ("long", "mid", "short")}
        return self._tables.get(
            ("history", rows, columns, *present.values()),
            lambda: self._as_table(rope.history_table(self.config, rows, columns, **present)),
        )

    def _as_table(self, rotation_LK: Tensor) -> Tensor:
        """Cosine and sine side by side, [L, K/2, 2], on the model's device."""
        return torch.view_as_real(rotation_LK).contiguous().to(self.modulation.device)

    def checkpoint_slots(self) -> dict[str, Tensor]:
        """Checkpoint name -> the tensor to fill, viewed in the checkpoint's shape."""
        slots = self.embed.checkpoint_slots()
        for index, block in enumerate(self.blocks):
            slots |= {f"blocks.{index}.{name}": slot for name, slot in block.checkpoint_slots().items()}
            slots[f"blocks.{index}.scale_shift_table"] = self.modulation.data[index : index + 1]
            if self.text_norms is not None:
                weight, bias = self.text_norms.data[index]
                slots[f"blocks.{index}.norm2.weight"], slots[f"blocks.{index}.norm2.bias"] = weight, bias
        slots["norm_out.scale_shift_table"] = self.output_modulation.data[None]
        slots["proj_out.weight"], slots["proj_out.bias"] = self.project_out.weight.data, self.project_out.bias.data
        return slots

    def forget(self) -> None:
        """Drop what was computed from the weights; call after changing them."""
        self._history_rows = None
        self.embed._time_cache.clear()


def _fetch(ring: weakref.ref[WeightRing], first: int, parts: list[str], part: str) -> None:
    if part in parts:
        ring().use(first + parts.index(part))


def _results(branches: list[Generator[None, None, Tensor]], *, side_by_side: bool) -> list[Tensor]:
    """What each branch returns, computed block by block in turns or one after the other."""
    results: dict[int, Tensor] = {}
    while len(results) < len(branches):
        waiting = [place for place in range(len(branches)) if place not in results]
        for place in waiting if side_by_side else waiting[:1]:
            try:
                next(branches[place])
            except StopIteration as end:
                results[place] = end.value
    return [results[place] for place in range(len(branches))]


def init_random_(module: nn.Module, seed: int) -> None:
    """Fill every parameter with small seeded numbers, so that a forward stays finite. For tests and benchmarks."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 64
        noise = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.float32)
        is_norm_weight = parameter.ndim == 1 and "bias" not in name
        parameter.data.copy_(noise * fan_in**-0.5 + (1.0 if is_norm_weight else 0.0))
        if name.endswith("text_norms"):
            parameter.data[:, 0] += 1.0
