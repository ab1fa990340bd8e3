"""Structured pruning and recovery of adapters to the full-size model. May import adapters and below."""
