"""Every named recurrence: chunks and steps against its equations in float64, under any decay, packed, and its identities.

`EQUATIONS` has each recurrence as its paper writes one token, in terms of nothing else; CASES has its inputs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.recurrences import decay_only, delta, elementwise, state_space

B, T, H, G, K, V, D, N, STEPS = 2, 43, 4, 2, 8, 6, 5, 3, 3


class Shape(NamedTuple):
    """How an input is drawn."""

    axes: tuple[int, ...]
    kind: str = "normal"


TOKENS = {
    "q": Shape((B, T, G, K), "unit"),
    "k": Shape((B, T, G, K), "unit"),
    "v": Shape((B, T, H, V)),
    "g": Shape((B, T, H), "decay"),
    "beta": Shape((B, T, H), "gate"),
    "state": Shape((B, H, K, V)),
}
CHANNELS = {"x": Shape((B, T, D)), "state": Shape((B, D))}
PER_CHANNEL = TOKENS | {"g": Shape((B, T, H, K), "decay")}


def take(source, *names, **more):
    return {name: source[name] for name in names} | more | {"state": more.get("state", source["state"])}


FULL = {name: Shape((B, T, H, K), "unit") for name in ("q", "k")}
LOW_RANK = FULL | {"v": TOKENS["v"], "a": Shape((B, T, H, K), "erase"), "b": Shape((B, T, H, K), "unit")}
CASES = {
    "linear_attention": (decay_only.linear_attention, take(TOKENS, "q", "k", "v")),
    "linear_attention_normalized": (
        functools.partial(decay_only.linear_attention, normalize=True),
        {
            "q": Shape((B, T, G, K), "positive"),
            "k": Shape((B, T, G, K), "positive"),
            "v": TOKENS["v"],
            "state": Shape((B, H, K, V + 1), "positive"),
        },
    ),
    "retention": (decay_only.retention, take(TOKENS, "q", "k", "v")),
    "lightning_attention": (
        decay_only.lightning_attention,
        take(TOKENS, "q", "k", "v", slopes=Shape((H,), "gate")),
    ),
    "simple_gla": (decay_only.simple_gla, take(TOKENS, "q", "k", "v", "g")),
    "gated_linear_attention": (decay_only.gated_linear_attention, take(PER_CHANNEL, "q", "k", "v", "g")),
    "hgrn2": (decay_only.hgrn2, take(PER_CHANNEL, "q", "v", "g")),
    "state_space_dual": (
        decay_only.state_space_dual,
        {
            "x": Shape((B, T, H, V)),
            "dt": Shape((B, T, H), "step"),
            "a": Shape((H,), "rate"),
            "b": Shape((B, T, G, K)),
            "c": Shape((B, T, G, K)),
            "d": Shape((H,)),
            "state": TOKENS["state"],
        },
    ),
    "hgrn": (elementwise.hgrn, take(CHANNELS, "x", g=Shape((B, T, D), "decay"))),
    "rg_lru": (
        elementwise.rg_lru,
        take(CHANNELS, "x", r=Shape((B, T, D), "step"), i=Shape((B, T, D), "gate"), lam=Shape((D,))),
    ),
    "selective_scan": (
        elementwise.selective_scan,
        {
            "x": CHANNELS["x"],
            "dt": Shape((B, T, D), "step"),
            "a": Shape((D, N), "rate"),
            "b": Shape((B, T, N)),
            "c": Shape((B, T, N)),
            "d": Shape((D,)),
            "state": Shape((B, D, N)),
        },
    ),
    "state_space": (
        state_space.state_space,
        {
            "x": CHANNELS["x"],
            "dt": Shape((D,), "step"),
            "a": Shape((D, N), "complex rate"),
            "b": Shape((D, N), "complex"),
            "c": Shape((D, N), "complex"),
            "d": Shape((D,)),
            "state": Shape((B, D, N), "complex"),
        },
    ),
    "linear_state_space": (
        state_space.linear_state_space,
        {
            "x": CHANNELS["x"],
            "dt": Shape((D,), "step"),
            "a": Shape((N, N), "triangle"),
            "b": Shape((N,)),
            "c": Shape((D, N)),
            "d": Shape((D,)),
            "state": Shape((B, D, N)),
        },
    ),
    "delta_rule": (delta.delta_rule, take(TOKENS, "q", "k", "v", "beta")),
    "gated_delta_rule": (delta.gated_delta_rule, take(TOKENS, "q", "k", "v", "g", "beta")),
    "kimi_delta_attention": (delta.kimi_delta_attention, take(PER_CHANNEL, "q", "k", "v", "g", "beta")),
    "gated_delta_product": (
        delta.gated_delta_product,
        {
            "q": FULL["q"],
            "k": Shape((B, T, STEPS, H, K), "unit"),
            "v": Shape((B, T, STEPS, H, V)),
            "g": TOKENS["g"],
            "beta": Shape((B, T, STEPS, H), "gate"),
            "state": TOKENS["state"],
        },
    ),
    "gated_delta_net_2": (
        delta.gated_delta_net_2,
        take(PER_CHANNEL, "q", "k", "v", "g", b=Shape((B, T, H, K), "gate"), w=Shape((B, T, H, V), "gate")),
    ),
    "comba": (delta.comba, take(TOKENS, "q", "k", "v", p=TOKENS["k"], g=TOKENS["g"], beta=TOKENS["beta"])),
    "dplr": (delta.dplr, LOW_RANK | take(PER_CHANNEL, "g")),
    "rwkv7": (
        delta.rwkv7,
        {"r": FULL["q"], "w": PER_CHANNEL["g"]}
        | {n: LOW_RANK[n] for n in ("k", "v", "a", "b")}
        | {"state": TOKENS["state"]},
    ),
}
DECAYING = [name for name, (_, inputs) in CASES.items() if any(s.kind in ("decay", "step") for s in inputs.values())]


def make_inputs(name, seed=0, strength=1.0, forgets=0.0):
    """Arguments by name; `strength` scales decays, of which a share `forgets` is -inf."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        axes, kind = shape
        normal = rng.normal(size=axes)
        match kind:
            case "unit" | "erase":
                unit = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
                return unit if kind == "unit" else -0.8 * unit
            case "decay":
                return np.where(rng.random(axes) < forgets, -np.inf, -strength * rng.exponential(0.2, axes))
            case "step":
                return strength * rng.uniform(0.01, 0.5, axes)
            case "rate":
                return -rng.uniform(0.2, 2, axes)
            case "triangle":
                return np.tril(normal, -1) - np.diag(rng.uniform(0.2, 2, axes[0]))
            case "gate":
                return rng.uniform(size=axes)
            case "positive":
                return rng.uniform(0.1, 1, axes)
            case "complex rate":
                return -rng.uniform(0.2, 2, axes) + 1j * normal
            case "complex":
                return normal + 1j * rng.normal(size=axes)
        return normal

    single = lambda a: a.astype(np.complex64 if np.iscomplexobj(a) else np.float32)
    return {argument: single(draw(shape)) for argument, shape in CASES[name][1].items()}


