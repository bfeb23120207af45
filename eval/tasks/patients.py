"""Patients as bags of spots, and two read-outs: a linear probe of their means, attention pooling.

In attention pooling each spot gets a weight from a gated layer, the weights of a bag sum to 1, and
a linear head reads the weighted mean. Everything is fitted on the training bags: the principal axes
(label-free), the weights and the head. Training is full batch for a fixed number of steps with
weight decay, in float64, from several starts whose probabilities are averaged; each start sees a
balanced subset of the bags.
Shapes: P training and Q test patients, S spots of one bag, N spots of the longest, D embedding
dimensions, R principal axes, M starts, H hidden units, C classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from eval.errors import FoldError
from eval.folds.fold import Representation, SlideData, expression
from hibio.config.schema import Count, Folds, Positive, Weight

FLAT = 1e-6  # of the spread within a patient: a feature that varies less is constant
LEAST = 1e-12  # probability in a log loss
TINY = 1e-9  # share of the largest variance below which an axis is dropped
BAGS_AT_ONCE = 64


@dataclass(frozen=True)
class Patients:
    """Patients of one side of a split, sorted by name.

    Args:
        names: P patient names.
        vectors: (P, D) mean over a patient's slides of the mean over the spots.
        spread: (D,) standard deviation of a spot within its slide, pooled; None where the
            vectors are not means of spots.
        bags: P arrays (S, D) of spots, empty where the vectors are not means of spots.
    """

    names: tuple[str, ...]
    vectors: np.ndarray
    spread: np.ndarray | None = None
    bags: tuple[np.ndarray, ...] = ()


def patient_outcomes(slides: Sequence[SlideData]) -> dict[str, str]:
    """Outcome of each patient for whom one is known, by name.

    Raises:
        FoldError: two slides of a patient disagree.
    """
    found: dict[str, str] = {}
    for slide in slides:
        old = found.setdefault(slide.patient_id, slide.outcome.strip())
        if old != slide.outcome.strip():
            raise FoldError(
                f"patient {slide.patient_id} has the outcomes {old!r} and {slide.outcome!r}; give "
                "all slides of a patient the same one in the manifest and prepare again"
            )
    return {name: found[name] for name in sorted(found) if found[name]}


def embedded_patients(
    model: Representation,
    modality: str,
    slides: Sequence[SlideData],
    outcomes: dict[str, str],
    most: int | None,
    seed: int,
) -> Patients | None:
    """Patients with a known outcome as bags of a model's spot embeddings; None when none is left.

    Args:
        model: whose embeddings.
        modality: ``image`` or ``omics``.
        slides: one side of the split.
        outcomes: of the patients; others are left out.
        most: spots of one slide in a bag, drawn at random; None: all.
        seed: of the draw.
    """
    usable = [slide for slide in slides if model.covers(modality, slide)]
    names, vectors, spreads, bags = [], [], [], []
    for name, own in _by_patient(usable, outcomes):
        means, variances, parts = [], [], []
        for slide in own:
            rows = model.rows(modality, [slide])[0]
            means.append(rows.mean(axis=0))
            variances.append(rows.var(axis=0))
            rng = np.random.default_rng([seed, *slide.slide_id.encode()])
            parts.append(rows if most is None else thinned(rows, most, rng))
        names.append(name)
        vectors.append(np.mean(means, axis=0))
        spreads.append(np.mean(variances, axis=0))
        bags.append(np.concatenate(parts))
    if not names:
        return None
    spread = np.sqrt(np.mean(spreads, axis=0))
    return Patients(tuple(names), np.stack(vectors), spread, tuple(bags))


def pseudobulk(slides: Sequence[SlideData], outcomes: dict[str, str]) -> Patients:
    """Mean normalised expression (P, G) of each patient: composition without any model."""
    return _tabulated(
        slides, outcomes, lambda slide: np.asarray(expression(slide).mean(axis=0)).ravel()
    )


def cohort_facts(slides: Sequence[SlideData], outcomes: dict[str, str]) -> Patients:
    """What a cohort gives away without biology: spots, slides, depth and genes found.

    Columns: ln spots of a slide, slides, mean and standard deviation of ln(1 + depth), mean
    ln(1 + genes found).
    """
    table = _tabulated(slides, outcomes, _facts)
    counts = [len(own) for _, own in _by_patient(slides, outcomes)]
    return Patients(table.names, np.column_stack([table.vectors, counts]))


def _by_patient(
    slides: Sequence[SlideData], outcomes: dict[str, str]
) -> Iterator[tuple[str, list[SlideData]]]:
    for name in sorted({s.patient_id for s in slides} & set(outcomes)):
        yield name, [slide for slide in slides if slide.patient_id == name]


def _tabulated(
    slides: Sequence[SlideData], outcomes: dict[str, str], of: Callable[[SlideData], np.ndarray]
) -> Patients:
    pairs = [
        (name, np.mean([of(slide) for slide in own], axis=0))
        for name, own in _by_patient(slides, outcomes)
    ]
    vectors = np.stack([vector for _, vector in pairs]) if pairs else np.zeros((0, 0))
    return Patients(tuple(name for name, _ in pairs), vectors)


def _facts(slide: SlideData) -> np.ndarray:
    depth = np.log1p(np.asarray(slide.counts.sum(axis=1), dtype=np.float64).ravel())
    genes = np.log1p(np.diff(slide.counts.tocsr().indptr))
    return np.array([np.log(slide.n_spots), depth.mean(), depth.std(), genes.mean()])


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of the logistic read-out.

    Args:
        grid: inverse penalties C; features have mean square 1 over training patients and are
            divided by the root of their number, so that one grid serves every size.
        n_folds: most inner folds; a class with fewer patients lowers it.
        subsets: balanced subsets of the training patients, whose probabilities are averaged.
        max_iter: of the solver.
    """

    grid: tuple[Positive, ...] = (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)
    n_folds: Folds = 4
    subsets: Count = 8
    max_iter: Count = 500


