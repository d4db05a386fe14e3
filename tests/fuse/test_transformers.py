"""What the whole models of transformers do not show: single modules, dtypes, hooks, ties."""

import copy
import importlib.machinery
import sys
import types

import pytest
import torch
from transformers import DacConfig, EncodecConfig, MimiConfig
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAEVectorQuantizer
from transformers.models.dac.modeling_dac import DacVectorQuantize
from transformers.models.encodec.modeling_encodec import EncodecEuclideanCodebook, EncodecResidualVectorQuantizer
from transformers.models.mimi.modeling_mimi import MimiResidualVectorQuantizer, MimiSplitResidualVectorQuantizer

from benchmarks.fuse_truth import Replay, count_ties, recorded
from vqkernels import fuse, unfuse
from vqkernels.fuse import transformers as transformers_recipes


def encodec_stack():
    stack = EncodecResidualVectorQuantizer(EncodecConfig(codebook_size=64, codebook_dim=16, target_bandwidths=[24.0]))
    for level, layer in enumerate(stack.layers):
        layer.codebook.embed.normal_(std=0.8**level)
    return stack


def fused_copy(module):
    fused = copy.deepcopy(module)
    fuse(fused, verbose=False)
    return fused


def test_many_rows_against_the_original():
    """Codes as small as a fresh codebook's, where the original's rounding decides some rows: these are counted."""
    quantizer = ChameleonVQVAEVectorQuantizer(ChameleonVQVAEConfig(embed_dim=32, num_embeddings=500))
    quantizer.embedding.weight.data.uniform_(-1 / 500, 1 / 500)
    fused = fused_copy(quantizer)
    x = 4 * torch.randn(4, 32, 32, 32)
    with recorded() as searches:
        fused(x)
    with Replay(searches) as replay:
        quantizer(x)
    ties = count_ties(searches, replay.own)
    rows, codes = searches[0].rows[0].double(), searches[0].codes[0].double()
    scores = rows @ codes.T - codes.square().sum(-1) / 2
    chosen = scores.gather(1, searches[0].indices.T)[:, 0]
    # A score, a chain of D fused multiply-adds that starts at |c|^2 / 2, is off by at most so much.
    rounding = torch.finfo(torch.float32).eps / 2
    bound = (32 + 1) * rounding * (rows.norm(dim=-1) * codes.norm(dim=-1).max() + codes.square().sum(-1).max())
    assert (scores.max(-1).values - chosen <= 2 * bound).all()
    assert ties > 0  # else this shows nothing
    assert ties < len(rows) / 20


@pytest.mark.parametrize("bandwidth", [None, 1.0, 24.0])
def test_encodec_levels_at_once(bandwidth):
    stack = encodec_stack()
    fused = fused_copy(stack)
    x = torch.randn(2, 16, 40)
    with recorded() as searches:
        codes = fused.encode(x, bandwidth)
    expected = stack.encode(x, bandwidth)
    assert len(searches) == len(expected)
    assert codes.is_contiguous()
    assert torch.equal(codes, expected)
    assert torch.equal(fused.decode(codes), stack.decode(codes))


def test_mimi_levels_at_once():
    config = MimiConfig(
        hidden_size=32, codebook_size=64, codebook_dim=16, vector_quantization_hidden_dimension=16, num_quantizers=4
    )
    for module in (MimiSplitResidualVectorQuantizer(config), MimiResidualVectorQuantizer(config)):
        for name, buffer in module.named_buffers():
            if name.endswith("embed_sum"):
                buffer.normal_()
        fused = fused_copy(module)
        x = torch.randn(2, 32, 40)
        for levels in (None, 3):
            assert torch.equal(fused.encode(x, levels), module.encode(x, levels))


def test_a_few_rows_go_level_by_level(monkeypatch):
    """As in streaming, where joining the codebooks would cost more than their search."""
    stack = encodec_stack()
    fused = fused_copy(stack)
    calls = []
    at_once = transformers_recipes.nearest_levels
    monkeypatch.setattr(transformers_recipes, "nearest_levels", lambda *args: calls.append(args) or at_once(*args))
    for rows, expected in ((7, 0), (8, 1)):  # 64 codes
        x = torch.randn(1, 16, rows)
        assert torch.equal(fused.encode(x, 1.0), stack.encode(x, 1.0))
        assert len(calls) == expected


