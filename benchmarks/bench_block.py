"""One block of the 14 B model's width on this machine's CPU: ours, Diffusers', and the GEMMs and attention alone.

    python benchmarks/bench_block.py [--repeats 3] [--output block.json]

5120 wide, 40 heads, feed-forward 13824, bfloat16, 2400 history tokens and 540 or 2160 noisy ones, 512 text tokens.
All three run in one process, in turn, so that a busy machine slows them alike. "Alone" is what no implementation can
leave out: the block's matrix products at their shapes and its two attentions, on tensors laid out as they like them.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_helios import HeliosTransformerBlock

from helios_engine.config import ModelConfig
from helios_engine.model import rope
from helios_engine.model.block import Block, Modulation
from helios_engine.model.transformer import init_random_
from helios_engine.ops.attention import choose_attention
from helios_engine.parallel.attention import SequenceAttention
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.layout import TokenLayout
from helios_engine.tools.bench import hardware

HISTORY, TEXT = 2400, 512
STAGES = {"quarter": (540, (12, 20)), "half": (2160, (24, 40))}
CONFIG = ModelConfig()


def make_ours(noisy: int, grid: tuple[int, int]):
    """A call of our block as the transformer makes it in the middle of the network."""
    block = Block(CONFIG, torch.bfloat16).eval()
    init_random_(block, 0)
    attention = choose_attention("auto", device=torch.device("cpu"), dtype=torch.bfloat16, head_dim=128)
    x = torch.randn(1, HISTORY + noisy, CONFIG.dim).bfloat16()
    tables = [rope.history_table(CONFIG, 24, 40), rope.chunk_table(CONFIG, grid[0] // 2, grid[1] // 2)]
    rotation = torch.view_as_real(torch.cat(tables)).contiguous()
    rows = Modulation(*torch.randn(8, 2, CONFIG.dim).unbind(0))
    text_kv = block.text_keys_values(torch.randn(1, TEXT, CONFIG.dim).bfloat16())

    sequence_attention = SequenceAttention(ContextParallel.single(), attention)
    layout = TokenLayout.make(HISTORY, noisy, CONFIG.num_attention_heads, num_ranks=1)

    h = block.normed(x, rows, num_history=HISTORY)

    def run() -> None:
        own = x.clone()
        # The first norm is the last thing the block before does; here the last thing this one does for the next.
        qkv = block.project(h, rotation, num_history=HISTORY)
        qkv = qkv.unflatten(-1, (3, block.num_heads, block.head_dim))
        attend = functools.partial(sequence_attention, qkv, layout, noisy_only=False)
        own_h = block.attend_self_(own, rows, num_history=HISTORY, noisy_only=False, attend=attend)
        block.attend_text_(own[:, HISTORY:], own_h[:, HISTORY:], text_kv, rows, num_history=0, attention=attention)
        block.feed_forward_(own, own_h, rows, rows, num_history=HISTORY)

    return run


def make_diffusers(noisy: int):
    """A call of the reference's block with the inputs its transformer gives it."""
    block = HeliosTransformerBlock(
        CONFIG.dim, CONFIG.ffn_dim, CONFIG.num_attention_heads, cross_attn_norm=True, guidance_cross_attn=True
    ).bfloat16()
    for part in (block.norm1, block.norm2, block.norm3):
        part.float()
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    block.eval().requires_grad_(False)
    tokens = HISTORY + noisy
    x = torch.randn(1, tokens, CONFIG.dim).bfloat16()
    text = torch.randn(1, TEXT, CONFIG.dim).bfloat16()
    rows = torch.randn(1, 2, 6, CONFIG.dim).bfloat16()
    temb = torch.cat([rows[:, :1].expand(-1, HISTORY, -1, -1), rows[:, 1:].expand(-1, noisy, -1, -1)], dim=1)
    rotary = torch.randn(1, tokens, 2 * CONFIG.attention_head_dim)
    return lambda: block(x, text, temb, rotary, noisy)


def make_alone(noisy: int):
    """The block's matrix products and attentions and nothing else. Text keys and values are constant, so not in it."""
    dim, tokens = CONFIG.dim, HISTORY + noisy
    shapes = {
        "qkv": (tokens, dim, 3 * dim),
        "out": (tokens, dim, dim),
        "cross_q": (noisy, dim, dim),
        "cross_out": (noisy, dim, dim),
        "up": (tokens, dim, CONFIG.ffn_dim),
        "down": (tokens, CONFIG.ffn_dim, dim),
    }
    operands = [
        (torch.randn(1, m, k).bfloat16(), torch.randn(n, k).bfloat16() * k**-0.5, torch.randn(n).bfloat16())
        for m, k, n in shapes.values()
    ]
    heads = (CONFIG.num_attention_heads, CONFIG.attention_head_dim)
    q, k, v = (torch.randn(1, tokens, *heads).bfloat16().transpose(1, 2) for _ in range(3))
    text_k, text_v = (torch.randn(1, TEXT, *heads).bfloat16().transpose(1, 2) for _ in range(2))

    def run() -> None:
        for x, weight, bias in operands:
            F.linear(x, weight, bias)
        F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q[:, :, HISTORY:], text_k, text_v)

    return run


@torch.no_grad()
def measure(stage: str, repeats: int) -> dict[str, float]:
    """Median seconds of each, the three taking turns."""
    noisy, grid = STAGES[stage]
    torch.manual_seed(0)
    calls = {"alone": make_alone(noisy), "ours": make_ours(noisy, grid), "diffusers": make_diffusers(noisy)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **{f"{name}_s": value for name, value in median.items()},
        "ours_over_alone": median["ours"] / median["alone"],
        "diffusers_over_alone": median["diffusers"] / median["alone"],
        "diffusers_over_ours": median["diffusers"] / median["ours"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = {**hardware(torch.device("cpu")), "dtype": "bfloat16", "repeats": options.repeats}
    for stage in options.stages:
        result[stage] = measure(stage, options.repeats)
        print(stage, {name: round(value, 3) for name, value in result[stage].items()}, flush=True)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
