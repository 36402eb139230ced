"""Milliseconds per chunk and frames per second on P = 1..16 GPUs, from counted work and a few rates.

    python -m benchmarks.model_scaling [--steps 2,2,2] [--link-gb 330] [--measured kernels.json modes.json] [--plot out.svg]

A model, not a measurement. FLOPs and bytes are counted from the model's shape and from TokenLayout, where the rank with
most tokens and most heads decides; rates are defaults with a source, or measured: --measured takes what gpu_check.py
writes (kernels.json, engine.json, modes.json), or a file of share_ms_{noisy}+{history}_p{P}, one rank's share of
a P-rank forward timed without exchanges ("includes_packing": true if the copies around them ran). A measured forward
scales our modelled shares of its stage, a measured share replaces one; Diffusers' plan follows from the rates alone.
Nothing is overlapped. Left out: the rows that decoding ranks trade, embedding, the first layer's cached history, solver
steps, launches.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from helios_engine.config import ModelConfig, read_json
from helios_engine.parallel.layout import TokenLayout, shares
from helios_engine.request import FRAMES_PER_CHUNK

MODEL = ModelConfig()
NUM_HEADS, TEXT_TOKENS = MODEL.num_attention_heads, 512
BYTES = 2  # bfloat16
LATENT_ROWS = 48  # at 384x640
OUT_CHANNELS = 64  # 16 latent channels x 2 x 2 patch
RANKS = range(1, 17)
NUM_SMS = 132  # H100 SXM and H200
TILE_ROWS, GEMM_TILES, HEAD_TILES = 128, (256, 192, 128), (1,)  # of rows, GEMM columns, attention heads


def wave_efficiency(rows: int, columns: int, tile_columns: Sequence[int]) -> float:
    """Useful share of the tiles that all SMs could compute in that many waves, by the best of the tile widths."""

    def share(width: int) -> float:
        waves = math.ceil(math.ceil(rows / TILE_ROWS) * math.ceil(columns / width) / NUM_SMS)
        return rows * columns / (waves * NUM_SMS * TILE_ROWS * width)

    return max(share(width) for width in tile_columns)


@dataclass(frozen=True, slots=True)
class Machine:
    """What one GPU and its links sustain. An H100 with NVLink, by other people's figures, until measured."""

    gemm_tflops: float = 650.0  # assumed for an H100; 790 measured on one H200 at 8192^3
    attention_tflops: float = 650.0  # assumed; FlashAttention-3 is reported at 625 to 648 on an H100
    copy_tb: float = 2.9  # TB/s, read + written; 3.35 by datasheet, 4.3 measured on an H200 (4.8)
    permute_tb: float = 1.57  # packing copies; fast-ulysses on an H200: 127 MB each way in 162 us
    link_gb: float = 330.0  # GB/s that a rank sends; stores to peers are reported at 300 to 355 over NVLink
    nccl_share: float = 0.88  # of link_gb; NCCL's bare all-to-all is reported at 285 to 300 GB/s
    push_us: float = 12.0  # per exchange: stores to peers and a barrier, 8 to 15 assumed
    nccl_us: float = 25.0  # per collective: 20 to 30 assumed
    pack_passes: float = 2.0  # over q, k, v before the exchange: one copy per destination, one to join them
    elementwise: float = 1.0  # of our fused minimum; 1 needs the fused kernels
    decode_ms: float = 247.0  # a chunk on one GPU, float32; 69 TFLOP of TF32 convolutions and fused traffic: 240 to 255
    waves: bool = False  # count idle SMs in the last wave of every GEMM and attention

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            is_rate = item.name.endswith(("tflops", "tb", "gb", "share"))
            if not math.isfinite(value) or value < 0 or (is_rate and value == 0):
                raise ValueError(
                    f"{item.name} must be a {'positive number' if is_rate else 'number >= 0'}, got {value!r}"
                )

    def gemm_seconds(self, rows: int, depth: int, columns: int) -> float:
        """At the sustained rate, but no faster than the weights can be read."""
        if not rows:
            return 0.0
        seconds = 2 * rows * depth * columns / (self.gemm_tflops * 1e12)
        if self.waves:  # gpu_check.py's rate is that of an 8192 x 8192 product, its own last wave included
            seconds *= wave_efficiency(8192, 8192, GEMM_TILES) / wave_efficiency(rows, columns, GEMM_TILES)
        return max(seconds, self.copy_seconds(BYTES * depth * columns))

    def attention_seconds(self, queries: int, keys: int, heads: int) -> float:
        seconds = 4 * queries * keys * heads * MODEL.attention_head_dim / (self.attention_tflops * 1e12)
        if self.waves:  # the rate is that of the full stage on one GPU
            seconds *= wave_efficiency(11040, 40, HEAD_TILES) / wave_efficiency(queries, heads, HEAD_TILES)
        return seconds

    def copy_seconds(self, num_bytes: float) -> float:
        return num_bytes / (self.copy_tb * 1e12)

    def exchange_seconds(self, num_bytes: float, *, push: bool) -> float:
        rate, latency = (self.link_gb, self.push_us) if push else (self.link_gb * self.nccl_share, self.nccl_us)
        return num_bytes / (rate * 1e9) + latency * 1e-6


