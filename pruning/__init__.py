"""Structured pruning and recovery of adapters to the full-size model. Not in this version yet."""
