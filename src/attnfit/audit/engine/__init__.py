"""Forward passes shared by all inversions: a prefix, candidates for its next token, and a prior."""
