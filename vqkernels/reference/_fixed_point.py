"""Sums and choices of rows that do not depend on the order of rows or on their distribution over processes."""

import torch
from torch import Tensor

# Values are rounded to this many bits and a sign, which leaves room in an int64 for the sum of 2^31 of them.
BITS = 31

# Of the power of two that bounds the values; what is smaller counts as 0.
LEAST_EXPONENT = -900

# Constants of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators"), as signed numbers.
INCREMENT, FIRST_FACTOR, SECOND_FACTOR = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def largest_value(rows: Tensor, indices: Tensor) -> Tensor:
    """The largest absolute value of rows [C, M, D] with an index, as the bits of a float64, which are in order.

    Returns:
        int64 [C].
    """
    values = _taken(rows, indices).abs().flatten(1)
    values = torch.cat([values, values.new_zeros(len(rows), 1)], 1)  # there may be no row
    return values.amax(1).view(torch.int64)


def fixed_point_sums(rows: Tensor, indices: Tensor, num_codes: int, largest: Tensor) -> Tensor:
    """The sums of the rows of each code, in units that the largest value gives.

    Args:
        rows: [C, M, D].
        indices: int64 [C, M], the codes, -1 for none.
        num_codes: K.
        largest: int64 [C], of all rows that are to be added up, as `largest_value` gives it.

    Returns:
        int64 [C, K, D].
    """
    values = _taken(rows, indices) * _power_of_two(BITS - _exponent(largest)).view(-1, 1, 1)
    codebooks, _, dim = rows.shape
    sums = torch.zeros(codebooks * num_codes, dim, dtype=torch.int64, device=rows.device)
    target = indices.clamp(min=0) + num_codes * torch.arange(codebooks, device=rows.device).unsqueeze(-1)
    sums.index_add_(0, target.flatten(), values.round().to(torch.int64).flatten(0, 1))
    return sums.view(codebooks, num_codes, dim)


def from_fixed_point(sums: Tensor, largest: Tensor) -> Tensor:
    """Sums [C, K, D] of `fixed_point_sums`, as float32."""
    return (sums.to(torch.float64) * _power_of_two(_exponent(largest) - BITS).view(-1, 1, 1)).to(torch.float32)


def hash_rows(rows: Tensor, seed: Tensor) -> Tensor:
    """Numbers from 0 to 2^62 - 1 that follow from the bits of rows and seed, equal for equal rows.

    Args:
        rows: float32 [C, M, D].
        seed: float32 [C, S].

    Returns:
        int64 [C, M].
    """
    return _mix(_digest(rows) + _mix(_digest(seed)).unsqueeze(-1)) & (2**62 - 1)


def random_order(seed: Tensor) -> Tensor:
    """A permutation of 0 ... K - 1 in each row, float32 [C, K], that follows from the bits of a seed [C, K]."""
    positions = torch.arange(seed.shape[-1], device=seed.device)
    return _mix(_mix(_digest(seed)).unsqueeze(-1) + positions * INCREMENT).argsort(-1).to(torch.float32)


def _taken(rows: Tensor, indices: Tensor) -> Tensor:
    return torch.where(indices.unsqueeze(-1) >= 0, rows, 0).to(torch.float64)


def _exponent(largest: Tensor) -> Tensor:
    """The least e, int64, with 2^e above the float64 of these bits."""
    return ((largest >> 52) - 1022).clamp(min=LEAST_EXPONENT)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 1023) << 52).view(torch.float64)


def _digest(x: Tensor) -> Tensor:
    """[..., D] to int64 [...]: the bits of each element times an odd number of its place, added up."""
    factors = _mix(torch.arange(1, x.shape[-1] + 1, device=x.device) * INCREMENT) | 1
    return (x.contiguous().view(torch.int32) * factors).sum(-1)


def _mix(x: Tensor) -> Tensor:
    """The output function of splitmix64; a shift to the right fills with zeros."""
    for shift, factor in ((30, FIRST_FACTOR), (27, SECOND_FACTOR)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))
