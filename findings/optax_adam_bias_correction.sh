#!/usr/bin/env bash
# optax 0.2.8 with jax 0.10.2: Adam's first steps are off by as much as fp32 rounds b2, times 1 / (1 - b2).
#
# Input: optax.adam(1.0, b2=b2, eps=0) and a gradient that is always 0.5; by Kingma & Ba 2015 (arXiv 1412.6980, algorithm 1)
# every step is then exactly -1. Seen: -1.000083 at b2 = 0.9999 and -1.000679 at 0.99999 in the first step, since 1 - b2^t is
# formed in fp32, where b2 has already lost the digits that the difference is made of. The second moment is multiplied by
# 1 - b2 formed in fp64, so that the two do not cancel. -expm1(t log(b2)), with log(b2) in fp64, gives -1 to 1e-7.
#
# Succeeds while that is so, and fails if it changes. Needs python3 (3.11 or newer) and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import math
import jax.numpy as jnp
import optax

gradient, parameter = jnp.full(1, 0.5), jnp.ones(1)
for b2, seen in ((0.9999, 8.3e-5), (0.99999, 6.8e-4)):
    adam = optax.adam(1.0, b1=0.9, b2=b2, eps=0.0)
    update, _ = adam.update(gradient, adam.init(parameter), parameter)
    error = abs(float(update[0]) + 1)
    nu = jnp.float32(1 - b2) * gradient**2
    better = abs(float((gradient / jnp.sqrt(nu / -jnp.expm1(1.0 * math.log(b2))))[0]) - 1)
    print(f"b2 = {b2}: first step {float(update[0]):.7f}, off by {error:.1e}; with expm1 off by {better:.1e}")
    assert 0.9 * seen < error < 1.1 * seen, f"changed: the error was {seen}"
    assert better < 2e-7
PYTHON
echo "as seen"