def probe_probabilities(
    train: np.ndarray,
    label: np.ndarray,
    test: np.ndarray,
    config: ProbeConfig,
    spread: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Class probabilities (Q, C) of test patients, mean over balanced L2-penalised regressions.

    Each is fitted on equally many patients of every class (`balanced_subsets`).

    Args:
        train: (P, D).
        label: (P,) class numbers 0..C-1, every class at least twice.
        test: (Q, D).
        config: settings.
        spread: (D,) standard deviation within a patient; a feature that varies less than a
            millionth of it between patients is constant.
        seed: of the subsets.
    """
    c = choose_c(train, label, config, spread)
    subsets = balanced_subsets(label, config.subsets, seed)
    found = [_fit_predict(train[s], label[s], test, c, config, spread) for s in subsets]
    return np.asarray(np.mean(found, axis=0))


def balanced_subsets(label: np.ndarray, number: int, seed: int) -> list[np.ndarray]:
    """Random subsets (indices of patients) with equally many patients of each class.

    With class weights instead, leaving a patient out makes the mean of the patient's class noisier
    than the others, which moves the boundary against the patient: pooled AUROCs of pure noise then
    lie below 0.5 (0.36 to 0.43 with 24 patients left out one by one).

    Args:
        label: (P,) class numbers.
        number: subsets; one, of all patients, when the classes are equal already.
        seed: of the draw.
    """
    size = np.bincount(label)
    if (size == size[0]).all():
        return [np.arange(len(label))]
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(label == name) for name in range(len(size))]
    least = int(size.min())
    return [
        np.sort(np.concatenate([rng.choice(own, least, replace=False) for own in members]))
        for _ in range(number)
    ]


def choose_c(
    train: np.ndarray, label: np.ndarray, config: ProbeConfig, spread: np.ndarray | None = None
) -> float:
    """The C with the lowest balanced log loss on held-out training patients; ties: smaller C."""
    if len(config.grid) == 1:
        return config.grid[0]
    fold = stratified_folds(label, config.n_folds)
    loss = np.zeros(len(config.grid))
    for held in range(int(fold.max()) + 1):
        inner, outer = fold != held, fold == held
        weight = 1.0 / np.bincount(label[outer])[label[outer]]
        for i, c in enumerate(config.grid):
            found = _fit_predict(train[inner], label[inner], train[outer], c, config, spread)
            true = found[np.arange(len(found)), label[outer]]
            loss[i] -= float((weight * np.log(np.maximum(true, LEAST))).sum())
    return float(config.grid[int(np.argmin(np.round(loss, 9)))])


def stratified_folds(label: np.ndarray, most: int) -> np.ndarray:
    """Inner fold (P,) of each patient: each class is dealt out in order, every fold gets some."""
    number = min(most, int(np.bincount(label).min()))
    fold = np.zeros(len(label), dtype=np.int64)
    for name in np.unique(label):
        own = np.flatnonzero(label == name)
        fold[own] = np.arange(len(own)) % number
    return fold


def constant_features(train: np.ndarray, spread: np.ndarray | None) -> np.ndarray:
    """Which features (D,) do not differ between training patients, up to rounding."""
    scale = np.abs(train).max(axis=0, initial=0.0) * 1e-9
    if spread is not None:
        scale = np.maximum(scale, FLAT * spread)
    return np.asarray(train.std(axis=0) <= scale)


def _fit_predict(
    train: np.ndarray,
    label: np.ndarray,
    test: np.ndarray,
    c: float,
    config: ProbeConfig,
    spread: np.ndarray | None,
) -> np.ndarray:
    keep = ~constant_features(train, spread)
    n_classes = int(label.max()) + 1
    if not keep.any():
        return np.full((len(test), n_classes), 1.0 / n_classes)
    mean, scale = train[:, keep].mean(axis=0), train[:, keep].std(axis=0) * np.sqrt(keep.sum())
    model = LogisticRegression(C=c, class_weight="balanced", max_iter=config.max_iter)
    model.fit((train[:, keep] - mean) / scale, label)
    return np.asarray(model.predict_proba((test[:, keep] - mean) / scale))


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

    max_spots: Count = 512
    components: Count = 16
    hidden: Count = 8
    starts: Count = 4
    steps: Count = 40
    learning_rate: Positive = 0.03
    weight_decay: Weight = 0.3


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
