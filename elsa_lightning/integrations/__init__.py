"""Elsa in other people's trainers; each module imports what it is for, and nothing else imports them."""
