"""A step is one graph and never waits for the device."""

import copy

import pytest
import torch
import torch._inductor.config
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
    "losses": {
        "commitment_use_cross_entropy_loss": True,
        "codebook_diversity_loss_weight": 1.0,
        "codebook_diversity_temperature": 2.0,
        "orthogonal_reg_weight": 10.0,
        "orthogonal_reg_active_codes_only": True,
        "orthogonal_reg_max_codes": 5,
    },
    "affine": {"affine_param": True, "learnable_codebook": True, "sync_update_v": 0.5, "threshold_ema_dead_code": 2},
    "bridge": {"vq_bridge": torch.nn.Linear(8, 8), "threshold_ema_dead_code": 2},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 2},
    "soft": {"straight_through": True, "stochastic_sample_codes": True, "route_gradients_to_input": False},
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
        *((reference.VectorQuantize, OPTIONS[name]) for name in ("everything", "losses")),
    ],
    ids=[*OPTIONS, "everything-reference", "losses-reference"],
)
def test_one_graph_equals_eager(layer_class, options):
    eager = layer_class(8, 16, **options)
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter)
    mask = torch.rand(2, 20) < 0.8
    # A second graph where the first step changes what the host knows: k-means, averages of rows.
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


def close(actual, expected, factor=64):
    return (actual - expected).abs().max() <= factor * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize(
    ("layer_class", "options"),
    [
        *((nn.VectorQuantize, OPTIONS[name]) for name in ("default", "losses", "affine", "soft")),
        (reference.VectorQuantize, OPTIONS["default"]),
    ],
    ids=["default", "losses", "affine", "soft", "default-reference"],
)
@torch._inductor.config.patch(fallback_random=True)
def test_inductor_equals_eager(layer_class, options):
    """Gradients too, though the graph overwrites codes that they depend on."""
    eager = layer_class(8, 16, **{**options, "kmeans_init": False})
    compiled, stepped = copy.deepcopy(eager), []
    for _ in range(2):
        x = torch.randn(2, 20, 8)
        stepped = []
        for module in (compiled, eager):
            module.zero_grad()
            run = torch.compile(module, fullgraph=True) if module is compiled else module
            z = x.clone().requires_grad_()
            torch.manual_seed(5)
            results = step(run, z)
            stepped.append([*results, z.grad, *(p.grad for p in module.parameters()), *module.state_dict().values()])
        for actual, expected in zip(*stepped, strict=True):
            if actual is not None:
                assert close(actual.double(), expected.double())


CALLS = {
    "topk": {"topk": 3},
    "indices": {"indices": torch.randint(-1, 16, (2, 20))},
    "weight": {"ema_update_weight": torch.rand(16)},
    "function": {"ema_update_weight": lambda sums, counts: counts / (counts + 1)},
    "accumulate": {"accum_ema_update": True},
    "transform": {"codebook_transform_fn": lambda codes: codes[:, None, None] + torch.ones(2, 20, 1, 1)},
    "temperature": {"sample_codebook_temp": 0.5},
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_are_one_graph_that_waits_for_nothing(call, train, monkeypatch):
    monkeypatch.setattr(_checks, "check_index_range", lambda indices, num_codes: None)
    eager = nn.VectorQuantize(8, 16, stochastic_sample_codes="sample_codebook_temp" in call).train(train)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x, results = torch.randn(2, 20, 8), []
        for module in (eager, run):
            torch.manual_seed(5)
            z = x.clone().requires_grad_()
            if module is eager:
                with NoHostSync():
                    result = module(z, **call)
            else:
                result = module(z, **call)
            if train:
                (result[0].sin().sum() + result[-1].sum()).backward()
            results.append([*result, *([z.grad] if train else [])])
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
    with NoHostSync():
        eager.apply_statistics_()
    compiled.apply_statistics_()
    for a, b in zip(compiled.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@each_layer
@each_option
def test_evaluation_can_be_exported(layer_class, options):
    layer = layer_class(8, 16, **options)
    layer(torch.randn(2, 20, 8))
    layer.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(2, 20, 8),), dynamic_shapes=({0: batch},))
    for size in (2, 5):
        x = torch.randn(size, 20, 8)
        for actual, expected in zip(program.module()(x), layer(x), strict=True):
            assert torch.equal(actual, expected)


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
