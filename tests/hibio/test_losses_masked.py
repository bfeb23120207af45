"""Masked and profile MSE: loops, closed forms, indifference to unmasked entries, errors."""

import pytest
import torch

from hibio.losses import masked_mse, rows_mse


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    return prediction, target, torch.rand(6, 5, generator=generator) < 0.4


def test_masked_against_a_double_loop():
    prediction, target, mask = example()
    squares = [
        (prediction[i, j] - target[i, j]).item() ** 2
        for i in range(6)
        for j in range(5)
        if mask[i, j]
    ]
    assert 0 < len(squares) < 30
    found = masked_mse(prediction, target, mask).item()
    assert found == pytest.approx(sum(squares) / len(squares))


def test_masked_closed_forms():
    prediction, target, mask = example()
    everything = torch.ones_like(mask)
    expected = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(masked_mse(prediction, target, everything), expected)
    assert masked_mse(target + 2, target, mask).item() == pytest.approx(4)
    assert masked_mse(prediction[:0], target[:0], mask[:0]).item() == 0


def test_nothing_masked_is_zero_with_a_graph():
    prediction, target, mask = example()
    prediction.requires_grad_()
    loss = masked_mse(prediction, target, mask & False)
    loss.backward()
    assert loss.item() == 0
    assert prediction.grad.abs().max() == 0


def test_unmasked_entries_take_no_part_even_when_nan():
    prediction, target, mask = example()
    loss = masked_mse(prediction, target, mask)
    spoiled = torch.where(mask, prediction, torch.nan).requires_grad_()
    other = masked_mse(spoiled, torch.where(mask, target, torch.inf), mask)
    other.backward()
    torch.testing.assert_close(other, loss)
    assert spoiled.grad[~mask].abs().max() == 0
    assert spoiled.grad[mask].isfinite().all()


def test_masked_gradient_and_half_precision():
    prediction, target, mask = example()
    leaf = prediction.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: masked_mse(p, target, mask), (leaf,))
    large = torch.full((6, 5), 600.0, dtype=torch.float16)  # its square is inf in half precision
    assert masked_mse(large, torch.zeros_like(large), mask).item() == pytest.approx(360_000)


def test_profile_is_the_mean_over_core_spots():
    prediction, target, _ = example()
    core = torch.tensor([True, False, True, True, False, False])
    expected = torch.nn.functional.mse_loss(prediction[core], target[core])
    torch.testing.assert_close(rows_mse(prediction, target, core), expected)
    assert rows_mse(prediction, target, core & False).item() == 0
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    turned = rows_mse(prediction[order], target[order], core[order])
    torch.testing.assert_close(turned, expected)


def test_errors():
    prediction, target, mask = example()
    with pytest.raises(ValueError, match="one shape"):
        masked_mse(prediction, target[:3], mask)
    with pytest.raises(ValueError, match="one shape"):
        masked_mse(prediction, target, mask[:, 0])
    with pytest.raises(ValueError, match=r"torch\.bool"):
        masked_mse(prediction, target, mask.float())
    with pytest.raises(ValueError, match="used"):
        rows_mse(prediction, target, mask[:3, 0])
