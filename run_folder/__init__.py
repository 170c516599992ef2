"""The contract of a run folder: its files, written whole, and what they hold."""
