"""Backends: which implementations an op has, which one runs a call, and why the others do not.

Every public function in :mod:`t2t_fast.ops` owns one :class:`Op`, a list of implementations in the order in which
``auto`` prefers them. The backend of a call is the first that one of these names:

1. the call's ``backend=`` (models and layers pass theirs),
2. the innermost :func:`use_backend`,
3. the environment variable ``T2T_FAST_BACKEND``,

and otherwise by ``auto``: the first implementation that can run the arguments and is not known to be slower there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.torch_version import TorchVersion

from .config import BACKEND, BACKENDS


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run these arguments here; the message says why."""


def _nothing(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        backend: The backend's name.
        run: The function itself; takes exactly the arguments of ``why_not`` and ``why_not_auto``.
        why_not: Returns None, or the reason why these arguments cannot run, in words a user can act on.
        why_not_auto: Returns None, or why ``auto`` passes this implementation over although it could run.
        detail: Returns None, or which of its ways the implementation takes and why. For :func:`explain`.
    """

    backend: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None] = _nothing
    why_not_auto: Callable[..., str | None] = _nothing
    detail: Callable[..., str | None] = _nothing


@dataclass
class Decision:
    """One call of an op: the backend that ran, why each other backend did not, and which of its ways it took."""

    op: str
    backend: str
    reasons: dict[str, str]
    calls: int = 1
    detail: str | None = None

    def same(self, other: Decision) -> bool:
        """Whether both are equal except in the number of calls."""
        return dataclasses.replace(self, calls=0) == dataclasses.replace(other, calls=0)


@dataclass
class Explanation:
    """The answer of :func:`explain`: one :class:`Decision` for each distinct outcome, in order of first use.

    ``notes`` are what a model decided besides, a line each.
    """

    decisions: list[Decision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, decision: Decision) -> None:
        for known in self.decisions:
            if known.same(decision):
                known.calls += 1
                return
        self.decisions.append(decision)

    def backends(self) -> dict[str, set[str]]:
        """Op name to the set of backends that ran it."""
        ran: dict[str, set[str]] = {}
        for decision in self.decisions:
            ran.setdefault(decision.op, set()).add(decision.backend)
        return ran

    def __str__(self) -> str:
        if not self.decisions:
            return "no t2t_fast op was called"
        lines = list(self.notes)
        for decision in self.decisions:
            detail = f" ({decision.detail})" if decision.detail else ""
            lines.append(f"{decision.op} x{decision.calls}: {decision.backend}{detail}")
            lines += [f"    {backend}: {reason}" for backend, reason in decision.reasons.items()]
        return "\n".join(lines)


# Whether torch.compile reads a ContextVar, and compiles again when it has changed.
_COMPILER_READS_CONTEXTS = TorchVersion(torch.__version__) >= "2.15"

_requested: ContextVar[str | None] = ContextVar("t2t_fast_backend", default=None)
_explanation: ContextVar[Explanation | None] = ContextVar("t2t_fast_explanation", default=None)


def check_backend(backend: str) -> str:
    """``backend`` itself if it is a backend's name.

    Raises:
        ValueError: It is not.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; accepted: {', '.join(BACKENDS)}")
    return backend


def resolve_backend(backend: str = "auto") -> str:
    """``backend`` itself unless it is ``auto``; then the context's, or else the environment's."""
    if check_backend(backend) != "auto":
        return backend
    if torch.compiler.is_compiling() and not _COMPILER_READS_CONTEXTS:
        return _requested_while_tracing()
    return _requested.get() or BACKEND


@torch.compiler.assume_constant_result
def _requested_while_tracing() -> str:
    return _requested.get() or BACKEND


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Take ``backend`` for every op called in this ``with`` block that does not name its own.

    Nestable; each thread and each asyncio task has its own. ``"auto"`` lifts an outer choice for the inner block.
    A compiled function follows too, but before torch 2.15 it keeps the choice that it was compiled under.

    Raises:
        ValueError: ``backend`` is no backend's name.
    """
    token = _requested.set(check_backend(backend))
    try:
        yield
    finally:
        _requested.reset(token)


@dataclass(frozen=True)
class Op:
    """A public op's name and its implementations, best first. ``reference`` is last and always runs."""

    name: str
    implementations: tuple[Implementation, ...]

    def __call__(self, backend: str, *args: Any) -> Any:
        """Run the implementation that ``backend`` and the context ask for on ``args``."""
        requested = resolve_backend(backend)
        chosen = self._choose(requested, args)
        if is_explaining():
            tell(
                Decision(self.name, chosen.backend, self._reasons(requested, chosen, args), detail=chosen.detail(*args))
            )
        return chosen.run(*args)

    def _choose(self, backend: str, args: tuple[Any, ...]) -> Implementation:
        if backend != "auto":
            chosen = self._get(backend)
            reason = chosen.why_not(*args)
            if reason is not None:
                raise BackendUnavailable(f"{self.name}: backend={backend!r} cannot run here: {reason}")
            return chosen
        for implementation in self.implementations:
            if implementation.why_not(*args) is None and implementation.why_not_auto(*args) is None:
                return implementation
        raise AssertionError(f"{self.name} has no implementation that runs everywhere")

    def _reasons(self, backend: str, chosen: Implementation, args: tuple[Any, ...]) -> dict[str, str]:
        """Per implementation that was not chosen, why."""
        others = [i for i in self.implementations if i is not chosen]
        if backend != "auto":
            return {i.backend: f"{backend!r} was requested" for i in others}
        before = self.implementations[: self.implementations.index(chosen)]
        reasons = {i.backend: i.why_not(*args) or i.why_not_auto(*args) or "" for i in before}
        return reasons | {i.backend: f"{chosen.backend} comes first" for i in others if i not in before}

    def _get(self, backend: str) -> Implementation:
        for implementation in self.implementations:
            if implementation.backend == backend:
                return implementation
        known = ", ".join(i.backend for i in self.implementations)
        raise BackendUnavailable(f"{self.name} has no {backend!r} implementation in this version; it has: {known}")


def is_explaining() -> bool:
    """Whether :func:`explain` is listening, so that a :class:`Decision` is worth making."""
    return not torch.compiler.is_compiling() and _explanation.get() is not None


def tell(decision: Decision) -> None:
    """Report to :func:`explain` an op that a module computed itself, without calling its :class:`Op`."""
    explanation = _explanation.get()
    if explanation is not None:
        explanation.add(decision)


def note(line: str) -> None:
    """Report to :func:`explain` what a model decided; see ``Explanation.notes``."""
    explanation = _explanation.get()
    if explanation is not None and line not in explanation.notes:
        explanation.notes.append(line)


def explain(model: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Explanation:
    """Run ``model(*inputs)`` once and tell, per op, which implementation ran and why the others did not.

    What it tells is true of this very call: with gradients on, as for training; under ``torch.no_grad()`` or
    ``torch.inference_mode()``, as for inference. Random state is put back afterwards. A model wrapped by
    ``torch.compile`` decides while it is traced: explain the module inside (``compiled._orig_mod``).

    Returns:
        An :class:`Explanation`; ``print`` it, or read ``.decisions`` and ``.notes``.
    """
    explanation = Explanation()
    token = _explanation.set(explanation)
    devices = sorted({x.device for x in inputs if isinstance(x, torch.Tensor) and x.device.type != "cpu"}, key=str)
    device_type = devices[0].type if devices else "cuda"
    try:
        with torch.random.fork_rng(devices=devices, device_type=device_type):
            model(*inputs, **kwargs)
    finally:
        _explanation.reset(token)
    return explanation