# The equations, of one token t: (its inputs, constants of the sequence, state before) -> (o, state after).
_read = lambda q, s: jnp.einsum("bhk,bhkv->bhv", q, s)
_write = lambda k, v: k[..., None] * v[..., None, :]
_per_head = lambda x: jnp.repeat(x, H // G, axis=1) if x.shape[1] == G else x
_SCALE = K**-0.5


def _decaying(q, k, v, factor, s, scale=_SCALE):
    q, k = _per_head(q), _per_head(k)
    s = factor * s + _write(k, v)
    return scale * _read(q, s), s


def _normalized(t, c, s):
    q, k = _per_head(t["q"]), _per_head(t["k"])
    z, s = s[..., -1] + k, s[..., :-1] + _write(k, t["v"])
    o = _SCALE * _read(q, s) / (_SCALE * jnp.sum(q * z, -1) + 1e-10)[..., None]
    return o, jnp.concatenate([s, z[..., None]], axis=-1)


def _delta(q, k, v, s, beta):
    u = beta[..., None] * (v - _read(k, s))
    s = s + _write(k, u)
    return _SCALE * _read(q, s), s


def _gated_delta(t, c, s):
    s = jnp.exp(t["g"]).reshape(B, H, -1)[..., None] * s
    return _delta(_per_head(t["q"]), _per_head(t["k"]), t["v"], s, t["beta"])


def _product(t, c, s):
    s = jnp.exp(t["g"])[..., None, None] * s
    for n in range(STEPS):
        o, s = _delta(t["q"], t["k"][:, n], t["v"][:, n], s, t["beta"][:, n])
    return o, s


def _gated_delta_net_2(t, c, s):
    q, k = _per_head(t["q"]), _per_head(t["k"])
    s = jnp.exp(t["g"])[..., None] * s
    s = s + _write(k, t["w"] * t["v"] - _read(t["b"] * k, s))
    return _SCALE * _read(q, s), s


def _comba(t, c, s):
    q, k, p = (_per_head(t[name]) for name in ("q", "k", "p"))
    u = t["beta"][..., None] * (t["v"] - _read(p, s))
    s = jnp.exp(t["g"])[..., None, None] * s + _write(k, u)
    return _SCALE * _read(q, s), s


def _dplr(t, c, s, q="q", g="g", scale=_SCALE):
    s = jnp.exp(t[g])[..., None] * s + _write(t["b"], _read(t["a"], s)) + _write(t["k"], t["v"])
    return scale * _read(t[q], s), s


def _ssd(t, c, s):
    s = jnp.exp(t["dt"] * c["a"])[..., None, None] * s
    s = s + _write(_per_head(t["b"]), t["dt"][..., None] * t["x"])
    return _read(_per_head(t["c"]), s) + c["d"][:, None] * t["x"], s


def _hgrn(t, c, s):
    s = jnp.exp(t["g"]) * s + t["x"]
    return s, s


def _rg_lru(t, c, s):
    a = jnp.exp(-8 * t["r"] * jax.nn.softplus(c["lam"]))
    s = a * s + jnp.sqrt(1 - a**2) * t["i"] * t["x"]
    return s, s


def _selective(t, c, s):
    dt, x = t["dt"], t["x"]
    s = jnp.exp(dt[..., None] * c["a"]) * s + (dt * x)[..., None] * t["b"][:, None]
    return jnp.sum(s * t["c"][:, None], -1) + c["d"] * x, s


def _state_space(t, c, s):
    decay = jnp.exp(c["dt"][:, None] * c["a"])
    s = decay * s + (decay - 1) / c["a"] * c["b"] * t["x"][..., None]
    return 2 * jnp.real(jnp.sum(c["c"] * s, -1)) + c["d"] * t["x"], s


def _linear_state_space(t, c, s):
    """(I - dt/2 A) h = (I + dt/2 A) h_before + dt b x, by forward substitution."""
    half = c["dt"][:, None, None] / 2 * jnp.tril(c["a"])
    right = s + jnp.einsum("dij,bdj->bdi", half, s) + c["dt"][:, None] * c["b"] * t["x"][..., None]
    h = jnp.zeros_like(s)
    for n in range(N):
        h = h.at[..., n].set((right[..., n] + jnp.sum(half[:, n] * h, -1)) / (1 - half[:, n, n]))
    return jnp.sum(c["c"] * h, -1) + c["d"] * t["x"], h


EQUATIONS = {
    "linear_attention": lambda t, c, s: _decaying(t["q"], t["k"], t["v"], 1, s),
    "linear_attention_normalized": _normalized,
    "retention": lambda t, c, s: _decaying(t["q"], t["k"], t["v"], (1 - 2.0 ** (-5 - jnp.arange(H)))[:, None, None], s),
    "lightning_attention": lambda t, c, s: _decaying(
        t["q"], t["k"], t["v"], jnp.exp(-c["slopes"])[:, None, None], s, scale=1
    ),
    "simple_gla": lambda t, c, s: _decaying(t["q"], t["k"], t["v"], jnp.exp(t["g"])[..., None, None], s),
    "gated_linear_attention": lambda t, c, s: _decaying(t["q"], t["k"], t["v"], jnp.exp(t["g"])[..., None], s),
    "hgrn2": lambda t, c, s: _decaying(t["q"], 1 - jnp.exp(t["g"]), t["v"], jnp.exp(t["g"])[..., None], s, scale=1),
    "state_space_dual": _ssd,
    "hgrn": _hgrn,
    "rg_lru": _rg_lru,
    "selective_scan": _selective,
    "state_space": _state_space,
    "linear_state_space": _linear_state_space,
    "delta_rule": lambda t, c, s: _delta(_per_head(t["q"]), _per_head(t["k"]), t["v"], s, t["beta"]),
    "gated_delta_rule": _gated_delta,
    "kimi_delta_attention": _gated_delta,
    "gated_delta_product": _product,
    "gated_delta_net_2": _gated_delta_net_2,
    "comba": _comba,
    "dplr": _dplr,
    "rwkv7": functools.partial(_dplr, q="r", g="w", scale=1),
}


def by_equations(name, ids, **inputs):
    """The recurrence token by token, in the dtype that comes in; documents start from 0, padding is passed over."""
    shapes = CASES[name][1]
    of_tokens = {n for n in inputs if shapes[n].axes[:2] == (B, T)}
    constants = {n: x for n, x in inputs.items() if n not in of_tokens}

    def step(carry, token):
        state, before = carry
        x, now = token
        row = lambda flag, a: flag.reshape(B, *[1] * (a.ndim - 1))
        real, starts = now != 0, (now != before) & (now != 0)
        fresh = jnp.where(row(starts, state), 0, state)
        o, after = EQUATIONS[name](x, constants, fresh)
        return (jnp.where(row(real, state), after, state), jnp.where(real, now, before)), jnp.where(row(real, o), o, 0)

    time_first = {n: jnp.moveaxis(inputs[n], 1, 0) for n in of_tokens}
    (state, _), o = jax.lax.scan(step, (inputs["state"], ids[:, 0]), (time_first, ids.T))
    return jnp.moveaxis(o, 0, 1), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def outputs_and_gradients(rule, name, ids, inputs, weight):
    """rule(...), and the gradients in all inputs of the sum of weight * outputs."""
    outputs, pull = jax.vjp(lambda inputs: rule(name, ids, **inputs), inputs)
    return outputs, pull(weight)[0]


def by_jaxmem(name, ids, *, implementation, **inputs):
    return CASES[name][0](**inputs, segment_ids=ids, chunk_tokens=16, implementation=implementation)


RULES = {kind: functools.partial(by_jaxmem, implementation=kind) for kind in ("reference", "xla")}


def weights(name, inputs, seed=9):
    rng = np.random.default_rng(seed)
    values = inputs["x"] if "x" in inputs else inputs["v"]
    o = values[:, :, 0] if name == "gated_delta_product" else values
    normal = lambda a: (rng.normal(size=a.shape) + (1j * rng.normal(size=a.shape) if np.iscomplexobj(a) else 0)).astype(
        a.dtype
    )
    return normal(o), normal(inputs["state"])


def in_float64(name, ids, inputs, weight):
    with jax.enable_x64(True):
        double = lambda a: np.asarray(a, np.complex128 if np.iscomplexobj(a) else np.float64)
        exact = jax.tree.map(double, (inputs, weight))
        return jax.device_get(outputs_and_gradients(by_equations, name, ids, *exact))


def relative_rms(got, want, floor=1e-6):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return np.sqrt(np.mean(np.abs(got - want) ** 2)) / max(np.sqrt(np.mean(np.abs(want) ** 2)), floor)


def assert_close(got, want, tolerance=1e-5, floor=1e-6):
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(want)]
    errors = map(functools.partial(relative_rms, floor=floor), jax.tree.leaves(got), jax.tree.leaves(want))
    wrong = {path: error for path, error in zip(paths, errors, strict=True) if not error <= tolerance}
    assert not wrong, wrong


