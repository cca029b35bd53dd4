"""Where the entries of a parameter lie, and how the method's own numbers beside them are kept."""
