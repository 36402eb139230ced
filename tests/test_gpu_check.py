"""The parts of benchmarks/gpu_check.py in their small form, so that a GPU's time is not spent on their mistakes."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import gpu_check
from tests.helpers.recorders import Rerun

QUICK = ("dit", "attention", "engine", "vae")
SLOW = ("ranks", "offload", "quality", "diffusers", "diffusers_offload", "compiled")
STARTS_TESTS = {"env", "ops", "tests", "sanitize"}


def _numbers(figures: dict) -> list[float]:
    nested = [value for value in figures.values() if isinstance(value, dict)]
    own = [value for value in figures.values() if isinstance(value, float)]
    return own + [number for part in nested for number in _numbers(part)]


@pytest.mark.parametrize("part", [*QUICK, *(pytest.param(part, marks=pytest.mark.full) for part in SLOW)])
def test_a_part_measures_something(part: str) -> None:
    if part == "diffusers" or part.startswith(("diffusers_", "compiled")):
        pytest.importorskip("diffusers")
    figures = gpu_check.PARTS[part](gpu_check.TINY)
    json.dumps(figures)
    numbers = _numbers(figures)
    assert numbers
    assert all(not math.isnan(number) for number in numbers)


def test_recorded_steps_are_timed_beside_plain_ones(monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "_recorder", Rerun)
    stages = [figures for figures in gpu_check.part_dit(gpu_check.TINY).values() if isinstance(figures, dict)]
    assert any("recorded_step_ms" in figures for figures in stages)
    for figures in stages:
        assert figures.get("recorded_equal", True) is True


def test_every_part_is_here_or_starts_processes_of_its_own() -> None:
    assert {*QUICK, *SLOW} | STARTS_TESTS == set(gpu_check.PARTS)
