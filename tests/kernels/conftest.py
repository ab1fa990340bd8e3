"""What the tests of kernels share: Triton's interpreter, poisoned outputs between guards, comparisons in float64.

The interpreter must be chosen before a kernel is defined, so tests marked ``interpreter`` have a process of their own:
TRITON_INTERPRET=1 pytest -m interpreter tests/kernels. ``scripts/test.sh`` does both.
"""

import pytest
import torch

from effitrain.kernels import backend

GUARD = 64  # elements before and behind an output


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test of a kernel says so where it cannot run."""
    if item.get_closest_marker("interpreter") and not backend.INTERPRETED:
        pytest.skip("runs Triton's interpreter, in a process of its own: TRITON_INTERPRET=1 pytest -m interpreter")


@pytest.fixture(autouse=True)
def _poisoned(request, monkeypatch):
    """In interpreter tests fresh memory is NaN between guards, so a cell that is not written, or one beside an output
    that is, shows.
    """
    if not request.node.get_closest_marker("interpreter"):
        yield
        return
    empty, guarded = torch.empty, []

    def poisoned(*size, **kwargs):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        if torch.device(kwargs.get("device") or "cpu").type != "cpu" or "out" in kwargs:
            return empty(*size, **kwargs)
        kwargs.pop("memory_format", None)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        poison = float("nan") if dtype.is_floating_point else 77
        whole = empty(shape.numel() + 2 * GUARD, **kwargs).fill_(poison)
        before = whole.clone()
        guarded.append((whole, before))
        return whole[GUARD : GUARD + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda t, dtype=None: poisoned(t.shape, dtype=dtype or t.dtype, device=t.device)
    )
    yield
    monkeypatch.undo()
    for whole, before in guarded:
        for part in (slice(None, GUARD), slice(-GUARD, None)):
            assert torch.equal(whole[part].view(torch.uint8), before[part].view(torch.uint8)), (
                "written beside an output"
            )


@pytest.fixture
def plain(monkeypatch):
    """The references in place of the kernels, in the interpreter's process too."""
    monkeypatch.setattr(backend, "INTERPRETED", False)


@pytest.fixture(scope="session")
def close():
    """``close(found, wanted, tolerance)``: no value is further off than this share of the largest wanted one."""

    def compare(found, wanted, tolerance):
        assert found.shape == wanted.shape
        error = (found.detach().double() - wanted.detach().double()).abs().max()
        assert error <= tolerance * wanted.detach().abs().max() + 1e-30, f"off by {error / wanted.abs().max():.1e}"

    return compare
