"""Weights that torch.distributed shards. Imports nothing of the package."""
