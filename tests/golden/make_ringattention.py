"""Writes ringattention.npz: what the ringattention package makes of attention over a ring of two devices, with gradients.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python tests/golden/make_ringattention.py

Needs this project and

    pip install --no-deps ringattention==0.1.2 einops
    pip install einops

Its import asks for `jax.lib.xla_bridge`, which JAX no longer has: it is given a stand-in. Its path for CPUs runs unchanged;
biases are left out, which it gets wrong where they are positive.
"""

import functools
import types
from pathlib import Path

import jax
import jax.extend
import jax.lib
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

B, T, H, K = 2, 64, 2, 4
CASES = {"full": (None, False), "causal": (1, False), "packed": (1, True)}  # causal block, documents


def package():
    bridge = types.ModuleType("jax.lib.xla_bridge")
    bridge.get_backend = jax.extend.backend.get_backend
    jax.lib.xla_bridge = bridge
    from ringattention import ringattention

    return ringattention


def attention(causal_block_size, segments):
    options = {
        "causal_block_size": causal_block_size,
        "query_chunk_size": 16,
        "key_chunk_size": 16,
        "deterministic": True,
    }
    options |= {"dropout_rng": None, "attn_pdrop": 0.0, "policy": jax.checkpoint_policies.nothing_saveable}
    options |= {"dtype": jnp.float32, "precision": None, "prevent_cse": True}
    mesh = jax.make_mesh((2,), ("sp",), axis_types=(AxisType.Auto,))
    local = functools.partial(package(), axis_name="sp", float32_logits=True, cache_idx=None, blockwise_kwargs=options)
    spec = P(None, "sp")
    if segments is None:
        call = lambda q, k, v: local(q, k, v, None, None)
        return jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    call = lambda q, k, v, segments: local(q, k, v, None, segments)
    ring = jax.shard_map(call, mesh=mesh, in_specs=(spec, spec, spec, P()), out_specs=spec, check_vma=False)
    return lambda q, k, v: ring(q, k, v, segments)


def main():
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((B, T, H, K), np.float32) for name in ("q", "k", "v", "do")}
    segments = np.stack([np.repeat([1, 2, 3], [20, 30, 14]), np.repeat([1, 2], [37, 27])])
    saved = arrays | {"segments": segments}
    for name, (block, packed) in CASES.items():
        f = jax.jit(attention(block, jnp.asarray(segments) if packed else None))
        o, pull = jax.vjp(f, *(arrays[x] for x in "qkv"))
        found = {"o": o} | dict(zip(("dq", "dk", "dv"), pull(jnp.asarray(arrays["do"])), strict=True))
        saved |= {f"{name}/{key}": np.asarray(x) for key, x in found.items()}
    np.savez_compressed(Path(__file__).with_name("ringattention.npz"), **saved)


if __name__ == "__main__":
    main()
