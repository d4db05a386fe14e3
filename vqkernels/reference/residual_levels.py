"""How `ResidualVQ` goes through its levels: at once where one operation serves, otherwise one after the other."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqkernels.reference import synchronization
from vqkernels.reference._copies import own_copy

if TYPE_CHECKING:
    from vqkernels.reference.residual_layer import ResidualVQ


def scale_gradient(x: Tensor, share: float) -> Tensor:
    """Lets a share of the gradient of x pass."""
    return x.detach() if share <= 0 else share * x + (1 - share) * x.detach()


def quantize_at_once(
    rvq: "ResidualVQ", z: Tensor, mask: Tensor | None, num_levels: int | Tensor, freeze: bool, beam_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized [B, N, D], indices [B, N, Q] and losses [Q] of z [B, N, D], by one operation; then the update."""
    first = rvq.levels[0]
    books = [layer._codebook for layer in rvq.levels]
    freeze = freeze or first.freeze_codebook
    update = _updates(rvq, freeze)
    for book in dict.fromkeys(books):
        if update:
            book.begin_step_()
        else:
            book.finish_pending_()
    learn = first.learnable_codebook and not freeze
    codes = [book.embed.squeeze(0) if learn else book.embed.detach().squeeze(0) for book in books]
    if update and (torch.compiler.is_compiling() or not rvq.uniform_codebook_size):
        codes = [own_copy(code) for code in codes]  # the backward pass reads what the update overwrites
    codebooks = torch.stack(codes) if rvq.uniform_codebook_size else codes
    if not rvq.training:
        z = z.detach()
    gradient = "none"
    if z.requires_grad and first.route_gradients_to_input:
        gradient = "rotation" if first.rotation_trick else "straight_through"
    with_loss = first.commitment_weight > 0 and (rvq.training or beam_size is not None)
    both_losses = with_loss and learn and rvq.training
    quantized, indices, losses, counts, sums = rvq.residual_quantize(
        z,
        codebooks,
        mask=mask,
        num_levels=None if isinstance(num_levels, int) and num_levels == rvq.num_quantizers else num_levels,
        gradient=gradient,
        commitment_weight=float(with_loss),
        codebook_weight=float(both_losses),
        statistics=update,
        beam_size=beam_size,
        beam_weights=None if beam_size is None else rvq.beam_weights,
    )
    losses = losses.float() * first.commitment_weight
    if both_losses:
        losses = losses - losses.detach() / 2  # both have the same value, which counts once
    if update:
        _update(rvq, z, codebooks, indices, counts, sums, num_levels)
        if books[0].sync_codebook:
            synchronization.apply_on_gradient(books[0], z)
    return quantized, indices, losses


@torch.no_grad()
def _update(
    rvq: "ResidualVQ",
    z: Tensor,
    codebooks: Tensor | list[Tensor],
    indices: Tensor,
    counts: Sequence[Tensor],
    sums: Sequence[Tensor],
    num_levels: int | Tensor,
) -> None:
    rows = z.detach().reshape(-1, z.shape[-1])
    chosen = indices.reshape(-1, rvq.num_quantizers)

    def residuals(positions: Tensor, level: int) -> Tensor:
        """What a level got of rows at positions [1, R], float32 [1, R, D]."""
        left, at = rows[positions[0]].float(), chosen[positions[0]].clamp(min=0)
        for q in range(level):
            left = left - codebooks[q][at[:, q]]
        return left.unsqueeze(0)

    everything = torch.arange(rows.shape[0], device=z.device).unsqueeze(0)
    for q, layer in enumerate(rvq.levels):
        book = layer._codebook
        if isinstance(num_levels, int) and q >= num_levels:
            continue
        state = (book.cluster_size, book.embed_avg, book.embed)
        # Whether rows of other processes reach a level is not known here: then it decays, as any code without rows.
        may_stay = not isinstance(num_levels, int) and not book.sync_codebook
        before = [t.clone() for t in state] if may_stay else []
        book.step_from_statistics_(
            counts[q].unsqueeze(0),
            sums[q].unsqueeze(0),
            partial(residuals, level=q),
            (chosen[:, q] >= 0).unsqueeze(0),
            ema_update=book.ema_update,
            rows=residuals(everything, q) if book.reproducible else None,
            indices=chosen[:, q].unsqueeze(0),
        )
        # A level that no row reached stays as it is.
        for t, old in zip(state, before, strict=False):
            t.copy_(torch.where(torch.as_tensor(num_levels > q).any(), t, old))
    if isinstance(num_levels, int):
        _skip_levels(rvq, num_levels)


def _updates(rvq: "ResidualVQ", freeze: bool) -> bool:
    """Whether a step changes the codes, other than by an optimizer."""
    first = rvq.levels[0]
    if not rvq.training or freeze or first.freeze_codebook:
        return False
    return first.ema_update or first._codebook.replaces_dead_codes


def _skip_levels(rvq: "ResidualVQ", num_levels: int) -> None:
    """Tells synchronised codebooks that the levels behind `num_levels` take no part in a training step."""
    for layer in rvq.levels[num_levels:]:
        if layer._codebook.sync_codebook and not rvq.shared_codebook:
            synchronization.skip(layer._codebook)


