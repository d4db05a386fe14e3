"""Reference residual quantization and top-k search against float64 written out here, one row at a time."""

import pytest
import torch
from vq_cases import METRICS

from vqkernels import reference


def scores_of(row, codes, metric):
    """Of one row against codes that are not zero."""
    if metric == "cosine":
        codes = codes / codes.norm(dim=1, keepdim=True)
    return codes @ row - (codes.square().sum(1) / 2 if metric == "l2" else 0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("heads", [False, True])
def test_residual_quantize(metric, heads):
    """In float64 the two ways to round a score differ by far less than these random scores do."""
    z, mask = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.rand(2, 3, 5) > 0.2
    codebooks = [torch.randn(2, size, 4, dtype=torch.float64) for size in (6, 6, 3)]
    num_levels = torch.tensor([[3, 1, 2], [0, 3, 2]])
    if not heads:
        codebooks = [codes[0] for codes in codebooks]
    quantized, indices, losses, counts, sums = reference.residual_quantize(
        z,
        codebooks,
        metric=metric,
        mask=mask,
        num_levels=num_levels,
        commitment_weight=0.5,
        codebook_weight=1.0,
        statistics=True,
    )
    groups = 2 if heads else 1
    errors, rows = torch.zeros(groups, 3, dtype=torch.float64), torch.zeros(groups, 3)
    wanted_counts = [torch.zeros(groups, size, dtype=torch.int64) for size in (6, 6, 3)]
    wanted_sums = [torch.zeros(groups, size, 4, dtype=torch.float64) for size in (6, 6, 3)]
    for position in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        h, b, _ = position
        residual, total, found = z[tuple(position)], torch.zeros(4, dtype=torch.float64), []
        group = h if heads else 0
        for q, level in enumerate(codebooks):
            if not mask[tuple(position)] or q >= num_levels[h, b]:
                found.append(-1)
                continue
            codes = level[h] if heads else level
            k = scores_of(residual, codes, metric).argmax().item()
            found.append(k)
            wanted_counts[q][group, k] += 1
            wanted_sums[q][group, k] += residual
            residual, total = residual - codes[k], total + codes[k]
            errors[group, q] += residual.square().sum()
            rows[group, q] += 1
        assert indices[tuple(position)].tolist() == found
        assert torch.allclose(quantized[tuple(position)], total, rtol=1e-14, atol=1e-14)
    wanted_losses = 1.5 * errors / (4 * rows)
    assert torch.allclose(losses.reshape(groups, 3), wanted_losses, rtol=1e-13, atol=0)
    for q in range(3):
        assert torch.equal(counts[q].reshape(groups, -1), wanted_counts[q])
        rounded = torch.finfo(torch.float32).eps * wanted_sums[q].abs() + 1e-13
        assert torch.all((sums[q].double().reshape(groups, -1, 4) - wanted_sums[q]).abs() <= rounded)


@pytest.mark.parametrize("metric", METRICS)
def test_topk_codes(metric):
    z, codebook = torch.randn(20, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    indices, scores = reference.topk_codes(z, codebook, 11, metric=metric)
    for i, row in enumerate(z):
        wanted = scores_of(row, codebook, metric)
        order = sorted(range(9), key=lambda k, wanted=wanted: -wanted[k])
        assert indices[i].tolist() == [*order, -1, -1]
        assert torch.allclose(scores[i, :9], wanted[order], rtol=1e-13, atol=1e-13)
        assert torch.all(scores[i, 9:] == -torch.inf)


def test_topk_codes_breaks_ties_by_index():
    """Products of small integers are exact."""
    codebook = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
    assert reference.topk_codes(torch.tensor([[1.0, 0.0]]), codebook, 5)[0].tolist() == [[1, 3, 0, 2, 4]]
