"""Gated attention over the spots of a patient (multiple-instance learning), on frozen embeddings.

A patient is a bag of spots with one label. Each spot gets a weight from a gated layer, the weights
of a bag sum to 1, and a linear head reads the weighted mean. Everything is fitted on the training
bags: the principal axes (label-free), the weights and the head. Training is full batch for a fixed
number of steps with weight decay, in float64, from several starts whose probabilities are averaged;
each start sees a balanced subset of the bags.

Shapes: P bags, S spots of one bag, N spots of the longest, D embedding dimensions, R principal
axes, M starts, H hidden units, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from eval.fold import FoldError
from eval.patient_probe import balanced_subsets

TINY = 1e-9
BAGS_AT_ONCE = 64


@dataclass(frozen=True)
class AttentionPoolConfig:
    """Settings of the attention pool.

    Args:
        max_spots: training spots of one slide; a larger slide is thinned at random.
        components: most principal axes of the training spots that are kept.
        hidden: units of the gated layer.
        starts: initialisations that are averaged.
        steps: of Adam, each over all training bags.
        learning_rate: of Adam.
        weight_decay: decoupled, on every weight.
    """

    max_spots: int = 512
    components: int = 16
    hidden: int = 8
    starts: int = 4
    steps: int = 40
    learning_rate: float = 0.03
    weight_decay: float = 0.3


@dataclass(frozen=True)
class _Axes:
    """Mean (D,) and whitening axes (D, R) of the training spots, every bag counting the same."""

    mean: np.ndarray
    axes: np.ndarray

    def of(self, bag: np.ndarray) -> Tensor:
        return torch.from_numpy((bag - self.mean) @ self.axes)


class AttentionPool:
    """A fitted pool; `fit_attention_pool` makes one."""

    def __init__(self, axes: _Axes, network: "GatedPool") -> None:
        self._axes, self._network = axes, network

    def predict(self, bags: Sequence[np.ndarray]) -> np.ndarray:
        """Class probabilities (P, C) of bags (S, D), all spots used, mean over the starts."""
        with torch.no_grad():
            rows = [self._network(*_padded([self._axes.of(bag)])) for bag in bags]
            return torch.cat(rows, dim=1).softmax(dim=-1).mean(dim=0).numpy()

    def attention(self, bag: np.ndarray) -> np.ndarray:
        """Weight (S,) of each spot of a bag, mean over the starts; sums to 1."""
        with torch.no_grad():
            return self._network.weights(*_padded([self._axes.of(bag)]))[:, 0].mean(dim=0).numpy()


def fit_attention_pool(
    bags: Sequence[np.ndarray],
    label: np.ndarray,
    n_classes: int,
    seed: int,
    config: AttentionPoolConfig | None = None,
) -> AttentionPool:
    """Fit the pool on training bags, each start on as many bags of every class.

    Args:
        bags: P arrays (S, D).
        label: (P,) class numbers 0..C-1, every class at least once.
        n_classes: C.
        seed: of the starts.
        config: settings.

    Raises:
        FoldError: sizes do not fit together, or a class has no bag.
    """
    config = config or AttentionPoolConfig()
    label = np.asarray(label)
    _check(bags, label, n_classes)
    axes = _fit_axes(bags, config.components)
    points, mask = _padded([axes.of(bag) for bag in bags])
    generator = torch.Generator().manual_seed(seed)
    network = GatedPool(points.shape[-1], n_classes, config, generator)
    share_MP = torch.from_numpy(_shares(label, config.starts, seed))
    target = torch.from_numpy(label.astype(np.int64))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    for _ in range(config.steps):
        optimizer.zero_grad()
        for start in range(0, len(points), BAGS_AT_ONCE):
            part = slice(start, start + BAGS_AT_ONCE)
            logit = network(points[part], mask[part])
            loss = nn.functional.cross_entropy(
                logit.flatten(0, 1), target[part].repeat(config.starts), reduction="none"
            )
            (loss.view(config.starts, -1) * share_MP[:, part]).sum().backward()
        optimizer.step()
    return AttentionPool(axes, network)


def _shares(label: np.ndarray, starts: int, seed: int) -> np.ndarray:
    """Weight (M, P) of each bag in each start: 1/n in a balanced subset of n bags, else 0."""
    share = np.zeros((starts, len(label)))
    subsets = balanced_subsets(label, starts, seed)
    for start in range(starts):
        subset = subsets[start % len(subsets)]
        share[start, subset] = 1.0 / len(subset)
    return share


def thinned(rows: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """At most ``most`` rows of (S, D), drawn at random and kept in order; all of a smaller one."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(rng.choice(len(rows), most, replace=False))]


