"""A step is one graph and never waits for the device."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from vector_quantize_pytorch import VectorQuantize as Upstream

from vqkernels import nn, reference
from vqkernels.reference import _checks

LAYERS = {"nn": nn.VectorQuantize, "reference": reference.VectorQuantize}
OPTIONS = {
    "default": {},
    "everything": {
        "heads": 2,
        "codebook_dim": 3,
        "separate_codebook_per_head": True,
        "use_cosine_sim": True,
        "kmeans_init": True,
        "threshold_ema_dead_code": 2,
    },
    "learnable": {"learnable_codebook": True, "kmeans_init": True, "threshold_ema_dead_code": 2},
    "manual_ema": {"manual_ema_update": True, "rotation_trick": False},
}

each_layer = pytest.mark.parametrize("layer_class", LAYERS.values(), ids=LAYERS)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class WaitsForDevice(Exception):
    pass


class NoHostSync(TorchDispatchMode):
    """Raises at operations whose result the host needs: a value, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "_unique2",
            "is_nonzero",
        ):
            raise WaitsForDevice(func)
        return func(*args, **(kwargs or {}))


def step(layer, x, **arguments):
    quantized, indices, loss, breakdown, usage = layer(
        x, return_loss_breakdown=True, return_statistics=True, **arguments
    )
    if layer.training:
        (quantized.sin().sum() + loss).backward()
    return [quantized, indices, loss, *breakdown, *usage]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("layer_class", "options"),
    [
        *((nn.VectorQuantize, options) for options in OPTIONS.values()),
        (reference.VectorQuantize, OPTIONS["everything"]),
    ],
    ids=[*OPTIONS, "everything-reference"],
)
def test_one_graph_equals_eager(layer_class, options):
    eager = layer_class(8, 16, **options)
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter)
    mask = torch.rand(2, 20) < 0.8
    for train, graphs in ((True, 1), (True, None), (True, 0), (False, None), (False, 0)):
        eager.train(train), compiled.train(train)
        x = torch.randn(2, 20, 8)
        before, results, grads = counter.frame_count, [], []
        for module in (eager, run):
            torch.manual_seed(5)
            z = x.clone().requires_grad_()
            results.append(step(module, z, mask=mask))
            grads.append(z.grad)
        for actual, expected in zip(results[1], results[0], strict=True):
            assert torch.equal(actual, expected)
        if train:
            assert torch.equal(*grads)
        for a, b in zip(compiled.state_dict().values(), eager.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        if graphs is not None:
            assert counter.frame_count - before == graphs


def test_inductor_equals_eager():
    eager = nn.VectorQuantize(8, 16, threshold_ema_dead_code=2)
    eager._codebook.cluster_size.fill_(100.0)  # no code dies: inductor draws other random numbers
    compiled = copy.deepcopy(eager)
    x = torch.randn(2, 20, 8)
    actual, expected = (
        step(module, x.clone().requires_grad_()) for module in (torch.compile(compiled, fullgraph=True), eager)
    )
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= 16 * torch.finfo(torch.float32).eps * b.abs().max()
    assert torch.equal(compiled.codebook, eager.codebook)


@each_layer
@each_option
@pytest.mark.parametrize("train", [True, False])
def test_no_step_waits_for_the_device(layer_class, options, train, monkeypatch):
    # A check of index values that leaves tensors of other devices alone. Here all are on the CPU.
    monkeypatch.setattr(_checks, "check_index_range", lambda indices, num_codes: None)
    layer = layer_class(8, 16, **options).train(train)
    x, mask = torch.randn(2, 20, 8), torch.rand(2, 20) < 0.8
    with NoHostSync():
        for _ in range(2):
            step(layer, x.clone().requires_grad_(), mask=mask)
            step(layer, x.clone().requires_grad_(), lens=torch.tensor([3, 20]))
        layer.get_output_from_indices(layer(x)[1])
        layer.update_indices(x, layer(x)[1])


def test_upstream_waits():
    with pytest.raises(WaitsForDevice), NoHostSync():
        Upstream(8, 16, threshold_ema_dead_code=2)(torch.randn(2, 20, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@each_option
def test_no_step_waits_for_a_gpu(options):
    layer = nn.VectorQuantize(8, 16, **options).cuda()
    x = torch.randn(2, 20, 8, device="cuda")
    step(layer, x.clone().requires_grad_())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for train in (True, False):
            layer.train(train)
            step(layer, x.clone().requires_grad_())
    finally:
        torch.cuda.set_sync_debug_mode("default")
