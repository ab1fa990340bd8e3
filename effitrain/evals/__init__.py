"""What a model is worth, and what this machine is: losses, generated text, the gain of a recovered adapter, the doctor's
trials, benchmarks. May import train and below.
"""
