"""Attention by cuDNN, where what it gives can be used rightly: whole rows of one document each, in order, in 16 bits.

cuDNN returns o in the dtype of v, so that its o is a result and no partial one; parts of rows, documents and whatever else it
lacks are left to the other kernels. Its lse is fp32 inside JAX, but the public function casts it to 16 bits and gives it no
gradient, and cuDNN's backward pass takes no cotangent of lse. So this module calls the two passes themselves, and where lse
has a cotangent leaves the backward pass to the kernels of `flash_attention_gpu`, which need no more than o and lse.
"""

import inspect

import jax
import jax.numpy as jnp

from jaxmem.algebra.softmax import Partial
from jaxmem.pallas_kernels import flash_attention_gpu
from jaxmem.pallas_kernels.attention_scores import Extras, Static
from jaxmem.pallas_kernels.masks import Place

NO_GPU = "an NVIDIA GPU"
WIDEST = {8: 128, 9: 256}
"""Head that cuDNN takes, by major compute capability; later ones as Hopper."""


def forward(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static) -> Partial:
    """(o [B T H V], rounded to the dtype of v, lse [B T H]) in fp32."""
    _refuse(q, k, v, q_place, k_place, extras, static)
    cudnn, options = _passes(static)
    o, lse = cudnn._dot_product_attention_fwd_p_wrapper.bind(q, k, v, *_unused(q), **options, is_training=True)
    return Partial(o.astype(jnp.float32), lse.reshape(q.shape[0], q.shape[2], -1).transpose(0, 2, 1))


def gradients(
    q, k, v, q_place: Place, k_place: Place, extras: Extras, result: Partial, cotangents: Partial, static: Static
):
    """(dq, dk, dv, None) in fp32, rounded to the dtypes of q, k and v if lse has no cotangent."""
    if cotangents.lse is not None:
        return flash_attention_gpu.gradients(q, k, v, q_place, k_place, extras, result, cotangents, static)
    _refuse(q, k, v, q_place, k_place, extras, static)
    cudnn, options = _passes(static)
    o, do, lse = result.o.astype(v.dtype), cotangents.o.astype(v.dtype), result.lse.transpose(0, 2, 1)
    found = cudnn._dot_product_attention_bwd_p_wrapper.bind(q, k, v, *_unused(q), lse, o, do, **options)
    return *(x.astype(jnp.float32) for x in found[:3]), None


def why_not(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static) -> str | None:
    """What cuDNN lacks for such attention, or this process for cuDNN; None: nothing."""
    major = _compute_capability()
    if major is None:
        return NO_GPU
    mask, widths, dtypes = static.mask, {q.shape[-1], v.shape[-1]}, {str(x.dtype) for x in (q, k, v)}
    widest = WIDEST.get(min(major, 9), 0)
    lacking = {
        "places or other rows than of one document each": not static.in_order,
        f"arrays of {', '.join(sorted(dtypes))}": len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"},
        "chunks": mask.chunk is not None,
        "windows that look ahead": mask.window is not None and not mask.causal,
        "a soft cap": static.soft_cap is not None,
        "relative positions": extras.relative is not None,
        "dropout": extras.seeds is not None,
        f"heads of widths {sorted(widths)}": len(widths) > 1 or max(widths) % 8 or max(widths) > widest,
        "blocks of one's own choice": (static.block_q or static.block_k) is not None,
    }
    return next((what for what, missing in lacking.items() if missing), None)


def _compute_capability() -> int | None:
    """Of this process's GPU, its major part; None without one of NVIDIA's."""
    device = jax.devices()[0]
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    return int(device.compute_capability.split(".")[0]) if nvidia else None


def _refuse(*arguments) -> None:
    lacking = why_not(*arguments)
    if lacking == NO_GPU:
        raise NotImplementedError(
            "flash_attention: needs an NVIDIA GPU for 'cudnn', got none in this process; use 'xla'"
        )
    if lacking is not None:
        raise NotImplementedError(
            f"flash_attention: needs an implementation with {lacking}, got 'cudnn'; use 'pallas_gpu' or 'xla'"
        )


def _passes(static: Static):
    """JAX's module of cuDNN's two passes, and what both are told."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # JAX's public function hides what is needed here

    wanted = inspect.signature(cudnn._dot_product_attention_fwd_impl).parameters
    return cudnn, ({"score_mod": None} if "score_mod" in wanted else {}) | {  # from jax 0.11 on
        "scale": static.scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": cudnn.MaskType.CAUSAL if static.mask.causal else cudnn.MaskType.NO_MASK,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": static.mask.window,
    }


def _unused(q) -> list[jax.Array]:
    """Bias, lengths and offsets of documents, and tables of pages."""
    return 7 * [jnp.zeros(0, q.dtype)]
