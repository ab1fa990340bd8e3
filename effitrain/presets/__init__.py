"""Shapes and hub ids of known models as TOML, and the built-in tiny model and its instruction set. Data only."""
