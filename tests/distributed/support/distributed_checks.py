"""Checks that run in every process of a distributed run; as a script, runs all of them.

Usage: torchrun --nproc-per-node=N distributed_checks.py FOLDER. Every process writes FOLDER/rank<i>.json: the name of
each check and what went wrong, "" for nothing. The first failure ends the run, as processes are no longer in step.
"""

import copy
import datetime
import hashlib
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import vector_quantize_pytorch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from vqkernels import reference
from vqkernels.nn import ResidualSimVQ, ResidualVQ, VectorQuantize
from vqkernels.reference import synchronization
from vqkernels.reference.codebook import Codebook, CodeUpdate

PROCESSES = (2, 4)
CHECKS = {processes: {} for processes in PROCESSES}


def check(function):
    """Registers a check for all numbers of processes."""
    for checks in CHECKS.values():
        checks[function.__name__] = function
    return function


def check_of_two(function):
    """Registers a check that takes long and for which more processes make no difference."""
    CHECKS[2][function.__name__] = function
    return function


def codebooks(model):
    return [module for module in model.modules() if isinstance(module, Codebook)]


def raw_state(model):
    """The tensors of all codebooks as they lie there, without finishing anything."""
    names = ("initted", "cluster_size", "embed_avg", "embed")
    return [getattr(codebook, name).detach() for codebook in codebooks(model) for name in names]


