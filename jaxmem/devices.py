"""Which device a program is compiled for."""

import jax


def kind_of_device() -> str:
    """What JAX calls the devices of the mesh in force, or else the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind
