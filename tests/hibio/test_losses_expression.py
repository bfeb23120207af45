"""Expression MSE: loop, closed forms, rows that take no part, errors."""

import pytest
import torch

from hibio.losses import rows_mse


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    return prediction, target, torch.tensor([True, True, False, True, False, False, True])


def test_against_a_double_loop():
    prediction, target, used = example()
    total = 0.0
    for i in used.nonzero().flatten().tolist():
        for h in range(4):
            total += (prediction[i, h] - target[i, h]).item() ** 2
    assert rows_mse(prediction, target, used).item() == pytest.approx(total / 16)


def test_closed_forms():
    prediction, target, used = example()
    expected = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(rows_mse(prediction, target), expected)
    assert rows_mse(target - 3, target, used).item() == pytest.approx(9)
    assert rows_mse(target, target).item() == 0


def test_unused_rows_take_no_part():
    prediction, target, used = example()
    loss = rows_mse(prediction, target, used)
    target[~used] = torch.nan
    torch.testing.assert_close(rows_mse(prediction, target, used), loss)
    genes = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(rows_mse(prediction[:, genes], target[:, genes], used), loss)
    leaf = prediction.clone().requires_grad_()
    rows_mse(leaf, target, used & False).backward()
    assert leaf.grad.abs().max() == 0


def test_errors():
    prediction, target, used = example()
    with pytest.raises(ValueError, match="expected"):
        rows_mse(prediction, target, used[:3])
    with pytest.raises(ValueError, match="one shape"):
        rows_mse(prediction, target[:, :2])
