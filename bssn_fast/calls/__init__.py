"""Many weights normalised in one call: memory, autograd, estimation of vectors, and what of the last call still holds.

May import `distributed`, `ops`, `backends`, `reference` and `layout`; knows nothing of modules.
"""
