"""Model folders: what an engine writes, and what it refuses to read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rlcore.config import Config
from rlcore.engines import ForwardRequest, ModelSettings, TrainEngineSpec
from rlcore.errors import EngineError
from rlcore_kit.testing.model_folders import ONE_LAYER, WRONG_FILES, edited, half_precision, precisions, two_labels
from rlcore_kit.testing.train_engine.base import TrainEngineTests
from rlcore_kit.testing.train_engine.batches import exported, make_batch, reference_outputs
from rlcore_kit.testing.train_engine.objectives import WeightedLogprobs


class ModelFolderTests(TrainEngineTests):
    """Loading and `TrainEngine.save_pretrained`."""

    def test_save_pretrained_reloads_with_equal_logits(self, model_path: Path, tmp_path: Path) -> None:
        engine, batch = self.engine(model_path), make_batch()
        engine.train(batch, WeightedLogprobs())
        out = tmp_path / "out"
        for _ in range(2):  # the second time over an existing folder, with another file in it
            engine.save_pretrained(out)
            (out / "mine.txt").write_text("kept")
        assert (out / "mine.txt").read_text() == "kept"
        assert (out / "generation_config.json").is_file()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        model, result = self.reference(out), engine.forward(batch, ForwardRequest())
        for row, got in zip(batch.rows(), result.rows()):
            logprobs, _ = reference_outputs(model, row["tokens"])
            torch.testing.assert_close(got["logprobs"], logprobs * row["loss_mask"], atol=self.logprob_atol, rtol=0)

    def test_an_exported_model_is_like_the_original(self, model_path: Path, tmp_path: Path) -> None:
        """Precision of each tensor, and settings that transformers would refuse to write, are kept."""
        source = edited(model_path, tmp_path / "source", weights=half_precision, config={"temperature": 0.6})
        generation = '{"do_sample": false, "temperature": 0.6, "eos_token_id": [1, 4]}'
        (source / "generation_config.json").write_text(generation)
        self.engine(source).save_pretrained(tmp_path / "same")
        assert (tmp_path / "same" / "generation_config.json").read_text() == generation
        assert precisions(tmp_path / "same") == precisions(source)
        assert len(set(precisions(source).values())) == 2
        assert json.loads((tmp_path / "same" / "config.json").read_text())["dtype"] == "bfloat16"
        settings = ModelSettings(path=str(source), export_dtype="float32")
        self.make_engine(TrainEngineSpec(settings, Config())).save_pretrained(tmp_path / "chosen")
        assert set(precisions(tmp_path / "chosen").values()) == {torch.float32}

    @pytest.mark.parametrize("case", WRONG_FILES)
    def test_files_that_contradict_each_other_are_refused(self, model_path: Path, tmp_path: Path, case: str) -> None:
        words, changes = WRONG_FILES[case]
        path = edited(model_path, tmp_path / "model", **changes)
        with pytest.raises(EngineError, match=words) as caught:
            self.engine(path)
        assert "\n" not in str(caught.value)

    def test_weights_may_be_left_out_by_name(self, model_path: Path, tmp_path: Path) -> None:
        path = edited(model_path, tmp_path / "model", config=ONE_LAYER)
        settings = ModelSettings(path=str(path), ignored_weights=("model.layers.1.*",))
        names = exported(self.make_engine(TrainEngineSpec(settings, Config())))
        assert not any(name.startswith("model.layers.1.") for name in names)

    def test_heads_that_do_not_fit_are_refused(self, heads: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(EngineError, match=r"no scalar head \(score\.weight\)"):
            self.engine(heads["value"], head="score")
        with pytest.raises(EngineError, match=r"score\.weight"):
            self.engine(edited(heads["score"], tmp_path / "policy"))
        labels = edited(heads["score"], tmp_path / "labels", weights=two_labels)
        for head in ("score", "value"):
            with pytest.raises(EngineError, match=r"gives 2 labels; the (reward model|critic) .* one number"):
                self.engine(labels, head=head)

    def test_a_missing_model_is_one_clear_error(self, model_path: Path, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match="does not exist"):
            self.engine(tmp_path / "nowhere")
        bare = tmp_path / "bare"
        shutil.copytree(model_path, bare)
        (bare / "model.safetensors").unlink()
        with pytest.raises(EngineError, match="weights"):
            self.engine(bare)
