"""Works with any torch optimizer: hooks on its step, its second moment, stochastic rounding, and an 8-bit Adam."""
