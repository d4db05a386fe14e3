"""Quantizers with the interfaces of libraries that have no package, every one of its steps a method to change.

Names of classes, arguments, attributes and states are theirs; so are quirks that a user of a checkpoint depends on.
"""

from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn

LossBreakdown = namedtuple("LossBreakdown", ["per_sample_entropy", "codebook_entropy", "commitment", "avg_probs"])


def named(name):
    """Three of these classes are called VectorQuantizer."""

    def rename(cls):
        cls.__name__ = cls.__qualname__ = name
        return cls

    return rename


def altered(cls, **members):
    """A class of the same name that differs in these methods or attributes."""
    return type(cls.__name__, (cls,), members)


def mse(a, b):
    return torch.mean((a - b) ** 2)


def one_hot(indices, num_codes):
    return torch.zeros(len(indices), num_codes, device=indices.device).scatter_(1, indices[:, None], 1)


def channels_last(x):
    return x.permute(0, 2, 3, 1).contiguous()


def channels_first(x):
    return x.permute(0, 3, 1, 2).contiguous()


class Steps(nn.Module):
    def normalize(self, x):
        return x

    def distances(self, rows, codes):
        return rows.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * rows @ codes.t()

    def choose(self, distances):
        return distances.argmin(1)

    def losses(self, rows, quantized):
        """The term that moves rows, and the one that moves codes."""
        return mse(quantized.detach(), rows), mse(quantized, rows.detach())

    def straight_through(self, rows, quantized):
        return rows + (quantized - rows).detach()

    def perplexity(self, encodings):
        share = encodings.mean(0)
        return torch.exp(-torch.sum(share * torch.log(share + 1e-10)))


@named("VectorQuantizer")
class Taming(Steps):
    def __init__(self, n_e, e_dim, beta):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)

    def forward(self, z):
        z = channels_last(z)
        rows, codes = self.normalize(z.view(-1, self.e_dim)), self.embedding.weight
        indices = self.choose(self.distances(rows, codes))
        encodings = one_hot(indices, self.n_e).to(z)
        z_q = (encodings @ codes).view(z.shape)
        commitment, codebook = self.losses(z, z_q)
        info = (self.perplexity(encodings), encodings, indices[:, None])
        return channels_first(self.straight_through(z, z_q)), self.total(commitment, codebook), info

    def total(self, commitment, codebook):
        return commitment + self.beta * codebook


