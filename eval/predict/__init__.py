"""Expression from H&E by a trained checkpoint: ``from eval.predict import predict_folder``."""

from eval.predict.fit import fit_look, fit_readout, readout_of
from eval.predict.labels import fit_labels
from eval.predict.run import Wanted, predict_folder

__all__ = ["Wanted", "fit_labels", "fit_look", "fit_readout", "predict_folder", "readout_of"]
