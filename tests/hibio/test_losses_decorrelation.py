"""Decorrelation: numpy and loop oracles, closed forms, invariances, errors."""

import numpy as np
import pytest
import torch

from hibio.losses import decorrelation


def example() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 4, generator=generator, dtype=torch.float64)


def test_against_numpy_covariance_and_a_double_loop():
    value = example()
    covariance = np.cov(value.numpy(), rowvar=False)
    total = 0.0
    for i in range(4):
        for j in range(4):
            total += covariance[i, j] ** 2 if i != j else 0.0
    assert decorrelation(value).item() == pytest.approx(total / 4)


def test_closed_forms():
    crossed = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert decorrelation(crossed).item() == 0
    twin = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # every covariance is 2
    assert decorrelation(twin).item() == pytest.approx((4 + 4) / 2)
    assert decorrelation(example()[:1]).item() == 0
    assert decorrelation(example()[:0]).item() == 0
    assert decorrelation(example()[:, :1]).item() == 0


def test_invariance_and_scale():
    value = example()
    loss = decorrelation(value)
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(decorrelation(value[rows][:, [2, 0, 3, 1]] + 5), loss)
    torch.testing.assert_close(decorrelation(value * 2), loss * 16)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(decorrelation(value * signs), loss)


def test_gradient_and_half_precision():
    value = example().requires_grad_()
    assert torch.autograd.gradcheck(decorrelation, (value,))
    plain = example().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = decorrelation(plain)
    torch.testing.assert_close(inside, decorrelation(plain), rtol=0, atol=0)


def test_errors():
    with pytest.raises(ValueError, match="expected"):
        decorrelation(torch.ones(3))
