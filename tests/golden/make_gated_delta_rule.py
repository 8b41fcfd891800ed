"""Writes gated_delta_rule.npz: what other people's code makes of the gated delta rule and the short convolution.

    python tests/golden/make_gated_delta_rule.py

The rule is `naive_recurrent_gated_delta_rule` of flash-linear-attention, the convolution torch's `conv1d`. Needs

    pip install torch==2.13.0 einops numpy
    pip install --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0

in an environment of its own. The file of naive functions is loaded by its path, since importing `fla.ops` needs Triton.
"""

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np
import torch

B, T, H, K, V, WIDTH = 2, 37, 2, 8, 12, 4
CASES = {"usual": 1.0, "strong": 40.0, "none": 0.0}  # how strong the decay is


def naive_recurrence():
    found = importlib.metadata.distribution("fla-core").locate_file("fla/ops/gated_delta_rule/naive.py")
    spec = importlib.util.spec_from_file_location("naive", found)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.naive_recurrent_gated_delta_rule


def leaf(array):
    return torch.tensor(np.asarray(array, np.float32), requires_grad=True)


def unit(a):
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def rule(rng, strength):
    inputs = {
        "q": leaf(unit(rng.normal(size=(B, T, H, K)))),
        "k": leaf(unit(rng.normal(size=(B, T, H, K)))),
        "v": leaf(rng.normal(size=(B, T, H, V))),
        "g": leaf(-strength * rng.uniform(0.0, 0.2, (B, T, H))),
        "beta": leaf(rng.uniform(0, 1, (B, T, H))),
        "state": leaf(rng.normal(size=(B, H, K, V))),
    }
    given = {name: array for name, array in inputs.items() if name != "state"}
    outputs = naive_recurrence()(**given, initial_state=inputs["state"], output_final_state=True)
    return record(inputs, dict(zip(("o", "final_state"), outputs, strict=True)), rng)


def convolution(rng):
    inputs = {"x": leaf(rng.normal(size=(B, T, V))), "weight": leaf(rng.normal(size=(WIDTH, V)))}
    x = torch.nn.functional.pad(inputs["x"].mT, (WIDTH - 1, 0))
    y = torch.nn.functional.conv1d(x, inputs["weight"].mT[:, None], groups=V).mT
    return record(inputs, {"y": y}, rng)


def record(inputs, outputs, rng):
    """Inputs, outputs, the weights of the outputs in a sum, and the gradients of that sum."""
    weights = {f"weight_of_{name}": leaf(rng.normal(size=a.shape)) for name, a in outputs.items()}
    sum((w * a).sum() for w, a in zip(weights.values(), outputs.values(), strict=True)).backward()
    gradients = {f"d_{name}": a.grad for name, a in inputs.items()}
    return {name: a.detach().numpy() for name, a in (inputs | outputs | weights | gradients).items()}


def main():
    rng = np.random.default_rng(0)
    records = {f"rule_{case}": rule(rng, strength) for case, strength in CASES.items()}
    records["convolution"] = convolution(rng)
    arrays = {f"{case}/{name}": a for case, found in records.items() for name, a in found.items()}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "fla-core", "numpy")]
    np.savez_compressed(Path(__file__).with_name("gated_delta_rule.npz"), versions=np.array(versions), **arrays)


if __name__ == "__main__":
    main()
