"""The parts of train_gan.py: data, networks, training state, metrics and the report."""
