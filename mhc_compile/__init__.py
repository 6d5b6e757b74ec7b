"""Manifold-constrained hyper-connections by compiler."""
