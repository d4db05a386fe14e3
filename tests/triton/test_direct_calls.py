"""Direct calls check what memory safety needs, and kernels bound what only the device knows."""

import re

import pytest
import torch

from vqkernels.triton import vector_quantize as quantization
from vqkernels.triton.code_statistics import code_statistics
from vqkernels.triton.ema_update import ema_update_
from vqkernels.triton.nearest_code import nearest_code
from vqkernels.triton.residual_quantize import residual_quantize, residual_quantize_backward, residual_statistics
from vqkernels.triton.topk_codes import topk_codes
from vqkernels.triton.vector_quantize import vector_quantize, vector_quantize_backward


def calls():
    """Each function with arguments that fit, by name."""
    z, codebook = torch.randn(2, 6, 4), torch.randn(2, 5, 4)
    indices, mask = torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.bool)
    search = {"z": z, "codebook": codebook, "metric": "l2", "mask": mask}
    levels = {"z": z, "codebooks": codebook, "sizes": [2, 1, 2]}
    chosen = torch.zeros(2, 6, 3, dtype=torch.int64)
    return {
        nearest_code: search,
        vector_quantize: search,
        vector_quantize_backward: {
            "grad_quantized": torch.ones_like(z),
            "grad_mse": torch.tensor(1.0),
            "z": z,
            "codebook": codebook,
            "indices": indices,
            "valid_rows": torch.tensor(12),
            "gradient": "rotation",
        },
        code_statistics: {"z": z, "indices": indices, "num_codes": 5},
        topk_codes: {"z": z, "codebook": codebook, "k": 3, "metric": "l2", "mask": mask},
        residual_quantize: levels
        | {"metric": "l2", "mask": mask, "num_levels": torch.ones(2, 6, dtype=torch.int64), "indices": chosen},
        residual_quantize_backward: {
            "grad_quantized": torch.ones_like(z),
            "grad_mse": torch.ones(2, 3),
            **levels,
            "indices": chosen,
            "valid_rows": torch.ones(2, 3, dtype=torch.int64),
            "gradient": "rotation",
        },
        residual_statistics: levels | {"indices": chosen},
        ema_update_: {
            "codebook": codebook,
            "cluster_size": torch.ones(2, 5),
            "code_sum": codebook.clone(),
            "counts": torch.ones(2, 5, dtype=torch.int64),
            "sums": codebook.clone(),
            "decay": 0.9,
            "eps": 1e-5,
        },
    }


def call(function, device, **change):
    arguments = calls()[function]
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return function(*(moved | change).values())


TENSORS = [(f, name) for f, given in calls().items() for name, v in given.items() if isinstance(v, torch.Tensor)]
IDS = [f"{function.__name__}-{name}" for function, name in TENSORS]


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=IDS)
def test_dtype(function, name, device):
    for dtype in (torch.int8, torch.complex64):
        with pytest.raises(TypeError, match=rf"^{name}: expected a tensor of .*, got {str(dtype)[6:]} tensor"):
            call(function, device, **{name: calls()[function][name].to(device, dtype)})


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=IDS)
def test_device(function, name, device):
    """Any argument but the first that others are compared with is named; that one by the next."""
    with pytest.raises(ValueError, match=r"^\w+: expected device") as raised:
        call(function, device, **{name: calls()[function][name].to("meta")})
    base = "codebook" if function is ema_update_ else "z"
    assert str(raised.value).startswith(f"{name}: ") == (name != base)


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=IDS)
def test_shape(function, name, device):
    value = calls()[function][name].to(device)
    wrong = [value.flatten()[:1], value.unsqueeze(0), torch.stack([value, value])]
    if value.ndim:
        wrong += [value[:1], value[..., :0]]
    # Fewer columns of what is only added up are right, and so are fewer codes to search.
    if value.ndim and (function, name) != (code_statistics, "z"):
        wrong.append(value[..., :-1])
    if value.ndim > 1 and not (name == "codebook" and function is not ema_update_):
        wrong.append(value[:, :-1])
    for broken in wrong:
        with pytest.raises(ValueError, match=r"^\w+: expected shape"):
            call(function, device, **{name: broken})


