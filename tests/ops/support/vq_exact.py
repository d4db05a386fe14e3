"""Floating-point arithmetic in exact rationals, correctly rounded, and the search contract built from it.

Values are Python floats (every float32 is one), so zeros keep their sign. Nothing here uses torch, numpy or the
rounding of the machine.
"""

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    """A binary format: its precision in bits, and the exponents of its largest and its smallest subnormal value."""

    precision: int
    max_exponent: int
    min_exponent: int

    @property
    def max(self) -> Fraction:
        return (2 - Fraction(1, 2 ** (self.precision - 1))) * 2**self.max_exponent

    def round(self, x: Fraction) -> float:
        """Round to nearest, ties to even; x is not 0."""
        magnitude = abs(x)
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        if Fraction(2) ** exponent > magnitude:
            exponent -= 1
        unit = Fraction(2) ** max(exponent - self.precision + 1, self.min_exponent)
        rounded = round(magnitude / unit) * unit  # round() of a Fraction takes ties to even
        return (1 if x > 0 else -1) * (math.inf if rounded > self.max else float(rounded))

    def fma(self, a: float, b: float, c: float) -> float:
        if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
            return a * b + c
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        if exact != 0:
            return self.round(exact)
        product_sign = math.copysign(1, a) * math.copysign(1, b)
        return math.copysign(0.0, product_sign) if product_sign == math.copysign(1, c) else 0.0

    def divide(self, a: float, b: float) -> float:
        return self.round(Fraction(a) / Fraction(b)) if a != 0 else a

    def sqrt(self, x: float) -> float:
        """Of a positive x: the root to far more bits than needed, and one that says whether it goes on."""
        scaled = Fraction(x) * 4**1200
        assert scaled.denominator == 1
        root = math.isqrt(scaled.numerator)
        sticky = int(root * root != scaled.numerator)
        return self.round(Fraction(2 * root + sticky, 2**1201))


FLOAT32 = Format(precision=24, max_exponent=127, min_exponent=-149)
FLOAT64 = Format(precision=53, max_exponent=1023, min_exponent=-1074)


def squared_norm(x: list[float], fmt: Format) -> float:
    q = 0.0
    for value in x:
        q = fmt.fma(value, value, q)
    return q


def is_valid(x: list[float], fmt: Format) -> bool:
    if not all(map(math.isfinite, x)):
        return False
    q = squared_norm(x, fmt)
    return math.isfinite(q) and Fraction(q) <= fmt.max / 4


def nearest_code(
    z: list[list[float]], codebook: list[list[float]], metric: str, fmt: Format
) -> tuple[list[int], list[float]]:
    """Index and score of every row, as the contract defines them."""
    codes = []
    for code in codebook:
        if not is_valid(code, fmt):
            codes.append(None)
            continue
        q = squared_norm(code, fmt)
        bias = fmt.round(-Fraction(q) / 2) if metric == "l2" and q else (-0.0 if metric == "l2" else 0.0)
        if metric == "cosine" and q > 0:
            norm = fmt.sqrt(q)
            code = [fmt.divide(value, norm) for value in code]
        codes.append((code, bias))
    indices, scores = [], []
    for row in z:
        best, index = -math.inf, -1
        if is_valid(row, fmt):
            for k, entry in enumerate(codes):
                if entry is None:
                    continue
                code, score = entry
                for a, b in zip(row, code, strict=True):
                    score = fmt.fma(a, b, score)
                if score > best:
                    best, index = score, k
        indices.append(index)
        scores.append(best)
    return indices, scores
