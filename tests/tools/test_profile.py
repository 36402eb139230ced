"""Traces and timelines of one chunk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helios_engine.cli import main
from helios_engine.tools import profile

FLAGS = ["--prompt", "A red fox", "--height", "64", "--width", "64", "--steps", "1,1,1", "--device", "cpu"]


def _generate(toy: Path, output: Path, *more: str) -> int:
    return main(["generate", "--model", str(toy / "distilled"), "--output", str(output), "--quiet", *FLAGS, *more])


def test_a_trace_holds_our_ranges_of_one_chunk(toy, tmp_path, capsys) -> None:
    trace = tmp_path / "traces" / "trace.json"
    assert _generate(toy, tmp_path / "a.npy", "--num-frames", "66", "--profile", str(trace)) == 0
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("helios: chunk 1") == 1
    assert "helios: chunk 0" not in names
    assert [names.count(f"helios: stage {stage}") for stage in range(3)] == [1, 1, 1]
    assert {"helios: vae", "helios: attention", "helios: feed_forward"} <= set(names)
    assert [path.name for path in trace.parent.iterdir()] == ["trace.json"]


def test_ranks_write_a_trace_each(toy, tmp_path) -> None:
    flags = ["--num-frames", "33", "--profile", str(tmp_path / "trace.json"), "--num-gpus", "2"]
    assert _generate(toy, tmp_path / "a.npy", *flags) == 0
    for rank in range(2):
        names = {
            event.get("name") for event in json.loads((tmp_path / f"trace.rank{rank}.json").read_text())["traceEvents"]
        }
        assert {"helios: chunk 0", "helios: exchange qkv", "helios: exchange gather"} <= names, sorted(map(str, names))[
            :50
        ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile", "trace.txt"], "profile trace.txt must end in .json"),
        (["--profile", "t.json", "--profile-chunk", "2"], "profile-chunk 2: the video has chunks 0 to 1"),
        (["--profile", "t.json", "--profile-chunk", "-1"], "profile-chunk -1: the video has chunks 0 to 1"),
        (["--profile-chunk", "1"], "profile-chunk needs profile"),
        (["--profile", "t.json", "--profile-chunk", "-1", "--num-frames", "endless"], "has chunks 0 without end"),
    ],
)
def test_bad_profile_flags(toy, tmp_path, capsys, flags: list[str], message: str) -> None:
    assert _generate(toy, tmp_path / "a.npy", "--num-frames", "66", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_profile_that_cannot_be_is_said_and_costs_no_chunk(caplog) -> None:
    kept: list[object] = []
    assert list(profile.profiled(iter([1, 2]), 5, kept.append)) == [1, 2]
    assert kept == []
    assert "chunk 5 was to be profiled, but only 2 were made" in caplog.text


def test_a_timeline_accounts_for_the_whole_chunk(toy, tmp_path, capsys) -> None:
    from PIL import Image

    picture = tmp_path / "out.png"
    flags = ["--num-frames", "66", "--timeline", str(picture)]
    assert main(["bench", "--model", str(toy / "distilled"), *FLAGS, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["ms"]) == set(profile.CATEGORIES)
    assert sum(found["ms"].values()) == pytest.approx(found["chunk_ms"], rel=1e-3)
    assert min(found["ms"].values()) >= 0
    assert all(found["ms"][name] > 0 for name in ("attention", "GEMM", "elementwise", "VAE", "gaps"))
    pixels = Image.open(picture).convert("RGB")
    colours = {colour for _, colour in pixels.getcolors(1 << 20)}
    assert profile._COLOURS["VAE"] in colours
    assert profile._COLOURS["GEMM"] in colours
    assert main(["bench", "--model", str(toy / "distilled"), *FLAGS, "--num-frames", "66", "--timeline", "a.jpg"]) == 2
    assert "must end in .png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("aten::addmm", "GEMM"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "exchange"),
        ("helios::residual_gate_norm", "elementwise"),
        ("sm90_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc_nhwc", "VAE"),
        ("aten::mkldnn_convolution", "VAE"),
        ("Memcpy DtoH (Device -> Pinned)", "elementwise"),
    ],
)
def test_categories(name: str, category: str) -> None:
    assert profile.category_of(name) == category
