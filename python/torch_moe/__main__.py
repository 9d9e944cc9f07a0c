"""`python -m torch_moe` is the command `torch-moe`."""

import sys

from torch_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
