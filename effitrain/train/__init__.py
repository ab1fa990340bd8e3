"""The loop, its hooks, optimizers, schedules, checkpoints; LISA and the homes of its layers; memory tracked, probed
by a trial step and proved on shapes. May import adapters and below.
"""
