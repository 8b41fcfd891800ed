"""The laws that every mixer obeys, in values and in gradients, on one table of all mixers.

A new mixer adds one row to MIXERS. Everything is compared through one function, `run`: outputs, the state behind them, and
the gradients of a random weighting of both in all parameters, in x and in the state that came in. Laws reuse its few
compiled programs with other documents, states and weights.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.fast_weight_memory import FastWeightMemoryConfig
from jaxmem.layers.gated_delta_net import CombaConfig, DeltaNetConfig, GatedDeltaNetConfig, GatedDeltaProductConfig
from jaxmem.layers.griffin import GriffinConfig
from jaxmem.layers.hgrn import Hgrn2Config, HgrnConfig
from jaxmem.layers.kimi_delta_attention import GatedDeltaNet2Config, KimiDeltaAttentionConfig
from jaxmem.layers.linear_attention import (
    GatedLinearAttentionConfig,
    LightningAttentionConfig,
    LinearAttentionConfig,
    RetNetConfig,
    SimpleGlaConfig,
)
from jaxmem.layers.mamba import Mamba2Config, MambaConfig
from jaxmem.layers.mixture_of_memories import MixtureOfMemoriesConfig
from jaxmem.layers.rwkv7 import Rwkv7Config
from jaxmem.layers.short_convolution import ShortConvolutionConfig
from jaxmem.layers.state_space import LinearStateSpaceConfig, StateSpaceConfig
from jaxmem.sharding import MeshConfig, make_mesh, named_sharding, use_mesh

B, T, D = 8, 24, 16
CAPACITY = 2 * T  # of caches that grow: a call on T tokens behind T others
CUTS = (0, 8, 9, T)  # a prompt, one token, more at once

SIZES = {"n_heads": 2, "key_dim": 4, "value_dim": 6, "chunk_tokens": 8}
DELTA = GatedDeltaNetConfig(**SIZES)
MIXTURE = MixtureOfMemoriesConfig(DELTA)
RWKV7 = Rwkv7Config(**SIZES, decay_rank=3, strength_rank=3, gate_rank=3)
MAMBA = MambaConfig(n_channels=6, n_states=3, dt_rank=2, chunk_tokens=8)
GRIFFIN = GriffinConfig(n_heads=2, head_dim=4, chunk_tokens=8)
LONGER = {"chunk_tokens": 32}
# name: (config, what to change in it for the same mixer computed in other chunks)
MIXERS = {
    "attention": (AttentionConfig(4, n_kv_heads=2), {"implementation": "reference"}),
    "window": (AttentionConfig(4, n_kv_heads=2, window=5, qk_norm=True), {"implementation": "reference"}),
    "convolution": (ShortConvolutionConfig(width=3), {}),
    "delta": (DELTA, LONGER),
    "kimi": (KimiDeltaAttentionConfig(**SIZES), LONGER),
    "mamba": (MAMBA, LONGER),
    "mixture": (MIXTURE, {"inner": dataclasses.replace(DELTA, chunk_tokens=16)}),
    # the rest among the slow proofs
    "mixture-single-kv": (dataclasses.replace(MIXTURE, single_kv=True), {}),
    "mixture-top-1": (dataclasses.replace(MIXTURE, shared_memory=False, top_k=1), {}),
    "mixture-rwkv7": (MixtureOfMemoriesConfig(RWKV7), {"inner": dataclasses.replace(RWKV7, chunk_tokens=16)}),
    "mixture-mamba": (MixtureOfMemoriesConfig(MAMBA), {"inner": dataclasses.replace(MAMBA, chunk_tokens=16)}),
    "mixture-griffin": (MixtureOfMemoriesConfig(GRIFFIN), {"inner": dataclasses.replace(GRIFFIN, chunk_tokens=16)}),
    "mixture-retnet": (MixtureOfMemoriesConfig(RetNetConfig(**SIZES)), {}),
    "linear-attention": (LinearAttentionConfig(**SIZES), LONGER),
    "retnet": (RetNetConfig(**SIZES), LONGER),
    "lightning": (LightningAttentionConfig(**SIZES, layer=1, n_layers=4), LONGER),
    "simple-gla": (SimpleGlaConfig(**SIZES), LONGER),
    "gla": (GatedLinearAttentionConfig(**SIZES, gate_rank=3), LONGER),
    "hgrn": (HgrnConfig(n_channels=6, lower_bound=0.1, chunk_tokens=8), LONGER),
    "hgrn2": (Hgrn2Config(**SIZES), LONGER),
    "mamba2": (Mamba2Config(**(SIZES | {"n_heads": 4}), n_key_heads=2), LONGER),
    "griffin": (GRIFFIN, LONGER),
    "state-space": (StateSpaceConfig(n_channels=D, n_states=6, chunk_tokens=8), LONGER),
    "linear-state-space": (LinearStateSpaceConfig(n_channels=D, n_states=6, chunk_tokens=8), LONGER),
    "mixture-state-space": (MixtureOfMemoriesConfig(StateSpaceConfig(n_channels=D, n_states=6, chunk_tokens=8)), {}),
    "delta-net": (DeltaNetConfig(**SIZES, negative_eigenvalues=True), LONGER),
    "delta-product": (GatedDeltaProductConfig(**SIZES, n_householder=3), LONGER),
    "comba": (CombaConfig(**SIZES), LONGER),
    "kimi-lower-bound": (KimiDeltaAttentionConfig(**SIZES, lower_bound=-5.0), {}),
    "gdn2": (GatedDeltaNet2Config(**SIZES), LONGER),
    "rwkv7": (RWKV7, LONGER),
    "fast-weights": (FastWeightMemoryConfig(n_slots=9, top_k=2, key_dim=4, value_dim=6, chunk_tokens=5), {}),
}
IN_ORDER = ["fast-weights"]
"""No monoids: their sequences cannot be split over devices."""
QUICK = ["attention", "convolution", "delta", "mixture"]
DECAYING = ["delta", "mixture", "kimi", "mamba", "mamba2", "comba", "delta-product", "gdn2"]
FAMILIES = ["attention", "convolution", "delta", "mixture"]
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "model": MeshConfig(data=4, model=2),
    "seq": MeshConfig(data=1, seq=8),
    "data fsdp model": MeshConfig(data=2, fsdp=2, model=2),
    "fsdp seq model": MeshConfig(data=1, fsdp=2, seq=2, model=2),
}
OF_A_KIND = [
    *QUICK,
    "window",
    "kimi",
    "mamba",
    "mixture-mamba",
    "state-space",
    "linear-state-space",
    "rwkv7",
    *IN_ORDER,
]
"""Whose state, decay or columns are divided over devices like no other's."""
VARIANTS = [name for name in MIXERS if name not in QUICK]


