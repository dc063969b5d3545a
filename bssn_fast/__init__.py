"""Bidirectional scaled spectral normalisation of all layers of a PyTorch model in one launch."""

__version__ = "0.1.0"