@dataclass(frozen=True, slots=True)
class Layer:
    """The busiest rank's part of one layer. After the last layer's attention history rows are not needed."""

    layout: TokenLayout
    last: bool = False

    @property
    def tokens(self) -> int:
        return max(self.layout.tokens(rank) for rank in range(self.layout.num_ranks))

    @property
    def noisy(self) -> int:
        return max(self.layout.noisy)

    @property
    def rows(self) -> int:
        return self.noisy if self.last else self.tokens

    def products(self) -> dict[str, list[tuple[int, int, int]]]:
        """Rows, depth and columns of every matrix product. Text keys and values are computed once per prompt."""
        dim, ffn_dim = MODEL.dim, MODEL.ffn_dim
        split = [(self.tokens - self.noisy, dim, 2 * dim), (self.noisy, dim, 3 * dim)]
        return {
            "qkv": split if self.last else [(self.tokens, dim, 3 * dim)],
            "out": [(self.rows, dim, dim)],
            "cross": [(self.noisy, dim, dim)] * 2,
            "ffn": [(self.rows, dim, ffn_dim), (self.rows, ffn_dim, dim)],
        }

    def attentions(self) -> dict[str, tuple[int, int, int]]:
        """Queries, keys and heads."""
        keys = self.layout.num_history + self.layout.num_noisy
        queries = self.layout.num_noisy if self.last else keys
        return {"attn": (queries, keys, max(self.layout.heads)), "cross": (self.noisy, TEXT_TOKENS, NUM_HEADS)}

    def flops(self) -> dict[str, int]:
        counts = {name: sum(2 * m * k * n for m, k, n in shapes) for name, shapes in self.products().items()}
        for name, (queries, keys, heads) in self.attentions().items():
            counts[name] = counts.get(name, 0) + 4 * queries * keys * heads * MODEL.attention_head_dim
        return counts

    def compute_seconds(self, machine: Machine) -> float:
        products = sum(machine.gemm_seconds(*shape) for shapes in self.products().values() for shape in shapes)
        return products + sum(machine.attention_seconds(*shape) for shape in self.attentions().values())

    def share_seconds(self, machine: Machine) -> float:
        """All but exchanges. Between the products, in passes: residual, norm and modulation 4; a norm 2; GELU 2."""
        passes = self.tokens * (4 + 2) + self.rows * (2 + 4) + self.noisy * (2 + 4)
        moved = BYTES * (passes * MODEL.dim + 2 * self.rows * MODEL.ffn_dim)
        return self.compute_seconds(machine) + machine.copy_seconds(machine.elementwise * moved)

    def exchange_bytes(self) -> tuple[int, int]:
        """Of q, k and v together and of the output: the most that any rank sends or receives."""
        layout, ranks = self.layout, range(self.layout.num_ranks)
        rows = layout.noisy if self.last else [layout.tokens(rank) for rank in ranks]
        packed = [2 * layout.tokens(rank) + rows[rank] for rank in ranks]
        sizes = []
        for counts in (packed, rows):
            away = [counts[rank] * (layout.num_heads - layout.heads[rank]) for rank in ranks]
            arriving = [(sum(counts) - counts[rank]) * layout.heads[rank] for rank in ranks]
            sizes.append(BYTES * MODEL.attention_head_dim * max(away + arriving))
        return sizes[0], sizes[1]

    def packing_seconds(self, machine: Machine) -> float:
        """Copies around NCCL's exchanges: passes over q, k and v before, one over the output after."""
        rows = machine.pack_passes * (2 * self.tokens + self.rows) + self.rows
        return 2 * rows * MODEL.dim * BYTES / (machine.permute_tb * 1e12) if self.layout.num_ranks > 1 else 0.0