def rows(names, *more):
    """Names as parameters; variants of a family are among the slow proofs, with more marks if given."""
    return [pytest.param(name, marks=(pytest.mark.slow, *more) if name in VARIANTS else ()) for name in names]


every_mixer = pytest.mark.parametrize("name", rows(MIXERS))


class Result(NamedTuple):
    y: Any
    state: Any
    d_parameters: Any
    d_x: Any
    d_state: Any


def whole(layer, x, state, ids):
    return layer(x, state, segment_ids=ids)


def in_pieces(layer, x, state, ids):
    ys = []
    for start, stop in itertools.pairwise(CUTS):
        y, state = layer(x[:, start:stop], state, segment_ids=ids[:, start:stop])
        ys.append(y)
    return jnp.concatenate(ys, axis=1), state


def step_by_step(layer, x, state, ids):
    """Every transformation at once: the rows in four groups, mapped, and computed again for the gradient."""

    def step(state, token):
        x, ids = token
        y, state = layer(x[:, None], state, segment_ids=ids[:, None])
        return state, y[:, 0]

    def steps(x, state, ids):
        state, y = jax.lax.scan(step, state, (x.swapaxes(0, 1), ids.T))
        return y.swapaxes(0, 1), state

    groups = jax.tree.map(lambda a: a.reshape(4, B // 4, *a.shape[1:]), (x, state, ids))
    outputs = jax.checkpoint(jax.vmap(steps))(*groups)
    return jax.tree.map(lambda a: a.reshape(B, *a.shape[2:]), outputs)


def bare(layer, x, state, ids):
    return layer(x)


@functools.partial(jax.jit, static_argnums=0)
def make(config):
    layer = config.make(D, rngs=nnx.Rngs(0))
    return layer, layer.init_state(B, capacity=CAPACITY)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(call, graph, parameters, x, state, ids, weight) -> Result:
    """call(layer, x, state, ids), and the gradients of the sum of weight * (y, state)."""

    def weighted(parameters, x, state):
        outputs = call(nnx.merge(graph, parameters), x, state, ids)
        terms = jax.tree.map(lambda w, a: jnp.sum(jnp.real(w * a)), weight, floats(outputs))
        return sum(jax.tree.leaves(terms)), outputs

    gradients, (y, state) = jax.grad(weighted, (0, 1, 2), has_aux=True, allow_int=True)(parameters, x, state)
    return Result(y, state, *map(floats, gradients))


def floats(tree):
    """The tree without its integers, which have no gradient."""
    return jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jnp.inexact) else None, tree)


