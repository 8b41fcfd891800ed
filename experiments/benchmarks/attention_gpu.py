"""Attention's kernels on an NVIDIA GPU against what people would pick: cuDNN, and the Triton kernel that ships with JAX.

    python experiments/benchmarks/attention_gpu.py [--cases causal grouped] [--caches 8 rows]

bf16, forward, and forward + backward with gradients of q, k and v from a cotangent of o. cuDNN is
`jax.nn.dot_product_attention(implementation="cudnn")`; JAX's kernel is `jax.experimental.pallas.ops.gpu.attention.mha`.
Milliseconds are of many calls in a row, one synchronisation behind all; TFLOP/s count the pairs that a mask leaves, 4 K per
pair forward and 10 K backward. Decoding is one query per row over a cache; TB/s count keys and values once.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from measure import interleaved_ms, where

from jaxmem.pallas_kernels.decode_attention import split_kv_attention, unified_max_attention
from jaxmem.pallas_kernels.flash_attention import flash_attention
from jaxmem.pallas_kernels.masks import Mask, Place, sees

ERROR = 2e-2
"""Relative RMS against cuDNN or the reference beyond which code is not timed: it computes something else."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of attention."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    width: int
    mask: Mask = Mask()
    documents: int = 1
    """Of equal length in every row."""

    @property
    def pairs(self) -> float:
        """Of a query and a key it sees, of all rows and heads."""
        n = self.tokens // self.documents
        reach = min(n, self.mask.window or n)
        seen = n * n if not self.mask.causal else reach * (reach + 1) / 2 + (n - reach) * reach
        return self.batch * self.heads * self.documents * seen


CASES = {
    "causal": Case(1, 8192, 16, 16, 128),
    "grouped": Case(1, 8192, 32, 8, 128),
    "width 64": Case(1, 8192, 16, 16, 64),
    "width 256": Case(1, 8192, 8, 8, 256),
    "short": Case(8, 2048, 16, 16, 128),
    "full": Case(1, 8192, 16, 16, 128, Mask(causal=False)),
    "long": Case(1, 65536, 4, 4, 128),
    "window": Case(1, 65536, 16, 16, 128, Mask(window=1024)),
    "packed": Case(1, 32768, 16, 16, 128, documents=8),
}


@dataclasses.dataclass(frozen=True)
class Cache:
    """What one token of each row is decoded over."""

    batch: int
    tokens: int
    heads: int = 32
    kv_heads: int = 8
    width: int = 128


