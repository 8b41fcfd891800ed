"""What one device computes of attention, by the implementation that was chosen: partial results, and their gradients.

Rules of differentiation stand on these two: the one here, where all keys are on this device, and one for each way in which
they come from others (`jaxmem.sharding`).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxmem.algebra.softmax import Partial
from jaxmem.pallas_kernels import (
    flash_attention_cudnn,
    flash_attention_gpu,
    flash_attention_tpu,
    flash_attention_xla,
)
from jaxmem.pallas_kernels.attention_scores import Extras, Static
from jaxmem.pallas_kernels.masks import Place


def forward(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static) -> Partial:
    """(o [B T H V], lse [B T H]) of q over these keys, in fp32."""
    return _by_platform("forward", static, q, k, v, q_place, k_place, extras)


def gradients(
    q, k, v, q_place: Place, k_place: Place, extras: Extras, result: Partial, cotangents: Partial, static: Static
):
    """(dq, dk, dv, d_relative or None) in fp32; cotangents.lse may be None for zeros.

    These keys may be a part of those that `result` is of: the gradients are then the part that goes through them.
    """
    return _by_platform("gradients", static, q, k, v, q_place, k_place, extras, result, cotangents)


IMPLEMENTATIONS = {
    "xla": flash_attention_xla,
    "pallas_tpu": flash_attention_tpu,
    "pallas_gpu": flash_attention_gpu,
    "cudnn": flash_attention_cudnn,
}
OF_PLATFORM = {"tpu": (flash_attention_tpu,), "cuda": (flash_attention_cudnn, flash_attention_gpu)}
"""The first that has all that is asked for is the best."""


def _by_platform(name: str, static: Static, *arrays):
    """The function of that name of the implementation asked for; of the best one on the platform that is compiled for."""

    def of(module):
        function = partial(getattr(module, name), static=static)
        return function if module is flash_attention_xla else _in_32_bits(function)

    if static.implementation is not None:
        return of(IMPLEMENTATIONS[static.implementation])(*arrays)
    able = lambda modules: [of(m) for m in modules if m.why_not(*arrays[:6], static) is None]
    best = {platform: found[0] for platform, modules in OF_PLATFORM.items() if (found := able(modules))}
    if not best:
        return of(flash_attention_xla)(*arrays)
    return jax.lax.platform_dependent(*arrays, default=of(flash_attention_xla), **best)


def _in_32_bits(kernel: Callable) -> Callable:
    """The same whatever `jax_enable_x64` says: indices of kernels are int32."""

    def run(*arrays):
        with jax.enable_x64(False):
            return kernel(*arrays)

    return run


def to_save(q, k, v, q_place: Place, k_place: Place, extras: Extras, result: Partial):
    """What the backward pass needs, o in the dtype of v."""
    return q, k, v, q_place, k_place, extras, Partial(result.o.astype(v.dtype), result.lse)


def as_cotangents(found, q, k, v, extras: Extras):
    """What `gradients` found as cotangents of (q, k, v, q_place, k_place, extras), in their dtypes."""
    dq, dk, dv, d_relative = found
    d_extras = None if d_relative is None else Extras(d_relative.astype(extras.relative.dtype), None)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, d_extras


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def attention(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static) -> Partial:
    """(o, lse) of q over keys that are all here."""
    return forward(q, k, v, q_place, k_place, extras, static)


def _forward(*arguments):
    primal = lambda x: x.value if isinstance(x, jax.custom_derivatives.CustomVJPPrimal) else x
    *arrays, static = jax.tree.map(primal, arguments)
    result = forward(*arrays, static)
    return result, to_save(*arrays, result)


def _backward(static: Static, saved, cotangents: Partial):
    q, k, v, _, _, extras, _ = saved
    zero = jax.custom_derivatives.SymbolicZero
    if type(cotangents.o) is zero:
        cotangents = cotangents._replace(o=jnp.zeros(cotangents.o.shape, cotangents.o.dtype))
    if type(cotangents.lse) is zero:
        cotangents = cotangents._replace(lse=None)
    return as_cotangents(gradients(*saved, cotangents, static), q, k, v, extras)


attention.defvjp(_forward, _backward, symbolic_zeros=True)
