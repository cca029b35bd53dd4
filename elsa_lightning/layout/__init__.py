"""Where the entries of a parameter lie in memory and over processes, and in which formats the ADMM state is stored."""
