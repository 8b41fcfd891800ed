"""What the TPU's compiler makes of attention, for chips that are not here: it accepts the kernels, hides the exchanges of
rings behind them, and plans a training step."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxmem.algebra.softmax import Partial
from jaxmem.layers.attention import AttentionConfig
from jaxmem.models.decoder import DecoderConfig
from jaxmem.pallas_kernels.decode_attention import unified_max_attention
from jaxmem.pallas_kernels.flash_attention import Dropout, flash_attention
from jaxmem.pallas_kernels.masks import Mask, Place
from jaxmem.planning.overlap import exchanges_beside_kernels
from jaxmem.planning.tpu import ONE_HOST, devices, use_compiler
from jaxmem.planning.training_plan import plan
from jaxmem.sharding import MeshConfig, constrain, local, make_mesh, named_sharding, use_mesh
from jaxmem.sharding.attention import Scheme, sharded_attention
from jaxmem.sharding.folds import sequence_axis
from jaxmem.sharding.rings import compiler_options
from jaxmem.training.data import DataConfig
from jaxmem.training.experiment import TrainConfig, load_experiment
from jaxmem.training.optimizer import OptimizerConfig

pytestmark = pytest.mark.tpu

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
HEADS, TOKENS = ("batch", "time", None, None), ("batch", "time")
RINGS = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1"}
KERNELS = {  # key width, value width, kv heads, dtype, options
    "causal": (128, 128, 8, jnp.bfloat16, {}),
    "fp32": (128, 128, 8, jnp.float32, {"block_q": 256, "block_k": 256}),  # larger ones compile too, in a minute
    "grouped, 192 to 128, capped": (192, 128, 2, jnp.bfloat16, {"soft_cap": 20.0}),
    "64": (64, 64, 1, jnp.bfloat16, {"mask": Mask(window=300)}),
    "256": (256, 256, 8, jnp.bfloat16, {"mask": Mask(chunk=700)}),
    "dropout": (128, 128, 8, jnp.bfloat16, {"rate": 0.1}),
    "prefix in a window": (128, 128, 8, jnp.bfloat16, {"prefix": True, "mask": Mask(window=300)}),
}


@pytest.fixture(scope="module", autouse=True)
def compiler():
    use_compiler()


def with_gradients(f, *shapes):
    """Compiled from shapes alone, for where these say."""
    gradients = jax.value_and_grad(lambda *qkv: jnp.sum(f(*qkv) ** 2), (0, 1, 2))
    return jax.jit(gradients).lower(*shapes)


def some(name: str, generation: str):
    """Every kernel for v5e, one for every generation; the others are among the slow proofs."""
    return pytest.param(name, generation, marks=() if name == "causal" or generation == "v5e" else pytest.mark.slow)


@pytest.mark.parametrize("name, generation", [some(name, generation) for name in KERNELS for generation in ONE_HOST])
def test_kernels_compile(name, generation):
    key, value, groups, dtype, options = KERNELS[name]
    options = dict(options)
    rate, prefix, n_tokens = options.pop("rate", None), options.pop("prefix", False), 2048
    there = jax.sharding.SingleDeviceSharding(devices(generation)[0])
    shape = lambda *sizes: jax.ShapeDtypeStruct((1, n_tokens, *sizes), dtype, sharding=there)

    def attend(q, k, v):
        index = jnp.arange(n_tokens)[None]
        place = Place(index, jnp.ones_like(index))
        dropped = None if rate is None else Dropout(jnp.zeros((1, 8), jnp.uint32), rate)
        return flash_attention(
            q, k, v, q_place=place, k_place=place._replace(prefix=index < 100) if prefix else place,
            dropped=dropped, implementation="pallas_tpu", **options,
        ).o  # fmt: skip

    with_gradients(attend, shape(8, key), shape(groups, key), shape(groups, value)).compile()


@pytest.mark.parametrize(
    "generation", [pytest.param(name, marks=() if name == "v5p" else pytest.mark.slow) for name in ONE_HOST]
)
def test_a_million_tokens_need_no_table(generation):
    there = jax.sharding.SingleDeviceSharding(devices(generation)[0])
    x = jax.ShapeDtypeStruct((1, 2**20, 1, 128), jnp.bfloat16, sharding=there)
    attend = lambda q, k, v: flash_attention(q, k, v, implementation="pallas_tpu").o
    assert with_gradients(attend, x, x, x).compile().memory_analysis().temp_size_in_bytes < 8 * 2**30


DECODING = {  # query heads, kv heads, key and value width, dtype, queries, options
    "grouped": (32, 8, 128, jnp.bfloat16, 1, {}),
    "fp32, 4 queries": (16, 2, 128, jnp.float32, 4, {"mask": Mask(window=4096)}),
    "64": (16, 8, 64, jnp.bfloat16, 1, {"mask": Mask(chunk=8192)}),
    "one kv head": (8, 1, 128, jnp.bfloat16, 2, {}),
    "12 kv heads": (24, 12, 128, jnp.bfloat16, 1, {}),
    "wide": (16, 8, 256, jnp.bfloat16, 1, {"mask": Mask(causal=False)}),
}


def some_decoding(name: str, generation: str):
    """One kernel for one generation; the others are among the slow proofs."""
    quick = name == "grouped" and generation == "v5p"
    return pytest.param(name, generation, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    "name, generation", [some_decoding(name, generation) for name in DECODING for generation in ONE_HOST]
)
def test_decoding_does_not_copy_its_cache(name, generation):
    heads, groups, width, dtype, n_queries, options = DECODING[name]
    batch, n_keys = 2, 2**17
    mesh = make_mesh(MeshConfig(data=1), devices(generation)[:1])
    with use_mesh(mesh):
        there = named_sharding(mesh)
        shape = lambda *sizes, dtype=dtype: jax.ShapeDtypeStruct((batch, *sizes), dtype, sharding=there)
        place = lambda n: Place(shape(n, dtype=jnp.int32), shape(n, dtype=jnp.int32))
        q, cache = shape(n_queries, heads, width), shape(n_keys, groups, width)

        def attend(q, k, v, q_place, k_place, maximum):
            return unified_max_attention(q, k, v, q_place=q_place, k_place=k_place, maximum=maximum, **options)

        maximum = jax.ShapeDtypeStruct((), jnp.float32, sharding=there)
        program = jax.jit(attend).lower(q, cache, cache, place(n_queries), place(n_keys), maximum).compile()
    assert "decode_attention" in program.as_text()
    cache_bytes = 2 * cache.size * jnp.dtype(dtype).itemsize
    assert program.memory_analysis().temp_size_in_bytes < 0.05 * cache_bytes


def ring_of_8(topology):
    mesh = make_mesh(MeshConfig(data=1, seq=8), devices(topology))

    def attend(q, k, v):
        place = Place(*(constrain(jnp.broadcast_to(row, (1, 8 * 2048)), *TOKENS) for row in (jnp.arange(8 * 2048), 1)))
        of_device = lambda q, k, v, place: sharded_attention(
            q, k, v, Mask(), q_place=place, k_place=place, axis=sequence_axis(), scheme=Scheme("ring")
        )
        return local(of_device, (*3 * (HEADS,), Place(TOKENS, TOKENS)), Partial(HEADS, HEADS[:3]))(q, k, v, place).o

    with use_mesh(mesh):
        x = jax.ShapeDtypeStruct((1, 8 * 2048, 4, 128), jnp.bfloat16, sharding=named_sharding(mesh, *HEADS))
        return with_gradients(attend, x, x, x).compile(compiler_options=compiler_options(mesh)).as_text()


@pytest.mark.parametrize("generation", RINGS)
def test_every_exchange_of_a_ring_is_hidden_behind_a_kernel(generation):
    """k, v and their places forward; these, and dk with dv, backward, in the loop and around it."""
    exchanges = exchanges_beside_kernels(ring_of_8(RINGS[generation]))
    assert len(exchanges) == 3 + (3 + 4 + 1 + 1)
    assert [exchange for exchange in exchanges if not exchange.hidden] == []


def experiment(**mesh) -> TrainConfig:
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, scheme=Scheme("ring"))
    model = DecoderConfig(
        d_model=512, d_ffn=1024, pattern=(attention,), repeats=2, vocab_size=256, remat="block", dtype="bfloat16",
        ffn_block_tokens=512,
    )  # fmt: skip
    return TrainConfig(
        model=model,
        data=DataConfig(train=("none",), context_tokens=8192, batch_size=1),
        optimizer=OptimizerConfig(),
        mesh=MeshConfig(data=1, seq=4, layout="zigzag", parameters=("fsdp", "seq"), **mesh),
        steps=10,
    )


@pytest.mark.slow
def test_a_training_step_is_planned():
    """Per device the same, if tokens and devices double; every exchange of keys hidden, if not that of a few places."""
    small = plan(experiment(), "v5p:2x2x1")
    large = experiment()
    large = dataclasses.replace(
        large,
        data=dataclasses.replace(large.data, context_tokens=16384),
        mesh=dataclasses.replace(large.mesh, seq=8),
    )
    large = plan(large, "v5p:2x2x2")
    assert large.temporary_bytes < 1.1 * small.temporary_bytes
    for found in (small, large):
        assert sum(exchange.hidden for exchange in found.exchanges) >= 10
        assert max(exchange.n_bytes for exchange in found.exchanges if not exchange.hidden) < 2**18
    assert "per device: " in str(small) and "not hidden behind one: " in str(small)


@pytest.mark.parametrize(
    "topology, n_tokens", [("v5p:8x8x8", 4 * 2**20), pytest.param("v5p:8x16x16", 16 * 2**20, marks=pytest.mark.slow)]
)
def test_a_pod_holds_a_long_context_and_hides_every_exchange(topology, n_tokens):
    config = load_experiment(EXPERIMENTS / "long_context.py")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, context_tokens=n_tokens),
        mesh=dataclasses.replace(config.mesh, seq=n_tokens // 8192),
    )
    found = plan(config, topology)
    assert found.state_bytes + found.temporary_bytes < 8 * 2**30 < found.memory_bytes
    assert len(found.exchanges) >= 12
    assert [exchange for exchange in found.exchanges if not exchange.hidden] == []


def test_a_step_that_does_not_fit_is_refused():
    config = experiment()
    model = dataclasses.replace(config.model, d_model=4096, d_ffn=2**20, ffn_block_tokens=None)
    with pytest.raises(RuntimeError, match=r"plan: v5p:2x2x1 refuses the step: .*(memory|hbm|RESOURCE)"):
        plan(dataclasses.replace(config, model=model), "v5p:2x2x1")
