"""On a CUDA device every operation equals the CPU to the bit, follows torch's stream and never waits for the host."""

import pytest
import torch
from torch import Tensor
from vq_cases import KINDS, make_inputs, same_bits

import vqkernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ops = torch.ops.vqkernels
METRICS = ("l2", "cosine", "dot")
GRADIENTS = ("straight_through", "rotation", "none")
FLOAT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((1, 262_144, 8), (7, 16_384, 256), (33, 1000, 65), (1025, 512, 64), (4096, 1024, 257), (20_000, 300, 12))


@pytest.fixture(autouse=True)
def native_kernels() -> None:
    assert vqkernels.build_info()["cuda"], "built without CUDA kernels"


@pytest.fixture
def no_host_sync():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def to_gpu(value: object) -> object:
    return value.cuda() if isinstance(value, Tensor) else value


def assert_same_on_both(op, *arguments: object) -> None:
    expected = op(*arguments)
    actual = op(*map(to_gpu, arguments))
    for a, b in zip(*[(r,) if isinstance(r, Tensor) else r for r in (actual, expected)], strict=True):
        assert a.is_cuda
        assert same_bits(a.cpu(), b)


def inputs(kind: str, rows: int, codes: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    z, codebook = make_inputs(kind, rows, codes, dim)
    return z.to(dtype).unsqueeze(0), codebook.to(dtype).unsqueeze(0)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
class TestShapes:
    def test_nearest_code(self, shape, dtype):
        for metric in METRICS:
            assert_same_on_both(ops.nearest_code, *inputs("normal", *shape, dtype), metric, None)

    def test_code_statistics(self, shape, dtype):
        rows, codes, dim = shape
        z = torch.randn(1, rows, dim).to(dtype)
        for indices in (torch.randint(-1, codes, (1, rows)), torch.randint(-1, 1, (1, rows))):
            assert_same_on_both(ops.code_statistics, z, indices, codes)

    def test_vector_quantize(self, shape, dtype):
        rows = shape[0]
        z, codebook = inputs("normal", *shape, dtype)
        mask = torch.rand(1, rows) < 0.9
        assert_same_on_both(ops.vector_quantize, z, codebook, "l2", mask)
        _, indices, mse, valid_rows = ops.vector_quantize(z, codebook, "l2", mask)
        grad, grad_mse = torch.randn_like(z), torch.tensor(0.3, dtype=mse.dtype)
        for gradient in GRADIENTS:
            arguments = grad, grad_mse, z, codebook, indices, valid_rows, gradient
            assert_same_on_both(ops.vector_quantize_backward, *arguments)


# rows, codes a level, dim
RESIDUAL_SHAPES = (
    (1, [1], 1),
    (33, [300, 7, 1000], 12),
    (24_000, [1024] * 4, 8),
    (3000, [1024] * 8, 128),
    (20_000, [500, 200], 65),
    (700, [300, 300], 1000),
)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("rows", "sizes", "dim"), RESIDUAL_SHAPES)
def test_residual_quantize(rows, sizes, dim, dtype):
    for heads, metric in ((1, "l2"), (2, "cosine"), (2, "dot")):
        z = torch.randn(heads, rows, dim).to(dtype)
        codebooks = torch.cat([torch.randn(heads, size, dim) * 0.7**q for q, size in enumerate(sizes)], 1).to(dtype)
        mask, num_levels = torch.rand(heads, rows) < 0.9, torch.randint(0, len(sizes) + 1, (heads, rows))
        inputs = z, codebooks, sizes
        assert_same_on_both(ops.residual_quantize, *inputs, metric, mask, num_levels, None)
        assert_same_on_both(ops.residual_quantize, *inputs, metric, None, None, None)
        _, indices, mse, valid_rows = ops.residual_quantize(*inputs, metric, mask, num_levels, None)
        assert_same_on_both(ops.residual_quantize, *inputs, metric, mask, num_levels, indices)
        assert_same_on_both(ops.residual_statistics, *inputs, indices)
        grad, grad_mse = torch.randn_like(z), torch.rand_like(mse)
        for gradient in GRADIENTS:
            arguments = grad, grad_mse, *inputs, indices, valid_rows, gradient
            assert_same_on_both(ops.residual_quantize_backward, *arguments)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_residual_quantize_of_hard_inputs(kind, dtype):
    for rows in (9, 1000, 30_000):
        z, codebooks = inputs(kind, rows, 300, 17, dtype)
        for metric in METRICS:
            mask = torch.rand(1, rows) < 0.9
            assert_same_on_both(ops.residual_quantize, z, codebooks, [200, 90, 10], metric, mask, None, None)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("rows", "codes", "dim", "k"), [(1, 5, 1, 9), (1000, 1024, 128, 8), (5000, 300, 12, 50)])
