"""What is measured: sets of layers, the problem of normalising them with its right answer, whole training steps.

Imports bssn_fast alone.
"""
