"""benchmarks/model_scaling.py: counted work against figures counted elsewhere, and what it does with its inputs."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import model_scaling
from benchmarks.model_scaling import Layer, Machine, Model, Plan, inputs_table, read_measured, results_table

# TFLOP of one whole layer on one GPU, from a count of the reference's operators on meta tensors.
LAYER_TFLOP = {"qkv": 1.74, "attn": 2.50, "out": 0.58, "cross": 1.00, "ffn": 3.13}
LAYER_TOTAL_TFLOP = {8640: 8.93, 2160: 2.92, 540: 1.69}
# An earlier, independent model of the same chunk: ms for P = 1..8. 5 %: it guessed element-wise work and packing itself.
EARLIER_PUSH = (1790, 937, 642, 483, 390, 331, 286, 249)
EARLIER_PUSH_WAVES = (1775, 947, 664, 504, 437, 358, 316, 283)
EARLIER_NCCL_WAVES = (1775, 1019, 717, 548, 474, 390, 345, 308)
EARLIER_TOLERANCE = 0.05


def write(path: Path, **values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


def layer(noisy: int, ranks: int, *, last: bool = False) -> Layer:
    return Layer(Plan().layout(noisy, ranks), last)


def chunk_times(model: Model, scheme: str, ranks=range(1, 9)) -> list[float]:
    return [model.chunk_ms(scheme, count) for count in ranks]


def test_flops_of_a_layer() -> None:
    flops = layer(8640, 1).flops()
    assert {name: count / 1e12 for name, count in flops.items()} == pytest.approx(LAYER_TFLOP, rel=0.02)
    totals = {noisy: sum(layer(noisy, 1).flops().values()) / 1e12 for noisy in LAYER_TOTAL_TFLOP}
    assert totals == pytest.approx(LAYER_TOTAL_TFLOP, rel=0.02)


@pytest.mark.parametrize("noisy", LAYER_TOTAL_TFLOP)
def test_last_layer_computes_history_keys_and_values_only(noisy: int) -> None:
    inner, last = layer(noisy, 1).flops(), layer(noisy, 1, last=True).flops()
    dim, history = 5120, 2400
    assert inner["qkv"] - last["qkv"] == inner["out"] - last["out"] == 2 * history * dim * dim
    assert last["attn"] / inner["attn"] == pytest.approx(noisy / (noisy + history))
    assert last["cross"] == inner["cross"]
    assert last["ffn"] / inner["ffn"] == pytest.approx(noisy / (noisy + history))


@pytest.mark.parametrize("ranks", [1, 2, 4, 5, 10])
def test_ulysses_bytes_when_everything_divides(ranks: int) -> None:
    whole = 11040 * 5120 * 2
    qkv, out = layer(8640, ranks).exchange_bytes()
    assert qkv + out == 4 * whole * (ranks - 1) // ranks**2
    assert qkv == 3 * out


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("ranks", [3, 7, 11, 16])
def test_uneven_bytes_are_the_busiest_ranks(ranks: int, last: bool) -> None:
    """Every (token, head) row of every pair of ranks, one by one."""
    layout = Plan().layout(540, ranks)
    queries = layout.noisy if last else [layout.tokens(rank) for rank in range(ranks)]
    sent, received = [0] * ranks, [0] * ranks
    out_sent, out_received = [0] * ranks, [0] * ranks
    for source in range(ranks):
        for target in set(range(ranks)) - {source}:
            size = (2 * layout.tokens(source) + queries[source]) * layout.heads[target] * 256
            sent[source] += size
            received[target] += size
            size = queries[target] * layout.heads[source] * 256
            out_sent[source] += size
            out_received[target] += size
    expected = max(sent + received), max(out_sent + out_received)
    assert Layer(layout, last).exchange_bytes() == expected


@pytest.mark.parametrize("waves", [False, True])
@pytest.mark.parametrize("scheme", ["push", "nccl", "diffusers"])
def test_more_gpus_are_faster(scheme: str, waves: bool) -> None:
    times = chunk_times(Model(Machine(waves=waves), Plan()), scheme, (1, 2, 4, 8))
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 4


def test_close_to_the_earlier_model() -> None:
    ideal, waves = Model(Machine(), Plan()), Model(Machine(waves=True), Plan())
    assert chunk_times(ideal, "push") == pytest.approx(EARLIER_PUSH, rel=EARLIER_TOLERANCE)
    assert chunk_times(waves, "push") == pytest.approx(EARLIER_PUSH_WAVES, rel=EARLIER_TOLERANCE)
    assert chunk_times(waves, "nccl") == pytest.approx(EARLIER_NCCL_WAVES, rel=EARLIER_TOLERANCE)


def test_schemes_are_ordered_and_slow_links_hurt() -> None:
    fast, slow = Model(Machine(), Plan()), Model(Machine(link_gb=25), Plan())
    for ranks in range(2, 17):
        push, nccl, diffusers = (fast.chunk_ms(scheme, ranks) for scheme in ("push", "nccl", "diffusers"))
        assert push < nccl < diffusers
        assert slow.chunk_ms("push", ranks) > push
    # A GEMM on few rows takes as long as reading its weights.
    assert Machine().gemm_seconds(1, 5120, 5120) == pytest.approx(2 * 5120**2 / 2.9e12)


def test_guided_steps() -> None:
    plain, guided = Model(Machine(), Plan()), Model(Machine(), Plan(guided=True))
    assert guided.chunk_ms("push", 4) == pytest.approx(2 * plain.chunk_ms("push", 4))
    assert guided.chunk_ms("cfg x push", 3) is None
    assert guided.chunk_ms("cfg x push", 2) == pytest.approx(plain.chunk_ms("push", 1), rel=1e-3)
    assert plain.chunk_ms("push", 2) < guided.chunk_ms("cfg x push", 4) < guided.chunk_ms("push", 4)


def test_measured_figures_replace_modelled_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        write(tmp_path / "env.json", part="env", gemm_bf16_tflops=325.0, copy_tb_per_s=2.0),
        write(tmp_path / "attention.json", fa3={"self_full": 500.0}, cudnn={"self_full": 550.0}, flash="does not run"),
        write(tmp_path / "vae.json", decode_ms_float32_1_per_call=500.0, decode_ms_float32_8_per_call=400.0),
    ]
    model_scaling.main(["--measured", *map(str, files), "--copy-tb", "3"])
    printed = capsys.readouterr().out
    for line in (
        "| gemm_tflops | 325 | measured (env.json) |",
        "| attention_tflops | 550 | measured (attention.json) |",
        "| decode_ms | 400 | measured (vae.json) |",
        "| copy_tb | 3 | modelled (command line) |",
        "| link_gb | 330 | modelled |",
    ):
        assert line in printed
    expected = Model(Machine(gemm_tflops=325, attention_tflops=550, copy_tb=3, decode_ms=400), Plan())
    assert results_table(expected) in printed


def test_a_measured_forward_scales_its_stage(tmp_path: Path) -> None:
    plan, modelled = Plan(), Model(Machine(), Plan())
    double = 2 * modelled.share_ms(8640, 1, packing=False)
    file = write(tmp_path / "dit.json", **{"forward_ms_8640+2400": double, "attention": "fa3"})
    model = Model(Machine(), plan, read_measured([file], plan))
    assert model.share_ms(8640, 4, packing=False) == pytest.approx(2 * modelled.share_ms(8640, 4, packing=False))
    assert model.share_ms(540, 4, packing=False) == modelled.share_ms(540, 4, packing=False)
    assert f"| share_ms 8640+2400 P=1 | {double:.4g} | measured (dit.json) |" in inputs_table(model)
    assert "| share_ms 540+2400 P=1 | 109.8 | modelled |" in inputs_table(model)


def test_a_group_of_parts_is_read_whole(tmp_path: Path) -> None:
    """As gpu_check.sh writes it: parts by name, a stage's forward inside its part, what failed beside what did not."""
    plan = Plan()
    parts = {
        "env": {"part": "env", "gemm_bf16_tflops": 600.0, "copy_tb_per_s": 4.0},
        "dit": {"part": "dit", "8640+2400": {"forward_ms": 555.0}, "540+2400": {"forward_ms": 99.0}},
        "ops": {"failed": "out of time after 100 s", "last_lines": []},
    }
    measured = read_measured([write(tmp_path / "kernels.json", **parts)], plan)
    assert {key: figure.value for key, figure in measured.items()} == {
        "gemm_tflops": 600.0,
        "copy_tb": 4.0,
        (8640, 1): 555.0,
        (540, 1): 99.0,
    }
    parts["dit"]["tiny"] = True
    with pytest.raises(ValueError, match="miniature"):
        read_measured([write(tmp_path / "tiny.json", **parts)], plan)


