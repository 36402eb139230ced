"""What a decode holds at its peak, against what the split by free memory and --dry-run count on."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helios_engine.config import VaeConfig
from helios_engine.engine.frames import decode_bytes
from helios_engine.model.slab import Slab
from helios_engine.model.vae import VideoAutoencoder
from helios_engine.ops import native
from helios_engine.parallel.context import ContextParallel
from helios_engine.tools.toy import init_vae_

LATENT_SIZE = (8, 6)


class _LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._sizes.pop, storage._cdata, None)
            self.peak = max(self.peak, sum(self._sizes.values()))


@pytest.mark.skipif(bool(native.WHY_NOT), reason="plain torch takes more, which is counted apart")
@pytest.mark.parametrize("frames_per_call", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_decode_holds_what_is_predicted(dtype: torch.dtype, frames_per_call: int, sharded: bool) -> None:
    vae = VideoAutoencoder(VaeConfig(base_dim=32))
    init_vae_(vae, 0)
    vae = vae.to(dtype).requires_grad_(False).channels_last_()
    vae.statistics = vae.statistics.float()
    with _LiveBytes() as live:
        slab = Slab(ContextParallel.single(), LATENT_SIZE[0]) if sharded else None
        vae.decode(torch.randn(1, 16, 9, *LATENT_SIZE), frames_per_call=frames_per_call, slab=slab)
    predicted = decode_bytes(torch.device("cpu"), vae, LATENT_SIZE, frames_per_call, sharded=sharded)
    # Rows of a slab weigh more in a picture as small as this.
    assert 0.9 * predicted <= live.peak <= (1.1 if sharded else 1.05) * predicted, f"{live.peak / predicted:.3f}"
