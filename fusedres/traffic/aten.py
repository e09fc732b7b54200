"""What a call into PyTorch's own library moves and computes.

Each of its kernels reads every input once and writes every output once. Views are free. Batch norm is what ATen's
kernels for channels_last do: in training a pass for the statistics, one over (C,) vectors, one that normalises; in
backward a pass for the sums and one for the gradient. A convolution's two gradients are two kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from fusedres.runtime.launch import nbytes, tf32_allowed
from fusedres.runtime.torch_private import arguments_of, storage_id, tree_leaves, tree_map_only


class Cost(NamedTuple):
    """One kernel: its name, the kind of work (`KINDS`), bytes and floating-point operations.

    ``reread`` are bytes left out of ``read`` because another kernel of the same call has read them too.
    """

    name: str
    kind: str
    read: int
    written: int
    flops: int = 0
    reread: int = 0


class Made(NamedTuple):
    """A call into the library, of which each kernel has its own `Cost`: an operator and what it was given."""

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


class Call(NamedTuple):
    """One kernel of a library's, and what says how fast it multiplies.

    Attributes:
        cost: what it moves and computes.
        dtype: of what it multiplies.
        tf32: whether it may round fp32 factors to TF32.
        made: the call, where somebody wants to make it again; one object for all of its kernels.
    """

    cost: Cost
    dtype: torch.dtype
    tf32: bool
    made: Made | None = None

    @classmethod
    def of(cls, cost: Cost, args: Sequence[Any]) -> Call:
        """A kernel of the call that was given ``args``."""
        dtype = next((tensor.dtype for tensor in _tensors(args)), torch.float32)
        return cls(cost, dtype, tf32_allowed())


KINDS = (
    "convolution", "input gradient", "weight gradient", "both gradients", "moments", "batch norm", "add and ReLU",
    "pooling", "cast", "other",
)  # fmt: skip

_KIND_OF = {
    "threshold_backward": "add and ReLU", "relu": "add and ReLU", "relu_": "add and ReLU", "add": "add and ReLU",
    "add_": "add and ReLU", "_to_copy": "cast", "_foreach_copy_": "cast",
    **dict.fromkeys(
        ("max_pool2d_with_indices", "max_pool2d_with_indices_backward", "avg_pool2d", "avg_pool2d_backward",
         "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "mean"),
        "pooling",
    ),
    "constant_pad_nd": "add and ReLU", "cat": "add and ReLU", "slice_backward": "add and ReLU",
}  # fmt: skip

# Calls that start no kernel: memory taken, not written; views that say they are none; numbers fetched by the host.
_FREE = frozenset({
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_local_scalar_dense",
    "resize_", "set_", "as_strided_", "is_same_size", "sym_size", "sym_stride", "_has_compatible_shallow_copy_type",
})  # fmt: skip
# Overwrites its first argument without reading it.
_OVERWRITES = frozenset({
    "fill_", "zero_", "copy_", "_foreach_copy_", "_foreach_zero_",
})  # fmt: skip
# One launch of ATen's for lists of tensors holds so many blocks and tensors (`MultiTensorApply.cuh`, depth 2).
_LIST_BLOCKS, _LIST_CHUNK, _LIST_TENSORS = 320, 65536, 64


def costs(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, *, grad_twice: bool) -> Iterator[Cost]:
    """The kernels of one call, as a `torch_private.DispatchMode` sees it.

    Args:
        func: the ``torch._ops.OpOverload``.
        args, kwargs: given to it.
        out: what it returned.
        grad_twice: whether both gradients of a convolution read the output's gradient, as two kernels do; else it is
            counted once, as if one kernel made both.
    """
    name = func.overloadpacket.__name__
    if func.is_view or name in _FREE:
        return
    special = _SPECIAL.get(name)
    if name == "convolution_backward":
        yield from _convolution_backward(args, out, grad_twice)
    elif special is not None:
        yield from special(args, out)
    else:
        yield from _generic(func, name, args, kwargs, out)


def _generic(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Iterator[Cost]:
    read: dict[Any, int] = {}
    written: dict[Any, int] = {}
    for i, (argument, changed, is_out) in enumerate(arguments_of(func)):
        tensors = list(_tensors(args[i] if i < len(args) else kwargs.get(argument)))
        if changed:
            written |= {_key(tensor): nbytes(tensor) for tensor in tensors}
        if not (changed and (is_out or (i == 0 and name in _OVERWRITES))):
            read |= {_key(tensor): nbytes(tensor) for tensor in tensors}
    owned = {storage_id(tensor) for tensor in _tensors([args, kwargs])}
    for tensor in _tensors(out):
        if storage_id(tensor) not in owned:
            written[_key(tensor)] = nbytes(tensor)
    if not sum(written.values()):
        return
    flops = flop_registry.get(func.overloadpacket)
    kind = _KIND_OF.get(name, "other")
    total = Cost(name, kind, sum(read.values()), sum(written.values()), 0)
    launches = _list_launches(name, args) if name.startswith("_foreach") else 1
    yield total._replace(flops=flops(*args, **kwargs, out_val=out) if flops else 0)
    for _ in range(launches - 1):
        yield total._replace(read=0, written=0)


def _list_launches(name: str, args: Sequence[Any]) -> int:
    tensors: Sequence[Tensor] = args[0]
    if name == "_foreach_copy_" and any(a.stride() != b.stride() for a, b in zip(tensors, args[1], strict=True)):
        return len(tensors)  # one by one where any two of a pair are laid out differently
    chunks = sum(-(-tensor.numel() // _LIST_CHUNK) for tensor in tensors)
    return max(1, -(-chunks // _LIST_BLOCKS), -(-len(tensors) // _LIST_TENSORS))


def _tensors(value: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_meta)


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return storage_id(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _bn_forward(args: Sequence[Any], out: Any) -> Iterator[Cost]:
    x, z, vector = nbytes(args[0]), nbytes(out[0]), 4 * args[0].shape[1]
    yield Cost("batch_norm_stats", "batch norm", x, 2 * vector)
    yield Cost("batch_norm_update_stats", "batch norm", 4 * vector, 2 * vector)
    yield Cost("batch_norm_elemt", "batch norm", x + 4 * vector, z)


def _bn_either(args: Sequence[Any], out: Any) -> Iterator[Cost]:
    training = args[5]
    return _bn_forward(args, out) if training else _bn_eval(args, out)


def _bn_eval(args: Sequence[Any], out: Any) -> Iterator[Cost]:
    yield Cost("batch_norm_elemt", "batch norm", nbytes(args[0]) + 16 * args[0].shape[1], nbytes(out[0]))


def _bn_backward(args: Sequence[Any], out: Any) -> Iterator[Cost]:
    both, vector = nbytes(args[0]) + nbytes(args[1]), 4 * args[1].shape[1]
    yield Cost("batch_norm_backward_reduce", "batch norm", both + 2 * vector, 4 * vector)
    if out[0] is not None:
        yield Cost("batch_norm_backward_elemt", "batch norm", both + 5 * vector, nbytes(out[0]))


def _convolution(args: Sequence[Any], out: Any) -> Iterator[Cost]:
    x, weight, bias, transposed = args[0], args[1], args[2], args[6]
    read = sum(nbytes(tensor) for tensor in (x, weight, bias) if tensor is not None)
    yield Cost("convolution", "convolution", read, nbytes(out), _conv_flops(x if transposed else out, weight))


def _conv_flops(pixels_of: Tensor, weight: Tensor) -> int:
    """Two for each product; ``pixels_of`` is the side with ``weight.shape[0]`` channels."""
    return 2 * pixels_of.numel() // pixels_of.shape[1] * weight.numel()


def _convolution_backward(args: Sequence[Any], out: Any, grad_twice: bool) -> Iterator[Cost]:
    g, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
    flops, arriving = _conv_flops(x if transposed else g, weight), nbytes(g)
    again = 0 if grad_twice else arriving
    if mask[0]:
        yield Cost("convolution_input_grad", "input gradient", arriving + nbytes(weight), nbytes(out[0]), flops)
    if mask[1]:
        left_out = again if mask[0] else 0
        read = arriving - left_out + nbytes(x)
        yield Cost("convolution_weight_grad", "weight gradient", read, nbytes(out[1]), flops, left_out)
    if mask[2]:
        left_out = again if mask[0] or mask[1] else 0
        yield Cost("convolution_bias_grad", "weight gradient", arriving - left_out, nbytes(out[2]), 0, left_out)


def _max_pool_backward(args: Sequence[Any], out: Any) -> Iterator[Cost]:
    # Of the pooled tensor only the shape is used.
    yield Cost("max_pool2d_backward", "pooling", nbytes(args[0]) + nbytes(args[-1]), nbytes(out))


_SPECIAL = {
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit"), _bn_either),
    "_batch_norm_with_update": _bn_forward,
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "_batch_norm_no_update"), _bn_eval),
    **dict.fromkeys(("native_batch_norm_backward", "batch_norm_backward"), _bn_backward),
    "convolution": _convolution,
    "max_pool2d_with_indices_backward": _max_pool_backward,
}


_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def laid_out(func: Any, args: Any, out: Any) -> Any:
    """What a convolution returns, in the memory format that it has on a GPU: on meta it forgets channels_last."""
    if func not in _CONVOLUTIONS or not any(
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        for tensor in args[:3]
        if tensor is not None
    ):
        return out
    return tree_map_only(
        Tensor,
        lambda tensor: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor,
        out,
    )