def digest(tensors):
    """A hash of the bits of tensors."""
    content = hashlib.sha256()
    for t in tensors:
        content.update(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def assert_same_everywhere(tensors):
    assert_same_digests([digest(tensors)])


def assert_same_digests(digests):
    """That all processes have the same list."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, digests)
    for step, found in enumerate(zip(*lists, strict=True)):
        assert len(set(found)) == 1, f"number {step}: {found}"


def gathered(x):
    """Joins x of all processes, whatever their sizes, in order of rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return torch.cat(parts)


def seeded_generator(*numbers):
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


class Autoencoder(nn.Module):
    """Several quantizers, each with a peculiarity."""

    def __init__(self, kmeans_init=True):
        super().__init__()
        self.encoder = nn.Linear(6, 12)
        self.first = VectorQuantize(12, 24, kmeans_init=kmeans_init, threshold_ema_dead_code=2)
        self.middle = nn.Linear(12, 12)
        self.second = VectorQuantize(
            12, 10, heads=2, codebook_dim=5, separate_codebook_per_head=True, threshold_ema_dead_code=1
        )
        self.third = VectorQuantize(12, 8, use_cosine_sim=True, kmeans_init=kmeans_init, decay=0.95)
        self.decoder = nn.Linear(12, 6)

    def forward(self, x, mask=None, with_second=True):
        z, _, first_loss = self.first(self.encoder(x), mask=mask)
        z = torch.tanh(self.middle(z))
        losses = first_loss
        if with_second:
            z, _, second_loss = self.second(z, mask=mask)
            losses = losses + second_loss
        z, _, third_loss = self.third(z, mask=mask)
        return self.decoder(z), losses + third_loss


def batch(rank, step, rows=40):
    """Rows of a process that wander, so that codes die."""
    noise = torch.randn(2, rows // 2, 6, generator=seeded_generator(rank, step))
    return noise + torch.tensor([step / 20, -step / 30, rank, 0, 1, 2])


def train(model, rank, steps, start=0, after_forward=None, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(start, start + steps):
        x = batch(rank, step)
        output, loss = model(x, **kwargs)
        if after_forward is not None:
            after_forward(step)
        optimizer.zero_grad()
        (F.mse_loss(output, x) + loss).backward()
        optimizer.step()
        yield step


def collectives(function):
    """How often each collective was launched, as the profiler saw it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))


def no_collectives(function):
    """What a function returns that must not need the other processes."""
    results = []
    launched = collectives(lambda: results.append(function()))
    assert not launched, launched
    return results[0]


def equal_over_200_steps(rank, broadcast_buffers):
    model = Autoencoder()
    parallel = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    digests = []
    revived = 0
    for _ in train(parallel, rank, 200):
        # As they lie there: the backward pass has applied what forward had summed.
        digests.append(digest(raw_state(model)))
        revived += int((model.first._codebook.cluster_size == 2).sum())
        revived += int((model.second._codebook.cluster_size == 1).sum())
    assert_same_digests(digests)
    assert_same_everywhere(model.parameters())
    assert len(set(digests)) == 200
    assert revived > 20
    assert all(t.isfinite().all() for t in raw_state(model))


@check
def equal_over_200_steps_with_broadcast_buffers(rank, folder):
    equal_over_200_steps(rank, broadcast_buffers=True)


@check
def equal_over_200_steps_without_broadcast_buffers(rank, folder):
    equal_over_200_steps(rank, broadcast_buffers=False)


def trained_digest(rank, broadcast_buffers, after_forward=None, backward=True, reader=None):
    """The codebooks after some steps from a fixed start, with random numbers that only the step decides about."""
    torch.manual_seed(5)
    model = Autoencoder(kmeans_init=False)
    parallel = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    for step in range(4):
        torch.manual_seed(100 * step + rank)
        output, loss = parallel(batch(rank, step))
        if rank == reader:
            after_forward(model)
        if backward:
            (output.square().mean() + loss).backward()
    return digest(raw_state(model.eval()))


@check
def one_process_may_read_alone(rank, folder):
    """Whoever reads between forward and backward, or without a backward pass, the codebooks stay the same."""
    readings = {
        "state_dict": lambda model: model.state_dict(),
        "evaluation": lambda model: model.eval()(batch(0, 0)) and model.train(),
    }
    for backward in (True, False):
        for broadcast_buffers in (True, False):
            expected = trained_digest(rank, broadcast_buffers, backward=backward)
            assert_same_digests([expected])
            for name, reading in readings.items():
                for reader in (0, dist.get_world_size() - 1):
                    found = trained_digest(rank, broadcast_buffers, reading, backward, reader)
                    assert found == expected, (name, reader, backward, broadcast_buffers)


@check
def the_backward_pass_applies_the_step(rank, folder):
    """Also in the step after one in which a quantizer was skipped."""
    model = nn.ModuleList(
        [*[VectorQuantize(6, 8) for _ in range(3)], ResidualVQ(dim=6, num_quantizers=3, codebook_size=8)]
    )
    for skipped in range(4):
        for step in range(6):
            x = batch(rank, step).requires_grad_()
            used = [layer for i, layer in enumerate(model) if step != 2 or i != skipped]
            output = sum(layer(x)[0].sum() for layer in used)
            before = [codebook.embed.clone() for codebook in codebooks(model)]
            output.backward()
            after = [codebook.embed for codebook in codebooks(model)]
            if step != 2:
                assert all((a != b).any() for a, b in zip(after, before, strict=True)), (skipped, step)


@check
def what_is_read_is_up_to_date(rank, folder):
    """Without a backward pass every way of reading shows the step that forward has made, and launches nothing."""
    for read in (
        lambda layer: layer.state_dict()["_codebook.embed"],
        lambda layer: layer.codebook.unsqueeze(0),
        lambda layer: layer.eval()._codebook.embed,
        lambda layer: copy.deepcopy(layer)._codebook.embed,
        lambda layer: layer.double()._codebook.embed,
        lambda layer: layer.get_codes_from_indices(torch.arange(8)).unsqueeze(0),
    ):
        layer = VectorQuantize(6, 8)
        for step in range(3):
            layer(batch(rank, step))
        before = layer._codebook.embed.clone()
        embed = no_collectives(lambda: read(layer).clone())  # noqa: B023
        assert (embed != before).any()
        assert_same_everywhere([embed])


@check
def codes_that_are_set_stay(rank, folder):
    """A step that is not applied yet does not touch a state that is loaded or set after it."""
    for change in (
        lambda layer, codes: setattr(layer, "codebook", codes),
        lambda layer, codes: layer.load_state_dict(layer.state_dict() | {"_codebook.embed": codes.unsqueeze(0)}),
    ):
        torch.manual_seed(3)
        layer = VectorQuantize(6, 8)
        codes = torch.randn(8, 6)
        for step in range(3):
            layer(batch(rank, step))
        change(layer, codes)
        assert torch.equal(layer.state_dict()["_codebook.embed"][0], codes)
        x = batch(rank, 7)
        nearest = torch.cdist(x.double(), codes.double()).argmin(-1)
        assert torch.equal(layer(x)[1], nearest)
        assert (layer.eval().codebook != codes).any()
        assert_same_everywhere(raw_state(layer))


def one_step(rank, x, mask=None, **kwargs):
    """The layer after one step without memory (decay 0), and truth: counts and float64 sums of all rows."""
    torch.manual_seed(11)
    layer = VectorQuantize(x.shape[-1], 8, decay=0.0, **kwargs)
    torch.manual_seed(rank)
    start = layer.codebook.clone()
    _, indices, _ = layer(x, mask=mask)
    layer.eval()
    rows, indices = gathered(x.flatten(0, 1).double()), gathered(indices.flatten())
    taken = indices >= 0
    counts = torch.zeros(8, dtype=torch.int64).index_add_(0, indices[taken], torch.ones_like(indices[taken]))
    sums, absolute = (
        torch.zeros(8, x.shape[-1], dtype=torch.float64).index_add_(0, indices[taken], values[taken])
        for values in (rows, rows.abs())
    )
    return layer, start, counts, sums, absolute


def assert_is_truth(layer, counts, sums, absolute):
    codebook = layer._codebook
    assert_same_everywhere(raw_state(layer))
    assert torch.equal(codebook.cluster_size[0], counts.float())
    # Sequential sums of up to 256 rows, then one addition for each process and the interpolation.
    error = (256 + dist.get_world_size() + 2) * torch.finfo(torch.float32).eps / 2 * absolute
    assert ((codebook.embed_avg[0].double() - sums).abs() <= error).all()


@check
def a_step_is_that_of_all_rows(rank, folder):
    x = torch.randn(3, 50 + 20 * rank, 5, generator=seeded_generator(rank))
    layer, start, counts, sums, absolute = one_step(rank, x)
    assert_is_truth(layer, counts, sums, absolute)
    total = counts.sum()
    smoothed = (counts.double() + 1e-5) / (total + 8 * 1e-5) * total
    codes = layer._codebook.embed_avg[0].double() / smoothed.unsqueeze(-1)
    error = 8 * torch.finfo(torch.float32).eps * codes.abs()
    assert ((layer.codebook.double() - codes).abs() <= error).all()
    assert (layer.codebook != start).any()


@check
def a_process_without_rows_does_not_count(rank, folder):
    for absent in range(dist.get_world_size()):
        for kind in ("no rows", "masked", "NaN"):
            x = torch.randn(2, 30, 5, generator=seeded_generator(rank, absent))
            mask = torch.ones(2, 30, dtype=torch.bool)
            if rank == absent:
                if kind == "no rows":
                    x, mask = x[:, :0], mask[:, :0]
                elif kind == "masked":
                    mask = torch.zeros_like(mask)
                else:
                    x = torch.full_like(x, torch.nan)
            for reproducible in (False, True):
                torch.manual_seed(2)
                options = {"kmeans_init": True, "kmeans_iters": 2, "threshold_ema_dead_code": 3}
                trained = VectorQuantize(5, 8, reproducible=reproducible, **options)
                for _ in range(3):
                    z = x.clone().requires_grad_()
                    quantized, _, loss = trained(z, mask=mask)
                    (quantized.nan_to_num().sum() + loss.nan_to_num()).backward()
                assert_same_everywhere(raw_state(trained))
                assert all(t.isfinite().all() for t in raw_state(trained))
                assert trained._codebook.initted
            layer, _, counts, sums, absolute = one_step(rank, x, mask)
            assert counts.sum() == 60 * (dist.get_world_size() - 1)
            assert_is_truth(layer, counts, sums, absolute)


@check
def no_rows_anywhere(rank, folder):
    torch.manual_seed(4)
    for reproducible in (False, True):
        layer = VectorQuantize(5, 8, kmeans_init=True, threshold_ema_dead_code=2, reproducible=reproducible)
        layer(torch.randn(2, 0, 5))
        layer(torch.full((1, 4, 5), torch.nan))
        layer.eval()
        assert not layer._codebook.initted
        assert layer.codebook.isfinite().all()
        assert_same_everywhere(raw_state(layer))


@check
def counts_beyond_float32_are_exact(rank, folder):
    codebook = VectorQuantize(3, 4)._codebook
    counts = torch.tensor([[2**30 + 1 + rank, 2**24 + 1, 4095 + rank, 0]])
    update = synchronization.total(codebook, CodeUpdate(counts, torch.zeros(1, 4, 3)), None, None)
    world = dist.get_world_size()
    ranks = world * (world - 1) // 2
    assert update.counts.tolist() == [[world * (2**30 + 1) + ranks, world * (2**24 + 1), world * 4095 + ranks, 0]]


def rank_of(rows):
    return rows[..., 0].long()


def numbered_rows(rank, count):
    """[1, count, 2], distinct rows that tell their process."""
    return torch.stack([torch.full((count,), float(rank)), torch.arange(count) + 0.5], -1).unsqueeze(0)


def assert_fair(chosen, counts):
    """That of all draws the processes have the share of their rows, within 6 standard deviations of a binomial."""
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    draws = chosen.numel()
    found = torch.bincount(chosen.flatten(), minlength=len(counts)).double() / draws
    assert ((found - share).abs() < 6 * (share * (1 - share) / draws).sqrt()).all(), (found, share)


@check
def dead_codes_become_rows_of_all_processes(rank, folder):
    counts = [20 * (r + 1) for r in range(dist.get_world_size())]
    rows = numbered_rows(rank, counts[rank])
    codebook = VectorQuantize(2, 64, threshold_ema_dead_code=2)._codebook
    valid = torch.ones(rows.shape[:2], dtype=torch.bool)
    updates = torch.zeros(1, 64, dtype=torch.int64)
    updates[0, 0] = counts[rank]
    ranks = []
    drawn = []
    for _ in range(250):
        candidates, usable = codebook.draw_candidates(lambda positions: rows[:, positions[0]], valid)
        update = CodeUpdate(updates, torch.zeros(1, 64, 2), candidates, usable, torch.rand(1, 64))
        total = synchronization.total(codebook, update, None, None)
        first = total.candidates[0, :6]
        assert total.usable[0, :6].all()
        assert len(first.unique(dim=0)) == 6
        drawn.append(digest([total.candidates[total.usable], total.keys]))
        ranks.append(rank_of(first))
    assert_same_digests(drawn)
    assert_fair(torch.stack(ranks), counts)


@check
def revived_codes_are_rows(rank, folder):
    """A codebook whose codes all die becomes distinct rows of the global batch, the same everywhere."""
    for reproducible in (False, True):
        layer = VectorQuantize(2, 12, threshold_ema_dead_code=100, reproducible=reproducible)
        rows = numbered_rows(rank, 9)
        layer(rows)
        layer.eval()
        assert_same_everywhere(raw_state(layer))
        everything = {tuple(row) for row in gathered(rows[0]).tolist()}
        codes = {tuple(code) for code in layer.codebook.tolist()}
        assert codes <= everything
        assert len(codes) == 12
        layer.train()
        layer.expire_codes_(rows + 100)
        assert {tuple(code) for code in layer.codebook.tolist()} == codes  # all of them have size 100
        layer._codebook.cluster_size.zero_()
        layer.expire_codes_(rows + 100)
        assert len({tuple(code) for code in (layer.codebook - 100).tolist()} & everything) == 12
        assert_same_everywhere(raw_state(layer))


@check
def kmeans_starts_from_rows_of_all_processes(rank, folder):
    counts = [15 + 60 * r for r in range(dist.get_world_size())]
    rows = numbered_rows(rank, counts[rank])
    ranks = []
    for _ in range(40):
        layer = VectorQuantize(2, 10, kmeans_init=True, kmeans_iters=0)
        layer.eval()
        layer(rows)
        assert len(layer.codebook.unique(dim=0)) == 10
        ranks.append(rank_of(layer.codebook))
    assert_same_everywhere(ranks)
    assert_fair(torch.stack(ranks), counts)


@check
def kmeans_is_that_of_all_rows(rank, folder):
    """Lloyd's iterations in float64 from the same rows: `reproducible` takes them whatever follows."""
    x = torch.randn(1, 60, 3, generator=seeded_generator(rank)) + 20 * torch.randint(
        0, 4, (1, 60, 1), generator=seeded_generator(rank, 1)
    )
    rows = gathered(x[0]).double()
    start, found, plain = (
        VectorQuantize(3, 6, kmeans_init=True, kmeans_iters=iters, reproducible=reproducible).eval()
        for iters, reproducible in ((0, True), (4, True), (50, False))
    )
    for layer in (start, plain, found):
        layer(x)
        assert_same_everywhere(raw_state(layer))
    codes = start.codebook.double()
    for _ in range(4):
        nearest = torch.cdist(rows, codes).argmin(1)
        sums = torch.zeros_like(codes).index_add_(0, nearest, rows)
        counts = torch.bincount(nearest, minlength=6).unsqueeze(-1)
        codes = torch.where(counts > 0, sums / counts.clamp(min=1), codes)
    # A rounding of the sum, of the quotient and of the fixed-point values of magnitude below 128.
    error = 4 * torch.finfo(torch.float32).eps * codes.abs() + 128 * 2**-31
    assert ((found.codebook.double() - codes).abs() <= error).all()
    counts = plain._codebook.cluster_size[0]
    assert counts.sum() == len(rows)
    # Random rows to start from, but in the end codes are the means of what is nearest.
    codes = plain.codebook.double()
    nearest = torch.cdist(rows, codes).argmin(1)
    sums, absolute = (torch.zeros_like(codes).index_add_(0, nearest, values) for values in (rows, rows.abs()))
    assert torch.equal(torch.bincount(nearest, minlength=6), counts.long())
    error = (256 + dist.get_world_size() + 2) * torch.finfo(torch.float32).eps * absolute
    assert ((codes * counts.unsqueeze(-1) - sums).abs() <= error).all()


@check
def kmeans_with_few_rows(rank, folder):
    """Fewer rows than codes: they repeat."""
    for reproducible in (False, True):
        layer = VectorQuantize(2, 12, kmeans_init=True, kmeans_iters=0, reproducible=reproducible).eval()
        rows = numbered_rows(rank, 1 if rank else 2)
        layer(rows)
        assert_same_everywhere(raw_state(layer))
        everything = gathered(rows[0])
        assert {tuple(code) for code in layer.codebook.tolist()} == {tuple(row) for row in everything.tolist()}


@check
def equal_rows_are_drawn_once(rank, folder):
    """With `reproducible`, wherever they are."""
    world = dist.get_world_size()
    for offset in range(6):
        layer = VectorQuantize(2, world + 1, kmeans_init=True, kmeans_iters=0, reproducible=True).eval()
        own, shared = torch.tensor([[rank + 1.0, offset]]), torch.tensor([[0.0, offset]])
        layer(torch.cat([own, shared.expand(5, -1)]).unsqueeze(0))
        assert layer.codebook.sort(0).values.tolist() == [[float(r), float(offset)] for r in range(world + 1)]


@check
def kmeans_of_one_process(rank, folder):
    """With sync_kmeans=False the rows of the first process decide for all."""
    layer = VectorQuantize(2, 4, kmeans_init=True, kmeans_iters=2, sync_kmeans=False)
    layer(numbered_rows(rank, 20))
    layer.eval()
    assert_same_everywhere(raw_state(layer))


@check
def state_of_the_first_process_counts(rank, folder):
    """A checkpoint that one process alone has loaded; DistributedDataParallel hands it on behind our back."""
    model = VectorQuantize(6, 8, kmeans_init=True)
    codes = torch.arange(48.0).view(8, 6)
    if rank == 0:
        model.codebook = codes
    parallel = DistributedDataParallel(nn.Sequential(nn.Linear(6, 6), model))
    parallel.eval()(batch(rank, 0))
    assert torch.equal(model.codebook, codes)
    parallel.train()
    for step in range(3):
        parallel(batch(rank, step))
    assert_same_everywhere(raw_state(model.eval()))


@check
def processes_need_not_start_equal(rank, folder):
    torch.manual_seed(rank)
    layer = VectorQuantize(6, 8)
    for step in range(3):
        layer(batch(rank, step))
    assert_same_everywhere(raw_state(layer.eval()))


@check
def random_numbers_may_be_shared_or_not(rank, folder):
    for seed in (7, 7 + rank):
        model = Autoencoder()
        torch.manual_seed(seed)
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
        assert_same_digests([digest(raw_state(model)) for _ in train(parallel, rank, 8)])


@check
def a_quantizer_may_be_skipped(rank, folder):
    torch.manual_seed(1)
    model = Autoencoder()
    for step in range(40):
        torch.manual_seed(100 * step + rank)
        output, loss = model(batch(rank, step), with_second=step % 5 not in (1, 3))
        (output.square().mean() + loss).backward()
    assert_same_everywhere(raw_state(model.eval()))


def reproducible_training(rank, world):
    """The codebooks after 40 steps over rows that processes share unevenly; one quantizer is skipped now and then."""
    borders = {1: [0, 90], 2: [0, 11, 90], 4: [0, 30, 30, 71, 90]}[world]
    torch.manual_seed(17)
    options = {"reproducible": True, "threshold_ema_dead_code": 1}
    layers = [
        VectorQuantize(6, 20, kmeans_init=True, **options),
        VectorQuantize(6, 16, heads=2, separate_codebook_per_head=True, codebook_dim=3, **options),
        VectorQuantize(6, 12, use_cosine_sim=True, kmeans_init=True, **options),
        ResidualVQ(dim=6, num_quantizers=3, codebook_size=10, **options),
        ResidualVQ(dim=6, num_quantizers=3, codebook_size=10, shared_codebook=True, **options),
    ]
    model = nn.ModuleList(layers)
    states = []
    for step in range(40):
        torch.manual_seed(1000 * step + rank)
        rows = torch.randn(1, 90, 6, generator=seeded_generator(step)) * 10 ** (step % 3) + step / 10
        rows[:, ::13] = rows[:, :1]  # equal rows
        rows[:, 5] = torch.nan
        mask = torch.rand(1, 90, generator=seeded_generator(step, 1)) < 0.8
        part = slice(borders[rank], borders[rank + 1])
        for layer in layers[:1] + layers[1 + (step % 4 == 1) :]:
            layer(rows[:, part], mask=mask[:, part])
        states += [] if step % 10 else [t.clone() for t in raw_state(model.train())]
    return [*states, *raw_state(model.eval())]


@check
def reproducible_across_world_sizes(rank, folder):
    states = reproducible_training(rank, dist.get_world_size())
    assert_same_everywhere(states)
    if rank == 0:
        torch.save(states, folder / "reproducible.pt")


def training_step(model, rank):
    """A function that runs a step of a quantizer or an autoencoder."""
    return lambda: sum(
        loss.sum() for loss in model(batch(rank, 0).requires_grad_())[1:] if loss.requires_grad
    ).backward()


@check
def one_collective_a_step(rank, folder):
    models = {
        "several quantizers": Autoencoder(),
        "ResidualVQ": ResidualVQ(dim=6, num_quantizers=8, codebook_size=16, threshold_ema_dead_code=2),
        "ResidualVQ level by level": ResidualVQ(dim=6, num_quantizers=8, codebook_size=16, use_cosine_sim=True),
    }
    counts = {}
    for name, model in models.items():
        step = training_step(model, rank)
        step()
        counts[name] = [collectives(step) for _ in range(3)]
    if rank == 0:
        (folder / "collectives.json").write_text(json.dumps(counts))
    assert all(count == [{"c10d::allreduce_": 1}] * 3 for count in counts.values()), counts


@check_of_two
def upstream_takes_two_collectives_a_level(rank, folder):
    step = training_step(vector_quantize_pytorch.ResidualVQ(dim=6, num_quantizers=8, codebook_size=16), rank)
    step()
    assert collectives(step) == {"c10d::allreduce_": 16}


@check
def reproducible_takes_two_collectives_a_step(rank, folder):
    model = Autoencoder()
    for codebook in codebooks(model):
        codebook.reproducible = True
    model(batch(rank, 0))
    assert collectives(lambda: model(batch(rank, 1))) == {"c10d::allreduce_": 2}


@check
def learnable_codebook_is_a_parameter(rank, folder):
    torch.manual_seed(rank)
    layer = VectorQuantize(6, 16, learnable_codebook=True, ema_update=False)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 6), layer))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = layer.codebook.clone()
    for step in range(20):
        quantized, _, loss = model(batch(rank, step))
        optimizer.zero_grad()
        (quantized.square().mean() + loss).backward()
        assert_same_everywhere([layer._codebook.embed.grad])
        optimizer.step()
        assert_same_everywhere(raw_state(layer))
    assert (layer.codebook != start).any()
    assert collectives(lambda: layer(batch(rank, 0))) == {}


