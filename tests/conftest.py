"""Eight fake devices for every test."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

collect_ignore_glob = ["golden/*"]  # scripts that make golden arrays need torch, the tests do not