def normal_like(seed, tree):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([rng.normal(size=a.shape).astype(a.dtype) for a in leaves])


def document_ids(seed, first=1, *, padded=False):
    """Segment ids [B, T] of documents of random lengths, in row 0 a single one; padded: from a random token on, 0."""
    rng = np.random.default_rng(seed)
    starts = rng.random((B, T)) < np.array([0.0, 0.1, 0.5, *[0.2] * (B - 3)])[:, None]
    ids = first + np.cumsum(starts, axis=1)
    if padded:
        length = rng.integers(1, T, B)
        length[-2:] = T, 0
        ids[np.arange(T) >= length[:, None]] = 0
    return ids.astype(np.int32)


BEFORE = document_ids(0, padded=True)
"""What the state has seen; the last row nothing."""
NEXT = int(BEFORE.max()) + 1
"""A segment id no row has seen."""
CONTINUED = np.broadcast_to(np.maximum(BEFORE.max(axis=1), 1)[:, None], (B, T))
DOCUMENTS = {
    "one": CONTINUED,
    "packed": CONTINUED + document_ids(1, first=0),
    "padded": np.where(document_ids(2, padded=True) > 0, CONTINUED + document_ids(2, first=0), 0),
}


def names(documents):
    """Other ids of the same documents, 0, 1, 2, ...: such as rows have seen before, down and up again, and ones that fp32
    cannot tell apart; the first continues no row."""
    last = np.maximum(BEFORE.max(axis=1), 1)[:, None]
    far = np.where(documents % 3 == 2, 2**24 + 1, 2**24)
    return np.where(documents % 3 == 0, np.where(last == 1, 2, 1), far + 2 * last).astype(np.int32)


def with_documents():
    """Every mixer with every kind of documents; of variants, those that "padded" has too are full."""
    marks = lambda name, kind: (pytest.mark.slow, *[pytest.mark.full] * (kind != "padded")) if name in VARIANTS else ()
    both = itertools.product(MIXERS, DOCUMENTS.items())
    return [pytest.param(name, ids, id=f"{kind}-{name}", marks=marks(name, kind)) for name, (kind, ids) in both]


every_documents = pytest.mark.parametrize("ids", DOCUMENTS.values(), ids=DOCUMENTS)


class Sample:
    """A mixer with everything `run` needs: parameters, x, a state that has seen documents, and weights."""

    def __init__(self, name, **changes):
        self.config = dataclasses.replace(MIXERS[name][0], **changes)
        self.layer, self.fresh = jax.device_get(make(self.config))
        self.state = self.fresh
        self.graph, self.parameters = nnx.split(self.layer)
        self.x, before = normal_like(0, (np.zeros((B, T, D), np.float32),) * 2)
        self.weight = normal_like(1, (self.x, floats(self.fresh)))
        self.state = self(x=before, ids=BEFORE).state

    @property
    def no_state_weight(self):
        return jax.tree.map(np.zeros_like, self.weight[1])

    def __call__(self, call=whole, **given) -> Result:
        arguments = {"x": self.x, "state": self.state, "ids": DOCUMENTS["one"], "weight": self.weight} | given
        parameters = arguments.pop("parameters", self.parameters)
        return jax.device_get(run(call, self.graph, parameters, **arguments))


