"""Recipes that generate on running servers by URL, over peers of text-generation-inference and OpenAI's protocol."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlcore_kit.testing.inference_peer import InferencePeer, OpenAIPeer, TGIPeer
from rlcore_kit.testing.peer_model import PeerModel

Metrics = Callable[[Path], list[dict[str, float]]]
RESTART = """
import json, sys, urllib.request
url, folder = sys.argv[1:]
urllib.request.urlopen(f"{url}/peer/restart", json.dumps({"folder": folder}).encode())
"""
TWO_STEPS = {
    "rollout.engine": "http",
    "actor.fsdp.device": "cpu",
    "actor.optim.lr": 5e-3,
    "trainer.total_steps": 2,
    "trainer.test_freq": 1,
}


@pytest.fixture(scope="module")
def peers(task: Any) -> Iterator[dict[str, InferencePeer]]:
    started: dict[str, InferencePeer] = {"tgi": TGIPeer(task.model), "openai": OpenAIPeer(task.model)}
    yield started
    for peer in started.values():
        peer.stop()


def test_grpo_on_text_generation_inference_restarted_with_new_weights(
    task: Any, peers: dict[str, InferencePeer], metrics_of: Metrics, tmp_path: Path
) -> None:
    """Log-probs of the server are the trainer's, at the sampling temperature, in every step; validation is greedy."""
    (tmp_path / "restart.py").write_text(RESTART)
    second = TGIPeer(PeerModel(task.model))
    peer = peers["tgi"]
    server = {
        "urls": [peer.url, second.url],
        "reload": "command",
        "reload_command": f"{sys.executable} {tmp_path}/restart.py {{url}} {{folder}}",
        "weights_dir": str(tmp_path / "weights"),
    }
    result = task.run("grpo", tmp_path / "run", {**TWO_STEPS, "rollout.http": server, "rollout.temperature": 0.8})
    second.stop()
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path / "run")
    trained = [step for step in steps if "actor/rollout_ratio_max" in step]
    assert len(trained) == 2
    assert all(abs(step["actor/rollout_ratio_max"] - 1) < 1e-3 for step in trained)
    assert all(abs(step["actor/rollout_log_ratio_p999"]) < 1e-3 for step in trained)
    assert any("val-core/letters/reward/mean@1" in step for step in steps)
    for server_peer in (peer, second):
        assert len(server_peer.restarted) == 3  # with the model's weights, and after each step
        written = Path(server_peer.restarted[-1])
        assert {"config.json", "tokenizer.json", "model.safetensors"} <= {path.name for path in written.iterdir()}
        paths = [path for path, _ in server_peer.asked]
        assert paths.count("/generate_stream") > 6


def test_the_trainer_computes_log_probs_where_the_servers_are_of_another_temperature(
    task: Any, peers: dict[str, InferencePeer], metrics_of: Metrics, tmp_path: Path
) -> None:
    peer = peers["openai"]
    assert isinstance(peer, OpenAIPeer)
    peer.logprobs = "raw"
    server = {"urls": [peer.url], "reload": "vllm", "weights_dir": str(tmp_path / "weights")}
    changes = {**TWO_STEPS, "rollout.temperature": 0.8}
    result = task.run("grpo", tmp_path / "refused", {**changes, "rollout.http": server})
    assert result.exit_code != 0
    assert f"{peer.url} returns log-probs of temperature 1, not of the sampling temperature 0.8" in result.output
    assert "set rollout.http.logprobs=false" in result.output
    result = task.run("grpo", tmp_path / "run", {**changes, "rollout.http": {**server, "logprobs": False}})
    assert result.exit_code == 0, result.output
    steps = metrics_of(tmp_path / "run")
    assert not any("actor/rollout_ratio_max" in step for step in steps)
    assert peer.model.loaded.startswith(str(tmp_path / "weights"))


@pytest.mark.parametrize(
    ("server", "changes", "message"),
    [
        ({}, {}, "rollout.http.reload: is none, so the servers would generate with the first weights in every step"),
        (
            {"reload": "vllm", "weights_dir": "/weights", "logprobs": False},
            {"actor.old_logprobs": "rollout"},
            "rollout.http.logprobs: is false, and actor.old_logprobs=rollout needs the log-probs of the rollout engine",
        ),
        (
            {"reload": "vllm", "weights_dir": "/weights", "logprobs": False},
            {"actor.objective.correction": "tis"},
            "rollout.http.logprobs: is false, and actor.objective.correction needs the log-probs",
        ),
    ],
)
def test_what_cannot_train_is_refused_before_it_starts(
    task: Any, tmp_path: Path, server: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    section = {"urls": ["http://127.0.0.1:1"], **server}
    result = task.run("grpo", tmp_path, {**TWO_STEPS, **changes, "rollout.http": section})
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