ONE = np.ones((B, T), np.int32)
DOCUMENTS = {
    "one": ONE,
    "packed": np.stack([1 + (np.arange(T) > 10), 1 + np.arange(T) // 5]).astype(np.int32),
    "padded": np.where(np.arange(T) < np.array([[T], [20]]), 1 + np.arange(T) // 9, 0).astype(np.int32),
    "all apart": np.tile(1 + np.arange(T), (B, 1)).astype(np.int32),
}
every_rule = pytest.mark.parametrize(
    "rule",
    [pytest.param(RULES["reference"], id="reference", marks=pytest.mark.slow), pytest.param(RULES["xla"], id="xla")],
)


QUICK = [
    "simple_gla",
    "gated_linear_attention",
    "selective_scan",
    "linear_state_space",
    "gated_delta_rule",
    "kimi_delta_attention",
    "dplr",
]


def rows(names):
    """Names as parameters; what is not quick is among the slow proofs."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", rows(CASES))
@every_rule
def test_documents(name, rule):
    for ids in DOCUMENTS.values():
        inputs = make_inputs(name)
        weight = weights(name, inputs)
        got = outputs_and_gradients(rule, name, ids, inputs, weight)
        assert_close(got, in_float64(name, ids, inputs, weight))


@pytest.mark.parametrize("name", rows(DECAYING))
@every_rule
def test_any_decay(name, rule):
    """Gradients of the decays above all, where sums formed as differences of running sums lose all digits but four."""
    for strength, forgets in ((0.0, 0.0), (40.0, 0.0), (1e4, 0.0), (1.0, 0.3), (1.0, 1.0)):
        if name == "rg_lru" and strength == 0:
            continue  # the derivative of sqrt(1 - a^2) at a = 1 is infinite: see the next test
        inputs = make_inputs(name, 1, strength, forgets)
        weight = weights(name, inputs)
        got = outputs_and_gradients(rule, name, ONE, inputs, weight)
        assert_close(got, in_float64(name, ONE, inputs, weight))


def test_rg_lru_with_a_shut_gate_has_finite_gradients():
    inputs = make_inputs("rg_lru", strength=0.0)
    (_, state), gradients = outputs_and_gradients(RULES["xla"], "rg_lru", ONE, inputs, weights("rg_lru", inputs))
    np.testing.assert_array_equal(state, inputs["state"])
    assert all(np.all(np.isfinite(g)) for g in gradients.values()) and np.any(gradients["r"] != 0)


def _equal_channels(g):
    return jnp.repeat(g[..., None], K, axis=-1)


def _identities():
    """name: two calls of the same inputs that are the same recurrence."""
    gdn, kda, rule = delta.gated_delta_rule, delta.kimi_delta_attention, delta.delta_rule
    gla, simple, dplr = decay_only.gated_linear_attention, decay_only.simple_gla, delta.dplr
    at_key = lambda x: x["beta"][..., None] * x["k"]
    qkv = lambda x: (x["q"], x["k"], x["v"])
    zero = lambda x: jnp.zeros_like(x["g"])
    return {
        "KDA with equal channels = GDN": (
            lambda x, **o: kda(*qkv(x), _equal_channels(x["g"]), x["beta"], x["state"], **o),
            lambda x, **o: gdn(*qkv(x), x["g"], x["beta"], x["state"], **o),
        ),
        "GDN without decay = DeltaNet": (
            lambda x, **o: gdn(*qkv(x), zero(x), x["beta"], x["state"], **o),
            lambda x, **o: rule(*qkv(x), x["beta"], x["state"], **o),
        ),
        "GLA with equal channels = simple GLA": (
            lambda x, **o: gla(*qkv(x), _equal_channels(x["g"]), x["state"], **o),
            lambda x, **o: simple(*qkv(x), x["g"], x["state"], **o),
        ),
        "RetNet = simple GLA": (
            lambda x, **o: decay_only.retention(*qkv(x), x["state"], **o),
            lambda x, **o: simple(*qkv(x), jnp.log(1 - 2.0 ** (-5 - jnp.arange(H))), x["state"], **o),
        ),
        "SSD = simple GLA": (
            lambda x, **o: decay_only.state_space_dual(
                x["v"], x["beta"], -jnp.ones(H), x["k"], x["q"], None, x["state"], **o
            ),
            lambda x, **o: simple(
                *qkv(x | {"v": x["beta"][..., None] * x["v"]}), -x["beta"], x["state"], scale=1.0, **o
            ),
        ),
        "HGRN2 = GLA": (
            lambda x, **o: decay_only.hgrn2(x["q"], x["v"], _equal_channels(x["g"]), x["state"], **o),
            lambda x, **o: gla(
                x["q"], -jnp.expm1(_equal_channels(x["g"])), x["v"], _equal_channels(x["g"]), x["state"], scale=1.0, **o
            ),
        ),
        "DPLR of keys = DeltaNet": (
            lambda x, **o: dplr(x["q"], at_key(x), x["v"], -x["k"], at_key(x), jnp.zeros_like(x["k"]), x["state"], **o),
            lambda x, **o: rule(*qkv(x), x["beta"], x["state"], **o),
        ),
        "Comba of decayed keys = GDN": (
            lambda x, **o: delta.comba(
                *qkv(x), jnp.exp(x["g"])[..., None] * x["k"], x["g"], x["beta"], x["state"], **o
            ),
            lambda x, **o: gdn(*qkv(x), x["g"], x["beta"], x["state"], **o),
        ),
        "GDN-2 of equal strengths = KDA": (
            lambda x, **o: delta.gated_delta_net_2(
                *qkv(x),
                _equal_channels(x["g"]),
                _equal_channels(x["beta"]),
                jnp.repeat(x["beta"][..., None], V, -1),
                x["state"],
                **o,
            ),
            lambda x, **o: kda(*qkv(x), _equal_channels(x["g"]), x["beta"], x["state"], **o),
        ),
    }


@pytest.mark.parametrize("pair", _identities().values(), ids=_identities())
def test_identities(pair):
    inputs = make_inputs("gated_delta_rule")
    rng = np.random.default_rng(0)
    for name in ("q", "k"):
        x = rng.normal(size=(B, T, H, K))
        inputs[name] = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    one, other = (jax.jit(functools.partial(call, chunk_tokens=16))(inputs) for call in pair)
    assert_close(one, other, tolerance=2e-6)


@pytest.mark.parametrize("name", ["state_space", "linear_state_space"])
def test_a_state_space_is_a_convolution(name):
    """From an empty state; values and all gradients, without the state's."""
    inputs = make_inputs(name)
    del inputs["state"]
    weight = np.random.default_rng(1).normal(size=inputs["x"].shape).astype(np.float32)
    kernel = getattr(state_space, f"{name}_kernel")

    @jax.jit
    def both(inputs):
        def convolution(x, d, **system):
            return state_space.causal_convolution(x, kernel(**system, n_tokens=T)) + d * x

        calls = (convolution, lambda **inputs: CASES[name][0](**inputs, chunk_tokens=16)[0])
        pulls = [jax.vjp(lambda inputs, call=call: call(**inputs), inputs) for call in calls]
        return [(y, pull(weight)) for y, pull in pulls]

    assert_close(*both(inputs), tolerance=5e-6)


def test_hippo_recognises_a_constant():
    """The coefficients of 1 in Legendre polynomials are 1, 0, 0, ...: the state that LegS comes to, at any step size."""
    a, b = state_space.hippo_legs(16)
    dt, c, x = jnp.array([0.03, 0.1, 1.0]), jnp.zeros((3, 16)), jnp.ones((1, 1024, 3))
    _, state = jax.jit(state_space.linear_state_space)(x, dt, a, b, c)
    np.testing.assert_allclose(state[0], np.eye(16)[[0, 0, 0]], atol=1e-5)


def test_a_matrix_that_is_not_triangular_is_refused():
    inputs = jax.tree.map(jnp.asarray, make_inputs("linear_state_space"))
    with pytest.raises(ValueError, match="lower triangular a, got one with numbers above its diagonal; turn"):
        state_space.linear_state_space(**inputs | {"a": inputs["a"].T})


@pytest.mark.parametrize("name", rows(CASES))
def test_recurrences_in_float64(name):
    """float64 in, float64 through, in chunks."""
    inputs = make_inputs(name)
    weight = weights(name, inputs)
    with jax.enable_x64(True):
        double = lambda a: np.asarray(a, np.complex128 if np.iscomplexobj(a) else np.float64)
        exact = jax.tree.map(double, (inputs, weight))
        got = jax.device_get(outputs_and_gradients(RULES["xla"], name, DOCUMENTS["one"], *exact))
    want = in_float64(name, DOCUMENTS["one"], inputs, weight)
    assert {a.dtype.itemsize for a in jax.tree.leaves(got)} <= {8, 16}
    assert_close(got, want, tolerance=1e-10)