sample = functools.cache(Sample)


def assert_close(got, want, tolerance=1e-5):
    """Relative RMS of every float array; integers are equal. Below an RMS of 0.5 it is absolute: rounding does not cancel
    where the terms of a sum over all tokens do, in the gradients of a_log and of a router whose weights are always 1."""
    got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
    for (path, a), (_, b) in zip(got, want, strict=True):
        where = jax.tree_util.keystr(path)
        assert a.shape == b.shape and a.dtype == b.dtype, where
        a, b = np.asarray(a), np.asarray(b)
        if jnp.issubdtype(a.dtype, jnp.integer):
            np.testing.assert_array_equal(a, b, err_msg=where)
            continue
        a, b = (x.astype(np.promote_types(x.dtype, np.float64)) for x in (a, b))
        error = np.sqrt(np.mean(np.abs(a - b) ** 2)) / max(np.sqrt(np.mean(np.abs(b) ** 2)), 0.5)
        assert error <= tolerance, f"{where}: relative RMS {error}"


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_zero(tree):
    assert_equal(tree, jax.tree.map(np.zeros_like, tree))


def at_front(a, start, stop=T):
    """Tokens start .. stop moved to the front of the row, and zeros behind."""
    return np.pad(a[:, start:stop], [(0, 0), (0, T - stop + start)] + [(0, 0)] * (a.ndim - 2))


@pytest.mark.parametrize("name", rows(MIXERS, pytest.mark.full))
@every_documents
def test_split_is_whole(name, ids):
    """With gradients through the pieces."""
    mixer = sample(name)
    assert_close(mixer(in_pieces, ids=ids), mixer(ids=ids))


@pytest.mark.parametrize("name, ids", with_documents())
def test_split_after_any_token_is_whole(name, ids):
    """The pieces stand in calls of T tokens whose rest is padding."""
    mixer = sample(name)
    want = mixer(ids=ids)
    for cut in range(1, T):
        front = mixer(x=at_front(mixer.x, 0, cut), ids=at_front(ids, 0, cut))
        back = mixer(x=at_front(mixer.x, cut), ids=at_front(ids, cut), state=front.state)
        y = np.concatenate([front.y[:, :cut], back.y[:, : T - cut]], axis=1)
        assert_close((y, back.state), (want.y, want.state))


@pytest.mark.parametrize("name, ids", with_documents())
def test_step_by_step_is_parallel_and_transformations_compose(name, ids):
    mixer = sample(name)
    assert_close(mixer(step_by_step, ids=ids), mixer(ids=ids))


@pytest.mark.parametrize("name", rows(DECAYING))
def test_step_by_step_is_parallel_when_decay_is_forty_times_stronger(name):
    mixer = sample(name)
    is_a_log = lambda path: "a_log" in jax.tree_util.keystr(path)
    parameters = jax.tree_util.tree_map_with_path(
        lambda path, a: a + np.float32(math.log(40.0)) if is_a_log(path) else a, mixer.parameters
    )
    want = mixer(step_by_step, parameters=parameters)
    assert np.all(want.d_parameters["parameters"]["a_log"][...] != 0)
    assert_close(mixer(parameters=parameters), want)


@every_mixer
@pytest.mark.parametrize("ids", [DOCUMENTS["one"], DOCUMENTS["packed"]], ids=["one", "packed"])
def test_the_past_does_not_depend_on_the_future(name, ids):
    """Not by rounding either: gradients are exactly 0 and outputs bit by bit the same."""
    mixer = sample(name)
    want, other_x = mixer(ids=ids), normal_like(2, mixer.x)
    for now in range(1, T):
        past = (np.arange(T) < now)[:, None]
        weight = past * mixer.weight[0], mixer.no_state_weight
        got = mixer(x=np.where(past, mixer.x, other_x), ids=ids)
        assert_equal(got.y[:, :now], want.y[:, :now])
        d_x = mixer(ids=ids, weight=weight).d_x
        assert_zero(d_x[:, now:])
        assert np.all(np.any(d_x[:, now - 1] != 0, axis=-1))


