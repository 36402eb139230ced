"""How much one forward sends between ranks: ours against Diffusers' own context-parallel plan, same weights and inputs.

    python -m benchmarks.bench_parallel [--ranks 2 4] [--json parallel.json]

gloo processes on this machine's CPU run a narrow model (4 heads x 32) at the real token counts of a 384x640 video. One
counter at torch's dispatcher serves both sides, so no collective escapes it; ours must agree with the engine's own count,
and the two outputs with each other. Bytes are those that leave a rank, of the rank that sends most; MB is 1e6 bytes.
The 14 B figures (40 layers, 5120 wide, bfloat16) are extrapolated in layers from two measured depths, in width and in
element size, and must equal what the two plans come to by arithmetic. No times: the ranks share a few cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import diffusers
import torch
from diffusers import ContextParallelConfig, HeliosTransformer3DModel, ParallelConfig
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from helios_engine.config import LATENT_FRAMES_PER_CHUNK, ModelConfig
from helios_engine.model import rope
from helios_engine.model.embed import HistoryWindow
from helios_engine.model.transformer import Transformer, init_random_
from helios_engine.ops.attention import choose_attention
from helios_engine.ops.reference import unpatchify
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.mesh import Degrees, Traffic
from helios_engine.tools.bench import hardware

STAGES = {"full": (48, 80), "half": (24, 40), "quarter": (12, 20)}  # latent rows and columns
HISTORY_TOKENS, TEXT_TOKENS, TIMESTEP = 2400, 512, 700.0
DEPTHS = (2, 3)  # our last layer sends less than the others, so one depth would not do
NARROW = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "rope_dim": (12, 10, 10),
    "ffn_dim": 256,
    "text_dim": 32,
    "freq_dim": 64,
}
REAL = ModelConfig()
REAL_BYTES_PER_ELEMENT = 2
TOLERANCE = 1e-4  # float32, three layers, outputs of order one
RANK_TIMEOUT = datetime.timedelta(minutes=2)

# Operator -> its kind, and where its arguments hold the tensor sent and, if any, the sizes of the parts.
_COLLECTIVES = {
    "c10d::alltoall_base_": ("all_to_all", 1, 4),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0, 2),
    "c10d::_allgather_base_": ("all_gather", 1, None),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0, None),
}
_LOCAL = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives over all ranks made inside it, by kind, whichever function of torch made them."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: tuple[type, ...],
        args: tuple = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func.namespace in ("c10d", "_c10d_functional") and func._schema.name not in _LOCAL:
            if func._schema.name not in _COLLECTIVES:
                raise RuntimeError(f"{func._schema.name} was called, and its traffic is not understood here")
            kind, sent_at, sizes_at = _COLLECTIVES[func._schema.name]
            sizes = args[sizes_at] if sizes_at is not None and len(args) > sizes_at else ()
            self.traffic.count(kind, _bytes_leaving(kind, args[sent_at], sizes))
        return func(*args, **(kwargs or {}))


def _bytes_leaving(kind: str, sent: Tensor, sizes: list[int] | tuple[int, ...]) -> int:
    """Bytes for other ranks; sizes are rows of the first dimension, none meaning equal parts."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if kind == "all_gather":
        return sent.nbytes * (num_ranks - 1)
    own_rows = sizes[rank] if sizes else sent.size(0) // num_ranks
    return sent.nbytes * (sent.size(0) - own_rows) // sent.size(0)


