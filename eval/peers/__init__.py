"""Peers: published methods in small, trained and evaluated by the same code on the same folds.

``hibio eval --peers`` takes the names of `PEERS`. The docstring of each class names its source and
what differs from it (docs/baselines.md has the table).
"""

from collections.abc import Mapping
from types import MappingProxyType

from eval.peers.bleep import Bleep
from eval.peers.gene_lists import Nicheformer, OmiClip
from eval.peers.pca_ridge import PcaRidge
from eval.peers.peer import Peer
from eval.peers.regression import Mlp, StNet
from eval.peers.st_align import StAlign
from eval.peers.stagate import Stagate
from eval.peers.towers import FlatClip
from eval.peers.triplex import Triplex

_LISTED: tuple[Peer, ...] = (
    PcaRidge(),
    PcaRidge(alpha="hest", name="pca256_ridge_hest"),
    StNet(),
    Mlp(),
    Triplex(),
    FlatClip(),
    Bleep(),
    Bleep(before_projection=True, name="bleep_preprojection"),
    OmiClip(),
    Nicheformer(),
    StAlign(),
    Stagate(),
    Stagate(rows="tfidf", name="stagate_tfidf", source="STAGATE on TF-IDF rows"),
)

#: Peers by their row name, in the order of the report.
PEERS: Mapping[str, Peer] = MappingProxyType({peer.name: peer for peer in _LISTED})
