"""A step per stage shape, recorded once and replayed: the host then launches one thing instead of hundreds.

A recording holds one forward, guidance and the solver's step, and reads which step it is from device memory. A stage moves
into the recording's buffers of fixed address for its first replay and stays until another stage needs them, so between
replays there is nothing to copy, and callbacks, cancelling and checksums between steps work as ever.

A recording is made on buffers of zeros and its first replay, of the step at hand, is held against the plain step. Where it
cannot be made, or has other numbers, everything goes on without recordings, and that is said. Recording costs about three
forwards, so a shape has to come often before it is worth it.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from helios_engine.engine.recorders import Recorder, choose_recorder
from helios_engine.engine.stage import Stage
from helios_engine.model.context import ChunkContext, TextContext
from helios_engine.model.transformer import LIVE_WIDTHS, Transformer
from helios_engine.parallel.mesh import Traffic
from helios_engine.sampling.solver import Solver
from helios_engine.settings import EngineConfig

logger = logging.getLogger(__name__)
# One GPU saves about a hundredth of a forward by a replay (estimated from its launches), so three forwards come back late;
# several ranks save more, by evener steps.
USES_BEFORE = 100
_RECORDINGS_KEPT = 24
_SHAPES_COUNTED = 256
_USES_WITHOUT_ROOM = 100  # before memory is looked at again
_STEPS = 64  # rows that a recording's tables grow by
_TOLERANCE = 0.01  # relative; libraries may round otherwise while they are recorded, a buffer not filled is far off


@dataclass(slots=True)
class _Recording:
    """One recorded shape: a stage of fixed buffers, and the stage that lives in them."""

    stage: Stage
    texts: tuple[object, ...]  # whose buffers it reads, see StepGraphs._texts
    table: Tensor  # of rotations, which it reads where the transformer keeps it
    replay: Callable[[], None] = lambda: None
    outputs: tuple[Tensor, ...] = ()
    tenant: weakref.ref[Stage] | None = None
    own: Solver | None = None  # the tenant's, to move back into
    sent: Traffic = field(default_factory=Traffic)  # to other ranks in a step

    def let_to(self, stage: Stage) -> None:
        """Have the stage's numbers in the fixed buffers; who lives there moves out."""
        if self.tenant is not None:
            tenant = self.tenant()
            if tenant is stage:
                return
            if tenant is not None:
                _copy(self.own.state(), self.stage.solver.state())
                tenant.solver = self.own
        self.fill(stage, stage.solver.state())
        self.tenant, self.own, stage.solver = weakref.ref(stage), stage.solver, self.stage.solver

    def fill(self, stage: Stage, state: Sequence[Tensor]) -> None:
        """All of a stage but its prompts; state is its solver's."""
        _copy(self.stage.solver.state(), state)
        _copy(_tables(self.stage), _tables(stage))
        _copy(_history(self.stage.context), _history(stage.context))


class _NotRecorded(Exception):
    """On no rank: all of them know, and go on without."""


