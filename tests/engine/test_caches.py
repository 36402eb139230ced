"""Nothing is computed twice: counted calls, and host numbers only in the loop. That results agree is parity's part."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch

from helios_engine import VideoRequest
from helios_engine.model import rope
from helios_engine.model.block import Block
from helios_engine.model.embed import Embedder
from helios_engine.model.transformer import Transformer
from helios_engine.ops import native, reference

SMALL = {"prompt": "A red fox", "height": 64, "width": 64, "max_sequence_length": 16, "num_frames": 99}


def _counting(monkeypatch, owner: object, name: str, calls: Counter) -> None:
    original = getattr(owner, name)

    def wrapper(*args, **kwargs):
        calls[name] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


@pytest.fixture
def calls(monkeypatch) -> Counter:
    counter: Counter = Counter()
    for owner, name in (
        (Embedder, "text"),
        (Embedder, "_time"),
        (Embedder, "history"),
        (Block, "text_keys_values"),
        (Transformer, "run"),
        (rope, "chunk_table"),
        (rope, "history_table"),
    ):
        _counting(monkeypatch, owner, name, counter)
    return counter


def _fresh(engine) -> None:
    engine.transformer.forget()
    engine.transformer._tables.clear()


def test_distilled_counts(engines, calls: Counter) -> None:
    engine = engines("distilled")
    _fresh(engine)
    engine.generate(VideoRequest(**SMALL, steps=2, amplify_first_chunk=False))
    layers = engine.checkpoint.model.num_layers
    assert calls["run"] == 3 * 6
    assert calls["text"] == 1  # once per prompt
    assert calls["text_keys_values"] == layers
    assert calls["history"] == 3  # once per chunk
    assert calls["_time"] == 6 + 1  # once per timestep, and the history's timestep 0
    assert (calls["chunk_table"], calls["history_table"]) == (3, 1)  # once per stage shape
    engine.generate(VideoRequest(**SMALL, steps=2, amplify_first_chunk=False, seed=7))
    assert calls["_time"] == 7
    assert (calls["chunk_table"], calls["history_table"]) == (3, 1)
    assert calls["text"] == 2


def test_zero_init_runs_no_useless_forward(engines, calls: Counter) -> None:
    engine = engines("mid")
    engine.generate(VideoRequest(**SMALL, steps=(4, 1, 1)))
    assert calls["run"] == 3 * (2 + 1 + 1)  # two of stage 0's four steps hold still; a guided step is one call
    calls.clear()
    engine.generate(VideoRequest(**SMALL, steps=(4, 1, 1), zero_steps=0))
    assert calls["run"] == 3 * (3 + 1 + 1)
    calls.clear()
    engine.generate(VideoRequest(**SMALL, steps=(4, 1, 1), zero_init=False))
    assert calls["run"] == 3 * 6


def _rows_through(monkeypatch, engine, guidance: float) -> list[tuple[str, int]]:
    """Rows that enter each feed-forward and each attention's queries, in one forward of Base."""
    seen: list[tuple[str, int]] = []
    gelu, attend = reference.gelu_, engine.transformer.attention._attend

    def counted_gelu(x):
        seen.append(("feed_forward", x.size(1)))
        return gelu(x)

    def counted_attend(q, k, v):
        seen.append(("queries", q.size(1)))
        return attend(q, k, v)

    monkeypatch.setattr(reference, "gelu_", counted_gelu)
    monkeypatch.setattr(engine.transformer.attention, "_attend", counted_attend)
    engine.generate(VideoRequest(**{**SMALL, "num_frames": 33}, steps=1, guidance_scale=guidance))
    return seen


def test_the_last_block_skips_history_rows(monkeypatch, engines) -> None:
    seen = _rows_through(monkeypatch, engines("base"), 1.0)
    history, noisy = 40, 144
    block = [("queries", history + noisy), ("queries", noisy), ("feed_forward", history + noisy)]
    last = [("queries", noisy), ("queries", noisy), ("feed_forward", noisy)]
    assert seen == [*block * 3, *last]


def test_guidance_shares_what_comes_before_the_text(monkeypatch, engines) -> None:
    seen = _rows_through(monkeypatch, engines("base"), 5.0)
    history, noisy = 40, 144
    shared = [("queries", history + noisy), ("feed_forward", history)]
    first = [("queries", noisy), ("feed_forward", noisy)]
    middle = [("queries", history + noisy), ("queries", noisy), ("feed_forward", history + noisy)]
    last = [("queries", noisy), ("queries", noisy), ("feed_forward", noisy)]
    assert seen == [*shared, *[*first, *middle * 2, *last] * 2]


def test_the_first_blocks_history_is_projected_once_per_chunk(monkeypatch, engines) -> None:
    engine = engines("distilled")
    first, rows = engine.transformer.blocks[0], []
    project = first.project
    monkeypatch.setattr(
        first, "project", lambda h, *rest, **named: rows.append(h.shape[1]) or project(h, *rest, **named)
    )
    engine.generate(VideoRequest(**{**SMALL, "num_frames": 66}, steps=2, amplify_first_chunk=False))
    assert rows == [40, 9, 9, 36, 36, 144, 144] * 2


def test_the_loop_asks_the_device_for_no_number(engines) -> None:
    """On a GPU .item() and friends wait for everything queued; coefficients are host numbers made beforehand."""
    for variant in ("base", "mid", "distilled"):
        engine = engines(variant)
        session = engine.open(VideoRequest(**SMALL, steps=2))

        def refuse(*_: object) -> None:
            raise AssertionError("a tensor was read back in the denoising loop")

        names = ("item", "tolist", "__float__", "__int__", "__bool__", "numpy", "cpu")
        patches = [mock.patch.object(torch.Tensor, name, refuse) for name in names]
        with mock.patch.object(engine._frames, "decode", return_value=None):
            for patch in patches:
                patch.start()
            try:
                session.next_chunk()
            finally:
                for patch in patches:
                    patch.stop()
        assert session.index == 1


@pytest.mark.skipif(bool(native.WHY_NOT), reason=f"no compiled operators: {native.WHY_NOT}")
@pytest.mark.parametrize(
    ("variant", "operator"), [("distilled", "dmd_step"), ("mid", "unipc_step"), ("base", "unipc_step")]
)
def test_every_stages_solver_runs_the_compiled_step(monkeypatch, engines, variant: str, operator: str) -> None:
    """Noise brought to the first stage's size by permuted views once kept that stage on twenty small launches a step."""
    ran, run = [], native._run
    monkeypatch.setattr(native, "_run", lambda name, *rest, **named: ran.append(name) or run(name, *rest, **named))
    engine, request = engines(variant), VideoRequest(**{**SMALL, "num_frames": 33}, steps=2, amplify_first_chunk=False)
    engine.generate(request)
    assert ran.count(operator) == engine.plan(request).steps_in_chunk(0)
