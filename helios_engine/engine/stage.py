"""One stage of a chunk: latents, and everything that a step of theirs reads.

# B batch, N noisy tokens
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from helios_engine.model.context import ChunkContext
from helios_engine.model.embed import TimeRows
from helios_engine.model.reuse import Reuse
from helios_engine.model.transformer import Transformer
from helios_engine.sampling import guidance
from helios_engine.sampling.solver import Solver


@dataclass(frozen=True, slots=True)
class Guidance:
    """How a prompt's velocity and the negative one's become one, see sampling/guidance.py."""

    scale: float
    zero_star: bool


@dataclass(slots=True, weakref_slot=True, eq=False)
class Stage:
    """A step reads and writes device memory alone, its own number included, so every step is the same work."""

    transformer: Transformer
    solver: Solver
    times: TimeRows  # of every step
    context: ChunkContext
    guidance: Guidance | None
    reuse: Reuse | None = None
    prompt_lengths: tuple[int, ...] = ()  # in tokens, the negative prompt's too where another rank computes with it

    def step(self) -> tuple[Tensor, ...]:
        """The next step; returns the velocity of every prompt, output rows [B, N, C * patch] in the model's dtype."""
        latents = self.solver.latents.to(self.transformer.project_out.weight.dtype)
        rows = self.transformer.run(latents, self.times.at(self.solver.index), self.context, self.reuse)
        velocity = rows[0]
        if self.guidance is not None:
            velocity = guidance.combine(*rows, scale=self.guidance.scale, zero_star=self.guidance.zero_star)
        self.solver.step(velocity)
        return rows

    def hold_still(self) -> None:
        """A step at velocity zero."""
        weight, latents = self.transformer.project_out.weight, self.solver.latents
        self.solver.step(weight.new_zeros(latents.size(0), latents[0].numel() // weight.size(0), weight.size(0)))