@every_mixer
def test_packed_is_separate(name):
    """Document by document; what else is in the row, or was in the state, has a gradient of exactly 0."""
    mixer = sample(name)
    spans = list(itertools.pairwise((0, 5, 6, 13, T)))
    ids = np.concatenate([np.full((B, b - a), NEXT + i, np.int32) for i, (a, b) in enumerate(spans)], axis=1)
    for start, stop in spans:
        outside = ~np.isin(np.arange(T), range(start, stop))
        weight_y = np.where(outside[:, None], 0, mixer.weight[0])
        packed = mixer(ids=ids, weight=(weight_y, mixer.no_state_weight))
        assert_zero((packed.d_x[:, outside], packed.d_state))
        assert np.all(np.any(packed.d_x[:, start:stop] != 0, axis=-1))

        of_document = lambda a, start=start, stop=stop: at_front(a, start, stop)
        weight = of_document(weight_y), mixer.no_state_weight
        alone = mixer(x=of_document(mixer.x), state=mixer.fresh, ids=of_document(np.ones_like(ids)), weight=weight)
        packed = packed._replace(
            y=of_document(packed.y), d_x=of_document(packed.d_x), state=alone.state, d_state=alone.d_state
        )
        assert_close(packed, alone)


@every_mixer
def test_what_documents_are_called_does_not_matter(name):
    """Ids that come back, fall, are of documents long over or beyond 2^24 are those of new documents, bit by bit."""
    mixer, documents = sample(name), document_ids(6, first=0)
    want, got = mixer(ids=NEXT + documents), mixer(ids=names(documents))
    assert_equal(got._replace(state=want.state), want)
    cursors = zip(got.state.cursor, want.state.cursor, strict=True)
    assert_equal(got.state._replace(cursor=want.state.cursor), want.state)
    assert [np.array_equal(a, b) for a, b in cursors] == [False, True]


@every_mixer
def test_padding_in_front_of_tokens_is_loud_and_alone(name):
    """NaN in that row, in all that comes later too; other rows are bit by bit the same, and parameters' gradients finite."""
    mixer, ids, bad = sample(name), DOCUMENTS["packed"], np.isin(np.arange(B), (1, 3, 5))
    wrong = np.array(ids)
    wrong[1, :4], wrong[3, 10], wrong[5, 6] = 0, 0, -5
    of_others = lambda tree: jax.tree.map(lambda a: a[~bad], tree)
    parts = lambda result: of_others((result.y, result.state, result.d_x, result.d_state))
    want, got, later = mixer(ids=ids), mixer(ids=wrong), np.full_like(ids, 2 * NEXT + T)
    for after in (got, mixer(ids=later, state=got.state), mixer(step_by_step, ids=later, state=got.state)):
        assert np.all(np.isnan(after.y[bad])) and not np.any(np.isnan(after.y[~bad]))
    assert_equal(parts(got), parts(want))
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves((got.d_parameters, got.d_x[bad])))
    with pytest.raises(ValueError, match=r"needs segment_ids above 0 .* in row 1; move padding to the end"):
        mixer.layer(*jax.tree.map(jnp.asarray, (mixer.x, mixer.state)), segment_ids=jnp.asarray(wrong))


@every_mixer
def test_calls_on_nothing(name):
    """No tokens, or no rows: y of that shape, the state as it was."""
    mixer = sample(name)
    x = jnp.asarray(mixer.x)
    for state in (jax.tree.map(jnp.asarray, mixer.state), None):
        y, after = mixer.layer(x[:, :0], state, segment_ids=jnp.zeros((B, 0), jnp.int32))
        assert y.shape == (B, 0, D) and (state is None or after is state)
    shapes = jax.eval_shape(lambda x: mixer.layer(x, mixer.layer.init_state(0, capacity=CAPACITY)), x[:0])
    assert shapes[0].shape == (0, T, D) and all(leaf.shape[0] == 0 for leaf in jax.tree.leaves(shapes[1]))


