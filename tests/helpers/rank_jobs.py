"""What ranks of the pool can be asked to do. Imported by every rank: keep it free of Diffusers."""

from __future__ import annotations

import functools
import weakref
from unittest import mock

import torch
from torch import Tensor

from helios_engine import Engine, EngineConfig, VideoRequest
from helios_engine.config import ModelConfig, VaeConfig
from helios_engine.engine import recorders
from helios_engine.engine.graphs import StepGraphs
from helios_engine.model.embed import HistoryWindow
from helios_engine.model.slab import Slab
from helios_engine.model.transformer import Transformer, init_random_
from helios_engine.model.vae import VideoAutoencoder
from helios_engine.ops import native
from helios_engine.ops.attention import choose_attention
from helios_engine.parallel.attention import SequenceAttention
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.layout import TokenLayout
from helios_engine.parallel.mesh import Degrees
from helios_engine.tools.toy import init_vae_
from tests.helpers.recorders import Rerun, TapeRecorder, Unfaithful

CPU = torch.device("cpu")


@functools.cache
def context(degrees: tuple[int, int, int]) -> ContextParallel | None:
    wanted = Degrees(*degrees)
    return ContextParallel.from_process_group(wanted, ranks=range(wanted.num_ranks), rank_timeout=None)


def whole_qkv(history: int, noisy: int, heads: int, head_dim: int, batch: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(history + noisy)
    return torch.randn(batch, history + noisy, 3, heads, head_dim, generator=generator).to(dtype)


def own_rows(whole: Tensor, layout: TokenLayout, rank: int) -> Tensor:
    """A rank's share of rows counted [history | noisy]."""
    noisy = whole[:, layout.num_history :][:, layout.noisy_slice(rank)]
    return torch.cat([whole[:, : layout.num_history][:, layout.history_slice(rank)], noisy], dim=1)


def attend(
    parallel: ContextParallel,
    *,
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    noisy_only: bool,
    ring_method: str = "rotate",
) -> Tensor:
    """This rank's attended rows."""
    history, noisy, heads, head_dim, batch = sizes
    attention = choose_attention("auto", device=CPU, dtype=dtype, head_dim=head_dim)
    layout = TokenLayout.make(history, noisy, heads, num_ranks=parallel.sequence_size, ulysses=parallel.degrees.ulysses)
    own = own_rows(whole_qkv(history, noisy, heads, head_dim, batch, dtype), layout, parallel.sequence_rank)
    if noisy_only:  # these queries must not be read
        own[:, : layout.history[parallel.sequence_rank], 0] = float("nan")
    return SequenceAttention(parallel, attention, ring_method=ring_method)(own, layout, noisy_only=noisy_only)


def scatter_heads(parallel: ContextParallel, *, sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> Tensor:
    """The exchange alone: q, k, v of the group's tokens for this rank's heads."""
    history, noisy, heads, head_dim, batch = sizes
    layout = TokenLayout.make(history, noisy, heads, num_ranks=parallel.sequence_size, ulysses=parallel.degrees.ulysses)
    own = own_rows(whole_qkv(history, noisy, heads, head_dim, batch, dtype), layout, parallel.sequence_rank)
    return SequenceAttention(parallel, None)._scatter_heads(own, layout)


def gather_heads(parallel: ContextParallel, *, sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> Tensor:
    """The way back alone: this rank's heads of the group's tokens in, its tokens for all heads out."""
    history, noisy, heads, head_dim, batch = sizes
    layout = TokenLayout.make(history, noisy, heads, num_ranks=parallel.sequence_size, ulysses=parallel.degrees.ulysses)
    whole = whole_qkv(history, noisy, heads, head_dim, batch, dtype)[:, :, 0]
    members = layout.group(parallel.sequence_rank)
    mine = torch.cat([own_rows(whole, layout, rank) for rank in members], dim=1)
    mine = mine[:, :, layout.head_slice(parallel.ulysses_rank)]
    rows = tuple(layout.tokens(rank) for rank in range(layout.num_ranks))
    return SequenceAttention(parallel, None)._gather_heads(mine, layout, rows)


def model(config: dict, parallel: ContextParallel) -> Transformer:
    """A random transformer, amplification scales included, the same on every rank."""
    transformer = Transformer(ModelConfig(**config), torch.float32)
    init_random_(transformer, 0)
    head_dim = config["attention_head_dim"]
    transformer.connect(choose_attention("auto", device=CPU, dtype=torch.float32, head_dim=head_dim), parallel)
    return transformer


def model_inputs(batch: int, height: int, width: int, groups: tuple[str, ...], text_dim: int):
    generator = torch.Generator().manual_seed(height * width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    frames = {"long": 16, "mid": 2, "short": 2}
    parts = {name: normal(batch, 16, count, 2 * height, 2 * width) for name, count in frames.items()}
    window = HistoryWindow(**{name: part if name in groups else None for name, part in parts.items()})
    return normal(batch, 16, 9, height, width), window, [normal(batch, 5, text_dim) for _ in range(2)]


def forward(
    parallel: ContextParallel, *, config: dict, size: tuple[int, int, int], groups: tuple[str, ...], guided: bool
) -> tuple[list[Tensor], dict[str, int], dict[str, int]]:
    """Velocities of one forward, and what this rank sent for it."""
    transformer = model(config, parallel)
    latents, window, texts = model_inputs(*size, groups, config["text_dim"])
    if not guided:
        texts = texts[:1]
    elif parallel.degrees.cfg > 1:
        texts = texts[parallel.cfg_rank : parallel.cfg_rank + 1]
    chunk = transformer.prepare(window, tuple(transformer.encode_text(text) for text in texts))
    parallel.traffic.bytes_sent.clear()
    parallel.traffic.calls.clear()
    velocities = list(transformer(latents, 700.0, chunk))
    return velocities, dict(parallel.traffic.bytes_sent), dict(parallel.traffic.calls)


def word(parallel: ContextParallel, *, values: list[int]) -> int:
    return parallel.word(values[parallel.rank])


_engines: dict[ContextParallel, tuple[object, Engine]] = {}


def engine(folder: str, parallel: ContextParallel, **settings: object) -> Engine:
    """An engine on the CPU; a context keeps its last one. Loading talks to all its ranks, so all must keep the same."""
    key = (folder, tuple(settings.items()))
    if _engines.get(parallel, (None, None))[0] != key:
        loaded = Engine.load(folder, EngineConfig(device="cpu", dtype="float32", **settings), parallel)
        _engines[parallel] = (key, loaded)
    return _engines[parallel][1]


def generate(
    parallel: ContextParallel, *, folder: str, arguments: dict, settings: dict | None = None
) -> tuple[Tensor, object]:
    """A whole video: latents, and frames on rank 0."""
    video = engine(folder, parallel, **(settings or {})).generate(VideoRequest(**arguments))
    return video.latents, video.frames


def generate_recorded(
    parallel: ContextParallel, *, folder: str, arguments: dict, kinds: list[str]
) -> tuple[Tensor, int, str | None, dict[str, int]]:
    """A video with steps recorded by stand-ins, one kind per rank: latents, replays, why recording was given up, bytes sent."""
    own, kind = engine(folder, parallel), kinds[parallel.rank]
    traffic = own.context.traffic
    recorder = Rerun(traffic) if kind == "works" else Unfaithful(kind, traffic)
    if kind == "in pieces":
        recorder = TapeRecorder(own.context)
    graphs = StepGraphs(own.transformer, recorder)
    own.maker.graphs = None if kind == "plain" else graphs
    traffic.bytes_sent.clear()
    try:
        latents = own.generate(VideoRequest(**arguments)).latents
    finally:
        own.maker.graphs = None
    return latents, recorder.num_replays, graphs.why_given_up, dict(traffic.bytes_sent)


def record_prompts(
    parallel: ContextParallel, *, folder: str, lengths: list[tuple[int, int]]
) -> tuple[list[Tensor], int]:
    """Videos with prompts and negative prompts of these lengths, steps recorded by a stand-in: latents, recordings."""
    own, recorder, latents = engine(folder, parallel), Rerun(parallel.traffic), []
    own.maker.graphs = StepGraphs(own.transformer, recorder)
    generator = torch.Generator().manual_seed(0)
    try:
        for positive, negative in lengths:
            embeds = (
                torch.randn(1, n, own.checkpoint.model.text_dim, generator=generator) for n in (positive, negative)
            )
            names = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True))
            request = VideoRequest(**names, num_frames=33, height=64, width=64, steps=2, guidance_scale=3.0)
            latents.append(own.generate(request).latents)
    finally:
        own.maker.graphs = None
    return latents, recorder.num_recordings


class _Nothing:
    """A piece that records nothing."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def replay(self) -> None: ...


def pieces_keep_no_memory(parallel: ContextParallel) -> tuple[bool, bool, list[float]]:
    """Whether what an exchange takes and delivers is let go once it was recorded between pieces, before and after its
    second half was, and what a replay then exchanges through the memory it borrowed."""
    borrowed: list[Tensor] = []
    kept: list[weakref.ref[Tensor]] = []

    def borrow(x: Tensor) -> Tensor:
        borrowed.append(torch.full_like(x, float(parallel.rank)))
        return borrowed[-1]

    def work() -> tuple[Tensor, ...]:
        counts = [2, 2]
        send = torch.zeros(4)
        settings = {"send_counts": counts, "receive_counts": counts, "purpose": "qkv", "group": "ulysses"}
        pending = parallel.start_all_to_all(send, **settings)
        kept.extend((weakref.ref(send), weakref.ref(pending._received)))
        del send
        kept_until_then.append(kept[0]() is not None)
        pending.wait()
        return ()

    kept_until_then: list[bool] = []
    replay, _ = recorders.record_pieces(parallel, _Nothing, work, borrowed=borrow)
    let_go = all(reference() is None for reference in kept)
    replay()
    return kept_until_then[0], let_go, borrowed[1].tolist()


def choose_recorder(parallel: ContextParallel, *, kinds: list[str], exchange: str) -> str | None:
    """What steps would be recorded with if these ranks talked through NCCL, and recording worked so well on each."""

    def make(device: torch.device, *, between_exchanges_of: ContextParallel | None = None) -> Rerun:
        if between_exchanges_of is not None:
            return TapeRecorder(between_exchanges_of)
        return Rerun() if kinds[parallel.rank] == "works" else Unfaithful(kinds[parallel.rank])

    before = dict(parallel.traffic.bytes_sent)
    with mock.patch.object(ContextParallel, "exchanges", "nccl"):
        recorder = recorders.choose_recorder(torch.device("cpu"), parallel, exchange=exchange, make=make)
    assert before == dict(parallel.traffic.bytes_sent), "a test of the exchanges counts as none"
    return None if recorder is None else type(recorder).__name__


def stop_early(parallel: ContextParallel, *, folder: str, arguments: dict, how: str) -> tuple[int, int]:
    """(chunks made, steps taken) when rank 0 alone ends an endless video in the way named."""
    steps = []

    def on_step(*_: object) -> None:
        steps.append(1)
        if how == "cancel" and parallel.is_first and len(steps) == 8:
            session.cancel()

    session = engine(folder, parallel).open(VideoRequest(**arguments), on_step)
    chunks = 0
    while session.next_chunk() is not None:
        chunks += 1
        if how == "close" and parallel.is_first and chunks == 2:
            break  # the other ranks are on their way into the next chunk
    session.close()
    session.close()
    return chunks, len(steps)


def refuse_loading(parallel: ContextParallel, *, folder: str, settings: dict) -> str:
    """What loading with these settings is refused with."""
    try:
        Engine.load(folder, EngineConfig(device="cpu", dtype="float32", **settings), parallel)
    except ValueError as error:
        return str(error)
    return "loaded"


def refuse(parallel: ContextParallel, *, folder: str, arguments: dict) -> str:
    """What a request that does not fit the ranks says."""
    try:
        engine(folder, parallel).open(VideoRequest(**arguments))
    except ValueError as error:
        return str(error)
    return ""


def vae(config: dict) -> VideoAutoencoder:
    """A random autoencoder, the same on every rank."""
    autoencoder = VideoAutoencoder(VaeConfig(**config))
    init_vae_(autoencoder, 0)
    return autoencoder.requires_grad_(False).channels_last_()


def vae_rows(
    parallel: ContextParallel,
    *,
    config: dict,
    size: tuple[int, int],
    frames_per_call: int | None,
    leaves_open: bool = False,
) -> tuple[Tensor | None, tuple[Tensor, Tensor], dict[str, int]]:
    """(decoded frames on rank 0, mean and deviation of an encoded clip, bytes sent) of pictures shared by rows.

    leaves_open has convolutions leave their biases to be added later, as on a GPU.
    """
    with mock.patch.object(native, "is_gpu", return_value=leaves_open):
        return _vae_rows(parallel, vae(config), config, size, frames_per_call)


def _vae_rows(
    parallel: ContextParallel,
    autoencoder: VideoAutoencoder,
    config: dict,
    size: tuple[int, int],
    frames_per_call: int | None,
) -> tuple[Tensor | None, tuple[Tensor, Tensor], dict[str, int]]:
    slab = Slab(parallel, size[0])
    parallel.traffic.bytes_sent.clear()
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config["z_dim"], 3, *size, generator=generator)
    pixels = autoencoder.decode(latents, frames_per_call=frames_per_call, slab=slab)
    frames = slab.collect_frames(pixels[0].permute(1, 2, 3, 0).contiguous())
    clip = torch.rand(1, 3, 9, size[0] * 8, size[1] * 8, generator=generator) * 2 - 1
    moments = autoencoder.encode(clip, frames_per_call=frames_per_call, slab=slab)
    return frames, moments, dict(parallel.traffic.bytes_sent)


def disagree(parallel: ContextParallel, *, ranks: list[int]) -> str:
    """What the check of latents says when some ranks' differ in one bit."""
    from helios_engine.engine.checks import check_same_latents

    latents = torch.arange(24.0).view(1, 2, 3, 4)
    if parallel.rank in ranks:
        latents[0, 1, 2, 3] = 23.000002
    try:
        check_same_latents(parallel, 1, 2, latents)
    except RuntimeError as error:
        return str(error)
    return ""


def share_bytes(parallel: ContextParallel, *, data: bytes) -> bytes:
    return parallel.share_bytes(data if parallel.is_first else None)


def host_groups(parallel: ContextParallel, *, wrong: bool) -> Tensor | str:
    """Attention through groups that a host made, four ranks as 2 x 2, against this pool's own context."""
    from torch import distributed as dist

    row, column = parallel.rank // 2, parallel.rank % 2
    groups = {
        "ulysses": parallel._groups["ring" if wrong else "ulysses"],
        "ring": parallel._groups["ulysses" if wrong else "ring"],
        "sequence": parallel._groups["sequence"],
    }
    for lacking in ({"sequence": None}, {}):
        try:
            ContextParallel.from_groups(**{**groups, **lacking}, rank_timeout=None)
        except ValueError as error:
            assert "give sequence" in str(error) or "control is needed" in str(error) or wrong
    try:
        own = ContextParallel.from_groups(**groups, control=parallel._control, rank_timeout=None)
    except ValueError as error:
        return str(error)
    assert (own.ring_rank, own.ulysses_rank, own.sequence_rank) == (row, column, dist.get_rank())
    return attend(own, sizes=(7, 12, 4, 8, 1), dtype=torch.float32, noisy_only=False)


def groups_made(parallel: ContextParallel, *, wanted: tuple[int, int, int]) -> list[list[int]]:
    """The data groups that a mesh of these degrees makes, by their ranks; the context it is part of serves."""
    from torch import distributed as dist

    made: list[list[int]] = []
    new_group = dist.new_group

    def noted(ranks, **named):
        if named.get("backend") != "gloo":  # the control group
            made.append(list(ranks))
        return new_group(ranks, **named)

    with mock.patch.object(dist, "new_group", noted):
        own = ContextParallel.from_process_group(Degrees(*wanted), rank_timeout=None)
    rows = torch.full((1, 1, 2), float(own.rank))
    counts = [1] * own.sequence_size
    gathered = own.gather_rows(rows, counts, "test")[0, :, 0].tolist()
    first = own.rank - own.sequence_rank
    assert gathered == [first + float(place) for place in range(own.sequence_size)]
    return made


def sent_per_forward(parallel: ContextParallel, *, folder: str, arguments: dict) -> dict:
    from helios_engine.tools.bench import count_bytes

    return count_bytes(engine(folder, parallel), VideoRequest(**arguments))


def close_from_a_thread(parallel: ContextParallel, *, folder: str, arguments: dict) -> list[int]:
    """Chunks of two videos, the first of them closed by another thread of rank 0 while its second chunk is computed."""
    import threading

    def chunks(closes: bool) -> int:
        steps: list[int] = []

        def on_step(*_: object) -> None:
            steps.append(1)
            if closes and parallel.is_first and len(steps) == 8:
                threading.Thread(target=session.close).start()

        request = VideoRequest(**{**arguments, "num_frames": None if closes else 66})
        session = engine(folder, parallel).open(request, on_step)
        count = 0
        while session.next_chunk() is not None:
            count += 1
        session.close()
        return count

    return [chunks(True), chunks(False)]
