"""NF4 in bitsandbytes' layout and the one frozen linear an adapter ever meets. May import io, kernels and core."""
