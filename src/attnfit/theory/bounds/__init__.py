"""One file a subject; each ends in the list BOUNDS."""
