"""A softmax followed by a layer, or preceded by one; proportions on the simplex."""
