"""The state of a vector quantizer: its codes, the statistics they follow, and how both change."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.reference.code_statistics import code_statistics
from vqkernels.reference.ema_update import ema_update_
from vqkernels.reference.nearest_code import nearest_code
from vqkernels.reference.vector_quantize import vector_quantize


def normalize(x: Tensor) -> Tensor:
    """Divides by max(|x|, 1e-6) along the last dimension, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-6)


def choose_randomly(candidates: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Draws distinct candidates of each row of a bool [C, M] without waiting for the device.

    Returns:
        positions, int64 [C, num], candidates first and in random order; and whether each is a candidate, bool [C, num].
    """
    keys = torch.rand(candidates.shape, device=candidates.device).masked_fill(~candidates, -1)
    keys, positions = keys.topk(num)
    return positions, keys >= 0


def gather_rows(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of x [C, M, D] at int64 [C, N], as [C, N, D]."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class Codebook(nn.Module):
    """C codebooks of K codes of dimension D, in float32 whatever dtype the module is converted to.

    Rows come as [C, M, D], one group for each codebook. Nothing here waits for the device, except loading a state.

    Buffers:
        initted: bool [], whether codes come from data; True from the start without k-means.
        cluster_size: [C, K], moving average of the rows a code gets.
        embed_avg: [C, K, D], moving average of their sum.
        embed: [C, K, D], the codes; a parameter where learnable.
    """

    nearest_code: Callable[..., Any] = staticmethod(nearest_code)
    code_statistics: Callable[..., Any] = staticmethod(code_statistics)
    ema_update_: Callable[..., Any] = staticmethod(ema_update_)
    vector_quantize: Callable[..., Any] = staticmethod(vector_quantize)

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int,
        *,
        decay: float,
        eps: float,
        kmeans_init: bool,
        kmeans_iters: int,
        use_cosine_sim: bool,
        threshold_ema_dead_code: float,
        ema_update: bool,
        manual_ema_update: bool,
        learnable_codebook: bool,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.decay = decay
        self.eps = eps
        self.kmeans_iters = kmeans_iters
        self.use_cosine_sim = use_cosine_sim
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.ema_update = ema_update
        self.manual_ema_update = manual_ema_update
        self.learnable_codebook = learnable_codebook
        # The host's knowledge of `initted`, so that no step asks the device. It may be True in vain, never False.
        self._may_need_init = kmeans_init

        embed = nn.init.kaiming_uniform_(torch.empty(num_codebooks, codebook_size, dim, dtype=torch.float32))
        if use_cosine_sim:
            embed = normalize(embed)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size, dtype=torch.float32))
        self.register_buffer("embed_avg", embed.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)

    def extra_repr(self) -> str:
        codes, dim = self.embed.shape[-2:]
        return f"num_codebooks={self.num_codebooks}, codebook_size={codes}, dim={dim}"

    @property
    def replaces_dead_codes(self) -> bool:
        return self.threshold_ema_dead_code > 0

    @property
    def metric(self) -> str:
        # Codes have length 1 where the cosine decides, so that the inner product is the cosine.
        return "dot" if self.use_cosine_sim else "l2"

    def forward(
        self,
        rows: Tensor,
        *,
        mask: Tensor | None,
        gradient: str,
        with_loss: bool,
        freeze: bool,
        ema_update: bool,
        statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Quantizes with the codes as they are, then, in training, updates them.

        Args:
            rows: [C, M, D].
            mask: bool [C, M] or None; rows where it is False take no part.
            gradient: see `vqkernels.vector_quantize`.
            with_loss: compute the loss that draws rows to codes, and codes to rows where they are learnable.
            freeze: leave the codebook alone, and give it no gradient.
            ema_update: let codes follow the statistics.
            statistics: return counts.

        Returns:
            quantized [C, M, D]; indices int64 [C, M]; the mean squared error, 0 without loss; counts int64 [C, K] or
            None.
        """
        if self.use_cosine_sim:
            rows = normalize(rows)
        self.init_embed_(rows, mask)
        update = self.training and not freeze and (ema_update or self.replaces_dead_codes)
        learn = self.learnable_codebook and not freeze
        embed = self.embed if learn else self.embed.detach()
        quantized, indices, loss, counts, sums = self.vector_quantize(
            rows,
            embed.clone() if update else embed,  # the backward pass reads what the update is about to overwrite
            metric=self.metric,
            mask=mask,
            gradient=gradient,
            commitment_weight=float(with_loss),
            codebook_weight=float(with_loss and learn),
            statistics=update or statistics,
        )
        if not with_loss:
            loss = torch.zeros_like(loss)
        elif learn:
            loss = loss - loss.detach() / 2  # both terms have the same value, which counts once
        if update:
            self._update(rows, indices, counts, sums, ema_update)
        return quantized, indices, loss, counts

    @torch.no_grad()
    def init_embed_(self, rows: Tensor, mask: Tensor | None = None) -> None:
        """Replaces codes by the k-means centres of the rows, unless they were initialised before.

        The first call with rows decides: if none of them is valid, codes stay as random as they are.
        """
        if not self._may_need_init or rows.shape[1] == 0:
            return
        self._may_need_init = False
        means, counts, possible = self._kmeans(rows, mask)
        # An empty cluster keeps its centre with the weight of one row: without any, it would decay to the zero vector.
        cluster_size = counts.clamp(min=1).to(torch.float32)
        use = possible & ~self.initted
        self.cluster_size.copy_(torch.where(use, cluster_size, self.cluster_size))
        use = use.unsqueeze(-1)
        self.embed_avg.copy_(torch.where(use, means * cluster_size.unsqueeze(-1), self.embed_avg))
        self.embed.copy_(torch.where(use, means, self.embed))
        self.initted.logical_or_(possible.any())

    def _kmeans(self, rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Centres [C, K, D], their counts [C, K], and whether there was a row to start from, bool [C, 1]."""
        num_codes = self.codebook_size
        valid = self._valid(rows, mask)
        positions, _ = choose_randomly(valid, min(num_codes, rows.shape[1]))
        num_valid = valid.sum(-1, keepdim=True)
        # Where there are fewer valid rows than codes, the rows start over.
        turns = torch.arange(num_codes, device=rows.device) % num_valid.clamp(min=1)
        means = gather_rows(rows, positions.gather(1, turns)).to(torch.float32)
        counts = torch.zeros_like(turns)
        for _ in range(self.kmeans_iters):
            indices = self.nearest_code(rows, means, metric=self.metric, mask=mask)
            counts, sums = self.code_statistics(rows, indices, num_codes, heads=True)
            centres = sums / counts.clamp(min=1).unsqueeze(-1)
            if self.use_cosine_sim:
                centres = normalize(centres)
            means = torch.where(counts.unsqueeze(-1) > 0, centres, means)
        return means, counts, num_valid > 0

    def _valid(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Whether the search takes a row, bool [C, M]: a single zero vector is the nearest code of every valid row."""
        zeros = torch.zeros(rows.shape[0], 1, rows.shape[-1], device=rows.device, dtype=torch.float32)
        return self.nearest_code(rows, zeros, mask=mask) >= 0

    @torch.no_grad()
    def update_indices(self, rows: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Updates the codes with rows [C, M, D] and the codes [C, M] that they are to count for, -1 for none."""
        if not self.ema_update and not self.replaces_dead_codes:
            return
        if self.use_cosine_sim:
            rows = normalize(rows)
        indices = torch.where(self._valid(rows, mask), indices, -1)
        counts, sums = self.code_statistics(rows, indices, self.codebook_size, heads=True)
        self._update(rows, indices, counts, sums, self.ema_update)

    @torch.no_grad()
    def _update(self, rows: Tensor, indices: Tensor, counts: Tensor, sums: Tensor, ema_update: bool) -> None:
        if ema_update and not self.manual_ema_update:
            self._move(counts, sums, self.decay)
        else:
            self.cluster_size.lerp_(counts.to(torch.float32), 1 - self.decay)
            self.embed_avg.lerp_(sums.to(torch.float32), 1 - self.decay)
        self._replace_dead_codes(rows, indices >= 0)

    def _move(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        self.ema_update_(self.embed, self.cluster_size, self.embed_avg, counts, sums, decay=decay, eps=self.eps)
        if self.use_cosine_sim:
            self.embed.copy_(normalize(self.embed))

    @torch.no_grad()
    def update_ema(self) -> None:
        """Lets the codes follow their statistics as they are; what manual_ema_update leaves to the caller."""
        counts = torch.zeros_like(self.cluster_size, dtype=torch.int64)
        self._move(counts, torch.zeros_like(self.embed_avg), decay=1.0)

    @torch.no_grad()
    def expire_codes_(self, rows: Tensor) -> None:
        """In training, replaces codes whose cluster size is below the threshold by distinct random valid rows."""
        if self.use_cosine_sim:
            rows = normalize(rows)
        self._replace_dead_codes(rows, self._valid(rows, None))

    def _replace_dead_codes(self, rows: Tensor, valid: Tensor) -> None:
        if not self.training or not self.replaces_dead_codes:
            return
        num = min(self.codebook_size, rows.shape[1])
        codes, dead = choose_randomly(self.cluster_size < self.threshold_ema_dead_code, num)
        positions, usable = choose_randomly(valid, num)
        # Where either runs out, a code is written back as it was.
        replaced = dead & usable
        size = torch.where(replaced, float(self.threshold_ema_dead_code), self.cluster_size.gather(1, codes))
        new = gather_rows(rows, positions).to(torch.float32)
        replaced, target = replaced.unsqueeze(-1), codes.unsqueeze(-1).expand_as(new)
        average = torch.where(replaced, new * self.threshold_ema_dead_code, gather_rows(self.embed_avg, codes))
        new = torch.where(replaced, new, gather_rows(self.embed, codes))
        self.cluster_size.scatter_(1, codes, size)
        self.embed_avg.scatter_(1, target, average)
        self.embed.scatter_(1, target, new)

    @torch.no_grad()
    def set_codes_(self, codes: Tensor) -> None:
        """Takes codes [C, K, D] as they are, with statistics that make them the moving average."""
        self.embed.copy_(codes)
        self.embed_avg.copy_(self.embed * self.cluster_size.unsqueeze(-1))
        self.initted.fill_(True)
        self._may_need_init = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Codebook":
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Low-precision states are widened here, so that load_state_dict(assign=True) keeps float32 too.
        state_dict = {
            key: value.float() if key.startswith(prefix) and value.is_floating_point() else value
            for key, value in state_dict.items()
        }
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._may_need_init = self.initted.is_meta or not bool(self.initted)
