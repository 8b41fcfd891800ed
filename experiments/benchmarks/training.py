"""Where does the time of a training run go? Tokens/s, the share not spent in the compiled step, compile time, memory.

    python experiments/benchmarks/training.py [experiments/quickstart.py] [--steps 40]

Runs the experiment as `jaxmem train` does, in a temporary folder and without evaluation on the way. "Not in the step" is
the wall time between the first and the last step that the device had nothing to do, as metrics.jsonl records it, checked
against the same number of bare calls of the compiled step on one batch. Goal: under 5 %.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import tyro
from measure import peak_mib, where
from tyro.conf import Positional

from jaxmem.training.data import train_batches
from jaxmem.training.experiment import load_experiment
from jaxmem.training.loop import train
from jaxmem.training.metrics import read_metrics
from jaxmem.training.step import init_state, make_train_step, shifted


def main(experiment: Positional[str] = str(Path(__file__).parents[1] / "quickstart.py"), steps: int = 40) -> None:
    config = load_experiment(experiment)
    checkpoint = dataclasses.replace(config.checkpoint, every_steps=steps)
    config = dataclasses.replace(
        config, steps=steps, eval_every_steps=steps, checkpoint=checkpoint, sample_tokens=0, eval_bytes=1
    )

    rows = shifted(next(train_batches(config.data)))
    batch = jax.tree.map(lambda x: x.reshape(config.accumulate, -1, x.shape[-1]), rows)
    state = jax.jit(lambda: init_state(config))()
    began = time.perf_counter()
    step = jax.jit(make_train_step(config), donate_argnums=0).lower(state, batch).compile()
    compile_s = time.perf_counter() - began
    bare = []
    for _ in range(steps):
        began = time.perf_counter()
        state, told = step(state, batch)
        jax.block_until_ready(told)
        bare.append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as folder:
        train(config, folder)
        lines = [line for line in read_metrics(folder) if line["kind"] == "train"][2:]
    wall, waited = sum(line["step_s"] for line in lines), sum(line["wait_s"] for line in lines)
    tokens = config.data.batch_size * config.data.context_tokens
    memory = step.memory_analysis()
    print(where())
    print(f"{experiment}: {tokens} tokens a step, {steps} steps")
    print(f"  compile                    {compile_s:8.1f} s")
    print(f"  tokens/s in the run        {tokens * len(lines) / wall:8.0f}")
    print(f"  tokens/s of the bare step  {tokens / statistics.median(bare):8.0f}")
    print(f"  not in the compiled step   {waited / wall:8.2%} of wall time")
    print(f"  step's temporaries         {memory.temp_size_in_bytes / 2**20:8.0f} MiB")
    print(f"  peak resident memory       {peak_mib():8.0f} MiB")


if __name__ == "__main__":
    tyro.cli(main)
