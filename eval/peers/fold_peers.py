"""Peers fitted on the training slides of a fold, as further models of that fold."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from eval.folds.fold import Fold
from eval.peers.peer import Peer, TrainingData, standardised

NOT_IMPUTED = "peers are not fitted again without the hidden genes, so they have no row here"


def with_peers(
    fold: Fold,
    peers: Sequence[Peer],
    features: Mapping[str, np.ndarray] | None,
    *,
    seedless: bool,
) -> Fold:
    """The fold with every peer beside its models.

    A fold without training slides (a model trained on every slide) fits peers on those same slides.

    Args:
        fold: what the model is measured on; peers are fitted under its seed.
        peers: which ones.
        features: slide_id -> (S, F) stored image features, or None when there are none.
        seedless: whether to fit those that do not depend on the seed (once a fold is enough).

    Returns:
        The same fold with more ``models`` and, for peers with a space a slide, ``per_slide``.

    Raises:
        FoldError: a peer cannot be fitted; the message names it.
    """
    slides = (*fold.train, *fold.test)
    scaled = standardised(features or {})
    trained_on = fold.train or fold.test
    own = {s.slide_id: scaled[s.slide_id] for s in trained_on if s.slide_id in scaled}
    data = TrainingData(fold.genes, trained_on, own)
    models, per_slide = [], []
    bar = tqdm(_usable(fold, peers, bool(own), seedless), desc="peers", disable=None, leave=False)
    for peer in bar:
        bar.set_postfix_str(f"fold {fold.name}, seed {fold.seed}, {peer.name}")
        fitted = peer.fit(data, fold.seed)
        if peer.per_slide:
            per_slide.append(fitted.represent(fold.test, scaled))
        else:
            models.append(fitted.represent(slides, scaled))
    hidden = fold.hidden
    if hidden is not None and models:
        hidden = replace(hidden, notes=(*hidden.notes, NOT_IMPUTED))
    return replace(
        fold,
        models=(*fold.models, *models),
        per_slide=(*fold.per_slide, *per_slide),
        hidden=hidden,
    )


def _usable(fold: Fold, peers: Sequence[Peer], pictures: bool, seedless: bool) -> list[Peer]:
    """Peers that this fold can be fitted with; those that need an image it lacks are printed."""
    blind = [peer.name for peer in peers if peer.needs_image and not pictures]
    if blind:
        print(
            f"fold {fold.name}: no training slide has image features; peers left out: "
            f"{', '.join(blind)}"
        )
    return [p for p in peers if p.name not in blind and (p.seeded or seedless)]
