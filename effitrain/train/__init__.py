"""The loop, its hooks, optimizers, schedules, checkpoints, memory tracking. May import adapters and below."""
