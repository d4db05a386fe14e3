"""The residual layers against vector-quantize-pytorch and a plain loop in float64, and what goes beyond upstream."""

import copy
import inspect
import math

import pytest
import torch
import vector_quantize_pytorch as upstream_package

from vqkernels import nn, reference

EPS = torch.finfo(torch.float32).eps
DIM, CODES, LEVELS = 8, 16, 4

# What both packages take. Distances have no moving codes here: upstream's backward pass reads codes after their update.
OPTIONS = {
    "default": {},
    "straight_through": {"rotation_trick": False},
    "projected": {"codebook_dim": 5},
    "sizes": {"codebook_size": (16, 8, 8, 12)},
    "commitment": {"commitment_weight": 0.25},
    "without_commitment": {"commitment_weight": 0.0},
    "without_ema": {"ema_update": False},
    "unrouted": {"route_gradients_to_input": False},
    "shared": {"shared_codebook": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "gradient_through_residuals": {"quant_grad_frac": 0.3},
    "cosine": {"use_cosine_sim": True},
    "cross_entropy_commitment": {"commitment_use_cross_entropy_loss": True, "ema_update": False},
    "orthogonal": {"orthogonal_reg_weight": 0.5},
    "diversity": {"codebook_diversity_loss_weight": 0.5, "ema_update": False},
    "implicit": {"implicit_neural_codebook": True},
    "implicit_sizes": {"implicit_neural_codebook": True, "codebook_size": (16, 8, 8, 12)},
    "diveq": {"diveq": True, "threshold_ema_dead_code": 0},
    "dropout": {"quantize_dropout": True},
    "structured_dropout": {
        "quantize_dropout": True,
        "quantize_dropout_cutoff_index": 1,
        "quantize_dropout_multiple_of": 2,
    },
    "dropout_cosine": {"quantize_dropout": True, "use_cosine_sim": True},
}

BEAMS = {
    "beams": {"beam_size": 3},
    "weighted_beams": {"beam_size": 3, "eval_beam_size": 2, "beam_score_quantizer_weights": [0.5, 1.0, 2.0, 1.0]},
    "cosine_beams": {"beam_size": 3, "use_cosine_sim": True},
    "dropout_beams": {"beam_size": 3, "quantize_dropout": True},
    "learnable_beams": {"beam_size": 3, "learnable_codebook": True, "ema_update": False},
}


def pair(**options):
    """Upstream's layer and ours, with upstream's state."""
    arguments = {"dim": DIM, "codebook_size": CODES, "num_quantizers": LEVELS, **options}
    upstream = upstream_package.ResidualVQ(**arguments)
    layer = nn.ResidualVQ(**arguments)
    layer.load_state_dict(upstream.state_dict(), strict=True)
    upstream.load_state_dict(layer.state_dict(), strict=True)
    return upstream, layer


def assert_close(actual, expected, factor=64 * LEVELS):
    """Within `factor` roundings of the largest element: a chain of D steps for every level."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    bound = factor * EPS * expected.abs().max().clamp(min=EPS)
    assert (actual - expected).abs().max() <= bound


def assert_same_state(layer, upstream):
    for (name, ours), theirs in zip(layer.state_dict().items(), upstream.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert_close(ours.float(), theirs.float())


@pytest.mark.parametrize("name", ["ResidualVQ", "GroupedResidualVQ"])
def test_signatures_agree(name):
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(getattr(upstream_package, name), method)).parameters
        ours = inspect.signature(getattr(getattr(nn, name), method)).parameters
        expected = {key: p.default for key, p in theirs.items() if key not in ("mlp_kwargs", "indices")}
        assert [key for key in ours if key in theirs] == list(theirs)
        assert {key: ours[key].default for key in expected} == expected
        assert set(ours) - set(theirs) <= {"num_levels", "return_statistics"}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_initial_state_from_the_same_seed(options):
    states = []
    for module in (upstream_package, nn, reference):
        torch.manual_seed(3)
        arguments = {"dim": DIM, "codebook_size": CODES, "num_quantizers": LEVELS, **options}
        states.append(module.ResidualVQ(**arguments).state_dict())
    for state in states[1:]:
        assert list(state) == list(states[0])
        assert all(torch.equal(state[name], states[0][name]) for name in state)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_steps_and_evaluation(options):
    upstream, layer = pair(**options)
    optimizers = [torch.optim.SGD([*module.parameters(), torch.zeros(1)], lr=0.01) for module in (upstream, layer)]
    for step in range(3):
        x, weight = torch.randn(3, 40, DIM), torch.randn(3, 40, DIM)
        x_upstream, x_layer = x.clone().requires_grad_(), x.clone().requires_grad_()
        arguments = {"return_all_codes": True, "rand_quantize_dropout_fixed_seed": step}
        results = []
        for module, inputs in ((layer, x_layer), (upstream, x_upstream)):
            torch.manual_seed(step)
            results.append(module(inputs, **arguments))
        (quantized, indices, losses, codes), (expected, expected_indices, expected_losses, expected_codes) = results
        assert torch.equal(indices, expected_indices)
        assert_close(quantized, expected)
        assert_close(losses, expected_losses)
        assert_close(codes, expected_codes)
        ((quantized * weight).sum() + 3 * losses.sum()).backward()
        ((expected * weight).sum() + 3 * expected_losses.sum()).backward()
        assert_close(x_layer.grad, torch.zeros_like(x) if x_upstream.grad is None else x_upstream.grad)
        for ours, theirs in zip(layer.parameters(), upstream.parameters(), strict=True):
            zeros = torch.zeros_like(theirs)
            assert_close(zeros if ours.grad is None else ours.grad, zeros if theirs.grad is None else theirs.grad)
        assert_same_state(layer, upstream)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    layer.eval(), upstream.eval()
    torch.manual_seed(7)
    quantized, indices, losses = layer(x)
    torch.manual_seed(7)
    expected, expected_indices, expected_losses = upstream(x)
    assert torch.equal(indices, expected_indices)
    assert_close(quantized, expected)
    assert_close(losses, expected_losses)
    assert_close(layer.get_codes_from_indices(indices), upstream.get_codes_from_indices(indices))
    assert_close(layer.get_output_from_indices(indices), upstream.get_output_from_indices(indices))


@pytest.mark.parametrize("options", BEAMS.values(), ids=BEAMS)
@pytest.mark.parametrize("masked", [False, True])
def test_beam_search(options, masked):
    """Upstream updates the first level alone after a beam search; ours updates all, as after any other."""
    upstream, layer = pair(**options)
    mask = torch.rand(3, 40) < 0.6 if masked else None
    for step in range(4):
        if step == 3:
            layer.eval(), upstream.eval()
        upstream.load_state_dict(layer.state_dict())
        x = torch.randn(3, 40, DIM)
        x_upstream, x_layer = x.clone().requires_grad_(), x.clone().requires_grad_()
        arguments = {"mask": mask, "rand_quantize_dropout_fixed_seed": step}
        quantized, indices, losses = layer(x_layer, **arguments)
        expected, expected_indices, expected_losses = upstream(x_upstream, **arguments)
        if masked:
            expected_indices = expected_indices.masked_fill(~mask.unsqueeze(-1), -1)
        assert torch.equal(indices, expected_indices)
        assert_close(quantized, expected)
        assert_close(losses, expected_losses)
        if step < 3:
            (quantized.sum() + losses.sum()).backward()
            (expected.sum() + expected_losses.sum()).backward()
            assert_close(x_layer.grad, x_upstream.grad)
        assert_same_state(layer.layers[0], upstream.layers[0])
    assert options.get("learnable_codebook") or (layer.layers[1]._codebook.cluster_size != 1).any()


@pytest.mark.parametrize("options", [{}, {"implicit_neural_codebook": True}], ids=["once", "levels"])
def test_beams_that_hold_everything_find_the_best(options):
    layer = nn.ResidualVQ(dim=3, codebook_size=4, num_quantizers=3, beam_size=16, **options).eval()
    x = torch.randn(1, 30, 3)
    _, indices, losses = layer(x)
    tuples = torch.cartesian_prod(*[torch.arange(4)] * 3)
    codes = layer.double().get_codes_from_indices(tuples.expand(30, -1, -1))  # [Q, N, K ** Q, D]
    errors = (x[0].double().unsqueeze(1) - codes.cumsum(0)).square().mean(-1).sum(0)
    chosen = errors.gather(1, (indices[0] * torch.tensor([16, 4, 1])).sum(-1, keepdim=True))
    assert (chosen - errors.min(1, keepdim=True).values).max() <= 64 * EPS * errors.max()
    assert abs(losses.double().sum() - chosen.mean()) <= 64 * EPS * chosen.mean()


def test_frozen_levels_stay():
    """Upstream's forward overrides the option."""
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS, freeze_codebook=True)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(torch.randn(2, 30, DIM))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}], ids=["once", "levels"])
@pytest.mark.parametrize("zeros", [True, False])
def test_masked_training(options, zeros):
    upstream, layer = pair(return_zeros_for_masked_padding=zeros, **options)
    mask = torch.rand(3, 40) < 0.6
    for _ in range(2):
        x = torch.randn(3, 40, DIM)
        quantized, indices, losses = layer(x, mask=mask)
        expected, expected_indices, expected_losses = upstream(x, mask=mask)
        assert torch.equal(indices, expected_indices.masked_fill(~mask.unsqueeze(-1), -1))
        assert_close(quantized, expected)
        if "use_cosine_sim" not in options:  # upstream compares unit codes with inputs of any length there
            assert_close(losses, expected_losses)
        assert_same_state(layer, upstream)


