"""Memory layers: against all slots written out and other people's layers, each token alone, tables shared, on meshes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recordings import recordings

from jaxmem.config import from_json, to_json
from jaxmem.layers.memory import MemoryConfig, memory_plus, peer, pkm, ultramem
from jaxmem.layers.memory_table import MemoryTable
from jaxmem.layers.product_keys import ProductKeysConfig
from jaxmem.layers.tucker_keys import TuckerKeysConfig
from jaxmem.sharding import MeshConfig, constrain, make_mesh, param_spec, use_mesh

B, T, D = 4, 5, 12
KEYS = ProductKeysConfig(n_slots=25, n_heads=2, top_k=4, key_dim=6)
CONFIGS = {
    "values": MemoryConfig(KEYS),
    "swilu": MemoryConfig(KEYS, score="sigmoid", value_dim=8, output="swilu", gated=True, shared_table=True),
    "experts": MemoryConfig(dataclasses.replace(KEYS, query_norm="layer", key_norm="rms"), score="relu", expert="gelu"),
    "three parts": MemoryConfig(
        dataclasses.replace(KEYS, n_slots=27, n_parts=3, query_bias=False), expert="silu", shared_table=True, gated=True
    ),
    "tucker": MemoryConfig(
        TuckerKeysConfig(n_slots=25, n_heads=2, top_k=4, key_dim=6, search="reference"),
        score="linear",
        value_dim=6,
        output="linear",
    ),
}
SLOW = ("three parts",)
every_config = pytest.mark.parametrize(
    "config", [pytest.param(c, id=n, marks=pytest.mark.slow if n in SLOW else ()) for n, c in CONFIGS.items()]
)


def draw(config, seed=0):
    """A layer and its table (None if it is the layer's), all parameters random, x and a weight of the output."""
    layer = config.make(D, rngs=nnx.Rngs(0))
    table = config.make_table(D, rngs=nnx.Rngs(1)) if config.shared_table else None
    rng = np.random.default_rng(seed)
    spread = lambda a: a + 0.3 * rng.normal(size=a.shape).astype(np.float32)
    x, weight = rng.normal(size=(2, B, T, D)).astype(np.float32)
    return *(None if m is None else jax.tree.map(spread, jax.device_get(m)) for m in (layer, table)), x, weight


@jax.jit
def value_and_gradients(layer, table, x, weight):
    y, pull = jax.vjp(lambda layer, table, x: layer(x, table), layer, table, constrain(x, "batch", "time", "embed"))
    return y, pull(constrain(weight, "batch", "time", "embed"))


def written_out(layer, table, x):
    """The layer from its equations: every slot's key and score, the best of all, and only then the rows."""
    c = layer.config
    scores = layer.keys(x)  # tested by hand in test_product_keys.py
    if isinstance(c.keys, TuckerKeysConfig):
        every = jnp.einsum("bthri,bthrj->bthij", scores[:, :, :, 2:4], scores[:, :, :, 4:]).reshape(
            *scores.shape[:3], -1
        )
    else:
        every = functools.reduce(
            lambda a, b: (a[..., :, None] + b[..., None, :]).reshape(*a.shape[:-1], -1), jnp.moveaxis(scores, 3, 0)
        )
    best, ids = jax.lax.top_k(every, c.keys.top_k)
    kinds = {"softmax": jax.nn.softmax, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid, "linear": lambda scores: scores}
    w = kinds[c.score](best)
    table = layer.table if table is None else table
    if c.expert is not None:
        hidden = jnp.einsum("bthkd,btd->bthk", table.inputs[...][ids], x)
        w = w * {"gelu": lambda a: a * jax.scipy.stats.norm.cdf(a), "silu": jax.nn.silu}[c.expert](hidden)
    y = jnp.einsum("bthk,bthkv->btv", w, table.values[...][ids])
    if c.output == "linear":
        y = y @ layer.out[...]
    if c.output == "swilu":
        y = (y * jax.nn.silu(x @ layer.gate[...] + layer.gate_bias[...])) @ layer.out[...] + layer.out_bias[...]
    return y * jax.nn.sigmoid(x @ layer.token_gate[...])[..., None] if c.gated else y


def assert_close(got, want, tolerance=1e-5):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-30)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


@every_config
def test_the_layer_is_its_equations(config):
    layer, table, x, weight = draw(config)

    @jax.jit
    def want(layer, table, x, weight):
        y, pull = jax.vjp(written_out, layer, table, x)
        return y, pull(weight)

    assert_close(value_and_gradients(layer, table, x, weight), want(layer, table, x, weight))


