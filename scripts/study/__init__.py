"""What the pruning studies share."""
