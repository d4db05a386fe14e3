"""The kernels of qk_norm_rope.py: the formulas of csrc/cpu/qk_norm_rope.h.

Programs work on the heads of a position, [heads, numbers]: first and second numbers of the pairs that are rotated, and
the rest behind them. Those of the backward pass go over consecutive positions and sum the gradients of parameters.
"""

import triton
import triton.language as tl

from vqkernels.triton.arithmetic import divide, load_as, narrow, square_root


@triton.jit
def _load_pairs(
    rows: tl.tensor,  # [ROWS], pointers to rows of 2 * PAIRS numbers
    inside: tl.tensor,  # [ROWS]
    dtype: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """First and second numbers of the pairs, [ROWS, BLOCK] each, 0 outside."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)
        x = load_as(rows[:, None] + column[None, :], inside[:, None] & (column < 2 * PAIRS)[None, :], dtype)
        return tl.split(tl.reshape(x, (ROWS, BLOCK, 2)))
    else:
        column = tl.arange(0, BLOCK)
        here = inside[:, None] & (column < PAIRS)[None, :]
        first = rows[:, None] + column[None, :]
        return load_as(first, here, dtype), load_as(first + PAIRS, here, dtype)


@triton.jit
def _store_pairs(
    rows: tl.tensor,
    inside: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Stores pairs where `_load_pairs` would load them."""
    a, b = narrow(a, rows.dtype.element_ty), narrow(b, rows.dtype.element_ty)
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)
        x = tl.reshape(tl.join(a, b), (ROWS, 2 * BLOCK))
        tl.store(rows[:, None] + column[None, :], x, mask=inside[:, None] & (column < 2 * PAIRS)[None, :])
    else:
        column = tl.arange(0, BLOCK)
        here = inside[:, None] & (column < PAIRS)[None, :]
        first = rows[:, None] + column[None, :]
        tl.store(first, a, mask=here)
        tl.store(first + PAIRS, b, mask=here)


