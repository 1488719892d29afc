"""Tools that ship with this package: a calculator, a Python interpreter, and retrieval."""
