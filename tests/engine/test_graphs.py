"""Recorded forwards, with stand-ins for the recorder."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helios_engine import Engine, EngineConfig, VideoRequest
from helios_engine.engine.graphs import StepGraphs, why_not_graphs
from helios_engine.engine.stage import Stage
from tests.helpers.recorders import Rerun, TapeRecorder, Unfaithful

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def recorded(engines):
    """(engine, recorder) of a variant, its forwards recorded while the test runs."""
    used: list[Engine] = []

    def get(variant: str, recorder: Rerun | None = None) -> tuple[Engine, Rerun]:
        engine, recorder = engines(variant), recorder or Rerun()
        engine.maker.graphs = StepGraphs(engine.transformer, recorder)
        used.append(engine)
        return engine, recorder

    yield get
    for engine in used:
        engine.maker.graphs = None


def _request(variant: str, prompt: str = "A red fox", seed: int = 3) -> VideoRequest:
    steps = 3 if variant == "base" else (2, 1, 1)
    return VideoRequest(prompt=prompt, num_frames=66, height=64, width=64, steps=steps, seed=seed)


def _copy_of(stage: Stage) -> Stage:
    solver = stage.solver.blank(len(stage.solver.coefficients))
    for own, other in zip(solver.state(), stage.solver.state(), strict=True):
        own.copy_(other)
    solver.coefficients.copy_(stage.solver.coefficients)
    return Stage(stage.transformer, solver, stage.times, stage.context, stage.guidance)


@pytest.mark.parametrize("recorder", [Rerun, TapeRecorder])
@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_replays_have_the_same_numbers(engines, recorded, variant: str, recorder: type[Rerun]) -> None:
    requests = [_request(variant), _request(variant, "Deep snow", 4)]
    expected = [engines(variant).generate(request).latents for request in requests]
    engine, recorder = recorded(variant, recorder())
    for request, latents in zip(requests, expected, strict=True):
        assert torch.equal(engine.generate(request).latents, latents)
    # One per stage, whatever the step, chunk or prompt; Mid's first stage has two steps and zero-init skips both.
    assert recorder.num_recordings == {"base": 1, "mid": 2, "distilled": 3}[variant]
    assert recorder.num_replays > recorder.num_recordings


def test_interleaved_videos_do_not_mix(engines, recorded) -> None:
    requests = [_request("distilled"), _request("distilled", "Deep snow", 4)]
    expected = [engines("distilled").generate(request).latents for request in requests]
    engine, _ = recorded("distilled")
    sessions = [engine.open(request) for request in requests]
    chunks = [[session.next_chunk().latents for session in sessions] for _ in range(2)]
    for index, latents in enumerate(expected):
        assert torch.equal(torch.cat([pair[index] for pair in chunks], dim=2), latents)


def test_stages_take_turns_in_one_recording(engines, monkeypatch) -> None:
    """Two videos whose steps alternate, as with decoding beside denoising: each moves out of the buffers for the other."""
    engine = engines("mid")
    stages: list[Stage] = []
    step = Stage.step

    def noted(stage: Stage) -> tuple[Tensor, ...]:
        stages.append(_copy_of(stage))
        return step(stage)

    monkeypatch.setattr(Stage, "step", noted)
    for seed in (3, 4):
        engine.generate(replace(_request("mid", seed=seed), num_frames=33, steps=(5, 1, 1)))
    monkeypatch.undo()
    first, second = (stage for stage in stages if stage.times.embedding.size(0) == 5 and stage.solver.index == 2)
    recorder = Rerun()
    graphs = StepGraphs(engine.transformer, recorder)
    expected = []
    for stage in (first, second):
        plain = _copy_of(stage)
        for _ in range(3):
            plain.step()
        expected.append(plain.solver.latents)
    for _ in range(3):
        for stage in (first, second):
            graphs(stage)
    assert recorder.num_recordings == 1
    assert recorder.num_replays == 6, "the first step's, to compare it, and five steps"
    for stage, latents in zip((first, second), expected, strict=True):
        assert torch.equal(stage.solver.latents, latents)
        assert stage.solver.index.item() - 2 == 3  # zero-init skipped two
    second.hold_still()
    graphs(first)
    assert second.solver.index.item() == 6, "it moved out with what it did meanwhile"


def test_callbacks_and_cancelling_work_between_replays(recorded) -> None:
    engine, recorder = recorded("base")
    seen: list[int] = []

    def on_step(stage: int, step: int, latents: Tensor) -> None:
        seen.append(step)
        if step == 1:
            session.cancel()

    session = engine.open(_request("base"), on_step)
    assert session.next_chunk() is None
    assert seen == [0, 1]
    assert recorder.num_replays == 2


def test_every_prompts_numbers_are_compared(engines, recorded) -> None:
    expected = engines("base").generate(_request("base")).latents
    engine, _ = recorded("base", Unfaithful("misses the last"))
    assert torch.equal(engine.generate(_request("base")).latents, expected)
    assert "nan off a plain step" in engine.maker.graphs.why_given_up


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("has no room", "it fails (CUDA out of memory.)"),
        ("refuses", "it fails (operation not permitted when stream is capturing)"),
        ("is stale", "off a plain step"),
        ("is another", "a replay is nan off a plain step"),
    ],
)
def test_a_recording_that_is_wrong_is_not_used(engines, recorded, caplog, kind: str, said: str) -> None:
    expected = engines("distilled").generate(_request("distilled")).latents
    engine, _ = recorded("distilled", Unfaithful(kind))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(engine.generate(_request("distilled")).latents, expected)
    assert said in caplog.text
    assert caplog.text.count("steps are not recorded") == 1
    assert said in engine.maker.graphs.why_given_up


def test_what_has_no_room_is_asked_again_later(engines, monkeypatch) -> None:
    monkeypatch.setattr("helios_engine.engine.graphs._USES_WITHOUT_ROOM", 2)
    engine, recorder, asked = engines("base"), Rerun(), []
    expected = engine.generate(_request("base")).latents

    def has_room(num_bytes: int) -> bool:
        asked.append(num_bytes)
        return len(asked) == 3

    monkeypatch.setattr(recorder, "has_room", has_room)
    engine.maker.graphs = graphs = StepGraphs(engine.transformer, recorder)
    try:
        assert torch.equal(engine.generate(_request("base")).latents, expected)
        assert (len(asked), recorder.num_recordings) == (2, 0), "in the first and the fourth of six steps"
        assert torch.equal(engine.generate(_request("base")).latents, expected)
        assert (len(asked), recorder.num_recordings) == (3, 1)
    finally:
        engine.maker.graphs = None
    assert graphs.why_given_up is None
    tokens = 9 * 4 * 4 + 2 * 4 * 4  # noisy, and of the history what counts
    assert asked[0] == asked[1] > 19 * engine.checkpoint.model.dim * 4 * tokens


def test_a_new_size_is_recorded_and_old_ones_are_dropped(recorded, monkeypatch) -> None:
    monkeypatch.setattr("helios_engine.engine.graphs._RECORDINGS_KEPT", 2)
    engine, recorder = recorded("base")
    for width, recordings in ((64, 1), (80, 2), (64, 2), (96, 3), (64, 3), (80, 4)):  # 80 was the longest unused
        engine.generate(VideoRequest(prompt="x", num_frames=33, height=64, width=width, steps=1))
        assert recorder.num_recordings == recordings, width
    assert len(engine.maker.graphs._recordings) == 2
    engine.maker.graphs.forget()
    assert not engine.maker.graphs.hold_memory


def test_prompts_no_recording_reads_are_dropped(recorded, monkeypatch) -> None:
    monkeypatch.setattr("helios_engine.engine.graphs._RECORDINGS_KEPT", 2)
    engine, _ = recorded("distilled")
    for tokens in (8, 9, 10, 11):
        embeds = torch.randn(1, tokens, engine.checkpoint.model.text_dim)
        engine.generate(VideoRequest(prompt_embeds=embeds, num_frames=33, height=64, width=64, steps=(1, 1, 1)))
    assert len(engine.maker.graphs._texts) == 1


def test_a_shape_is_recorded_when_it_has_come_often(engines) -> None:
    engine, recorder = engines("base"), Rerun()
    expected = engine.generate(_request("base")).latents
    engine.maker.graphs = StepGraphs(engine.transformer, recorder, uses_before=4)
    try:
        assert torch.equal(engine.generate(_request("base")).latents, expected)
    finally:
        engine.maker.graphs = None
    assert recorder.num_recordings == 1
    assert recorder.num_replays == 2, "the fifth of six forwards is recorded and compared, the sixth replayed"


def test_a_dropped_shape_has_to_come_often_again(engines, monkeypatch) -> None:
    monkeypatch.setattr("helios_engine.engine.graphs._RECORDINGS_KEPT", 1)
    engine, recorder = engines("base"), Rerun()
    engine.maker.graphs = StepGraphs(engine.transformer, recorder, uses_before=2)
    try:
        for width, recordings in [*[(64, 0)] * 2, (64, 1), *[(80, 1)] * 2, (80, 2), *[(64, 2)] * 2, (64, 3)]:
            engine.generate(VideoRequest(prompt="x", num_frames=33, height=64, width=width, steps=1))
            assert recorder.num_recordings == recordings
    finally:
        engine.maker.graphs = None


def test_recordings_give_way_when_memory_runs_out(engines, recorded, monkeypatch, caplog) -> None:
    expected = engines("distilled").generate(_request("distilled"))
    engine, _ = recorded("distilled")
    decode, calls = engine._frames.decode, []

    def full_once(*arguments: object) -> object:
        calls.append(engine.maker.graphs.hold_memory)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(*arguments)

    monkeypatch.setattr(engine._frames, "decode", full_once)
    with caplog.at_level(logging.WARNING):
        video = engine.generate(_request("distilled"))
    assert calls == [True, True, False]
    assert torch.equal(video.latents, expected.latents)
    assert "they leave too little memory" in caplog.text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"device": CPU}, "only CUDA devices record graphs"),
        ({"wanted": False}, "switched off"),
        ({"num_ranks": 2}, "only when that is asked for"),
        ({"num_ranks": 2, "wanted": True}, None),
        ({"offload": "group"}, "weights change their place"),
        ({"approximates": True}, "decides on the host"),
        ({"compiles": True}, "compile has its own way"),
    ],
)
def test_where_graphs_cannot_be_is_said(settings: dict, reason: str | None) -> None:
    usual = {"device": CUDA, "num_ranks": 1, "wanted": None, "offload": "none", "approximates": False}
    usual |= {"compiles": False, **settings}
    device = usual.pop("device")
    found = why_not_graphs(device, **usual)
    assert found is None if reason is None else reason in found


def test_asking_for_graphs_on_the_cpu_is_answered(toy, caplog) -> None:
    caplog.set_level(logging.WARNING)
    engine = Engine.load(toy / "base", EngineConfig(device="cpu", cuda_graphs=True))
    assert engine.maker.graphs is None
    assert "steps are not recorded as CUDA graphs: only CUDA devices record graphs" in caplog.text
    caplog.clear()
    assert Engine.load(toy / "base", EngineConfig(device="cpu")).maker.graphs is None
    assert "recorded" not in caplog.text, "by default graphs are used where they can be, and nothing is said"