class StepGraphs:
    """Stage.step for stages of shapes that come again and again; the same numbers.

    Where several ranks exchange inside a forward, all of them replay or none.
    """

    def __init__(self, transformer: Transformer, recorder: Recorder, *, uses_before: int = 0) -> None:
        """A shape is recorded after it has come uses_before times."""
        self._transformer, self._recorder, self._uses_before = transformer, recorder, uses_before
        self._uses: Counter[tuple[object, ...]] = Counter()
        self._recordings: dict[tuple[object, ...], _Recording] = {}  # the longest unused first
        # Keys and values of the prompts, one copy for all stages; they change least often and are the largest.
        self._texts: dict[tuple[object, ...], _Texts] = {}
        self.why_given_up: str | None = None
        self._traffic = transformer.parallel.traffic

    @property
    def hold_memory(self) -> bool:
        """Whether there is anything to forget."""
        return bool(self._recordings or self._texts)

    def __call__(self, stage: Stage) -> None:
        """The stage's next step."""
        key = _key(stage)
        if self.why_given_up is None and key in self._recordings:
            found = self._recordings[key] = self._recordings.pop(key)  # to the end: used last
            found.let_to(stage)
            self._replay(found, stage)
            self._traffic.add(found.sent)
        elif self.why_given_up is not None or not self._comes_often(key):
            stage.step()
        elif not self._transformer.parallel.all_agree(self._recorder.has_room(self._bytes_of(stage))):
            self._uses[key] = -_USES_WITHOUT_ROOM
            logger.info("a stage is not recorded now: there is too little memory")
            stage.step()
        else:
            before = [tensor.clone() for tensor in stage.solver.state()]
            with self._traffic.apart() as sent:
                expected = stage.step()
            self._traffic.add(sent)
            try:
                with self._traffic.apart():
                    found = self._record(stage)
                    self._compare(found, stage, before, expected)
            except _NotRecorded as reason:
                self.give_up(str(reason))
            else:
                found.sent = sent
                self._keep(key, found)

    def give_up(self, reason: str) -> None:
        """Go on without recordings for good."""
        self.why_given_up = reason
        self.forget()
        logger.warning("steps are not recorded as CUDA graphs: %s; the numbers stay the same", reason)

    def _bytes_of(self, stage: Stage) -> int:
        """What a recording for this stage keeps to itself."""
        context, latents, weight = stage.context, stage.solver.latents, self._transformer.project_out.weight
        noisy = latents[:, 0].numel() // math.prod(stage.solver.patch) // self._transformer.parallel.sequence_size
        rows = latents.size(0) * context.num_history + noisy
        widths = LIVE_WIDTHS + len(context.texts) - 1
        texts = sum(layer.nbytes for text in context.texts for layer in text.keys_values)
        return rows * widths * weight.size(1) * weight.element_size() + texts

    def _comes_often(self, key: tuple[object, ...]) -> bool:
        if len(self._uses) == _SHAPES_COUNTED:
            self._uses.clear()
        self._uses[key] += 1
        return self._uses[key] > self._uses_before

    def _compare(self, found: _Recording, stage: Stage, before: Sequence[Tensor], expected: tuple[Tensor, ...]) -> None:
        """Raise _NotRecorded unless a replay has the plain step's numbers."""
        problem = ""
        try:
            found.fill(stage, before)
            self._replay(found, stage)
            pairs = [*zip(found.outputs, expected, strict=True)]
            pairs += zip(found.stage.solver.state(), stage.solver.state(), strict=True)
            errors = [_relative_error(*pair) for pair in pairs]
            if not all(error <= _TOLERANCE for error in errors):  # NaN is no success either
                problem = f"a replay is {max(errors, key=_badness):.2g} off a plain step"
        except RuntimeError as reason:
            if self._transformer.parallel.size > 1:
                raise
            problem = _said(reason)
        self._check(not problem, problem)

    def _keep(self, key: tuple[object, ...], found: _Recording) -> None:
        if len(self._recordings) == _RECORDINGS_KEPT:
            dropped = next(iter(self._recordings))
            self._recordings.pop(dropped)
            self._uses[dropped] = 0  # it has to come often once more
        self._recordings[key] = found
        used = {recording.texts for recording in self._recordings.values()}
        self._texts = {texts: buffers for texts, buffers in self._texts.items() if texts in used}

    def _check(self, works: bool, problem: str) -> None:
        """Raise _NotRecorded on every rank when it does not work on one."""
        if not self._transformer.parallel.all_agree(works):
            raise _NotRecorded("it does not work on another rank" if works else problem)

    def _replay(self, found: _Recording, stage: Stage) -> None:
        self._fixed_texts(stage.context).fill(stage.context.texts)
        found.replay()

    def forget(self) -> None:
        """Drop all recordings and their memory."""
        self._recordings.clear()
        self._texts.clear()

    def _record(self, stage: Stage) -> _Recording:
        parallel, problem, is_warm = self._transformer.parallel, "", False
        try:
            found = self._blank(stage)
            self._recorder.warm_up(found.stage.step)
            is_warm = True
            found.stage.solver.index.zero_()
            found.replay, found.outputs = self._recorder.record(found.stage.step)
        except RuntimeError as error:  # torch's own, out of memory among them
            if parallel.size > 1 and not is_warm:
                raise  # the others wait for this rank in an exchange
            problem = _said(error)
        self._check(not problem, problem)
        return found

    def _blank(self, stage: Stage) -> _Recording:
        """Buffers of zeros for stages like this one."""
        context = stage.context
        parts = (context.history_BlD, context.history_rotation, context.first_qkv)
        blank = [None if part is None else torch.zeros_like(part) for part in parts]
        fixed = ChunkContext(context.total_history, *blank, self._fixed_texts(context).fixed)
        room = _room(stage)
        return _Recording(
            Stage(self._transformer, stage.solver.blank(room), stage.times.blank(room), fixed, stage.guidance),
            texts=_text_key(context),
            table=self._transformer.chunk_table(stage.solver.latents),
        )

    def _fixed_texts(self, context: ChunkContext) -> _Texts:
        key = _text_key(context)
        if key not in self._texts:
            self._texts[key] = _Texts(context.texts)
        return self._texts[key]