@pytest.mark.parametrize("layer_class", [nn.ResidualVQ, reference.ResidualVQ])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_of_a_loop_in_float64(layer_class, dtype):
    """Level by level with all distances in float64; a code may differ where two are equally far to rounding."""
    layer = layer_class(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS).eval()
    x = torch.randn(2, 50, DIM).to(dtype)
    quantized, indices, losses = layer(x)
    residual = x.double()
    bound = 4 * DIM * EPS * (x.double().norm(dim=-1).max() + layer.codebooks.double().norm(dim=-1).max()) ** 2
    for level, codebook in enumerate(layer.codebooks.double()):
        distances = torch.cdist(residual, codebook.expand(2, -1, -1)).square()
        chosen = distances.gather(-1, indices[..., level : level + 1])
        assert (chosen - distances.min(-1, keepdim=True).values).max() <= bound
        residual = residual - codebook[indices[..., level]]
    expected = (x.double() - residual).to(dtype)
    assert quantized.dtype == dtype
    assert (quantized - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert torch.equal(losses, torch.zeros(LEVELS))


@pytest.mark.parametrize("beam_size", [None, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_modules_keep_residuals_in_float32(dtype, beam_size):
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=6, use_cosine_sim=True, beam_size=beam_size)
    narrow = copy.deepcopy(layer).to(dtype).eval()
    x = torch.randn(2, 200, DIM).to(dtype)
    quantized, indices, _ = narrow(x)
    expected, expected_indices, _ = layer.eval()(x.float())
    assert torch.equal(indices, expected_indices)
    assert torch.equal(quantized, expected.to(dtype))


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}], ids=["once", "levels"])
def test_cross_entropy_of_given_indices(options):
    """Upstream's cannot be called; the distances to every level are those of the residuals of its own codes."""
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS, **options)
    x, targets = torch.randn(2, 30, DIM), torch.randint(CODES, (2, 30, LEVELS))
    quantized, loss = layer.eval()(x, indices=targets)
    expected, indices, _ = layer(x)
    assert_close(quantized, expected)
    residual, total = x.double(), torch.zeros((), dtype=torch.float64)
    for level, codebook in enumerate(layer.codebooks.double()):
        rows = torch.nn.functional.normalize(residual, dim=-1) if options else residual
        logits = rows @ codebook.mT if options else -torch.cdist(rows, codebook.expand(2, -1, -1))
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[..., level].flatten())
        residual = residual - codebook[indices[..., level]]
    assert abs(loss.double() - total) <= 64 * EPS * total
    assert torch.equal(layer(x, indices=list(targets.unbind(0)))[1], loss)


