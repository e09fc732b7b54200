"""Who is measured: eager PyTorch in both memory formats, what else there is, and fused blocks on every rung."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fusedres
from fusedres.bench import cudnn, inplace_abn
from fusedres.bench.cases import Case, ModelCase, OpCase, near
from fusedres.bench.setting import NotSupported, Setting
from fusedres.bench.steps import Step, graph_step, model_step, op_step
from fusedres.patterns.choose import AUTO
from fusedres.plan.gpus import device_gpu
from fusedres.plan.schedule import SCHEDULES
from fusedres.runtime import plans
from fusedres.swap.report import why_not_fused

__all__ = ["CONTENDERS", "GROUPS", "YARDSTICK", "Contender", "contenders_named", "operands_of", "own_copies"]

# Whose speed is 1, and whose error against fp64 is what others are allowed.
YARDSTICK = "eager"


@dataclass(frozen=True)
class Contender:
    """One way to run a case.

    Attributes:
        name: of the contender.
        what: one line for people.
        prepare: from a case, a setting and placed operands (a model, input and target; or an op's) to a `Step`.
        why_not: for a case and a setting, why it can not run there, or None.
        schedule: of fused ones, the rung.
        fixed_shapes: compiled for its operands' sizes, which other sizes would cost minutes: gated at those alone.
        plain: the plain network that it computes, made of the plain network of the case in place.
        remark: for a setting, what is to be said of its figures, or None.
    """

    name: str
    what: str
    prepare: Callable[[Case, Setting, tuple[Any, ...]], Step]
    why_not: Callable[[Case, Setting], str | None] = lambda _case, _setting: None
    schedule: str | None = None
    fixed_shapes: bool = False
    plain: Callable[[nn.Module], nn.Module] | None = None
    remark: Callable[[Setting], str | None] = lambda _setting: None

    def backend(self, setting: Setting) -> AbstractContextManager[None]:
        """What to call `prepare` and the step's functions inside of."""
        return fusedres.backend(setting.device.backend) if self.schedule is not None else nullcontext()


def operands_of(case: Case, setting: Setting, seed: int) -> tuple[Any, ...]:
    """The operands of a case on the setting's device: (plain model, input, target), or those of an op."""
    device = setting.device.torch
    if isinstance(case, OpCase):
        return tuple(_on(operand, device) for operand in case.data(setting, seed))
    x, target = (_on(tensor, device) for tensor in case.data(setting, seed))
    model = case.model().to(device).train(setting.train)
    if setting.train:
        return model, x, target
    return model.to(setting.storage), x.to(setting.storage), target


def _on(operand: Any, device: torch.device) -> Any:
    return operand.to(device) if isinstance(operand, Tensor) else operand


def _eager(case: Case, setting: Setting, operands: tuple[Any, ...]) -> Step:
    if isinstance(case, OpCase):
        return op_step(case.plain, operands)
    return model_step(case, setting, *operands)


def _eager_nchw(case: Case, setting: Setting, operands: tuple[Any, ...]) -> Step:
    if isinstance(case, OpCase):
        return op_step(case.plain, tuple(_nchw(operand) for operand in operands))
    model, x, target = operands
    return model_step(case, setting, model.to(memory_format=torch.contiguous_format), _nchw(x), _nchw(target))


def _nchw(operand: Any) -> Any:
    return operand.contiguous() if isinstance(operand, Tensor) else operand


def _compiled(mode: str) -> Callable[[Case, Setting, tuple[Any, ...]], Step]:
    def prepare(case: Case, setting: Setting, operands: tuple[Any, ...]) -> Step:
        if isinstance(case, OpCase):
            return op_step(_in_new_iteration(torch.compile(case.plain, mode=mode)), operands)
        model, x, target = operands
        called = _in_new_iteration(torch.compile(model, mode=mode))
        return model_step(case, setting, model, x, target, called=called)

    return prepare


def _in_new_iteration(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """With CUDA graphs, results of the call before may be overwritten by the next."""

    def call(*operands: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*operands)

    return call


def _why_not_compiled(_case: Case, setting: Setting) -> str | None:
    return "torch.compile knows no emulated GPU" if setting.device.executed_on_cpu and setting.mode == "op" else None


def _fused(schedule: str) -> Callable[[Case, Setting, tuple[Any, ...]], Step]:
    def prepare(case: Case, setting: Setting, operands: tuple[Any, ...]) -> Step:
        if isinstance(case, OpCase):
            return op_step(case.fused, operands)
        model, x, target = operands
        fused = fusedres.fuse(model, schedule=schedule)
        why = why_not_fused(fused)
        if why is not None:
            raise NotSupported(why)
        return model_step(case, setting, fused, x, target)

    return prepare


def _frozen(case: Case, setting: Setting, operands: tuple[Any, ...]) -> Step:
    assert isinstance(case, ModelCase)
    model, x, target = operands
    frozen = fusedres.freeze(model)
    why = why_not_fused(frozen)
    if why is not None:
        raise NotSupported(why)
    return model_step(case, setting, frozen, x, target)


def _why_not_frozen(case: Case, setting: Setting) -> str | None:
    if isinstance(case, OpCase):
        return "an op has no batch norm to fold"
    return "a frozen model can not be trained" if setting.mode == "train" else None


def _why_not_tuned(setting: Setting) -> str | None:
    """Why no plan of this user's says what a fused model runs, or None."""
    if not setting.device.is_gpu:
        return "no plan: it runs as predicted"
    index = setting.device.torch.index
    gpu = device_gpu(torch.cuda.current_device() if index is None else index)
    return None if plans.default_for(gpu) is not None else "no plan of this GPU: it runs as predicted"


def _rung_only(case: Case, _setting: Setting) -> str | None:
    return "an op has no schedule" if isinstance(case, OpCase) else None


def _graphed(
    prepare: Callable[[Case, Setting, tuple[Any, ...]], Step],
) -> Callable[[Case, Setting, tuple[Any, ...]], Step]:
    def captured(case: Case, setting: Setting, operands: tuple[Any, ...]) -> Step:
        return graph_step(prepare(case, setting, operands), setting.device.torch)

    return captured


def _why_no_graph(case: Case, setting: Setting) -> str | None:
    if isinstance(case, OpCase):
        return "an op is too short a graph"
    return None if setting.device.is_gpu else "CUDA graphs need a GPU"


def _cudnn(case: Case, _setting: Setting, operands: tuple[Any, ...]) -> Step:
    if isinstance(case, OpCase):
        assert case.cudnn is not None
        return op_step(case.cudnn, operands)
    model, x, target = operands
    return model_step(case, _setting, cudnn.infer_with_graphs(model), x, target)


def _why_not_cudnn(case: Case, setting: Setting) -> str | None:
    if isinstance(case, OpCase) and case.cudnn is None:
        return "cuDNN's frontend has no graph that does this alone"
    if setting.mode == "train":
        return "a whole training step of cuDNN graphs is beyond this benchmark; see the ops"
    return cudnn.why_unavailable(setting.device.torch)


def _abn(case: Case, setting: Setting, operands: tuple[Any, ...]) -> Step:
    model, x, target = operands
    assert isinstance(case, ModelCase)
    return model_step(case, setting, inplace_abn.with_inplace_abn(model), x, target)


def _why_not_abn(case: Case, setting: Setting) -> str | None:
    if isinstance(case, OpCase) or setting.mode != "train":
        return "inplace_abn is for training blocks and networks"
    return inplace_abn.why_unavailable(setting.device.torch)


_EVERY = (
    Contender("eager-nchw", "eager PyTorch, contiguous (NCHW)", _eager_nchw),
    Contender(YARDSTICK, "eager PyTorch, channels_last", _eager),
    Contender("compile", "torch.compile, channels_last", _compiled("default"), _why_not_compiled, fixed_shapes=True),
    Contender(
        "compile-max", "torch.compile(mode='max-autotune'), channels_last", _compiled("max-autotune"),
        _why_not_compiled, fixed_shapes=True,
    ),
    Contender("eager-graph", "eager PyTorch, channels_last, as a CUDA graph", _graphed(_eager), _why_no_graph),
    Contender("cudnn", "cuDNN graphs through nvidia-cudnn-frontend", _cudnn, _why_not_cudnn),
    Contender(
        "inplace_abn", "inplace_abn, which computes a leaky ReLU", _abn, _why_not_abn, plain=inplace_abn.leaky,
    ),
    Contender("fused", "fusedres.fuse(model)", _fused(AUTO), schedule=AUTO),
    Contender(
        "tuned", "fusedres.fuse(model), by the plan that fusedres tune made of this GPU", _fused(AUTO), schedule=AUTO,
        remark=_why_not_tuned,
    ),
    *(
        Contender(f"fused-{rung}", f"fusedres.fuse(model, schedule={rung!r})", _fused(rung), _rung_only, rung)
        for rung in SCHEDULES
    ),
    Contender(
        "frozen", "fusedres.freeze(model): batch norms folded once", _frozen, _why_not_frozen, schedule=AUTO,
    ),
    Contender("fused-graph", "fusedres.fuse(model), as a CUDA graph", _graphed(_fused(AUTO)), _why_no_graph, AUTO),
)  # fmt: skip
CONTENDERS = {contender.name: contender for contender in _EVERY}
GROUPS = {"all": tuple(CONTENDERS), "ladder": tuple(f"fused-{rung}" for rung in SCHEDULES)}


def contenders_named(names: Sequence[str]) -> tuple[Contender, ...]:
    """The contenders called so, in the registry's order; `GROUPS` have names too. The yardstick is always there.

    Raises:
        ValueError: there is none; near names are listed.
    """
    wanted = {YARDSTICK}
    for name in names:
        if name not in CONTENDERS and name not in GROUPS:
            raise ValueError(near("contenders", name, (*CONTENDERS, *GROUPS)))
        wanted.update(GROUPS.get(name, (name,)))
    return tuple(contender for name, contender in CONTENDERS.items() if name in wanted)


def own_copies(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Operands whose model is a copy, so that what a contender does to it stays with it."""
    return tuple(copy.deepcopy(operand) if isinstance(operand, nn.Module) else operand for operand in operands)
