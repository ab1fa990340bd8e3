"""The doctor: a healthy machine passes, each kind of illness is named with what to do, and nothing is ever raised."""

import platform
import sys
import warnings

import pytest
import torch

from effitrain.evals import doctor, trials
from effitrain.evals.doctor import Check, checks
from effitrain.io.machine import Card


@pytest.fixture(scope="module")
def healthy() -> list[Check]:
    """Every check of this machine as it is."""
    return checks()


@pytest.fixture(autouse=True)
def _no_trials(request, monkeypatch):
    """The trials have tests of their own; here they would only take time."""
    if "healthy" not in request.fixturenames:
        monkeypatch.setattr(trials, "TRIALS", {})


def found(name: str) -> Check:
    (check,) = [check for check in checks() if check.name == name]
    return check


def test_this_machine_is_healthy(healthy):
    assert [check for check in healthy if check.ok is False] == []
    names = [check.name for check in healthy]
    assert len(set(names)) == len(names) and all(check.detail for check in healthy)
    assert {"system", "python", "torch", "bitsandbytes", "CUDA card", "NF4 on cpu", "safetensors files"} <= set(names)
    assert names[-len(trials.TRIALS) :] == [*trials.TRIALS]
    assert not {"pytest", "wandb"} & set(names)


@pytest.mark.parametrize(
    ("system", "release", "ok", "says"),
    [
        ("Linux", "6.1.0-amd64", True, "6.1.0"),
        ("Linux", "5.15.153.1-microsoft-standard-WSL2", True, "WSL2"),
        ("Linux", "4.4.0-19041-Microsoft", False, "--set-version"),
        ("Windows", "11", False, "WSL2"),
        ("Darwin", "23.1", False, "Linux"),
    ],
)
def test_systems(monkeypatch, system, release, ok, says):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    check = found("system")
    assert check.ok is ok and says in check.detail


def test_old_python(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4))
    assert found("python").ok is False


def test_packages_missing_old_and_optional(monkeypatch):
    versions = {"torch": "2.7.1+cu126", "transformers": "5.24.0.dev0"}

    def version(name):
        if name in versions:
            return versions[name]
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    torch_check, transformers, safetensors, peft = map(found, ["torch", "transformers", "safetensors", "peft"])
    assert torch_check.ok is False and "2.7.1+cu126" in torch_check.detail and "'torch>=2.8'" in torch_check.detail
    assert transformers.ok is True
    assert safetensors.ok is False and "not installed: pip install 'safetensors" in safetensors.detail
    assert peft.ok is None and "optional" in peft.detail


def test_not_installed_itself(monkeypatch):
    def requires(name):
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", requires)
    assert found("effitrain").ok is False


def test_no_card(monkeypatch):
    monkeypatch.setattr(doctor, "card", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found("CUDA card").ok is None and found("NF4 on cuda").ok is None


def test_pinned_memory(monkeypatch):
    """With a CPU in the place of the card: what is refused is told, what is not is timed."""
    from effitrain.stream import pinned

    assert torch.cuda.is_available() or doctor._pinned() == (None, "no card")
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device: empty_like(tensor))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for refused in (True, False):
        made = torch.zeros(doctor.PINNED, dtype=torch.uint8)
        made.is_pinned = lambda refused=refused: not refused
        monkeypatch.setattr(pinned, "pinned_empty", lambda shape, dtype, device, made=made: made)
        ok, detail = doctor._pinned()
        assert ok is not refused and ("ulimit -l" if refused else "100 MiB in place") in detail


def test_card_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(doctor, "card", lambda: Card("RTX 4090", 24 * 2**30, 23 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    check = found("CUDA card")
    assert check.ok is False and "RTX 4090" in check.detail and "CPU build" in check.detail


@pytest.mark.parametrize(("capability", "says"), [((8, 9), "sm_89, bf16"), ((7, 5), "sm_75, no bf16")])
def test_card(monkeypatch, capability, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some card")
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    monkeypatch.setattr(doctor, "card", lambda: Card("Some card", 24 * 2**30, 20 * 2**30, idle=1))
    assert "2 cards are here" in doctor._cuda()[1]
    monkeypatch.setattr(doctor, "card", lambda: None)
    ok, detail = doctor._cuda()
    assert ok is True and says in detail and "20.0 GiB free of 24.0 GiB" in detail and "driver 570.1" in detail


def test_too_little_memory_and_disk(monkeypatch):
    monkeypatch.setattr(doctor, "free_host_bytes", lambda: 2**30)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    assert found("free memory") == Check("free memory", False, "1.0 GiB; a small run takes 2.0 GiB")
    assert found("free disk").ok is False


@pytest.mark.parametrize("distort", [lambda w: w, lambda w: w.roll(1), lambda w: w * float("nan")])
def test_wrong_nf4_is_seen(monkeypatch, distort):
    import effitrain.quant.nf4 as nf4

    monkeypatch.setattr(nf4, "quantize", lambda weight: weight)
    monkeypatch.setattr(nf4, "dequantize", lambda weight, dtype: distort(weight))
    assert found("NF4 on cpu").ok is False


def test_a_check_that_raises_has_failed(monkeypatch):
    def broken():
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "free_host_bytes", broken)
    assert found("free memory") == Check("free memory", False, "OSError: no such device")


def test_lossy_safetensors_is_seen(monkeypatch):
    import safetensors.torch

    load = safetensors.torch.load_file
    monkeypatch.setattr(safetensors.torch, "load_file", lambda path: {k: v.float() for k, v in load(path).items()})
    assert found("safetensors files").ok is False


def test_trials_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "effitrain.evals.trials", None)
    assert checks()[-1].name == "trials" and checks()[-1].ok is False


def test_warnings_of_libraries_are_not_shown():
    def warns():
        warnings.warn("some name is deprecated", FutureWarning, stacklevel=1)
        return True, "done"

    assert doctor._run("a", warns) == Check("a", True, "done")
