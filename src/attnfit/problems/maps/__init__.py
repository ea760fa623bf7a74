"""Attention maps and outputs: every pair of a query and a key is a row that is never formed."""
