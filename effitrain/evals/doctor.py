"""What a run needs of this machine, each point tried and not only read: system, packages, card, memory, NF4, files.

The trials of training itself are in ``trials``.
"""

import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from effitrain.core.system import ONE_CARD, one_of_several, unsupported
from effitrain.core.units import format_bytes
from effitrain.io.machine import card, free_host_bytes

MIN_RAM = 2 * 2**30  # bytes: torch, transformers and bitsandbytes take 0.5 GiB before the first weight
MIN_DISK = 2 * 2**30  # bytes: a rank-16 adapter of an 8B model takes 160 MiB, two checkpoints with AdamW's states 960
# Relative error of normal weights after NF4 with blocks of 64; bitsandbytes 0.50 gives 0.091 to 0.092.
NF4_ERROR = (0.085, 0.098)
PINNED = 100 * 2**20  # bytes: not a power of two, which torch's own pinned memory would be rounded up to

Outcome = tuple[bool | None, str]


@dataclass(frozen=True)
class Check:
    """One point: ``ok`` is None where it does not apply here; ``detail`` says what was found, and what to do."""

    name: str
    ok: bool | None
    detail: str


def checks() -> list[Check]:
    """Every check, in the order to read them. A check that raises has failed; nothing is raised."""
    results = [_run(name, check) for name, check in of_the_machine()]
    try:
        from effitrain.evals.trials import TRIALS
    except ImportError as error:
        return [*results, Check("trials", False, f"cannot begin: {error}")]
    return [*results, *(_run(name, trial) for name, trial in TRIALS.items())]


def of_the_machine() -> list[tuple[str, Callable[[], Outcome]]]:
    """The checks that are no trials of training, by name."""
    return [
        ("system", _system),
        ("python", _python),
        *_packages(),
        ("CUDA card", _cuda),
        ("free memory", _memory),
        ("free disk", _disk),
        ("NF4 on cpu", lambda: _nf4("cpu")),
        ("NF4 on cuda", lambda: _nf4("cuda")),
        ("Triton kernels", _kernels),
        ("pinned memory", _pinned),
        ("safetensors files", _safetensors),
    ]


def _run(name: str, check: Callable[[], Outcome]) -> Check:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what other libraries warn of is no illness of this machine
            return Check(name, *check())
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


def _system() -> Outcome:
    if error := unsupported() or one_of_several():
        return False, " ".join(str(error).splitlines())
    return True, f"Linux {platform.release()}, {platform.machine()}"


def _python() -> Outcome:
    found = platform.python_version()
    return (True, found) if sys.version_info >= (3, 11) else (False, f"{found}; effitrain needs 3.11 or newer.")


def _packages() -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """A check for each package that effitrain's own metadata asks for; peft, an extra, need not be there."""
    try:
        asked = [Requirement(line) for line in requires("effitrain") or []]
    except PackageNotFoundError:
        yield "effitrain", lambda: (False, "not installed. From the folder of its source: pip install -e .")
        return
    for requirement in asked:
        needed = _applies(requirement, extra="")
        if needed or (requirement.name == "peft" and _applies(requirement, extra="peft")):
            yield requirement.name, partial(_package, requirement, needed)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _package(requirement: Requirement, needed: bool) -> Outcome:
    ask = f"{requirement.name}{requirement.specifier}"
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return (False if needed else None), f"not installed{'' if needed else ', optional'}: pip install '{ask}'"
    if not requirement.specifier.contains(found, prereleases=True):
        return False, f"{found} is outside the supported range: pip install '{ask}'"
    return True, f"{found} ({requirement.specifier})"


def _cuda() -> Outcome:
    import torch

    found = card()
    if not torch.cuda.is_available():
        if found is None:
            return None, "none; training runs on the CPU."
        build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        return False, f"{found.name} is here, but torch {torch.__version__} ({build}) cannot use it. See pytorch.org."
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    bf16 = "bf16" if major >= 8 else "no bf16 before Ampere, fp16 is used"
    idle = f"; {found.idle + 1} cards are here, and {ONE_CARD}" if found and found.idle else ""
    return True, (
        f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {bf16}), driver {_driver()}, CUDA {torch.version.cuda}, "
        f"{format_bytes(free)} free of {format_bytes(total)}{idle}"
    )


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if not tool:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def _memory() -> Outcome:
    return _enough(free_host_bytes(), MIN_RAM)


def _disk() -> Outcome:
    return _enough(shutil.disk_usage(Path.cwd()).free, MIN_DISK)


def _enough(free: int, least: int) -> Outcome:
    return free >= least, format_bytes(free) + ("" if free >= least else f"; a small run takes {format_bytes(least)}")


def _nf4(device: str) -> Outcome:
    """Quantise normal weights and back: the error must be NF4's, neither garbage nor zero."""
    import torch

    from effitrain.quant.nf4 import dequantize, quantize

    if device == "cuda" and not torch.cuda.is_available():
        return None, "no card"
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    error = ((dequantize(quantize(weight), torch.float32) - weight).norm() / weight.norm()).item()
    low, high = NF4_ERROR
    return low < error < high, f"relative error {error:.4f}, expected {low} to {high}"


def _kernels() -> Outcome:
    """Each kernel against its reference on the card; one that is wrong is switched off there until it is right."""
    import torch

    from effitrain.evals import kernels
    from effitrain.kernels import backend

    if not torch.cuda.is_available():
        return None, "no card"
    device = torch.device("cuda")
    if not kernels.runs_on(device):
        return None, "not for this card or installation, or switched off: torch and cuBLAS compute instead"
    backend.switch_off([])  # what was wrong before is tried again
    wrong = kernels.wrong_kernels(device, (torch.bfloat16, torch.float32))
    if not wrong:
        return True, f"{len(kernels.CHECKS)} agree with their references"
    where = backend.switch_off(list(wrong))
    found = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
    return (
        False,
        f"wrong on this card: {found}. Switched off in {where}; training takes the slower path, please report it",
    )


def _pinned() -> Outcome:
    """Host memory that the card reads by itself, without which the copies of streamed layers wait for each other."""
    import torch

    from effitrain.stream.pinned import pinned_empty

    if not torch.cuda.is_available():
        return None, "no card"
    host = pinned_empty((PINNED,), torch.uint8, torch.device("cuda"))
    if not host.is_pinned():
        return False, "refused, so streaming copies slowly. Raise the limit of locked memory (ulimit -l)."
    there = torch.empty_like(host, device="cuda").copy_(host)  # the first copy maps pages and starts the driver up
    torch.cuda.synchronize()
    started = time.perf_counter()
    there.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    speed = PINNED / 1e9 / (time.perf_counter() - started)
    return True, f"{format_bytes(PINNED)} in place, {speed:.1f} GB/s to the card"


def _safetensors() -> Outcome:
    import torch
    from safetensors.torch import load_file, save_file

    written = {"a": torch.arange(6.0).reshape(2, 3).to(torch.bfloat16), "b": torch.arange(5, dtype=torch.uint8)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.safetensors"
        save_file(written, path)
        read = load_file(path)
    same = all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in written.items())
    return same, "written and read back" if same else "what was read back differs from what was written"