def test_channels_first_layouts():
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS, codebook_dim=5, accept_image_fmap=True)
    tokens = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS, codebook_dim=5)
    tokens.load_state_dict(layer.state_dict())
    x = torch.randn(2, DIM, 6, 7)
    layer.eval(), tokens.eval()
    quantized, indices, _, codes = layer(x, return_all_codes=True)
    expected, expected_indices, _, expected_codes = tokens(x.flatten(2).mT, return_all_codes=True)
    assert torch.equal(quantized.flatten(2).mT, expected)
    assert torch.equal(indices.flatten(1, 2), expected_indices)
    assert torch.equal(codes.flatten(2, 3), expected_codes)
    assert torch.equal(
        layer.get_output_from_indices(indices).flatten(1, 2), tokens.get_output_from_indices(expected_indices)
    )
    sequence = nn.ResidualVQ(
        dim=DIM, codebook_size=CODES, num_quantizers=LEVELS, codebook_dim=5, channel_last=False
    ).eval()
    sequence.load_state_dict(layer.state_dict())
    assert torch.equal(sequence(x.flatten(2))[1], expected_indices)
    assert torch.equal(tokens(x[:, :, 0, 0])[1], expected_indices[:, 0])


def test_levels_left_out_change_no_state_and_number_the_rest():
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS)
    for num_levels in (2, torch.tensor(2), torch.tensor([2, 2])):
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        _, indices, losses = layer(torch.randn(2, 30, DIM), num_levels=num_levels)
        assert (indices[..., :2] >= 0).all()
        assert (indices[..., 2:] == -1).all()
        assert (losses[:2] > 0).all()
        assert (losses[2:] == 0).all()
        for name, value in layer.state_dict().items():
            changes = name.startswith(("layers.0.", "layers.1.")) and not name.endswith("initted")
            assert torch.equal(value, before[name]) != changes, name


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}], ids=["once", "levels"])
@pytest.mark.parametrize("num_levels", [0, LEVELS + 1, torch.tensor(0), torch.tensor(LEVELS + 1)])
def test_impossible_numbers_of_levels(options, num_levels):
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS, **options)
    with pytest.raises(ValueError, match="num_levels: expected an integer from 1 to 4"):
        layer(torch.randn(2, 30, DIM), num_levels=num_levels)