@pytest.mark.parametrize("packed", [False, True])
def test_a_measured_share_replaces_one(tmp_path: Path, packed: bool) -> None:
    plan, modelled = Plan(), Model(Machine(), Plan())
    file = write(tmp_path / "ranks.json", **{"share_ms_8640+2400_p4": 160.0, "includes_packing": packed})
    model = Model(Machine(), plan, read_measured([file], plan))
    copies = modelled.share_ms(8640, 4, packing=True) - modelled.share_ms(8640, 4, packing=False)
    assert copies > 0
    assert model.share_ms(8640, 4, packing=packed) == 160.0
    assert model.share_ms(8640, 4, packing=not packed) == pytest.approx(160.0 + (-copies if packed else copies))
    assert model.share_ms(8640, 8, packing=False) == modelled.share_ms(8640, 8, packing=False)
    assert "| share_ms 8640+2400 P=4 | 160 | measured (ranks.json) |" in inputs_table(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"part": "tests", "outcome": "9 passed"}, "no figure for"),
        ({"forward_ms_36+12": 3.0}, "no figure for"),
        ({"gemm_bf16_tflops": -700.0}, "must be a positive number"),
        ({"gemm_bf16_tflops": "fast"}, "must be a positive number"),
        ({"gemm_bf16_tflops": 700.0, "tiny": True}, "miniature"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_measured([write(tmp_path / "values.json", **values)], Plan())


def test_two_files_with_one_figure(tmp_path: Path) -> None:
    files = [write(tmp_path / name, gemm_bf16_tflops=700.0) for name in ("a.json", "b.json")]
    with pytest.raises(ValueError, match="both give gemm_tflops"):
        read_measured(files, Plan())


@pytest.mark.parametrize("field", ["gemm_tflops", "copy_tb", "link_gb", "nccl_share", "decode_ms"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_impossible_rates(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Machine(**{field: value})


def test_impossible_plans_and_options() -> None:
    for arguments in (
        {"steps": (2, 2)},
        {"steps": (0, 0, 0)},
        {"steps": (2, 2, -1)},
        {"noisy": (0, 1, 2)},
        {"history": -1},
    ):
        with pytest.raises(ValueError, match="steps"):
            Plan(**arguments)
    for arguments in (["--link-gb", "0"], ["--plot", "plot.png"]):
        with pytest.raises(ValueError, match="link_gb|plot"):
            model_scaling.main(arguments)


@pytest.mark.parametrize("guided", [False, True])
def test_command_line_prints_16_rows_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], guided: bool
) -> None:
    file = tmp_path / "scaling.svg"
    model_scaling.main(["--steps", "1,1,1", "--waves", "--plot", str(file), *(["--guided"] if guided else [])])
    table = capsys.readouterr().out.rsplit("\n\n", 1)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    assert [row[0] for row in rows[2:]] == [str(ranks) for ranks in range(1, 17)]
    assert {len(row) for row in rows} == {6 if guided else 4}
    lines = ElementTree.parse(file).getroot().findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.get("points").split()) for line in lines] == [16, 16, 16, *([8, 8] if guided else [])]
