"""Make the xfuser package importable on a machine without a GPU, for tests on gloo."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def simulated_cuda() -> Iterator[None]:
    """Pretend that CUDA is there, while xfuser is imported and while it makes its groups; its USP runs without."""
    # One module imports triton without asking, which CPU builds of torch do not bring; only its sparse attention uses it.
    name = "xfuser.core.sparge_attention.block_mask"
    sparse = types.ModuleType(name)
    sparse.get_block_map_meansim = None
    properties = types.SimpleNamespace(gcnArchName="")  # read to look for AMD cards
    patches = {
        (torch.version, "cuda"): "12.8",  # else: NotImplementedError, no accelerators
        (torch.cuda, "is_available"): lambda: True,  # else its groups stay None
        (torch.cuda, "current_device"): lambda: 0,
        (torch.cuda, "get_device_properties"): lambda device=None: properties,
        (torch.cuda, "get_device_name"): lambda device=None: "simulated",
        (torch.cuda, "set_device"): lambda device: None,
    }
    with contextlib.ExitStack() as stack:
        for (owner, attribute), value in patches.items():
            stack.enter_context(mock.patch.object(owner, attribute, value))
        stack.enter_context(mock.patch.dict(sys.modules, {name: sparse}))
        yield
