"""Makes ``python -m elsa_lightning`` the same as the command ``elsa``."""

from elsa_lightning.cli import command

if __name__ == "__main__":
    command()
