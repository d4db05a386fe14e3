"""Bad arguments: every public function says which argument, what it expected and what came; direct calls only raise."""

import re

import pytest
import torch

import vqkernels


def search_arguments():
    return {"z": torch.randn(6, 4), "codebook": torch.randn(5, 4)}


def statistics_arguments():
    return {"z": torch.randn(6, 4), "indices": torch.zeros(6, dtype=torch.int64), "num_codes": 5}


def ema_arguments():
    return {
        "codebook": torch.randn(5, 4),
        "cluster_size": torch.ones(5),
        "code_sum": torch.randn(5, 4),
        "counts": torch.ones(5, dtype=torch.int64),
        "sums": torch.randn(5, 4),
        "decay": 0.9,
        "eps": 1e-5,
    }


FUNCTIONS = {
    "nearest_code": (vqkernels.nearest_code, search_arguments),
    "vector_quantize": (vqkernels.vector_quantize, search_arguments),
    "code_statistics": (vqkernels.code_statistics, statistics_arguments),
    "ema_update_": (vqkernels.ema_update_, ema_arguments),
}

SEARCH_CASES = [
    ({"z": None}, TypeError, "z", "float32", "None"),
    ({"z": [[1.0] * 4]}, TypeError, "z", "float32", "list"),
    ({"z": torch.ones(6, 4, dtype=torch.int64)}, TypeError, "z", "float32", "int64"),
    ({"z": torch.ones(6, 4, dtype=torch.bool)}, TypeError, "z", "float32", "bool"),
    ({"z": torch.ones(6, 4, dtype=torch.complex64)}, TypeError, "z", "float32", "complex64"),
    ({"z": torch.ones(6, 3)}, ValueError, "codebook", "[5, 3]", "[5, 4]"),
    ({"z": torch.ones(())}, ValueError, "z", "[..., D]", "[]"),
    ({"codebook": None}, TypeError, "codebook", "float32", "None"),
    ({"codebook": torch.ones(5, 4, dtype=torch.int32)}, TypeError, "codebook", "float32", "int32"),
    ({"codebook": torch.ones(4)}, ValueError, "codebook", "[K, D]", "[4]"),
    ({"codebook": torch.ones(1, 1, 5, 4)}, ValueError, "codebook", "[H, K, D]", "[1, 1, 5, 4]"),
    ({"codebook": torch.ones(5, 3)}, ValueError, "codebook", "[5, 4]", "[5, 3]"),
    ({"codebook": torch.ones(0, 4)}, ValueError, "codebook", "at least one", "[0, 4]"),
    ({"codebook": torch.ones(5, 0)}, ValueError, "codebook", "at least one", "[5, 0]"),
    ({"codebook": torch.ones(0, 5, 4)}, ValueError, "codebook", "at least one", "[0, 5, 4]"),
    ({"codebook": torch.ones(3, 5, 4)}, ValueError, "z", "3 heads", "[6, 4]"),
    ({"z": torch.ones(4), "codebook": torch.ones(3, 5, 4)}, ValueError, "z", "[H, ..., D]", "[4]"),
    ({"codebook": torch.ones(5, 4, device="meta")}, ValueError, "codebook", "cpu", "meta"),
    ({"mask": [True] * 6}, TypeError, "mask", "bool", "list"),
    ({"mask": torch.ones(6)}, TypeError, "mask", "bool", "float32"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "mask", "[6]", "[5]"),
    ({"mask": torch.ones(6, 4, dtype=torch.bool)}, ValueError, "mask", "[6]", "[6, 4]"),
    ({"mask": torch.ones(6, dtype=torch.bool, device="meta")}, ValueError, "mask", "cpu", "meta"),
    ({"metric": "euclid"}, ValueError, "metric", "l2, cosine, dot", "euclid"),
    ({"metric": None}, ValueError, "metric", "l2, cosine, dot", "None"),
]
QUANTIZE_CASES = [
    ({"gradient": "ste"}, ValueError, "gradient", "straight_through, rotation, none", "ste"),
    ({"gradient": None}, ValueError, "gradient", "straight_through, rotation, none", "None"),
    ({"commitment_weight": None}, TypeError, "commitment_weight", "number", "None"),
    ({"commitment_weight": "much"}, TypeError, "commitment_weight", "number", "much"),
    ({"codebook_weight": [1.0]}, TypeError, "codebook_weight", "number", "list"),
]
STATISTICS_CASES = [
    ({"z": "rows"}, TypeError, "z", "float32", "str"),
    ({"z": torch.ones(6, 4, dtype=torch.int64)}, TypeError, "z", "float32", "int64"),
    ({"z": torch.ones(())}, ValueError, "z", "[..., D]", "[]"),
    ({"z": torch.ones(6, 0)}, ValueError, "z", "[..., D]", "[6, 0]"),
    ({"z": torch.ones(7, 4)}, ValueError, "indices", "[7]", "[6]"),
    ({"z": torch.ones(6), "heads": True}, ValueError, "z", "[H, ..., D]", "[6]"),
    ({"indices": None}, TypeError, "indices", "int64", "None"),
    ({"indices": torch.zeros(6, dtype=torch.int32)}, TypeError, "indices", "int64", "int32"),
    ({"indices": torch.zeros(6)}, TypeError, "indices", "int64", "float32"),
    ({"indices": torch.zeros(6, 1, dtype=torch.int64)}, ValueError, "indices", "[6]", "[6, 1]"),
    ({"indices": torch.zeros(6, dtype=torch.int64, device="meta")}, ValueError, "indices", "cpu", "meta"),
    ({"indices": torch.full((6,), 5)}, IndexError, "indices", "-1 to 4", "5"),
    ({"indices": torch.full((6,), -2)}, IndexError, "indices", "-1 to 4", "-2"),
    ({"num_codes": 0}, ValueError, "num_codes", "at least 1", "0"),
    ({"num_codes": -3}, ValueError, "num_codes", "at least 1", "-3"),
    ({"num_codes": 5.0}, TypeError, "num_codes", "integer", "5.0"),
    ({"num_codes": "5"}, TypeError, "num_codes", "integer", "5"),
    ({"num_codes": None}, TypeError, "num_codes", "integer", "None"),
]
EMA_CASES = [
    *(({name: None}, TypeError, name, "float32", "None") for name in ("codebook", "cluster_size", "code_sum", "sums")),
    *(
        ({name: torch.ones(5, 4).half()}, TypeError, name, "float32", "float16")
        for name in ("codebook", "code_sum", "sums")
    ),
    *(({name: torch.ones(5, 3)}, ValueError, name, "[5, 4]", "[5, 3]") for name in ("code_sum", "sums")),
    *(({name: torch.ones(5, 4, device="meta")}, ValueError, name, "cpu", "meta") for name in ("code_sum", "sums")),
    ({"codebook": torch.ones(4)}, ValueError, "codebook", "[K, D]", "[4]"),
    ({"codebook": torch.ones(0, 4)}, ValueError, "codebook", "not empty", "[0, 4]"),
    ({"cluster_size": torch.ones(4)}, ValueError, "cluster_size", "[5]", "[4]"),
    ({"cluster_size": torch.ones(5).double()}, TypeError, "cluster_size", "float32", "float64"),
    ({"counts": torch.ones(5)}, TypeError, "counts", "int64", "float32"),
    ({"counts": torch.ones(5, 1, dtype=torch.int64)}, ValueError, "counts", "[5]", "[5, 1]"),
    ({"decay": 1.5}, ValueError, "decay", "0 to 1", "1.5"),
    ({"decay": -0.1}, ValueError, "decay", "0 to 1", "-0.1"),
    ({"decay": float("nan")}, ValueError, "decay", "0 to 1", "nan"),
    ({"decay": "0.9"}, TypeError, "decay", "number", "0.9"),
    ({"decay": None}, TypeError, "decay", "number", "None"),
    ({"eps": -1e-5}, ValueError, "eps", "at least 0", "-1e-05"),
    ({"eps": float("nan")}, ValueError, "eps", "at least 0", "nan"),
    ({"eps": None}, TypeError, "eps", "number", "None"),
]
BACKEND_CASES = [
    ({"backend": "gpu"}, ValueError, "backend", "native, triton, reference", "gpu"),
    ({"backend": 3}, ValueError, "backend", "native, triton, reference", "3"),
    ({"backend": False}, ValueError, "backend", "native, triton, reference", "False"),
]
CASES = [
    *(("nearest_code", *case) for case in SEARCH_CASES + BACKEND_CASES),
    *(("vector_quantize", *case) for case in SEARCH_CASES + QUANTIZE_CASES + BACKEND_CASES),
    *(("code_statistics", *case) for case in STATISTICS_CASES + BACKEND_CASES),
    *(("ema_update_", *case) for case in EMA_CASES + BACKEND_CASES),
]


