"""The small matrices of the moments form: statistics of a 1x1 convolution's output, and what its backward pass needs.

Products of fp32 matrices are taken in three TF32 steps where tensor cores have them (PRECISION), which loses nothing
that fp32 sums would keep.
"""

import triton
import triton.language as tl

from fusedres.kernels.bn_finalize import store_normaliser


@triton.jit
def _times_m2(
    w_ptr,
    m2_ptr,
    o_k,
    o_c,
    m_k,
    m_c,
    C,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(BLOCK_K, BLOCK_C) fp32: rows of W with columns of the centred Gram matrix."""
    product = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    o_d = tl.arange(0, BLOCK_C)
    for start in range(0, C, BLOCK_C):
        m_d = start + o_d < C
        w = tl.load(w_ptr + o_k[:, None] * C + start + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
        # Symmetric, so that it can be read along the depth, as TF32 wants its operands.
        m2 = tl.load(m2_ptr + o_c[None, :] * C + (start + o_d)[:, None], mask=m_d[:, None] & m_c[None, :], other=0.0)
        product = tl.dot(w.to(tl.float32), m2, product, input_precision=PRECISION)
    return product


@triton.jit(do_not_specialize=["pixels"])
def moments_finalize_kernel(
    input_mean_ptr,  # (C,) fp32
    input_m2_ptr,  # (C, C) fp32, sum of (u - mean)(u - mean)^T
    w_ptr,  # (K, C) weights, storage dtype
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
    C,
    K,
    eps,
    momentum,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of y = W u: mean = W input_mean, m2 = rowsum((W input_m2) * W), never negative; and what follows from them."""
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    o_e = tl.arange(0, BLOCK_C)
    mean = tl.zeros((BLOCK_K,), tl.float32)
    m2 = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, C, BLOCK_C):
        o_c = start + o_e
        m_c = o_c < C
        product = _times_m2(w_ptr, input_m2_ptr, o_k, o_c, m_k, m_c, C, PRECISION, BLOCK_K, BLOCK_C)
        m = m_k[:, None] & m_c[None, :]
        w = tl.load(w_ptr + o_k[:, None] * C + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        mean += tl.sum(w * tl.load(input_mean_ptr + o_c, mask=m_c, other=0.0)[None, :], axis=1)
        m2 += tl.sum(product * w, axis=1)
    m2 = tl.maximum(m2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    store_normaliser(
        pixels.to(tl.float32), mean, m2, gamma_ptr, beta_ptr, bias_ptr, running_mean_ptr, running_var_ptr, counted_ptr,
        mean_ptr, invstd_ptr, scale_ptr, shift_ptr, o_k, m_k, eps, momentum,
    )  # fmt: skip


@triton.jit
def _centred(
    d_ptr,
    mean_ptr,
    sum_g,
    o_k,
    o_c,
    m_k,
    m_c,
    C,
):
    """(BLOCK_K, BLOCK_C) of D' = D - sum(g) mean^T; without a mean D itself."""
    m = m_k[:, None] & m_c[None, :]
    d = tl.load(d_ptr + o_k[:, None] * C + o_c[None, :], mask=m, other=0.0)
    if mean_ptr is not None:
        d -= sum_g[:, None] * tl.load(mean_ptr + o_c, mask=m_c, other=0.0)[None, :]
    return d


@triton.jit(do_not_specialize=["pixels"])
def moments_weight_grad_kernel(
    d_ptr,  # (K, C) fp32, sum(g u^T)
    sum_g_ptr,  # (K,) fp32
    mean_ptr,  # (C,) fp32 of the input; None under frozen statistics
    m2_ptr,  # (C, C) fp32; None under frozen statistics
    product_ptr,  # (K, C) fp32, W m2 where it is at hand, in place of m2; or None
    w_ptr,  # (K, C) weights, storage dtype
    y_mean_ptr,  # (K,) fp32, the batch norm's own; read under frozen statistics
    invstd_ptr,  # (K,) fp32
    scale_ptr,  # (K,) fp32, gamma * invstd
    dw_ptr,  # (K, C) fp32 out
    dgamma_ptr,  # (K,) fp32 out
    q_ptr,  # (K,) fp32 out, scale * invstd * dgamma / pixels; None under frozen statistics
    pixels,
    C,
    K,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dW = scale * D' - q * (W m2) and dgamma = invstd * rowsum(W * D')."""
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_e = tl.arange(0, BLOCK_C)
    m_k = o_k < K
    sum_g = tl.load(sum_g_ptr + o_k, mask=m_k, other=0.0)
    invstd = tl.load(invstd_ptr + o_k, mask=m_k, other=0.0)
    scale = tl.load(scale_ptr + o_k, mask=m_k, other=0.0)
    # Every tile of a row adds it up anew, rather than waiting for another to do so.
    dgamma = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, C, BLOCK_C):
        m_c = start + o_e < C
        d = _centred(d_ptr, mean_ptr, sum_g, o_k, start + o_e, m_k, m_c, C)
        m = m_k[:, None] & m_c[None, :]
        w = tl.load(w_ptr + o_k[:, None] * C + start + o_e[None, :], mask=m, other=0.0).to(tl.float32)
        dgamma += tl.sum(w * d, axis=1)
    if mean_ptr is None:
        dgamma -= tl.load(y_mean_ptr + o_k, mask=m_k, other=0.0) * sum_g
    dgamma *= invstd

    o_c = tl.program_id(1) * BLOCK_C + o_e
    m_c = o_c < C
    dw = scale[:, None] * _centred(d_ptr, mean_ptr, sum_g, o_k, o_c, m_k, m_c, C)
    is_first = tl.program_id(1) == 0
    tl.store(dgamma_ptr + o_k, dgamma, mask=m_k & is_first)
    if mean_ptr is not None:
        q = scale * invstd * dgamma / pixels
        if product_ptr is not None:
            o = o_k[:, None] * C + o_c[None, :]
            product = tl.load(product_ptr + o, mask=m_k[:, None] & m_c[None, :], other=0.0)
        else:
            product = _times_m2(w_ptr, m2_ptr, o_k, o_c, m_k, m_c, C, PRECISION, BLOCK_K, BLOCK_C)
        dw -= q[:, None] * product
        tl.store(q_ptr + o_k, q, mask=m_k & is_first)
    tl.store(dw_ptr + o_k[:, None] * C + o_c[None, :], dw, mask=m_k[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["pixels"])
def moments_quadratic_kernel(
    q_ptr,  # (K,) fp32
    w_ptr,  # (K, C) weights, storage dtype
    scale_ptr,  # (K,) fp32
    sum_g_ptr,  # (K,) fp32
    mean_ptr,  # (C,) fp32 of the input
    quadratic_ptr,  # (C, TERMS, C) storage dtype out, terms of -Q = -W^T diag(q) W
    constant_ptr,  # (pieces of C, C) fp32 out, terms of Q mean - W^T (scale * sum(g) / pixels)
    pixels,
    C,
    K,
    TERMS: tl.constexpr,  # 2: what rounding takes from the first is the second
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """In 16 bits Q has two terms: rounded alone it is wrong in the same way at every pixel, which sums do not forgive.

    The mean meets Q as it was rounded, so that u Q - mean Q is (u - mean) Q whatever the rounding.
    """
    i_c, i_e = tl.program_id(0), tl.program_id(1)
    o_c, o_e = i_c * BLOCK_C + tl.arange(0, BLOCK_C), i_e * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c, m_e = o_c < C, o_e < C
    total = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    linear = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        q = tl.load(q_ptr + o_k, mask=m_k, other=0.0)
        w_c = tl.load(w_ptr + o_k[:, None] * C + o_c[None, :], mask=m_k[:, None] & m_c[None, :], other=0.0)
        w_e = tl.load(w_ptr + o_k[:, None] * C + o_e[None, :], mask=m_k[:, None] & m_e[None, :], other=0.0)
        w_c, w_e = w_c.to(tl.float32), w_e.to(tl.float32)
        total = tl.dot(tl.trans(w_c * q[:, None]), w_e, total, input_precision=PRECISION)
        if i_e == 0:
            m1 = tl.load(scale_ptr + o_k, mask=m_k, other=0.0) * tl.load(sum_g_ptr + o_k, mask=m_k, other=0.0)
            linear += tl.sum(w_c * (m1 / pixels)[:, None], axis=0)
    mean = tl.load(mean_ptr + o_e, mask=m_e, other=0.0)
    rest = -total
    constant = tl.zeros((BLOCK_C,), tl.float32)
    for i_term in tl.static_range(TERMS):
        rounded = rest.to(quadratic_ptr.dtype.element_ty)
        o = (o_c * TERMS + i_term)[:, None] * C + o_e[None, :]
        tl.store(quadratic_ptr + o, rounded, mask=m_c[:, None] & m_e[None, :])
        constant -= tl.sum(rounded.to(tl.float32) * mean[None, :], axis=1)
        rest -= rounded.to(tl.float32)
    tl.store(constant_ptr + i_e * C + o_c, constant - linear, mask=m_c)
