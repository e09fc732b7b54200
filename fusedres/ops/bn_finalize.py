"""From statistics to the numbers that normalise, and the running statistics beside them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.context import here
from fusedres.operands import Norm, Normaliser, Partials, Shared
from fusedres.ops.checks import check_vector
from fusedres.ops.op import Op
from fusedres.ops.rows import empty_partials, storable
from fusedres.plan.tiles import PartialTile, partial_tile
from fusedres.runtime.collectives import gathered
from fusedres.runtime.launch import launch
from fusedres.runtime.torch_private import lerp_all


def _combine(partials: Partials) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, m2) of all partials together, after Chan, Golub and LeVeque (1979).

    Adding squared deviations about each partial's own mean cannot cancel, which E[y^2] - E[y]^2 does.
    """
    count = partials.counts.sum()
    share = (partials.counts / count).unsqueeze(1)
    mean = (partials.mean * share).sum(0)
    between = (partials.mean - mean).square() * partials.counts.unsqueeze(1)
    return count, mean, (partials.m2 + between).sum(0)


def _check(partials: Partials, norm: Norm) -> None:
    check_norm(partials.mean.shape[1], norm)


def _bn_finalize(partials: Partials, norm: Norm) -> Normaliser:
    """mean and invstd = (m2 / count + eps)^-1/2 of all partials; scale = gamma * invstd; shift = beta - mean * scale.

    Updates, in place and if given, running_mean += momentum * (mean + bias - running_mean) and running_var likewise
    towards m2 / (count - 1). A convolution's bias does not change what batch norm puts out, so it is no part of y
    here; it only moves the running mean. ``counted``, if given, is one more afterwards. What ends the pass at any
    moment leaves all of a batch norm's statistics as they were or all moved, and no more batches than were counted.

    Args:
        partials: statistics of the raw output, (T,) and (T, K).
        norm: the batch norm; running_mean and running_var both or neither. With a group of processes, ``partials`` of
            all are combined, by one collective.

    Returns:
        `Normaliser` in the statistics dtype.
    """
    partials, shared = _of_group(partials, norm)
    gamma, beta, running_mean, running_var, bias, counted, (eps, momentum, *_) = norm
    count, mean, m2 = _combine(partials)
    result = normaliser(mean, torch.rsqrt(m2 / count + eps), gamma, beta)._replace(shared=shared)
    if running_mean is not None and running_var is not None:
        measured = mean if bias is None else mean + bias
        towards = [measured.to(running_mean.dtype), (m2 / (count - 1)).to(running_var.dtype)]
    # Written when nothing is left to allocate, and in PyTorch's order: counted first, both statistics by one call.
    if counted is not None:
        counted.add_(1)
    if running_mean is not None and running_var is not None:
        lerp_all([running_mean, running_var], towards, momentum)
    return result


def _of_group(partials: Partials, norm: Norm) -> tuple[Partials, Shared | None]:
    """The statistics of a batch norm's group, one part of each process; of no group, those that there are."""
    return _of_groups([partials], [norm])[0] if norm.numbers.is_shared else (partials, None)


def _of_groups(partials: Sequence[Partials], norms: Sequence[Norm]) -> list[tuple[Partials, Shared]]:
    """The same of batch norms that all share the statistics of one group, by one collective."""
    group, absent = norms[0].numbers.group, here().absent
    own = [vector for counts, mean, m2 in map(bn_combine, partials) for vector in (counts, mean[0], m2[0])]
    packed = torch.cat(own)
    every = gathered(torch.zeros_like(packed) if absent else packed, group).split([len(vector) for vector in own], 1)
    found = []
    for i in range(0, len(own), 3):
        counts = every[i][:, 0]
        found.append((Partials(counts, *every[i + 1 : i + 3]), Shared(counts.sum().unsqueeze(0), group, absent)))
    return found


