"""The numerical contracts in numpy, bit for bit, for sizes at which exact rationals are too slow."""

import numpy as np

MAX_NORM = np.finfo(np.float32).max / np.float32(4)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 fma. The product is exact in float64; the sum is rounded to odd, so that rounding again is right."""
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)
        addend = np.asarray(c, np.float64)
        total = np.asarray(product + addend)
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = total.view(np.int64)
        inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
        toward = np.where((error > 0) == (total > 0), 1, -1)
        total = np.where(inexact, bits + toward, bits).view(np.float64)
        return total.astype(np.float32)


def squared_norm(x: np.ndarray) -> np.ndarray:
    """Of rows [n, dim] -> [n]."""
    q = np.zeros(len(x), np.float32)
    for d in range(x.shape[1]):
        q = fma32(x[:, d], x[:, d], q)
    return q


def nearest_code(z: np.ndarray, codebook: np.ndarray, metric: str = "l2") -> tuple[np.ndarray, np.ndarray]:
    """float32 z [n, dim], codebook [k, dim] -> indices, scores."""
    q = squared_norm(codebook)
    valid_code = q <= MAX_NORM
    codes = np.where(valid_code[:, None], codebook, np.float32(0))
    if metric == "cosine":
        norm = np.sqrt(np.where(valid_code & (q > 0), q, np.float32(1)))
        codes = codes / norm[:, None]
    bias = -(q / np.float32(2)) if metric == "l2" else np.zeros_like(q)
    scores = np.broadcast_to(np.where(valid_code, bias, np.float32(0)), (len(z), len(codes)))
    valid_row = squared_norm(z) <= MAX_NORM
    rows = np.where(valid_row[:, None], z, np.float32(0))
    for d in range(z.shape[1]):
        scores = fma32(rows[:, d : d + 1], codes[None, :, d], scores)
    scores = np.where(valid_code[None], scores, np.float32(-np.inf))
    best = scores.argmax(1)  # the first of equals
    top = np.take_along_axis(scores, best[:, None], 1)[:, 0]
    chosen = valid_row & (top > -np.inf)
    return np.where(chosen, best, -1), np.where(chosen, top, np.float32(-np.inf)).astype(np.float32)


def code_statistics(z: np.ndarray, indices: np.ndarray, num_codes: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs of 256 members in the type of z (float32 or float64), the runs in float64, one rounding."""
    counts = np.zeros(num_codes, np.int64)
    sums = np.zeros((num_codes, z.shape[1]), z.dtype)
    for k in range(num_codes):
        members = z[indices == k]
        counts[k] = len(members)
        total = np.zeros(z.shape[1], np.float64)
        for first in range(0, len(members), 256):
            run = np.zeros(z.shape[1], z.dtype)
            for row in members[first : first + 256]:
                run = run + row
            total = total + run
        sums[k] = total.astype(z.dtype)
    return counts, sums


def pairwise_sum(lanes: np.ndarray) -> np.ndarray:
    """Over the first axis, whose length is a power of two: i with i + n/2, then halves again."""
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]


def column_sum(x: np.ndarray) -> np.float64:
    padded = np.zeros(-(-max(len(x), 1) // 256) * 256, np.float64)
    padded[: len(x)] = x
    lanes = np.zeros(256, np.float64)
    for part in padded.reshape(-1, 256):
        lanes = lanes + part
    return pairwise_sum(lanes)


def row_dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 a, b [n, dim] -> [n]: sixteen chains of fma, added pairwise."""
    lanes = np.zeros((16, len(a)), np.float32)
    for d in range(a.shape[1]):
        lanes[d % 16] = fma32(a[:, d], b[:, d], lanes[d % 16])
    return pairwise_sum(lanes)


def ema_update(codebook, cluster_size, code_sum, counts, sums, decay, eps):
    """The new (codebook, cluster_size, code_sum) of one head, all float32."""
    weight, eps32 = np.float32(1.0 - decay), np.float32(eps)
    with np.errstate(all="ignore"):
        size = fma32(weight, counts.astype(np.float32) - cluster_size, cluster_size)
        new_sum = fma32(weight, sums - code_sum, code_sum)
        n = np.float32(column_sum(size))
        total = n + np.float32(len(size) * float(eps))
        smoothed = ((size + eps32) / total * n)[:, None]
        new_codebook = np.where(smoothed > 0, new_sum / smoothed, codebook)
    return new_codebook, size, new_sum


def vector_quantize(z: np.ndarray, codebook: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Quantized rows (NaN where the index is -1) and mean squared error of float32 inputs of one head."""
    chosen = indices >= 0
    codes = codebook[np.maximum(indices, 0)]
    with np.errstate(all="ignore"):
        difference = np.where(chosen[:, None], z - codes, np.float32(0))
        errors = row_dot(difference, difference)
    elements = int(chosen.sum()) * z.shape[1]
    mse = np.float32(column_sum(errors) / elements) if elements else np.float32(0)
    return np.where(chosen[:, None], codes, np.float32(np.nan)), mse


def rotation_gradient(e: np.ndarray, c: np.ndarray, g: np.ndarray, coefficient: float) -> np.ndarray:
    """Gradient of the rows e, which chose the codes c, float32 [n, dim] all."""
    eps, two = np.float32(1e-6), np.float32(2)
    norm_c = np.sqrt(row_dot(c, c))[:, None]
    divisor_e = np.maximum(np.sqrt(row_dot(e, e))[:, None], eps)
    u, q = e / divisor_e, c / np.maximum(norm_c, eps)
    w = u + q
    divisor_w = np.maximum(np.sqrt(row_dot(w, w))[:, None], eps)
    gw, gq = row_dot(g, w)[:, None] / divisor_w, row_dot(g, q)[:, None]
    rotated = g - two * gw * (w / divisor_w) + two * gq * u
    return norm_c / divisor_e * rotated + np.float32(coefficient) * (e - c)
