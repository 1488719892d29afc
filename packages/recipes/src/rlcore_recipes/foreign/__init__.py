"""Names that other frameworks have for rlcore's keys, for error messages and for the documentation."""