@every_config
def test_a_token_acts_on_itself_alone(config):
    layer, table, x, weight = draw(config)
    changed = x.copy()
    changed[1, 2] += 1
    y, (*_, dx) = value_and_gradients(layer, table, x, weight * (np.arange(B * T) == 7).reshape(B, T, 1))
    other = np.asarray(value_and_gradients(layer, table, changed, weight)[0])
    elsewhere = np.arange(B * T).reshape(B, T) != 7
    np.testing.assert_array_equal(other[elsewhere], np.asarray(y)[elsewhere])
    assert np.all(other[1, 2] != np.asarray(y)[1, 2])
    assert not np.any(np.asarray(dx)[elsewhere]) and np.any(np.asarray(dx)[1, 2])


MESHES = {
    "data": MeshConfig(data=4),
    "data fsdp model": MeshConfig(data=2, fsdp=2, model=2),
    "seq": MeshConfig(data=1, seq=5),
}


@pytest.mark.parametrize(
    "name, mesh",
    [
        ("experts", "data"),
        ("swilu", "data fsdp model"),
        ("tucker", "data fsdp model"),
        *(pytest.param(n, m, marks=pytest.mark.slow) for n in ("values", "experts") for m in MESHES if m != "data"),
    ],
)
def test_sharded_equals_unsharded(name, mesh):
    layer, table, x, weight = draw(CONFIGS[name])
    want = value_and_gradients(layer, table, x, weight)
    with use_mesh(make_mesh(MESHES[mesh], jax.devices()[: math.prod(MESHES[mesh].sizes)])):
        place = lambda v: v.replace(constrain_parameter(v))
        is_variable = lambda node: isinstance(node, nnx.Variable)
        placed = [None if m is None else jax.tree.map(place, m, is_leaf=is_variable) for m in (layer, table)]
        got = value_and_gradients(*placed, x, weight)
        for a, b in zip(jax.tree.leaves(got[1][:2]), jax.tree.leaves(placed), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert_close(jax.device_get(got), want)


def constrain_parameter(variable):
    return jax.reshard(variable.get_value(), param_spec(variable.axes, variable.shape))


def test_layers_share_the_table_they_are_given_and_no_other():
    config = CONFIGS["swilu"]
    first, table, x, weight = draw(config)
    second = draw(config, seed=1)[0]
    both = lambda table, layers, x: sum(jnp.sum(weight * layer(x, table)) for layer in layers)
    one = lambda layer: value_and_gradients(layer, table, x, weight)[1][1]
    assert_close(jax.jit(jax.grad(both))(table, (first, second), x), jax.tree.map(jnp.add, one(first), one(second)))
    assert first.table is None
    own = dataclasses.replace(config, shared_table=False)
    a, b = (own.make(D, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    assert a.table is not b.table and np.any(a.table.values[...] != b.table.values[...])


def test_computes_in_the_dtype_of_x():
    for config in CONFIGS.values():
        layer, table = (nnx.eval_shape(lambda m=m: m(D, rngs=nnx.Rngs(0))) for m in (config.make, config.make_table))
        x = jax.ShapeDtypeStruct((1, 2, D), jnp.bfloat16)
        y = jax.eval_shape(lambda layer, table, x: layer(x, table), layer, table if config.shared_table else None, x)
        assert y.dtype == jnp.bfloat16


PUBLISHED = {"pkm": (pkm, 512**2 * 1024), "memory+": (memory_plus, 0), "peer": (peer, 2 * 1024**2 * 1024)}
PUBLISHED["ultramem"] = ultramem, 360**2 * 192


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layers_build_and_run(name):
    make, numbers_in_table = PUBLISHED[name]
    config = make()
    assert from_json(to_json(config)) == config
    layer, table = (nnx.eval_shape(lambda m=m: m(1024, rngs=nnx.Rngs(0))) for m in (config.make, config.make_table))
    in_table = 0 if layer.table is None else sum(a.size for a in jax.tree.leaves(layer.table))
    assert in_table == numbers_in_table
    x = jax.ShapeDtypeStruct((1, 2, 1024), jnp.float32)
    y = jax.eval_shape(lambda layer, table, x: layer(x, table), layer, table if config.shared_table else None, x)
    assert y.shape == x.shape


def test_bad_tables_in_one_sentence(unchecked):
    with pytest.raises(
        ValueError, match="memory: needs value_dim=d_model for a plain output, .* got value_dim=8, d_model=12"
    ):
        MemoryConfig(KEYS, value_dim=8).make(D, rngs=nnx.Rngs(0))
    own, shared = (MemoryConfig(KEYS, shared_table=s).make(D, rngs=nnx.Rngs(0)) for s in (False, True))
    x, table = jnp.zeros((1, 1, D)), MemoryTable(25, D, rngs=nnx.Rngs(0))
    words = "memory: needs a table in the call if and only if shared_table=True, got "
    with pytest.raises(ValueError, match=words + "one with shared_table=False; make one with config.make_table"):
        own(x, table)
    with pytest.raises(ValueError, match=words + "none with shared_table=True"):
        shared(x)
    for wrong in (MemoryTable(16, D, rngs=nnx.Rngs(0)), MemoryTable(25, D, D, rngs=nnx.Rngs(0))):
        with pytest.raises(
            ValueError, match=r"needs a table with \(n_slots, value_dim, d_input\)=\(25, 12, None\), got \("
        ):
            shared(x, wrong)


# Other people's layers. Recorded by tests/golden/make_memory_layers.py; mappings are how weights are exchanged.


def query_of(p, name):
    """[p*h*k, D] -> [D, h, p, k]."""
    return p[name].reshape(2, 3, 6, D).transpose(3, 1, 0, 2)


def keys_of(p):
    """[h, n, p, k] -> [h, p, n, k]."""
    return p["keys"].transpose(0, 2, 1, 3)


def public_pkm(p):
    norm = {"scale": p["norm.weight"], "bias": p["norm.bias"]}
    keys = {"query": query_of(p, "to_queries.weight"), "keys": keys_of(p), "query_norm": norm}
    return {"keys": keys, "table": {"values": p["values.weight"]}}


def public_peer(p):
    keys = {"query": query_of(p, "to_queries.0.weight"), "keys": keys_of(p)}
    return {
        "keys": keys,
        "table": {"inputs": p["weight_down_embed.weight"], "values": p["weight_up_embed.weight"]},
    }


PUBLIC = ProductKeysConfig(n_slots=25, n_heads=3, top_k=4, key_dim=12, query_norm="layer", query_bias=False)
BARE = dataclasses.replace(PUBLIC, query_norm="none")
RECORDED = {
    "pkm": (MemoryConfig(PUBLIC), public_pkm),
    "pkm_relu": (MemoryConfig(PUBLIC, score="relu"), public_pkm),
    "peer": (MemoryConfig(BARE, expert="gelu"), public_peer),
    "peer_one_expert": (MemoryConfig(dataclasses.replace(BARE, top_k=1), score="relu", expert="gelu"), public_peer),
}


@pytest.mark.parametrize("name", RECORDED)
def test_layer_with_public_weights(name):
    (config, mapping), recorded = RECORDED[name], recordings("memory_layers")[name]
    public, gradients = dict(recorded["inputs"]), {key: a[0] for key, a in recorded["gradients"].items()}
    x, d_x = public.pop("x"), gradients.pop("x")
    graph, _ = nnx.split(jax.eval_shape(lambda: config.make(D, rngs=nnx.Rngs(0))))
    layer = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, mapping(public))))
    y, (d_layer, _, d_own_x) = value_and_gradients(layer, None, x, recorded["weights"]["o"])
    got = {"y": y, "x": d_own_x, "p": nnx.to_pure_dict(nnx.state(d_layer))}
    assert_close(got, {"y": recorded["outputs"]["o"][0], "x": d_x, "p": mapping(gradients)})


