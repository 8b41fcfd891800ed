"""`jaxmem plan`: a training step compiled for TPUs that are not here, and what its compiler says of it.

Nothing is estimated but the arithmetic: memory is the compiler's own account per device, exchanges are those of the
scheduled program, and a step that does not fit fails to compile with the compiler's message.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxmem.models.accounting import account
from jaxmem.planning.overlap import Exchange, exchanges_beside_kernels
from jaxmem.planning.tpu import count_devices, devices, full_name
from jaxmem.sharding import make_mesh, named_sharding, use_mesh
from jaxmem.sharding.attention_scheme import CHIPS
from jaxmem.sharding.mesh import MESH_AXES, mesh_sizes
from jaxmem.sharding.rings import compiler_options
from jaxmem.sharding.rules import rules_of
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.placement import on_devices, require_fit
from jaxmem.training.step import Shifted, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step that compiles."""

    topology: str
    n_devices: int
    compile_s: float
    state_bytes: int
    """Per device, of parameters and optimiser."""
    temporary_bytes: int
    """Per device, of all else while the step runs, its batch included."""
    memory_bytes: float
    """That a device has."""
    exchanges: tuple[Exchange, ...]
    """Of rings, beside kernels."""
    arithmetic_s: float
    """That the step's FLOPs take at the chip's peak: no step is faster."""

    def __str__(self) -> str:
        gib = lambda n: f"{n / 2**30:.2f} GiB"
        mib = lambda exchanges: f"{len(exchanges)} ({sum(e.n_bytes for e in exchanges) / 2**20:.1f} MiB)"
        exposed = [exchange for exchange in self.exchanges if not exchange.hidden]
        share = (self.state_bytes + self.temporary_bytes) / self.memory_bytes
        return "\n".join(
            (
                f"{self.topology}, {self.n_devices} devices: compiled in {self.compile_s:.0f} s",
                f"  per device: {gib(self.state_bytes)} parameters and optimiser, {gib(self.temporary_bytes)} else: "
                f"{share:.0%} of {gib(self.memory_bytes)}",
                f"  exchanges in computations with kernels: {mib(self.exchanges)}, not hidden behind one: {mib(exposed)}",
                f"  arithmetic alone: {self.arithmetic_s:.3g} s a step at the chips' peak",
            )
        )


def check(config: TrainConfig, topology: str) -> str:
    """The full name of a topology that the mesh and the batch of an experiment fit; needs no compiler.

    Raises: ValueError for another name, and for a mesh or batch that does not fit, in the words of `jaxmem train`.
    """
    name = full_name(topology)
    require_fit(config, jax.sharding.AbstractMesh(mesh_sizes(config.mesh, count_devices(name)), MESH_AXES))
    return name


def plan(config: TrainConfig, topology: str, say: Callable[[str], None] = lambda text: None) -> Plan:
    """Compiles the step of an experiment for a topology such as "v5p:8x8x8", or a slice such as "v5p-1024".

    Args:
      say: is told what is being done.

    Raises: ValueError for a mesh or batch that does not fit the topology; RuntimeError with the compiler's message if it
      refuses, for want of memory say.
    """
    topology = check(config, topology)
    say(f"{topology}: asking the compiler for its devices")
    there = devices(topology)
    mesh = make_mesh(config.mesh, there)
    rows, n_tokens = config.data.batch_size // config.accumulate, config.data.context_tokens
    with tempfile.TemporaryDirectory() as folder, use_mesh(mesh, rules_of(config.mesh)):
        say(f"{topology}: tracing a step for {len(there)} devices")
        state = on_devices(jax.eval_shape(lambda: init_state(config)), mesh)
        part = named_sharding(mesh, None, "batch", "time")
        batch = Shifted(*5 * [jax.ShapeDtypeStruct((config.accumulate, rows, n_tokens), jnp.int32, sharding=part)])
        # the schedule as text: that of `compiled.as_text()` fails where exchanges are spread over several kernels
        options = (compiler_options(mesh) or {}) | {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        began = time.monotonic()
        lowered = jax.jit(make_train_step(config), donate_argnums=0).lower(state, batch)
        say(f"{topology}: compiling a step for {len(there)} devices")
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(f"plan: {topology} refuses the step: {str(error).splitlines()[0]}") from error
        compile_s = time.monotonic() - began
        (schedule,) = Path(folder).glob("*jit_step*.after_optimizations.txt")
        exchanges = tuple(exchanges_beside_kernels(schedule.read_text()))
    generation, memory = topology.partition(":")[0], compiled.memory_analysis()
    flops = account(config.model, n_tokens).forward_flops * (4 if config.model.remat == "block" else 3)
    n_batch = config.data.batch_size * n_tokens
    return Plan(
        topology=topology,
        n_devices=len(there),
        compile_s=compile_s,
        state_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.peak_memory_in_bytes - memory.alias_size_in_bytes,
        memory_bytes=CHIPS[generation].memory_bytes,
        exchanges=exchanges,
        arithmetic_s=flops * n_batch / (CHIPS[generation].flops_per_s * len(there)),
    )
