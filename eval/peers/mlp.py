"""MLP regression: two hidden layers on frozen image features, mean squared error.

Source: the head that HEST-Bench (Jaume et al., NeurIPS 2024) and later papers put beside ridge; no
single paper.

Same: layer normalisation, ReLU and dropout; log expression of variable genes.
Differs: targets are scaled to unit variance over the training spots, so that every gene counts
alike; a fixed number of epochs instead of early stopping on validation slides.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from eval.peers.peer import TrainingData
from eval.peers.regression import FittedRegression, Output, Regression, regress, squared_error
from eval.peers.slide_stack import SlideStack
from eval.peers.training import TrainingConfig


@dataclass(frozen=True)
class Mlp:
    """MLP on frozen features.

    Args:
        width: of both hidden layers.
        dropout: after each.
        training: of the loop.
    """

    width: int = 256
    dropout: float = 0.2
    training: TrainingConfig = field(default_factory=TrainingConfig)
    name: str = "mlp_regression"
    source: str = "MLP on frozen features"
    needs_image: bool = True
    seeded: bool = True
    per_slide: bool = False

    def fit(self, data: TrainingData, seed: int) -> FittedRegression:
        """Train the network."""
        method = Regression(
            self.name,
            self.source,
            lambda n_features, n_genes: MlpNetwork(n_features, n_genes, self.width, self.dropout),
            squared_error,
            True,
            self.training,
        )
        return regress(method, data, seed)


class MlpNetwork(nn.Module):
    """Two hidden layers and a linear output; the second hidden layer is the embedding."""

    def __init__(self, n_features: int, n_genes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Linear(n_features, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(dropout)),
        )
        self.head = nn.Linear(width, n_genes)

    def forward(self, inputs: SlideStack, items: Tensor) -> Output:
        """Hidden (N, W) and predictions (N, H) of the items."""
        hidden_NW = self.body(inputs.feature_NF[items])
        return Output(hidden_NW, self.head(hidden_NW))
