"""`rlcore.train` and `rlcore.open_run`: runs from Python, with objects in the place of files."""
