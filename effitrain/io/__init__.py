"""Files: checkpoints one tensor at a time, hub, synthetic weights, atomic writes. May import kernels and core."""
