"""Peers: published methods in small, trained and evaluated by the same code on the same folds.

`PEERS` lists them by name; ``hibio eval --peers`` takes these names. Each is a file of its own
whose docstring names its source and what differs from it (docs/baselines.md has the table).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from eval.errors import FoldError
from eval.peers.bleep import Bleep
from eval.peers.gene_lists import Nicheformer, OmiClip
from eval.peers.pca_ridge import PcaRidge
from eval.peers.peer import FittedPeer, Peer, TrainingData
from eval.peers.regression import Mlp, StNet
from eval.peers.st_align import StAlign
from eval.peers.stagate import Stagate
from eval.peers.towers import FlatClip
from eval.peers.triplex import Triplex
from preprocessing.errors import did_you_mean

__all__ = ["PEERS", "FittedPeer", "Peer", "TrainingData", "find_peers"]

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


def find_peers(asked: str | Sequence[str]) -> tuple[Peer, ...]:
    """The peers that a user asks for.

    Args:
        asked: ``none``, ``all``, or names, as a list or with commas between.

    Raises:
        FoldError: unknown name; the choices and the nearest one are listed.
    """
    names = asked.split(",") if isinstance(asked, str) else list(asked)
    names = [name.strip() for name in names]
    if names in (["none"], []):
        return ()
    if names == ["all"]:
        return tuple(PEERS.values())
    for name in names:
        if name not in PEERS:
            hint = did_you_mean(name, PEERS)
            raise FoldError(
                f"unknown peer {name!r}; give all, none, or names out of {sorted(PEERS)}{hint}"
            )
    return tuple(PEERS[name] for name in dict.fromkeys(names))
