"""genjax beside its peers, one file per workload."""

import os

# PyTorch reads it as it is imported: all cores, as jax takes them.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