CACHES = {"1 row": Cache(1, 131072), "8 rows": Cache(8, 32768), "64 rows": Cache(64, 8192)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Which cases, and how often."""

    cases: tuple[str, ...] = tuple(CASES)
    caches: tuple[str, ...] = tuple(CACHES)
    repeats: int = 5
    """Of each measurement, in turns."""
    calls: int = 10
    """In a row."""


def jaxmem(case: Case, q, k, v, *, implementation: str | None):
    places = {}
    if case.documents > 1:
        index = jnp.broadcast_to(jnp.arange(case.tokens), (case.batch, case.tokens))
        place = Place(index, index // (case.tokens // case.documents) + 1)
        places = {"q_place": place, "k_place": place}
    return flash_attention(q, k, v, case.mask, implementation=implementation, **places).o.astype(q.dtype)


def cudnn(case: Case, q, k, v):
    if case.documents > 1:
        raise NotImplementedError("jax.nn.dot_product_attention has no documents")
    window = None if case.mask.window is None else (case.mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=case.mask.causal, local_window_size=window, implementation="cudnn"
    )


def jax_triton(case: Case, q, k, v):
    from jax.experimental.pallas.ops.gpu.attention import mha

    if case.mask.window is not None:
        raise NotImplementedError("no window")
    segment = jnp.broadcast_to(jnp.arange(case.tokens) // (case.tokens // case.documents), (case.batch, case.tokens))
    k, v = (jnp.repeat(x, case.heads // case.kv_heads, axis=2) for x in (k, v))
    segments = segment if case.documents > 1 else None
    return mha(q, k, v, segments, sm_scale=case.width**-0.5, causal=case.mask.causal)


WAYS = {
    "jaxmem's best": functools.partial(jaxmem, implementation=None),
    "jaxmem's Triton": functools.partial(jaxmem, implementation="pallas_gpu"),
    "cuDNN": cudnn,
    "JAX's Triton": jax_triton,
}


def oracle(case: Case, q, k, v):
    """The last 256 queries of the first head."""
    index = jnp.arange(case.tokens)[None]
    place = Place(index, index // (case.tokens // case.documents) + 1)
    last = jax.tree.map(lambda x: x[:, -256:], place)
    scores = jnp.einsum("bik,bjk->bij", q[:1, -256:, 0], k[:1, :, 0], preferred_element_type=jnp.float32)
    scores = jnp.where(sees(case.mask, last, place), scores * case.width**-0.5, -jnp.inf)
    return jnp.einsum("bij,bjv->biv", jax.nn.softmax(scores), v[:1, :, 0].astype(jnp.float32))


def both(f: Callable):
    def run(q, k, v, do):
        o, pull = jax.vjp(f, q, k, v)
        return o, pull(do)

    return run


def compare(name: str, case: Case, o: Options) -> None:
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(
        rng.standard_normal((case.batch, case.tokens, heads, case.width), np.float32), jnp.bfloat16
    )
    q, k, v, do = draw(case.heads), draw(case.kv_heads), draw(case.kv_heads), draw(case.heads)
    want = np.asarray(jax.jit(functools.partial(oracle, case))(q, k, v))
    print(f"\n{name}: {case}")
    forward, backward, errors = {}, {}, {}
    for way, f in WAYS.items():
        f = functools.partial(f, case)
        try:
            one, two = jax.jit(f).lower(q, k, v).compile(), jax.jit(both(f)).lower(q, k, v, do).compile()
            got = np.asarray(one(q, k, v)[:1, -256:, 0], np.float32)
        except Exception as error:
            print(f"  {way}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            continue
        errors[way] = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
        if errors[way] > ERROR:
            print(f"  {way}: wrong, relative error {errors[way]:.1e}")
            continue
        forward[way] = functools.partial(one, q, k, v)
        backward[way] = functools.partial(two, q, k, v, do)
    ms, ms_both = (interleaved_ms(calls, o.repeats, o.calls) for calls in (forward, backward))
    for way in ms:
        rates = 4 * case.width * case.pairs / ms[way] / 1e9, 14 * case.width * case.pairs / ms_both[way] / 1e9
        print(
            f"  {way:16} forward {ms[way]:8.3f} ms {rates[0]:4.0f} TFLOP/s   "
            f"with backward {ms_both[way]:8.3f} ms {rates[1]:4.0f} TFLOP/s   error {errors[way]:.0e}",
            flush=True,
        )


def decode(name: str, cache: Cache, o: Options) -> None:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
    keys = cache.batch, cache.tokens, cache.kv_heads, cache.width
    q, k, v = draw(cache.batch, 1, cache.heads, cache.width), draw(*keys), draw(*keys)
    index = jnp.broadcast_to(jnp.arange(cache.tokens), keys[:2])
    there, here = Place(index, jnp.ones_like(index)), Place(index[:, -1:], jnp.ones_like(index[:, :1]))
    places = {"q_place": here, "k_place": there}
    ways = {
        "unified maximum": lambda q, k, v: unified_max_attention(q, k, v, maximum=4.0, **places)[0].o,
        "split in 8": lambda q, k, v: split_kv_attention(q, k, v, n_splits=8, **places).o,
        "flash_attention": lambda q, k, v: flash_attention(q, k, v, **places).o,
        "cuDNN": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn"),
        "XLA": jax.nn.dot_product_attention,
    }
    print(f"\n{name}: {cache}")
    calls, results = {}, {}
    for way, f in ways.items():
        try:
            calls[way] = functools.partial(jax.jit(f).lower(q, k, v).compile(), q, k, v)
            results[way] = np.asarray(calls[way](), np.float32)
        except Exception as error:
            print(f"  {way}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            calls.pop(way, None)
    want = results["XLA"]
    for way, ms in interleaved_ms(calls, o.repeats, o.calls).items():
        error = np.sqrt(np.mean((results[way] - want) ** 2) / np.mean(want**2))
        print(f"  {way:16} {ms:8.3f} ms {4 * k.size / ms / 1e9:5.2f} TB/s   error {error:.0e}", flush=True)


def main(o: Options) -> None:
    warnings.simplefilter("ignore")
    print(where())
    for name in o.cases:
        compare(name, CASES[name], o)
    for name in o.caches:
        decode(name, CACHES[name], o)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
