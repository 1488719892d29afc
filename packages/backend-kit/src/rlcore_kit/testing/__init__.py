"""Conformance suites for backend authors, and support for their tests (pytest)."""
