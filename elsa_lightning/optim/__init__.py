"""Inside other people's optimizers."""
