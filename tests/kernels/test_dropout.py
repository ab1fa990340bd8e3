"""Dropout by counter: the kernel drops what the reference drops, again in backward, and the share it should."""

import pytest
import torch

from effitrain.kernels.dropout import dropout, reference, uniform

interpreter = pytest.mark.interpreter


def test_the_numbers_are_philox():
    """First words of Philox 4x32-10 of the known answers in Random123 (Salmon et al. 2011): counter 0, key 0."""
    word = 0x6627E8D5
    assert uniform(1, 0).item() == pytest.approx(word * 4.6566127342e-10, rel=1e-7)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_reference_drops_that_share_and_keeps_the_mean(plain, p):
    x = torch.ones(100_000)
    y = dropout(x, p, 3)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / 1e5) ** 0.5)  # four deviations
    assert set(y.unique().tolist()) == {0.0, (x / (1 - p))[0].item()}
    assert not torch.equal(y, dropout(x, p, 4)) and dropout(x, 0.0, 3) is x


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seed", [0, 5, 2**31 - 1])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 300)])
def test_kernel(shape, seed, dtype):
    x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    x.requires_grad_()
    y = dropout(x, 0.3, seed)
    (dx,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(y, reference(x, 0.3, seed), rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=0)
    assert torch.equal(dx == 0, y == 0)
    torch.testing.assert_close(dx, reference(grad, 0.3, seed), rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=0)
    total = grad.clone()
    assert dropout(x.detach(), 0.3, seed, into=total) is total
    torch.testing.assert_close(total, grad + y, rtol=1e-3, atol=1e-3)
