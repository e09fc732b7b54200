"""What is timed: a function without arguments, and the same work once more with its results to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.bench.cases import ModelCase
from fusedres.bench.setting import Setting
from fusedres.measure.accuracy import Observed
from fusedres.runtime.devices import made_current
from fusedres.traffic.tensors import first_tensor

__all__ = ["Step", "graph_step", "model_step", "op_step", "tensors_in"]

LEARNING_RATE, MOMENTUM = 1e-3, 0.9


@dataclass
class Step:
    """A contender at work.

    Attributes:
        run: one step, nothing looked at.
        observe: what the step computes; to be called before the first ``run``, which moves the parameters.
        model: whose saved activations can be counted, if any.
        forward: from the model to the tensor that backward starts at; of steps that train.
        x: the input, if its gradient is asked for.
    """

    run: Callable[[], object]
    observe: Callable[[], Observed]
    model: nn.Module | None = None
    forward: Callable[[nn.Module], Tensor] | None = None
    x: Tensor | None = None
    keep: list[Any] = field(default_factory=list)


def tensors_in(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested tuples, lists and mappings, with a name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_in(part, str(key))
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from tensors_in(part, f"{name}.{i}" if i else name)


def op_step(function: Callable[..., Any], operands: tuple[Any, ...]) -> Step:
    """One call of ``function``, without autograd."""

    def run() -> Any:
        with torch.no_grad():
            return function(*operands)

    return Step(run, lambda: Observed(dict(tensors_in(run())), {}))


def model_step(
    case: ModelCase,
    setting: Setting,
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    called: Callable[[Tensor], Any] | None = None,
) -> Step:
    """Inference, or zero_grad, forward, backward and SGD with momentum; a block has no loss and no optimiser.

    Args:
        case: what the model belongs to.
        setting: its mode and dtype.
        model: whose parameters are trained.
        x: (N, C, H, W).
        target: labels (N,) or (N, H, W) of a network, or the gradient that arrives at a block's output.
        called: what is called instead of the model, such as its compiled form.
    """

    def forward(x: Tensor) -> Tensor:
        return first_tensor((called or model)(x))

    if not setting.train:

        def infer() -> Tensor:
            with torch.inference_mode():
                return forward(x)

        return Step(infer, lambda: Observed({"output": infer().clone()}, {}), model)

    network = case.kind == "network"
    x = x.detach().requires_grad_(not network)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM) if network else None

    def output() -> Tensor:
        with setting.autocast():
            return forward(x)

    def backward() -> Tensor:
        model.zero_grad(set_to_none=True)
        x.grad = None
        z = output()
        if network:
            torch.nn.functional.cross_entropy(z.float() if z.dtype.itemsize == 2 else z, target).backward()
        else:
            z.backward(target.to(z.dtype))
        return z

    def train() -> Tensor:
        z = backward()
        if optimizer is not None:
            optimizer.step()
        return z.detach()

    def saved(model: nn.Module) -> Tensor:
        with setting.autocast():
            return first_tensor(model(x))

    # Gradients are looked at before the optimiser moves anything.
    return Step(train, lambda: _observed(backward(), model, x), model, saved, x)


def _observed(z: Tensor, model: nn.Module, x: Tensor | None) -> Observed:
    """Copies, which later steps leave alone."""
    outputs = {"output": z.detach().clone()}
    if x is not None and x.grad is not None:
        outputs["gradient of the input"] = x.grad.clone()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return Observed(outputs, grads)


def graph_step(step: Step, device: torch.device) -> Step:
    """The same step captured as a CUDA graph and replayed, which spares the host's part of every launch.

    The parameters are put back after the warm-up that capturing needs, so that the first replay starts where the plain
    step would have.
    """
    model = step.model
    assert model is not None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with made_current(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                step.run()
        torch.cuda.current_stream(device).wait_stream(side)
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # Without a stream of its own PyTorch takes the one that the process captured on first, on whichever device.
        with torch.cuda.graph(graph, stream=side):
            result: Any = step.run()
    model.load_state_dict(before)

    def observe() -> Observed:
        graph.replay()
        if step.forward is None:
            return Observed({"output": result.clone()}, {})
        return _observed(result, model, step.x)

    return Step(graph.replay, observe, model, step.forward, keep=[step, graph, result])
