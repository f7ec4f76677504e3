"""Layers that know the inner step: the shared clock, per-step norms, and the learned inner rates."""
