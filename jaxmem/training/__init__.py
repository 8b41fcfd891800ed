"""Training: data, step, loop, optimisers, checkpoints of a run, metrics, report."""