class _Texts:
    """Prompts of one shape in buffers of fixed address."""

    def __init__(self, texts: tuple[TextContext, ...]) -> None:
        self.fixed = tuple(TextContext(tuple(map(torch.zeros_like, text.keys_values))) for text in texts)
        self._holds: tuple[weakref.ref[Tensor], ...] = ()

    def fill(self, texts: tuple[TextContext, ...]) -> None:
        """Copy other prompts in; the ones that are there already are left alone."""
        wanted = [layer for text in texts for layer in text.keys_values]
        if len(self._holds) == len(wanted) and all(
            kept() is layer for kept, layer in zip(self._holds, wanted, strict=True)
        ):
            return
        for fixed, layer in zip((layer for text in self.fixed for layer in text.keys_values), wanted, strict=True):
            fixed.copy_(layer)
        self._holds = tuple(weakref.ref(layer) for layer in wanted)


def _history(context: ChunkContext) -> list[Tensor]:
    parts = (context.history_BlD, context.history_rotation, context.first_qkv)
    return [part for part in parts if part is not None]


def _key(stage: Stage) -> tuple[object, ...]:
    """What stages that one recording serves have in common; equal on all ranks or on none."""
    context, solver = stage.context, stage.solver
    present = tuple(getattr(context, part.name) is None for part in fields(context))
    shapes = tuple(part.shape for part in _history(context))
    state = tuple((tensor.shape, tensor.dtype) for tensor in solver.state())
    own = (solver.rule, solver.coefficients.size(1), _room(stage), state, stage.guidance, stage.prompt_lengths)
    return (*own, context.total_history, present, shapes, _text_key(context))


def _room(stage: Stage) -> int:
    """Steps a recording for this stage has room for: a video's first chunk may take more than the others."""
    return -(-stage.times.embedding.size(0) // _STEPS) * _STEPS


def _tables(stage: Stage) -> tuple[Tensor, ...]:
    """A row per step each."""
    return (stage.solver.coefficients, stage.times.embedding, stage.times.rows)


def _text_key(context: ChunkContext) -> tuple[object, ...]:
    return tuple(text.keys_values[0].shape for text in context.texts)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Into targets that may have more rows."""
    for target, source in zip(targets, sources, strict=True):
        target[: len(source)].copy_(source)


def _said(error: RuntimeError) -> str:
    return f"it fails ({' '.join(str(error).split())[:200]})"


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.float() - expected.float()).norm()
    return (difference / expected.float().norm().clamp_min(1e-12)).item()


def _badness(error: float) -> float:
    return math.inf if math.isnan(error) else error


def why_not_graphs(
    device: torch.device, *, num_ranks: int, wanted: bool | None, offload: str, approximates: bool, compiles: bool
) -> str | None:
    """Why steps are not recorded with these settings, or None; wanted is what the user asked for."""
    if wanted is False:
        return "they are switched off"
    if device.type != "cuda":
        return f"only CUDA devices record graphs, this is {device}"
    if num_ranks > 1 and not wanted:
        return "with several ranks steps are recorded only when that is asked for"
    if offload != "none":
        return f"with offload {offload} weights change their place"
    if approximates:
        return "an approximation decides on the host what is computed"
    if compiles:
        return "compile has its own way"
    return None


def make_graphs(
    transformer: Transformer, config: EngineConfig, device: torch.device, *, approximates: bool
) -> StepGraphs | None:
    """Recorded steps for a connected transformer, None where there can be none; said aloud where they were asked for.

    Collective, once it is clear that these settings allow them.
    """
    context = transformer.parallel
    reason = why_not_graphs(
        device,
        num_ranks=context.size,
        wanted=config.cuda_graphs,
        offload=config.offload,
        approximates=approximates,
        compiles=config.compile,
    )
    recorder = None
    if reason is None:
        recorder = choose_recorder(device, context, exchange=config.exchange)
        reason = f"the exchanges of {config.exchange} cannot be recorded here"
    if recorder is None:
        if config.cuda_graphs:
            logger.warning("steps are not recorded as CUDA graphs: %s", reason)
        return None
    return StepGraphs(transformer, recorder, uses_before=0 if config.cuda_graphs else USES_BEFORE)
