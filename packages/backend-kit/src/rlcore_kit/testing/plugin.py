"""Pytest plugin of the conformance kit; loaded in every pytest run where rlcore is installed, so it imports nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

# Assertions of the suites show their operands, as those in test files do.
SUITES = ("algorithms", "reward", "rollout_engine", "tracker", "train_engine", "layout_equality")
pytest.register_assert_rewrite(*(f"rlcore_kit.testing.{suite}" for suite in SUITES))


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random Qwen2 model of width 32 and its byte-level tokenizer; needs transformers."""
    from rlcore_kit.testing.tiny_model import tiny_model

    return tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen2")
