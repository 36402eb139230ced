"""Shared fixtures: one thread setting, the toy checkpoints, made once per run."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

from helios_engine import Engine, EngineConfig
from helios_engine.tools.toy import write_toy_checkpoints


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the checkpoints base, mid and distilled."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy_checkpoints(folder)
    return folder


@pytest.fixture(scope="session")
def engines(toy: Path):
    """Toy engines on the CPU in float32, by variant, loaded at most once."""
    loaded: dict[str, Engine] = {}

    def get(variant: str) -> Engine:
        if variant not in loaded:
            loaded[variant] = Engine.load(toy / variant, EngineConfig(device="cpu", dtype="float32"))
        return loaded[variant]

    return get


@pytest.fixture(scope="session")
def ranks():
    """Eight gloo processes that live as long as the run."""
    from tests.helpers.ranks import RankPool

    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield
