"""Sessions: stepping, stopping, saving and continuing, batching, and memory that does not grow."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import psutil
import pytest
import torch

from helios_engine import Engine, EngineConfig, SessionState, VideoRequest
from helios_engine.request import FRAMES_PER_CHUNK

SMALL = {"height": 64, "width": 64, "max_sequence_length": 16}
# Several videos share matrix products whose blocking may differ from one video's.
BATCH_TOLERANCE = 1e-5


def _request(**changes: object) -> VideoRequest:
    return VideoRequest(**{"prompt": "A red fox", "num_frames": 99, "seed": 5, **SMALL, **changes})


def _steps(variant: str) -> dict[str, object]:
    return {"steps": 3} if variant == "base" else {"steps": (1, 2, 1)}


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_chunks_come_one_by_one_and_add_up(engines, variant: str) -> None:
    engine = engines(variant)
    request = _request(num_frames=80, **_steps(variant))
    chunks = list(engine.stream(request))
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [len(chunk.frames) for chunk in chunks] == [33, 33, 14]
    assert all(chunk.frames.dtype == np.uint8 and chunk.frames.shape[1:] == (64, 64, 3) for chunk in chunks)
    assert all(chunk.latents.shape == (1, 16, 9, 8, 8) and chunk.latents.dtype == torch.float32 for chunk in chunks)
    assert all(chunk.timing.denoise_seconds > 0 and chunk.timing.decode_seconds > 0 for chunk in chunks)
    video = engine.generate(request)
    assert np.array_equal(video.frames, np.concatenate([chunk.frames for chunk in chunks]))
    assert torch.equal(video.latents, torch.cat([chunk.latents for chunk in chunks], dim=2))


def test_the_same_seed_is_the_same_video_and_another_is_not(engines) -> None:
    engine = engines("distilled")
    first, again, other = (engine.generate(_request(num_frames=33, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.latents, again.latents)
    assert (first.latents - other.latents).abs().max() > 0.1


def test_frame_kinds_agree(engines) -> None:
    engine = engines("distilled")
    kinds = {kind: next(engine.stream(_request(frames=kind))).frames for kind in ("uint8", "float32", "device")}
    assert kinds["float32"].dtype == np.float32
    assert isinstance(kinds["device"], torch.Tensor)
    assert np.array_equal(kinds["device"].numpy(), kinds["uint8"])
    assert np.array_equal(np.rint(kinds["float32"] * 255).astype(np.uint8), kinds["uint8"])
    assert kinds["float32"].min() >= 0
    assert kinds["float32"].max() <= 1


def test_untrimmed_keeps_the_whole_last_chunk(engines) -> None:
    assert len(engines("distilled").generate(_request(num_frames=40, trim=False)).frames) == 66


def test_given_noise_is_used_and_none_is_drawn(engines) -> None:
    engine = engines("base")
    request = _request(num_frames=66, steps=2)
    drawn = torch.cat(
        [torch.randn(1, 16, 9, 8, 8, generator=g) for g in [torch.Generator().manual_seed(5)] for _ in range(2)], dim=2
    )
    expected = engine.generate(request)
    given = engine.generate(_request(num_frames=66, steps=2, seed=99, latents=drawn))
    assert torch.equal(given.latents, expected.latents)


def test_precomputed_embeddings_of_any_length(engines) -> None:
    engine = engines("distilled")
    embeds = engine.text_encoder.encode("A red fox", max_length=16)
    expected = engine.generate(_request(num_frames=33)).latents
    given = engine.generate(VideoRequest(prompt_embeds=embeds, num_frames=33, seed=5, height=64, width=64))
    assert torch.equal(given.latents, expected)
    short = engine.generate(VideoRequest(prompt_embeds=embeds[:, :3], num_frames=33, seed=5, height=64, width=64))
    assert (short.latents - expected).abs().max() > 1e-4


@pytest.mark.parametrize("through_file", [False, True])
@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_state_continues_bit_for_bit(engines, toy, tmp_path, variant: str, through_file: bool) -> None:
    engine = engines(variant)
    request = _request(num_frames=132, **_steps(variant))
    expected = engine.generate(request)
    session = engine.open(request)
    chunks = [session.next_chunk(), session.next_chunk()]
    state = session.state()
    session.next_chunk()  # the state is a copy: going on does not change it
    if through_file:
        state.save(tmp_path / "state.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
        state = SessionState.load(tmp_path / "state.safetensors")
        engine = Engine.load(toy / variant, engine.config)
    restored = engine.restore(state)
    assert restored.index == 2
    while (chunk := restored.next_chunk()) is not None:
        chunks.append(chunk)
    assert torch.equal(torch.cat([c.latents for c in chunks], dim=2), expected.latents)
    assert np.array_equal(np.concatenate([c.frames for c in chunks]), expected.frames)


def test_state_keeps_given_noise_and_image(engines) -> None:
    engine = engines("mid")
    noise = torch.randn(1, 16, 27, 8, 8)
    image = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    request = _request(steps=1, latents=noise, image=image, skip_first_chunk=True)
    expected = engine.generate(request).latents
    session = engine.open(request)
    first = session.next_chunk()
    rest = list(iter(engine.restore(session.state()).next_chunk, None))
    assert torch.equal(torch.cat([first.latents, *(c.latents for c in rest)], dim=2), expected)


def _interrupt(kind: str, session) -> None:
    """Break off the session's current chunk in one of the ways a chunk can break off."""
    from unittest import mock

    if kind == "cancel":
        session.on_step = lambda *_: session.cancel()
        assert session.next_chunk() is None
    elif kind == "callback":

        def fail(*_: object) -> None:
            raise RuntimeError("stop here")

        session.on_step = fail
        with pytest.raises(RuntimeError, match="stop here"):
            session.next_chunk()
    else:
        frames = session._engine._frames
        with (
            mock.patch.object(frames, "decode", side_effect=RuntimeError("out of memory")),
            pytest.raises(RuntimeError, match="out of memory"),
        ):
            session.next_chunk()
    session.on_step = None