def test_a_method_that_is_replaced_after_the_stack_was_fused():
    stack = encodec_stack()
    fuse(stack, verbose=False)
    codebook = stack.layers[1].codebook
    fused = codebook.quantize
    codebook.quantize = lambda rows: torch.full(rows.shape[:1], 5)
    x = torch.randn(1, 16, 40)
    assert (stack.encode(x)[1] == 5).all()
    codebook.quantize = fused
    assert not (stack.encode(x)[1] == 5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_stack_in_other_dtypes_goes_level_by_level(dtype):
    stack = encodec_stack().to(dtype)
    fused = fused_copy(stack)
    x = torch.randn(1, 16, 40, dtype=dtype)
    codes = fused.encode(x, 1.0)
    residual = x.transpose(1, 2)
    for level, indices in enumerate(codes):  # the residual of the original, rounded to its dtype at every level
        embed = stack.layers[level].codebook.embed
        distances = (residual.double().unsqueeze(2) - embed.double()).square().sum(-1)
        assert torch.equal(indices, distances.argmin(-1))
        residual = residual - embed[indices]


def test_a_changed_layer_keeps_its_stack():
    class Mine(EncodecEuclideanCodebook):
        def quantize(self, hidden_states):
            return hidden_states.argmax(-1)

    stack = encodec_stack()
    stack.layers[1].codebook.__class__ = Mine
    x = torch.randn(1, 16, 40)
    expected = stack.encode(x)
    report = fuse(stack, verbose=False)
    left = {m.name: m.reason for m in report.left}
    assert "Mine" in left[""]
    assert "subclass" in left["layers.1.codebook"]
    assert torch.equal(stack.encode(x), expected)


def test_a_patched_method_of_a_layer_keeps_its_stack():
    stack = encodec_stack()
    stack.layers[0].codebook.quantize = lambda rows: torch.full(rows.shape[:1], 5)
    report = fuse(stack, verbose=False)
    assert {m.name for m in report.left} == {"", "layers.0.codebook"}
    assert (stack.encode(torch.randn(1, 16, 40))[0] == 5).all()


def test_rows_of_nan():
    stack = encodec_stack()
    fused = fused_copy(stack)
    x = torch.randn(2, 16, 40)
    x[1, 3, 7] = torch.nan
    assert torch.equal(fused.encode(x), stack.encode(x))
    codebook, fused = stack.layers[0].codebook, fused.layers[0].codebook
    assert torch.equal(fused.encode(x.mT), codebook.encode(x.mT))


def test_offloaded_dac_codebook_is_brought_back():
    class Hook:
        calls = 0

        def pre_forward(self, module):
            self.calls += 1

        def post_forward(self, module, output):
            pass

    layer = DacVectorQuantize(DacConfig(codebook_size=64, codebook_dim=8, hidden_size=32))
    fuse(layer, verbose=False)
    layer.codebook._hf_hook = hook = Hook()
    layer(torch.randn(1, 32, 10))
    assert hook.calls == 1


def test_dac_code_of_zeros():
    layer = DacVectorQuantize(DacConfig(codebook_size=64, codebook_dim=3, hidden_size=32)).eval()
    layer.codebook.weight.data.normal_()
    layer.codebook.weight.data[:, 0].abs_()
    layer.codebook.weight.data[5] = 0
    fused = fused_copy(layer)
    latents = torch.randn(2, 3, 200)
    latents[:, 0] = -10 * latents[:, 0].abs()  # some rows lie across or against all codes but that one
    codes = layer.codebook.weight.double()
    assert (latents.transpose(1, 2).double() @ codes.T).amax(-1).eq(0).any()
    assert torch.equal(fused.decode_latents(latents)[1], layer.decode_latents(latents)[1])


def test_higgs_audio_codebook(monkeypatch):
    for name in ("torchaudio", "torchaudio.functional"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    name = "transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer"
    higgs = importlib.import_module(name)
    codebook = higgs.HiggsAudioV2TokenizerEuclideanCodebook(types.SimpleNamespace(codebook_size=64, codebook_dim=16))
    codebook.embed.normal_()
    fused = fused_copy(codebook)
    x = torch.randn(2, 40, 16)
    with recorded() as searches:
        assert torch.equal(fused.encode(x), codebook.encode(x))
    assert searches
    unfuse(fused)
    assert "quantize" not in fused.__dict__
    monkeypatch.delitem(sys.modules, name)
