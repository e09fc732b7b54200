"""No time without the right numbers: every contender is held against fp64, and to the error that eager makes there.

At a small size the case is computed in fp64, by eager PyTorch in the row's own format, and by the contender. Its
outputs may be off by 1.5 times what eager is off by, and so may its gradients; both as root mean square of three draws,
or of eight if three leave a doubt. At the size that is timed, where fp64 does not fit, the contender is held against
eager, from which it may be as far as the two may be from fp64 together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fusedres.bench.cases import Case, OpCase
from fusedres.bench.contenders import CONTENDERS, YARDSTICK, Contender, operands_of, own_copies
from fusedres.bench.setting import EXACT, Setting
from fusedres.measure.accuracy import FACTOR, GRADIENTS, Observed, allowance, errors, worst

__all__ = ["Gate", "Verdict"]

DRAWS, MORE_DRAWS = 3, 8
# The largest batch and side of the images that a network, a block or an op is computed for in fp64.
SMALL = {"network": (8, 96), "block": (4, 56), "op": (2, 112)}


@dataclass(frozen=True)
class Verdict:
    """Green if there is no ``reason``. ``error`` is the largest against fp64, ``bound`` what it was held to."""

    reason: str | None = None
    error: float = math.nan
    bound: float = math.nan


class Gate:
    """What the contenders of one case under one setting are held against; computed once, when first asked for."""

    def __init__(self, case: Case, setting: Setting) -> None:
        batch, px = SMALL[case.kind]
        px = setting.px if isinstance(case, OpCase) else min(setting.px, px)
        self.case, self.setting = case, setting
        self.small = replace(setting, batch=min(setting.batch, batch), px=px)
        self._references: dict[tuple[Any, int], tuple[Observed, dict[str, float]]] = {}

    @property
    def whole(self) -> bool:
        """Whether the small size is the one that is timed."""
        return self.small == self.setting

    def operands(self, seed: int, plain: Callable[[nn.Module], nn.Module] | None) -> tuple[Any, ...]:
        """Those of the small size, the plain model turned into what the contender computes."""
        operands = operands_of(self.case, self.small, seed)
        return tuple(plain(one) if plain and isinstance(one, nn.Module) else one for one in operands)

    def reference(self, contender: Contender, seed: int) -> tuple[Observed, dict[str, float]]:
        """fp64, and how far eager is from it in the row's own format."""
        key = (contender.plain, seed)
        if key not in self._references:
            eager = CONTENDERS[YARDSTICK]
            operands = self.operands(seed, contender.plain)
            exact_setting = replace(self.small, dtype=EXACT)
            exact = eager.prepare(self.case, exact_setting, tuple(_wide(one) for one in operands)).observe()
            rounded = eager.prepare(self.case, self.small, own_copies(operands)).observe()
            self._references[key] = exact, errors(rounded, exact)
        return self._references[key]

    def judge(self, contender: Contender, full: Observed | None = None, eager: Observed | None = None) -> Verdict:
        """Hold a contender against fp64 at the small size, and ``full`` against ``eager``, both at the timed size.

        Raises:
            Exception: whatever the contender raises at the small size.
        """
        if contender.name == YARDSTICK:
            return self._finite(full)
        if self.whole or not contender.fixed_shapes:
            verdict = self._against_fp64(contender, range(1, DRAWS + 1))
            if verdict.reason is not None and math.isfinite(verdict.error):
                verdict = self._against_fp64(contender, range(1, MORE_DRAWS + 1))
            if verdict.reason is not None:
                return verdict
        else:
            verdict = Verdict()
        if self.whole or contender.plain is not None:
            return verdict
        if full is None or eager is None:  # eager had no memory, say
            return Verdict("eager has no result to hold it against at this size") if contender.fixed_shapes else verdict
        at_size = self._against_eager(contender, full, eager)
        return at_size if at_size.reason is not None or contender.fixed_shapes else verdict

    def _finite(self, full: Observed | None) -> Verdict:
        everything = [] if full is None else [*full.outputs.values(), *full.gradients.values()]
        if not all(bool(tensor.isfinite().all()) for tensor in everything if tensor is not None):
            return Verdict("the result is not finite")
        found = self.reference(CONTENDERS[YARDSTICK], 1)[1]
        name = _named(found)
        return Verdict(None, found[name], math.nan)

    def _against_fp64(self, contender: Contender, seeds: Sequence[int]) -> Verdict:
        ours: dict[str, list[float]] = {}
        theirs: dict[str, list[float]] = {}
        for seed in seeds:
            exact, eager = self.reference(contender, seed)
            operands = own_copies(self.operands(seed, None))
            with contender.backend(self.small):
                observed = contender.prepare(self.case, self.small, operands).observe()
            for name, error in errors(observed, exact).items():
                ours.setdefault(name, []).append(error)
                theirs.setdefault(name, []).append(eager[name])
        return self._verdict(
            {name: _rms(values) for name, values in ours.items()},
            {name: _rms(values) for name, values in theirs.items()},
            FACTOR, "fp64",
        )  # fmt: skip

    def _against_eager(self, contender: Contender, full: Observed, eager: Observed) -> Verdict:
        typical = [self.reference(contender, seed)[1] for seed in range(1, DRAWS + 1)]
        theirs = {name: _rms([one[name] for one in typical]) for name in typical[0]}
        return self._verdict(errors(full, eager), theirs, FACTOR + 1, "eager at full size")

    def _verdict(self, ours: dict[str, float], theirs: dict[str, float], factor: float, against: str) -> Verdict:
        bounds = {name: allowance(name, theirs[name], self.setting.storage, self.case.kind, factor) for name in ours}
        most = worst(ours, bounds)
        if not ours[most] <= bounds[most]:
            missing = " (missing)" if math.isinf(ours[most]) else ""
            why = f"{most} differs from {against} by {ours[most]:.1e}{missing}, allowed {bounds[most]:.1e}"
            return Verdict(why, ours[most], bounds[most])
        name = _named(ours)
        return Verdict(None, ours[name], bounds[name])


def _named(found: dict[str, float]) -> str:
    """The error that a row shows: of all gradients, or the largest of the outputs."""
    return GRADIENTS if GRADIENTS in found else max(found, key=lambda name: found[name])


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def _wide(operand: Any) -> Any:
    if isinstance(operand, nn.Module):
        return copy.deepcopy(operand).double()
    return operand.double() if isinstance(operand, Tensor) and operand.is_floating_point() else operand
