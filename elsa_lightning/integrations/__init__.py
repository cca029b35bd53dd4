"""Elsa in trainers other than Lightning's; each module imports its trainer's package, and no other module does."""
