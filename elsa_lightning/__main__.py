"""``python -m elsa_lightning`` is ``elsa``."""

from elsa_lightning.cli import main

if __name__ == "__main__":
    main()
