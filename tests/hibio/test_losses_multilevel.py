"""Joining terms: the weighted sum, terms of weight 0, names that do not pair up."""

import pytest
import torch

from hibio.losses import combine


def example() -> dict[str, torch.Tensor]:
    return {
        "spot/contrastive": torch.tensor(2.0, requires_grad=True),
        "pathway/kl": torch.tensor(3.0, requires_grad=True),
        "omics/masked": torch.tensor(5.0, requires_grad=True),
    }


WEIGHTS = {"spot/contrastive": 1.0, "pathway/kl": 0.25, "omics/masked": 2.0}


def test_weighted_sum_and_its_gradient():
    terms = example()
    output = combine(terms, WEIGHTS, n=7)
    assert output.total.item() == pytest.approx(2 + 0.75 + 10)
    assert output.n == 7
    output.total.backward()
    assert {name: term.grad.item() for name, term in terms.items()} == WEIGHTS
    assert {name: term.item() for name, term in output.terms.items()} == {
        name: term.item() for name, term in terms.items()
    }
    assert not any(term.requires_grad for term in output.terms.values())


def test_order_of_names_does_not_matter():
    turned = dict(reversed(example().items()))
    torch.testing.assert_close(combine(turned, WEIGHTS).total, combine(example(), WEIGHTS).total)


def test_weight_zero_is_reported_but_takes_no_part():
    terms = {**example(), "pathway/kl": torch.tensor(float("nan"), requires_grad=True)}
    output = combine(terms, {**WEIGHTS, "pathway/kl": 0.0})
    output.total.backward()
    assert output.total.item() == pytest.approx(12)
    assert output.terms["pathway/kl"].isnan()
    assert terms["pathway/kl"].grad is None


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({**WEIGHTS, "pathway/k": 1.0}, "weight 'pathway/k' has no term.*nearest: pathway/kl"),
        ({"spot/contrastive": 1.0, "pathway/kl": 1.0}, "term 'omics/masked' has no weight"),
        ({**WEIGHTS, "pathway/kl": -1.0}, "0 or more"),
        ({**WEIGHTS, "pathway/kl": float("inf")}, "0 or more"),
        (dict.fromkeys(WEIGHTS, 0.0), "nothing to train"),
    ],
)
def test_bad_weights(weights, words):
    with pytest.raises(ValueError, match=words):
        combine(example(), weights)


def test_bad_terms():
    with pytest.raises(ValueError, match="nothing to train"):
        combine({}, {})
    with pytest.raises(ValueError, match="expected one number"):
        combine({"a": torch.ones(2)}, {"a": 1.0})
