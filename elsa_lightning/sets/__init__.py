"""What weights are constrained to, one set a file."""
