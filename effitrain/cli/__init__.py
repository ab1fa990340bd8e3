"""The command line: one verb per file, flags made from the recipe's fields. Nobody imports it."""
