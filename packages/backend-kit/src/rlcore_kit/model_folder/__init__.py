"""Hugging Face model folders: what their files say, whether they fit together, how models are loaded and written."""