def forward_ms(layout: TokenLayout, seconds: Callable[[Layer], float]) -> float:
    """Over all layers, the last one being another."""
    return 1e3 * ((MODEL.num_layers - 1) * seconds(Layer(layout)) + seconds(Layer(layout, last=True)))


def transfer_ms(machine: Machine, layout: TokenLayout, *, push: bool) -> float:
    """Two exchanges per layer and the final gather of noisy rows, padded to the longest share."""
    if layout.num_ranks == 1:
        return 0.0
    gathered = (layout.num_ranks - 1) * max(layout.noisy) * OUT_CHANNELS * BYTES
    exchange = functools.partial(machine.exchange_seconds, push=push)
    layers = forward_ms(layout, lambda layer: sum(map(exchange, layer.exchange_bytes())))
    return layers + 1e3 * machine.exchange_seconds(gathered, push=False)


def diffusers_ms(machine: Machine, layout: TokenLayout) -> float:
    """Diffusers' plan, eager: per layer 4 all-to-alls, each packed and unpacked, 3 all-gathers, text keys computed again."""
    layer, ranks, num_noisy = Layer(layout), layout.num_ranks, layout.num_noisy
    num_tokens = layout.num_history + num_noisy
    # Bytes per element, counted on meta tensors in 0.42.1. Norms, modulation and residuals run on every token everywhere;
    # the plan shards QK norm, rotation, cross-attention's query norm and GELU.
    moved = (84 + 52 + 34 + 4 + 52 + 42) * num_tokens + (20 + 6) * num_noisy + (8 + 60) * layer.tokens + 4 * layer.noisy
    seconds = layer.compute_seconds(machine) + machine.gemm_seconds(TEXT_TOKENS, MODEL.dim, 2 * MODEL.dim)
    seconds += machine.copy_seconds(moved * MODEL.dim + 2 * BYTES * layer.tokens * MODEL.ffn_dim)
    if ranks > 1:
        packed = 2 * 2 * 4 * layer.tokens * MODEL.dim * BYTES
        gathered = (2 * num_tokens + num_noisy) * MODEL.dim * BYTES * (ranks - 1) / ranks
        seconds += packed / (machine.permute_tb * 1e12) + 6 * machine.nccl_us * 1e-6
        seconds += machine.exchange_seconds(sum(layer.exchange_bytes()) + gathered, push=False)
    return 1e3 * MODEL.num_layers * seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """What a chunk computes: noisy tokens and steps per stage; guided, every step is two forwards."""

    noisy: tuple[int, ...] = (540, 2160, 8640)  # 384x640: quarter, half and full resolution
    steps: tuple[int, ...] = (2, 2, 2)
    history: int = 2400
    guided: bool = False

    def __post_init__(self) -> None:
        if len(self.noisy) != len(self.steps) or min(self.noisy) < 1 or self.history < 0:
            raise ValueError(f"{self.noisy} noisy and {self.history} history tokens do not fit steps {self.steps}")
        if min(self.steps) < 0 or not any(self.steps):
            raise ValueError(f"steps must not be negative, and not all 0, got {self.steps}")

    def layout(self, noisy: int, ranks: int) -> TokenLayout:
        return TokenLayout.make(self.history, noisy, NUM_HEADS, num_ranks=ranks)


