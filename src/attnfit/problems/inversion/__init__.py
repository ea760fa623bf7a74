"""An attention layer as a function of its tokens, which enter three times: derivatives and inversion."""
