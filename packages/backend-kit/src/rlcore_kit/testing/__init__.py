"""Conformance kit for backend authors (pytest)."""
