"""A memory of 64 Mi slots on a pod that is not here: it fits, forward, backward and in training, and what devices exchange
per token does not know how many slots there are."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.memory import MemoryConfig
from jaxmem.layers.product_keys import ProductKeysConfig
from jaxmem.models.decoder import DecoderConfig
from jaxmem.planning.overlap import exchanged_bytes
from jaxmem.planning.tpu import devices, use_compiler
from jaxmem.planning.training_plan import plan
from jaxmem.sharding import MeshConfig, make_mesh, named_sharding, use_mesh
from jaxmem.sharding.rules import rules_of
from jaxmem.training.data import DataConfig
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.optimizer import OptimizerConfig
from jaxmem.training.placement import on_devices

pytestmark = pytest.mark.tpu

POD, D, B = "v5p:4x4x8", 1024, 128
MESH = MeshConfig(data=16, fsdp=8, table_rows=("data",), table_columns=("fsdp",))


def memory(n_slots: int) -> MemoryConfig:
    keys = ProductKeysConfig(n_slots, key_dim=512)
    return MemoryConfig(keys, output="swilu", table_dtype="bfloat16")


@functools.cache
def compiled(n_slots: int, n_tokens: int):
    """Memory of a layer's value and gradients, and the bytes that its exchanges leave on a device."""
    use_compiler()
    mesh = make_mesh(MESH, devices(POD))
    with tempfile.TemporaryDirectory() as folder, use_mesh(mesh, rules_of(MESH)):
        layer = on_devices(jax.eval_shape(lambda: memory(n_slots).make(D, rngs=nnx.Rngs(0))), mesh)
        placed = named_sharding(mesh, "batch", "time", "embed")
        x = jax.ShapeDtypeStruct((B, n_tokens, D), jnp.bfloat16, sharding=placed)

        def run(layer, x):
            return jax.value_and_grad(lambda layer, x: jnp.sum(layer(x).astype(jnp.float32) ** 2), (0, 1))(layer, x)

        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}  # `as_text()` fails on split operations
        program = jax.jit(run).lower(layer, x).compile(compiler_options=options)
        (text,) = Path(folder).glob("*jit_run*.after_optimizations.txt")
        return program.memory_analysis(), exchanged_bytes(text.read_text())


def test_forward_and_backward_fit():
    """A device holds 1 GiB of the table, and little more than its gradient, in fp32 before it is rounded, beside that."""
    found, exchanges = compiled(8192**2, 256)
    table_bytes = 8192**2 * D * 2 // 128
    assert table_bytes < found.argument_size_in_bytes < 1.2 * table_bytes
    assert found.temp_size_in_bytes < 2.5 * table_bytes
    assert max(map(max, exchanges.values())) < table_bytes / 4, "no part of the table is exchanged"


@pytest.mark.slow
def test_what_a_token_exchanges_does_not_know_the_number_of_slots():
    """The bytes that twice the tokens add, which leaves the gradients of the sub-keys out."""

    def of_tokens(n_slots: int) -> dict[str, int]:
        few, more = (compiled(n_slots, n_tokens)[1] for n_tokens in (256, 512))
        return {kind: sum(more[kind]) - sum(few.get(kind, [])) for kind in more}

    added = of_tokens(8192**2)
    assert added == of_tokens(4096**2)
    n_tokens, n_reads = 256 * B, 128
    ids_and_weights = 8 * n_reads * n_tokens * (1 / 8 + 1)  # along one axis of owners, then along the other
    gradients_of_outputs = 4 * D * n_tokens / 8
    assert added["all-gather"] == ids_and_weights + gradients_of_outputs


def test_a_training_step_fits():
    """Table, moments and all: rows alone have gradients."""
    model = DecoderConfig(
        D, 4 * D, (AttentionConfig(n_heads=8),), vocab_size=256, memories=(memory(8192**2),), dtype="bfloat16",
        remat="block",
    )  # fmt: skip
    data = DataConfig(train=("none",), context_tokens=256, batch_size=B)
    found = plan(TrainConfig(model, data, OptimizerConfig(), steps=10, mesh=MESH), POD)
    table_bytes = 8192**2 * D * 2 // 128
    assert 5 * table_bytes < found.state_bytes < 5.5 * table_bytes, "a table in bf16, and two moments in fp32"
    assert found.state_bytes + found.temporary_bytes < 0.25 * found.memory_bytes
    print(found)
