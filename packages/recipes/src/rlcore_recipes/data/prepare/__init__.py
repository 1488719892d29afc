"""Preparing data sets: from their published form to Parquet files that every recipe reads.

A data set is one function that takes its options, a `Config`, and returns the rows of every split::

    class RiddlesOptions(Config):
        source: FileName = Field("org/riddles", description="Folder, or name on the Hub.")

    def riddles(options: RiddlesOptions) -> Splits:
        \"""Riddles of one line.\"""
        rows = read_split(options.source, "train")
        return {"train": [prompt_row(row["text"], row["answer"], "riddles") for row in rows]}

``rlcore data path/to/file.py:riddles --out DIR`` runs it, with one command-line option per field; an entry point of
group ``rlcore.data_sets`` in an installed package makes it ``rlcore data riddles``.
"""

from rlcore_recipes.data.prepare.rows import Splits, prompt_row
from rlcore_recipes.data.prepare.sources import read_split
from rlcore_recipes.data.prepare.writing import write_splits

__all__ = ["Splits", "prompt_row", "read_split", "write_splits"]
