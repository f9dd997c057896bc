"""genjax: the mathematics of deep generative models as pure JAX functions.

Nothing is imported here: `import genjax.transport` loads that family and jax, no more.
"""

__version__ = "0.1.0"
