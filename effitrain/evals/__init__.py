"""Perplexity and chat of a model with or without an adapter. May import train and what is below it."""
