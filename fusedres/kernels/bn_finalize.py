"""From partial statistics to the numbers that normalise, and the running statistics beside them."""

import triton
import triton.language as tl


@triton.jit
def _lerp(start, end, weight):
    """start + weight * (end - start), exact at both ends as torch.lerp is."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))


@triton.jit(do_not_specialize=["parts"])
def bn_combine_kernel(
    count_ptr,  # (parts,) fp32
    mean_ptr,  # (parts, C) fp32
    m2_ptr,  # (parts, C) fp32
    out_count_ptr,  # (ceil(parts / BLOCK_PARTS),) fp32 out
    out_mean_ptr,  # (ceil(parts / BLOCK_PARTS), C) fp32 out
    out_m2_ptr,  # (ceil(parts / BLOCK_PARTS), C) fp32 out
    parts,
    C,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """As many parts as a block holds become one, so that thousands of tiles are not combined by a few programs."""
    i_part, i_c = tl.program_id(0), tl.program_id(1)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_part = i_part * BLOCK_PARTS + tl.arange(0, BLOCK_PARTS)
    m_part, m_c = o_part < parts, o_c < C
    m = m_part[:, None] & m_c[None, :]
    o = o_part.to(tl.int64)[:, None] * C + o_c[None, :]
    n = tl.load(count_ptr + o_part, mask=m_part, other=0.0)
    means = tl.load(mean_ptr + o, mask=m, other=0.0)
    origin = tl.load(mean_ptr + i_part.to(tl.int64) * BLOCK_PARTS * C + o_c, mask=m_c, other=0.0)
    count = tl.sum(n, axis=0)
    mean = origin + tl.sum(tl.where(m, n[:, None] * (means - origin[None, :]), 0.0), axis=0) / count
    d = means - mean[None, :]
    m2 = tl.sum(tl.load(m2_ptr + o, mask=m, other=0.0) + tl.where(m, n[:, None] * d * d, 0.0), axis=0)
    o_out = i_part * C + o_c
    tl.store(out_mean_ptr + o_out, mean, mask=m_c)
    tl.store(out_m2_ptr + o_out, m2, mask=m_c)
    if i_c == 0:
        tl.store(out_count_ptr + i_part, count)


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
    o_part = tl.arange(0, BLOCK_PARTS)

    # After Chan, Golub and LeVeque (1979), in two passes: deviations about the common mean can not cancel.
    origin = tl.load(part_mean_ptr + o_c, mask=m_c, other=0.0)
    counts = tl.zeros((BLOCK_PARTS,), tl.float32)
    total = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        m_part = o_part < parts - start
        o = (start + o_part)[:, None] * C + o_c[None, :]
        m = m_part[:, None] & m_c[None, :]
        n = tl.load(count_ptr + start + o_part, mask=m_part, other=0.0)
        mean = tl.load(part_mean_ptr + o, mask=m, other=0.0)
        counts += n
        total += tl.where(m, n[:, None] * (mean - origin[None, :]), 0.0)
    count = tl.sum(counts, axis=0)
    mean = origin + tl.sum(total, axis=0) / count
    squares = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        m_part = o_part < parts - start
        o = (start + o_part)[:, None] * C + o_c[None, :]
        m = m_part[:, None] & m_c[None, :]
        n = tl.load(count_ptr + start + o_part, mask=m_part, other=0.0)
        d = tl.load(part_mean_ptr + o, mask=m, other=0.0) - mean[None, :]
        squares += tl.load(part_m2_ptr + o, mask=m, other=0.0) + tl.where(m, n[:, None] * d * d, 0.0)
    m2 = tl.sum(squares, axis=0)

    store_normaliser(
        count, mean, m2, gamma_ptr, beta_ptr, bias_ptr, running_mean_ptr, running_var_ptr, counted_ptr,
        mean_ptr, invstd_ptr, scale_ptr, shift_ptr, o_c, m_c, eps, momentum,
    )  # fmt: skip
