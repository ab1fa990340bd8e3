"""How much a group matters, one score per file; larger is kept. Files import ``seen`` and the groups, not each other.

A score is a module with ``NEEDS`` (what must be seen of a layer: ``nothing``, ``weights``, ``inputs`` or ``gradients``)
and ``score(layer, part)``, one float32 number for each group of ``part`` (FFN channels or KV heads) of a ``SeenLayer``.
"""
