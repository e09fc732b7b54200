"""The moments form of a 1x1 convolution: the statistics of its output, and the small matrices of its backward pass."""

import triton
import triton.language as tl

from fusedres.kernels.bn_finalize import store_normaliser
from fusedres.kernels.parts import columns_of_parts
from fusedres.kernels.small_matrices import fp32_dot, pair_of


@triton.jit(do_not_specialize=["pixels", "mean_parts", "m2_parts"])
def moments_finalize_kernel(
    part_mean_ptr,  # (mean_parts, K) fp32, shares of W input_mean
    part_m2_ptr,  # (m2_parts, K) fp32, shares of rowsum((W input_m2) * W)
    gamma_ptr,  # (K,) and so on, as in `bn_finalize_kernel`
    beta_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    counted_ptr,
    mean_ptr,
    invstd_ptr,
    scale_ptr,
    shift_ptr,
    pixels,
    mean_parts,
    m2_parts,
    K,
    eps,
    momentum,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of y = W u: mean and m2, never negative; and what follows from them."""
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    mean = columns_of_parts(part_mean_ptr, o_k, m_k, mean_parts, K, BLOCK_PARTS, BLOCK_K)
    m2 = columns_of_parts(part_m2_ptr, o_k, m_k, m2_parts, K, BLOCK_PARTS, BLOCK_K)
    m2 = tl.maximum(m2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    store_normaliser(
        pixels.to(tl.float32), mean, m2, gamma_ptr, beta_ptr, bias_ptr, running_mean_ptr, running_var_ptr, counted_ptr,
        mean_ptr, invstd_ptr, scale_ptr, shift_ptr, o_k, m_k, eps, momentum,
    )  # fmt: skip


@triton.jit(do_not_specialize=["parts", "pixels"])
def moments_centre_kernel(
    d_ptr,  # (parts, K, C) fp32, parts of sum(g u^T)
    sum_g_ptr,  # (parts, K) fp32
    mean_ptr,  # (C,) fp32 of the input; None under frozen statistics
    product_ptr,  # (K, C) fp32, W m2 where it is at hand, or None
    w_ptr,  # (K, C) weights, storage dtype
    y_mean_ptr,  # (K,) fp32, the batch norm's own; read under frozen statistics
    invstd_ptr,  # (K,) fp32
    scale_ptr,  # (K,) fp32, gamma * invstd
    dw_ptr,  # (K, C) fp32 out: dW, or D' where the product is not at hand
    dgamma_ptr,  # (K,) fp32 out
    dbeta_ptr,  # (K,) fp32 out, sum(g)
    q_ptr,  # (K,) fp32 out, scale * invstd * dgamma / pixels; None under frozen statistics
    parts,
    part_size,  # elements from one part to the next
    pixels,
    C,
    K,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,  # all of C
):
    """D' = D - sum(g) mean^T, dgamma = invstd * rowsum(W * D'), dW = scale * D' - q * product."""
    o_part, o_c = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_C)
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k, m_c = o_k < K, o_c < C
    m = m_k[:, None] & m_c[None, :]
    o = o_k[:, None] * C + o_c[None, :]
    d_parts = tl.zeros((BLOCK_PARTS, BLOCK_K, BLOCK_C), tl.float32)
    g_parts = tl.zeros((BLOCK_PARTS, BLOCK_K), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        m_part = o_part < parts - start
        from_start = (start + o_part).to(tl.int64) * part_size
        m_d = m_part[:, None, None] & m[None, :, :]
        d_parts += tl.load(d_ptr + from_start[:, None, None] + o[None, :, :], mask=m_d, other=0.0)
        m_g = m_part[:, None] & m_k[None, :]
        g_parts += tl.load(sum_g_ptr + from_start[:, None] + o_k[None, :], mask=m_g, other=0.0)
    d, sum_g = tl.sum(d_parts, axis=0), tl.sum(g_parts, axis=0)

    invstd = tl.load(invstd_ptr + o_k, mask=m_k, other=0.0)
    scale = tl.load(scale_ptr + o_k, mask=m_k, other=0.0)
    if mean_ptr is not None:
        d -= sum_g[:, None] * tl.load(mean_ptr + o_c, mask=m_c, other=0.0)[None, :]
    dgamma = tl.sum(tl.load(w_ptr + o, mask=m, other=0.0).to(tl.float32) * d, axis=1)
    if mean_ptr is None:
        dgamma -= tl.load(y_mean_ptr + o_k, mask=m_k, other=0.0) * sum_g
        d *= scale[:, None]
    dgamma *= invstd
    tl.store(dgamma_ptr + o_k, dgamma, mask=m_k)
    tl.store(dbeta_ptr + o_k, sum_g, mask=m_k)
    if mean_ptr is not None:
        q = scale * invstd * dgamma / pixels
        tl.store(q_ptr + o_k, q, mask=m_k)
        if product_ptr is not None:
            d = scale[:, None] * d - q[:, None] * tl.load(product_ptr + o, mask=m, other=0.0)
    tl.store(dw_ptr + o, d, mask=m)


@triton.jit(do_not_specialize=["pixels"])
def moments_matrices_kernel(
    mean_ptr,  # (C,) fp32 of the input
    m2_ptr,  # (C, C) fp32
    w_ptr,  # (K, C) weights, storage dtype
    q_ptr,  # (K,) fp32
    scale_ptr,  # (K,) fp32
    sum_g_ptr,  # (K,) fp32
    dw_ptr,  # (K, C) fp32: D', and dW afterwards
    quadratic_ptr,  # (C, TERMS, C) storage dtype out, terms of -Q = -W^T diag(q) W
    constant_ptr,  # (pieces of C, C) fp32 out, terms of Q mean - W^T (scale * sum(g) / pixels)
    pixels,
    C,
    K,
    TERMS: tl.constexpr,  # 2: what rounding takes from the first is the second
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dW = scale * D' - q * (W m2), tile by tile, and beside it what the input's gradient needs."""
    pieces = tl.cdiv(C, BLOCK_C)
    # The longer sums are begun first.
    pairs = pieces * (pieces + 1) // 2
    i_tile = tl.program_id(0) - pairs
    if i_tile < 0:
        i_c, i_e = pair_of(tl.program_id(0), pieces)
        _quadratic(
            mean_ptr, w_ptr, q_ptr, scale_ptr, sum_g_ptr, quadratic_ptr, constant_ptr, i_c, i_e, pixels, C, K, TERMS,
            PRECISION, BLOCK_C, DEPTH,
        )  # fmt: skip
    else:
        o_k = i_tile // pieces * BLOCK_K + tl.arange(0, BLOCK_K)
        o_c = i_tile % pieces * BLOCK_C + tl.arange(0, BLOCK_C)
        m_k, m_c, o_d = o_k < K, o_c < C, tl.arange(0, DEPTH)
        product = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        for start in range(0, C, DEPTH):
            m_d = start + o_d < C
            w = tl.load(w_ptr + o_k[:, None] * C + start + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
            # Symmetric, so that it can be read along the depth, as TF32 wants its operands.
            o_m2 = o_c[None, :] * C + (start + o_d)[:, None]
            m2 = tl.load(m2_ptr + o_m2, mask=m_d[:, None] & m_c[None, :], other=0.0)
            product = fp32_dot(w, m2, product, PRECISION)
        scale = tl.load(scale_ptr + o_k, mask=m_k, other=0.0)
        q = tl.load(q_ptr + o_k, mask=m_k, other=0.0)
        m = m_k[:, None] & m_c[None, :]
        o = o_k[:, None] * C + o_c[None, :]
        dw = scale[:, None] * tl.load(dw_ptr + o, mask=m, other=0.0) - q[:, None] * product
        tl.store(dw_ptr + o, dw, mask=m)


@triton.jit
def _quadratic(
    mean_ptr,
    w_ptr,
    q_ptr,
    scale_ptr,
    sum_g_ptr,
    quadratic_ptr,
    constant_ptr,
    i_c,
    i_e,  # >= i_c
    pixels,
    C,
    K,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of -Q, and the same across the diagonal.

    In 16 bits Q has two terms: rounded alone it is wrong in the same way at every pixel, which sums do not forgive. The
    mean meets Q as it was rounded, so that u Q - mean Q is (u - mean) Q whatever the rounding.
    """
    o_c, o_e = i_c * BLOCK_C + tl.arange(0, BLOCK_C), i_e * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c, m_e = o_c < C, o_e < C
    total = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    linears = tl.zeros((DEPTH, BLOCK_C), tl.float32)
    for start in range(0, K, DEPTH):
        o_k = start + tl.arange(0, DEPTH)
        m_k = o_k < K
        q = tl.load(q_ptr + o_k, mask=m_k, other=0.0)
        w_c = tl.load(w_ptr + o_k[:, None] * C + o_c[None, :], mask=m_k[:, None] & m_c[None, :], other=0.0)
        w_e = tl.load(w_ptr + o_k[:, None] * C + o_e[None, :], mask=m_k[:, None] & m_e[None, :], other=0.0)
        total = fp32_dot(tl.trans(w_c), w_e.to(tl.float32) * q[:, None], total, PRECISION)
        if i_c == i_e:
            m1 = tl.load(scale_ptr + o_k, mask=m_k, other=0.0) * tl.load(sum_g_ptr + o_k, mask=m_k, other=0.0)
            linears += w_c.to(tl.float32) * (m1 / pixels)[:, None]
    if i_c == i_e:
        total = (total + tl.trans(total)) / 2
    mean_c, mean_e = tl.load(mean_ptr + o_c, mask=m_c, other=0.0), tl.load(mean_ptr + o_e, mask=m_e, other=0.0)
    rest = -total
    along, across = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    m = m_c[:, None] & m_e[None, :]
    for i_term in tl.static_range(TERMS):
        rounded = rest.to(quadratic_ptr.dtype.element_ty)
        tl.store(quadratic_ptr + (o_c * TERMS + i_term)[:, None] * C + o_e[None, :], rounded, mask=m)
        tl.store(quadratic_ptr + (o_e * TERMS + i_term)[None, :] * C + o_c[:, None], rounded, mask=m)
        wide = rounded.to(tl.float32)
        along -= tl.sum(wide * mean_e[None, :], axis=1)
        across -= tl.sum(wide * mean_c[:, None], axis=0)
        rest -= wide
    if i_c == i_e:
        along -= tl.sum(linears, axis=0)
    else:
        tl.store(constant_ptr + i_c * C + o_e, across, mask=m_e)
    tl.store(constant_ptr + i_e * C + o_c, along, mask=m_c)
