"""From a few labelled photos or texts to a classifier that is deployed: examples -> adapt -> program -> predictions.

fitting.py: learner, examples -> `Classifier`
classifier.py: `Classifier`: predict, save, load
sharing.py: a folder with a model card, and the Hugging Face Hub
predict.py: a script beside each classifier of photos, which runs it without metawrap
predict_texts.py: the same of texts
program.py: a network as a program that only needs torch (or onnxruntime); a stranger's is checked before it is loaded
texts.py: a CSV of texts and classes -> tokens and labels, and the duplicates among them
photos.py: a folder of photos per class -> pictures and labels, and the near-duplicates among them
estimate.py: how well a learner does on examples that it was not shown, from the examples themselves
"""

from metawrap.classifier.classifier import Classifier, Prediction
from metawrap.classifier.estimate import Estimate
from metawrap.classifier.fitting import choose_method, fit_classifier
from metawrap.classifier.photos import Photos
from metawrap.classifier.texts import Texts

__all__ = ["Classifier", "Estimate", "Photos", "Prediction", "Texts", "choose_method", "fit_classifier"]
