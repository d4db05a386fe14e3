"""What residual layers share: quantize dropout, the walk through the levels, codes of indices, groups of channels."""

import random
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.reference import _checks
from vqkernels.reference.synchronization import is_distributed


def check_quantize_dropout(enabled: bool, num_quantizers: int, cutoff_index: int, multiple_of: int) -> bool:
    """Checks the arguments of a constructor; returns whether there is a level to drop."""
    _checks.check_sizes(num_quantizers=num_quantizers, quantize_dropout_multiple_of=multiple_of)
    enabled = bool(enabled) and num_quantizers > 1
    high = num_quantizers - 1 if enabled else None
    _checks.check_numbers(low=0, high=high, quantize_dropout_cutoff_index=cutoff_index)
    return enabled


def draw_num_levels(
    num_quantizers: int, cutoff_index: int, multiple_of: int, seed: int | None, device: torch.device
) -> int | Tensor:
    """How many levels a step of quantize dropout runs: more than cutoff_index, rounded up to a multiple, at most all.

    With a seed, Python's generator draws an int, the one of vector-quantize-pytorch; torch.compile makes a graph for
    every seed. Without, it is an int64 scalar drawn on the device, which the host never sees. All processes of a
    distributed run get the same: an int from generators that one broadcast has given a common seed.
    """
    choices = num_quantizers - cutoff_index
    if seed is not None:
        seed = next(iter({seed}))  # what is hashed is a constant to torch.compile
        levels = cutoff_index + 1 + _seeded_choice(seed, choices)
        return min(-(-levels // multiple_of) * multiple_of, num_quantizers)
    drawn = torch.randint(choices, (), device=device)
    if is_distributed():
        if not torch.compiler.is_compiling():
            levels = cutoff_index + 1 + _common_generator(device).randrange(choices)
            return min(-(-levels // multiple_of) * multiple_of, num_quantizers)
        torch.distributed.all_reduce(drawn)
        drawn = drawn % choices  # as uniform as each of the numbers
    return ((drawn + cutoff_index + multiple_of) // multiple_of * multiple_of).clamp(max=num_quantizers)


_common_generators: "weakref.WeakKeyDictionary[object, random.Random]" = weakref.WeakKeyDictionary()


def _common_generator(device: torch.device) -> random.Random:
    """A generator that is in the same state in all processes, as long as they use it equally often."""
    group = torch.distributed.group.WORLD
    if group not in _common_generators:
        seed = torch.randint(2**62, (1,), device=device)
        torch.distributed.broadcast(seed, 0)
        _common_generators[group] = random.Random(int(seed))
    return _common_generators[group]


def _seeded_choice(seed: int, choices: int) -> int:
    return random.Random(seed).randrange(choices)


# What torch.compiler.assume_constant_result does, which would import the compiler.
_seeded_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_num_levels(layer: Any, x: Tensor, seed: int | None, num_levels: int | Tensor | None) -> int | Tensor:
    """How many levels of a residual layer run for x: num_levels, or what is drawn if `layer.drops_levels`."""
    if num_levels is not None:
        return check_num_levels(num_levels, layer.num_quantizers)
    if not layer.drops_levels:
        return layer.num_quantizers
    return draw_num_levels(
        layer.num_quantizers,
        layer.quantize_dropout_cutoff_index,
        layer.quantize_dropout_multiple_of,
        seed,
        x.device,
    )


def check_num_levels(num_levels: int | Tensor, num_quantizers: int) -> int | Tensor:
    if isinstance(num_levels, Tensor):
        _checks.check_tensor("num_levels", num_levels, _checks.INTEGER_TYPES)
        if num_levels.ndim > 0:
            raise ValueError(f"num_levels: expected a scalar tensor, got shape {list(num_levels.shape)}")
    elif not isinstance(num_levels, int) or not 1 <= num_levels <= num_quantizers:
        raise ValueError(f"num_levels: expected an integer from 1 to {num_quantizers}, got {num_levels!r}")
    return num_levels


def quantize_levels(
    x: Tensor, levels: Iterable[Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]], num_levels: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Lets every level quantize what the ones before it left over.

    Args:
        x: any shape.
        levels: functions of the residual that return quantized, of the same shape, indices, and a scalar loss.
        num_levels: levels that run, an int of at least 1 or an integer scalar tensor. The others have index -1 and loss
            0; an int leaves them out, a tensor masks their results.

    Returns:
        the sum of what levels quantized, of the shape of x; indices [..., Q]; losses [Q].
    """
    quantized, residual = torch.zeros_like(x), x
    indices: list[Tensor] = []
    losses: list[Tensor] = []
    for level, quantize in enumerate(levels):
        runs = level < num_levels
        if runs is False:
            indices.append(torch.full_like(indices[0], -1, dtype=torch.int64))
            losses.append(torch.zeros_like(losses[0]))
            continue
        codes, chosen, loss = quantize(residual)
        if isinstance(runs, Tensor):
            codes, loss = torch.where(runs, codes, 0), torch.where(runs, loss, 0)
            chosen = torch.where(runs, chosen.long(), -1)
        residual = residual - codes.detach()
        quantized = quantized + codes
        indices.append(chosen)
        losses.append(loss)
    dtype = torch.promote_types(indices[0].dtype, indices[-1].dtype)
    return quantized, torch.stack([i.to(dtype) for i in indices], -1), torch.stack(losses)


def complete_indices(indices: Tensor, num_quantizers: int, coarse_allowed: bool) -> Tensor:
    """Checks indices [..., Q'] of at most Q levels and gives the missing ones index -1: [..., Q]."""
    _checks.check_indices(indices)
    given = indices.shape[-1] if indices.ndim > 1 else 0
    if given == num_quantizers or (coarse_allowed and 0 < given < num_quantizers):
        return F.pad(indices, (0, num_quantizers - given), value=-1)
    hint = "" if coarse_allowed else "; fewer levels are decoded by layers with quantize_dropout"
    raise ValueError(f"indices: expected shape [B, ..., {num_quantizers}], got {list(indices.shape)}{hint}")


def gather_codes(codebooks: Tensor, indices: Tensor) -> Tensor:
    """Codes [Q, ..., D] of codebooks [Q, K, D] for indices [..., Q]; zeros for -1."""
    num_levels, num_codes, _ = codebooks.shape
    _checks.check_index_range(indices, num_codes)
    rows = indices.clamp(0, num_codes - 1) + num_codes * torch.arange(num_levels, device=indices.device)
    codes = F.embedding(rows, codebooks.flatten(0, 1))
    # Where the range could not be checked, NaN shows what is out of it.
    codes = codes.masked_fill((indices >= num_codes).unsqueeze(-1), torch.nan)
    return codes.masked_fill((indices < 0).unsqueeze(-1), 0).movedim(-2, 0)


class GroupedResidual(nn.Module):
    """Splits the channels into groups and gives each to a residual layer of its own.

    Quantize dropout drops the same levels in all groups, so a forward draws them once.
    """

    layer_class: type[nn.Module]
    rvqs: Any  # nn.ModuleList of layer_class

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__()
        _checks.check_sizes(dim=dim, groups=groups)
        if dim % groups:
            raise ValueError(f"dim: expected a multiple of groups = {groups}, got {dim}")
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = accept_image_fmap
        self.rvqs = nn.ModuleList([self._make_layer(dim // groups, **kwargs) for _ in range(groups)])

    def _make_layer(self, dim: int, **kwargs: Any) -> nn.Module:
        return self.layer_class(dim=dim, **kwargs)

    @property
    def codebooks(self) -> Tensor:
        """[G, Q, K, D]."""
        return torch.stack([layer.codebooks for layer in self.rvqs])

    @property
    def split_dim(self) -> int:
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes [G, ...] of indices [G, ...], of each group as its layer gives them."""
        return torch.stack([layer.get_codes_from_indices(i) for layer, i in zip(self.rvqs, indices, strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returns as quantized for indices [G, ...]."""
        outputs = [layer.get_output_from_indices(i) for layer, i in zip(self.rvqs, indices, strict=True)]
        output = torch.cat(outputs, -1)  # layers decode to channels last
        return output.movedim(-1, 1) if self.accept_image_fmap else output

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Checks x and cuts its channels into groups."""
        _checks.check_tensor("x", x, _checks.FLOAT_TYPES)
        layout = f"[B, {self.dim}, ...]" if self.accept_image_fmap else f"[B, ..., {self.dim}]"
        if x.ndim < 2 or x.shape[self.split_dim] != self.dim:
            raise ValueError(f"x: expected shape {layout}, got {list(x.shape)}")
        return x.chunk(self.groups, self.split_dim)

    def join(self, results: Iterable[tuple[Tensor, ...]], with_codes: bool = False) -> tuple[Any, ...]:
        """Results of the groups' layers: quantized side by side in the channels, codes as a tuple, others stacked."""
        quantized, *others = zip(*results, strict=True)
        codes = [others.pop()] if with_codes else []
        return (torch.cat(quantized, self.split_dim), *[torch.stack(other) for other in others], *codes)

    def quantize_groups(self, x: Tensor, return_all_codes: bool = False, **kwargs: Any) -> tuple[Any, ...]:
        """Gives every group its channels of x, and all the same arguments."""
        parts = self.split(x)
        num_levels = choose_num_levels(self.rvqs[0], x, None, None)
        kwargs.update(return_all_codes=return_all_codes, num_levels=num_levels)
        results = [layer(part, **kwargs) for layer, part in zip(self.rvqs, parts, strict=True)]
        return self.join(results, return_all_codes)
