"""Models built from config on meta, filled layer by layer; attention; recomputation. May import data and below."""
