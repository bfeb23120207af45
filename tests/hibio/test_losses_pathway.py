"""Pathway KL: double-loop oracle, closed forms, invariances, spots without target, errors."""

import math

import numpy as np
import pytest
import torch

from hibio.losses import pathway_kl


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    anchor = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    target = torch.rand(8, 6, generator=generator, dtype=torch.float64)
    target[target < 0.5] = 0
    target[3] = 0
    target /= target.sum(1, keepdim=True).clamp(min=1e-9)
    return embedding, anchor, target


def test_against_a_double_loop():
    embedding, anchor, target = example()
    rows = []
    for z, q in zip(embedding.numpy(), target.numpy(), strict=True):
        if q.sum() == 0:
            continue
        cosine = [z @ a / np.linalg.norm(z) / np.linalg.norm(a) for a in anchor.numpy()]
        p = np.exp(np.array(cosine) / 0.3)
        p /= p.sum()
        rows.append(sum(qi * math.log(qi / pi) for qi, pi in zip(q, p, strict=True) if qi > 0))
    assert len(rows) == 7
    assert pathway_kl(embedding, anchor, target, 0.3).item() == pytest.approx(np.mean(rows))


def test_closed_forms():
    anchor = torch.eye(4)
    one_hot = torch.eye(4)
    expected = math.log(1 + 3 * math.exp(-1 / 0.5))
    assert pathway_kl(anchor, anchor, one_hot, 0.5).item() == pytest.approx(expected, rel=1e-5)
    p = (anchor @ anchor / 0.5).softmax(1)
    assert pathway_kl(anchor, anchor, p, 0.5).item() == pytest.approx(0, abs=1e-6)


def test_zero_targets_leave_a_graph_behind():
    embedding, anchor, target = example()
    embedding.requires_grad_()
    loss = pathway_kl(embedding, anchor, target * 0, 0.3)
    loss.backward()
    assert loss.item() == 0
    assert embedding.grad.abs().max() == 0
    assert pathway_kl(embedding[:0], anchor, target[:0], 0.3).item() == 0


def test_invariance_to_order_scale_and_rows_without_target():
    embedding, anchor, target = example()
    loss = pathway_kl(embedding, anchor, target, 0.3)
    rows = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    columns = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    turned = pathway_kl(embedding[rows] * 7, anchor[columns] * 3, target[rows][:, columns], 0.3)
    torch.testing.assert_close(turned, loss)
    kept = target.sum(1) > 0
    torch.testing.assert_close(pathway_kl(embedding[kept], anchor, target[kept], 0.3), loss)
    torch.testing.assert_close(pathway_kl(embedding, anchor, target * 0.6, 0.3), loss)


def test_gradient_and_half_precision():
    embedding, anchor, target = example()
    inputs = (embedding.requires_grad_(), anchor.requires_grad_())
    assert torch.autograd.gradcheck(lambda z, a: pathway_kl(z, a, target, 0.3), inputs)
    plain = tuple(t.detach().float() for t in (embedding, anchor, target))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pathway_kl(*plain, 0.1)
    torch.testing.assert_close(inside, pathway_kl(*plain, 0.1), rtol=0, atol=0)


def test_errors():
    embedding, anchor, target = example()
    with pytest.raises(ValueError, match="a column for every anchor"):
        pathway_kl(embedding, anchor[:5], target, 0.3)
    with pytest.raises(ValueError, match="one D"):
        pathway_kl(embedding[:, :4], anchor, target, 0.3)
    with pytest.raises(ValueError, match="temperature"):
        pathway_kl(embedding, anchor, target, -1.0)