def test_levels_of_every_sample():
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS).eval()
    x, num_levels = torch.randn(3, 20, DIM), torch.tensor([1, 4, 2])
    quantized, indices, _ = layer(x, num_levels=num_levels)
    for sample, count in enumerate(num_levels.tolist()):
        expected, expected_indices, _ = layer(x[sample : sample + 1], num_levels=count)
        assert torch.equal(quantized[sample], expected[0])
        assert torch.equal(indices[sample], expected_indices[0])


def test_dropout_draws_all_levels_and_no_others():
    layer = nn.ResidualVQ(
        dim=DIM, codebook_size=CODES, num_quantizers=6, quantize_dropout=True, quantize_dropout_cutoff_index=1
    )
    counts = {int((layer(torch.randn(1, 4, DIM))[1] >= 0)[0, 0].sum()) for _ in range(100)}
    assert counts == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("shared", [False, True])
def test_dead_codes_become_residuals(shared):
    layer = nn.ResidualVQ(
        dim=DIM,
        codebook_size=CODES,
        num_quantizers=2,
        decay=0.0,
        threshold_ema_dead_code=1,
        shared_codebook=shared,
    )
    with torch.no_grad():
        layer.layers[1]._codebook.embed[:] += 100  # far from every residual
        layer.layers[1]._codebook.embed[:, 0] = 0
    x = torch.randn(1, 64, DIM)
    first = layer.layers[0]._codebook.embed[0].clone()
    _, indices, _ = layer(x)
    if shared:
        return
    residuals = x[0] - first[indices[0, :, 0]]
    codes = layer.layers[1]._codebook.embed[0, 1:]
    assert (codes[:, None] == residuals).all(-1).any(-1).all()
    assert len(codes.unique(dim=0)) == len(codes)