Key = str | tuple[int, int]  # a field of Machine; noisy tokens and ranks of a share


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value and the file it is from."""

    value: float
    file: str
    includes_packing: bool = False


def read_measured(paths: Sequence[Path], plan: Plan) -> dict[Key, Figure]:
    """What the files hold for this plan. Raises ValueError for files without any such figure, or two with the same."""
    measured: dict[Key, Figure] = {}
    for path in paths:
        whole = read_json(path)
        # gpu_check.py's groups hold a dictionary per part; a file of figures is one of them.
        parts = [part for part in whole.values() if isinstance(part, dict) and "part" in part] or [whole]
        if any(part.get("tiny") for part in parts):
            raise ValueError(f"{path} was measured on a miniature")
        num_found = 0
        for values in parts:
            for key, value in {**_rates_in(values), **_shares_in(values, plan)}.items():
                if key in measured:
                    raise ValueError(f"{path} and {measured[key].file} both give {key}")
                if not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
                    raise ValueError(f"{path}: {key} must be a positive number, got {value!r}")
                measured[key] = Figure(value, path.name, values.get("includes_packing") is True)
                num_found += 1
        if not num_found:
            raise ValueError(f"{path} has no figure for {plan.noisy} + {plan.history} tokens, only {sorted(whole)}")
    return measured


def _rates_in(values: dict[str, object]) -> dict[Key, object]:
    names = {"gemm_bf16_tflops": "gemm_tflops", "copy_tb_per_s": "copy_tb"}
    rates: dict[Key, object] = {names[name]: value for name, value in values.items() if name in names}
    attention = [item["self_full"] for item in values.values() if isinstance(item, dict) and "self_full" in item]
    decode = [value for name, value in values.items() if name.startswith("decode_ms_float32_")]
    if attention:
        rates["attention_tflops"] = max(attention)  # the backend an engine would choose
    if decode:
        rates["decode_ms"] = min(decode)
    return rates


def _shares_in(values: dict[str, object], plan: Plan) -> dict[Key, object]:
    shares: dict[Key, object] = {}
    for name, value in values.items():
        match = re.fullmatch(r"(?:forward|share)_ms_(\d+)\+(\d+)(?:_p(\d+))?", name)
        if match and int(match[1]) in plan.noisy and int(match[2]) == plan.history:
            shares[int(match[1]), int(match[3] or 1)] = value
        stage = re.fullmatch(r"(\d+)\+(\d+)", name)
        if stage and int(stage[1]) in plan.noisy and int(stage[2]) == plan.history and isinstance(value, dict):
            shares[int(stage[1]), 1] = value.get("forward_ms")
    return shares


@dataclass(frozen=True, slots=True)
class Model:
    """Times of a plan's chunk on a machine, with measured shares where there are any."""

    machine: Machine
    plan: Plan
    measured: Mapping[Key, Figure] = field(default_factory=dict)

    @property
    def schemes(self) -> tuple[str, ...]:
        return ("push", "nccl", "diffusers", *(("cfg x push", "cfg x nccl") if self.plan.guided else ()))

    def share_ms(self, noisy: int, ranks: int, *, packing: bool) -> float:
        """The busiest rank's forward without transfers, with or without the copies around them."""

        def modelled(part: Callable[[Layer, Machine], float], ranks: int = ranks) -> float:
            return forward_ms(self.plan.layout(noisy, ranks), lambda layer: part(layer, self.machine))

        share, forward = self.measured.get((noisy, ranks)), self.measured.get((noisy, 1))
        milliseconds = share.value if share else modelled(Layer.share_seconds)
        if forward and not share:
            milliseconds *= forward.value / modelled(Layer.share_seconds, ranks=1)
        has_packing = share is not None and share.includes_packing
        return milliseconds + (packing - has_packing) * modelled(Layer.packing_seconds)

    def forward_ms(self, scheme: str, noisy: int, ranks: int) -> float:
        layout = self.plan.layout(noisy, ranks)
        if scheme == "diffusers":
            return diffusers_ms(self.machine, layout)
        push = scheme == "push"
        return self.share_ms(noisy, ranks, packing=not push) + transfer_ms(self.machine, layout, push=push)

    def chunk_ms(self, scheme: str, ranks: int) -> float | None:
        """All forwards of a chunk; None where the scheme cannot run."""
        inner = scheme.removeprefix("cfg x ")
        halves = inner != scheme
        if halves and ranks % 2:
            return None
        total = 0.0
        for noisy, steps in zip(self.plan.noisy, self.plan.steps, strict=True):
            step = self.forward_ms(inner, noisy, ranks // 2 if halves else ranks)
            if halves:
                step += 1e3 * self.machine.exchange_seconds(noisy * OUT_CHANNELS * BYTES, push=False)
            total += steps * step * (2 if self.plan.guided and not halves else 1)
        return total


def inputs_table(model: Model, given: Collection[str] = ()) -> str:
    """Every input with its value and where it is from; given names were set on the command line."""
    values: dict[Key, float] = {item.name: getattr(model.machine, item.name) for item in dataclasses.fields(Machine)}
    values |= {(noisy, 1): model.share_ms(noisy, 1, packing=False) for noisy in model.plan.noisy}
    values |= {key: figure.value for key, figure in model.measured.items() if key not in given}
    lines = ["| input | value | from |", "|---|---|---|"]
    for key, value in values.items():
        name = key if isinstance(key, str) else f"share_ms {key[0]}+{model.plan.history} P={key[1]}"
        source = f"measured ({model.measured[key].file})" if key in model.measured else "modelled"
        lines.append(f"| {name} | {value:.4g} | {'modelled (command line)' if key in given else source} |")
    return "\n".join(lines)


def results_table(model: Model) -> str:
    """A row per number of GPUs: ms of denoising per chunk (speed-up, FPS without decode / with it)."""
    schemes = model.schemes
    lines = ["| P | " + " | ".join(schemes) + " |", "|---" * (len(schemes) + 1) + "|"]
    for ranks in RANKS:
        cells = []
        for scheme in schemes:
            chunk, one_gpu = model.chunk_ms(scheme, ranks), model.chunk_ms(scheme.removeprefix("cfg x "), 1)
            if chunk is None:
                cells.append("-")
                continue
            # All ranks decode a band of rows each; under Diffusers' plan every rank decodes everything.
            band = 1 if scheme == "diffusers" else max(shares(LATENT_ROWS, ranks)) / LATENT_ROWS
            decode = model.machine.decode_ms * band
            fps, whole_fps = (1e3 * FRAMES_PER_CHUNK / time for time in (chunk, chunk + decode))
            cells.append(f"{chunk:.0f} ({one_gpu / chunk:.2f}x, {fps:.3g} / {whole_fps:.3g})")
        lines.append(f"| {ranks} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(model: Model) -> str:
    """An SVG of frames per second, decode left out, over the number of GPUs."""
    curves = {scheme: [(p, model.chunk_ms(scheme, p)) for p in RANKS] for scheme in model.schemes}
    rates = {name: [(p, 1e3 * FRAMES_PER_CHUNK / ms) for p, ms in curve if ms] for name, curve in curves.items()}
    peak = max(rate for points in rates.values() for _, rate in points)
    spacing = 10 ** math.floor(math.log10(peak)) / 2
    num_lines = math.ceil(peak / spacing)
    top = spacing * num_lines

    def at(ranks: float, rate: float) -> str:
        return f"{60 + 40 * ranks:.1f},{400 - 390 * rate / top:.1f}"

    def text(position: str, content: object, color: str = "black") -> str:
        x, y = position.split(",")
        return f'<text x="{x}" y="{y}" fill="{color}">{content}</text>'

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 440" font-size="12">']
    parts.append('<rect width="720" height="440" fill="white"/>')
    for level in (step * spacing for step in range(num_lines + 1)):
        parts.append(f'<path d="M{at(0, level)}L{at(RANKS[-1], level)}" stroke="#ddd"/>')
        parts.append(text(at(-1, level), f"{level:.3g}"))
    parts += [text(at(ranks, -top / 25), ranks) for ranks in RANKS]
    colors = ("#0072b2", "#009e73", "#d55e00", "#56b4e9", "#cc79a7")
    for index, ((scheme, points), color) in enumerate(zip(rates.items(), colors, strict=False)):
        line = " ".join(at(*point) for point in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(text(at(0.3, top * (0.94 - 0.05 * index)), scheme, color))
    parts.append(text(at(5, -top / 12), "GPUs; frames per second without decode, modelled"))
    return "\n".join([*parts, "</svg>", ""])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    def counts(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=counts, default=Plan().steps, help="per stage; Base: --tokens 8640 --steps 50")
    parser.add_argument("--tokens", type=counts, default=Plan().noisy, help="noisy tokens per stage")
    parser.add_argument("--history", type=int, default=Plan().history)
    parser.add_argument("--guided", action="store_true", help="two forwards per step; adds guidance branches x Ulysses")
    parser.add_argument("--measured", nargs="+", type=Path, default=[])
    parser.add_argument("--plot", type=Path, help="an .svg file")
    for item in dataclasses.fields(Machine):
        flag = f"--{item.name.replace('_', '-')}"
        if item.name == "waves":
            parser.add_argument(flag, action="store_true", default=None)
        else:
            parser.add_argument(flag, type=float, help=f"default {item.default:g}; overrides --measured")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    given = {item.name: getattr(options, item.name) for item in dataclasses.fields(Machine)}
    given = {name: value for name, value in given.items() if value is not None}
    if options.plot and options.plot.suffix != ".svg":
        raise ValueError(f"--plot writes .svg, got {options.plot}")
    plan = Plan(options.tokens, options.steps, options.history, options.guided)
    measured = read_measured(options.measured, plan)
    rates = {key: figure.value for key, figure in measured.items() if isinstance(key, str)}
    model = Model(Machine(**{**rates, **given}), plan, measured)
    print(inputs_table(model, given))
    print("\nms of denoising per chunk (speed-up, FPS without decode / with it)\n")
    print(results_table(model))
    if options.plot:
        options.plot.write_text(plot(model))


if __name__ == "__main__":
    main()
