"""Where the command line writes: results to standard output, everything else to standard error."""

import os
import sys

from rich.console import Console

_PIPED_WIDTH = 120  # columns of tables in a pipe or file, which have no width of their own

out = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH)
err = Console(highlight=False, stderr=True)