@every_mixer
def test_padding_is_neutral_and_no_state_is_the_empty_state(name):
    """Against a shorter call with nothing but x; what stands in the padding does not matter."""
    mixer, n = sample(name), 17
    empty = jax.device_get(mixer.layer.init_state(B, capacity=n))
    weight_y, weight_state = mixer.weight[0], normal_like(5, floats(empty))
    short = mixer(bare, x=mixer.x[:, :n], state=empty, weight=(weight_y[:, :n], weight_state))
    is_real = np.arange(T) < n
    x = mixer.x * np.where(is_real, 1, 1e3)[:, None].astype(np.float32)
    padded = mixer(x=x, state=empty, ids=np.tile(is_real, (B, 1)).astype(np.int32), weight=(weight_y, weight_state))
    assert_zero((padded.y[:, n:], padded.d_x[:, n:]))
    assert_close(padded._replace(y=padded.y[:, :n], d_x=padded.d_x[:, :n], d_state=short.d_state), short)


@every_mixer
@pytest.mark.parametrize("call", [whole, step_by_step])
def test_rows_of_padding_leave_the_state_as_it_was(name, call):
    mixer = sample(name)
    got = mixer(call, ids=np.zeros((B, T), np.int32))
    assert_zero((got.y, got.d_x, got.d_parameters))
    assert_equal((got.state, got.d_state), (mixer.state, mixer.weight[1]))


@pytest.mark.parametrize("name", rows(MIXERS, pytest.mark.full))
def test_tokens_continue_after_padding(name):
    """Padding behind every piece, against the same tokens side by side."""
    mixer = sample(name)
    in_cut = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(CUTS)])
    real = in_cut[None] < np.random.default_rng(3).integers(0, 10, (B, 1))
    order = np.argsort(~real, axis=1, kind="stable")  # real tokens first
    ids = np.where(np.take_along_axis(real, order, axis=1), DOCUMENTS["packed"], 0)
    back = np.argsort(order, axis=1)
    spread = lambda a: np.take_along_axis(a, back.reshape(B, T, *[1] * (a.ndim - 2)), axis=1)

    want = mixer(ids=ids)
    weight = spread(mixer.weight[0]), mixer.weight[1]
    got = mixer(in_pieces, x=spread(mixer.x), ids=spread(ids), weight=weight)
    assert_close(got, want._replace(y=spread(want.y), d_x=spread(want.d_x)))


@every_mixer
def test_rows_are_independent(name):
    """Exactly: whatever else is in the batch."""
    mixer, row = sample(name), 3
    is_mine = np.arange(B) == row
    others = lambda mine, theirs: jax.tree.map(
        lambda a, b: np.where(is_mine.reshape(B, *[1] * (a.ndim - 1)), a, b), mine, theirs
    )
    of_row = lambda tree: jax.tree.map(lambda a: a[row], tree)
    ids = DOCUMENTS["packed"]
    want = mixer(ids=ids)
    got = mixer(
        x=others(mixer.x, normal_like(4, mixer.x)),
        ids=others(ids, np.roll(DOCUMENTS["padded"], 1, axis=0)),
        state=others(mixer.state, jax.tree.map(lambda a: np.roll(a, 1, axis=0), mixer.state)),
    )
    assert_equal(of_row((got.y, got.state, got.d_x, got.d_state)), of_row((want.y, want.state, want.d_x, want.d_state)))


@pytest.mark.parametrize("name", rows(name for name, (_, change) in MIXERS.items() if change))
def test_chunk_size_does_not_matter(name):
    mixer, other = sample(name), Sample(name, **MIXERS[name][1])
    for ids in DOCUMENTS.values():
        assert_close(other(state=mixer.state, ids=ids), mixer(ids=ids))


