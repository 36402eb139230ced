"""A user's settings, fixed when an engine is loaded; the command line's flags are these fields."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ATTENTION_BACKENDS = ("auto", "fa3", "fa4", "fa2", "cudnn", "flash", "sdpa", "fa3_fp8")
EXCHANGES = ("packed", "xfuser")
RING_METHODS = ("rotate", "allgather")
TEXT_ENCODER_RANKS = ("first", "all")
DTYPES = ("auto", "bfloat16", "float32")
VAE_DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "group", "model")
OFFLOAD_LEVELS = ("block", "leaf")
# What a quality setting switches on: (history_refresh, block_cache, fp8).
QUALITIES = {"exact": (1, 0.0, False), "high": (2, 0.0, False), "fast": (2, 0.1, True)}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How several ranks share the work; None leaves a degree to the documented rule."""

    ulysses_degree: int | None = field(
        default=None, metadata={"help": "ranks that share out heads; all that are left, by default"}
    )
    ring_degree: int | None = field(
        default=None, metadata={"help": "ranks that pass keys and values round; 1 by default"}
    )
    cfg_degree: int | None = field(
        default=None,
        metadata={"help": "2 computes the two guidance branches on two halves of the ranks; default where it divides"},
    )
    rank_timeout: float = field(
        default=30.0, metadata={"help": "seconds within which all ranks end when one raises, dies or hangs"}
    )

    def __post_init__(self) -> None:
        is_number = isinstance(self.rank_timeout, int | float) and not isinstance(self.rank_timeout, bool)
        _require(
            is_number and 5 <= self.rank_timeout <= 86400,
            f"rank_timeout must be between 5 and 86400 seconds, got {self.rank_timeout!r}",
        )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings fixed for the life of an engine. The command line's flags are these fields."""

    device: str = field(default="auto", metadata={"help": "cuda, cuda:N or cpu; auto takes the GPU where there is one"})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "transformer and text encoder numbers; auto is bfloat16 on a GPU, float32 on the CPU",
            "choices": DTYPES,
        },
    )
    vae_dtype: str = field(
        default="float32",
        metadata={
            "help": "video decoder numbers; float32 is the reference, float16 and bfloat16 are faster",
            "choices": VAE_DTYPES,
        },
    )
    attention_backend: str = field(
        default="auto",
        metadata={
            "help": "auto takes the fastest exact one; naming one that cannot run is an error; fa3_fp8 is approximate",
            "choices": ATTENTION_BACKENDS,
        },
    )
    exchange: str = field(
        default="packed",
        metadata={
            "help": "how ranks trade tokens for heads: packed is this engine's own, xfuser that package's (a cross-check)",
            "choices": EXCHANGES,
        },
    )
    ring_method: str = field(
        default="rotate",
        metadata={
            "help": "rotate passes keys and values round while attending, allgather collects them first",
            "choices": RING_METHODS,
        },
    )
    shard_vae: bool = field(
        default=True, metadata={"help": "decode and encode pictures by rows, on all ranks together"}
    )
    text_encoder_ranks: str = field(
        default="first",
        metadata={
            "help": "first keeps the text encoder on rank 0, which sends the embeddings; all loads it on every rank",
            "choices": TEXT_ENCODER_RANKS,
        },
    )
    check_ranks: bool = field(
        default=False, metadata={"help": "check after every step that all ranks hold identical latents (debugging)"}
    )
    quality: str = field(
        default="exact",
        metadata={
            "help": "exact computes everything; high sets history-refresh 2, fast also block-cache 0.1 and fp8",
            "choices": tuple(QUALITIES),
        },
    )
    history_refresh: int | None = field(
        default=None,
        metadata={"help": "approximate: let history through the blocks in every N-th step of a stage only"},
    )
    block_cache: float | None = field(
        default=None,
        metadata={
            "help": "approximate: reuse the middle blocks' change while the first blocks' differs less than this share"
        },
    )
    fp8: bool | None = field(default=None, metadata={"help": "approximate: the blocks' products in 8 bits (e4m3)"})
    cuda_graphs: bool | None = field(
        default=None,
        metadata={
            "help": "record a step of each stage once and replay it, checked against a plain one; by default on one GPU when a "
            "shape has come 100 times"
        },
    )
    overlap_decode: bool = field(
        default=False,
        metadata={
            "help": "decode a chunk on a stream of its own while the next one is begun (one GPU, more memory); not yet tried "
            "on a GPU"
        },
    )
    tune_gemms: bool = field(
        default=False,
        metadata={
            "help": "try cuBLASLt's algorithms on every shape of matrix product once and keep the fastest (remembered per "
            "device); not yet tried on a GPU"
        },
    )
    compile: bool = field(
        default=False,
        metadata={"help": "torch.compile the blocks: minutes at the start, little to win over our operators"},
    )
    offload: str = field(
        default="none",
        metadata={
            "help": "group streams transformer and text encoder layer by layer from a bfloat16 checkpoint's files, model has "
            "one component at a time on the device",
            "choices": OFFLOADS,
        },
    )
    offload_level: str = field(
        default="block",
        metadata={
            "help": "what group fetches at a time: block, or leaf, a block's single layers: slots of 157 MB, not 598 (14 B)",
            "choices": OFFLOAD_LEVELS,
        },
    )
    offload_ahead: int = field(
        default=1, metadata={"help": "blocks (or leaves) fetched ahead of the one that computes, for group"}
    )
    revision: str | None = field(default=None, metadata={"help": "hub revision when the model is a hub id"})

    def __post_init__(self) -> None:
        for name, choices in (
            ("dtype", DTYPES),
            ("vae_dtype", VAE_DTYPES),
            ("attention_backend", ATTENTION_BACKENDS),
            ("exchange", EXCHANGES),
            ("ring_method", RING_METHODS),
            ("text_encoder_ranks", TEXT_ENCODER_RANKS),
            ("offload", OFFLOADS),
            ("offload_level", OFFLOAD_LEVELS),
            ("quality", tuple(QUALITIES)),
        ):
            value = getattr(self, name)
            _require(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("shard_vae", "check_ranks", "tune_gemms", "compile", "overlap_decode"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name} must be true or false, got {value!r}")
        graphs = self.cuda_graphs
        _require(graphs is None or isinstance(graphs, bool), f"cuda_graphs must be true, false or None, got {graphs!r}")
        self._check_approximations()
        ahead = self.offload_ahead
        is_whole = isinstance(ahead, int) and not isinstance(ahead, bool)
        _require(is_whole and 1 <= ahead <= 64, f"offload_ahead must be a whole number from 1 to 64, got {ahead!r}")
        _require(
            self.offload_level == "block" or self.offload == "group",
            f"offload_level {self.offload_level} is a way of offload group, but offload is {self.offload}",
        )
        _require(
            not (self.offload_level == "leaf" and self.compile),
            "compile takes a block's layers together, offload_level leaf fetches them one by one; use one of the two",
        )
        _require(
            not (self.tune_gemms and self.compile),
            "compile leaves products to torch's own choice of kernels, tune_gemms chooses itself; use one of the two",
        )
        known = isinstance(self.device, str) and re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device)
        _require(known, f"device must be auto, cpu, cuda or cuda:N with a number, got {self.device!r}")

    @property
    def approximations(self) -> tuple[int, float, bool]:
        """(history_refresh, block_cache, fp8) as quality and the single settings say; a single one wins."""
        given = (self.history_refresh, self.block_cache, self.fp8)
        return tuple(preset if own is None else own for own, preset in zip(given, QUALITIES[self.quality], strict=True))

    def _check_approximations(self) -> None:
        refresh, cache, fp8 = self.history_refresh, self.block_cache, self.fp8
        is_whole = isinstance(refresh, int) and not isinstance(refresh, bool)
        _require(
            refresh is None or (is_whole and 1 <= refresh <= 1000),
            f"history_refresh must be a whole number from 1 (every step, exact) to 1000, got {refresh!r}",
        )
        is_number = isinstance(cache, int | float) and not isinstance(cache, bool)
        _require(
            cache is None or (is_number and 0 <= cache < 1),
            f"block_cache must be from 0 (off, exact) to below 1, got {cache!r}",
        )
        _require(fp8 is None or isinstance(fp8, bool), f"fp8 must be true or false, got {fp8!r}")
        _require(
            not (self.approximations[2] and self.offload != "none"),
            f"fp8 weights are made when a checkpoint is loaded, offload {self.offload} reads it again and again; use one",
        )
        _require(
            not (self.approximations[2] and self.tune_gemms),
            "tune_gemms tries the algorithms of 16-bit products, with fp8 there are none in the blocks; use one of the two",
        )
        _require(
            not (self.approximations[2] and self.compile),
            "compile leaves fp8 products to torch's own choice of kernels; use one of the two",
        )


def describe_approximations(config: EngineConfig) -> str:
    """Which approximations are on, for people; "none" when every number is computed as it should be."""
    refresh, cache, fp8 = config.approximations
    parts = [f"history refresh every {refresh} steps"] * (refresh > 1)
    parts += [f"block cache {cache:g}"] * (cache > 0) + ["fp8 products"] * fp8
    parts += ["fp8 attention"] * (config.attention_backend == "fa3_fp8")
    return ", ".join(parts) or "none"
