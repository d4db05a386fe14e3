"""The state of a vector quantizer: its codes, the statistics they follow, and how both change."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.reference import synchronization
from vqkernels.reference._random_rows import choose_by_keys, choose_randomly, gather_rows
from vqkernels.reference.code_statistics import code_statistics
from vqkernels.reference.ema_update import ema_update_
from vqkernels.reference.nearest_code import nearest_code

# [K] or [C, K], or what makes it from sums [C, K, D] and counts [C, K].
Weight = Tensor | Callable[[Tensor, Tensor], Tensor] | None


def normalize(x: Tensor) -> Tensor:
    """Divides by max(|x|, 1e-6) along the last dimension, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-6)


class CodeUpdate(NamedTuple):
    """What one training step of a codebook wants to do, summed over its rows.

    The sum of the updates of several processes is a `CodeUpdate` too: counts, sums and keys are added, candidates put
    side by side, the rest is the same everywhere (see `_replace`).
    """

    counts: Tensor  # int64 [C, K]
    sums: Tensor  # float32 [C, K, D]
    candidates: Tensor | None = None  # float32 [C, R, D], distinct valid rows for dead codes; None: replace no code
    usable: Tensor | None = None  # bool [C, R], whether there is a candidate
    keys: Tensor | None = None  # float32 [C, K], at least 0, random: dead codes with the largest are replaced first
    ema_update: bool = True  # whether codes follow the statistics
    weight: Weight = None  # of the step in the moving averages


