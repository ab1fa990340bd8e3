"""What studies and benchmarks share."""
