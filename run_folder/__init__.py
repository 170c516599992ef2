"""The contract of a run folder: its files, and the names of metrics and methods."""