def finalized_together(partials: Sequence[Partials], norms: Sequence[Norm]) -> list[Normaliser]:
    """`bn_finalize` of batch norms that share the statistics of one group, by one collective."""
    alone = [norm._replace(numbers=norm.numbers._replace(group=None)) for norm in norms]
    every = zip(_of_groups(partials, norms), alone, strict=True)
    return [bn_finalize(of_each, norm)._replace(shared=shared) for (of_each, shared), norm in every]


bn_finalize = Op(_bn_finalize, check=_check)


@bn_finalize.triton
def _bn_finalize_triton(partials: Partials, norm: Norm) -> Normaliser:
    if not storable(*partials) or not finalisable(norm):
        return NotImplemented
    from fusedres.kernels.bn_finalize import bn_finalize_kernel

    partials, shared = _of_group(partials, norm)
    parts, channels = partials.mean.shape
    tile, measured = partial_tile(parts), _of_parts(partials)
    outputs = normaliser_outputs(norm, channels, partials.mean.device)
    launch(
        bn_finalize_kernel, (-(-channels // tile.block_c),),
        {
            **measured, **outputs.arguments, "parts": parts, "C": channels, "BLOCK_PARTS": tile.block_parts,
            "BLOCK_C": tile.block_c,
        },
        reads=(*measured, *outputs.reads), kind="batch norm", writes=outputs.writes, flops=8 * parts * channels,
        steps=(-(-parts // tile.block_parts),), **tile.options,
    )  # fmt: skip
    return outputs.norm._replace(shared=shared)


def finalisable(norm: Norm) -> bool:
    """Whether kernels take the tensors of a batch norm."""
    counted = norm.counted
    if counted is not None and (counted.dtype != torch.int64 or counted.numel() != 1):
        return False
    running = (norm.running_mean, norm.running_var)
    return storable(*norm.vectors) and all(r is None or r.is_contiguous() for r in running)


class NormaliserOutputs(NamedTuple):
    """What a kernel that ends in `store_normaliser` is told of a batch norm, and what it reads and writes for it."""

    norm: Normaliser
    arguments: dict[str, Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def normaliser_outputs(norm: Norm, channels: int, device: torch.device) -> NormaliserOutputs:
    """The batch norm of `bn_finalize` in the form of a launch."""
    gamma, beta, running_mean, running_var, bias, counted, (eps, momentum, *_) = norm
    normaliser = Normaliser(*torch.empty((4, channels), dtype=torch.float32, device=device))
    vectors = {"gamma_ptr": gamma, "beta_ptr": beta, "bias_ptr": None if running_mean is None else bias}
    read = {name: None if vector is None else vector.contiguous() for name, vector in vectors.items()}
    running = {"running_mean_ptr": running_mean, "running_var_ptr": running_var, "counted_ptr": counted}
    written = {f"{name}_ptr": vector for name, vector in normaliser.vectors.items()}
    numbers = {"eps": float(eps), "momentum": float(momentum)}
    return NormaliserOutputs(
        normaliser, {**read, **running, **written, **numbers}, (*read, *running), (*written, *running)
    )


def _of_parts(partials: Partials) -> dict[str, Tensor]:
    names = ("count_ptr", "part_mean_ptr", "part_m2_ptr")
    return {name: tensor.contiguous() for name, tensor in zip(names, partials, strict=True)}


def _bn_combine(partials: Partials) -> Partials:
    """All parts made one: the statistics of every pixel together.

    Args:
        partials: of T parts, (T,) and (T, K).

    Returns:
        `Partials` of one part.
    """
    count, mean, m2 = _combine(partials)
    return Partials(count.unsqueeze(0), mean.unsqueeze(0), m2.unsqueeze(0))


bn_combine = Op(_bn_combine)


@bn_combine.triton
def _bn_combine_triton(partials: Partials) -> Partials:
    parts, channels = partials.mean.shape
    if not storable(*partials):
        return NotImplemented
    if parts == 1:
        return partials
    from fusedres.kernels.bn_finalize import bn_combine_kernel

    tile, read, combined = partial_tile(parts), _of_parts(partials), empty_partials(1, channels, partials.mean.device)
    written = dict(zip(("all_count_ptr", "mean_ptr", "m2_ptr"), combined, strict=True))
    launch(
        bn_combine_kernel, (-(-channels // tile.block_c),),
        {**read, **written, "parts": parts, "C": channels, "BLOCK_PARTS": tile.block_parts, "BLOCK_C": tile.block_c},
        reads=tuple(read), kind="batch norm", writes=tuple(written), flops=8 * parts * channels,
        steps=(-(-parts // tile.block_parts),), **tile.options,
    )  # fmt: skip
    return combined


def check_norm(channels: int, norm: Norm, *, device: torch.device | None = None, of: str = "") -> None:
    """Refuse a vector of another length than ``channels`` or on another ``device``, and one running statistic alone.

    Args:
        channels: K.
        norm: the batch norm.
        device: where they must be, if given.
        of: what the message adds to a vector's name.
    """
    for name, vector in zip(Norm._fields, norm.vectors, strict=False):
        if vector is not None:
            check_vector(f"{name}{of}", vector, channels, device)
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError("running_mean, running_var: expected both or neither, got one")


def _bn_from_running(norm: Norm, dtype: torch.dtype = torch.float32) -> Normaliser:
    """The numbers of frozen or evaluated batch norm: mean = running_mean - bias, invstd = (running_var + eps)^-1/2.

    Args:
        norm: the batch norm as it is stored.
        dtype: of the statistics.

    Returns:
        `Normaliser` in the statistics dtype.
    """
    mean, var = _running(norm)
    mean = mean.to(dtype)
    if norm.bias is not None:
        mean = mean - norm.bias.to(dtype)
    return normaliser(mean, torch.rsqrt(var.to(dtype) + norm.numbers.eps), norm.gamma, norm.beta)


bn_from_running = Op(_bn_from_running)


@bn_from_running.triton
def _bn_from_running_triton(norm: Norm, dtype: torch.dtype = torch.float32) -> Normaliser:
    mean, _ = _running(norm)
    if dtype != torch.float32 or not storable(*norm.vectors):
        return NotImplemented
    from fusedres.kernels.bn_finalize import bn_running_kernel

    tile, channels = PartialTile(), len(mean)
    read = running_arguments(norm)
    numbers = Normaliser(*torch.empty((4, channels), dtype=torch.float32, device=mean.device))
    written = {f"{name}_ptr": vector for name, vector in numbers.vectors.items()}
    launch(
        bn_running_kernel, (-(-channels // tile.block_c),),
        {**read, **written, "eps": float(norm.numbers.eps), "C": channels, "BLOCK_C": tile.block_c},
        reads=tuple(read), kind="batch norm", writes=tuple(written), flops=8 * channels, **tile.options,
    )  # fmt: skip
    return numbers


def running_arguments(norm: Norm | None, prefix: str = "") -> dict[str, Tensor | None]:
    """What kernels that form the numbers of a batch norm themselves are told of it, but its eps."""
    return {
        f"{prefix}{name}_ptr": None if vector is None else vector.contiguous()
        for name, vector in zip(Norm._fields, (norm or Norm()).vectors, strict=False)
    }


def eps_of(norm: Norm | None) -> float:
    """What kernels that form numbers themselves are told."""
    return 0.0 if norm is None else float(norm.numbers.eps)


def _running(norm: Norm) -> tuple[Tensor, Tensor]:
    """The running statistics of a batch norm that is evaluated by them; refuses one that does not fit."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("running_mean, running_var: expected both in evaluation, got None")
    check_norm(len(mean), norm)
    return mean, var


def normaliser(mean: Tensor, invstd: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Normaliser:
    """scale = gamma * invstd and shift = beta - mean * scale."""
    scale = invstd if gamma is None else invstd * gamma.to(invstd.dtype)
    shift = -mean * scale
    return Normaliser(mean, invstd, scale, shift if beta is None else shift + beta.to(shift.dtype))
