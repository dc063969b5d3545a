"""How results are shown: CSV files, and from them alone tables and pictures."""