@dataclass(frozen=True, slots=True)
class Inputs:
    """One forward's inputs at a stage, the same on every rank."""

    latents_BCTHW: Tensor
    text_BTE: Tensor
    window: HistoryWindow

    @classmethod
    def random(cls, stage: str, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        frames = {"long": rope.LONG_FRAMES, "mid": rope.MID_FRAMES, "short": rope.SHORT_FRAMES}
        window = HistoryWindow(**{name: normal(1, 16, len(part), *STAGES["full"]) for name, part in frames.items()})
        latents = normal(1, 16, LATENT_FRAMES_PER_CHUNK, *STAGES[stage])
        return cls(latents, normal(1, TEXT_TOKENS, NARROW["text_dim"]), window)


@dataclass(frozen=True, slots=True)
class Measured:
    """One forward on one rank: what each side sent, and how far apart the outputs are."""

    num_ranks: int
    stage: str
    num_layers: int
    dtype: str
    ours: Traffic
    diffusers: Traffic
    max_difference: float
    max_output: float


def noisy_tokens(stage: str) -> int:
    rows, columns = STAGES[stage]
    return LATENT_FRAMES_PER_CHUNK * (rows // 2) * (columns // 2)


def make_pair(
    num_layers: int, dtype: torch.dtype, parallel: ContextParallel, shared: ParallelConfig
) -> tuple[Transformer, HeliosTransformer3DModel]:
    """Our model and Diffusers' on the same weight tensors, both connected to the other ranks."""
    config = {**NARROW, "num_layers": num_layers, "is_amplify_history": False}  # Diffusers' plan is wrong with it on
    ours = Transformer(ModelConfig(**config), dtype).eval()
    init_random_(ours, 0)
    attention = choose_attention("auto", device=torch.device("cpu"), dtype=dtype, head_dim=config["attention_head_dim"])
    ours.connect(attention, parallel)
    theirs = HeliosTransformer3DModel(**config).eval()
    theirs.load_state_dict(ours.checkpoint_slots(), assign=True)
    # The plan names the outputs of 40 blocks one by one; those that this model lacks would be an error.
    absent = tuple(f"blocks.{index}." for index in range(num_layers, REAL.num_layers))
    plan = {name: part for name, part in theirs._cp_plan.items() if not name.startswith(absent)}
    # On a machine without an accelerator this one step divides by the number of devices, zero.
    with mock.patch.object(theirs, "_resolve_parallel_config", return_value=shared):
        theirs.enable_parallelism(config=shared, cp_plan=plan)
    return ours, theirs


def run_ours(model: Transformer, inputs: Inputs) -> tuple[Tensor, Traffic]:
    """Velocity, and what was sent for the chunk's preparation and the forward together."""
    own_count = model.parallel.traffic = Traffic()
    with CollectiveCounter() as counter:
        context = model.prepare(inputs.window, (model.encode_text(inputs.text_BTE),))
        rows_BNC = model(inputs.latents_BCTHW, TIMESTEP, context)[0]
    if context.total_history != HISTORY_TOKENS:
        raise RuntimeError(f"the history has {context.total_history} tokens, expected {HISTORY_TOKENS}")
    seen = counter.traffic
    if (seen.bytes_sent.total(), seen.calls.total()) != (own_count.bytes_sent.total(), own_count.calls.total()):
        raise RuntimeError(f"the engine counts {own_count}, the dispatcher saw {seen}")
    frames, height, width = inputs.latents_BCTHW.shape[-3:]
    return unpatchify(rows_BNC, (frames, height // 2, width // 2), REAL.patch_size), seen


def run_diffusers(model: HeliosTransformer3DModel, inputs: Inputs) -> tuple[Tensor, Traffic]:
    """Velocity, and what was sent for it."""

    def indices(frames: tuple[int, ...]) -> Tensor:
        return torch.tensor([frames])

    with CollectiveCounter() as counter:
        output = model(
            hidden_states=inputs.latents_BCTHW,
            timestep=torch.tensor([TIMESTEP]),
            encoder_hidden_states=inputs.text_BTE,
            indices_hidden_states=indices(rope.CHUNK_FRAMES),
            indices_latents_history_short=indices(rope.SHORT_FRAMES),
            indices_latents_history_mid=indices(rope.MID_FRAMES),
            indices_latents_history_long=indices(rope.LONG_FRAMES),
            latents_history_short=inputs.window.short,
            latents_history_mid=inputs.window.mid,
            latents_history_long=inputs.window.long,
        ).sample
    return output, counter.traffic


@torch.no_grad()
def run_rank(rank: int, num_ranks: int, store: str) -> list[Measured]:
    """Everything one rank measures: every stage at both depths in float32, and one bfloat16 forward."""
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # Diffusers calls all_gather_tensor, renamed in torch 2.13
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=RANK_TIMEOUT
    )
    parallel = ContextParallel.from_process_group(Degrees(num_ranks))
    context_parallel = ContextParallelConfig(ulysses_degree=num_ranks)
    shared = ParallelConfig(context_parallel_config=context_parallel)
    mesh = init_device_mesh("cpu", context_parallel.mesh_shape, mesh_dim_names=context_parallel.mesh_dim_names)
    shared.setup(rank, num_ranks, torch.device("cpu"), mesh=mesh)
    runs = [(depth, torch.float32, tuple(STAGES)) for depth in DEPTHS]
    runs.append((DEPTHS[0], torch.bfloat16, ("quarter",)))
    results = []
    for num_layers, dtype, stages in runs:
        ours, theirs = make_pair(num_layers, dtype, parallel, shared)
        for stage in stages:
            inputs = Inputs.random(stage, dtype)
            actual, our_traffic = run_ours(ours, inputs)
            expected, their_traffic = run_diffusers(theirs, inputs)
            difference = (actual - expected).abs().max().item()
            largest = expected.abs().max().item()
            name = str(dtype).removeprefix("torch.")
            results.append(
                Measured(num_ranks, stage, num_layers, name, our_traffic, their_traffic, difference, largest)
            )
    dist.destroy_process_group()
    return results


def run_ranks(num_ranks: int) -> list[Measured]:
    """Each measurement of the rank that sent most, the largest difference of any rank's."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(num_ranks, mp_context=spawn) as pool:
        store = str(Path(folder) / "store")
        of_ranks = list(pool.map(run_rank, range(num_ranks), [num_ranks] * num_ranks, [store] * num_ranks))
    merged = []
    for same in zip(*of_ranks, strict=True):
        worst = max(same, key=lambda result: result.max_difference)
        if worst.dtype == "float32" and not worst.max_difference <= TOLERANCE:
            raise RuntimeError(f"outputs differ by {worst.max_difference} at {num_ranks} ranks, {worst.stage}")
        ours, theirs = (
            max((getattr(result, side) for result in same), key=lambda traffic: traffic.bytes_sent.total())
            for side in ("ours", "diffusers")
        )
        merged.append(replace(worst, ours=ours, diffusers=theirs))
    return merged


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: bytes and collectives of one forward, per rank."""

    num_ranks: int
    stage: str
    ours: Traffic
    diffusers: Traffic

    @property
    def byte_ratio(self) -> float:
        return self.diffusers.bytes_sent.total() / self.ours.bytes_sent.total()

    @property
    def call_ratio(self) -> float:
        return self.diffusers.calls.total() / self.ours.calls.total()

    def figures(self) -> dict[str, object]:
        sides = {"ours": self.ours, "diffusers": self.diffusers}
        counts = {
            f"{side}_{what}": dict(getattr(traffic, what))
            for side, traffic in sides.items()
            for what in ("bytes_sent", "calls")
        }
        ratios = {"byte_ratio": self.byte_ratio, "call_ratio": self.call_ratio}
        return {"num_ranks": self.num_ranks, "stage": self.stage, **counts, **ratios}

    def cells(self) -> list[str]:
        theirs = self.diffusers
        kinds = " + ".join(f"{theirs.bytes_sent[kind] / 1e6:.1f}" for kind in ("all_to_all", "all_gather"))
        return [
            *(str(self.num_ranks), self.stage, str(HISTORY_TOKENS + noisy_tokens(self.stage))),
            *(f"{self.ours.bytes_sent.total() / 1e6:.2f}", str(self.ours.calls.total())),
            *(f"{theirs.bytes_sent.total() / 1e6:.2f} ({kinds})", str(theirs.calls.total())),
            *(f"{self.byte_ratio:.2f}", f"{self.call_ratio:.2f}"),
        ]


def _extrapolated(shallow: Traffic, deep: Traffic, *, fixed_width: tuple[str, ...]) -> Traffic:
    """Traffic of 40 layers, 5120 wide, in bfloat16. Kinds in fixed_width carry latents, whose width does not grow."""
    more = (REAL.num_layers - DEPTHS[1]) // (DEPTHS[1] - DEPTHS[0])
    wider = REAL.dim // (NARROW["num_attention_heads"] * NARROW["attention_head_dim"])
    result = Traffic()
    for kind, sent in deep.bytes_sent.items():
        in_float32 = (sent + more * (sent - shallow.bytes_sent[kind])) * (1 if kind in fixed_width else wider)
        result.bytes_sent[kind] = in_float32 * REAL_BYTES_PER_ELEMENT // 4
        result.calls[kind] = deep.calls[kind] + more * (deep.calls[kind] - shallow.calls[kind])
    return result


def _planned_bytes(num_ranks: int, noisy: int) -> tuple[int, int]:
    """(ours, Diffusers') for the 14 B model by arithmetic, for token counts that the ranks divide."""
    total, layers = HISTORY_TOKENS + noisy, REAL.num_layers
    row = REAL.dim * REAL_BYTES_PER_ELEMENT * (num_ranks - 1)
    latents = noisy * 64 * REAL_BYTES_PER_ELEMENT * (num_ranks - 1) // num_ranks
    # q, k, v and the output of all tokens; the last layer sends q and the output of noisy ones only.
    ours = ((layers - 1) * 4 * total + 2 * total + 2 * noisy) * row // num_ranks**2 + latents
    # The same four in every layer; then self-attention's and the feed-forward's rows, and cross-attention's noisy ones.
    gathered = (2 * total + noisy) * row // num_ranks
    return ours, layers * (4 * total * row // num_ranks**2 + gathered)


def project(results: list[Measured]) -> list[Row]:
    """The float32 runs' figures carried to the 14 B model. Raises RuntimeError where extrapolation and arithmetic differ."""
    found = {(r.num_ranks, r.stage, r.num_layers): r for r in results}
    rows = []
    for num_ranks, stage in dict.fromkeys((key[0], key[1]) for key in found):
        shallow, deep = (found[num_ranks, stage, depth] for depth in DEPTHS)
        ours = _extrapolated(shallow.ours, deep.ours, fixed_width=("all_gather",))
        theirs = _extrapolated(shallow.diffusers, deep.diffusers, fixed_width=())
        planned = _planned_bytes(num_ranks, noisy_tokens(stage))
        if (ours.bytes_sent.total(), theirs.bytes_sent.total()) != planned:
            raise RuntimeError(f"{num_ranks} ranks, {stage}: extrapolated {ours} and {theirs}, by arithmetic {planned}")
        rows.append(Row(num_ranks, stage, ours, theirs))
    return rows


def check_element_size(results: list[Measured]) -> None:
    """Raise RuntimeError unless both sides send half as much in bfloat16 as in float32."""
    for half in (result for result in results if result.dtype == "bfloat16"):
        same = (half.num_ranks, half.stage, half.num_layers)
        whole = next(r for r in results if (r.num_ranks, r.stage, r.num_layers) == same and r.dtype == "float32")
        for side in ("ours", "diffusers"):
            sent, expected = getattr(half, side).bytes_sent, getattr(whole, side).bytes_sent
            if Counter({kind: 2 * count for kind, count in sent.items()}) != expected:
                raise RuntimeError(f"{side} sends {sent} in bfloat16 and {expected} in float32")


def table(title: str, rows: list[Row]) -> str:
    head = [
        *("P", "stage", "tokens", "ours MB", "ours calls"),
        *("Diffusers MB (all-to-all + all-gather)", "Diffusers calls", "MB ratio", "calls ratio"),
    ]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return "\n".join([f"{title}\n", *("| " + " | ".join(line) + " |" for line in lines)])


def conditions() -> dict[str, object]:
    return {
        **hardware(torch.device("cpu")),
        "threads": 1,  # of a rank
        "cores": os.cpu_count(),
        "diffusers": diffusers.__version__,
        "backend": "gloo",
        "projection": f"linear in layers from {DEPTHS[0]} and {DEPTHS[1]}; equal to the plans' arithmetic",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", choices=(2, 4), default=[2, 4])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the ranks, which inherit it
    results = [result for num_ranks in options.ranks for result in run_ranks(num_ranks)]
    check_element_size(results)
    in_float32 = [result for result in results if result.dtype == "float32"]
    measured = [Row(r.num_ranks, r.stage, r.ours, r.diffusers) for r in in_float32 if r.num_layers == DEPTHS[1]]
    projected = project(in_float32)
    width = NARROW["num_attention_heads"] * NARROW["attention_head_dim"]
    print(table(f"Measured: one forward of {DEPTHS[1]} layers, {width} wide, float32; sent per rank", measured))
    print()
    print(table(f"14 B model: {REAL.num_layers} layers, {REAL.dim} wide, bfloat16; sent per rank", projected))
    worst = max(in_float32, key=lambda result: result.max_difference)
    print(f"\nOutputs differ by {worst.max_difference:.1e} at most, of values up to {worst.max_output:.2f} (float32)")
    print("Conditions: " + ", ".join(f"{name} {value}" for name, value in conditions().items()))
    if options.json:
        figures = {
            "conditions": conditions(),
            "max_difference": worst.max_difference,
            "max_output": worst.max_output,
            "measured": {"num_layers": DEPTHS[1], "width": width, "rows": [row.figures() for row in measured]},
            "projected": {
                "num_layers": REAL.num_layers,
                "width": REAL.dim,
                "rows": [row.figures() for row in projected],
            },
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