@pytest.mark.parametrize("sizes", [CODES, (16, 8, 8, 12)])
def test_usage_of_the_codes(sizes):
    layer = nn.ResidualVQ(dim=DIM, codebook_size=sizes, num_quantizers=LEVELS, quantize_dropout=True)
    mask = torch.rand(2, 50) < 0.7
    _, indices, _, usage = layer(torch.randn(2, 50, DIM), mask=mask, num_levels=3, return_statistics=True)
    for level, size in enumerate(layer.codebook_sizes):
        counts, perplexity, share = usage[level] if isinstance(sizes, tuple) else [part[level] for part in usage]
        chosen = indices[..., level][indices[..., level] >= 0]
        assert len(chosen) == (mask.sum() if level < 3 else 0)
        expected = [int((chosen == code).sum()) for code in range(size)]
        assert counts.tolist() == expected
        assert share == sum(count > 0 for count in expected) / size
        shares = [count / max(1, len(chosen)) for count in expected if count]
        assert perplexity.item() == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_kmeans_makes_every_level_fit_its_residuals():
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS, kmeans_init=True, kmeans_iters=5)
    x = torch.randn(4, 100, DIM)
    layer(x)
    layer.eval()
    left = [(x - layer(x, num_levels=count)[0]).square().mean() for count in range(1, LEVELS + 1)]
    assert all(after < before for before, after in zip([x.square().mean(), *left], left, strict=False))
    assert all(bool(level._codebook.initted) for level in layer.layers)


def test_invalid_rows_leave_implicit_codes_alone():
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=3, implicit_neural_codebook=True)
    x = torch.randn(2, 20, DIM)
    x[0, 3, 2] = torch.nan
    quantized, indices, losses = layer(x)
    (torch.nan_to_num(quantized).sum() + losses.sum()).backward()
    assert (indices[0, 3] == -1).all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_invalid_rows_stay_alone():
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS)
    twin = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, DIM)
    spoilt = x.clone()
    spoilt[0, 3, 2] = torch.nan
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 3] = False
    quantized, indices, losses = layer(spoilt)
    expected, expected_indices, expected_losses = twin(x, mask=mask)
    assert quantized[0, 3].isnan().all()
    assert (indices[0, 3] == -1).all()
    assert torch.equal(quantized[mask], expected[mask])
    assert torch.equal(indices, expected_indices)
    assert torch.equal(losses, expected_losses)
    for ours, theirs in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"threshold_ema_dead_code": 2, "quantize_dropout": True}, {"codebook_dim": 5}])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(options, training):
    torch._dynamo.reset()
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=2, **options).train(training)
    twin = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=2, **options).train(training)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, DIM, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    quantized, indices, losses = compiled(x, num_levels=2 if options else None)
    expected, expected_indices, expected_losses = twin(x, num_levels=2 if options else None)
    assert torch.equal(indices, expected_indices)
    assert_close(quantized, expected)
    assert_close(losses, expected_losses)
    if options.get("quantize_dropout"):
        assert compiled(x)[1].shape == indices.shape
    if training:
        (quantized.sum() + losses.sum()).backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"num_quantizers": 1}, {}, {"codebook_size": (16, 8)}, {"shared_codebook": True}])
def test_gradients_of_a_compiled_step(options):
    """The update overwrites codes that the backward pass of the same graph needs."""
    torch._dynamo.reset()
    arguments = {"dim": DIM, "codebook_size": CODES, "num_quantizers": 2, **options}
    layer, twin = nn.ResidualVQ(**arguments), nn.ResidualVQ(**arguments)
    twin.load_state_dict(layer.state_dict())
    gradients = []
    for module in (torch.compile(layer, fullgraph=True), twin):
        x = torch.randn(2, 20, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
        quantized, _, losses = module(x)
        (quantized.square().sum() + losses.sum()).backward()
        gradients.append(x.grad)
    assert_close(*gradients)


def test_exports_in_evaluation():
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=3).eval()
    x = torch.randn(2, 20, DIM)
    exported = torch.export.export(layer, (x,)).module()
    for ours, theirs in zip(exported(x), layer(x), strict=True):
        assert torch.equal(ours, theirs)


GROUPED = {
    "default": {},
    "projected": {"codebook_dim": 3},
    "cosine": {"use_cosine_sim": True},
    "sizes": {"codebook_size": (8, 16), "num_quantizers": 2},
}


