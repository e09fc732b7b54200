"""From partial statistics to the numbers that normalise, and the running statistics beside them."""

import triton
import triton.language as tl


@triton.jit
def _lerp(start, end, weight):
    """start + weight * (end - start), exact at both ends as torch.lerp is."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))


@triton.jit
def _combined(
    count_ptr,  # (parts,) fp32
    mean_ptr,  # (parts, C) fp32
    m2_ptr,  # (parts, C) fp32
    o_c,  # (BLOCK_C,) channels
    m_c,  # (BLOCK_C,) which of them exist
    parts,
    C,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Count, (BLOCK_C,) mean and m2 of all parts together, after Chan, Golub and LeVeque (1979).

    Each row of a step is combined with the rows before it in its place, and these in the end about the common mean:
    deviations about a mean that is nearby can not cancel, and every number is read once.
    """
    o_part = tl.arange(0, BLOCK_PARTS)
    n = tl.zeros((BLOCK_PARTS,), tl.float32)
    mean = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        m_part = o_part < parts - start
        o = (start + o_part).to(tl.int64)[:, None] * C + o_c[None, :]
        m = m_part[:, None] & m_c[None, :]
        more = tl.load(count_ptr + start + o_part, mask=m_part, other=0.0)
        d = tl.where(m, tl.load(mean_ptr + o, mask=m, other=0.0) - mean, 0.0)
        share = more / tl.maximum(n + more, 1.0)
        mean += d * share[:, None]
        m2 += tl.load(m2_ptr + o, mask=m, other=0.0) + d * d * (n * share)[:, None]
        n += more
    count = tl.sum(n, axis=0)
    m = (n > 0)[:, None] & m_c[None, :]
    origin = tl.load(mean_ptr + o_c, mask=m_c, other=0.0)
    d = tl.where(m, mean - origin[None, :], 0.0)
    common = origin + tl.sum(n[:, None] * d, axis=0) / count
    d = tl.where(m, mean - common[None, :], 0.0)
    return count, common, tl.sum(m2 + n[:, None] * d * d, axis=0)