@named("VectorQuantizer2")
class Taming2(Steps):
    def __init__(self, n_e, e_dim, beta, used=None, unknown_index="random", sane_index_shape=False, legacy=True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)
        self.remap = None if used is None else "the path of a file"
        if used is not None:
            self.register_buffer("used", used)
            self.unknown_index, self.re_embed = unknown_index, len(used)
        self.sane_index_shape = sane_index_shape

    def remap_to_used(self, inds):
        match = inds[..., None] == self.used
        places = match.long().argmax(-1)
        unknown = ~match.any(-1)
        if self.unknown_index == "random":
            places[unknown] = torch.randint(0, self.re_embed, places[unknown].shape)
        else:
            places[unknown] = self.unknown_index
        return places

    def codes(self):
        return self.embedding.weight

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        z_q, loss, indices = self.quantize(z, temp, rescale_logits, return_logits)
        return z_q, loss, (None, None, indices)

    def quantize(self, z, temp, rescale_logits, return_logits):
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise AssertionError("there is no temperature")
        z = channels_last(z)
        rows, codes = self.normalize(z.view(-1, self.e_dim)), self.codes()
        indices = self.choose(self.distances(rows, codes))
        z_q = F.embedding(indices, codes).view(z.shape)
        commitment, codebook = self.losses(z, z_q)
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(len(z), -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(z.shape[:-1])
        return channels_first(self.straight_through(z, z_q)), self.total(commitment, codebook), indices

    def total(self, commitment, codebook):
        return commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook


class SimVQ(Taming2):
    def __init__(self, n_e, e_dim, beta=0.25, **options):
        super().__init__(n_e, e_dim, beta, **options)
        nn.init.normal_(self.embedding.weight, std=e_dim**-0.5)
        self.embedding.weight.requires_grad_(False)
        self.embedding_proj = nn.Linear(e_dim, e_dim)

    def codes(self):
        return self.embedding_proj(self.embedding.weight)

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        z_q, loss, indices = self.quantize(z, temp, rescale_logits, return_logits)
        zero = torch.tensor(0.0)
        return (z_q, zero, indices), LossBreakdown(zero, zero, loss, zero)


@named("VectorQuantizer")
class Zalando(Steps):
    def __init__(self, num_embeddings, embedding_dim, commitment_cost):
        super().__init__()
        self._num_embeddings, self._embedding_dim = num_embeddings, embedding_dim
        self._commitment_cost = commitment_cost
        self._embedding = nn.Embedding(num_embeddings, embedding_dim)
        nn.init.uniform_(self._embedding.weight, -1 / num_embeddings, 1 / num_embeddings)

    def forward(self, inputs):
        rows = channels_last(inputs)
        flat, codes = self.normalize(rows.view(-1, self._embedding_dim)), self._embedding.weight
        encodings = one_hot(self.choose(self.distances(flat, codes)), self._num_embeddings)
        quantized = (encodings.to(codes) @ codes).view(rows.shape)
        if self.training:
            self.update(flat.detach(), encodings.to(codes))
        loss = self.total(*self.losses(rows, quantized))
        quantized = channels_first(self.straight_through(rows, quantized))
        return loss, quantized, self.perplexity(encodings), encodings

    def total(self, commitment, codebook):
        return codebook + self._commitment_cost * commitment

    def update(self, rows, encodings):
        pass


@named("VectorQuantizerEMA")
class ZalandoEMA(Zalando):
    def __init__(self, num_embeddings, embedding_dim, commitment_cost, decay=0.99, epsilon=1e-5):
        super().__init__(num_embeddings, embedding_dim, commitment_cost)
        nn.init.normal_(self._embedding.weight)
        self.register_buffer("_ema_cluster_size", torch.zeros(num_embeddings))
        self._ema_w = nn.Parameter(torch.randn(num_embeddings, embedding_dim))
        self._decay, self._epsilon = decay, epsilon

    def total(self, commitment, codebook):
        return self._commitment_cost * commitment

    def update(self, rows, encodings):
        size = self._decay * self._ema_cluster_size + (1 - self._decay) * encodings.sum(0)
        self._ema_cluster_size = self.smoothed(size)
        self._ema_w = nn.Parameter(self._decay * self._ema_w + (1 - self._decay) * encodings.t() @ rows)
        self._embedding.weight = nn.Parameter(self._ema_w / self._ema_cluster_size[:, None])

    def smoothed(self, size):
        return (size + self._epsilon) / (size.sum() + len(size) * self._epsilon) * size.sum()


@named("Quantize")
class Rosinality(Steps):
    def __init__(self, dim, n_embed, decay=0.99, eps=1e-5):
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps = dim, n_embed, decay, eps
        embed = torch.randn(dim, n_embed)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.ones(n_embed))
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, input):
        rows = self.normalize(input.reshape(-1, self.dim))
        indices = self.choose(self.distances(rows, self.embed.t()))
        quantize = F.embedding(indices, self.embed.t()).view(input.shape)
        if self.training:
            self.update(rows.detach(), one_hot(indices, self.n_embed).to(rows))
        diff = self.losses(input, quantize)[0]
        return self.straight_through(input, quantize), diff, indices.view(input.shape[:-1])

    def update(self, rows, encodings):
        self.cluster_size.data.mul_(self.decay).add_(encodings.sum(0), alpha=1 - self.decay)
        self.embed_avg.data.mul_(self.decay).add_(rows.t() @ encodings, alpha=1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + self.n_embed * self.eps) * total
        self.embed.data.copy_(self.embed_avg / smoothed)