def label(case):
    name, change, *_ = case
    described = ",".join(f"{k}={list(v.shape) if isinstance(v, torch.Tensor) else v}" for k, v in change.items())
    return f"{name}-{described}"


@pytest.mark.parametrize(("name", "change", "error", "argument", "expectation", "got"), CASES, ids=map(label, CASES))
def test_message(name, change, error, argument, expectation, got):
    function, arguments = FUNCTIONS[name]
    with pytest.raises(error) as raised:
        function(**(arguments() | change))
    assert raised.type is error
    message = str(raised.value)
    assert re.match(rf"{argument}\b", message)
    assert "expected" in message
    for part in (expectation, got):
        assert part in message


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backend_that_cannot_serve(name):
    """On meta tensors: shapes alone come from the default, native kernels there are none."""
    function, arguments = FUNCTIONS[name]
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    function(**meta)
    with pytest.raises(RuntimeError, match="no native kernels for meta"):
        function(**meta, backend="native")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_state_survives_a_refusal(name):
    function, arguments = FUNCTIONS[name]
    given = arguments()
    before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match="backend"):
        function(**given, backend="none")
    for k, v in before.items():
        assert torch.equal(given[k], v)


def op_arguments():
    z, codebook = torch.randn(2, 6, 4), torch.randn(2, 5, 4)
    indices = torch.zeros(2, 6, dtype=torch.int64)
    counts = torch.ones(2, 5, dtype=torch.int64)
    return {
        "nearest_code": [z, codebook, "l2", torch.ones(2, 6, dtype=torch.bool)],
        "vector_quantize": [z, codebook, "l2", torch.ones(2, 6, dtype=torch.bool)],
        "vector_quantize_backward": [
            *(torch.ones_like(z), torch.tensor(1.0), z, codebook, indices, torch.tensor(12), "rotation")
        ],
        "code_statistics": [z, indices, 5],
        "ema_update_": [codebook, torch.ones(2, 5), codebook.clone(), counts, codebook.clone(), 0.9, 1e-5],
    }


