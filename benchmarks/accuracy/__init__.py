"""Accuracy after training: omniglot.py at the paper's settings, photos.py for pretrained networks, methods.sh for all methods at a budget of minutes."""
