"""What a model that one trains has memorised: extraction, membership, canaries."""