def test_topk_codes(rows, codes, dim, k, dtype):
    for kind in KINDS:
        z, codebook = inputs(kind, rows, codes, dim, dtype)
        for metric in METRICS:
            assert_same_on_both(ops.topk_codes, z, codebook, k, metric, torch.rand(1, rows) < 0.9)


def test_launches_of_residual_quantize():
    """Codes, all levels, mean errors: the levels are no launches of their own."""
    z, codebooks = torch.randn(1, 5000, 128, device="cuda"), torch.randn(1, 8 * 1024, 128, device="cuda")
    arguments = z, codebooks, [1024] * 8, "l2", None, None, None
    ops.residual_quantize(*arguments)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        ops.residual_quantize(*arguments)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in kernels if "vqkernels" in name]
    assert len(ours) == 3
    assert sum("quantize_levels" in name for name in ours) == 1


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_hard_inputs(kind, dtype):
    for rows in (9, 1000):
        z, codebook = inputs(kind, rows, 700, 17, dtype)
        for metric in METRICS:
            assert_same_on_both(ops.vector_quantize, z, codebook, metric, torch.rand(1, rows) < 0.9)


@pytest.mark.parametrize(("codes", "dim"), [(1, 1), (1024, 64), (16_384, 8)])
def test_ema_update(codes, dim):
    counts = torch.randint(0, 9, (2, codes))
    state = torch.randn(2, codes, dim), torch.rand(2, codes), torch.randn(2, codes, dim)
    on_gpu = [t.cuda() for t in state]
    sums = torch.randn(2, codes, dim)
    ops.ema_update_(*state, counts, sums, 0.99, 1e-5)
    ops.ema_update_(*on_gpu, counts.cuda(), sums.cuda(), 0.99, 1e-5)
    assert all(same_bits(a.cpu(), b) for a, b in zip(on_gpu, state, strict=True))


def test_heads_and_views():
    z, codebook = torch.randn(50, 3, 40).transpose(0, 1)[..., 1:34], torch.randn(3, 64, 70)[:, ::2, 2:35]
    assert_same_on_both(ops.nearest_code, z, codebook, "l2", None)
    indices, _ = ops.nearest_code(z, codebook, "l2", None)
    assert_same_on_both(ops.code_statistics, z, indices, 32)
    assert_same_on_both(ops.vector_quantize, z, codebook, "l2", None)


def test_mixed_types():
    z, codebook = torch.randn(1, 100, 9), torch.randn(1, 30, 9)
    for z_type in FLOAT_TYPES:
        for codebook_type in FLOAT_TYPES:
            assert_same_on_both(ops.vector_quantize, z.to(z_type), codebook.to(codebook_type), "l2", None)


def test_indices_out_of_range_belong_to_no_code():
    z, indices = torch.randn(1, 100, 4), torch.randint(0, 9, (1, 100))
    indices[0, ::3] = 9
    indices[0, 1::3] = -7
    kept = torch.where((indices >= 0) & (indices < 9), indices, -1)
    expected = ops.code_statistics(z, kept, 9)
    actual = ops.code_statistics(z.cuda(), indices.cuda(), 9)
    assert all(same_bits(a.cpu(), b) for a, b in zip(actual, expected, strict=True))


