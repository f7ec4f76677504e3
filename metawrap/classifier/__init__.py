"""From a few labelled photos to a classifier that is deployed: photos -> learner.adapt -> program -> predictions.

fitting.py: learner, photos -> `Classifier`
classifier.py: `Classifier`: predict, save, load
predict.py: a script beside each classifier, which runs it without metawrap
program.py: a network as a program that only needs torch (or onnxruntime); a stranger's is checked before it is loaded
photos.py: a folder of photos per class -> pictures and labels, and the near-duplicates among them
estimate.py: how well a learner does on photos that it was not shown, from the photos themselves
"""

from metawrap.classifier.classifier import Classifier, Prediction
from metawrap.classifier.estimate import Estimate
from metawrap.classifier.fitting import choose_method, fit_classifier
from metawrap.classifier.photos import Photos

__all__ = ["Classifier", "Estimate", "Photos", "Prediction", "choose_method", "fit_classifier"]
