"""The error budget of everything but codes: twice the error of the same expression in PyTorch, plus one rounding."""

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
