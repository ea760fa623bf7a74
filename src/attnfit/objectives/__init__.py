"""Objectives: a loss of a linear map of the unknowns, or of a layer, with everything a solver asks of it."""
