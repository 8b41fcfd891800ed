"""Memory tables in training: rows alone are Adam of whole tables where all are read, on every mesh, at the rows' cost."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from steps import as_batch, assert_close, fresh, make_batch

from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.memory import MemoryConfig
from jaxmem.layers.product_keys import ProductKeysConfig
from jaxmem.layers.tucker_keys import TuckerKeysConfig
from jaxmem.layers.word_experts import WordExpertsConfig
from jaxmem.models.decoder import DecoderConfig
from jaxmem.sharding import MeshConfig, make_mesh, use_mesh
from jaxmem.sharding.rules import rules_of
from jaxmem.training.data import DataConfig
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.optimizer import OptimizerConfig, TableOptimizerConfig
from jaxmem.training.placement import on_mesh
from jaxmem.training.step import init_state, make_train_step

KEYS = ProductKeysConfig(n_slots=16, n_heads=2, top_k=16, key_dim=8)
"""Every token reads all slots."""
OWN = MemoryConfig(KEYS, expert="gelu", score="sigmoid")
SHARED = MemoryConfig(KEYS, output="swilu", shared_table=True, placement="beside")


def experiment(memories=(OWN, SHARED), *, accumulate=1, schedule="constant", **tables):
    layers = (AttentionConfig(2),) * len(memories)
    options = {"learning_rate": 0.01, "eps": 0.1, "clip_norm": None} | tables
    return TrainConfig(
        model=DecoderConfig(16, 32, layers, repeats=2, vocab_size=64, memories=memories),
        data=DataConfig(train=("unused",), batch_size=8),
        optimizer=OptimizerConfig(
            learning_rate=0.02, schedule=schedule, eps=0.1, tables=TableOptimizerConfig(**options)
        ),
        steps=10,
        accumulate=accumulate,
    )


def few(memory, top_k=2):
    return dataclasses.replace(memory, keys=dataclasses.replace(KEYS, top_k=top_k))


@functools.cache
def compiled(config):
    return jax.jit(make_train_step(config))


def run(config, n_steps=2):
    state = fresh(config)
    for seed in range(n_steps):
        state, told = compiled(config)(state, as_batch(*make_batch(seed, config.accumulate)))
    return state, told


GROUPS = {"adam": {}, "decay": {"weight_decay": 0.5}, "clipped": {"clip_norm": 1e-3}}


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS)
def test_lazy_is_dense_where_all_rows_are_read(name):
    (lazy, told), (dense, whole) = (run(experiment(update=u, **GROUPS[name])) for u in ("lazy", "dense"))
    assert_close(lazy.params, dense.params)
    assert told.nats == pytest.approx(float(whole.nats), rel=1e-5)
    assert any("table" in name for name in whole.grad_norms) and "memory tables" in told.grad_norms


@pytest.mark.slow
def test_layers_that_read_unlike_many_slots_share_a_table():
    lazy, dense = (run(experiment((SHARED, few(SHARED, 3)), update=u))[0] for u in ("lazy", "dense"))
    assert_close(lazy.params, dense.params)


@pytest.mark.slow
def test_parts_of_a_batch_add_up():
    whole, _ = run(experiment())
    parts, _ = run(experiment(accumulate=2))
    assert_close(parts, whole)


def test_rows_that_were_not_read_stay_and_a_broken_step_moves_none():
    config = experiment((few(OWN, 1),))
    before = fresh(config)
    after, told = run(config, 1)
    name = lambda state: state.params["blocks"][0]["memory"]["table"]["values"][...]
    moved = np.any(np.asarray(name(after)) != np.asarray(name(before)), axis=-1)
    assert 0 < moved.sum() < moved.size and bool(told.finite)
    broken = jax.tree.map(np.array, before)
    broken.params["norm"]["scale"][...] = np.full(16, np.nan, np.float32)
    same, told = compiled(config)(broken, as_batch(*make_batch()))
    assert not told.finite
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(same), jax.device_get(broken))


def test_a_step_that_reads_too_many_rows_is_not_made():
    config = experiment((few(OWN),), max_rows=3)
    state, told = run(config, 1)
    assert not told.finite and int(state.step) == 0 and not np.isfinite(told.grad_norms["memory tables"])


MESHES = {
    "columns": MeshConfig(data=2, fsdp=2, seq=2),
    "rows": MeshConfig(data=4, model=2, table_rows=("data",)),
    "rows and columns": MeshConfig(data=2, fsdp=2, model=2, table_rows=("data",)),
    "rows over model": MeshConfig(data=1, fsdp=2, seq=2, model=2, table_rows=("model", "seq")),
}


MEMORIES = {"product keys": (few(OWN), few(SHARED)), "words": (WordExpertsConfig(n_experts=8, d_expert=4), None)}


IN_CI = [("rows", "product keys"), ("rows over model", "words")]


@pytest.mark.parametrize(
    "name, memories",
    [
        pytest.param(
            name, kind, marks=pytest.mark.slow if (name, kind) in IN_CI else (pytest.mark.slow, pytest.mark.full)
        )
        for name in MESHES
        for kind in MEMORIES
        if kind == "product keys" or name in ("rows", "rows over model")
    ],
)
def test_sharded_equals_unsharded(name, memories):
    """Parameters and moments after two steps, with clipping and decay of tables."""
    config = experiment(MEMORIES[memories], clip_norm=0.01, weight_decay=0.1)
    want, _ = run(config)
    mesh = make_mesh(MESHES[name], jax.devices()[: math.prod(MESHES[name].sizes)])
    with use_mesh(mesh, rules_of(MESHES[name])):
        state = jax.jit(lambda: init_state(config))()
        step, place = jax.jit(make_train_step(config)), on_mesh(mesh)
        for seed in range(2):
            state, _ = step(state, jax.tree.map(place, as_batch(*make_batch(seed))))
    assert_close(jax.device_get(state), jax.device_get(want))


@pytest.mark.slow
def test_a_step_needs_memory_for_rows_and_not_for_tables():
    """With state donated; dense gradients of the large table alone would take 4 MiB for each of its arrays."""

    def temporary_bytes(update, n_slots):
        keys = dataclasses.replace(KEYS, n_slots=n_slots, top_k=2)
        config = experiment((MemoryConfig(keys),), update=update)
        state = jax.eval_shape(lambda: init_state(config))
        step = jax.jit(make_train_step(config), donate_argnums=0)
        return step.lower(state, as_batch(*make_batch())).compile().memory_analysis().temp_size_in_bytes

    n_tables, table_bytes = 2, 2**16 * 16 * 4  # one in each of two repeats
    grown = temporary_bytes("lazy", 2**16) - temporary_bytes("lazy", 2**8)
    assert grown < table_bytes, grown  # scores of 256 sub-keys instead of 16 are what grows
    assert temporary_bytes("dense", 2**16) - temporary_bytes("lazy", 2**16) > n_tables * table_bytes


@pytest.mark.slow
def test_the_penalty_of_tucker_cores_is_a_part_of_the_loss():
    """Its gradient reaches the core, and nothing else of a step without it changes."""
    keys = TuckerKeysConfig(n_slots=16, n_heads=2, top_k=2, key_dim=8)
    config = experiment((MemoryConfig(keys, score="linear"), None))
    cores = lambda state: np.asarray(state.params["blocks"][0]["memory"]["keys"]["core"][...])
    free, _ = run(config, 1)
    held, _ = run(dataclasses.replace(config, core_rank_penalty=10.0), 1)
    assert np.any(cores(free) != cores(held))
    same = lambda state: np.asarray(state.params["blocks"][0]["memory"]["table"]["values"][...])
    np.testing.assert_array_equal(same(free), same(held))
