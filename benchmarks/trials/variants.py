"""Cases, and the loop that measures them: a kernel, its inputs, other ways to launch it, and PyTorch's operations.

How a kernel is launched is said by functions of its module, such as `window_launch`. A variant is a table of functions
that stand in for them while it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.timing import WrongResult
from benchmarks.trials.run import Run
from benchmarks.trials.timing import Call, microseconds

Functions = dict[str, Callable[..., Any]]
ErrorOf = Callable[[Any], float]  # of what a call returned
PRESENT = "present"
MOST_ERROR = 0.06  # of a result that is timed: rounding to 8 bits makes half of it, and interpreted nearly all
# A variable of each thread, for kernels of several variants are compiled at the same time.
_standing_in: ContextVar[Functions] = ContextVar("standing_in")


@dataclass(frozen=True)
class Case:
    """One line per variant and peer.

    Attributes:
        name: model, kernel, shape.
        work: what one call does, in floating-point operations or bytes; `unit`: the same by time, TFLOP/s or TB/s.
        calls: the kernel with inputs that take turns. They return what they made, and nothing that was there before.
        error: of what the first call returns.
        variants: name -> functions that stand in.
        peers: name -> calls of something else.
    """

    name: str
    work: float
    unit: str
    calls: Sequence[Call] = ()
    error: ErrorOf | None = None
    variants: dict[str, Functions] = field(default_factory=lambda: {PRESENT: {}})
    peers: dict[str, Sequence[Call]] = field(default_factory=dict)


@contextmanager
def replaceable(*functions: tuple[ModuleType, str]) -> Iterator[None]:
    """Within it, what `instead` says stands in for these functions of modules, and else they are what they are."""

    def dispatcher(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: _standing_in.get({}).get(name, own)(*arguments)

    with ExitStack() as stack:
        for module, name in functions:
            stack.enter_context(mock.patch.object(module, name, dispatcher(name, getattr(module, name))))
        yield


@contextmanager
def instead(functions: Functions) -> Iterator[None]:
    """Within it, and in this thread, these stand in for `replaceable` functions of the same names."""
    token = _standing_in.set({**_standing_in.get({}), **functions})
    try:
        yield
    finally:
        _standing_in.reset(token)


def launches(function: str, present: Any, *changes: dict[str, Any]) -> dict[str, Functions]:
    """Variants of a launch, a named tuple that `function` returns: the present one, and with some fields changed."""
    variants: dict[str, Functions] = {PRESENT: {}}
    for change in changes:
        other = present._replace(**change)
        if other != present:
            label = ", ".join(f"{name} {value}" for name, value in change.items())
            variants[label] = {function: lambda *_, other=other: other}
    return variants


def measure_cases(run: Run, section: str, cases: Sequence[Case]) -> None:
    """Compile the kernels of all cases, then check and time way by way, each of them a trial."""
    compile_all(
        run, section, [(case, functions) for case in cases if case.calls for functions in case.variants.values()]
    )
    for case in cases:
        variants = case.variants if case.calls else {}
        for variant, functions in variants.items():
            measure = partial(_measure, run, section, case, variant, case.calls, functions, case.error)
            run.trial(f"{section}: {case.name}: {variant}", measure)
        for peer, calls in case.peers.items():
            run.trial(f"{section}: {case.name}: {peer}", partial(_measure, run, section, case, peer, calls, {}, None))


def _measure(
    run: Run, section: str, case: Case, name: str, calls: Sequence[Call], functions: Functions, error_of: ErrorOf | None
) -> None:
    """Check one way, time it, and write a line and a row."""
    with instead(functions):
        error = None
        if error_of is not None:
            got = _unwritten_is_nan(calls[0]) if run.device.type == "cuda" else calls[0]()
            error = float(f"{error_of(got):.2g}")
            del got
            if not error <= MOST_ERROR:  # NaN is refused, too
                raise WrongResult(f"error {error:.1e}, at most {MOST_ERROR} is allowed")
        one = microseconds(calls, run.device)
    rate = case.work / one / 1e6
    tail = "" if error is None else f"   error {error:.1e}"
    run.say(f"{section:<10}{case.name:<34}{name:<28}{one:>9.1f} us{rate:>8.2f} {case.unit}{tail}")
    run.keep(section, case.name, [(name, round(one, 2), float(f"{rate:.4g}"), case.unit, error)])


def compile_all(run: Run, section: str, wanted: Sequence[tuple[Case, Functions]]) -> None:
    """Call each once, from several threads: their kernels are compiled at the same time."""
    if run.device.type != "cuda" or not run.threads:
        return

    def call(case_and_functions: tuple[Case, Functions]) -> bool:
        case, functions = case_and_functions
        try:
            with torch.no_grad(), instead(functions):  # both are of the thread
                torch.zeros(1, device=run.device)  # so is the context
                case.calls[0]()
        except Exception:  # which its trial will meet again, and write
            return False
        return True

    def call_all() -> None:
        start = time.time()
        with ThreadPoolExecutor(run.threads) as pool:
            done = list(pool.map(call, wanted))
        run.say(f"({section}: {sum(done)} of {len(done)} compiled in {time.time() - start:.1f} s)")

    run.trial(f"{section}: compilation", call_all)


def _unwritten_is_nan(call: Call) -> Any:
    """What a call returns the second time, in memory where the first result lay, which is made NaN in between."""
    first = call()
    for tensor in first if isinstance(first, tuple) else (first,):
        if isinstance(tensor, Tensor):
            tensor.fill_(float("nan"))
    del first, tensor
    return call()
