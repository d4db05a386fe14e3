"""The benchmark suite itself: a tiny run through its front door, and the limits it measures against."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
import torch

from benchmarks import limits, peers, timing, truth
from benchmarks.__main__ import OPERATIONS, main
from benchmarks.cases import Case, parse_case
from benchmarks.measure import OURS
from benchmarks.peers import Step

CPU = torch.device("cpu")
DENOISING = [name for name, operation in OPERATIONS.items() if operation.parse is not parse_case]
QUANTIZATION = [name for name in OPERATIONS if name not in DENOISING]
RESULT_KEYS = {"provider", "unavailable", "check", "extra_bytes", "seconds", "min_s", "median_s", "ratio", "rate"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("benchmarks")
    try:
        names = [word for name in QUANTIZATION for word in ("--op", name)]
        assert main([*names, "--shape", "192,40,8", "--rounds", "2", "--out", str(folder)]) == 0
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def groups(folder: Path) -> dict[str, dict]:
    report = json.loads((folder / "benchmarks.json").read_text())
    return {group["operation"]: group for group in report["groups"]}


def test_provenance(folder: Path) -> None:
    origin = json.loads((folder / "benchmarks.json").read_text())["provenance"]
    assert origin["packages"]["torch"] == torch.__version__
    assert origin["threads"] == 1
    assert origin["device"] == "cpu"
    assert origin["cpu"]
    assert origin["cpu_capability"] in ("scalar", "avx2", "avx512")
    assert set(origin["build"]) >= {"compiler", "torch", "cuda"}


@pytest.mark.parametrize("name", QUANTIZATION)
def test_every_provider_on_cpu_is_right(groups: dict[str, dict], name: str) -> None:
    results = groups[name]["results"]
    assert [result["provider"] for result in results] == list(OPERATIONS[name].providers)
    missing = {result["provider"] for result in results if result["unavailable"]}
    assert missing == ({"flash-kmeans"} if name == "nearest_code" else set())
    for result in results:
        if result["unavailable"]:
            continue
        figures = result["check"]
        # In float32 a sum of 192 numbers is off by at most 192 eps, relative to the sum of their magnitudes.
        assert figures.pop("error", 0) < 192 * torch.finfo(torch.float32).eps, result["provider"]
        assert set(figures.values()) <= {0.0}, result["provider"]


@pytest.mark.parametrize("name", DENOISING)
def test_denoising_operations_are_right(name: str, tmp_path: Path) -> None:
    arguments = ["--op", name, "--shape", "64,8,40", "--provider", "eager", "--rounds", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    group = json.loads((tmp_path / "benchmarks.json").read_text())["groups"][0]
    assert group["sizes"][-3:] == [64, 8, 40]
    for result in group["results"]:
        assert result["unavailable"] is None
        assert result["check"]["beyond_bound"] == 0
        assert 0 < result["check"]["error"] < 1e-5


def test_wrong_denoising_values_are_found() -> None:
    operation = OPERATIONS["norm_modulate and gradients"]
    inputs = operation.inputs(operation.cases[0].smaller(), CPU)
    check, result = operation.check(*inputs), operation.providers["eager"](*inputs)()
    assert check(result)["beyond_bound"] == 0
    wrong = [value * (1.1 if i == 1 else 1) for i, value in enumerate(result)]
    assert check(wrong)["beyond_bound"] == 1


def test_traffic_is_what_goes_in_and_out() -> None:
    x, modulation = 4 * 2 * 8 * 40, 4 * 2 * 80
    traffic = {"norm_modulate": 2 * x + modulation, "norm_modulate and gradients": 5 * x + 3 * modulation}
    for name, expected in traffic.items():
        operation = OPERATIONS[name]
        assert operation.work(operation.parse("2,8,40")) == expected


@pytest.mark.parametrize("name", QUANTIZATION)
def test_figures_follow_from_the_samples(groups: dict[str, dict], name: str) -> None:
    group = groups[name]
    ours = group["results"][0]
    assert ours["provider"] == OURS
    for result in group["results"]:
        if result["unavailable"]:
            continue
        assert set(result) >= RESULT_KEYS
        samples = result["seconds"]
        assert len(samples) >= 2
        assert len(samples) % 2 == 0
        low = min(samples)
        assert result["min_s"] == low > 0
        assert result["median_s"] == pytest.approx(np.median(samples))
        assert result["ratio"] == pytest.approx(low / min(ours["seconds"]))
        assert result["rate"] == pytest.approx(group["work"] / low)
        assert result["fraction"] == pytest.approx(result["rate"] / group["limit"]["rate"])


def test_work_of_a_search_is_two_operations_a_product(groups: dict[str, dict]) -> None:
    assert groups["nearest_code"]["work"] == 2 * 192 * 40 * 8


def test_scikit_learn_limits_threads_for_its_own_calls_alone() -> None:
    def sizes() -> list[int]:
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]

    threads, seen = torch.get_num_threads(), []
    z, codebook = torch.randn(30, 4), torch.randn(5, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sklearn.metrics.pairwise_distances_argmin", lambda rows, codes: seen.append(sizes()))
        torch.set_num_threads(1)
        try:
            search = peers.search_sklearn(z, codebook)
        finally:
            torch.set_num_threads(threads)
        with threadpoolctl.threadpool_limits(limits=2):
            before = sizes()
            search()
            assert sizes() == before
    assert 2 in before
    assert seen == [[1] * len(before)]


def test_markdown_and_plots(folder: Path) -> None:
    text = (folder / "benchmarks.md").read_text()
    assert all(f"## {name}, 192x40x8" in text for name in QUANTIZATION)
    assert text.count("| vqkernels |") == len(QUANTIZATION)
    assert (folder / "fma_fraction.png").read_bytes().startswith(b"\x89PNG")


def test_sweeps_are_plotted(tmp_path: Path) -> None:
    arguments = ["--op", "nearest_code", "--shape", "more", "--provider", "addmm", "--quick", "--rounds", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_search_stays_below_the_fma_peak(tmp_path: Path) -> None:
    arguments = ["--op", "nearest_code", "--shape", "2048,512,64", "--provider", "vqkernels", "--out", str(tmp_path)]
    assert main(arguments) == 0
    group = json.loads((tmp_path / "benchmarks.json").read_text())["groups"][0]
    assert group["limit"]["rate"] > 1e9
    assert 0 < group["results"][0]["fraction"] < 1.05


def test_fma_probe_keeps_its_chains(tmp_path: Path) -> None:
    """The compiled loop holds as many multiply-adds as the flops it claims; merged or dropped chains would lie."""
    assembly = tmp_path / "fma_peak.s"
    flags = [flag for flag in limits.COMPILE_FLAGS if flag != "-shared"]
    subprocess.run([*limits.find_compiler(), *flags, "-S", str(limits.SOURCE), "-o", str(assembly)], check=True)
    lines = assembly.read_text().splitlines()
    fused = sum("fmadd" in line or "fmla" in line for line in lines)
    claimed = limits._cpu_probe()(1) / 2
    vector_lengths = {16, 8, 4}
    assert fused > 0
    assert claimed / fused in vector_lengths


def test_copy_bandwidth_is_plausible() -> None:
    assert 1e8 < limits.copy_bandwidth(2**24, CPU) < 1e13


def test_extra_bytes_sees_an_allocation() -> None:
    size = 64 * 2**20
    extra = timing.extra_bytes(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    if sys.platform == "linux":
        # The kernel counts resident pages in batches, one a CPU.
        assert abs(extra - size) < 4 * 2**20
    else:
        assert extra is None


def test_wrong_codes_are_found() -> None:
    z, codebook = Case("", "own", 64, 16, 4).data(CPU)
    check = truth.check_search(z, codebook)
    nearest = torch.cdist(z.double(), codebook.double()).argmin(1)
    assert set(check(nearest).values()) == {0.0}
    nearest[:16] = (nearest[:16] + 1) % 16
    assert check(nearest) == {"differs": 0.25, "not_nearest": 0.25, "beyond_bound": 0.25}


def test_wrong_values_are_found() -> None:
    inputs = OPERATIONS["vector_quantize"].inputs(Case("", "own", 64, 16, 4), CPU)
    step = OPERATIONS["vector_quantize"].providers["torch seam"](*inputs)()
    check = truth.check_step(*inputs)
    assert check(step)["error"] < 1e-5
    wrong = [step._replace(loss=step.loss * 1.1), step._replace(grad_z=step.grad_z * 1.1)]
    wrong.append(step._replace(codebook=step.codebook * 1.1))
    assert all(isinstance(s, Step) and check(s)["error"] > 0.05 for s in wrong)


@pytest.mark.parametrize("text", ["VQGAN", "1,2", "1x2x3", ""])
def test_only_three_numbers_are_a_case(text: str) -> None:
    assert parse_case(text) is None


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--rounds", "0"], ["--op", "sort"]])
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


def test_unknown_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shape", "no such case"]) == 2
    assert "--list" in capsys.readouterr().out


def test_memory_bound_of_a_large_codebook(capsys: pytest.CaptureFixture[str]) -> None:
    """K = 262144, N = 65536, D = 8: less than 3 x the bytes of inputs and outputs + 64 MiB."""
    assert main(["--memory"]) == 0
    assert "within 95.5 MiB" in capsys.readouterr().out  # 3 x (2 + 8 + 0.5) MiB + 64 MiB
