"""The FMA probe for CUDA devices, in Triton: chains of multiply-adds that stay in registers."""

import torch
import triton
import triton.language as tl

CHAINS = 1024  # of a program of 4 warps: 8 independent ones a thread
UNROLLED = 16
PROGRAMS_PER_MULTIPROCESSOR = 16


@triton.jit
def _chains(out, a, b, steps, CHAINS: tl.constexpr, UNROLLED: tl.constexpr):
    lane = tl.arange(0, CHAINS)
    chain = lane.to(tl.float32)
    for _ in range(steps):
        for _ in tl.static_range(UNROLLED):
            chain = tl.fma(chain, a, b)
    tl.store(out + tl.program_id(0) * CHAINS + lane, chain)


def launch(device: torch.device, steps: int) -> float:
    """Starts the probe on every multiprocessor and returns how many floating point operations it does."""
    programs = PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs * CHAINS, device=device)
    _chains[(programs,)](out, 0.999, 0.001, steps, CHAINS, UNROLLED, num_warps=4)
    return 2.0 * out.numel() * steps * UNROLLED
