"""Whole videos on several ranks against Diffusers, and ending them from rank 0."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helios_engine import VideoRequest
from helios_engine.cli import main
from helios_engine.config import ModelConfig
from helios_engine.parallel.layout import TokenLayout
from tests.helpers import oracle

TOLERANCE = 1e-4
SCHEMES = {2: (2, 1, 1), 3: (3, 1, 1), 4: (2, 2, 1)}
SETTINGS = [
    ({"ring_method": "allgather"}, (1, 2, 1)),
    ({"shard_vae": False}, (2, 1, 1)),
    ({"text_encoder_ranks": "all"}, (2, 1, 1)),
    ({"check_ranks": True}, (2, 2, 1)),
]
SMALL = {"prompt": "A red fox", "height": 64, "width": 64, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """(checkpoint folder, reference result, request) of a case; the reference runs once."""

    @functools.cache
    def get(variant: str, task: str):
        case = oracle.random_case(variant, task, 20)
        pipe = oracle.pipeline(case)
        folder = oracle.save(pipe, tmp_path_factory.mktemp("ranks"))
        return str(folder), oracle.run(pipe, case), oracle.request_arguments(case)

    return get


def _is_quick(variant: str, num_ranks: int, task: str) -> bool:
    return task == "t2v" or (num_ranks == 3 and (task == "i2v" or variant == "base"))


VIDEOS = [
    pytest.param(*case, marks=() if _is_quick(*case) else pytest.mark.full)
    for case in itertools.product(("base", "mid", "distilled"), (2, 3, 4), ("t2v", "i2v", "v2v"))
]


@pytest.mark.parametrize(("variant", "num_ranks", "task"), VIDEOS)
def test_videos_on_ranks_equal_diffusers(ranks, expected, variant: str, task: str, num_ranks: int) -> None:
    folder, reference, arguments = expected(variant, task)
    degrees = SCHEMES[num_ranks]
    if num_ranks == 4 and arguments["guidance_scale"] > 1:
        degrees = (2, 1, 2)
    results = ranks.run("generate", degrees, folder=folder, arguments=arguments)
    for rank, (latents, frames) in enumerate(results):
        assert (latents - reference.latents).abs().max() <= TOLERANCE
        assert torch.equal(latents, results[0][0]), "all ranks hold the same latents"
        assert (frames is None) == (rank > 0)
    assert np.abs(results[0][1] - reference.frames).max() <= TOLERANCE


@pytest.mark.parametrize("degrees", [(2, 1, 1), (2, 2, 1), (1, 1, 2)], ids=str)
def test_rank_0_cancels_all_within_a_step(ranks, toy, degrees) -> None:
    arguments = {**SMALL, "num_frames": None, "steps": 6}
    results = ranks.run("stop_early", degrees, folder=str(toy / "base"), arguments=arguments, how="cancel")
    assert results == [(1, 8)] * len(results)


@pytest.mark.parametrize("degrees", [(2, 1, 1), (3, 1, 1)], ids=str)
def test_rank_0_leaves_the_loop_and_no_rank_is_stuck(ranks, toy, degrees) -> None:
    arguments = {**SMALL, "num_frames": None, "steps": 2}
    results = ranks.run("stop_early", degrees, folder=str(toy / "base"), arguments=arguments, how="close")
    assert results == [(2, 4)] * len(results)


def test_two_branches_without_guidance_are_refused_on_every_rank(ranks, toy) -> None:
    results = ranks.run("refuse", (1, 1, 2), folder=str(toy / "distilled"), arguments={**SMALL, "num_frames": 33})
    assert all("use cfg degree 1" in text for text in results)


def test_the_command_line_starts_its_own_ranks(toy, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the four
    common = [
        "--model",
        str(toy / "mid"),
        "--prompt",
        "A red fox",
        "--height",
        "64",
        "--width",
        "64",
        "--steps",
        "3,1,1",
    ]
    common = ["generate", *common, "--num-frames", "40", "--device", "cpu"]
    assert main([*common, "--output", str(tmp_path / "one.npy"), "--quiet"]) == 0
    assert main([*common, "--output", str(tmp_path / "four.npy"), "--num-gpus", "4"]) == 0
    captured = capfd.readouterr()
    assert "4 ranks, ulysses 2 x ring 1 x cfg 2" in captured.err
    assert captured.err.count("4 ranks") == 1, "rank 0 alone speaks"
    one, four = (np.load(tmp_path / f"{name}.npy").astype(int) for name in ("one", "four"))
    assert one.shape == four.shape == (40, 64, 64, 3)
    assert np.abs(one - four).max() <= 1


def test_ranks_import_no_oracle() -> None:
    import subprocess

    code = "import sys, tests.helpers.rank_jobs; print('diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(("settings", "degrees"), SETTINGS, ids=str)
def test_every_setting_gives_the_same_video(ranks, toy, engines, settings, degrees) -> None:
    arguments = {**SMALL, "num_frames": 33, "steps": (1, 1, 1), "amplify_first_chunk": False, "frames": "float32"}
    expected = engines("distilled").generate(VideoRequest(**arguments))
    results = ranks.run("generate", degrees, folder=str(toy / "distilled"), arguments=arguments, settings=settings)
    for latents, _ in results:
        assert (latents - expected.latents).abs().max() <= TOLERANCE
    assert np.abs(results[0][1] - expected.frames).max() <= TOLERANCE


def test_more_ranks_than_latent_rows_decode_on_the_first(ranks, toy, engines) -> None:
    arguments = {**SMALL, "height": 16, "num_frames": 33, "steps": 1, "guidance_scale": 1.0, "frames": "float32"}
    expected = engines("base").generate(VideoRequest(**arguments))
    results = ranks.run("generate", (3, 1, 1), folder=str(toy / "base"), arguments=arguments)
    assert np.abs(results[0][1] - expected.frames).max() <= TOLERANCE


def test_latents_that_differ_are_found(ranks) -> None:
    assert ranks.run("disagree", (3, 1, 1), ranks=[]) == [""] * 3
    expected = "after stage 1, step 2 the latents of ranks [2] differ from rank 0's"
    assert ranks.run("disagree", (3, 1, 1), ranks=[2]) == [expected] * 3


def test_bytes_of_rank_0_reach_all(ranks) -> None:
    data = bytes(range(256)) * 40
    assert ranks.run("share_bytes", (3, 1, 1), data=data) == [data] * 3
    assert ranks.run("share_bytes", (2, 1, 1), data=b"") == [b""] * 2


def test_a_hosts_own_groups_serve(ranks) -> None:
    expected = ranks.run("attend", (2, 2, 1), sizes=(7, 12, 4, 8, 1), dtype=torch.float32, noisy_only=False)
    results = ranks.run("host_groups", (2, 2, 1), wrong=False)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    wrong = ranks.run("host_groups", (2, 2, 1), wrong=True)
    assert all("the ulysses group holds ranks" in text for text in wrong)


def test_bench_counts_what_every_rank_sends(ranks, toy, capsys) -> None:
    results = ranks.run("sent_per_forward", (2, 1, 1), folder=str(toy / "distilled"), arguments={**SMALL})
    assert results[0] == results[1]
    sent = results[0]["sent_per_forward"]
    assert list(sent) == ["9+40", "36+40", "144+40"]
    config = ModelConfig.from_json(toy / "distilled" / "transformer" / "config.json")
    for tokens, of_ranks in sent.items():
        noisy, history = (int(part) for part in tokens.split("+"))
        layout = TokenLayout.make(history, noisy, config.num_attention_heads, num_ranks=2)
        width = layout.heads[1] * config.attention_head_dim * 4  # what goes to the other rank, per token
        full = [layout.tokens(0) * width] * (config.num_layers - 1)
        expected = sum(3 * rows for rows in full) + (2 * layout.tokens(0) + layout.noisy[0]) * width
        assert of_ranks[0]["bytes"]["qkv"] == expected
        assert of_ranks[0]["bytes"]["total"] == sum(of_ranks[0]["bytes"].values()) - of_ranks[0]["bytes"]["total"]
        assert of_ranks[0]["calls"] == {"qkv": config.num_layers, "out": config.num_layers, "gather": 1}
    flags = [
        "bench",
        "--bytes",
        "--model",
        str(toy / "distilled"),
        "--device",
        "cpu",
        "--height",
        "64",
        "--width",
        "64",
    ]
    assert main(flags) == 0
    assert json.loads(capsys.readouterr().out)["sent_per_forward"]["9+40"] == [{"bytes": {"total": 0}, "calls": {}}]


def test_a_thread_of_rank_0_closes_all(ranks, toy) -> None:
    arguments = {**SMALL, "steps": 6}
    for degrees in ((1, 1, 1), (3, 1, 1)):
        results = ranks.run("close_from_a_thread", degrees, folder=str(toy / "base"), arguments=arguments)
        # The chunk under way ends at the next step, or is the last one when the thread comes late.
        assert all(first in (1, 2) and second == 2 for first, second in results)
        assert len({first for first, _ in results}) == 1


@pytest.mark.parametrize(
    ("degrees", "kinds", "said"),
    [
        ((2, 1, 1), ["works", "works"], None),
        ((1, 2, 1), ["works", "works"], None),
        ((2, 1, 1), ["in pieces"] * 2, None),
        ((1, 3, 1), ["in pieces"] * 3, None),
        ((2, 2, 1), ["in pieces"] * 4, None),
        ((1, 1, 2), ["in pieces"] * 2, None),
        ((2, 1, 1), ["works", "refuses"], ["it does not work on another rank", "it fails (operation not permitted"]),
        ((2, 1, 1), ["is another", "works"], ["a replay is nan off", "it does not work on another rank"]),
    ],
    ids=str,
)
def test_ranks_record_together_or_not_at_all(ranks, expected, degrees, kinds: list[str], said) -> None:
    folder, _, arguments = expected("base" if degrees[2] > 1 else "distilled", "t2v")
    if degrees[2] > 1:
        arguments = {**arguments, "guidance_scale": 3.0}
    run = functools.partial(ranks.run, "generate_recorded", degrees, folder=folder, arguments=arguments)
    plain = run(kinds=["plain"] * len(kinds))
    results = run(kinds=kinds)
    for rank, (latents, replays, problem, sent) in enumerate(results):
        assert torch.equal(latents, plain[rank][0])
        assert sent == plain[rank][3], "what replays send is counted, what recording takes is not"
        if said is None:
            assert problem is None
            assert replays > 2, "steps after the first of a stage are replayed"
        else:
            assert said[rank] in problem


@pytest.mark.parametrize(
    ("degrees", "kinds", "exchange", "expected"),
    [
        ((2, 1, 1), ["works", "works"], "packed", "Rerun"),
        ((1, 2, 2), ["works"] * 4, "packed", "Rerun"),
        ((2, 1, 1), ["works", "refuses"], "packed", "TapeRecorder"),
        ((1, 1, 2), ["is another", "works"], "packed", "TapeRecorder"),
        ((1, 2, 1), ["refuses", "works"], "xfuser", None),
    ],
    ids=str,
)
def test_exchanges_are_recorded_only_where_a_test_passes(ranks, degrees, kinds, exchange, expected) -> None:
    assert ranks.run("choose_recorder", degrees, kinds=kinds, exchange=exchange) == [expected] * len(kinds)


def test_ranks_with_other_prompts_record_in_step(ranks, expected) -> None:
    """Each half knows one prompt; a length that is new to one of them alone must not part them."""
    folder, _, _ = expected("base", "t2v")
    lengths = [(8, 8), (9, 8), (8, 8)]
    results = ranks.run("record_prompts", (1, 1, 2), folder=folder, lengths=lengths)
    alone = ranks.run("record_prompts", (1, 1, 1), folder=folder, lengths=lengths)[0]
    for latents, recordings in results:
        assert recordings == alone[1] == 2
        for own, other in zip(latents, alone[0], strict=True):
            assert (own - other).abs().max() < 1e-4


def test_recorded_exchanges_keep_no_memory(ranks) -> None:
    for kept_meanwhile, let_go, delivered in ranks.run("pieces_keep_no_memory", (2, 1, 1)):
        assert kept_meanwhile
        assert let_go
        assert delivered == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("degrees", "number"), [((8, 1, 1), 2), ((1, 8, 1), 2), ((4, 2, 1), 8), ((4, 1, 2), 7), ((2, 2, 2), 15)]
)
def test_no_group_is_made_of_one_rank_and_none_twice(ranks, degrees: tuple[int, int, int], number: int) -> None:
    """With an eager device each would be a communicator: 19 for eight Ulysses ranks, 16 of them of one rank."""
    made = ranks.run("groups_made", (8, 1, 1), wanted=degrees)[0]
    assert all(len(group) > 1 for group in made)
    whole = list(range(8))
    assert len([group for group in made if group != whole]) == len({tuple(group) for group in made if group != whole})
    assert len(made) == number
