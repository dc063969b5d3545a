"""Between a model and the arithmetic: which weights are normalised, calls of the model, writes, checkpoints.

May import `tracing` and all that it may import.
"""
