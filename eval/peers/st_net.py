"""ST-Net-like: one linear layer from the image features of a patch to log expression.

Source: He et al., Integrating spatial gene expression and breast tumour morphology via deep
learning, Nature Biomedical Engineering 2020 (ST-Net).

Same: a single patch, one linear output layer, log expression unscaled, mean squared error summed
alike over genes, trained by gradient descent.
Differs: the convolutional network below the layer is frozen (the stored features), not a
DenseNet121 that is fine-tuned; the variable genes of the expression task instead of the 250 most
expressed; AdamW instead of SGD; no averaging over the eight flips and turns of a patch.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from eval.peers.peer import TrainingData
from eval.peers.regression import FittedRegression, Output, Regression, regress, squared_error
from eval.peers.slide_stack import SlideStack
from eval.peers.training import TrainingConfig


@dataclass(frozen=True)
class StNet:
    """Linear head by gradient descent.

    Args:
        training: of the loop.
    """

    training: TrainingConfig = field(default_factory=TrainingConfig)
    name: str = "st_net"
    source: str = "ST-Net, He et al. 2020"
    needs_image: bool = True
    seeded: bool = True
    per_slide: bool = False

    def fit(self, data: TrainingData, seed: int) -> FittedRegression:
        """Train the layer."""
        method = Regression(self.name, self.source, LinearHead, squared_error, False, self.training)
        return regress(method, data, seed)


class LinearHead(nn.Module):
    """Features to genes; it has no hidden layer, hence no embedding of its own."""

    def __init__(self, n_features: int, n_genes: int) -> None:
        super().__init__()
        self.head = nn.Linear(n_features, n_genes)

    def forward(self, inputs: SlideStack, items: Tensor) -> Output:
        """Predictions (N, H) of the items."""
        return Output(None, self.head(inputs.feature_NF[items]))
