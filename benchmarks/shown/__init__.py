"""How it is shown: results kept as files, aims, tables, plots, the pages of docs/, comparisons of two results.

Imports all of the other folders.
"""
