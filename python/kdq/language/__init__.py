"""`kdq demo language`: a byte-level transformer over Python's own library, from training to few-bit kernels."""
