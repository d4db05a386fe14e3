"""The error budget of everything but codes: twice the error of the same expression in PyTorch, plus one rounding."""

import itertools

import torch


def assert_within_budget(actual, expression, truth):
    """Checks tensors, or sequences of tensors and None, of equal shapes against a float64 truth.

    The largest error of `actual` may be twice that of `expression`, the plain PyTorch expression in the same dtype,
    and every element may be off by one rounding of that dtype more. Where the expression is not finite (overflow of
    the dtype included), `actual` has to be the same.
    """
    if not isinstance(actual, torch.Tensor):
        assert len(actual) == len(expression) == len(truth)
        for values in zip(actual, expression, truth, strict=True):
            if values[1] is None:
                assert values[0] is None
            else:
                assert_within_budget(*values)
        return
    assert actual.shape == expression.shape == truth.shape
    assert actual.dtype == expression.dtype
    assert truth.dtype == torch.float64
    info = torch.finfo(actual.dtype)
    finite = expression.isfinite()
    assert torch.equal(actual.isnan(), expression.isnan())
    infinite = expression.isinf()
    assert torch.equal(actual[infinite], expression[infinite])
    if not finite.any():
        return
    actual, expression, truth = (t[finite].double() for t in (actual, expression, truth))
    error = (actual - truth).abs()
    allowed = 2 * (expression - truth).abs().max() + info.eps * truth.abs() + info.smallest_normal * info.eps
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), f"error {error[worst]:.3e} exceeds {allowed[worst]:.3e} at {truth[worst]:.6e}"


def assert_rms_within_budget(draws, names=None):
    """Checks draws of a problem together: (actual, expression, truth) of each, sequences of tensors like those above.

    Sums in another order than the expression's have their largest error at a random place, so that twice the largest of
    the one may be less than that of the other. The root mean square hardly varies, and bounds all: that of every tensor
    over all draws (of all tensors of an equal name, if there are names) may be twice the expression's, plus one
    rounding. Returns the root of the squares of each truth.
    """
    squares, roundings = {}, {}
    for actual, expression, truth in draws:
        tensors = zip(actual, expression, truth, strict=True)
        for name, (a, e, t) in zip(names or itertools.count(), tensors, strict=names is not None):
            assert a.shape == e.shape == t.shape
            assert a.dtype == e.dtype
            assert t.dtype == torch.float64
            parts = torch.stack([part.double().square().sum() for part in (t, e - t, a - t)])
            assert parts.isfinite().all(), f"{name}: not finite"
            squares[name] = squares.get(name, 0) + parts
            roundings[name] = max(roundings.get(name, 0), torch.finfo(a.dtype).eps)
    assert squares
    scales = {}
    for name, sums in squares.items():
        scale, allowed, error = sums.sqrt().tolist()
        assert error <= 2 * allowed + roundings[name] * scale, f"{name}: error {error:.2e}, allowed 2 x {allowed:.2e}"
        scales[name] = scale
    return scales
