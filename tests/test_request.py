"""VideoRequest: whatever is put in, it is a valid request or a ValueError."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_engine import VideoRequest

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 700),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["uint8", "float32", "device", "endless"]),
    st.lists(st.one_of(st.integers(-1, 30), st.text(max_size=2)), max_size=4),
    st.lists(st.integers(1, 30), max_size=4).map(tuple),
    st.builds(torch.zeros, st.lists(st.integers(0, 3), max_size=5).map(tuple)),
    st.sampled_from([torch.zeros(1, 4, 8), torch.full((1, 2, 8), float("nan")), torch.zeros(1, 16, 9, 2, 2), object()]),
)
NAMES = list(VideoRequest.__dataclass_fields__)


@settings(max_examples=600, deadline=None)
@given(values=st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=6), prompt=st.booleans())
def test_any_values_validate_or_raise_value_error(values: dict, prompt: bool) -> None:
    if prompt:
        values.setdefault("prompt", "a fox")
    try:
        request = VideoRequest(**values)
    except ValueError as error:
        assert str(error)
        assert "\n" not in str(error)
        return
    assert request.prompt is not None or request.prompt_embeds is not None
    assert request.num_frames is None or request.num_frames >= 1
    assert request.steps is None or isinstance(request.steps, int | tuple)
    assert 0 <= request.image_noise_sigma_min <= request.image_noise_sigma_max <= 1


@settings(max_examples=200, deadline=None)
@given(
    num_frames=st.integers(1, 10**6),
    height=st.integers(8, 4096),
    seed=st.integers(0, 2**63 - 1),
    guidance=st.floats(0, 1000),
    steps=st.one_of(st.none(), st.integers(1, 1000), st.lists(st.integers(1, 99), min_size=1, max_size=4)),
)
def test_sensible_values_are_kept(num_frames, height, seed, guidance, steps) -> None:
    request = VideoRequest(
        prompt="x", num_frames=num_frames, height=height, seed=seed, guidance_scale=guidance, steps=steps
    )
    assert (request.num_frames, request.height, request.seed) == (num_frames, height, seed)
    assert request.guidance_scale == guidance
    assert request.steps == (tuple(steps) if isinstance(steps, list) else steps)
    assert (request.num_chunks - 1) * 33 < num_frames <= request.num_chunks * 33


def test_messages_stay_short_whatever_was_passed() -> None:
    for value in (torch.zeros(2, 3, 4), "x" * 500, ["a\nb"] * 99):
        with pytest.raises(ValueError, match="num_frames must be a whole number") as caught:
            VideoRequest(prompt="x", num_frames=value)
        assert len(str(caught.value)) < 140
        assert "\n" not in str(caught.value)


def test_from_dict_refuses_unknown_names() -> None:
    assert VideoRequest.from_dict({"prompt": "x", "seed": 3}).seed == 3
    with pytest.raises(ValueError, match="unknown request field guidance, stepz; known are"):
        VideoRequest.from_dict({"prompt": "x", "stepz": 3, "guidance": 2})