def test_runs_on_the_current_stream():
    """The rows arrive late, and on that stream alone."""
    z, codebook = torch.randn(5000, 16), torch.randn(300, 16)
    late, on_gpu, codes = z.cuda(), torch.zeros(5000, 16, device="cuda"), codebook.cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        on_gpu.copy_(late)
        result = vqkernels.vector_quantize(on_gpu, codes, statistics=True)
        torch.cuda.current_stream().synchronize()
    expected = vqkernels.vector_quantize(z, codebook, statistics=True)
    assert all(same_bits(a.cpu(), b) for a, b in zip(result, expected, strict=True))


def training_step(z: Tensor, codebook: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    leaf = z.detach().requires_grad_()
    result = vqkernels.vector_quantize(leaf, codebook, gradient="rotation", statistics=True)
    (result.quantized.sum() + result.loss).backward()
    vqkernels.ema_update_(codebook, *state, result.counts, result.sums, decay=0.9, eps=1e-5)
    return result.quantized.detach(), result.indices, result.loss.detach(), leaf.grad


def test_training_step_waits_for_nothing(no_host_sync):
    z, codebook = torch.randn(3000, 32, device="cuda"), torch.randn(256, 32, device="cuda")
    training_step(z, codebook, (torch.ones(256, device="cuda"), codebook.clone()))


def residual_training_step(z: Tensor, codebooks: Tensor, num_levels: Tensor) -> None:
    leaf = z.detach().requires_grad_()
    result = vqkernels.residual_quantize(leaf, codebooks, gradient="rotation", num_levels=num_levels, statistics=True)
    (result.quantized.sum() + result.losses.sum()).backward()


def test_residual_training_step_waits_for_nothing(no_host_sync):
    num_levels = torch.randint(1, 5, (3000,), device="cuda")
    residual_training_step(torch.randn(3000, 32, device="cuda"), torch.randn(4, 256, 32, device="cuda"), num_levels)


def test_training_step_in_a_graph():
    """Capture fails where anything waits, allocates outside torch's pool or uses another stream."""
    z, codebook = torch.randn(3000, 32), torch.randn(256, 32)
    state = torch.ones(256), codebook.clone()
    static = [t.cuda() for t in (z, codebook, *state)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training_step(static[0], static[1].clone(), (static[2].clone(), static[3].clone()))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = training_step(static[0], static[1], (static[2], static[3]))
    for _ in range(2):
        graph.replay()
        expected = training_step(z, codebook, state)
        actual = [*results, *static[1:]]
        assert all(same_bits(a.cpu(), b) for a, b in zip(actual, (*expected, codebook, *state), strict=True))


def test_repeats_are_equal():
    z, codebook = torch.randn(50_000, 24, device="cuda"), torch.randn(2000, 24, device="cuda")
    first = vqkernels.vector_quantize(z, codebook, statistics=True)
    for _ in range(5):
        again = vqkernels.vector_quantize(z, codebook, statistics=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_memory():
    """No rows x codes: 64 MiB beside inputs and outputs, where the scores alone would take 64 GiB."""
    z, codebook = torch.randn(65_536, 8, device="cuda"), torch.randn(262_144, 8, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = vqkernels.vector_quantize(z, codebook, statistics=True)
    peak = torch.cuda.max_memory_allocated() - before
    outputs = sum(t.numel() * t.element_size() for t in result)
    assert peak <= outputs + 64 * 2**20


def test_every_device():
    z, codebook = torch.randn(500, 16), torch.randn(40, 16)
    expected = vqkernels.vector_quantize(z, codebook, statistics=True)
    for index in range(torch.cuda.device_count()):
        device = f"cuda:{index}"
        result = vqkernels.vector_quantize(z.to(device), codebook.to(device), statistics=True)
        assert all(same_bits(a.cpu(), b) for a, b in zip(result, expected, strict=True))
    assert torch.cuda.current_device() == 0
