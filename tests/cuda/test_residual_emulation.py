"""The CUDA kernels of residual quantization and top-k codes, run on the CPU by emulation/.

They equal the scalar CPU kernels of one level, applied one after the other, to the bit.
"""

import itertools

import pytest
import torch
import vq_levels
from torch import Tensor
from vq_cases import KINDS, make_inputs, same_bits

METRICS = ("l2", "cosine", "dot")
GRADIENTS = ("straight_through", "rotation", "none")
FLOAT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIMS = (1, 3, 8, 12, 65, 128)
# Of a processor: enough for tall tiles whose rows are resident, for low ones only, and for no resident rows.
SHARED_KIB = (228, 64, 0)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert same_bits(a, b)


def inputs(kind: str, heads: int, rows: int, sizes: list[int], dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [H, N, D] and float32 or float64 codebooks [H, sum of sizes, D] whose levels grow smaller."""
    z, codebooks = [], []
    for head in range(heads):
        levels = [make_inputs(kind, rows, size, dim, head + 7 * q) for q, size in enumerate(sizes)]
        z.append(levels[0][0])
        codebooks.append(torch.cat([codes * 0.7**q for q, (_, codes) in enumerate(levels)]))
    z = torch.stack(z).to(dtype)
    return z, torch.stack(codebooks).to(vq_levels.wide_type(z))


def some_mask(heads: int, rows: int) -> Tensor:
    return torch.rand(heads, rows) < 0.8


def quantize_on_both(device, *arguments: object) -> tuple[Tensor, ...]:
    expected = vq_levels.residual_quantize(*arguments)
    assert_same(device.residual_quantize(*arguments), expected)
    return expected


class TestQuantize:
    @pytest.mark.parametrize("dtype", FLOAT_TYPES)
    @pytest.mark.parametrize("dim", DIMS)
    def test_shapes(self, device, dim, dtype):
        for rows, sizes in itertools.product((1, 33, 70), ([5], [7, 300, 1], [130, 130])):
            z, codebooks = inputs("normal", 1, rows, sizes, dim, dtype)
            quantize_on_both(device, z, codebooks, sizes, METRICS[(rows + len(sizes)) % 3])

    @pytest.mark.parametrize("shared_kib", SHARED_KIB)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_hard_inputs(self, device, kind, metric, dtype, shared_kib):
        device.configure(2, shared_kib=shared_kib)
        sizes = [300, 20, 20]
        z, codebooks = inputs(kind, 2, 70, sizes, 17, dtype)
        num_levels = torch.randint(0, 4, (2, 70))
        quantize_on_both(device, z, codebooks, sizes, metric, some_mask(2, 70), num_levels)

    @pytest.mark.parametrize("shared_kib", SHARED_KIB)
    @pytest.mark.parametrize("descending", [False, True])
    @pytest.mark.parametrize("multiprocessors", [1, 5, 132])
    def test_device_does_not_matter(self, device, multiprocessors, descending, shared_kib):
        device.configure(multiprocessors, shared_kib=shared_kib, descending=descending)
        for rows, kind, dtype in itertools.product(
            (20, 150), ("integers", "duplicates"), (torch.float32, torch.float64)
        ):
            z, codebooks = inputs(kind, 2, rows, [300, 9], 37, dtype)
            quantize_on_both(device, z, codebooks, [300, 9], "l2", None, torch.randint(0, 3, (2, rows)))

    @pytest.mark.parametrize("dtype", FLOAT_TYPES)
    def test_known_codes(self, device, dtype):
        """The codes that a search finds, given, are taken as they are; so are their rows' masks and levels."""
        for dim, rows in itertools.product((12, 8000), (1, 40)):
            sizes = [9, 20, 3]
            z, codebooks = inputs("normal", 2, rows, sizes, dim, dtype)
            mask, num_levels = some_mask(2, rows), torch.randint(0, 5, (2, rows))
            expected = quantize_on_both(device, z, codebooks, sizes, "l2", mask, num_levels)
            everywhere = vq_levels.residual_quantize(z, codebooks, sizes, "l2")[1]
            given = everywhere if rows == 1 else torch.where(expected[1] >= 0, expected[1], everywhere)
            assert_same(device.residual_quantize(z, codebooks, sizes, "l2", mask, num_levels, given), expected)

    @pytest.mark.parametrize("missing", [-1, -5, 20, 2**40])
    def test_known_codes_that_do_not_exist(self, device, missing):
        sizes = [9, 20, 3]
        z, codebooks = inputs("normal", 2, 40, sizes, 12, torch.float32)
        found = vq_levels.residual_quantize(z, codebooks, sizes, "l2")[1]
        ends = torch.rand(2, 40) < 0.5
        given = found.clone()
        given[..., 1].masked_fill_(ends, missing)
        expected = vq_levels.residual_quantize(z, codebooks, sizes, "l2", None, torch.where(ends, 1, 3))
        quantized, *others = device.residual_quantize(z, codebooks, sizes, "l2", None, None, given)
        assert_same(tuple(others), expected[1:])
        assert same_bits(quantized, expected[0].masked_fill(ends.unsqueeze(-1), torch.nan))

    @pytest.mark.parametrize("dim", [8, 9])
    def test_unaligned_pointers(self, device, dim):
        sizes = [150, 7, 150]
        z, codebooks = inputs("normal", 1, 70, sizes, dim, torch.float32)
        for t in (z, codebooks):
            shifted = torch.empty(t.numel() + 1)[1:].view_as(t).copy_(t)
            assert shifted.data_ptr() % 16 != 0
            pair = (shifted, codebooks) if t is z else (z, shifted)
            for shared_kib in SHARED_KIB:
                device.configure(2, shared_kib=shared_kib)
                quantize_on_both(device, *pair, sizes, "l2")

    def test_launches(self, device):
        """Biases, all levels, mean errors; known codes need no biases, a gradient is one kernel."""
        sizes = [9, 20, 3, 7, 8, 5]
        z, codebooks = inputs("normal", 2, 40, sizes, 12, torch.float32)
        device.count_launches()
        _, indices, mse, valid_rows = device.residual_quantize(z, codebooks, sizes, "cosine")
        assert device.count_launches() == 3
        device.residual_quantize(z, codebooks, sizes, "cosine", None, None, indices)
        assert device.count_launches() == 2
        for gradient in GRADIENTS:
            device.residual_quantize_backward(z, mse, z, codebooks, sizes, indices, valid_rows, gradient)
            assert device.count_launches() == 1

    def test_no_rows(self, device):
        for given in (None, torch.empty(2, 0, 2, dtype=torch.int64)):
            quantized, indices, mse, valid_rows = device.residual_quantize(
                torch.empty(2, 0, 4), torch.randn(2, 8, 4), [5, 3], "l2", None, None, given
            )
            assert quantized.numel() == indices.numel() == 0
            assert torch.equal(mse, torch.zeros(2, 2))
            assert torch.equal(valid_rows, torch.zeros(2, 2, dtype=torch.int64))

    def test_many_levels(self, device):
        sizes = [2] * 256
        z, codebooks = inputs("normal", 1, 10, sizes, 4, torch.float32)
        quantize_on_both(device, z, codebooks, sizes, "l2")
        with pytest.raises(RuntimeError, match="expected 1 to 256 levels"):
            device.residual_quantize(z, torch.zeros(1, 257, 4), [1] * 257, "l2")
        with pytest.raises(RuntimeError, match="codes a level"):
            device.residual_quantize(z, codebooks, [512, 0], "l2")


class TestBackward:
    @pytest.mark.parametrize("dtype", FLOAT_TYPES)
    @pytest.mark.parametrize("gradient", GRADIENTS)
    @pytest.mark.parametrize("dim", [*DIMS, 257, 4000])
    def test_equals_levels(self, device, dim, gradient, dtype):
        for heads, rows, sizes in ((1, 1, [3]), (2, 40 if dim < 4000 else 3, [7, 30, 2, 9]), (1, 0, [2, 2])):
            z, codebooks = inputs("broken" if rows == 40 else "normal", heads, rows, sizes, dim, dtype)
            num_levels = torch.randint(0, len(sizes) + 1, (heads, rows))
            _, indices, mse, valid_rows = vq_levels.residual_quantize(
                z, codebooks, sizes, "l2", some_mask(heads, rows), num_levels
            )
            grad, grad_mse = torch.randn(z.shape).to(dtype), torch.randn(mse.shape, dtype=mse.dtype)
            for given, given_mse in ((grad, grad_mse), (grad, None), (None, grad_mse), (None, None)):
                arguments = given, given_mse, z, codebooks, sizes, indices, valid_rows, gradient
                expected = vq_levels.residual_quantize_backward(*arguments)
                assert_same((device.residual_quantize_backward(*arguments),), (expected,))

    @pytest.mark.parametrize("gradient", GRADIENTS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_hard_inputs(self, device, kind, gradient):
        sizes = [9, 30, 4]
        z, codebooks = inputs(kind, 2, 40, sizes, 17, torch.float32)
        _, indices, mse, valid_rows = vq_levels.residual_quantize(z, codebooks, sizes, "l2")
        indices = indices.masked_fill(torch.rand(indices.shape) < 0.2, -1)
        arguments = torch.randn_like(z), torch.randn_like(mse), z, codebooks, sizes, indices, valid_rows, gradient
        expected = vq_levels.residual_quantize_backward(*arguments)
        assert_same((device.residual_quantize_backward(*arguments),), (expected,))
        broken = torch.where(indices < 0, torch.tensor([9, -7, 2**40]), indices)
        assert_same((device.residual_quantize_backward(*arguments[:5], broken, valid_rows, gradient),), (expected,))


class TestStatistics:
    @pytest.mark.parametrize("dtype", FLOAT_TYPES)
    @pytest.mark.parametrize("dim", DIMS)
    def test_equals_levels(self, device, dim, dtype):
        for heads, rows, sizes in ((1, 300, [7]), (2, 300, [30, 2, 9]), (3, 600, [4, 300]), (2, 0, [3, 2])):
            z, codebooks = inputs("normal", heads, rows, sizes, dim, dtype)
            num_levels = torch.randint(0, len(sizes) + 1, (heads, rows))
            indices = vq_levels.residual_quantize(z, codebooks, sizes, "l2", None, num_levels)[1]
            expected = vq_levels.residual_statistics(z, codebooks, sizes, indices)
            assert_same(device.residual_statistics(z, codebooks, sizes, indices), expected)

    def test_indices_out_of_range_belong_to_no_code(self, device):
        sizes = [9, 4, 9]
        z, codebooks = inputs("normal", 2, 100, sizes, 5, torch.float32)
        indices = vq_levels.residual_quantize(z, codebooks, sizes, "l2")[1]
        kept = indices.masked_fill(torch.rand(indices.shape) < 0.4, -1)
        broken = torch.where(kept < 0, torch.tensor([9, -7, 2**40]), kept)
        expected = vq_levels.residual_statistics(z, codebooks, sizes, kept)
        assert_same(device.residual_statistics(z, codebooks, sizes, broken), expected)


class TestTopk:
    @staticmethod
    def both(device, z, codebook, k, metric, mask=None):
        expected = vq_levels.topk_codes(z, codebook, k, metric, mask)
        assert_same(device.topk_codes(z, codebook, k, metric, mask), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("dim", [1, 8, 12, 65])
    def test_shapes(self, device, dim, dtype):
        for codes, rows, k in itertools.product((1, 33, 130), (0, 1, 33), (1, 4, 40)):
            self.both(device, *inputs("normal", 1, rows, [codes], dim, dtype), k, METRICS[(codes + rows + k) % 3])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_hard_inputs(self, device, kind, metric, dtype):
        for k in (1, 9, 200):
            self.both(device, *inputs(kind, 2, 9, [150], 12, dtype), k, metric, some_mask(2, 9))

    @pytest.mark.parametrize("descending", [False, True])
    def test_best_codes_of_one_lane(self, device, descending):
        """All good codes meet the same lane, whose list is too short for them."""
        device.configure(2, descending=descending)
        codebook = -torch.rand(1, 1000, 1) - 1
        for good in (torch.rand(32, 1) + 1, torch.randint(1, 3, (32, 1)).float()):
            codebook[0, 5::32] = good
            for k in (3, 5, 31, 40):
                self.both(device, torch.rand(1, 6, 1) + 0.1, codebook, k, "dot")

    def test_first_is_nearest(self, device):
        z, codebook = inputs("integers", 2, 50, [90], 5, torch.float32)
        indices, scores = device.topk_codes(z, codebook, 3, "l2", None)
        assert_same((indices[..., 0], scores[..., 0]), device.nearest_code(z, codebook, "l2", None))