@triton.jit(do_not_specialize=["parts"])
def bn_combine_kernel(
    count_ptr,  # (parts,) fp32
    part_mean_ptr,  # (parts, C) fp32
    part_m2_ptr,  # (parts, C) fp32
    all_count_ptr,  # (1,) fp32 out
    mean_ptr,  # (C,) fp32 out
    m2_ptr,  # (C,) fp32 out
    parts,
    C,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    count, mean, m2 = _combined(count_ptr, part_mean_ptr, part_m2_ptr, o_c, m_c, parts, C, BLOCK_PARTS, BLOCK_C)
    tl.store(mean_ptr + o_c, mean, mask=m_c)
    tl.store(m2_ptr + o_c, m2, mask=m_c)
    if tl.program_id(0) == 0:
        tl.store(all_count_ptr, count)


@triton.jit
def store_normaliser(
    count,  # values behind each mean
    mean,  # (BLOCK_C,) fp32
    m2,  # (BLOCK_C,) fp32, sum of squared deviations
    gamma_ptr,  # (C,) any float dtype, or None
    beta_ptr,  # (C,) any float dtype, or None
    bias_ptr,  # (C,) of the convolution before, or None
    running_mean_ptr,  # (C,) updated in place, or None
    running_var_ptr,  # (C,) updated in place, or None
    counted_ptr,  # () int64, one more afterwards, or None
    mean_ptr,  # (C,) fp32 out
    invstd_ptr,  # (C,) fp32 out
    scale_ptr,  # (C,) fp32 out, gamma * invstd
    shift_ptr,  # (C,) fp32 out, beta - mean * scale
    o_c,  # (BLOCK_C,) channels
    m_c,  # (BLOCK_C,) which of them exist
    eps,
    momentum,
):
    """The numbers that normalise, the running statistics and their count of batches, from those of the batch."""
    invstd = 1.0 / tl.sqrt_rn(m2 / count + eps)
    scale = invstd
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    shift = -mean * scale
    if beta_ptr is not None:
        shift += tl.load(beta_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    tl.store(mean_ptr + o_c, mean, mask=m_c)
    tl.store(invstd_ptr + o_c, invstd, mask=m_c)
    tl.store(scale_ptr + o_c, scale, mask=m_c)
    tl.store(shift_ptr + o_c, shift, mask=m_c)
    if running_mean_ptr is not None:
        # A bias moves the output's mean and nothing else, so that no other kernel needs to know it.
        if bias_ptr is not None:
            mean += tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        running_mean = tl.load(running_mean_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        running_var = tl.load(running_var_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        tl.store(running_mean_ptr + o_c, _lerp(running_mean, mean, momentum), mask=m_c)
        tl.store(running_var_ptr + o_c, _lerp(running_var, m2 / (count - 1.0), momentum), mask=m_c)
    if counted_ptr is not None:  # noqa: SIM102 (a choice of the compiler's, then one of the program's)
        if tl.program_id(0) == 0:
            counted = tl.load(counted_ptr)
            tl.debug_barrier()  # every thread reads, one of them writes
            tl.store(counted_ptr, counted + 1)


@triton.jit
def load_running(
    running_mean_ptr,  # (C,) any float dtype
    running_var_ptr,  # (C,) any float dtype
    gamma_ptr,  # (C,) any float dtype, or None
    beta_ptr,  # (C,) any float dtype, or None
    bias_ptr,  # (C,) of the convolution before, or None
    eps,
    o_c,  # channels
    m_c,  # which of them exist
):
    """Scale and shift of a batch norm in evaluation, formed from what is stored: nothing that could go stale."""
    scale = 1.0 / tl.sqrt_rn(tl.load(running_var_ptr + o_c, mask=m_c, other=1.0).to(tl.float32) + eps)
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    mean = tl.load(running_mean_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        mean -= tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    shift = -mean * scale
    if beta_ptr is not None:
        shift += tl.load(beta_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def bn_running_kernel(
    running_mean_ptr,  # (C,) any float dtype
    running_var_ptr,  # (C,) any float dtype
    gamma_ptr,  # (C,) any float dtype, or None
    beta_ptr,  # (C,) any float dtype, or None
    bias_ptr,  # (C,) of the convolution before, or None
    mean_ptr,  # (C,) fp32 out
    invstd_ptr,  # (C,) fp32 out
    scale_ptr,  # (C,) fp32 out, gamma * invstd
    shift_ptr,  # (C,) fp32 out, beta - mean * scale
    C,
    eps,
    BLOCK_C: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    mean = tl.load(running_mean_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        mean -= tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    var = tl.load(running_var_ptr + o_c, mask=m_c, other=1.0).to(tl.float32)
    store_normaliser(
        1.0, mean, var, gamma_ptr, beta_ptr, None, None, None, None, mean_ptr, invstd_ptr, scale_ptr, shift_ptr,
        o_c, m_c, eps, 0.0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["parts"])
def bn_finalize_kernel(
    count_ptr,  # (parts,) fp32, values behind each partial mean
    part_mean_ptr,  # (parts, C) fp32
    part_m2_ptr,  # (parts, C) fp32, sums of squared deviations from them
    gamma_ptr,  # (C,) any float dtype, or None
    beta_ptr,  # (C,) any float dtype, or None
    bias_ptr,  # (C,) of the convolution before, or None
    running_mean_ptr,  # (C,) updated in place, or None
    running_var_ptr,  # (C,) updated in place, or None
    counted_ptr,  # () int64, one more afterwards, or None
    mean_ptr,  # (C,) fp32 out
    invstd_ptr,  # (C,) fp32 out
    scale_ptr,  # (C,) fp32 out, gamma * invstd
    shift_ptr,  # (C,) fp32 out, beta - mean * scale
    parts,
    C,
    eps,
    momentum,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    count, mean, m2 = _combined(count_ptr, part_mean_ptr, part_m2_ptr, o_c, m_c, parts, C, BLOCK_PARTS, BLOCK_C)
    store_normaliser(
        count, mean, m2, gamma_ptr, beta_ptr, bias_ptr, running_mean_ptr, running_var_ptr, counted_ptr,
        mean_ptr, invstd_ptr, scale_ptr, shift_ptr, o_c, m_c, eps, momentum,
    )  # fmt: skip
