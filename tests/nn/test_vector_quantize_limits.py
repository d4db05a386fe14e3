"""What the layer does with meta tensors, float64 rows and indices out of range, for both twins."""

import pytest
import torch

from vqkernels import nn, reference

each_layer = pytest.mark.parametrize(
    "layer_class", [nn.VectorQuantize, reference.VectorQuantize], ids=["nn", "reference"]
)


@each_layer
def test_meta_tensors_give_shapes(layer_class):
    layer = layer_class(8, 16).to("meta")
    quantized, indices, loss = layer(torch.randn(2, 5, 8, device="meta"))
    assert (quantized.shape, indices.shape, loss.shape) == ((2, 5, 8), (2, 5), ())


@each_layer
def test_float64_rows_update_a_float32_codebook(layer_class):
    layer = layer_class(4, 8, manual_ema_update=True).double()
    x = torch.randn(2, 20, 4, dtype=torch.float64)
    before = layer._codebook.embed_avg.clone()
    layer.update_indices(x, layer(x)[1])
    assert layer._codebook.embed_avg.dtype == torch.float32
    assert not torch.equal(layer._codebook.embed_avg, before)


@each_layer
def test_index_out_of_range_is_named(layer_class):
    layer = layer_class(8, 16)
    for bad in (-2, 16):
        with pytest.raises(IndexError, match=f"indices: expected values from -1 to 15, got {bad}"):
            layer.get_codes_from_indices(torch.tensor([0, bad]))
        with pytest.raises(IndexError, match=f"indices: expected values from -1 to 15, got {bad}"):
            layer.update_indices(torch.randn(2, 8), torch.tensor([0, bad]))