@triton.jit
def _rest(
    rows: tl.tensor, inside: tl.tensor, PAIRS: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Pointers to the REST numbers behind the pairs, [rows, BLOCK], and which of them there are."""
    column = tl.arange(0, BLOCK)
    return rows[:, None] + 2 * PAIRS + column[None, :], inside[:, None] & (column < REST)[None, :]


@triton.jit
def _total(a: tl.tensor, b: tl.tensor, c: tl.tensor, ACROSS: tl.constexpr) -> tl.tensor:
    """Sums of heads, or of all heads, [heads]."""
    total = tl.sum(a, axis=1) + tl.sum(b, axis=1) + tl.sum(c, axis=1)
    if ACROSS:
        total = tl.zeros_like(total) + tl.sum(total, axis=0)
    return total


@triton.jit
def _statistics(
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    pair_inside: tl.tensor,
    rest_inside: tl.tensor,
    count: tl.tensor,  # of numbers that share a norm
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    ACROSS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Mean and factor of the norm (l2: the divisor), and what sum(h n) counts for in the gradient, [heads] each."""
    one = tl.full((a.shape[0],), 1.0, a.dtype)
    mean, scale, along = one - one, one, one - one
    if NORM != "none":
        number = one * count.to(a.dtype)
        if NORM == "layer":
            mean = divide(_total(a, b, c, ACROSS), number)
            a = tl.where(pair_inside, a - mean[:, None], 0.0)
            b = tl.where(pair_inside, b - mean[:, None], 0.0)
            c = tl.where(rest_inside, c - mean[:, None], 0.0)
        square = _total(a * a, b * b, c * c, ACROSS)
        if NORM == "l2":
            norm = square_root(square)
            small = norm < EPS
            scale = tl.where(small, one * EPS, norm)
            along = tl.where(small, 0.0, one)
        else:
            scale = divide(one, square_root(divide(square, number) + EPS))
            along = divide(one, number)
    return mean, scale, along


@triton.jit
def _scaled(x: tl.tensor, scale: tl.tensor, NORM: tl.constexpr) -> tl.tensor:
    """[heads, n] by the factors [heads]."""
    return divide(x, tl.zeros_like(x) + scale[:, None]) if NORM == "l2" else x * scale[:, None]


@triton.jit
def _rounded(x: tl.tensor, type: tl.constexpr, EAGER: tl.constexpr) -> tl.tensor:
    return narrow(x, type).to(x.dtype) if EAGER else x


@triton.jit
def _load_table(row: tl.tensor, PAIRS: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    column = tl.arange(0, BLOCK)
    return tl.load(row + column, mask=column < PAIRS, other=0.0)[None, :]


@triton.jit(do_not_specialize=["length", "heads"])
def norm_rope_kernel(
    x: tl.tensor,  # [batch, length, heads, dim]
    weight: tl.tensor,  # [heads or 1, dim] or None
    bias: tl.tensor,  # like weight
    cos: tl.tensor,  # [batch or 1, length, PAIRS] or None
    sin: tl.tensor,
    factor: tl.tensor,  # [batch, length, heads or 1] or None
    out: tl.tensor,  # like x
    length: tl.int64,
    heads: tl.int64,
    x_batch: tl.int64,
    x_position: tl.int64,
    x_head: tl.int64,
    out_batch: tl.int64,
    out_position: tl.int64,
    out_head: tl.int64,
    table_batch: tl.int64,
    table_position: tl.int64,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    ACROSS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PARAMETER_STRIDE: tl.constexpr,  # dim, or 0 where heads share parameters
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    dtype: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    batch, position = row // length, row % length
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    inside = head < heads
    pair_inside = inside[:, None] & (tl.arange(0, BLOCK) < PAIRS)[None, :]
    type: tl.constexpr = x.dtype.element_ty
    eager: tl.constexpr = factor is not None

    x_rows = x + batch * x_batch + position * x_position + head * x_head
    a, b = _load_pairs(x_rows, inside, dtype, PAIRS, INTERLEAVED, HEADS, BLOCK)
    rest, rest_inside = _rest(x_rows, inside, PAIRS, REST, REST_BLOCK)
    c = load_as(rest, rest_inside, dtype)
    if eager:
        place = row + tl.zeros_like(head) if ACROSS else row * heads + head
        scale = tl.load(factor + place, mask=inside, other=1.0)
        mean = tl.zeros_like(scale)
    else:
        count = (heads if ACROSS else 1) * (2 * PAIRS + REST)
        mean, scale, _ = _statistics(a, b, c, pair_inside, rest_inside, count, EPS, NORM, ACROSS)
    if NORM != "none":
        a = _rounded(_scaled(a - mean[:, None], scale, NORM), type, eager)
        b = _rounded(_scaled(b - mean[:, None], scale, NORM), type, eager)
        c = _rounded(_scaled(c - mean[:, None], scale, NORM), type, eager)
    if weight is not None:
        w_rows = weight + head * PARAMETER_STRIDE
        wa, wb = _load_pairs(w_rows, inside, dtype, PAIRS, INTERLEAVED, HEADS, BLOCK)
        w_rest, _ = _rest(w_rows, inside, PAIRS, REST, REST_BLOCK)
        a = _rounded(a * wa, type, eager)
        b = _rounded(b * wb, type, eager)
        c = _rounded(c * load_as(w_rest, rest_inside, dtype), type, eager)
    if bias is not None:
        b_rows = bias + head * PARAMETER_STRIDE
        ba, bb = _load_pairs(b_rows, inside, dtype, PAIRS, INTERLEAVED, HEADS, BLOCK)
        b_rest, _ = _rest(b_rows, inside, PAIRS, REST, REST_BLOCK)
        a, b, c = a + ba, b + bb, c + load_as(b_rest, rest_inside, dtype)
    if cos is not None:
        place = batch * table_batch + position * table_position
        along, across = _load_table(cos + place, PAIRS, BLOCK), _load_table(sin + place, PAIRS, BLOCK)
        a, b = a * along - b * across, b * along + a * across
    out_rows = out + batch * out_batch + position * out_position + head * out_head
    _store_pairs(out_rows, inside, a, b, PAIRS, INTERLEAVED, HEADS, BLOCK)
    rest, _ = _rest(out_rows, inside, PAIRS, REST, REST_BLOCK)
    tl.store(rest, narrow(c, type), mask=rest_inside)


@triton.jit
def _store_sums(
    sums: tl.tensor,  # [programs, heads, dim], or [programs, blocks of heads, dim] where heads share parameters
    program: tl.tensor,
    head: tl.tensor,
    inside: tl.tensor,
    heads: tl.int64,
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SHARED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
) -> None:
    if SHARED:
        one = tl.arange(0, 1)
        rows = sums + (program * tl.num_programs(1) + tl.program_id(1) + one) * (2 * PAIRS + REST)
        a, b, c = tl.sum(a, axis=0)[None, :], tl.sum(b, axis=0)[None, :], tl.sum(c, axis=0)[None, :]
        _store_pairs(rows, one == 0, a, b, PAIRS, INTERLEAVED, 1, BLOCK)
        rest, rest_inside = _rest(rows, one == 0, PAIRS, REST, REST_BLOCK)
    else:
        rows = sums + (program * heads + head) * (2 * PAIRS + REST)
        _store_pairs(rows, inside, a, b, PAIRS, INTERLEAVED, HEADS, BLOCK)
        rest, rest_inside = _rest(rows, inside, PAIRS, REST, REST_BLOCK)
    tl.store(rest, c, mask=rest_inside)


@triton.jit(do_not_specialize=["rows", "rows_of_program", "length", "heads"])
def norm_rope_backward_kernel(
    grad: tl.tensor,  # [batch, length, heads, dim]
    x: tl.tensor,
    weight: tl.tensor,  # [heads or 1, dim] or None
    cos: tl.tensor,  # [batch or 1, length, PAIRS] or None
    sin: tl.tensor,
    grad_x: tl.tensor,
    weight_sums: tl.tensor,  # see _store_sums, or None
    bias_sums: tl.tensor,
    rows: tl.int64,  # batch * length
    rows_of_program: tl.int64,
    length: tl.int64,
    heads: tl.int64,
    grad_batch: tl.int64,
    grad_position: tl.int64,
    grad_head: tl.int64,
    x_batch: tl.int64,
    x_position: tl.int64,
    x_head: tl.int64,
    out_batch: tl.int64,
    out_position: tl.int64,
    out_head: tl.int64,
    table_batch: tl.int64,
    table_position: tl.int64,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    ACROSS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SHARED_WEIGHT: tl.constexpr,
    SHARED_BIAS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    dtype: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    inside = head < heads
    pair_inside = inside[:, None] & (tl.arange(0, BLOCK) < PAIRS)[None, :]
    count = (heads if ACROSS else 1) * (2 * PAIRS + REST)
    if weight is not None:
        w_rows = weight + head * (0 if SHARED_WEIGHT else 2 * PAIRS + REST)
        wa, wb = _load_pairs(w_rows, inside, dtype, PAIRS, INTERLEAVED, HEADS, BLOCK)
        w_rest, w_inside = _rest(w_rows, inside, PAIRS, REST, REST_BLOCK)
        wc = load_as(w_rest, w_inside, dtype)
    weight_a = tl.zeros((HEADS, BLOCK), dtype)
    weight_b = tl.zeros((HEADS, BLOCK), dtype)
    weight_c = tl.zeros((HEADS, REST_BLOCK), dtype)
    bias_a = tl.zeros((HEADS, BLOCK), dtype)
    bias_b = tl.zeros((HEADS, BLOCK), dtype)
    bias_c = tl.zeros((HEADS, REST_BLOCK), dtype)
    for row in range(program * rows_of_program, tl.minimum((program + 1) * rows_of_program, rows)):
        batch, position = row // length, row % length
        x_rows = x + batch * x_batch + position * x_position + head * x_head
        a, b = _load_pairs(x_rows, inside, dtype, PAIRS, INTERLEAVED, HEADS, BLOCK)
        rest, rest_inside = _rest(x_rows, inside, PAIRS, REST, REST_BLOCK)
        c = load_as(rest, rest_inside, dtype)
        g_rows = grad + batch * grad_batch + position * grad_position + head * grad_head
        ga, gb = _load_pairs(g_rows, inside, dtype, PAIRS, INTERLEAVED, HEADS, BLOCK)
        rest, _ = _rest(g_rows, inside, PAIRS, REST, REST_BLOCK)
        gc = load_as(rest, rest_inside, dtype)
        if cos is not None:
            place = batch * table_batch + position * table_position
            along, across = _load_table(cos + place, PAIRS, BLOCK), _load_table(sin + place, PAIRS, BLOCK)
            ga, gb = ga * along + gb * across, gb * along - ga * across
        if NORM != "none":
            mean, scale, share = _statistics(a, b, c, pair_inside, rest_inside, count, EPS, NORM, ACROSS)
            a = tl.where(pair_inside, _scaled(a - mean[:, None], scale, NORM), 0.0)
            b = tl.where(pair_inside, _scaled(b - mean[:, None], scale, NORM), 0.0)
            c = tl.where(rest_inside, _scaled(c - mean[:, None], scale, NORM), 0.0)
        if bias_sums is not None:
            bias_a += ga
            bias_b += gb
            bias_c += gc
        if weight_sums is not None:
            weight_a += ga * a
            weight_b += gb * b
            weight_c += gc * c
        if weight is not None:
            ga, gb, gc = ga * wa, gb * wb, gc * wc
        if NORM != "none":
            turn = (_total(ga * a, gb * b, gc * c, ACROSS) * share)[:, None]
            if NORM == "layer":
                level = (_total(ga, gb, gc, ACROSS) * share)[:, None]
                ga, gb, gc = ga - level, gb - level, gc - level
            ga = _scaled(ga - a * turn, scale, NORM)
            gb = _scaled(gb - b * turn, scale, NORM)
            gc = _scaled(gc - c * turn, scale, NORM)
        out_rows = grad_x + batch * out_batch + position * out_position + head * out_head
        _store_pairs(out_rows, inside, ga, gb, PAIRS, INTERLEAVED, HEADS, BLOCK)
        rest, _ = _rest(out_rows, inside, PAIRS, REST, REST_BLOCK)
        tl.store(rest, narrow(gc, grad_x.dtype.element_ty), mask=rest_inside)
    if weight_sums is not None:
        _store_sums(
            weight_sums,
            program,
            head,
            inside,
            heads,
            weight_a,
            weight_b,
            weight_c,
            PAIRS,
            REST,
            INTERLEAVED,
            SHARED_WEIGHT,
            HEADS,
            BLOCK,
            REST_BLOCK,
        )
    if bias_sums is not None:
        _store_sums(
            bias_sums,
            program,
            head,
            inside,
            heads,
            bias_a,
            bias_b,
            bias_c,
            PAIRS,
            REST,
            INTERLEAVED,
            SHARED_BIAS,
            HEADS,
            BLOCK,
            REST_BLOCK,
        )
