"""A shell script, read without being run."""
