"""Writes sparse_adam.npz: a table after each of a few steps of torch.optim.SparseAdam, whose gradients read some of its rows.

    python tests/golden/make_sparse_adam.py

Needs

    pip install torch==2.13.0

in an environment of its own.
"""

from pathlib import Path

import numpy as np
import torch

STEPS, M, V, K = 5, 11, 4, 3
OPTIONS = {"lr": 0.05, "betas": (0.8, 0.97), "eps": 1e-2}


def main():
    rng = np.random.default_rng(0)
    table = torch.nn.Parameter(torch.tensor(rng.normal(size=(M, V)).astype(np.float32)))
    optimizer = torch.optim.SparseAdam([table], **OPTIONS)
    arrays = {"table": table.detach().numpy().copy()}
    rows = np.stack([np.sort(rng.choice(M, K, replace=False)) for _ in range(STEPS)]).astype(np.int32)
    sums, tables = rng.normal(size=(STEPS, K, V)).astype(np.float32), []
    for step in range(STEPS):
        table.grad = torch.sparse_coo_tensor(torch.tensor(rows[step][None]), torch.tensor(sums[step]), (M, V))
        optimizer.step()
        tables.append(table.detach().numpy().copy())
    arrays |= {"rows": rows, "sums": sums, "tables": np.stack(tables), "torch": np.array(torch.__version__)}
    np.savez_compressed(Path(__file__).with_name("sparse_adam.npz"), **arrays)


if __name__ == "__main__":
    main()