@check
def learnable_codebook_with_dead_codes(rank, folder):
    torch.manual_seed(rank)
    layer = VectorQuantize(6, 16, learnable_codebook=True, ema_update=False, threshold_ema_dead_code=2)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 6), layer))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(20):
        quantized, _, loss = model(batch(rank, step))
        optimizer.zero_grad()
        (quantized.square().mean() + loss).backward()
        optimizer.step()
        assert_same_everywhere(raw_state(layer))


@check
def learnable_codebook_read_by_one_process(rank, folder):
    """Without a gradient for the rows, and before the optimizer moves the codes."""
    torch.manual_seed(0)
    layer = VectorQuantize(6, 16, learnable_codebook=True, ema_update=False, threshold_ema_dead_code=2)
    model = DistributedDataParallel(layer)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(10):
        _, _, loss = model(batch(rank, step))
        optimizer.zero_grad()
        loss.backward()
        if rank == 0:
            no_collectives(layer.state_dict)
        optimizer.step()
        assert_same_everywhere(raw_state(layer))


@check
def levels_that_are_left_out(rank, folder):
    """The others are summed in the same step, and trained by DistributedDataParallel."""
    options = {"dim": 6, "num_quantizers": 4, "codebook_size": 8, "quantize_dropout": True}
    for cosine in (False, True):
        torch.manual_seed(0)
        layer = ResidualVQ(**options, use_cosine_sim=cosine)
        training_step(layer, rank)()
        before = digest(raw_state(layer))
        for number in range(6):
            assert collectives(training_step(layer, rank)) == {"c10d::allreduce_": 1}, number
            assert_same_everywhere(raw_state(layer))
            assert digest(raw_state(layer)) != before
            before = digest(raw_state(layer))
    torch.manual_seed(0)
    model = DistributedDataParallel(ResidualSimVQ(**options))
    for number in range(6):
        quantized, _, losses = model(batch(rank, number))
        (quantized.sum() + losses.sum()).backward()
    assert_same_everywhere([p.grad for p in model.parameters()])


