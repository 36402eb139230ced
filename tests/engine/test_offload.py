"""Weights that are not resident: the ring's order and bounds, the copier's, and the same numbers as without."""

from __future__ import annotations

import functools
import threading
import time
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helios_engine import Engine, EngineConfig, VideoRequest
from helios_engine.cli import main
from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.engine.copier import StreamCopier
from helios_engine.engine.memory import OutOfMemory, advise_memory, estimate_memory
from helios_engine.engine.offload import Turns
from helios_engine.engine.plan import plan_for
from helios_engine.model.offload import PlainCopier, Share, WeightRing

SMALL = {"height": 64, "width": 64, "num_frames": 66, "seed": 3}


class CountingCopier(PlainCopier):
    """Checks the order of calls; copies as late as is allowed, when a slot is said to be ready."""

    def __init__(self) -> None:
        self.pending: dict[int, list] = {}
        self.in_use: set[int] = set()
        self.loads: list[int] = []
        self.most_resident = 0
        self.released = 0

    def load(self, slot: int, pairs: list) -> None:
        assert slot not in self.in_use, "a slot is filled while it is read"
        self.loads.append(slot)
        for target, _ in pairs:
            target.fill_(float("nan"))  # what is read before it is ready shows
        self.pending[slot] = pairs
        self.most_resident = max(self.most_resident, len(self.pending.keys() | self.in_use))

    def ready(self, slot: int) -> None:
        super().load(slot, self.pending.pop(slot, []))
        self.in_use.add(slot)

    def used(self, slot: int) -> None:
        assert slot in self.in_use or slot not in self.pending, "a slot is given up while it is filled"
        self.in_use.discard(slot)
        self.released += 1


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in module.named_parameters()}


def _ring(count: int, num_slots: int, copier) -> tuple[WeightRing, list[nn.Module]]:
    """Layers of growing width, the index in every weight and its negative in every bias."""
    with torch.device("meta"):
        layers = [nn.Linear(4, 4 + index) for index in range(count)]
    sources = [
        {"weight": torch.full((4 + i, 4), float(i)), "bias": torch.full((4 + i,), -float(i))} for i in range(count)
    ]
    shares = [
        Share(layer, ("weight", "bias"), functools.partial(_tensors, layer), found)
        for layer, found in zip(layers, sources, strict=True)
    ]
    return WeightRing(shares, device=torch.device("cpu"), copier=copier, num_slots=num_slots), layers


@pytest.mark.parametrize("num_slots", [2, 3, 5, 9])
def test_the_ring_loads_each_layer_once_per_round_and_ahead(num_slots: int) -> None:
    copier = CountingCopier()
    ring, layers = _ring(5, num_slots, copier)
    for turn in range(3):
        for index in range(5):
            ring.use(index)
            ring.use(index)  # asking again costs nothing
            assert (layers[index].weight == index).all()
            assert (layers[index].bias == -index).all()
            assert all(layer.weight.is_meta for other, layer in enumerate(layers) if other != index)
            assert len(copier.in_use) == 1
        expected = 5 if num_slots >= 5 else 5 * (turn + 1) + num_slots - 1
        assert len(copier.loads) == expected, "every layer once, and what is fetched ahead of the next round"
    assert copier.most_resident <= num_slots
    assert ring.num_bytes == min(num_slots, 5) * 2 * 256, (
        "the largest share, weight and bias on boundaries of 256 bytes"
    )


def test_any_order_is_served_and_a_rest_frees_everything() -> None:
    copier = CountingCopier()
    ring, layers = _ring(4, 2, copier)
    for index in (2, 0, 3, 3, 1, 2):
        ring.use(index)
        assert (layers[index].weight == index).all()
    ring.rest()
    assert all(layer.weight.is_meta for layer in layers)
    copier.in_use.clear()
    copier.released = 0
    ring.use(1)
    assert copier.released == 2, "copies into new memory wait for what was under way when it was allocated"
    assert (layers[1].weight == 1).all()


