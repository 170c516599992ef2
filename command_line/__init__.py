"""Presets, and how they are put together."""
