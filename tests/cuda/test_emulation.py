"""The CUDA kernels, run on the CPU by emulation/, against the scalar CPU kernels: equal to the bit."""

import itertools

import pytest
import torch
from torch import Tensor
from vq_cases import KINDS, make_inputs, same_bits

import vqkernels  # noqa: F401 (loads the native library)

ops = torch.ops.vqkernels
DIMS = (1, 3, 8, 12, 65, 257)
CODES = (1, 7, 130, 300)
ROWS = (0, 1, 5, 129, 300)
METRICS = ("l2", "cosine", "dot")
GRADIENTS = ("straight_through", "rotation", "none")
FLOAT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert same_bits(a, b)


def inputs(kind: str, heads: int, rows: int, codes: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pairs = [make_inputs(kind, rows, codes, dim, seed) for seed in range(heads)]
    return tuple(torch.stack([pair[i] for pair in pairs]).to(dtype) for i in (0, 1))


def some_mask(heads: int, rows: int) -> Tensor:
    return torch.rand(heads, rows) < 0.8


def search_on_both(device, z, codebook, metric, mask=None):
    assert_same(device.nearest_code(z, codebook, metric, mask), ops.nearest_code(z, codebook, metric, mask))


class TestNearestCode:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("dim", DIMS)
    def test_shapes(self, device, dim, dtype):
        for codes, rows in itertools.product(CODES, ROWS):
            metric = METRICS[(codes + rows) % 3]
            search_on_both(device, *inputs("normal", 1, rows, codes, dim, dtype), metric)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_hard_inputs(self, device, kind, metric, dtype):
        for rows, dim in ((9, 12), (140, 3)):
            z, codebook = inputs(kind, 2, rows, 300, dim, dtype)
            search_on_both(device, z, codebook, metric, some_mask(2, rows))

    def test_signs_of_zero(self, device):
        """Codes of zeros of both signs are equally good; the score is that of the first."""
        codebook = torch.where(torch.rand(1, 300, 2) < 0.5, 0.0, -0.0)
        for rows in (20, 130):
            z = torch.randn(1, rows, 2)
            search_on_both(device, z, codebook, "l2")
            _, scores = device.nearest_code(z, codebook, "l2", None)
            assert 0 < torch.signbit(scores).sum() < rows

    @pytest.mark.parametrize("broken", ["rows", "codes", "one code"])
    def test_nothing_valid(self, device, broken):
        for rows in (20, 130):
            z, codebook = inputs("normal", 1, rows, 140, 8, torch.float32)
            if broken == "rows":
                z[:, :, 7] = torch.nan
            elif broken == "codes":
                codebook[:, :, 0] = torch.inf
            else:
                codebook[:, 1:] = 1e30
            indices, scores = device.nearest_code(z, codebook, "l2", None)
            assert torch.equal(indices, torch.full_like(indices, 0 if broken == "one code" else -1))
            assert torch.equal(scores == -torch.inf, indices == -1)

    @pytest.mark.parametrize("multiprocessors", [1, 7, 132])
    @pytest.mark.parametrize("descending", [False, True])
    def test_device_does_not_matter(self, device, multiprocessors, descending):
        device.configure(multiprocessors, descending=descending)
        for rows, kind in itertools.product((2, 32, 33, 150), ("integers", "duplicates")):
            for dtype in (torch.float32, torch.float64):
                search_on_both(device, *inputs(kind, 2, rows, 700, 10, dtype), "l2")

    @pytest.mark.parametrize("dim", [8, 9])
    def test_unaligned_pointers(self, device, dim):
        z, codebook = inputs("normal", 1, 140, 150, dim, torch.float32)
        for t in (z, codebook):
            shifted = torch.empty(t.numel() + 1)[1:].view_as(t).copy_(t)
            pair = (shifted, codebook) if t is z else (z, shifted)
            assert shifted.data_ptr() % 16 != 0
            search_on_both(device, *pair, "l2")


class TestCodeStatistics:
    @pytest.mark.parametrize("dtype", FLOAT_TYPES)
    @pytest.mark.parametrize("dim", DIMS)
    def test_shapes(self, device, dim, dtype):
        for codes, rows in itertools.product(CODES, ROWS):
            z = torch.randn(1, rows, dim).to(dtype)
            indices = torch.randint(-1, codes, (1, rows))
            assert_same(device.code_statistics(z, indices, codes), ops.code_statistics(z, indices, codes))

    @pytest.mark.parametrize("descending", [False, True])
    @pytest.mark.parametrize("rows", [256, 257, 511, 513, 1024, 9000])
    def test_skewed(self, device, rows, descending):
        device.configure(2, descending=descending)
        codes, dim = 500, 5
        z = torch.randn(2, rows, dim)
        ascending = torch.arange(rows).expand(2, rows)
        for indices in (
            torch.full((2, rows), codes - 1),
            ascending // 300,
            ascending % 3,
            torch.where(torch.rand(2, rows) < 0.9, torch.tensor([[3], [0]]), torch.randint(-1, codes, (2, rows))),
            (torch.rand(2, rows) ** 8 * codes).long(),
            torch.full((2, rows), -1),
        ):
            indices = indices.contiguous()
            assert_same(device.code_statistics(z, indices, codes), ops.code_statistics(z, indices, codes))

    @pytest.mark.parametrize("codes", [255, 256, 65_535, 65_536])
    def test_passes_of_the_sort(self, device, codes):
        z = torch.randn(1, 700, 1)
        indices = torch.randint(0, codes, (1, 700))
        indices[0, ::2] = torch.tensor([0, codes - 1, codes // 2, codes - 2, -1])[torch.arange(350) % 5]
        assert_same(device.code_statistics(z, indices, codes), ops.code_statistics(z, indices, codes))

    @pytest.mark.parametrize("head", [0, 1])
    def test_indices_out_of_range_belong_to_no_code(self, device, head):
        z = torch.randn(2, 100, 4)
        indices = torch.randint(0, 9, (2, 100))
        indices[head, ::3] = torch.tensor([9, 10, -2, 2**40, -(2**40), 2**32, 2**63 - 1])[torch.arange(34) % 7]
        kept = torch.where((indices >= 0) & (indices < 9), indices, -1)
        assert_same(device.code_statistics(z, indices, 9), ops.code_statistics(z, kept, 9))

    def test_order_of_additions(self, device):
        """One run: 2^24 swallows every 1 behind it. Two runs: the second has its ones added up before they meet."""
        z = torch.ones(1, 512, 1)
        z[0, 0] = 2.0**24
        counts, sums = device.code_statistics(z, torch.zeros(1, 512, dtype=torch.int64), 1)
        assert counts.item() == 512
        assert sums.item() == 2.0**24 + 256


class TestEmaUpdate:
    @pytest.mark.parametrize(("decay", "eps"), [(0.99, 1e-5), (0.8, 0.0), (0.0, 1e-3), (1.0, 1e-5)])
    @pytest.mark.parametrize("dim", DIMS)
    def test_equals_cpu(self, device, dim, decay, eps):
        for heads, codes in ((1, 1), (3, 7), (1, 300), (2, 513)):
            counts = torch.randint(0, 50, (heads, codes)) * (torch.rand(heads, codes) < 0.5)
            state = [torch.randn(heads, codes, dim), torch.rand(heads, codes) * 9, torch.randn(heads, codes, dim)]
            state[1][:, ::3] = 0
            sums = torch.randn(heads, codes, dim) * counts.unsqueeze(-1)
            expected = [t.clone() for t in state]
            ops.ema_update_(*expected, counts, sums, decay, eps)
            device.ema_update(*state, counts, sums, decay=decay, eps=eps)
            assert_same(tuple(state), tuple(expected))

    def test_no_members_at_all(self, device):
        codebook, zeros = torch.randn(1, 5, 4), torch.zeros(1, 5, 4)
        before = codebook.clone()
        counts = torch.zeros(1, 5, dtype=torch.int64)
        device.ema_update(codebook, torch.zeros(1, 5), zeros.clone(), counts, zeros, decay=0.5, eps=0.0)
        assert torch.equal(codebook, before)


class TestVectorQuantize:
    @staticmethod
    def both(device, z, codebook, mask=None):
        quantized, indices, mse, valid_rows = ops.vector_quantize(z, codebook, "l2", mask)
        actual = device.vector_quantize(z, codebook.to(mse.dtype), indices, mask)
        assert_same(actual, (quantized, mse, valid_rows))
        return indices, valid_rows

    @pytest.mark.parametrize("dtype", FLOAT_TYPES)
    @pytest.mark.parametrize("dim", DIMS)
    def test_forward(self, device, dim, dtype):
        for codes, rows in itertools.product(CODES, ROWS):
            z, codebook = inputs("normal", 1, rows, codes, dim, dtype)
            self.both(device, z, codebook, some_mask(1, rows) if rows % 2 else None)

    @pytest.mark.parametrize("dtype", FLOAT_TYPES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_hard_inputs(self, device, kind, dtype):
        z, codebook = inputs(kind, 3, 150, 20, 17, dtype)
        self.both(device, z, codebook, some_mask(3, 150))

    @pytest.mark.parametrize("dtype", FLOAT_TYPES)
    def test_rows_without_code(self, device, dtype):
        z, codebook = torch.full((1, 3, 5), torch.nan, dtype=dtype), torch.ones(1, 2, 5, dtype=dtype)
        indices = torch.full((1, 3), -1)
        mask = torch.tensor([[True, False, True]])
        quantized, mse, valid_rows = device.vector_quantize(
            z, codebook.to(torch.promote_types(dtype, torch.float32)), indices, mask
        )
        assert torch.equal(quantized.isnan().all(-1), mask)
        assert torch.equal(quantized[0, 1], torch.zeros(5, dtype=dtype))
        assert mse.item() == 0
        assert valid_rows.item() == 0

    @pytest.mark.parametrize("bits", [torch.bfloat16, torch.float16])
    def test_rounding_of_codes(self, device, bits):
        """Float codes in halves of the last place, subnormals, both infinities: rounded as torch rounds them."""
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(bits).float()
        finite = patterns[patterns.isfinite()].sort().values
        codes = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, finite * (1 + 2.0**-12)])
        codes = codes[(codes.abs() < 1e19)].reshape(1, 1, -1)
        z = torch.zeros(codes.shape, dtype=bits)
        quantized, _, _ = device.vector_quantize(z, codes, torch.zeros(1, 1, dtype=torch.int64), None)
        assert same_bits(quantized, codes.to(bits))

    @pytest.mark.parametrize("dtype", FLOAT_TYPES)
    @pytest.mark.parametrize("gradient", GRADIENTS)
    @pytest.mark.parametrize("dim", DIMS)
    def test_backward(self, device, dim, gradient, dtype):
        for heads, codes, rows in ((1, 7, 1), (1, 1, 5), (2, 130, 67), (1, 7, 0)):
            z, codebook = inputs("broken" if rows == 67 else "normal", heads, rows, codes, dim, dtype)
            indices, valid_rows = self.both(device, z, codebook)
            grad = torch.randn(heads, rows, dim).to(dtype)
            wide = codebook.to(torch.promote_types(dtype, torch.float32))
            grad_mse = torch.tensor(0.37, dtype=wide.dtype)
            for given, given_mse in ((grad, grad_mse), (grad, None), (None, grad_mse), (None, None)):
                inputs_ = given, given_mse, z
                expected = ops.vector_quantize_backward(*inputs_, codebook, indices, valid_rows, gradient)
                actual = device.vector_quantize_backward(*inputs_, wide, indices, valid_rows, gradient)
                assert_same((actual,), (expected,))

    @pytest.mark.parametrize("kind", KINDS)
    def test_rotation_of_hard_inputs(self, device, kind):
        z, codebook = inputs(kind, 2, 40, 9, 17, torch.float32)
        indices, valid_rows = self.both(device, z, codebook)
        inputs_ = torch.randn(2, 40, 17), torch.tensor(2.0), z, codebook, indices, valid_rows, "rotation"
        assert_same((device.vector_quantize_backward(*inputs_),), (ops.vector_quantize_backward(*inputs_),))


class TestEmulator:
    """What the emulator has to notice, so that the tests above can fail."""

    def run(self, device, name, descending=False):
        device.configure(1, descending=descending)
        out = torch.zeros(64)
        device.call("fault", name, out)
        return out

    @pytest.mark.parametrize("descending", [False, True])
    def test_correct_kernel(self, device, descending):
        assert torch.equal(self.run(device, "none", descending), (torch.arange(64.0) + 1) % 64)

    @pytest.mark.parametrize("descending", [False, True])
    def test_missing_barrier(self, device, descending):
        assert self.run(device, "missing_barrier", descending).isnan().any()

    @pytest.mark.parametrize("name", ["divergent_barrier", "early_end", "divergent_shuffle"])
    def test_divergence(self, device, name):
        with pytest.raises(
            RuntimeError, match=r"barrier divergence in block 0: thread \d+ .*faults.cu:\d+, thread \d+"
        ):
            self.run(device, name)

    def test_overrun(self, device):
        with pytest.raises(RuntimeError, match="wrote behind its shared memory"):
            self.run(device, "overrun")