@pytest.mark.parametrize(
    ("function", "change"),
    [
        (nearest_code, {"metric": "l1"}),
        (nearest_code, {"codebook": (2, 0, 4)}),
        (vector_quantize, {"metric": "l1"}),
        (vector_quantize, {"codebook": (2, 0, 4)}),
        (vector_quantize_backward, {"codebook": (2, 0, 4)}),
        (vector_quantize_backward, {"gradient": "magic"}),
        (code_statistics, {"num_codes": 0}),
        (code_statistics, {"num_codes": -1}),
        (topk_codes, {"k": 0}),
        (topk_codes, {"metric": "l1"}),
        (topk_codes, {"codebook": (2, 0, 4)}),
        (residual_quantize, {"metric": "l1", "indices": None}),
        (residual_quantize, {"sizes": [5, 0]}),
        (residual_quantize, {"sizes": [6, -1]}),
        (residual_quantize, {"sizes": []}),
        (residual_quantize_backward, {"sizes": []}),
        (residual_quantize_backward, {"gradient": "magic"}),
        (residual_statistics, {"sizes": [6, -1]}),
    ],
)
def test_value(function, change, device):
    change = {k: torch.zeros(v, device=device) if isinstance(v, tuple) else v for k, v in change.items()}
    with pytest.raises(RuntimeError, match=r"vqkernels: (expected|unknown)"):
        call(function, device, **change)


@pytest.mark.parametrize("function", [residual_quantize, residual_quantize_backward, residual_statistics])
def test_sizes_of_other_codebooks(function, device):
    for sizes in ([2, 2], [2, 1, 3]):
        with pytest.raises(ValueError, match=rf"^codebooks: expected shape \[2, {sum(sizes)}, 4\]"):
            call(function, device, sizes=sizes)


@pytest.mark.parametrize("function", [vector_quantize_backward, residual_quantize_backward])
def test_grad_mse_of_another_width(function, device):
    wrong = calls()[function]["grad_mse"].double()
    message = re.escape(f"grad_mse: expected a tensor of float32, got float64 tensor of shape {list(wrong.shape)}")
    with pytest.raises(TypeError, match=message):
        call(function, device, grad_mse=wrong.to(device))


@pytest.mark.parametrize("wild", [-2, 5, 7])
def test_indices_that_are_no_codes(wild, device, monkeypatch):
    """In the first of two heads, 5 and 7 would be codes of the second."""
    z, codebook = torch.randn(2, 6, 4, device=device), torch.randn(2, 5, 4, device=device)
    indices = torch.tensor([[0, wild, 4, wild, 1, 2], [3, 0, 0, 1, 2, 4]], device=device)
    no_code = indices == wild
    expected = torch.stack([codebook[h][indices[h].clamp(0, 4)] for h in range(2)])

    found = indices.clone(), torch.empty(2, 6, device=device)
    monkeypatch.setattr(quantization, "search", lambda inputs, metric: found)
    quantized, *_ = vector_quantize(z, codebook, "l2", None)
    assert quantized[no_code].isnan().all()
    assert torch.equal(quantized[~no_code], expected[~no_code])

    valid_rows = torch.tensor(10, device=device)
    grad_z = vector_quantize_backward(torch.ones_like(z), None, z, codebook, indices, valid_rows, "straight_through")
    assert torch.equal(grad_z, (~no_code).float().unsqueeze(-1).expand_as(z))

    counts, sums = code_statistics(z, indices, 5)
    assert counts.tolist() == [[(row == k).sum().item() for k in range(5)] for row in indices]
    assert torch.equal(sums[0, 0], z[0, 0])
