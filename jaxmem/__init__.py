"""jaxmem: sequence models that remember, in JAX."""

__version__ = "0.1.0"
