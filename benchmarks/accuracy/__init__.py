"""Accuracy: omniglot.py at the paper's settings, methods.sh for all methods at a budget of minutes, photos.py for
pretrained networks.
"""
