#!/usr/bin/env bash
# jax 0.10.2: a second coordinator at the same port starts without an error, and the processes of two runs can meet either.
#
# Input: what jax.distributed.initialize starts in process 0 (the coordination service), twice, at one address. Seen: both run,
# while an ordinary socket is refused the port: gRPC opens it so that others may share it. The system then hands each new client
# to one of the two, so that a client of the second run can arrive in the first, which ends it (seen in 2 of 6 pairs of
# single-process runs). Expected: that the second is refused, as other servers are. The port is part of a command line that is
# easily copied, so whoever starts the coordinator should try to bind it before.
#
# Succeeds while that is so, and fails if it changes. Needs python3 (3.11 or newer), Linux, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import socket

from jax._src.lib import _jax

with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
services = []
for run in ("first", "second"):
    services.append(_jax.get_distributed_runtime_service(f"[::]:{port}", 1))
    print(f"the {run} run's coordinator is up")
try:
    socket.create_server(("", port)).close()
except OSError as error:
    print(f"an ordinary socket: {error.strerror.split(' (')[0]}")
else:
    raise SystemExit("changed: the port is free")
assert len(services) == 2, "changed: the second coordinator was refused"
for service in services:
    service.shutdown()
print("as seen")
PYTHON
