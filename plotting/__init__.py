"""Matplotlib figures from rows and arrays."""
