"""The outer update: the optimizer, its schedule, clipping, and steps that are skipped."""