class CodebookState(nn.Module):
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

    # The group of torch.distributed whose rows `sync_codebook` is about; None: all processes.
    process_group: Any = None

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
        sync_codebook: bool = False,
        sync_kmeans: bool = True,
        reproducible: bool = False,
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
        self.sync_codebook = sync_codebook
        self.sync_kmeans = sync_kmeans
        self.reproducible = reproducible
        self._accumulated: CodeUpdate | None = None
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

    def transform_input(self, rows: Tensor) -> Tensor:
        """Rows as they meet the codes: of length 1 where the cosine decides."""
        return normalize(rows) if self.use_cosine_sim else rows

    def valid_rows(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Whether the search takes a row, bool [C, M]: a single zero vector is the nearest code of every valid row."""
        zeros = torch.zeros(rows.shape[0], 1, rows.shape[-1], device=rows.device, dtype=torch.float32)
        return self.nearest_code(rows, zeros, mask=mask) >= 0

    @torch.no_grad()
    def step_(
        self,
        rows: Tensor,
        indices: Tensor,
        counts: Tensor,
        sums: Tensor,
        *,
        ema_update: bool,
        weight: Weight = None,
        accumulate: bool = False,
    ) -> None:
        """Updates the codes after a training step, once all processes have taken it.

        Args:
            rows: [C, M, D].
            indices: int64 [C, M], their codes, -1 for none.
            counts: int64 [C, K], the statistics of these rows.
            sums: [C, K, D].
            ema_update: let codes follow the statistics.
            weight: of this step in the moving averages, per code; or a function of sums and counts that gives it.
            accumulate: only add the statistics to those of the next step, or of `apply_statistics_`.
        """
        self.step_from_statistics_(
            counts,
            sums,
            lambda positions: gather_rows(rows, positions),
            indices >= 0,
            ema_update=ema_update,
            weight=weight,
            accumulate=accumulate,
            rows=rows,
            indices=indices,
        )

    @torch.no_grad()
    def step_from_statistics_(
        self,
        counts: Tensor,
        sums: Tensor,
        rows_of: Callable[[Tensor], Tensor],
        valid: Tensor,
        *,
        ema_update: bool,
        weight: Weight = None,
        accumulate: bool = False,
        rows: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> None:
        """`step_` without the rows, unless `reproducible` asks for them.

        Args:
            counts: see `step_`.
            sums: see `step_`.
            rows_of: gives the rows [C, R, D] at positions int64 [C, R].
            valid: bool [C, M], whether a row has a code.
            ema_update: see `step_`.
            weight: see `step_`.
            accumulate: see `step_`.
            rows: see `step_`.
            indices: see `step_`.
        """
        candidates = usable = None
        if self.training and self.replaces_dead_codes:
            candidates, usable = self.draw_candidates(rows_of, valid)
        if accumulate:
            self.accumulate_statistics_(counts, sums, candidates, usable)
            if self.sync_codebook:
                synchronization.skip(self)
            return
        self._finish_step_(counts, sums, candidates, usable, ema_update, weight, rows, indices)

    def _finish_step_(
        self,
        counts: Tensor,
        sums: Tensor,
        candidates: Tensor | None,
        usable: Tensor | None,
        ema_update: bool,
        weight: Weight,
        rows: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> None:
        if self._accumulated is not None:
            counts, sums = counts + self._accumulated.counts, sums + self._accumulated.sums
            self._accumulated = rows = indices = None
        keys = None if candidates is None else torch.rand(counts.shape, device=counts.device)
        update = CodeUpdate(counts, sums.to(torch.float32), candidates, usable, keys, ema_update, weight)
        if self.sync_codebook or self.reproducible:
            synchronization.contribute(self, update, rows, indices)
        else:
            self.apply_update_(update)

    def draw_candidates(self, rows_of: Callable[[Tensor], Tensor], valid: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct random valid rows, float32 [C, R, D], and whether there is one, bool [C, R]."""
        num = min(self.codebook_size, valid.shape[1])
        if self.sync_codebook:
            num = min(num, synchronization.candidates_of(self))
        positions, usable = choose_randomly(valid, num)
        return rows_of(positions).to(torch.float32), usable

    @torch.no_grad()
    def accumulate_statistics_(
        self, counts: Tensor, sums: Tensor, candidates: Tensor | None = None, usable: Tensor | None = None
    ) -> None:
        """Adds statistics, counts int64 [C, K] and sums [C, K, D], to those of the next step.

        Candidates for dead codes, as `draw_candidates` gives them, replace earlier ones.
        """
        sums = sums.to(torch.float32)
        if self._accumulated is not None:
            counts, sums = counts + self._accumulated.counts, sums + self._accumulated.sums
        self._accumulated = CodeUpdate(counts, sums, candidates, usable)

    @torch.no_grad()
    def apply_statistics_(self, *, ema_update: bool | None = None, weight: Weight = None) -> None:
        """The step that accumulated statistics stand for; nothing where there are none."""
        if self._accumulated is None:
            return
        self.begin_step_()
        counts, sums, candidates, usable, *_ = self._accumulated
        self._accumulated = None
        ema_update = self.ema_update if ema_update is None else ema_update
        self._finish_step_(counts, sums, candidates, usable, ema_update, weight)

    @torch.no_grad()
    def apply_update_(self, update: CodeUpdate) -> None:
        """Moving averages, codes, then dead codes; the same in every process that is given the same update."""
        counts, sums, *_, ema_update, weight = update
        ema_update = ema_update and not self.manual_ema_update
        if weight is None and ema_update:
            self._move(counts, sums, self.decay)
        else:
            share: float | Tensor = 1 - self.decay
            if weight is not None:
                weight = weight if isinstance(weight, Tensor) else weight(sums, counts.to(sums.dtype))
                share = share * weight.expand(self.cluster_size.shape)
            self.cluster_size.lerp_(counts.to(torch.float32), share)
            self.embed_avg.lerp_(sums, share.unsqueeze(-1) if isinstance(share, Tensor) else share)
            if ema_update:
                self._move(torch.zeros_like(counts), torch.zeros_like(sums), decay=1.0)
        self._replace_dead_codes(update)

    def begin_step_(self) -> None:
        """Brings the codes up to date for a training step. Call it before one uses them, in all processes."""
        if self.sync_codebook or self.reproducible:
            synchronization.begin(self)

    def finish_pending_(self) -> None:
        """Waits for updates that other processes take part in, and applies them. Call it before reading the codes."""
        if self.sync_codebook:
            synchronization.finish(self)

    def _move(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        self.ema_update_(self.embed, self.cluster_size, self.embed_avg, counts, sums, decay=decay, eps=self.eps)
        if self.use_cosine_sim:
            self.embed.copy_(normalize(self.embed))

    @torch.no_grad()
    def update_ema(self) -> None:
        """Lets the codes follow their statistics as they are; what manual_ema_update leaves to the caller."""
        self.begin_step_()
        counts = torch.zeros_like(self.cluster_size, dtype=torch.int64)
        self._move(counts, torch.zeros_like(self.embed_avg), decay=1.0)

    @torch.no_grad()
    def expire_codes_(self, rows: Tensor) -> None:
        """In training, replaces codes whose cluster size is below the threshold by distinct random valid rows."""
        if not self.training or not self.replaces_dead_codes:
            return
        rows = self.transform_input(rows)
        self.begin_step_()
        valid = self.valid_rows(rows, None)
        candidates, usable = self.draw_candidates(lambda positions: gather_rows(rows, positions), valid)
        keys = torch.rand_like(self.cluster_size)
        update = CodeUpdate(torch.zeros_like(keys).long(), torch.zeros_like(self.embed_avg), candidates, usable, keys)
        if self.sync_codebook or self.reproducible:
            update = synchronization.total(self, update, rows, torch.where(valid, 0, -1))
        self._replace_dead_codes(update)

    def _replace_dead_codes(self, update: CodeUpdate) -> None:
        _, _, candidates, usable, keys, *_ = update
        if candidates is None or usable is None or keys is None:
            return
        num = min(self.codebook_size, candidates.shape[1])
        codes, dead = choose_by_keys(keys, self.cluster_size < self.threshold_ema_dead_code, num)
        usable, order = usable.to(torch.int8).sort(stable=True, descending=True)
        # Where either runs out, a code is written back as it was.
        replaced = dead & (usable[:, :num] > 0)
        size = torch.where(replaced, float(self.threshold_ema_dead_code), self.cluster_size.gather(1, codes))
        new = gather_rows(candidates, order[:, :num])
        replaced, target = replaced.unsqueeze(-1), codes.unsqueeze(-1).expand_as(new)
        average = torch.where(replaced, new * self.threshold_ema_dead_code, gather_rows(self.embed_avg, codes))
        new = torch.where(replaced, new, gather_rows(self.embed, codes))
        self.cluster_size.scatter_(1, codes, size)
        self.embed_avg.scatter_(1, target, average)
        self.embed.scatter_(1, target, new)

    @torch.no_grad()
    def set_codes_(self, codes: Tensor) -> None:
        """Takes codes [C, K, D] as they are, with statistics that make them the moving average."""
        self.finish_pending_()
        self._drop_pending()
        self.embed.copy_(codes)
        self.embed_avg.copy_(self.embed * self.cluster_size.unsqueeze(-1))
        self.initted.fill_(True)
        self._may_need_init = False

    def train(self, mode: bool = True) -> "CodebookState":
        self.finish_pending_()
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.finish_pending_()
        super()._save_to_state_dict(*args, **kwargs)

    def _drop_pending(self) -> None:
        if self.sync_codebook:
            synchronization.drop(self)

    def __getstate__(self) -> dict[str, Any]:
        self.finish_pending_()
        return self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CodebookState":
        self.finish_pending_()

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keep_dtype, recurse)
        if self._accumulated is not None:
            device = self.embed.device
            counts, sums, candidates, usable, *_ = self._accumulated
            candidates, usable = (t if t is None else t.to(device) for t in (candidates, usable))
            self._accumulated = CodeUpdate(counts.to(device), sums.to(device), candidates, usable)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Low-precision states are widened here, so that load_state_dict(assign=True) keeps float32 too.
        state_dict = {
            key: value.float() if key.startswith(prefix) and value.is_floating_point() else value
            for key, value in state_dict.items()
        }
        self._drop_pending()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._may_need_init = self.initted.is_meta or not bool(self.initted)
