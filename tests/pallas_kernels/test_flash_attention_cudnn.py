"""cuDNN: what is left to it, as programs without a GPU; that it computes the same, with one."""

import jax
import jax.numpy as jnp
import pytest
from attention_cases import CUDNN as CALLS
from attention_cases import TRITON, against_the_equation, assert_close, lowered_for_a_gpu, make

from jaxmem.pallas_kernels import flash_attention_cudnn
from jaxmem.pallas_kernels.flash_attention import flash_attention
from jaxmem.pallas_kernels.masks import Mask

WHOLE_ROWS = {"q_place": None, "k_place": None}


@pytest.fixture
def hopper(monkeypatch):
    """As in a process that has one."""
    monkeypatch.setattr(flash_attention_cudnn, "_compute_capability", lambda: 9)


def whole_rows(width=64, dtype=jnp.bfloat16, **changes):
    return make(widths=(width, width), dtype=dtype, n_tokens=320, **changes)[0]


def exported(loss, arrays) -> str:
    return lowered_for_a_gpu(jax.jit(jax.grad(lambda arrays: loss(**arrays))), arrays)


def test_whole_rows_are_left_to_both_its_passes(hopper):
    program = exported(lambda q, k, v: jnp.sum(flash_attention(q, k, v, Mask(window=9)).o), whole_rows())
    assert [program.count(f"@{name}(") for name in CALLS] == [1, 1]
    assert TRITON not in program
    assert "sliding_window_length\\22: 9" in program


def test_a_cotangent_of_lse_is_left_to_the_kernels_here(hopper):
    def loss(q, k, v):
        o, lse = flash_attention(q, k, v)
        return jnp.sum(o) + jnp.sum(lse)

    program = exported(loss, whole_rows())
    assert [program.count(f"@{name}(") for name in CALLS] == [1, 0]
    assert program.count(TRITON) == 2


@pytest.mark.parametrize("why", ["places", "fp32", "capped", "wide"])
def test_the_rest_is_not(hopper, why):
    arrays, options, _ = make(widths=(64, 64), dtype=jnp.bfloat16, blocks=(None, None))
    changes = {"soft_cap": 2.0} if why == "capped" else {}
    changes |= {name: options[name] for name in WHOLE_ROWS} if why == "places" else {}
    arrays = {"fp32": lambda: whole_rows(dtype=jnp.float32), "wide": lambda: whole_rows(264)}.get(why, lambda: arrays)()
    program = exported(lambda q, k, v: jnp.sum(flash_attention(q, k, v, **changes).o), arrays)
    assert TRITON in program and CALLS[0] not in program


ERRORS = {
    "places": (9, {"rows": "packed"}, "places or other rows than of one document each"),
    "dtype": (9, {"dtype": jnp.float32}, "arrays of float32"),
    "soft cap": (9, {"soft_cap": 2.0}, "a soft cap"),
    "chunks": (9, {"mask": "chunks of 7"}, "chunks"),
    "window": (9, {"mask": "both ways 5"}, "windows that look ahead"),
    "dropout": (9, {"rate": 0.3}, "dropout"),
    "widths": (9, {"widths": (192, 128)}, r"heads of widths \[128, 192\]"),
    "on Ampere": (8, {"widths": (256, 256)}, r"heads of widths \[256\]"),
    "on Volta": (7, {}, r"heads of widths \[64\]"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(monkeypatch, name):
    capability, case, text = ERRORS[name]
    monkeypatch.setattr(flash_attention_cudnn, "_compute_capability", lambda: capability)
    arrays, options, _ = make(**{"widths": (64, 64), "dtype": jnp.bfloat16, "blocks": (None, None)} | case)
    if name != "places":
        options |= WHOLE_ROWS
    with pytest.raises(
        NotImplementedError, match=f"needs an implementation with {text}, got 'cudnn'; use 'pallas_gpu'"
    ):
        flash_attention(**arrays, **options, implementation="cudnn")


def test_without_a_gpu():
    text = "flash_attention: needs an NVIDIA GPU for 'cudnn', got none in this process; use 'xla'"
    with pytest.raises(NotImplementedError, match=text):
        flash_attention(**whole_rows(), implementation="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("mask", ["causal", "full", "window 9"])
def test_on_a_gpu(mask, heads):
    """lse has a cotangent: forward by cuDNN, backward by the kernels here."""
    against_the_equation({"mask": mask, "heads": heads, "widths": (64, 64)}, jnp.bfloat16, "cudnn", 320, **WHOLE_ROWS)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256])
def test_both_passes_on_a_gpu(width):
    arrays, (do, _) = whole_rows(width), make(widths=(width, width), n_tokens=320)[2]

    def both(q, k, v, implementation=None):
        o, pull = jax.vjp(lambda q, k, v: flash_attention(q, k, v, implementation=implementation).o, q, k, v)
        return dict(zip(("o", "d_q", "d_k", "d_v"), (o, *pull(do)), strict=True))

    compiled = jax.jit(both).lower(**arrays).compile()
    assert all(name in compiled.as_text() for name in CALLS)
    exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    want = jax.jit(lambda arrays: both(**arrays, implementation="reference"))(exact)
    assert_close(compiled(**arrays), want, 2.0**-6)