@pytest.mark.parametrize("options", GROUPED.values(), ids=GROUPED)
def test_groups(options):
    arguments = {"dim": DIM, "groups": 2, "codebook_size": CODES, "num_quantizers": LEVELS, **options}
    upstream, layer = upstream_package.GroupedResidualVQ(**arguments), nn.GroupedResidualVQ(**arguments)
    layer.load_state_dict(upstream.state_dict(), strict=True)
    for step in range(3):
        if step == 2:
            layer.eval(), upstream.eval()
        x = torch.randn(3, 40, DIM)
        x_layer, x_upstream = x.clone().requires_grad_(), x.clone().requires_grad_()
        quantized, indices, losses, codes = layer(x_layer, return_all_codes=True)
        expected, expected_indices, expected_losses, expected_codes = upstream(x_upstream, return_all_codes=True)
        assert torch.equal(indices, expected_indices)
        assert_close(quantized, expected)
        assert_close(losses, expected_losses)
        assert isinstance(codes, tuple)
        assert_close(torch.stack(codes), torch.stack(expected_codes))
        assert_same_state(layer, upstream)
        if step < 2:
            ((quantized**2).sum() + losses.sum()).backward()
            ((expected**2).sum() + expected_losses.sum()).backward()
            assert_close(x_layer.grad, x_upstream.grad)
    assert_close(layer.get_output_from_indices(indices), upstream.get_output_from_indices(indices))
    mask = torch.rand(3, 40) < 0.5
    assert (layer(x, mask=mask)[1][:, ~mask] == -1).all()


def test_groups_with_levels_of_every_sample():
    layer = nn.GroupedResidualVQ(dim=DIM, groups=2, codebook_size=CODES, num_quantizers=LEVELS).eval()
    num_levels = torch.tensor([1, 4, 2])
    _, indices, _ = layer(torch.randn(3, 20, DIM), num_levels=num_levels)
    assert torch.equal((indices >= 0).sum(-1), num_levels[:, None].expand(2, 3, 20))


def test_groups_of_feature_maps():
    arguments = {"dim": DIM, "groups": 2, "codebook_size": CODES, "num_quantizers": LEVELS}
    layer = nn.GroupedResidualVQ(**arguments, accept_image_fmap=True).eval()
    tokens = nn.GroupedResidualVQ(**arguments).eval()
    tokens.load_state_dict(layer.state_dict())
    x = torch.randn(2, DIM, 6, 7)
    quantized, indices, _ = layer(x)
    expected, expected_indices, _ = tokens(x.flatten(2).mT)
    assert torch.equal(quantized.flatten(2).mT, expected)
    assert torch.equal(indices.flatten(2, 3), expected_indices)
    assert_close(layer.get_output_from_indices(indices), quantized)
    targets = indices.clone()
    quantized, loss = layer(x, indices=targets)
    assert loss.ndim == 0
    assert quantized.shape == x.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 2}, "heads"),
        ({"num_quantizers": None}, "num_quantizers"),
        ({"codebook_size": (4, 4)}, "codebook_size"),
        ({"codebook_size": (4, 4, 4, 8), "shared_codebook": True}, "codebook_size"),
        ({"eval_beam_size": 2}, "eval_beam_size"),
        ({"beam_size": 0}, "beam_size"),
        ({"beam_size": 2, "beam_score_quantizer_weights": [1.0]}, "beam_score_quantizer_weights"),
        ({"diveq": True, "ema_update": True}, "diveq"),
        ({"quantize_dropout": True, "quantize_dropout_cutoff_index": -1}, "quantize_dropout_cutoff_index"),
    ],
)
def test_contradicting_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        nn.ResidualVQ(**{"dim": DIM, "codebook_size": CODES, "num_quantizers": LEVELS, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 3, DIM + 1)}, "x: expected shape"),
        ({"x": torch.zeros(2, 3, 4, DIM)}, "x: expected shape"),
        ({"x": torch.zeros(2, 3, DIM, dtype=torch.int64)}, "x: expected a tensor"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask"),
        ({"indices": torch.zeros(2, 3, dtype=torch.int64)}, "indices"),
        ({"num_levels": 9}, "num_levels"),
        ({"num_levels": torch.ones(3, dtype=torch.int64)}, "num_levels"),
        ({"indices": torch.zeros(2, 3, LEVELS, dtype=torch.int64), "beam_size": 2}, "beam_size"),
    ],
)
def test_bad_input(arguments, message):
    layer = nn.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS)
    with pytest.raises((TypeError, ValueError), match=message):
        layer(**{"x": torch.zeros(2, 3, DIM), **arguments})