@check
def fully_sharded(rank, folder):
    torch.manual_seed(rank)
    model = Autoencoder()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.encoder, model.middle, model):
        fully_shard(module, mesh=mesh)
    assert_same_digests([digest(raw_state(model)) for _ in train(model, rank, 20)])
    assert_same_everywhere([model.state_dict()["first._codebook.embed"]])


@check_of_two
def compiled(rank, folder):
    """With a break of the graph where processes meet."""
    torch.manual_seed(0)
    layer = VectorQuantize(6, 8)
    twin = copy.deepcopy(layer)
    step = torch.compile(layer, backend="eager")
    for number in range(3):
        x = batch(rank, number).requires_grad_()
        quantized, indices, loss = step(x)
        (quantized.sum() + loss).backward()
        assert torch.equal(twin(x)[1], indices)
        # Not equal: in which order four numbers are added depends on where in the buffer they lie.
        torch.testing.assert_close(twin.codebook, layer._codebook.embed[0])


@check
def accumulated_statistics_are_summed_once(rank, folder):
    """Two halves of the batch, gathered before the step, are the whole batch."""
    torch.manual_seed(0)
    whole = VectorQuantize(6, 8)
    halves = copy.deepcopy(whole)
    for step in range(3):
        x = batch(rank, step)
        whole(x)
        codes = halves.eval().codebook
        halves.train()
        for half in x:
            indices = torch.cdist(half.double(), codes.double()).argmin(1).unsqueeze(0)
            counts, sums = reference.code_statistics(half.unsqueeze(0), indices, 8, heads=True)
            halves._codebook.accumulate_statistics_(counts, sums)
        halves._codebook.apply_statistics_()
    whole.eval(), halves.eval()
    assert_same_everywhere(raw_state(halves))
    torch.testing.assert_close(halves.codebook, whole.codebook)


