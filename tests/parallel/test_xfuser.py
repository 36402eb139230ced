"""xfuser's attention as a second opinion, on two gloo ranks of their own with the presence of CUDA simulated."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helios_engine.parallel import xfuser
from helios_engine.parallel.context import ContextParallel

REPOSITORY = Path(__file__).parents[2]
# One rank. Prints a JSON object: differences from the whole and between the exchanges, bytes, refusals.
RANK = """
import json, sys
import torch
from helios_engine import ContextParallel, Engine, EngineConfig, VideoRequest
from helios_engine.parallel.attention import SequenceAttention, check_exchange, make_sequence_attention
from helios_engine.parallel.layout import TokenLayout
from tests.helpers import rank_jobs
from tests.helpers.simulated_cuda import simulated_cuda

torch.set_grad_enabled(False)
context = ContextParallel.from_torchrun(device="cpu", rank_timeout=60)
found = {}

def refused(work):
    try:
        work()
    except ValueError as error:
        return str(error)

found["no gpu"] = refused(lambda: check_exchange("xfuser", context, num_heads=4, backend="sdpa"))
for name in [name for name in sys.modules if name.startswith(("xfuser", "yunchang"))]:
    del sys.modules[name]
with simulated_cuda():
    check_exchange("xfuser", context, num_heads=4, backend="sdpa")
    attention = rank_jobs.choose_attention("auto", device=rank_jobs.CPU, dtype=torch.float32, head_dim=8)
    theirs = make_sequence_attention(context, attention, ring_method="rotate", exchange="xfuser")
found["heads"] = refused(lambda: check_exchange("xfuser", context, num_heads=5, backend="sdpa"))
found["tokens"] = refused(lambda: theirs.check_tokens(25))
ours = SequenceAttention(context, attention)
layout = TokenLayout.make(10, 14, 4, num_ranks=2)
whole = rank_jobs.whole_qkv(10, 14, 4, 8, 2, torch.float32)
own = rank_jobs.own_rows(whole, layout, context.rank)
for noisy_only in (False, True):
    before = dict(context.traffic.bytes_sent)
    other = theirs(own.clone(), layout, noisy_only=noisy_only)
    sent = {name: count - before.get(name, 0) for name, count in context.traffic.bytes_sent.items()}
    found[f"difference {noisy_only}"] = (other - ours(own, layout, noisy_only=noisy_only)).abs().max().item()
found["sent"] = sent
request = VideoRequest(prompt="A red fox", height=128, width=192, steps=(1, 1, 1), num_frames=33)
videos = []
for exchange in ("packed", "xfuser"):
    with simulated_cuda():
        engine = Engine.load(sys.argv[1], EngineConfig(device="cpu", exchange=exchange), context)
    videos.append(engine.generate(request).latents)
found["video"] = (videos[0] - videos[1]).abs().max().item()
print(json.dumps(found), flush=True)
context.close()
"""


@pytest.fixture(scope="module")
def found(toy) -> list[dict]:
    """What each of the two ranks saw."""
    if importlib.util.find_spec("xfuser") is None:
        pytest.skip("the xfuser package is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", RANK, str(toy / "distilled")]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def test_both_exchanges_agree(found) -> None:
    for rank in found:
        assert rank["difference False"] <= 1e-6
        assert rank["difference True"] <= 1e-6
        assert rank["video"] <= 1e-4


def test_what_it_sends_is_counted(found) -> None:
    rows = 2 * 12 * 4 * 8 * 4  # batch, own tokens, heads, head dim, bytes
    assert found[0]["sent"]["qkv"] == 3 * rows // 2
    assert found[0]["sent"]["out"] == rows // 2


def test_refusals_say_why(found) -> None:
    for rank in found:
        assert "exchange xfuser cannot run: the package does not import" in rank["no gpu"]
        assert "pip install --no-deps xfuser==0.7.0" in rank["no gpu"]
        assert "5 heads do not divide by ulysses degree 2" in rank["heads"]
        assert "25 tokens do not divide by 2 ranks" in rank["tokens"]


def test_one_rank_has_nothing_to_exchange() -> None:
    with pytest.raises(ValueError, match="there is one rank, nothing to exchange; use exchange packed"):
        xfuser.check(ContextParallel.single(), num_heads=4, backend="sdpa")


def test_a_ring_without_log_sum_exp_is_refused(monkeypatch) -> None:
    from helios_engine.parallel.mesh import Degrees

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    context = ContextParallel(0, Degrees(1, 2), global_ranks=(0, 1))
    with pytest.raises(ValueError, match="its ring needs a log-sum-exp"):
        xfuser.check(context, num_heads=4, backend="sdpa")
