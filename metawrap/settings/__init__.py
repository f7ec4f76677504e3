"""Keyword arguments of learners: defaults, presets and checks."""
