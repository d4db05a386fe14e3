"""How the codes of a layer start and change: k-means, replacement of dead codes, EMA by hand."""

import copy

import pytest
import torch
from sklearn.cluster import KMeans

from vqkernels import nn, reference

LAYERS = {"nn": nn.VectorQuantize, "reference": reference.VectorQuantize}
OPTIONS = {
    "default": {},
    "shared_heads": {"heads": 2, "codebook_dim": 4},
    "separate_heads": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "cosine": {"use_cosine_sim": True},
    "learnable": {"learnable_codebook": True},
}

each_layer = pytest.mark.parametrize("layer_class", LAYERS.values(), ids=LAYERS)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def rows_of(layer, x):
    """Rows [C, M, D] of the codebooks, from x [B, N, dim] without projections."""
    rows = x.reshape(-1, layer.heads, x.shape[-1] // layer.heads)
    rows = rows.transpose(0, 1) if layer.separate_codebook_per_head else rows.reshape(1, -1, rows.shape[-1])
    return torch.nn.functional.normalize(rows, dim=-1) if layer.use_cosine_sim else rows


def which_rows(codes, rows):
    """For each code [K, D] which of the rows [M, D] it is, -1 for none."""
    distance = (codes.unsqueeze(1) - rows.unsqueeze(0)).abs().amax(-1)
    return torch.where(distance.amin(-1) < 1e-6, distance.argmin(-1), -1)


def dead_layer(layer_class, alive, **options):
    """A layer whose codes are dead but for the first `alive`, which no row of a standard normal batch is close to."""
    layer = layer_class(8, 16, threshold_ema_dead_code=2, **options)
    layer._codebook.cluster_size.zero_()
    layer._codebook.cluster_size[:, :alive] = 1e4
    layer._codebook.embed_avg.zero_()
    layer._codebook.embed_avg[:, :alive] = 1e6
    return layer


@each_layer
@each_option
def test_dead_codes_become_distinct_rows(layer_class, options):
    layer = dead_layer(layer_class, alive=5, **options)
    x = torch.randn(4, 30, 8)
    x[0, 3] = torch.nan
    mask = torch.rand(4, 30) < 0.5
    usable = mask & x.isfinite().all(-1)
    before = copy.deepcopy(layer._codebook)
    layer(x, mask=mask)
    state = layer._codebook
    for h, candidates in enumerate(rows_of(layer, x[usable].unsqueeze(0))):
        rows = which_rows(state.embed[h], candidates)
        chosen = rows[state.cluster_size[h] == 2]
        assert len(chosen) >= 5
        assert (chosen >= 0).all()
        assert len(chosen.unique()) == len(chosen)
        assert (state.cluster_size[h] >= 2).all()
        replaced = state.cluster_size[h] == 2
        assert torch.equal(state.embed_avg[h][replaced], state.embed[h][replaced] * 2)
        assert not replaced[:5].any()
        if layer.learnable_codebook:
            assert torch.equal(state.embed[h][:5], before.embed[h][:5])


@each_layer
@pytest.mark.parametrize("usable", [0, 1, 6])
def test_no_more_codes_are_replaced_than_there_are_rows(layer_class, usable):
    layer = dead_layer(layer_class, alive=4, learnable_codebook=True)
    x, mask = torch.randn(1, 10, 8), torch.arange(10).unsqueeze(0) < usable
    before = layer.codebook.detach().clone()
    layer(x, mask=mask)
    changed = (layer.codebook != before).any(-1)
    assert changed.sum() == usable
    assert not changed[:4].any()
    assert sorted(which_rows(layer.codebook[changed], x[0]).tolist()) == list(range(usable))
    assert (layer._codebook.cluster_size[0][changed] == 2).all()


@each_layer
def test_which_codes_and_rows_is_random(layer_class):
    layer = dead_layer(layer_class, alive=0, learnable_codebook=True)
    x = torch.randn(1, 3, 8)
    pairs = set()
    for _ in range(200):
        fresh = copy.deepcopy(layer)
        fresh(x)
        changed = (fresh.codebook != layer.codebook).any(-1).nonzero().flatten()
        rows = which_rows(fresh.codebook[changed], x[0])
        pairs |= set(zip(changed.tolist(), rows.tolist(), strict=True))
    # 16 codes x 3 rows, each 200 times with probability 1/16: the chance to miss one is 48 (15/16)^200 = 1e-4.
    assert len(pairs) == 48


@each_layer
def test_codes_are_not_replaced_in_evaluation_or_frozen(layer_class):
    for call, train in (({}, False), ({"freeze_codebook": True}, True)):
        layer = dead_layer(layer_class, alive=0).train(train)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        layer(torch.randn(2, 20, 8), **call)
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@each_layer
def test_expire_codes_by_hand(layer_class):
    layer = dead_layer(layer_class, alive=3, channel_last=False)
    before = layer.codebook.clone()
    x = torch.randn(2, 8, 20)
    layer.eval().expire_codes_(x)
    assert torch.equal(layer.codebook, before)
    layer.train().expire_codes_(x)
    assert torch.equal(layer.codebook[:3], before[:3])
    assert (which_rows(layer.codebook[3:], x.mT.reshape(-1, 8)) >= 0).all()


def blobs(num_rows, num_centres, dim=8):
    centres = torch.randn(num_centres, dim) * 4
    return centres[torch.randint(num_centres, (num_rows,))] + 0.1 * torch.randn(num_rows, dim)


def error(layer, x):
    """Mean squared distance of rows to their codes, in float64."""
    distance = [
        torch.cdist(rows.double(), codes.double()).amin(-1).square().mean()
        for rows, codes in zip(rows_of(layer, x), layer._codebook.embed.detach(), strict=True)
    ]
    return torch.stack(distance).mean().item()


@each_layer
@each_option
def test_kmeans_finds_clusters(layer_class, options):
    x = blobs(600, 24).unsqueeze(0)
    start = layer_class(8, 16, kmeans_init=True, kmeans_iters=0, **options)
    centred = layer_class(8, 16, kmeans_init=True, kmeans_iters=10, **options)
    errors = {"random": error(start, x)}
    for name, layer in (("samples", start), ("centres", centred)):
        torch.manual_seed(4)
        layer.eval()(x)
        assert layer._codebook.initted
        errors[name] = error(layer, x)
    assert errors["centres"] < errors["samples"] < errors["random"]


@each_layer
def test_kmeans_ends_where_scikit_learn_does(layer_class):
    """From the same rows, both run Lloyd's iterations to the end."""
    x = torch.randn(300, 8)
    layer = layer_class(8, 12, kmeans_init=True, kmeans_iters=0).eval()
    torch.manual_seed(4)
    layer(x)
    start = layer.codebook.clone()
    assert (which_rows(start, x) >= 0).all()
    layer = layer_class(8, 12, kmeans_init=True, kmeans_iters=200).eval()
    torch.manual_seed(4)
    layer(x)
    expected = KMeans(12, init=start.numpy(), n_init=1, max_iter=500, tol=0, algorithm="lloyd").fit(x.numpy())
    centres = torch.from_numpy(expected.cluster_centers_)
    assert (layer.codebook - centres).abs().max() < 1e-5
    counts = torch.bincount(torch.from_numpy(expected.labels_).long(), minlength=12)
    assert torch.equal(layer._codebook.cluster_size[0], counts.float())
    average = layer._codebook.embed_avg[0] / counts.unsqueeze(-1)
    assert (average - centres).abs().max() < 1e-5


@each_layer
@each_option
def test_kmeans_takes_valid_rows_alone(layer_class, options):
    x, mask = blobs(60, 24).reshape(2, 30, 8), torch.rand(2, 30) < 0.5
    x[~mask] = torch.where(torch.rand(x[~mask].shape) < 0.5, torch.nan, 1e4)
    x[0, 0], mask[0, 0] = torch.inf, True
    layer = layer_class(8, 8, kmeans_init=True, **options).eval()
    layer(x, mask=mask)
    assert layer.codebook.isfinite().all()
    assert layer.codebook.abs().max() <= x[mask][1:].abs().max()


@each_layer
def test_kmeans_with_fewer_rows_than_codes(layer_class):
    layer = layer_class(8, 16, kmeans_init=True)
    x = torch.randn(1, 5, 8)
    layer.eval()(x)
    start = layer.codebook.clone()
    assert sorted(set(which_rows(start, x[0]).tolist())) == [0, 1, 2, 3, 4]
    layer.train()
    for _ in range(20):
        layer(x)
    # Codes that no row chooses stay where they are, but for the smoothing: their size is decay^steps.
    drift = (layer.codebook - start).abs().max() / start.abs().max()
    assert drift <= 1.01 * layer.eps / 0.8**20


@each_layer
def test_kmeans_runs_once(layer_class):
    layer = layer_class(8, 16, kmeans_init=True, freeze_codebook=True)
    assert not layer._codebook.initted
    layer(torch.randn(0, 5, 8))
    assert not layer._codebook.initted
    layer(torch.randn(2, 40, 8))
    first = layer.codebook.clone()
    layer(torch.randn(2, 40, 8))
    assert torch.equal(layer.codebook, first)

    loaded = layer_class(8, 16, kmeans_init=True, freeze_codebook=True)
    loaded.load_state_dict(layer.state_dict())
    loaded(torch.randn(2, 40, 8))
    assert torch.equal(loaded.codebook, first)

    # A state from before the first batch asks for k-means, whatever the layer was built with.
    again = layer_class(8, 16, freeze_codebook=True)
    again.load_state_dict(layer_class(8, 16, kmeans_init=True).state_dict())
    x = torch.randn(2, 8, 8)
    again(x)
    assert (which_rows(again.codebook, x.reshape(-1, 8)) >= 0).all()


@each_layer
def test_initialised_by_hand(layer_class):
    layer = layer_class(8, 16, kmeans_init=True, freeze_codebook=True)
    before = layer.codebook.clone()
    layer._codebook.initted.fill_(True)
    layer(torch.randn(2, 40, 8))
    assert torch.equal(layer.codebook, before)


@each_layer
@each_option
def test_manual_ema_is_ema_in_two_steps(layer_class, options):
    if options.get("learnable_codebook"):
        options = {"eps": 1e-3}
    automatic = layer_class(8, 16, **options)
    manual = layer_class(8, 16, manual_ema_update=True, **options)
    manual.load_state_dict(automatic.state_dict())
    for _ in range(3):
        x = torch.randn(2, 40, 8)
        before = manual.codebook.clone()
        automatic(x), manual(x)
        assert torch.equal(manual.codebook, before)
        manual._codebook.update_ema()
        for a, b in zip(manual.state_dict().values(), automatic.state_dict().values(), strict=True):
            assert (a.float() - b.float()).abs().max() <= 16 * torch.finfo(torch.float32).eps * b.float().abs().max()


@each_layer
@each_option
def test_update_from_indices_is_a_training_step(layer_class, options):
    step, updated = (layer_class(8, 16, **options) for _ in range(2))
    updated.load_state_dict(step.state_dict())
    x, mask = torch.randn(2, 40, 8), torch.rand(2, 40) < 0.5
    x[1, 3] = torch.nan
    _, indices, _ = step(x, mask=mask)
    updated.update_indices(x, indices.clamp(min=0), mask)
    assert all(
        torch.equal(a, b) for a, b in zip(step.state_dict().values(), updated.state_dict().values(), strict=True)
    )
