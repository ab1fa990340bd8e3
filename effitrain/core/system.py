"""What effitrain runs on, and the words for what it does not: other systems, several cards."""

import os
import platform

from effitrain.core.errors import InputError

SYSTEMS = "effitrain runs on Linux, and on Windows inside WSL2."
ONE_CARD = "effitrain uses one card; several at once are not there yet."
# Flags and keys of other tools that ask for several.
SEVERAL_CARDS = (
    *("gpus", "num_gpus", "n_gpu", "n_gpus", "multi_gpu", "devices", "num_devices", "num_processes", "nproc_per_node"),
    *("num_nodes", "nnodes", "num_machines", "world_size", "local_rank", "tensor_parallel", "tensor_parallel_size"),
    *("tp", "tp_size", "data_parallel", "pipeline_parallel", "ddp", "fsdp", "fsdp_config", "deepspeed", "device_map"),
)


def unsupported() -> InputError | None:
    """Why effitrain cannot run here, with what to do; None where it can."""
    system, release = platform.system(), platform.release()
    if system == "Windows":
        return InputError(SYSTEMS, "This is Windows itself.", "In PowerShell: `wsl --install`. Then install it there.")
    if system != "Linux":
        name = {"Darwin": "macOS"}.get(system, system)
        return InputError(SYSTEMS, f"This is {name}.", "A Linux container or another machine will do.")
    if "microsoft" in release.lower() and "wsl2" not in release.lower():
        fact = f"Linux {release} looks like WSL1, which has no CUDA."
        return InputError(fact, next_step="In PowerShell: `wsl --set-version DISTRIBUTION 2`")
    return None


def one_of_several() -> InputError | None:
    """Why this process cannot train: it was started to share a run with others. None where it was not."""
    processes = os.environ.get("WORLD_SIZE") or "1"
    if processes == "1":
        return None
    return InputError(
        f"WORLD_SIZE is {processes}: so many processes were started to share a run. {ONE_CARD}",
        "Each of them would do the whole run, in the same folder.",
        "Start it once, without torchrun or accelerate, or unset WORLD_SIZE; CUDA_VISIBLE_DEVICES=1 takes the second"
        " card.",
    )


def check_system() -> None:
    """Refuse to begin where nothing would work.

    Raises:
        InputError: another system.
    """
    if error := unsupported():
        raise error


def check_alone() -> None:
    """Refuse to write what several processes would all write.

    Raises:
        InputError: one run was started as several processes.
    """
    if error := one_of_several():
        raise error
