"""How much of a machine a run uses: the share of its arithmetic that goes into the model, and memory.

    MFU = tokens/s x (FLOPs of a training step per token) / (peak FLOPs/s of all devices)

FLOPs are those of `accounting.account`, forward and backward, without what remat computes again. Peaks are published ones of
bf16 products; a CPU's is measured, by one product of matrices in fp32 on all its cores.

Reference: Chowdhery et al. 2022, arXiv 2204.02311, appendix B.
"""

import functools
import time

import jax
import jax.numpy as jnp

from jaxmem.models.accounting import account
from jaxmem.models.decoder import DecoderConfig
from jaxmem.sharding.attention_scheme import CHIPS, KINDS

SIDE, REPEATS = 1024, 8
"""Of the product that is timed on a CPU: about a tenth of a second on two cores."""


class Utilisation:
    """Of a run of one model on all devices that there are."""

    def __init__(self, config: DecoderConfig, context_tokens: int):
        self._flops_per_token = 3 * account(config, context_tokens).forward_flops
        self._peak_flops_per_s = peak_flops_per_s()

    def mfu(self, tokens_per_s: float) -> float | None:
        """The share of the peak; None for devices whose peak is not known."""
        return self._peak_flops_per_s and tokens_per_s * self._flops_per_token / self._peak_flops_per_s


def peak_flops_per_s() -> float | None:
    """Of all devices of all processes; None if it is not known."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured() * jax.process_count()
    chip = next((chip for start, chip in KINDS.items() if device.device_kind.startswith(start)), None)
    return None if chip is None else CHIPS[chip].flops_per_s * jax.device_count()


@functools.cache
def _measured() -> float:
    product = jax.jit(lambda a: a @ a)
    matrix = jax.device_put(jnp.full((SIDE, SIDE), 1 / SIDE), jax.local_devices()[0])
    product(matrix).block_until_ready()
    times = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        product(matrix).block_until_ready()
        times.append(time.perf_counter() - start_s)
    return 2 * SIDE**3 / min(times)


def peak_memory_bytes() -> int | None:
    """The most that any device of this process has held so far; of a CPU what the process has; None if it is not known."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peaks := [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]:
        return max(peaks)
    try:
        import resource
        import sys
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