def test_parts_of_one_module_in_two_rings_of_one_copier() -> None:
    with torch.device("meta"):
        modules = [nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 5)}) for _ in range(3)]
    copier, rings = CountingCopier(), []
    for place, part in enumerate("ab"):
        shares = []
        for index, module in enumerate(modules):
            sources = {n: torch.full(t.shape, 10.0 * index + place) for n, t in _tensors(module).items()}
            names = (f"{part}.weight", f"{part}.bias")
            shares.append(Share(module, names, functools.partial(_tensors, module), sources))
        rings.append(WeightRing(shares, device=torch.device("cpu"), copier=copier, num_slots=2, first_slot=2 * place))
    for index, module in enumerate(modules):
        for place, part in enumerate("ab"):
            rings[place].use(index)
            for other, name in enumerate("ab"[: place + 1]):
                for parameter in module[name].parameters():
                    assert (parameter == 10 * index + other).all(), (index, part, name)
    assert {slot < 2 for slot in copier.loads} == {True, False}


def test_every_prompt_is_served_at_one_visit(toy: Path, engines, monkeypatch) -> None:
    """A guided forward loads each block once, and the part that serves the text alone not at all."""
    copiers: list[CountingCopier] = []

    def make_copier(device: torch.device) -> CountingCopier:
        copiers.append(CountingCopier())
        return copiers[-1]

    monkeypatch.setattr("helios_engine.engine.offload.make_copier", make_copier)
    config = {"device": "cpu", "dtype": "float32", "offload": "group"}
    engine = Engine.load(toy / "base", EngineConfig(**config))
    request = VideoRequest(prompt="A red fox", steps=4, guidance_scale=5.0, **{**SMALL, "num_frames": 33})
    session = engine.open(request)
    copier, blocks = copiers[0], engine.checkpoint.model.num_layers
    assert len(copier.loads) == 2 * blocks + 1, "once per prompt, and one fetched ahead that is not used"
    assert min(copier.loads) == 2, "of the text's own ring"
    copier.loads.clear()
    chunk = session.next_chunk()
    assert torch.equal(chunk.latents, engines("base").generate(request).latents)
    assert len(copier.loads) == 4 * blocks + 1
    assert max(copier.loads) == 1


class _Event:
    def __init__(self) -> None:
        self.done = False

    def record(self, stream: object) -> None:
        self.done = True

    def synchronize(self) -> None:
        assert self.done, "a buffer is waited for that was never sent"


def _fake_cuda() -> types.SimpleNamespace:
    """Streams that run at once, and a log of what waited for what."""
    import contextlib

    waits: list[object] = []
    devices: list[tuple[str, torch.device]] = []

    def set_device(device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:
            raise ValueError("Expected a torch.device with a specified index")  # as torch says
        devices.append((threading.current_thread().name, device))

    stream = types.SimpleNamespace(wait_event=waits.append)
    return types.SimpleNamespace(
        Stream=lambda device: stream,
        Event=_Event,
        stream=lambda _: contextlib.nullcontext(),
        current_stream=lambda _: stream,
        set_device=set_device,
        current_device=lambda: 3,
        waits=waits,
        devices=devices,
    )


def test_the_stream_copier_moves_any_size_through_small_buffers() -> None:
    api = _fake_cuda()
    copier = StreamCopier(torch.device("cpu"), buffer_bytes=48, num_buffers=3, api=api)
    sources = [torch.randn(7, 9, dtype=torch.bfloat16), torch.randn(1), torch.randn(5, dtype=torch.float16)]
    targets = [torch.zeros(7, 9, dtype=torch.bfloat16), torch.zeros(1), torch.zeros(5)]  # the last is cast on its way
    for _ in range(2):
        copier.load(0, list(zip(targets, sources, strict=True)))
        copier.ready(0)
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(targets, sources, strict=True))
        for target in targets:
            target.zero_()
        copier.used(0)
    assert api.devices == [("helios-copier", torch.device("cpu"))], "or its context would be GPU 0's"
    assert len(api.waits) == 3, "ready twice, and the second load waited for the end of the first use"
    copier.close()
    assert not any(thread.name == "helios-copier" for thread in threading.enumerate())


