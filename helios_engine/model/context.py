"""What a forward reads besides latents and weights: prompts, history, a timestep's rows.

# B batch, T text tokens, D width, l this rank's tokens, K head dim
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helios_engine.model.block import Block


@dataclass(frozen=True, slots=True)
class TextContext:
    """One prompt, as the blocks need it: keys and values of every layer, [B, T, 2 D] each.

    Where memory is short they are left out, and every block makes its own from the projected text [B, T, D].
    """

    keys_values: tuple[Tensor, ...] | None
    text_BTD: Tensor | None = None

    def of_block(self, index: int, block: Block) -> Tensor:
        """One block's keys and values."""
        return block.text_keys_values(self.text_BTD) if self.keys_values is None else self.keys_values[index]

    @staticmethod
    def stack(contexts: list[TextContext]) -> TextContext:
        """Several prompts of one length as a batch."""
        if contexts[0].keys_values is None:
            return TextContext(None, torch.cat([context.text_BTD for context in contexts]))
        return TextContext(tuple(torch.cat(layers) for layers in zip(*(c.keys_values for c in contexts), strict=True)))


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class ChunkContext:
    """What stays the same over all steps and stages of a chunk; rows are this rank's share."""

    total_history: int  # tokens over all ranks
    history_BlD: Tensor | None  # tokens before the first block
    history_rotation: Tensor | None  # [l, K/2, 2]
    # The first block's q, k, v of the history rows [B, l, 3 D], None where they depend on the timestep; with room for the
    # noisy rows behind them once a stage has begun (Transformer.with_room).
    first_qkv: Tensor | None
    texts: tuple[TextContext, ...]  # the prompts this rank computes

    @property
    def num_history(self) -> int:
        return 0 if self.history_BlD is None else self.history_BlD.size(1)


@dataclass(frozen=True, slots=True)
class StepRows:
    """All that a forward needs of its timestep, float32: blocks [layers, 6, 2, D] for (history, noisy) rows with 1 added to
    the scales, output [2, D] weight and bias of the last norm."""

    blocks: Tensor
    output: Tensor