class GatedPool(nn.Module):
    """M independent gated attention pools with their linear heads, evaluated side by side."""

    def __init__(
        self, size: int, n_classes: int, config: AttentionPoolConfig, generator: torch.Generator
    ) -> None:
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            values = torch.randn(config.starts, *shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(values / shape[0] ** 0.5)

        self.value = weight(size, config.hidden)
        self.gate = weight(size, config.hidden)
        self.value_bias = nn.Parameter(torch.zeros_like(self.value[:, 0]))
        self.gate_bias = nn.Parameter(torch.zeros_like(self.gate[:, 0]))
        self.score = weight(config.hidden, 1)
        self.head = nn.Parameter(torch.zeros(config.starts, size, n_classes).double())
        self.head_bias = nn.Parameter(torch.zeros(config.starts, n_classes).double())

    def weights(self, points_PNR: Tensor, mask_PN: Tensor) -> Tensor:
        """Attention (M, P, N), 0 on padding, sums to 1 over the spots of a bag."""
        value = torch.einsum("pnr,mrh->mpnh", points_PNR, self.value)
        gate = torch.einsum("pnr,mrh->mpnh", points_PNR, self.gate)
        value = torch.tanh(value + self.value_bias[:, None, None])
        hidden = value * torch.sigmoid(gate + self.gate_bias[:, None, None])
        score = torch.einsum("mpnh,mho->mpn", hidden, self.score)
        return score.masked_fill(~mask_PN, -torch.inf).softmax(dim=-1)

    def forward(self, points_PNR: Tensor, mask_PN: Tensor) -> Tensor:
        """Logits (M, P, C)."""
        pooled = torch.einsum("mpn,pnr->mpr", self.weights(points_PNR, mask_PN), points_PNR)
        return torch.einsum("mpr,mrc->mpc", pooled, self.head) + self.head_bias[:, None]


def _padded(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bags below each other (P, N, R), zeros where a bag has fewer spots, and the mask (P, N)."""
    points = nn.utils.rnn.pad_sequence(list(bags), batch_first=True)
    size = torch.tensor([len(bag) for bag in bags])
    return points, torch.arange(points.shape[1]) < size[:, None]


def _fit_axes(bags: Sequence[np.ndarray], components: int) -> _Axes:
    """Principal axes of the spots scaled to variance 1, with a fixed sign."""
    mean = np.mean([bag.mean(axis=0) for bag in bags], axis=0)
    covariance = np.mean([(bag - mean).T @ (bag - mean) / len(bag) for bag in bags], axis=0)
    value, axis = np.linalg.eigh(covariance)
    keep = np.flatnonzero(value > TINY * max(value[-1], TINY))[::-1][:components]
    axis = axis[:, keep]
    largest = np.abs(axis).argmax(axis=0)
    sign = np.sign(axis[largest, np.arange(len(keep))])
    return _Axes(mean, axis * sign / np.sqrt(value[keep]))


def _check(bags: Sequence[np.ndarray], label: np.ndarray, n_classes: int) -> None:
    widths = {bag.shape[1:] for bag in bags}
    if len(bags) != len(label) or len(widths) > 1 or any(len(bag) == 0 for bag in bags):
        raise FoldError(
            f"{len(bags)} bags of widths {sorted(widths)} and {len(label)} labels; every bag needs "
            "a label, at least one spot and the same number of dimensions"
        )
    present = np.bincount(label, minlength=n_classes) if len(label) else np.zeros(n_classes)
    if len(present) != n_classes or (present == 0).any():
        raise FoldError(
            f"{n_classes} classes, but the training bags have {present.tolist()} of each; leave "
            "out classes without training bags"
        )