WRONG = {
    "one": lambda t: t.flatten()[:1],
    "empty": lambda t: t.new_empty(0),
    "one more": lambda t: torch.cat([t, t]) if t.ndim else torch.stack([t, t]),
    "short": lambda t: t[..., :-1] if t.ndim else t.new_empty(0),
    "short rows": lambda t: t[:, :-1] if t.ndim > 1 else t.new_empty(0),
    "more axes": lambda t: t.unsqueeze(0),
    "int8": lambda t: t.to(torch.int8),
    "complex": lambda t: t.to(torch.complex64),
}
# Fewer codes, narrower rows to add up and a gradient to convert are right as they stand.
RIGHT = {
    ("nearest_code", 1, "short rows"),
    ("vector_quantize", 1, "short rows"),
    ("vector_quantize_backward", 0, "int8"),
    ("vector_quantize_backward", 0, "complex"),
    ("vector_quantize_backward", 3, "short rows"),
    ("code_statistics", 0, "short"),
}
DIRECT_CALLS = [
    (name, i, wrong)
    for name, args in op_arguments().items()
    for i, a in enumerate(args)
    for wrong in WRONG
    if isinstance(a, torch.Tensor) and (name, i, wrong) not in RIGHT
]


@pytest.mark.parametrize(("name", "position", "wrong"), DIRECT_CALLS)
def test_direct_calls_raise(name, position, wrong):
    """What memory safety needs is checked by the operation itself. A crash here ends the test run, as it should."""
    args = op_arguments()[name]
    args[position] = WRONG[wrong](args[position])
    with pytest.raises((RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)):
        getattr(torch.ops.vqkernels, name)(*args)


def test_direct_calls_with_bad_values():
    ops, args = torch.ops.vqkernels, op_arguments()
    for name in ("nearest_code", "vector_quantize"):
        with pytest.raises(RuntimeError, match="unknown metric"):
            getattr(ops, name)(*args[name][:2], "l3", None)
    *backward, _ = args["vector_quantize_backward"]
    with pytest.raises(RuntimeError, match="unknown gradient"):
        ops.vector_quantize_backward(*backward, "ste")
    backward[4] = torch.full((2, 6), 5)
    with pytest.raises(RuntimeError, match="out of range"):
        ops.vector_quantize_backward(*backward, "rotation")
    with pytest.raises(IndexError, match="indices"):
        ops.code_statistics(torch.randn(2, 6, 4), torch.full((2, 6), 5), 5)
    for num_codes in (0, -1, 2**61):
        with pytest.raises(RuntimeError):
            ops.code_statistics(torch.randn(2, 6, 4), torch.zeros(2, 6, dtype=torch.int64), num_codes)
