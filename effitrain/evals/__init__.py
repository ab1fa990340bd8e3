"""Figures of models and machines: losses, generated text, an adapter's gain, the doctor's trials, benchmarks.

May import train and what is below it.
"""