@pytest.mark.parametrize("kind", ["cancel", "callback", "decode"])
def test_a_chunk_that_broke_off_was_never_begun(engines, kind: str) -> None:
    engine = engines("mid")
    request = _request(num_frames=99, steps=1)
    expected = engine.generate(request)
    session = engine.open(request)
    chunks = [session.next_chunk()]
    _interrupt(kind, session)
    assert session.index == 1
    going_on = engine.restore(session.state()) if kind == "cancel" else session
    chunks += list(iter(going_on.next_chunk, None))
    assert torch.equal(torch.cat([c.latents for c in chunks], dim=2), expected.latents)
    assert np.array_equal(np.concatenate([c.frames for c in chunks]), expected.frames)


def test_a_session_does_not_keep_its_sources(engines) -> None:
    import weakref

    clip = torch.rand(40, 3, 64, 64)
    alive = weakref.ref(clip)
    session = engines("distilled").open(_request(video=clip))
    del clip
    gc.collect()
    assert alive() is None
    assert session.next_chunk() is not None


def test_a_restored_state_keeps_the_prompt_and_can_be_taken_again(engines) -> None:
    engine = engines("distilled")
    session = engine.open(_request())
    session.next_chunk()
    again = engine.restore(engine.restore(session.state()).state())
    assert again.settings["prompt"] == "A red fox"
    assert torch.equal(again.next_chunk().latents, session.next_chunk().latents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": torch.zeros(1, 16, 7, 8, 8)}, "history .* does not fit"),
        ({"anchor": torch.zeros(1, 16, 2, 8, 8)}, "anchor .* does not fit"),
        ({"noise": torch.zeros(3, dtype=torch.uint8)}, "noise generator is damaged"),
        ({"index": -1}, "chunk index -1 lies outside"),
        ({"index": 99}, "chunk index 99 lies outside"),
        ({"request": {"colour": 3}}, "unknown request field colour"),
        ({"negative": torch.zeros(1, 16, 64)}, "a negative prompt has no effect"),
    ],
)
def test_a_damaged_state_is_refused(engines, changes: dict, message: str) -> None:
    from dataclasses import replace

    engine = engines("distilled")
    state = engine.open(_request()).state()
    if "request" in changes:
        changes = {"request": {**state.request, **changes["request"]}}
    with pytest.raises(ValueError, match=message):
        engine.restore(replace(state, **changes))


def test_batch_chunks_do_not_share_memory(engines) -> None:
    chunks = next(engines("distilled").stream_batch([_request(seed=seed) for seed in (1, 2)]))
    assert all(c.latents.untyped_storage().nbytes() == c.latents.nbytes for c in chunks)


def test_state_is_small(engines) -> None:
    state = engines("base").open(_request()).state()
    size = sum(t.nbytes for t in (state.history, state.noise, state.positive, state.negative) if t is not None)
    assert size < 2e6


def test_a_foreign_file_is_no_state(toy) -> None:
    with pytest.raises(ValueError, match="is no session state"):
        SessionState.load(toy / "base" / "vae" / "diffusion_pytorch_model.safetensors")