@check
def groups_of_processes(rank, folder):
    world = dist.get_world_size()
    groups = [dist.new_group(range(start, start + world // 2)) for start in (0, world // 2)]
    mine = groups[2 * rank // world]
    torch.manual_seed(0)
    layer = VectorQuantize(6, 8)
    layer._codebook.process_group = mine
    for step in range(4):
        layer(batch(rank, step))
    digests = [None] * world
    dist.all_gather_object(digests, digest(raw_state(layer.eval())))
    first, second = set(digests[: world // 2]), set(digests[world // 2 :])
    assert len(first) == len(second) == 1
    assert first != second


@check
def another_process_group_later(rank, folder):
    layer = VectorQuantize(6, 8)
    for step in range(3):
        layer(batch(rank, step))
    layer.eval()
    dist.destroy_process_group()
    # Not in the store of the first group, which holds addresses that nobody listens to any more.
    join(init_method=f"file://{folder}/store", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    layer.codebook = layer.codebook + rank  # the first process decides again
    layer.train()
    for step in range(3):
        layer(batch(rank, step))
    assert_same_everywhere(raw_state(layer.eval()))


def join(**kwargs):
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60), **kwargs)


def main(folder):
    torch.set_num_threads(1)
    join()
    rank = dist.get_rank()
    report = {}
    for number, (name, function) in enumerate(CHECKS[dist.get_world_size()].items()):
        torch.manual_seed(1000 * number + rank)
        try:
            function(rank, folder)
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
        (folder / f"rank{rank}.json").write_text(json.dumps(report))
        if report[name]:
            print(report[name], file=sys.stderr, flush=True)
            os._exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
