"""helios_engine: inference engine for the Helios autoregressive video diffusion model."""

from helios_engine.engine.engine import Engine
from helios_engine.engine.session import VideoSession, VideoStream
from helios_engine.engine.state import SessionState
from helios_engine.output import Video
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.mesh import Degrees
from helios_engine.parallel.watch import RankFailure
from helios_engine.request import VideoChunk, VideoRequest
from helios_engine.settings import EngineConfig

__version__ = "0.1.0"

__all__ = [
    "ContextParallel",
    "Degrees",
    "Engine",
    "EngineConfig",
    "RankFailure",
    "SessionState",
    "Video",
    "VideoChunk",
    "VideoRequest",
    "VideoSession",
    "VideoStream",
    "__version__",
]
