"""Where the command line writes: results to standard output, everything else to standard error."""

import os
import sys

from rich.console import Console

_PIPED_WIDTH = 120  # columns of tables in a pipe or file, which have no width

_width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
out = Console(highlight=False, emoji=False, width=_width)
err = Console(highlight=False, emoji=False, stderr=True)
