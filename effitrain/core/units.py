"""Bytes and numbers as people write them: ``20G`` and ``20GiB`` are 20 * 2**30 bytes, ``20GB`` is 20 * 10**9."""

import re

from effitrain.core.errors import InputError

_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
_PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?B)?|B)?\s*$", re.IGNORECASE)
# Nobody means a budget below this: 24 stands for GiB, and 24576 for the MiB that nvidia-smi shows.
LEAST_BYTES = 100_000


def parse_bytes(text: str | int) -> int:
    """Bytes of ``text``; a bare number counts bytes.

    Raises:
        InputError: not a size, or below ``LEAST_BYTES``.
    """
    match = _PATTERN.match(str(text))
    if not match:
        raise InputError(f"{text!r} is not a memory size.", next_step="Write it like 20G, 20GiB, 20GB or 512M.")
    number, unit, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    size = int(float(number) * base ** (_POWERS[unit.upper()] if unit else 0))
    if size < LEAST_BYTES:
        meant = f"{number}{'G' if float(number) <= 1024 else 'M'}" if float(number) else "20G"
        raise InputError(f"The memory size {text!r} is {size} bytes.", next_step=f"Did you mean {meant}?")
    return size


def counted(number: int, what: str) -> str:
    """A number of things for people: ``1 sample``, ``1,330 samples``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def format_duration(seconds: float) -> str:
    """``seconds`` for people, in two units at most: ``45 s``, ``12 min``, ``2 h 44 min``, ``3 d 4 h``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if hours == 0:
        return f"{minutes} min"
    return f"{days} d {hours % 24} h" if days else f"{hours} h {minutes % 60} min"


def format_bytes(size: int) -> str:
    """``size`` in bytes for people, in binary units: ``32.9 GiB``, ``441 MiB``, ``17 B``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    if unit == "B":
        return f"{size} B"
    return f"{value:.1f} {unit}" if abs(value) < 100 else f"{value:.0f} {unit}"
