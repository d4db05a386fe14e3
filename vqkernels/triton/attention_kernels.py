"""Scaled dot-product attention without the matrix of its weights, forward and backward (arXiv 2307.08691).

A program owns a block of queries (of keys in the backward pass of k and v) and goes through the other side in ascending
blocks, so that every sum has one order and nothing is added atomically. Products go over the columns of a head in
steps; where a head is too wide for its results to stay in registers, programs share its columns, and each computes the
scores again.
"""

import triton
import triton.language as tl

from vqkernels.triton.arithmetic import narrow


@triton.jit
def _load_tile(
    rows: tl.tensor, inside: tl.tensor, first: tl.int64, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:
    """Columns from `first` on of the rows of WIDTH columns that the pointers `rows` [n] point to, 0 outside."""
    column = first + tl.arange(0, COLUMNS)
    keep = inside[:, None] & (column < WIDTH)[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=keep, other=0.0)


@triton.jit
def _store_tile(
    rows: tl.tensor, inside: tl.tensor, first: tl.int64, x: tl.tensor, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    column = first + tl.arange(0, COLUMNS)
    keep = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(rows[:, None] + column[None, :], narrow(x, rows.dtype.element_ty), mask=keep)


@triton.jit
def _products(
    a: tl.tensor,  # [n], pointers to rows
    a_inside: tl.tensor,
    b: tl.tensor,  # [m]
    b_inside: tl.tensor,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
) -> tl.tensor:
    """The inner products of rows, [n, m]."""
    total = tl.zeros((A_ROWS, B_ROWS), dtype)
    for d in range(0, WIDTH, COLUMNS):
        a_tile = _load_tile(a, a_inside, d, WIDTH, COLUMNS)
        b_tile = _load_tile(b, b_inside, d, WIDTH, COLUMNS)
        total = tl.dot(a_tile, tl.trans(b_tile), total, input_precision="ieee")
    return total


@triton.jit
def _masked(
    scores: tl.tensor,  # [queries, keys]
    row: tl.tensor,  # [queries]
    key: tl.tensor,  # [keys]
    length: tl.int64,
    keys: tl.int64,
    mask: tl.tensor,  # of this batch element and head, or None
    mask_row: tl.int64,  # strides
    mask_key: tl.int64,
    CAUSAL: tl.constexpr,
) -> tl.tensor:
    """Scores with the mask; -Inf for keys that take no part."""
    visible = (key < keys)[None, :]
    if mask is not None:
        place = row.to(tl.int64)[:, None] * mask_row + key.to(tl.int64)[None, :] * mask_key
        value = tl.load(mask + place, mask=(row < length)[:, None] & visible, other=0)
        if mask.dtype.element_ty == tl.int1:
            scores = tl.where(value != 0, scores, float("-inf"))
        else:
            scores += value.to(scores.dtype)
    if CAUSAL:
        visible = visible & (key[None, :] <= row[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit(do_not_specialize=["heads", "group", "length", "keys", "blocks"])
def attention_kernel(
    q: tl.tensor,  # [batch, heads, length, WIDTH]
    k: tl.tensor,  # [batch, heads / group, keys, WIDTH]
    v: tl.tensor,  # [batch, heads / group, keys, V_WIDTH]
    mask: tl.tensor,  # broadcast to [batch, heads, length, keys], or None
    out: tl.tensor,  # [batch, heads, length, V_WIDTH]
    logsumexp: tl.tensor,  # [batch, heads, length]
    heads: tl.int64,
    group: tl.int64,
    length: tl.int64,
    keys: tl.int64,
    blocks: tl.int64,
    scale: tl.float64,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_row: tl.int64,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int64,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_row: tl.int64,
    mask_batch: tl.int64,
    mask_head: tl.int64,
    mask_row: tl.int64,
    mask_key: tl.int64,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int64,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    parts: tl.constexpr = (V_WIDTH + PART - 1) // PART
    part = program % parts * PART
    block = program // parts % blocks
    head = program // parts // blocks % heads
    batch = program // parts // blocks // heads
    row = block * QUERIES + tl.arange(0, QUERIES)
    row_inside = row < length
    q_rows = q + batch * q_batch + head * q_head + row * q_row
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    if mask is not None:
        mask += batch * mask_batch + head * mask_head
    dtype: tl.constexpr = logsumexp.dtype.element_ty
    factor = tl.full((), scale, dtype)

    top = tl.full((QUERIES,), float("-inf"), dtype)
    total = tl.zeros((QUERIES,), dtype)
    sums = tl.zeros((QUERIES, PART), dtype)
    end = tl.minimum(keys, (block + 1) * QUERIES) if CAUSAL else keys
    for first in range(0, end, KEYS):
        key = first + tl.arange(0, KEYS)
        key_inside = key < keys
        scores = _products(q_rows, row_inside, k + key * k_row, key_inside, dtype, WIDTH, COLUMNS, QUERIES, KEYS)
        scores = _masked(scores * factor, row, key, length, keys, mask, mask_row, mask_key, CAUSAL)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # Nothing but -Inf so far: Inf stays out of Inf - Inf.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        v_tile = _load_tile(v + key * v_row, key_inside, part, V_WIDTH, PART)
        sums = tl.dot(weights.to(v_tile.dtype), v_tile, sums * shrink[:, None], input_precision="ieee")
        top = new_top
    empty = total == 0
    sums = sums / tl.where(empty, 1.0, total)[:, None]
    _store_tile(out + batch * out_batch + head * out_head + row * out_row, row_inside, part, sums, V_WIDTH, PART)
    if part == 0:
        shift = tl.where(top == float("-inf"), 0.0, top)
        value = tl.where(empty, float("inf"), shift + tl.log(tl.where(empty, 1.0, total)))
        tl.store(logsumexp + (batch * heads + head) * length + row, value, mask=row_inside)


@triton.jit(do_not_specialize=["heads", "length", "blocks"])
def inner_kernel(
    grad_out: tl.tensor,  # [batch, heads, length, WIDTH]
    out: tl.tensor,
    inner: tl.tensor,  # [batch, heads, length]
    heads: tl.int64,
    length: tl.int64,
    blocks: tl.int64,
    grad_batch: tl.int64,
    grad_head: tl.int64,
    grad_row: tl.int64,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int64,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The inner product of every row of the result with its gradient."""
    program = tl.program_id(0).to(tl.int64)
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    head = program // blocks % heads
    batch = program // blocks // heads
    inside = row < length
    grad_rows = grad_out + batch * grad_batch + head * grad_head + row * grad_row
    out_rows = out + batch * out_batch + head * out_head + row * out_row
    dtype: tl.constexpr = inner.dtype.element_ty
    total = tl.zeros((ROWS,), dtype)
    for d in range(0, WIDTH, COLUMNS):
        g = _load_tile(grad_rows, inside, d, WIDTH, COLUMNS).to(dtype)
        total += tl.sum(g * _load_tile(out_rows, inside, d, WIDTH, COLUMNS).to(dtype), axis=1)
    tl.store(inner + (batch * heads + head) * length + row, total, mask=inside)


@triton.jit(do_not_specialize=["heads", "group", "length", "keys", "blocks"])
def backward_q_kernel(
    grad_out: tl.tensor,  # [batch, heads, length, V_WIDTH]
    q: tl.tensor,  # [batch, heads, length, WIDTH]
    k: tl.tensor,  # [batch, heads / group, keys, WIDTH]
    v: tl.tensor,  # [batch, heads / group, keys, V_WIDTH]
    mask: tl.tensor,  # broadcast to [batch, heads, length, keys], or None
    logsumexp: tl.tensor,  # [batch, heads, length]
    inner: tl.tensor,
    grad_q: tl.tensor,  # [batch, heads, length, WIDTH], contiguous
    heads: tl.int64,
    group: tl.int64,
    length: tl.int64,
    keys: tl.int64,
    blocks: tl.int64,
    scale: tl.float64,
    grad_batch: tl.int64,
    grad_head: tl.int64,
    grad_row: tl.int64,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_row: tl.int64,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int64,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_row: tl.int64,
    mask_batch: tl.int64,
    mask_head: tl.int64,
    mask_row: tl.int64,
    mask_key: tl.int64,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    parts: tl.constexpr = (WIDTH + PART - 1) // PART
    part = program % parts * PART
    block = program // parts % blocks
    head = program // parts // blocks % heads
    batch = program // parts // blocks // heads
    row = block * QUERIES + tl.arange(0, QUERIES)
    row_inside = row < length
    q_rows = q + batch * q_batch + head * q_head + row * q_row
    grad_rows = grad_out + batch * grad_batch + head * grad_head + row * grad_row
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    if mask is not None:
        mask += batch * mask_batch + head * mask_head
    dtype: tl.constexpr = logsumexp.dtype.element_ty
    factor = tl.full((), scale, dtype)
    place = (batch * heads + head) * length + row
    # A weight of a row that there is not is exp(-Inf).
    row_logsumexp = tl.load(logsumexp + place, mask=row_inside, other=float("inf"))
    row_inner = tl.load(inner + place, mask=row_inside, other=0.0)

    sums = tl.zeros((QUERIES, PART), dtype)
    end = tl.minimum(keys, (block + 1) * QUERIES) if CAUSAL else keys
    for first in range(0, end, KEYS):
        key = first + tl.arange(0, KEYS)
        key_inside = key < keys
        scores = _products(q_rows, row_inside, k + key * k_row, key_inside, dtype, WIDTH, COLUMNS, QUERIES, KEYS)
        scores = _masked(scores * factor, row, key, length, keys, mask, mask_row, mask_key, CAUSAL)
        weights = tl.exp(scores - row_logsumexp[:, None])
        grads = _products(grad_rows, row_inside, v + key * v_row, key_inside, dtype, V_WIDTH, COLUMNS, QUERIES, KEYS)
        grads = weights * (grads - row_inner[:, None])
        k_tile = _load_tile(k + key * k_row, key_inside, part, WIDTH, PART)
        sums = tl.dot(grads.to(k_tile.dtype), k_tile, sums, input_precision="ieee")
    grad_q += (batch * heads + head) * length * WIDTH
    _store_tile(grad_q + row * WIDTH, row_inside, part, sums * factor, WIDTH, PART)


@triton.jit(do_not_specialize=["heads", "group", "length", "keys", "blocks"])
def backward_kv_kernel(
    grad_out: tl.tensor,  # [batch, heads, length, V_WIDTH]
    q: tl.tensor,  # [batch, heads, length, WIDTH]
    k: tl.tensor,  # [batch, heads / group, keys, WIDTH]
    v: tl.tensor,  # [batch, heads / group, keys, V_WIDTH]
    mask: tl.tensor,  # broadcast to [batch, heads, length, keys], or None
    logsumexp: tl.tensor,  # [batch, heads, length]
    inner: tl.tensor,
    grad_k: tl.tensor,  # [batch, heads / group, keys, WIDTH], contiguous
    grad_v: tl.tensor,  # [batch, heads / group, keys, V_WIDTH], contiguous
    heads: tl.int64,
    group: tl.int64,
    length: tl.int64,
    keys: tl.int64,
    blocks: tl.int64,
    scale: tl.float64,
    grad_batch: tl.int64,
    grad_head: tl.int64,
    grad_row: tl.int64,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_row: tl.int64,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int64,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_row: tl.int64,
    mask_batch: tl.int64,
    mask_head: tl.int64,
    mask_row: tl.int64,
    mask_key: tl.int64,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    widest: tl.constexpr = WIDTH if WIDTH > V_WIDTH else V_WIDTH
    parts: tl.constexpr = (widest + PART - 1) // PART
    part = program % parts * PART
    block = program // parts % blocks
    key_heads = heads // group
    key_head = program // parts // blocks % key_heads
    batch = program // parts // blocks // key_heads
    key = block * KEYS + tl.arange(0, KEYS)
    key_inside = key < keys
    k_rows = k + batch * k_batch + key_head * k_head + key * k_row
    v_rows = v + batch * v_batch + key_head * v_head + key * v_row
    dtype: tl.constexpr = logsumexp.dtype.element_ty
    factor = tl.full((), scale, dtype)

    k_sums = tl.zeros((KEYS, PART), dtype)
    v_sums = tl.zeros((KEYS, PART), dtype)
    first_row = block * KEYS // QUERIES * QUERIES if CAUSAL else tl.zeros((), tl.int64)
    for head in range(key_head * group, (key_head + 1) * group):
        head_q = q + batch * q_batch + head * q_head
        head_grad = grad_out + batch * grad_batch + head * grad_head
        head_mask = mask
        if mask is not None:
            head_mask += batch * mask_batch + head * mask_head
        for first in range(first_row, length, QUERIES):
            row = first + tl.arange(0, QUERIES)
            row_inside = row < length
            q_rows = head_q + row * q_row
            grad_rows = head_grad + row * grad_row
            place = (batch * heads + head) * length + row
            row_logsumexp = tl.load(logsumexp + place, mask=row_inside, other=float("inf"))
            row_inner = tl.load(inner + place, mask=row_inside, other=0.0)
            scores = _products(q_rows, row_inside, k_rows, key_inside, dtype, WIDTH, COLUMNS, QUERIES, KEYS)
            scores = _masked(scores * factor, row, key, length, keys, head_mask, mask_row, mask_key, CAUSAL)
            weights = tl.exp(scores - row_logsumexp[:, None])
            g_tile = _load_tile(grad_rows, row_inside, part, V_WIDTH, PART)
            v_sums = tl.dot(tl.trans(weights.to(g_tile.dtype)), g_tile, v_sums, input_precision="ieee")
            grads = _products(grad_rows, row_inside, v_rows, key_inside, dtype, V_WIDTH, COLUMNS, QUERIES, KEYS)
            grads = weights * (grads - row_inner[:, None])
            q_tile = _load_tile(q_rows, row_inside, part, WIDTH, PART)
            k_sums = tl.dot(tl.trans(grads.to(q_tile.dtype)), q_tile, k_sums, input_precision="ieee")
    first_key = (batch * key_heads + key_head) * keys
    _store_tile(grad_k + (first_key + key) * WIDTH, key_inside, part, k_sums * factor, WIDTH, PART)
    _store_tile(grad_v + (first_key + key) * V_WIDTH, key_inside, part, v_sums, V_WIDTH, PART)
