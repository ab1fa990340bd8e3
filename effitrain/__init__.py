"""effitrain: adapt a language model far larger than your GPU, exactly within a memory budget you name.

The verbs of the command line are functions here: ``plan``, ``prove``, ``run``, ``prune``, ``recover``, ``evaluate``,
``chat``, ``export``. They take a
recipe, made by ``recipe(model=..., dataset=..., gpu_mem="20G", ...)``, and return plain values. Importing this package
imports neither torch nor transformers; the first use of a verb does.
"""

import importlib
import os
from typing import Any

__version__ = "0.1.0"
__all__ = [
    *("Events", "Recipe", "__version__", "chat", "evaluate", "export", "plan", "prove", "prune", "recipe", "recover"),
    "run",
]
# CUDA counts cards by speed and their driver by slot; the plan asks the driver.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def __getattr__(name: str) -> Any:
    if name in __all__:
        importlib.import_module("effitrain.core.system").check_system()
    if name == "Recipe":
        return importlib.import_module("effitrain.core.recipe").Recipe
    if name in ("plan", "recipe"):
        return getattr(importlib.import_module("effitrain.planning"), name)
    if name in __all__:
        return getattr(importlib.import_module("effitrain.api"), name)
    raise AttributeError(f"module 'effitrain' has no attribute {name!r}")
