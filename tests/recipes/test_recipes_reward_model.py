"""A reward model's scores, against plain transformers, and what is said of a model that cannot score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore import plugins
from rlcore.config import load_config
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_recipes.run.open import open_session
from rlcore_recipes.step import add_scores, rollouts, validate_completions

COEFF = -0.5


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model with a separate tokenizer, equal to the policy's."""
    from transformers import AutoModelForSequenceClassification

    path = tiny_model(tmp_path_factory.mktemp("judge"), architecture="Llama", seed=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(path)
    return path


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "controller",
    [
        pytest.param({}, id="local"),
        pytest.param(
            {
                "controller.kind": "ray",
                "controller.pools": {"policy": {}, "judge": {"processes": 2}},
                "controller.placement": {"actor": "policy", "rollout": "policy", "reward_model": "judge"},
                "controller.call_timeout_s": 600,
            },
            id="ray",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_scores_are_those_of_transformers(task: Any, judge: Path, tmp_path: Path, controller: dict[str, Any]) -> None:
    from transformers import AutoModelForSequenceClassification

    changes = {
        "reward_model.model.path": judge,
        "reward_model.coeff": COEFF,
        "reward_model.offload": True,
        "reward_model.max_tokens_per_micro_batch": 64,
        "trainer.test_freq": 1,
        **controller,
    }
    arguments = task.arguments("grpo", tmp_path / "out", changes)[2:]
    config = load_config(plugins.get("rlcore.recipes", "grpo").config_class(), None, arguments)
    plain = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    plain.config.pad_token_id = None  # a random policy samples padding too, which would not count as the last token

    def expected(batch: Any) -> list[float]:
        with torch.no_grad():
            return [float(plain(tokens[None]).logits) for tokens in batch["tokens"].to_list()]

    with open_session(config) as session:
        samples = rollouts(session, 1)
        batch = add_scores(session, samples.batch, samples)
        batch = batch.fetch() if controller else batch
        values = expected(batch)
        assert len(values) == 32
        assert max(values) - min(values) > 0.1
        assert batch["reward_model_score"].tolist() == pytest.approx(values, abs=1e-5)
        letters = [sum(c.isascii() and c.islower() for c in text) / 8 for text in batch["completion"]]
        by_hand = [reward + COEFF * value for reward, value in zip(letters, values)]
        assert batch["score"].tolist() == pytest.approx(by_hand, abs=1e-5)
        validation = validate_completions(session).metrics
    mean = validation["val-core/letters/reward/mean@1"]
    judged = validation["val-aux/letters/reward_model_score/mean@1"]
    assert abs(judged) > 1e-3
    assert 0 <= mean - COEFF * judged <= 1  # the reward function's own share


def test_metrics_and_advantages_speak_of_the_sum(
    task: Any, judge: Path, metrics_of: Callable[[Path], Any], tmp_path: Path
) -> None:
    keys = {"reward_model.model.path": judge, "trainer.total_steps": 1, "rollout.temperature": 1.0}
    lines = {}
    for coeff in (0, 2):
        result = task.run("grpo", tmp_path / str(coeff), {**keys, "reward_model.coeff": coeff})
        assert result.exit_code == 0, result.output
        lines[coeff] = metrics_of(tmp_path / str(coeff))[-1]
    assert lines[0]["reward_model/score/mean"] == lines[2]["reward_model/score/mean"] != 0
    share = lines[2]["critic/score/mean"] - lines[0]["critic/score/mean"]
    assert share == pytest.approx(2 * lines[0]["reward_model/score/mean"], abs=1e-5)
    assert lines[2]["actor/grad_norm"] != pytest.approx(lines[0]["actor/grad_norm"], rel=1e-3)


def test_models_that_cannot_judge_are_refused_immediately(task: Any, judge: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    def message(path: Path) -> str:
        result = task.run("grpo", tmp_path / "out", {"reward_model.model.path": path})
        assert result.exit_code == 1
        assert not (tmp_path / "out").exists()
        return " ".join(result.output.split())

    assert "reward_model.model.path" in message(tmp_path / "nowhere")
    assert "is a language model (Qwen2ForCausalLM): a reward model has a scalar score head" in message(task.model)
    AutoModelForSequenceClassification.from_pretrained(judge).save_pretrained(tmp_path / "bare")
    other = tiny_model(tmp_path / "other", vocab_size=300)
    AutoModelForSequenceClassification.from_pretrained(other, num_labels=1).save_pretrained(tmp_path / "larger")
    assert "another vocabulary (300 tokens) than the policy (261)" in message(tmp_path / "larger")
    assert task.run("grpo", tmp_path / "out", {"reward_model.model.path": tmp_path / "bare"}).exit_code == 0
