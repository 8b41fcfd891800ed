"""What the TPU's compiler makes of reading tables, for chips that are not here."""

import jax
import jax.numpy as jnp
import pytest

from jaxmem.pallas_kernels.memory_lookup import bag
from jaxmem.planning.tpu import ONE_HOST, devices, use_compiler
from jaxmem.sharding import MeshConfig, make_mesh, named_sharding, tables, use_mesh
from jaxmem.sharding.rules import rules_of
from jaxmem.sharding.tables import CHOICES, TABLE

pytestmark = pytest.mark.tpu

T, K, V, M = 2**16, 128, 1024, 2**20
TABLE_BYTES = M * V * 4


@pytest.mark.parametrize("generation", ONE_HOST)
def test_rows_are_read_where_they_are(generation):
    """64 Ki tokens of 128 reads: forward and gradients by the kernels, no array [tokens, reads, V], no copy of the table."""
    use_compiler()
    place = jax.sharding.SingleDeviceSharding(devices(ONE_HOST[generation])[0])
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype, sharding=place)
    arrays = shape(M, V), shape(T, K, dtype=jnp.int32), shape(T, K)
    forward = jax.jit(bag).lower(*arrays).compile()
    assert forward.as_text().count("tpu_custom_call") == 1
    assert forward.memory_analysis().temp_size_in_bytes < TABLE_BYTES / 100

    def of_weights(values, ids, weights, dy):
        return jax.vjp(lambda weights: bag(values, ids, weights), weights)[1](dy)

    backward = jax.jit(of_weights).lower(*arrays, shape(T, V)).compile()
    assert backward.as_text().count("tpu_custom_call") == 1
    assert backward.memory_analysis().temp_size_in_bytes < TABLE_BYTES / 100


@pytest.mark.parametrize("generation", ONE_HOST)
def test_the_gradient_of_a_table_is_summed_in_chunks(generation):
    use_compiler()
    place = jax.sharding.SingleDeviceSharding(devices(ONE_HOST[generation])[0])
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def of_values(values, ids, weights, dy):
        return jax.vjp(lambda values: bag(values, ids, weights), values)[1](dy)

    n_tokens = 2**12
    arrays = shape(2**16, V), shape(n_tokens, K, dtype=jnp.int32), shape(n_tokens, K), shape(n_tokens, V)
    found = jax.jit(of_values).lower(*arrays).compile().memory_analysis()
    assert found.temp_size_in_bytes < n_tokens * K * V * 4 / 20


@pytest.mark.parametrize("rows", [(), ("data",)], ids=["columns", "rows and columns"])
def test_devices_read_their_own_parts_by_the_kernel(rows):
    """Forward, and the gradient in the weights."""
    use_compiler()
    config = MeshConfig(data=2, fsdp=2, table_rows=rows)
    mesh = make_mesh(config, devices("v5e:2x2"))
    with use_mesh(mesh, rules_of(config)):
        shape = lambda axes, *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(
            sizes, dtype, sharding=named_sharding(mesh, *axes)
        )
        choices = (4, 64, 4, 32)
        arrays = shape(TABLE, 2**16, V), shape(CHOICES, *choices, dtype=jnp.int32), shape(CHOICES, *choices)

        def both(values, ids, weights):
            y, pull = jax.vjp(lambda weights: tables.bag(values, ids, weights), weights)
            return pull(y)

        program = jax.jit(both).lower(*arrays).compile().as_text()
    assert program.count("tpu_custom_call") == 2


def test_stacked_tables_are_read_one_by_one():
    use_compiler()
    place = jax.sharding.SingleDeviceSharding(devices(ONE_HOST["v6e"])[0])
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype, sharding=place)
    arrays = shape(2, 2**16, V), shape(2, 256, K, dtype=jnp.int32), shape(2, 256, K)
    assert jax.jit(jax.vmap(bag)).lower(*arrays).compile().as_text().count("tpu_custom_call") == 1


def test_tables_of_16_bits_are_read_by_xla():
    use_compiler()
    place = jax.sharding.SingleDeviceSharding(devices(ONE_HOST["v6e"])[0])
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype, sharding=place)
    program = (
        jax.jit(bag).lower(shape(M, V, dtype=jnp.bfloat16), shape(256, K, dtype=jnp.int32), shape(256, K)).compile()
    )
    assert "tpu_custom_call" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < TABLE_BYTES / 100