@named("VectorQuantizer")
class LlamaGen(Steps):
    def __init__(self, n_e, e_dim, beta, entropy_loss_ratio, l2_norm, show_usage):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.entropy_loss_ratio, self.l2_norm, self.show_usage = entropy_loss_ratio, l2_norm, show_usage
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)
        self.embedding.weight.data = self.normalize(self.embedding.weight.data)
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(65536))

    def normalize(self, x):
        return F.normalize(x, dim=-1) if self.l2_norm else x

    def entropy(self, distances):
        share = torch.softmax(-distances / 0.01, 1)
        mean = share.mean(0)
        return torch.sum(mean * torch.log(mean + 1e-5)) - (share * torch.log(share + 1e-5)).sum(1).mean()

    def forward(self, z):
        z = self.normalize(channels_last(z))
        codes = self.normalize(self.embedding.weight)
        distances = self.distances(z.view(-1, self.e_dim), codes)
        indices = self.choose(distances)
        z_q = codes[indices].view(z.shape)
        vq = commit = entropy = None
        usage = 0
        if self.training:
            commit, vq = self.losses(z, z_q)
            commit, entropy = self.beta * commit, self.entropy_loss_ratio * self.entropy(distances)
            usage = self.use(indices) if self.show_usage else 0
        z_q = self.straight_through(z, z_q).permute(0, 3, 1, 2)
        return z_q, (vq, commit, entropy, usage), (None, None, indices)

    def use(self, indices):
        kept = self.codebook_used[len(indices) :].clone()
        self.codebook_used[: -len(indices)] = kept
        self.codebook_used[-len(indices) :] = indices
        return len(torch.unique(self.codebook_used)) / self.n_e


@named("VectorQuantizer")
class TiTok(Steps):
    def __init__(
        self, codebook_size=1024, token_size=256, commitment_cost=0.25, use_l2_norm=False, clustering_vq=False
    ):
        super().__init__()
        self.codebook_size, self.token_size, self.commitment_cost = codebook_size, token_size, commitment_cost
        self.use_l2_norm, self.clustering_vq = use_l2_norm, clustering_vq
        self.embedding = nn.Embedding(codebook_size, token_size)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        if clustering_vq:
            self.decay = 0.99
            self.register_buffer("embed_prob", torch.zeros(codebook_size))

    def widen(self, z):
        return z if z.dtype == torch.float64 else z.float()  # float64 is not theirs, but a truth to compare with

    def normalize(self, x):
        return F.normalize(x, dim=-1) if self.use_l2_norm else x

    def forward(self, z):
        latents = channels_last(self.widen(z))
        z = self.normalize(latents)
        codes = self.normalize(self.embedding.weight)
        distances = self.distances(z.view(-1, self.token_size), codes)
        indices = self.choose(distances)
        z_q = self.normalize(self.normalize(self.embedding(indices))).view(z.shape)
        commitment, codebook = self.losses(z, z_q)
        commitment = self.commitment_cost * commitment
        if self.clustering_vq and self.training:
            with torch.no_grad():
                self.recluster(indices, distances, latents.view(-1, self.token_size))
        losses = {"quantizer_loss": commitment + codebook, "commitment_loss": commitment, "codebook_loss": codebook}
        indices = indices.view(z.shape[:-1])
        return channels_first(self.straight_through(z, z_q)), {**losses, "min_encoding_indices": indices}

    def recluster(self, indices, distances, latents):
        share = one_hot(indices, self.codebook_size).to(latents).mean(0)
        self.embed_prob.mul_(self.decay).add_(share, alpha=1 - self.decay)
        step = torch.exp(-(self.embed_prob * self.codebook_size * 10) / (1 - self.decay) - 1e-3)[:, None]
        weight = self.embedding.weight
        weight.data = weight.data * (1 - step) + latents[distances.argmin(0)] * step


class GumbelQuantize(nn.Module):
    def __init__(self, num_hiddens, embedding_dim, n_embed):
        super().__init__()
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)


class IndexPropagationQuantize(nn.Module):
    def __init__(self, n_e, e_dim):
        super().__init__()
        self.embedding = nn.Embedding(n_e, e_dim)


@named("VectorQuantizer2")
class VAR(nn.Module):
    def __init__(self, vocab_size, Cvae):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, Cvae)
        self.quant_resi = nn.Conv2d(Cvae, Cvae, 3, padding=1)

    def forward(self, f_BChw, ret_usages=False):
        raise NotImplementedError
