"""Triton top-k search: exact where arithmetic is, and else within the bound of the search."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vq_bound import true_scores
from vq_cases import DTYPES, METRICS, make_inputs, same_bits

import vqkernels
from vqkernels.triton.nearest_code import nearest_code
from vqkernels.triton.topk_codes import topk_codes


def search(z, codebook, k, metric="l2", mask=None, device="cpu"):
    """[H, N, D] on any device -> on CPU."""
    found = topk_codes(z.to(device), codebook.to(device), k, metric, None if mask is None else mask.to(device))
    return [t.cpu() for t in found]


def assert_k_best(z, codebook, metric, indices, scores):
    """One head: true scores fall as computed ones do, and nothing left out is better than what was put out."""
    true = true_scores(z, codebook, metric)
    k = indices.shape[1]
    expected = np.where(true.valid_row, min(k, true.valid_code.sum()), 0)
    found = indices.numpy() >= 0
    assert (found == (np.arange(k) < expected[:, None])).all()
    assert (scores.numpy()[~found] == -np.inf).all()
    for row, place in enumerate(expected):
        index, computed = indices[row, :place].numpy(), scores[row, :place].numpy()
        if place == 0:
            continue
        score, error = true.scores[row], true.error[row]
        assert true.valid_code[index].all()
        assert (abs(computed - score[index]) <= error[index]).all()
        order = sorted(zip(-computed, index, strict=True))
        assert order == list(zip(-computed, index, strict=True))
        left_out = np.setdiff1d(np.flatnonzero(true.valid_code), index)
        assert len(left_out) == true.valid_code.sum() - place
        assert (score[left_out] - error[left_out] <= computed[-1]).all()


@pytest.mark.parametrize("kind", ["normal", "integers", "duplicates", "one_ulp", "zeros", "large", "broken"])
@pytest.mark.parametrize("dim", [1, 33])
def test_within_bound(kind, dim, device):
    for i, (codes, k) in enumerate([(1, 2), (7, 3), (40, 5)]):
        z, codebook = make_inputs(kind, 9, codes, dim, seed=i)
        for metric in METRICS:
            indices, scores = search(z[None], codebook[None], k, metric, device=device)
            assert_k_best(z, codebook, metric, indices[0], scores[0])
            best, top = (t.cpu() for t in nearest_code(z[None].to(device), codebook[None].to(device), metric, None))
            assert torch.equal(indices[..., 0], best)
            assert same_bits(scores[..., 0], top)


@pytest.mark.parametrize("codebook_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype, codebook_dtype, device):
    z, codebook = torch.randn(20, 12).to(dtype), torch.randn(9, 12).to(codebook_dtype)
    indices, scores = search(z[None], codebook[None], 3, device=device)
    assert indices.dtype == torch.int64
    assert scores.dtype == (torch.float64 if torch.float64 in (dtype, codebook_dtype) else torch.float32)
    assert_k_best(z, codebook, "l2", indices[0], scores[0])


@settings(max_examples=8)
@given(data=st.data())
def test_order_of_ties(device, data):
    """Small integers: scores are exact, so that the order is known; more than one round through the codes."""
    rows, codes, dim = (data.draw(st.integers(1, n)) for n in (70, 50, 20))
    k = data.draw(st.sampled_from([1, 2, 15, 16, 17, 40]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    z, codebook = (torch.randint(-2, 3, (n, dim), generator=g) for n in (rows, codes))
    metric = data.draw(st.sampled_from(["l2", "dot"]))
    twice = 2 * z @ codebook.T - ((codebook**2).sum(1) if metric == "l2" else 0)
    order = np.argsort(-twice.numpy(), axis=1, kind="stable")[:, :k]
    indices, scores = search(z[None].float(), codebook[None].float(), k, metric, device=device)
    missing = k - order.shape[1]
    assert indices[0].tolist() == [[*row, *[-1] * missing] for row in order.tolist()]
    expected = np.take_along_axis(twice.numpy(), order, 1).tolist()
    assert (2 * scores[0]).tolist() == [[*row, *[-np.inf] * missing] for row in expected]


def test_heads_mask_and_views(device):
    z, codebook = torch.randn(5, 66, 2).permute(2, 1, 0), torch.randn(2, 5, 35).mT
    mask = torch.rand(66, 2).T < 0.5
    z[1, 3, 2] = torch.nan
    indices, scores = search(z, codebook, 3, mask=mask, device=device)
    for h in range(2):
        alone, alone_scores = search(z[h : h + 1].contiguous(), codebook[h : h + 1].contiguous(), 3, device=device)
        assert_k_best(z[h], codebook[h], "l2", alone[0], alone_scores[0])
        assert torch.equal(indices[h], alone[0].masked_fill(~mask[h, :, None], -1))
        assert torch.equal(scores[h], alone_scores[0].masked_fill(~mask[h, :, None], -torch.inf))


def test_no_rows(device):
    indices, scores = search(torch.zeros(2, 0, 5), torch.randn(2, 4, 5), 3, device=device)
    assert (indices.shape, indices.dtype, scores.shape) == ((2, 0, 3), torch.int64, (2, 0, 3))


def test_public_function(device):
    z, codebook = torch.randn(2, 3, 7, 6), torch.randn(2, 11, 6)
    mask = torch.rand(3, 7) < 0.8
    indices, scores = vqkernels.topk_codes(
        z.to(device), codebook.to(device), 4, metric="cosine", mask=mask.to(device), backend="triton"
    )
    expected, _ = vqkernels.topk_codes(
        z.double(), codebook.double(), 4, metric="cosine", mask=mask, backend="reference"
    )
    assert scores.shape == (2, 3, 7, 4)
    assert torch.equal(indices.cpu(), expected)
