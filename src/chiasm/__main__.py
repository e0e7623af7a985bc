"""``python -m chiasm``: the command line, for ``torchrun -m chiasm train recipe.yaml``."""

from chiasm.cli import main

if __name__ == "__main__":
    main()
