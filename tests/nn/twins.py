"""A fused module beside its plain twin: what both compute, and what a module holds."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.comparison import relative_error

Snapshot = list[tuple[str, int, Tensor, type]]


def snapshot(module: nn.Module) -> Snapshot:
    """Every parameter, gradient and buffer: name, identity, value."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors |= {f"{name}.grad": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return [(name, id(t), t.detach().clone(), type(t)) for name, t in tensors.items()]


def assert_unchanged(module: nn.Module, before: Snapshot) -> None:
    """The same tensors, bit for bit, under the same names in the same order."""
    now = snapshot(module)
    assert [name for name, *_ in now] == [name for name, *_ in before]
    for (name, identity, value, kind), (_, old_identity, old, old_kind) in zip(now, before, strict=True):
        assert identity == old_identity, f"{name} is another tensor"
        assert kind is old_kind, name
        assert value.dtype == old.dtype and torch.equal(value, old), f"{name} has changed"


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms that do something: gammas of both signs and a 0, betas, running statistics off 0, 1."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    with torch.no_grad():
        for part in module.modules():
            if not hasattr(part, "running_mean"):
                continue
            if part.weight is not None:
                part.weight.copy_(drawn(part.weight))
                part.weight[0] = 0.0
            if part.bias is not None:
                part.bias.copy_(drawn(part.bias))
            if part.running_mean is not None:
                part.running_mean.copy_(drawn(part.running_mean))
                part.running_var.copy_(drawn(part.running_var).square() + 0.5)
    return module


class Pass(NamedTuple):
    """Everything that one forward and backward pass leaves behind."""

    z: Tensor
    dx: Tensor | None
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def run(module: nn.Module, x: Tensor, dz: Tensor | None = None) -> Pass:
    """One step from fresh gradients; ``dz`` is drawn if not given."""
    module.zero_grad(set_to_none=True)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.is_floating_point())
    z = module(x)
    if z.requires_grad:
        if dz is None:
            dz = torch.randn(z.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        z.backward(dz.to(z.dtype))
    return Pass(
        z.detach(),
        x.grad,
        {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        {name: b.detach().clone() for name, b in module.named_buffers()},
    )


def assert_same_pass(actual: Pass, exact: Pass, tolerance: float = 1e-10) -> None:
    """Outputs, gradients and buffers agree, relative in norm, and counters exactly.

    A gradient that is zero but for rounding (of a bias before batch norm) is measured by the others.
    """
    assert relative_error(actual.z, exact.z) <= tolerance, "output"
    present = {name: grad for name, grad in exact.grads.items() if grad is not None}
    assert {name for name, grad in actual.grads.items() if grad is not None} == set(present)
    largest = max((float(grad.norm()) for grad in present.values()), default=0.0)
    for name, grad in present.items():
        ours = actual.grads[name]
        assert ours is not None and ours.dtype == grad.dtype, name
        error = relative_error(ours, grad, max(float(grad.norm()), 1e-3 * largest))
        assert error <= tolerance, f"gradient of {name}: relative error {error:.1e}"
    assert (actual.dx is None) == (exact.dx is None)
    if actual.dx is not None and exact.dx is not None:
        assert relative_error(actual.dx, exact.dx) <= tolerance, "gradient of the input"
    assert list(actual.buffers) == list(exact.buffers)
    for name, buffer in exact.buffers.items():
        ours = actual.buffers[name]
        assert ours.dtype == buffer.dtype, name
        if buffer.is_floating_point():
            assert relative_error(ours, buffer) <= tolerance, name
        else:
            assert torch.equal(ours, buffer), f"{name}: {ours}, expected {buffer}"


def assert_twins(fused: nn.Module, plain: nn.Module, *inputs: Tensor, tolerance: float = 1e-10) -> None:
    """Both modules, from wherever they are, make the same pass of every input in turn."""
    for x in inputs:
        assert_same_pass(run(fused, x), run(plain, x), tolerance)


def plain_copy(module: nn.Module) -> nn.Module:
    """An independent unfused copy with the same values and modes."""
    import fusedres

    return fusedres.unfuse(copy.deepcopy(module))


def tensor(*shape: int, seed: int = 1, **kwargs: Any) -> Tensor:
    """Standard normal values, the same every time, fp64 unless told."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(**kwargs)
