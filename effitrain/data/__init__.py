"""Rows, templates, masks, packing, batches: from a file to token ids. May import quant, io, kernels and core."""
