"""What is fitted: pure functions of the logits of a block of rows."""
