"""Benchmarks of attnfit against the solvers a user would otherwise run."""