def public_ultramem(p):
    """Its parts share a query, and its norm has no bias."""
    keys = {
        "query": np.repeat(p["to_queries.weight"].T[:, None, None], 2, axis=2),
        "keys": p["keys"].transpose(0, 2, 1, 3)[None],
        "core": p["core"],
        "query_norm": {"scale": p["query_ln.weight"], "bias": np.zeros(6, np.float32)},
    }
    return {"keys": keys, "table": {"values": p["memories"][0]}, "out": p["combine_values_to_out.weight"].T}


def test_ultramem_with_public_weights():
    keys = TuckerKeysConfig(n_slots=25, n_heads=1, top_k=5, key_dim=12, key_norm="none", query_bias=False)
    config, recorded = (
        MemoryConfig(keys, score="relu", value_dim=8, output="linear"),
        recordings("memory_layers")["ultramem"],
    )
    public, gradients = dict(recorded["inputs"]), {key: a[0] for key, a in recorded["gradients"].items()}
    x, d_x = public.pop("x"), gradients.pop("x")
    graph, _ = nnx.split(jax.eval_shape(lambda: config.make(D, rngs=nnx.Rngs(0))))
    layer = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, public_ultramem(public))))
    y, (d_layer, _, d_own_x) = value_and_gradients(layer, None, x, recorded["weights"]["o"])
    assert_close((y, d_own_x), (recorded["outputs"]["o"][0], d_x))
    got, want = nnx.to_pure_dict(nnx.state(d_layer)), public_ultramem(gradients)
    got["keys"]["query"], want["keys"]["query"] = got["keys"]["query"].sum(axis=2), want["keys"]["query"][:, :, 0]
    del got["keys"]["query_norm"]["bias"], want["keys"]["query_norm"]["bias"]
    assert_close(got, want)


def test_all_that_is_recorded_has_a_test():
    assert recordings("memory_layers").keys() == {*RECORDED, "ultramem"}
