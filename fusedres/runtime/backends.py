"""Which face of an op runs: its Triton kernel, the formula, or one call into the vendor's library."""

from fusedres.context import Context, Entered, context, here

BACKENDS = {
    "auto": "kernels on CUDA and HIP tensors, if the GPU has the matrix units that they use; native elsewhere",
    "triton": "kernels wherever an op has one; tensors must be on a GPU",
    "native": "one library call (ATen, oneDNN, cuDNN) per op where one computes it, the formula elsewhere",
    "reference": "plain PyTorch, exactly the formula in each op's docstring",
}
DEFAULT = Context.backend
VGPU = "vgpu:"  # followed by a target: kernels compiled for it and executed on CPU tensors


def current() -> str:
    """Name of the backend that ops called from this thread use."""
    return here().backend


def runs_kernels(device_type: str) -> bool:
    """Whether ops called from this thread on tensors of this device run their kernels."""
    name = current()
    return name == "triton" or name.startswith(VGPU) or (name == "auto" and device_type == "cuda")


def runs_native() -> bool:
    """Whether an op without a kernel may call the vendor's library."""
    return current() in ("auto", "triton", "native")


def vgpu_target() -> str | None:
    """The target whose kernels are executed on CPU tensors, if that is what was chosen."""
    name = current()
    return name.removeprefix(VGPU) if name.startswith(VGPU) else None


def backend(name: str) -> Entered:
    """Run every fused operation called inside the ``with`` block on the named backend.

    A backward pass uses the backend that its forward pass ran on, wherever it is called.

    Args:
        name: ``"auto"`` (the default), ``"triton"``, ``"native"``, ``"reference"``, or ``"vgpu:<target>"`` (see
            `fusedres.vgpu.TARGETS`): kernels compiled for that target and executed on CPU tensors, slowly; ops
            without a kernel run on their reference there.

    Raises:
        ValueError: the name is not a backend.
        fusedres.vgpu.Unavailable: kernels can not be executed on this machine; the message says what to install.
    """
    _check(name)
    return context(backend=name)


def _check(name: str) -> None:
    if name in BACKENDS:
        return
    if isinstance(name, str) and name.startswith(VGPU):
        # Imported here, since it is needed here alone.
        from fusedres.vgpu import TARGETS, Unavailable, why_unavailable

        if name.removeprefix(VGPU) in TARGETS:
            reason = why_unavailable()
            if reason is not None:
                raise Unavailable(f"backend {name!r}: {reason}")
            return
        raise ValueError(f"backend: expected vgpu:<target> with one of {', '.join(TARGETS)}, got {name!r}")
    raise ValueError(f"backend: expected one of {sorted(BACKENDS)} or vgpu:<target>, got {name!r}")