def quantize_by_level(
    rvq: "ResidualVQ",
    z: Tensor,
    mask: Tensor | None,
    num_levels: int,
    freeze: bool,
    temperature: float | None,
    targets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized [B, N, D], indices [B, N, Q] and losses [Q] of z [B, N, D].

    With targets, int64 [B, N, Q], losses are the cross entropies to them.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    residual, quantized = z, torch.zeros_like(z)
    indices = z.new_full((*z.shape[:-1], rvq.num_quantizers), -1, dtype=torch.int64)
    losses: list[Tensor] = []
    for level in range(num_levels):
        codes, *results = rvq.levels[level](
            residual,
            mask=mask,
            indices=None if targets is None else targets[..., level],
            sample_codebook_temp=temperature,
            freeze_codebook=freeze or None,
            codebook_transform_fn=_transform(rvq, level, quantized),
        )
        residual = residual - scale_gradient(codes, rvq.quant_grad_frac)
        quantized = quantized + codes
        losses.append(results[-1].float())
        if targets is None:
            indices[..., level] = results[0]
    if _updates(rvq, freeze):
        _skip_levels(rvq, num_levels)
    return quantized, indices, _complete(losses, rvq.num_quantizers)


def quantize_by_beams(
    rvq: "ResidualVQ",
    z: Tensor,
    mask: Tensor | None,
    num_levels: int,
    freeze: bool,
    temperature: float | None,
    beam_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_by_level` with the `beam_size` best beginnings of every level, and the best of all at the end."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    batch, rows, dim = z.shape
    residual, quantized = z.unsqueeze(2), torch.zeros_like(z).unsqueeze(2)  # [B, N, J, D], one for each beginning
    cost = z.new_zeros(batch, rows, 1, dtype=torch.float32)
    indices = z.new_empty(batch, rows, 1, 0, dtype=torch.int64)
    losses = z.new_empty(batch, rows, 1, 0, dtype=torch.float32)
    inputs = z.new_empty(batch, rows, 1, 0, dim)
    for level in range(num_levels):
        width = residual.shape[2]
        inputs = torch.cat([inputs, residual.detach().unsqueeze(3)], 3)
        codes, chosen, loss = rvq.levels[level](
            residual.flatten(1, 2),
            mask=None if mask is None else mask.repeat_interleave(width, 1),
            sample_codebook_temp=temperature,
            freeze_codebook=freeze or None,
            codebook_transform_fn=_transform(rvq, level, quantized),
            topk=beam_size,
        )
        k = chosen.shape[-1]
        chosen = chosen.reshape(batch, rows, width, k)
        codes = codes.reshape(batch, rows, width, k, dim)
        loss = loss.float().expand(batch, rows * width, k).reshape(batch, rows, width, k)
        costs = (cost.unsqueeze(-1) + rvq.beam_score_weights[level] * loss.detach()).flatten(2)
        last = level == num_levels - 1
        cost, order = costs.topk(min(1 if last else beam_size, costs.shape[-1]), dim=-1, largest=False)
        beginning = order // k
        codes, chosen, loss = (
            _at(codes.flatten(2, 3), order),
            _at(chosen.flatten(2), order),
            _at(loss.flatten(2), order),
        )
        residual = _at(residual, beginning) - scale_gradient(codes, rvq.quant_grad_frac)
        quantized = _at(quantized, beginning) + codes
        indices = torch.cat([_at(indices, beginning), chosen.unsqueeze(-1)], -1)
        losses = torch.cat([_at(losses, beginning), loss.unsqueeze(-1)], -1)
        inputs = _at(inputs, beginning)
    best, chosen, means = quantized[:, :, 0], indices[:, :, 0], losses[:, :, 0]
    if mask is not None:
        means = means.masked_fill(~mask.unsqueeze(-1), 0)
    means = means.sum((0, 1)) / (batch * rows if mask is None else mask.sum().clamp(min=1))
    if _updates(rvq, freeze):
        for level in range(num_levels):
            rvq.levels[level].update_indices(inputs[:, :, 0, level], chosen[..., level], mask=mask)
        _skip_levels(rvq, num_levels)
    missing = rvq.num_quantizers - num_levels
    chosen = torch.nn.functional.pad(chosen, (0, missing), value=-1)
    return best, chosen, torch.nn.functional.pad(means, (0, missing))


def _transform(rvq: "ResidualVQ", level: int, quantized: Tensor) -> "partial[Tensor] | None":
    """What makes the codes of a level from those of its codebook."""
    mlp = rvq.mlps[level - 1] if level > 0 else None
    if mlp is None:
        return None
    # The gradient of a row that is NaN would spread over the weights.
    return partial(mlp, condition=quantized.masked_fill(quantized.isnan(), 0))


def _at(x: Tensor, order: Tensor) -> Tensor:
    """Takes from x [B, N, J, ...] at int64 [B, N, J']."""
    index = order.reshape(*order.shape, *[1] * (x.ndim - 3))
    return x.gather(2, index.expand(*order.shape, *x.shape[3:]))


def _complete(losses: list[Tensor], num: int) -> Tensor:
    return torch.stack(losses + [torch.zeros_like(losses[0])] * (num - len(losses)))