def meshes():
    """Every mixer on a mesh that splits the sequence; families, and what does not split over heads by itself, on
    one with several axes; families on all."""
    for name in MIXERS:
        several, wanted = "fsdp seq model", {"data fsdp model" if name in IN_ORDER else "seq"}
        wanted |= {several} if name in (*QUICK, "window", "mamba", "mixture-mamba", "griffin", "rwkv7") else set()
        wanted |= {mesh for mesh in MESHES if "seq" not in mesh} if name in FAMILIES else set()
        for mesh in sorted(wanted):
            quick = name in QUICK and mesh == several and name != "delta"  # which a mixture has inside
            quick |= mesh == "seq" and name == "delta"
            like = name not in OF_A_KIND or (mesh not in ("seq", several) and name != "mixture")
            yield pytest.param(name, mesh, marks=() if quick else (pytest.mark.slow, *[pytest.mark.full] * like))


@pytest.mark.parametrize("name, mesh", list(meshes()))
def test_sharded_is_unsharded(name, mesh):
    mixer, mesh = sample(name), make_mesh(MESHES[mesh])
    with use_mesh(mesh):
        layer, state = jax.eval_shape(make, mixer.config)
        graph, parameters = nnx.split(layer)
        shardings_of = lambda tree: jax.tree.map(lambda a: NamedSharding(mesh, a.sharding.spec), tree)
        shardings = shardings_of(parameters), shardings_of(state)
        d_shardings = shardings[0], shardings_of(floats(state))
        rows, tokens = named_sharding(mesh, "batch", "time"), named_sharding(mesh, "batch", "time", "embed")
        place = lambda ids: jax.device_put(
            (mixer.parameters, mixer.x, mixer.state, ids, mixer.weight),
            (shardings[0], tokens, shardings[1], rows, (tokens, d_shardings[1])),
        )
        documents = DOCUMENTS | {"names": names(document_ids(6, first=0))}
        got = {kind: run(whole, graph, *place(ids)) for kind, ids in documents.items()}
    wanted = Result(tokens, shardings[1], d_shardings[0], tokens, d_shardings[1])
    where = jax.tree.map(lambda a, sharding: a.sharding.is_equivalent_to(sharding, a.ndim), got["one"], wanted)
    assert all(jax.tree.leaves(where)), where
    for kind, ids in documents.items():
        assert_close(jax.device_get(got[kind]), mixer(ids=ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_do_not_depend_on_the_mesh(name):
    mixer = sample(name)
    with use_mesh(make_mesh(MESHES["data fsdp model"])):
        layer, state = make(mixer.config)
    assert_close(nnx.split(layer)[1], mixer.parameters)
    assert_equal(state, mixer.fresh)


@every_mixer
@pytest.mark.parametrize("n_tokens", [1, T])
def test_state_keeps_its_structure_and_dtypes(name, n_tokens):
    """In bfloat16; in float32 a scan proves it."""
    layer = sample(name).layer
    state = jax.eval_shape(lambda: layer.init_state(3, capacity=CAPACITY, dtype=jnp.bfloat16))
    x = jax.ShapeDtypeStruct((3, n_tokens, D), jnp.bfloat16)
    assert jax.eval_shape(lambda layer, x, state: layer(x, state), layer, x, state) == (x, state)


@every_mixer
def test_bfloat16_is_close_and_accumulates_in_float32(name):
    """Of the same rounded inputs, so that routers choose alike."""
    mixer, ids = sample(name), DOCUMENTS["packed"]
    x = mixer.x.astype(jnp.bfloat16)
    empty = jax.jit(lambda: mixer.layer.init_state(B, capacity=CAPACITY, dtype=x.dtype))()
    y, state = jax.device_get(jax.jit(whole)(mixer.layer, x, empty, ids))
    full = mixer(x=x.astype(np.float32), state=mixer.fresh, ids=ids)
    assert y.dtype == jnp.bfloat16
    as_full = jax.tree.map(lambda a, b: a.astype(b.dtype), (y, state), (full.y, full.state))
    assert_close(as_full, (full.y, full.state), tolerance=3e-2)
    accumulated = {"memory", "memories", "router"} & set(state._fields)
    for leaf in jax.tree.leaves([getattr(state, field) for field in accumulated]):
        assert leaf.dtype in (jnp.float32, jnp.complex64)