def test_the_copiers_thread_is_on_the_gpu_it_serves(monkeypatch) -> None:
    """device "cuda" has no index, and a thread begins on GPU 0."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **named: empty(*size, **named))
    api = _fake_cuda()
    copier = StreamCopier(torch.device("cuda"), buffer_bytes=48, num_buffers=3, api=api)
    target, source = torch.zeros(5), torch.randn(5)
    copier.load(0, [(target, source)])
    copier.ready(0)
    assert torch.equal(target, source)
    assert api.devices == [("helios-copier", torch.device("cuda", 3))]
    copier.close()


def test_a_copier_without_its_device_says_so() -> None:
    api = _fake_cuda()

    def refuse(device: torch.device) -> None:
        raise RuntimeError("no such device")

    api.set_device = refuse
    copier = StreamCopier(torch.device("cpu"), api=api)
    for _ in range(2):
        copier.load(0, [(torch.zeros(3), torch.ones(3))])
        with pytest.raises(RuntimeError, match="while streaming: no such device"):
            copier.ready(0)
    copier.close()


def test_what_cannot_be_read_is_said_by_the_computing_thread() -> None:
    copier = StreamCopier(torch.device("cpu"), api=_fake_cuda())
    copier.load(0, [(torch.zeros(3), torch.zeros(4))])
    with pytest.raises(RuntimeError, match="weights could not be read while streaming"):
        copier.ready(0)
    copier.close()


def test_whatever_breaks_is_said_and_nothing_is_computed_without_weights() -> None:
    copier = StreamCopier(torch.device("cpu"), api=_fake_cuda())
    copier.load(0, [(torch.zeros(3), torch.zeros(3))])
    copier.ready(0)
    copier.load(0, [(torch.zeros(3), None)])
    with pytest.raises(RuntimeError, match="weights could not be read"):
        copier.ready(0)
    copier.close()
    copier.close()


def test_after_a_failed_copy_everything_can_be_closed() -> None:
    with torch.device("meta"):
        layers = [nn.Linear(4, 4) for _ in range(3)]
    broken = {"weight": torch.zeros(4, 4), "bias": torch.zeros(5)}
    shares = [Share(layer, ("weight", "bias"), functools.partial(_tensors, layer), broken) for layer in layers]
    copier = StreamCopier(torch.device("cpu"), api=_fake_cuda())
    ring = WeightRing(shares, device=torch.device("cpu"), copier=copier)
    with pytest.raises(RuntimeError, match="weights could not be read"):
        ring.use(0)
    ring.close()
    assert not ring._slots
    assert all(layer.weight.is_meta for layer in layers)
    assert not any(thread.name == "helios-copier" for thread in threading.enumerate())


def test_a_slot_given_up_is_held_by_nobody() -> None:
    copier = StreamCopier(torch.device("cpu"), api=_fake_cuda())
    slot, weights = torch.zeros(3), torch.ones(3)
    watched = weakref.ref(slot)
    copier.load(0, [(slot, weights)])
    copier.ready(0)
    del slot
    deadline = time.monotonic() + 5
    while watched() is not None and time.monotonic() < deadline:
        time.sleep(0.01)  # the thread may be between two lines
    assert watched() is None
    copier.close()


def test_a_component_that_cannot_be_filled_leaves_nothing(toy: Path) -> None:
    with torch.device("meta"):
        part = nn.Linear(3, 3)

    def fill() -> None:
        raise OSError("the disk is gone")

    turns = Turns(torch.device("cpu"), {"a": (part, fill)})
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            turns.use("a")
        assert part.weight.is_meta


def test_an_engine_lets_go_of_its_threads(toy: Path, monkeypatch) -> None:
    closed = []
    monkeypatch.setattr(WeightRing, "close", lambda ring: closed.append(ring))
    engine = Engine.load(toy / "base", EngineConfig(device="cpu", dtype="float32", offload="group"))
    engine.close()
    assert len(closed) == 3, "the blocks', their text parts' and the text encoder's"


def test_one_component_at_a_time() -> None:
    with torch.device("meta"):
        parts = {name: nn.Linear(3, 3) for name in ("a", "b")}
    filled = []
    turns = Turns(torch.device("cpu"), {name: (part, lambda n=name: filled.append(n)) for name, part in parts.items()})
    for name in ("a", "a", "b", "a"):
        turns.use(name)
        other = "b" if name == "a" else "a"
        assert not parts[name].weight.is_meta
        assert parts[other].weight.is_meta
    assert filled == ["a", "b", "a"]


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
@pytest.mark.parametrize(
    "settings",
    [
        {"offload": "group"},
        {"offload": "group", "offload_ahead": 2},
        {"offload": "group", "offload_level": "leaf", "offload_ahead": 3},
        {"offload": "model"},
    ],
)
def test_the_same_numbers_as_resident(toy: Path, engines, variant: str, settings: dict) -> None:
    steps = 2 if variant == "base" else (1, 1, 1)
    request = VideoRequest(prompt="A red fox", steps=steps, **SMALL)
    expected = engines(variant).generate(request)
    engine = Engine.load(toy / variant, EngineConfig(device="cpu", dtype="float32", **settings))
    for _ in range(2):
        video = engine.generate(request)
        assert torch.equal(video.latents, expected.latents)
        assert np.array_equal(video.frames, expected.frames)


def test_pictures_and_recomputed_text(toy: Path, engines, monkeypatch) -> None:
    monkeypatch.setattr("helios_engine.engine.offload.has_room_for_text", lambda *_: False)
    picture = torch.rand(3, 64, 64)
    request = VideoRequest(prompt="A red fox", image=picture.permute(1, 2, 0).numpy(), steps=2, **SMALL)
    expected = engines("base").generate(request)
    for settings in ({"offload": "group"}, {"offload": "group", "offload_level": "leaf"}, {"offload": "model"}):
        engine = Engine.load(toy / "base", EngineConfig(device="cpu", dtype="float32", **settings))
        assert torch.equal(engine.generate(request).latents, expected.latents)
    with engine.open(request) as session:
        assert session.texts[0].keys_values is not None
    group = Engine.load(toy / "base", EngineConfig(device="cpu", dtype="float32", offload="group"))
    with group.open(request) as session:
        assert session.texts[0].keys_values is None
    batch = [request, VideoRequest(prompt="Snow", image=picture.permute(1, 2, 0).numpy(), steps=2, **SMALL)]
    alone = group.generate(batch[1]).latents
    rounds = [[chunk.latents for chunk in chunks] for chunks in group.stream_batch(batch)]
    torch.testing.assert_close(torch.cat([second for _, second in rounds], dim=2), alone, rtol=0, atol=1e-4)


def test_a_dtype_that_would_be_cast_every_time_is_refused(toy: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("helios_engine.model.offload._SMALL", 1024)  # the toy's weights are small
    with pytest.raises(ValueError, match=r"in float32.*computes in bfloat16.*helios-engine convert SRC DST"):
        Engine.load(toy / "base", EngineConfig(device="cpu", dtype="bfloat16", offload="group"))
    converted = tmp_path / "bf16"
    assert main(["convert", str(toy / "base"), str(converted)]) == 0
    with pytest.raises(ValueError, match=r"in bfloat16.*computes in float32; use dtype bfloat16"):
        Engine.load(converted, EngineConfig(device="cpu", dtype="float32", offload="group"))
    request = VideoRequest(prompt="A red fox", steps=1, **SMALL)
    config = EngineConfig(device="cpu", dtype="bfloat16")
    resident = Engine.load(converted, config).generate(request).latents
    streamed = Engine.load(converted, EngineConfig(device="cpu", dtype="bfloat16", offload="group"))
    assert torch.equal(streamed.generate(request).latents, resident)


@pytest.mark.full
def test_two_ranks_stream_their_weights(toy: Path, tmp_path: Path) -> None:
    flags = ["generate", "--model", str(toy / "distilled"), "--prompt", "x", "--device", "cpu", "--quiet"]
    flags += ["--height", "64", "--width", "64", "--num-frames", "33", "--steps", "1,1,1", "--num-gpus", "2"]
    for name, more in (("plain", []), ("group", ["--offload", "group"])):
        assert main([*flags, "--output", str(tmp_path / f"{name}.npy"), *more]) == 0
    assert np.array_equal(np.load(tmp_path / "plain.npy"), np.load(tmp_path / "group.npy"))


def test_the_estimate_knows_what_stays(toy: Path) -> None:
    checkpoint = Checkpoint.open(toy / "base")
    plan = plan_for(checkpoint, VideoRequest(prompt="x", **SMALL))
    estimates = {
        offload: estimate_memory(checkpoint, plan, EngineConfig(device="cpu", offload=offload), 512)
        for offload in ("none", "group", "model")
    }
    none, group = estimates["none"], estimates["group"]
    assert none.transformer_slots == 0
    assert group.transformer < none.transformer - group.transformer_slots
    assert group.peak < none.peak
    assert estimates["model"].peak < none.peak


@pytest.mark.parametrize("keeps_text", [True, False])
@pytest.mark.parametrize(("level", "ahead"), [("block", 1), ("block", 9), ("leaf", 1), ("leaf", 4)])
def test_the_estimate_of_the_slots_is_what_they_take(
    toy: Path, monkeypatch, level: str, ahead: int, keeps_text: bool
) -> None:
    for module in ("offload", "memory"):
        monkeypatch.setattr(f"helios_engine.engine.{module}.has_room_for_text", lambda *_: keeps_text)
    config = EngineConfig(device="cpu", dtype="float32", offload="group", offload_level=level, offload_ahead=ahead)
    engine = Engine.load(toy / "base", config)
    plan = engine.plan(VideoRequest(prompt="x", **SMALL))
    estimate = estimate_memory(engine.checkpoint, plan, config, 512)
    assert engine.transformer._ring.num_bytes == pytest.approx(estimate.transformer_slots, rel=0.01)
    resident = sum(p.nbytes for p in engine.transformer.parameters() if not p.is_meta)
    assert resident == estimate.transformer


def test_out_of_memory_names_a_way_out(toy: Path, monkeypatch) -> None:
    engine = Engine.load(toy / "base", EngineConfig(device="cpu", dtype="float32"))

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(engine.transformer.blocks[1], "feed_forward_", full)
    with engine.open(VideoRequest(prompt="x", steps=1, **SMALL)) as session:
        with pytest.raises(
            OutOfMemory, match=r"about 0\.\d GB; --offload group needs about 0\.\d GB \(CUDA out of memory"
        ):
            session.next_chunk()
        assert session.index == 0


def test_the_mildest_way_out_comes_first(toy: Path) -> None:
    checkpoint = Checkpoint.open(toy / "base")
    plan = plan_for(checkpoint, VideoRequest(prompt="x", **SMALL))
    beside, in_line = (EngineConfig(device="cpu", overlap_decode=on) for on in (True, False))
    advice = {
        "while it runs": (beside, plan, "--no-overlap-decode needs about"),
        "while weights are loaded": (beside, None, "--offload group needs far less"),
        "in line": (in_line, plan, "--offload group needs about"),
        "8-bit products": (EngineConfig(device="cpu", quality="fast"), plan, "--offload group --no-fp8 needs about"),
        "streamed already": (EngineConfig(device="cpu", offload="group"), None, "--vae-dtype bfloat16 needs far less"),
    }
    for when, (config, planned, expected) in advice.items():
        with pytest.raises(OutOfMemory, match=expected), advise_memory(checkpoint, config, planned):
            raise torch.OutOfMemoryError(when)
    estimates = [estimate_memory(checkpoint, plan, config, 512) for config in (beside, in_line)]
    smaller = min(estimates[1].denoise_activations, estimates[1].decode_activations)
    assert estimates[0].peak == estimates[1].peak + smaller
