"""Losses of the rows of one matrix, in groups that share a normaliser."""
