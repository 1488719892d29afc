"""Hugging Face model folders: read, check, load and write.

- `files` reads the files: their JSON, the headers of their weights, end tokens.
- `checks` compares the files with each other and with what an engine needs.
- `loading` makes transformers' configuration and model from a folder.
- `length` gives the longest sequence of a model.
- `tensor_names` converts between a module's parameters and the tensors in model files.
- `writing` writes a folder.
"""
