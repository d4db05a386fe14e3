"""Triton search: chosen codes within the bound of vqkernels/triton/nearest_code.py, computed in extended precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vq_bound import assert_within_bound
from vq_cases import DTYPES, METRICS, make_inputs, same_bits

import vqkernels
from vqkernels.triton.nearest_code import nearest_code

KINDS = ("normal", "integers", "duplicates", "one_ulp", "zeros", "large", "broken")


def search(z, codebook, metric="l2", mask=None, device="cpu"):
    """[N, D] or [H, N, D] on any device -> on CPU; leaves no input changed."""
    inputs = [t if t.ndim == 3 else t.unsqueeze(0) for t in (z.to(device), codebook.to(device))]
    before = [t.clone() for t in inputs]
    mask = mask if mask is None else mask.to(device).reshape(inputs[0].shape[:2])
    indices, scores = nearest_code(*inputs, metric, mask)
    assert all(same_bits(a, b) for a, b in zip(inputs, before, strict=True))
    shape = z.shape[:-1]
    return indices.cpu().reshape(shape), scores.cpu().reshape(shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 3, 8, 12, 65])
def test_within_bound(kind, dim, device):
    for i, codes in enumerate((1, 7, 70)):
        z, codebook = make_inputs(kind, 9 if i else 67, codes, dim, seed=i)
        for metric in METRICS:
            assert_within_bound(z, codebook, metric, *search(z, codebook, metric, device=device))


@pytest.mark.parametrize("codebook_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype, codebook_dtype, device):
    z, codebook = make_inputs("normal", 20, 40, 12)
    z, codebook = z.to(dtype), codebook.to(codebook_dtype)
    for metric in METRICS:
        indices, scores = search(z, codebook, metric, device=device)
        wide = torch.float64 in (dtype, codebook_dtype)
        assert indices.dtype == torch.int64
        assert scores.dtype == (torch.float64 if wide else torch.float32)
        assert_within_bound(z, codebook, metric, indices, scores)


@settings(max_examples=25)
@given(data=st.data())
def test_lowest_index_of_ties(device, data):
    """Small integers: scores are exact, and the first of the best is known."""
    rows, codes, dim = (data.draw(st.integers(1, n)) for n in (70, 70, 20))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    z, codebook = (torch.randint(-2, 3, (n, dim), generator=g) for n in (rows, codes))
    metric = data.draw(st.sampled_from(["l2", "dot"]))
    scores = 2 * z @ codebook.T - ((codebook**2).sum(1) if metric == "l2" else 0)
    indices, best = search(z.float(), codebook.float(), metric, device=device)
    assert indices.tolist() == np.argmax(scores.numpy(), 1).tolist()
    assert (2 * best).tolist() == scores.amax(1).tolist()


def test_split_codebook(device):
    """Few rows and many codes: several programs share a row. Ties lie in different programs."""
    z, distinct = make_inputs("integers", 5, 700, 8)
    codebook = distinct.repeat(4, 1)
    scores = 2 * z.long() @ codebook.long().T - (codebook.long() ** 2).sum(1)
    assert search(z, codebook, device=device)[0].tolist() == np.argmax(scores.numpy(), 1).tolist()
    codebook = torch.full_like(codebook, torch.nan)
    assert search(z, codebook, device=device)[0].tolist() == [-1] * 5
    codebook[2345] = 1
    assert search(z, codebook, device=device)[0].tolist() == [2345] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, "large"])
def test_invalid_rows_and_codes(value, dtype, device):
    value = (torch.finfo(dtype).max / 4) ** 0.5 * 1.01 if value == "large" else value
    z, codebook = (t.to(dtype) for t in make_inputs("normal", 12, 9, 5))
    rest = torch.tensor([k for k in range(9) if k not in (0, 4)])
    expected_indices, expected_scores = search(z, codebook[rest], device=device)
    z[3, 2], codebook[0, 0], codebook[4, 4] = value, value, value
    for metric in METRICS:
        assert_within_bound(z, codebook, metric, *search(z, codebook, metric, device=device))
    indices, scores = search(z, codebook, device=device)
    assert (indices[3], scores[3]) == (-1, -torch.inf)
    others = torch.arange(12) != 3
    assert torch.equal(indices[others], rest[expected_indices][others])
    assert torch.equal(scores[others], expected_scores[others])
    assert search(z, torch.full_like(codebook, value), device=device)[0].tolist() == [-1] * 12


def test_heads_mask_and_views(device):
    z = torch.randn(12, 66, 3).permute(2, 1, 0)
    codebook = torch.randn(3, 12, 35).mT
    mask = torch.rand(66, 3).T < 0.5
    indices, scores = search(z, codebook, mask=mask, device=device)
    for h in range(3):
        alone, alone_scores = search(z[h].contiguous(), codebook[h].contiguous(), device=device)
        assert_within_bound(z[h], codebook[h], "l2", alone, alone_scores)
        assert torch.equal(indices[h], alone.masked_fill(~mask[h], -1))
        assert torch.equal(scores[h], alone_scores.masked_fill(~mask[h], -torch.inf))
    shared, _ = search(z[:1].expand(3, -1, -1), codebook, device=device)
    assert torch.equal(shared[0], search(z[0], codebook[0], device=device)[0])


def test_no_rows(device):
    indices, scores = search(torch.zeros(0, 5), torch.randn(3000, 5), device=device)
    assert (indices.shape, indices.dtype, scores.shape) == ((0,), torch.int64, (0,))
    assert search(torch.zeros(2, 0, 5), torch.randn(2, 4, 5), device=device)[0].shape == (2, 0)


def test_public_function(device):
    z, codebook = torch.randn(2, 3, 7, 6, device=device), torch.randn(2, 11, 6, device=device)
    mask = torch.rand(3, 7, device=device) < 0.8
    options = {"metric": "cosine", "mask": mask, "return_score": True}
    indices, scores = vqkernels.nearest_code(z, codebook, **options, backend="triton")
    assert indices.shape == scores.shape == (2, 3, 7)
    expected, _ = vqkernels.nearest_code(z.cpu(), codebook.cpu(), **options | {"mask": mask.cpu()})
    assert torch.equal(indices.cpu(), expected)
