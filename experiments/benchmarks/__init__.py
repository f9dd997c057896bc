"""genjax beside its peers, one file per workload."""