def test_steps_are_reported_in_order(engines) -> None:
    seen = []
    engine = engines("distilled")
    request = _request(num_frames=66, steps=(1, 2, 1), amplify_first_chunk=True)
    engine.generate(request, lambda stage, step, latents: seen.append((stage, step, latents.shape[-1])))
    first = [(0, 0, 2), (0, 1, 2), (1, 0, 4), (1, 1, 4), (1, 2, 4), (1, 3, 4), (2, 0, 8), (2, 1, 8)]
    assert seen == [*first, (0, 0, 2), (1, 0, 4), (1, 1, 4), (2, 0, 8)]


def test_cancel_stops_within_one_step(engines) -> None:
    engine = engines("base")
    steps = []

    def on_step(stage: int, step: int, latents: torch.Tensor) -> None:
        steps.append(step)
        if len(steps) == 3:
            session.cancel()

    session = engine.open(_request(steps=10), on_step)
    assert session.next_chunk() is None
    assert steps == [0, 1, 2]
    assert session.is_finished
    assert session.next_chunk() is None


def test_cancel_from_another_thread(engines) -> None:
    engine = engines("base")
    begun = threading.Event()
    session = engine.open(_request(steps=1000, num_frames=None), lambda *_: begun.set())
    result = []
    worker = threading.Thread(target=lambda: result.append(session.next_chunk()))
    worker.start()
    assert begun.wait(30)
    session.close()
    worker.join(30)
    assert not worker.is_alive()
    assert result == [None]


def test_leaving_a_stream_closes_it(engines) -> None:
    engine = engines("distilled")
    with engine.stream(_request(num_frames=None)) as stream:
        for chunk in stream:
            if chunk.index == 1:
                break
    assert stream.session.is_finished
    assert list(stream) == []
    with pytest.raises(ValueError, match="closed"):
        stream.session.state()


def test_an_exception_in_the_callback_reaches_the_caller(engines) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        engines("distilled").generate(_request(), fail)


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_a_batch_has_the_numbers_each_video_has_alone(engines, variant: str) -> None:
    engine = engines(variant)
    guided = {} if variant == "distilled" else {"negative_prompt": "blurred"}
    requests = [
        _request(seed=seed, prompt=prompt, num_frames=70, **_steps(variant), **guided)
        for seed, prompt in ((1, "A red fox"), (2, "A mountain lake in autumn"), (3, ""))
    ]
    rounds = list(engine.stream_batch(requests))
    assert [len(chunks) for chunks in rounds] == [3, 3, 3]
    for number, request in enumerate(requests):
        alone = engine.generate(request)
        latents = torch.cat([chunks[number].latents for chunks in rounds], dim=2)
        assert (latents - alone.latents).abs().max() <= BATCH_TOLERANCE
        frames = np.concatenate([chunks[number].frames for chunks in rounds])
        assert np.abs(frames.astype(int) - alone.frames.astype(int)).max() <= 1
        assert len(frames) == 70


def test_sessions_interleave(engines) -> None:
    engine = engines("distilled")
    sessions = [engine.open(_request(seed=seed, num_frames=66)) for seed in (1, 2)]
    turns = [session.next_chunk() for _ in range(2) for session in sessions]
    for number, seed in enumerate((1, 2)):
        expected = engine.generate(_request(seed=seed, num_frames=66)).latents
        assert torch.equal(torch.cat([turns[number].latents, turns[number + 2].latents], dim=2), expected)


def test_closing_a_batch_early_closes_its_sessions(engines) -> None:
    rounds = engines("distilled").stream_batch([_request(num_frames=None, seed=seed) for seed in (1, 2)])
    assert len(next(rounds)) == 2
    rounds.close()
    assert list(rounds) == []


@pytest.mark.parametrize("settings", [{}, {"offload": "group", "offload_level": "leaf"}, {"offload": "model"}], ids=str)
def test_an_engine_let_go_of_is_gone(toy, settings: dict) -> None:
    """Without a collection of cycles: its weights are too large to wait for one."""
    engine = Engine.load(toy / "base", EngineConfig(device="cpu", **settings))
    engine.generate(_request(num_frames=33, steps=1))
    watched = weakref.ref(engine.transformer)
    gc.disable()
    try:
        del engine
        assert watched() is None
    finally:
        gc.enable()


def test_memory_does_not_grow_with_the_video(engines) -> None:
    engine = engines("distilled")
    process = psutil.Process()

    def resident(stream, until: int) -> int:
        for chunk in stream:
            if chunk.index == until:
                break
        del chunk
        gc.collect()
        return process.memory_info().rss

    stream = engine.stream(_request(num_frames=None, steps=1, amplify_first_chunk=False))
    early, late = resident(stream, 4), resident(stream, 60)
    stream.close()
    assert late - early <= 8 * 2**20, (late - early) / 2**20


def test_frames_per_chunk_is_the_models() -> None:
    assert FRAMES_PER_CHUNK == 33
