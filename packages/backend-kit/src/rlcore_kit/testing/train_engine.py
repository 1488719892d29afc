"""Conformance suite for training engines.

A backend's test module holds::

    class TestMyEngine(TrainEngineConformance):
        def make_engine(self, spec):
            return build(dataclasses.replace(spec, options=MySettings(...)))

pytest then checks the contract of `rlcore.engines.TrainEngine` on tiny random models, against plain transformers and
plain torch. Engines must compute in fp32 here (or the tolerances below be raised).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import weakref
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.batch import Batch, Jagged
from rlcore.config import Config
from rlcore.engines import ForwardRequest, ModelSettings, OptimSettings, TrainEngine, TrainEngineSpec, WeightBucket
from rlcore.errors import CheckpointError, EngineError
from rlcore.metrics import Metrics
from rlcore.progress import listening
from rlcore_kit.testing.model_folders import ONE_LAYER, WRONG_FILES, edited, half_precision, precisions, two_labels
from rlcore_kit.testing.tiny_model import tiny_model

LENGTHS = (5, 30, 17, 2, 40, 1, 9)


@dataclasses.dataclass
class WeightedLogprobs:
    """Loss ``−Σ(w · log π + 0.05 · H) / N`` with the column ``weights``; ``scale`` makes it non-finite on demand."""

    temperature: float = 1.0
    scale: float = 1.0

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("logprobs", "entropy"), self.temperature)

    def denominators(self, batch: Batch) -> dict[str, float]:
        return {"tokens": float(batch.flat("loss_mask").sum())}

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        weighted = (outputs["logprobs"] * batch.flat("weights") + 0.05 * outputs["entropy"]).sum()
        metrics = Metrics()
        mask = batch.flat("loss_mask")
        metrics.mean(
            "entropy", float(outputs["entropy"].detach().sum()) / max(1.0, float(mask.sum())), float(mask.sum())
        )
        metrics.sum("samples", len(batch))
        return -weighted * self.scale / denominators["tokens"], metrics


@dataclasses.dataclass
class BreaksOff(WeightedLogprobs):
    """Fails in the second micro-batch, after the first one's gradient."""

    calls: int = 0

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("broken objective")
        return super().loss(outputs, batch, denominators)


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """Loss ``Σ mask · (v − target)² / N``."""

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("values",))

    def denominators(self, batch: Batch) -> dict[str, float]:
        return {"tokens": float(batch.flat("loss_mask").sum())}

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        error = (outputs["values"] - batch.flat("weights")).square() * batch.flat("loss_mask")
        loss = error.sum() / denominators["tokens"]
        metrics = Metrics()
        metrics.sum("loss", loss.detach())
        return loss, metrics


@dataclasses.dataclass(frozen=True)
class PairMargin:
    """Loss ``−Σ log σ(s₀ − s₁) / N`` over the pairs of the column ``pair``; s is the sum of a sample's log-probs."""

    @property
    def request(self) -> ForwardRequest:
        return ForwardRequest(("logprobs",), together="pair")

    def denominators(self, batch: Batch) -> dict[str, float]:
        return {"pairs": float(len(batch["pair"].unique()))}

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        sums = torch.stack([part.sum() for part in batch.jagged(outputs["logprobs"]).to_list()])
        _, order, counts = torch.unique(batch["pair"], return_inverse=True, return_counts=True)
        assert bool((counts == 2).all()), f"a micro-batch holds parts of pairs: {batch['pair'].tolist()}"
        first, second = sums[order.argsort(stable=True)].reshape(-1, 2).T
        metrics = Metrics()
        metrics.sum("pairs", len(counts))
        return -torch.nn.functional.logsigmoid(first - second).sum() / denominators["pairs"], metrics


def make_pairs() -> Batch:
    """Eight samples, of which those that belong together are far apart and of different lengths."""
    return make_batch((5, 30, 17, 2, 40, 6, 9, 21)).with_columns(pair=torch.tensor([0, 1, 2, 3, 3, 0, 1, 2]))


def make_batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Batch:
    """Random tokens, the padding token (0) among them; about a third masked out at the start of each sequence (a
    prompt); ``weights`` per token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(5, 250, (length,), generator=generator) for length in lengths]
    for sequence in tokens:
        sequence[len(sequence) // 2] = 0  # a token like any other: nothing is padded
    masks = [(torch.arange(length) >= max(1, length // 3)).float() for length in lengths]
    weights = [torch.randn(length, generator=generator) for length in lengths]
    return Batch(
        {
            "tokens": Jagged.from_list(tokens),
            "loss_mask": Jagged.from_list(masks),
            "weights": Jagged.from_list(weights),
        }
    )


def reference_outputs(model: Any, tokens: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies ``[L]`` of one sequence by a plain transformers forward pass; 0 for the first token."""
    logits = model(tokens[None], use_cache=False).logits[0, :-1].float() / temperature  # shift allowed: reference
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[1:, None]).squeeze(-1)  # shift allowed: reference
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    first = logits.new_zeros(1)
    return torch.cat([first, chosen]), torch.cat([first, entropy])


def exported(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """A copy of all weights, by name."""
    return {name: tensor.cpu().clone() for bucket in engine.export_weights() for name, tensor in bucket.tensors}


class TrainEngineConformance:
    """Subclass it, name the subclass ``Test…`` and implement `make_engine`."""

    architecture: str = "Qwen2"
    logprob_atol: float = 2e-5
    weight_atol: float = 2e-6

    def make_engine(self, spec: TrainEngineSpec) -> TrainEngine:
        """The engine under test, single process, for ``spec`` with the backend's own ``options`` put in."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def model_path(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tiny_model(tmp_path_factory.mktemp("model"), architecture=cls.architecture)

    @pytest.fixture(scope="class")
    @classmethod
    def heads(cls, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        """A model for each scalar head: a critic starts from the policy, a reward model has a head."""
        folder = tmp_path_factory.mktemp("reward")
        return {"value": model_path, "score": tiny_model(folder, architecture=cls.architecture, head="score")}

    def engine(self, path: Path, **overrides: Any) -> TrainEngine:
        settings: dict[str, Any] = {"optim": OptimSettings(lr=1e-2), "max_tokens": 64, **overrides}
        return self.make_engine(TrainEngineSpec(ModelSettings(path=str(path)), Config(), **settings))

    @staticmethod
    def reference(path: Path) -> Any:
        transformers: Any = import_module("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        model.get_input_embeddings().padding_idx = None  # else its embedding is not trained
        return model

    # --- forward -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_forward_equals_plain_transformers(self, model_path: Path, temperature: float) -> None:
        batch, model = make_batch(), self.reference(model_path)
        out = self.engine(model_path, optim=None).forward(batch, ForwardRequest(("logprobs", "entropy"), temperature))
        assert out.names == ("logprobs", "entropy")
        assert torch.equal(out.lengths, batch.lengths)
        for row, result in zip(batch.rows(), out.rows()):
            logprobs, entropy = reference_outputs(model, row["tokens"], temperature)
            torch.testing.assert_close(result["logprobs"], logprobs * row["loss_mask"], atol=self.logprob_atol, rtol=0)
            torch.testing.assert_close(result["entropy"], entropy * row["loss_mask"], atol=self.logprob_atol, rtol=0)
        assert {column.values.dtype for column in (out["logprobs"], out["entropy"])} == {torch.float32}
        assert out.flat("logprobs").device.type == "cpu"
        assert not out.flat("logprobs").requires_grad

    def test_forward_without_a_mask_computes_all_but_first_tokens(self, model_path: Path) -> None:
        batch, model = make_batch().select("tokens"), self.reference(model_path)
        out = self.engine(model_path).forward(batch, ForwardRequest())
        for row, result in zip(batch.rows(), out.rows()):
            logprobs, _ = reference_outputs(model, row["tokens"])
            torch.testing.assert_close(result["logprobs"], logprobs, atol=self.logprob_atol, rtol=0)

    def test_forward_is_exactly_zero_where_masked(self, model_path: Path) -> None:
        batch = make_batch()
        out = self.engine(model_path).forward(batch, ForwardRequest(("logprobs", "entropy")))
        for name in out.names:
            assert (out.flat(name)[batch.flat("loss_mask") == 0] == 0).all()
            assert (out.flat(name)[batch.flat("loss_mask") == 1] != 0).all()

    def test_forward_does_not_depend_on_micro_batches(self, model_path: Path) -> None:
        batch = make_batch()
        wide, narrow = (self.engine(model_path, max_tokens=size).forward(batch, ForwardRequest()) for size in (1000, 1))
        torch.testing.assert_close(wide.flat("logprobs"), narrow.flat("logprobs"), atol=self.logprob_atol, rtol=0)

    def test_an_engine_that_knows_its_memory_takes_a_token_budget(self, model_path: Path) -> None:
        engine, batch, heard = self.engine(model_path, max_tokens=1000), make_batch(), []
        memory = engine.step_memory()
        if memory is None:
            return
        assert memory.free > 0
        assert memory.per_token > 0
        before = engine.forward(batch, ForwardRequest())
        engine.set_token_budget(1)
        with listening(lambda what, done, total: heard.append(total)):
            after = engine.forward(batch, ForwardRequest())
        torch.testing.assert_close(before.flat("logprobs"), after.flat("logprobs"), atol=self.logprob_atol, rtol=0)
        assert set(heard) <= {len(batch)}  # of engines that report their micro-batches: one for each sequence

    def test_forward_of_nothing_is_nothing(self, model_path: Path) -> None:
        out = self.engine(model_path).forward(make_batch().take([]), ForwardRequest())
        assert len(out) == 0
        assert out.names == ("logprobs",)

    def test_a_head_refuses_what_it_cannot_compute(self, model_path: Path) -> None:
        with pytest.raises(EngineError, match="values"):
            self.engine(model_path).forward(make_batch(), ForwardRequest(("values",)))
        with pytest.raises(EngineError, match="logprobs"):
            self.engine(model_path, head="value").forward(make_batch(), ForwardRequest(("logprobs",)))

    # --- train ---------------------------------------------------------------------------------------------------

    def test_steps_equal_plain_adamw(self, model_path: Path) -> None:
        """Three steps with clipping, weight decay, warm-up and decay."""
        optim = OptimSettings(
            lr=1e-3, weight_decay=0.1, clip_grad=0.5, schedule="linear", warmup_steps=2, total_steps=4, min_lr_ratio=0.1
        )
        engine, model = self.engine(model_path, optim=optim), self.reference(model_path)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        plain = [p for p in model.parameters() if p.dim() <= 1]
        adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-3, foreach=False
        )
        for step, lr in enumerate((5e-4, 1e-3, 1e-3)):
            batch = make_batch(seed=step)
            metrics = engine.train(batch, WeightedLogprobs(0.8)).to_dict()
            loss = torch.zeros(())
            for row in batch.rows():
                logprobs, entropy = reference_outputs(model, row["tokens"], 0.8)
                loss -= ((logprobs * row["weights"] + 0.05 * entropy) * row["loss_mask"]).sum()
            (loss / batch.flat("loss_mask").sum()).backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for group in adamw.param_groups:
                group["lr"] = lr
            adamw.step()
            adamw.zero_grad()
            assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
            assert metrics["lr"] == pytest.approx(lr)
            assert metrics["skipped_steps"] == 0
            assert metrics["samples"] == len(batch)
        # Adam divides by the gradient's size: where a gradient is rounding noise, its step is too.
        expected = dict(model.named_parameters())
        for name, tensor in exported(engine).items():
            difference = (tensor - expected[name].detach()).abs()
            assert float(difference.quantile(0.99)) < 20 * self.weight_atol, name
            assert float(difference.max()) < 1e-3, name

    def test_a_step_does_not_depend_on_micro_batches(self, model_path: Path) -> None:
        batch, weights, metrics = make_batch(), [], []
        for size in (1000, 41, 1):
            # Plain gradient descent in disguise: with a huge ε, AdamW's first step is lr · gradient / ε.
            engine = self.engine(model_path, max_tokens=size, optim=OptimSettings(lr=1.0, eps=1.0, clip_grad=None))
            metrics.append(engine.train(batch, WeightedLogprobs()).to_dict())
            weights.append(exported(engine))
        for other in (1, 2):
            assert metrics[other] == pytest.approx(metrics[0], rel=1e-4)
            for name, tensor in weights[0].items():
                torch.testing.assert_close(weights[other][name], tensor, atol=self.weight_atol, rtol=0, msg=name)

    def test_samples_that_belong_together_are_in_one_micro_batch(self, model_path: Path) -> None:
        batch, weights = make_pairs(), []
        for size in (1000, 60, 1):
            engine = self.engine(model_path, max_tokens=size, optim=OptimSettings(lr=1.0, eps=1.0, clip_grad=None))
            metrics = engine.train(batch, PairMargin()).to_dict()
            assert metrics["pairs"] == 4
            assert metrics["grad_norm"] > 0
            weights.append(exported(engine))
        for other in (1, 2):
            for name, tensor in weights[0].items():
                torch.testing.assert_close(weights[other][name], tensor, atol=self.weight_atol, rtol=0, msg=name)

    def test_two_runs_are_identical(self, model_path: Path) -> None:
        engines = [self.engine(model_path) for _ in range(2)]
        for step in range(2):
            first, second = (engine.train(make_batch(seed=step), WeightedLogprobs()).to_dict() for engine in engines)
            assert first == second
        first_weights, second_weights = map(exported, engines)
        assert all(torch.equal(first_weights[name], second_weights[name]) for name in first_weights)

    @pytest.mark.parametrize("scale", [float("inf"), float("nan")])
    def test_a_step_without_finite_gradient_is_skipped(self, model_path: Path, scale: float) -> None:
        optim = OptimSettings(lr=1e-2, warmup_steps=4)
        engine, control = self.engine(model_path, optim=optim), self.engine(model_path, optim=optim)
        before = exported(engine)
        metrics = engine.train(make_batch(), WeightedLogprobs(scale=scale)).to_dict()
        assert metrics["skipped_steps"] == 1
        assert metrics["lr"] == pytest.approx(2.5e-3)
        after = exported(engine)
        assert all(torch.equal(after[name], before[name]) for name in before)
        # It counts for the schedule and leaves nothing behind in the optimizer.
        metrics = engine.train(make_batch(), WeightedLogprobs()).to_dict()
        assert metrics["lr"] == pytest.approx(5e-3)
        control.train(make_batch(), WeightedLogprobs(scale=scale))
        assert control.train(make_batch(), WeightedLogprobs()).to_dict() == metrics
        assert all(torch.isfinite(tensor).all() for tensor in exported(engine).values())

    def test_samples_without_gradient_are_fine(self, model_path: Path) -> None:
        engine, batch = self.engine(model_path), make_batch()
        before = exported(engine)
        metrics = engine.train(batch, WeightedLogprobs(scale=0.0)).to_dict()
        assert metrics["grad_norm"] == 0
        assert metrics["skipped_steps"] == 0
        after = exported(engine)
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_a_frozen_engine_does_not_train(self, model_path: Path) -> None:
        with pytest.raises(EngineError, match="optimizer"):
            self.engine(model_path, optim=None).train(make_batch(), WeightedLogprobs())

    def test_a_step_that_broke_off_leaves_nothing(self, model_path: Path) -> None:
        """The next step is as if nothing had been, or refused."""
        engine, control = self.engine(model_path), self.engine(model_path)
        with pytest.raises(RuntimeError, match="broken objective"):
            engine.train(make_batch(), BreaksOff())
        batch = make_batch(seed=1)
        expected = control.train(batch, WeightedLogprobs()).to_dict()
        try:
            metrics = engine.train(batch, WeightedLogprobs()).to_dict()
        except EngineError:
            return
        assert metrics == expected

    def test_tokens_outside_the_vocabulary_are_refused(self, model_path: Path) -> None:
        batch = Batch({"tokens": Jagged.from_list([torch.tensor([5, 9999])])})
        with pytest.raises(EngineError, match="vocabulary"):
            self.engine(model_path).forward(batch, ForwardRequest())

    def test_a_schedule_that_falls_needs_its_length(self, model_path: Path) -> None:
        with pytest.raises(EngineError, match="total_steps"):
            self.engine(model_path, optim=OptimSettings(schedule="cosine"))

    def test_a_missing_model_is_one_clear_error(self, model_path: Path, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match="does not exist"):
            self.engine(tmp_path / "nowhere")
        bare = tmp_path / "bare"
        shutil.copytree(model_path, bare)
        (bare / "model.safetensors").unlink()
        with pytest.raises(EngineError, match="weights"):
            self.engine(bare)

    # --- value and score heads -----------------------------------------------------------------------------------

    @pytest.mark.parametrize("head", ["value", "score"])
    def test_scalar_heads_read_the_right_state(self, heads: dict[str, Path], head: str) -> None:
        """A value stands before its token, a score at it: changing token *t* changes only what may see it."""
        engine = self.engine(heads[head], head=head)
        tokens = torch.arange(10, 22)
        changed = tokens.clone()
        changed[6] = 99
        batch = Batch({"tokens": Jagged.from_list([tokens, changed])})
        first, second = (row["values"] for row in engine.forward(batch, ForwardRequest(("values",))).rows())
        sees = 6 if head == "score" else 7
        differs = (first - second).abs() > 1e-7
        assert not differs[:sees].any()
        assert differs[sees:].all()
        assert first[0] == 0
        assert (first[1:] != 0).all()  # shift allowed: all but the first token

    def test_new_heads_come_from_the_seed(self, model_path: Path) -> None:
        batch, request = make_batch(), ForwardRequest(("values",))
        torch.manual_seed(1)
        a = self.engine(model_path, head="value", seed=3).forward(batch, request)
        torch.manual_seed(2)
        b = self.engine(model_path, head="value", seed=3).forward(batch, request)
        c = self.engine(model_path, head="value", seed=4).forward(batch, request)
        assert torch.equal(a.flat("values"), b.flat("values"))
        assert not torch.equal(a.flat("values"), c.flat("values"))

    @pytest.mark.parametrize("head", ["value", "score"])
    def test_scalar_heads_learn_and_survive_a_round_trip(
        self, heads: dict[str, Path], tmp_path: Path, head: str
    ) -> None:
        engine, batch, request = self.engine(heads[head], head=head), make_batch(), ForwardRequest(("values",))
        losses = [engine.train(batch, SquaredError()).to_dict()["loss"] for _ in range(20)]
        assert losses[-1] < 0.8 * losses[0]
        engine.save_pretrained(tmp_path / "out")
        again = self.engine(tmp_path / "out", head=head, optim=None)
        first, second = (e.forward(batch, request).flat("values") for e in (engine, again))
        torch.testing.assert_close(second, first, atol=self.logprob_atol, rtol=0)

    # --- weights -------------------------------------------------------------------------------------------------

    def test_export_streams_every_weight_once(self, model_path: Path) -> None:
        model = self.reference(model_path)
        expected = {name: p.detach() for name, p in model.named_parameters()}  # tied weights once
        limit = 20_000
        buckets = list(self.engine(model_path).export_weights(limit))
        names = [name for bucket in buckets for name, _ in bucket.tensors]
        assert names == list(expected)
        assert len(buckets) > 2
        assert all(bucket.nbytes <= limit or len(bucket.tensors) == 1 for bucket in buckets)
        for bucket in buckets:
            for name, tensor in bucket.tensors:
                torch.testing.assert_close(tensor.cpu().float(), expected[name], atol=0, rtol=0, msg=name)

    def test_export_holds_two_buckets_at_most(self, model_path: Path) -> None:
        seen: list[weakref.ref[WeightBucket]] = []
        for bucket in self.engine(model_path).export_weights(5_000):
            seen.append(weakref.ref(bucket))
            assert sum(reference() is not None for reference in seen) <= 2
        assert len(seen) > 3

    def test_export_gives_the_weights_that_compute(self, model_path: Path) -> None:
        engine, model, batch = self.engine(model_path), self.reference(model_path), make_batch()
        engine.train(batch, WeightedLogprobs())
        model.load_state_dict(exported(engine), strict=False)
        model.tie_weights()
        out = engine.forward(batch, ForwardRequest())
        for row, result in zip(batch.rows(), out.rows()):
            logprobs, _ = reference_outputs(model, row["tokens"])
            wanted = logprobs.detach() * row["loss_mask"]
            torch.testing.assert_close(result["logprobs"], wanted, atol=self.logprob_atol, rtol=0)

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
        """In precision, tensor by tensor, and in settings that transformers would refuse to write."""
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

    # --- files that do not fit -----------------------------------------------------------------------------------

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
            with pytest.raises(EngineError, match=r"gives 2 labels; a (reward model|critic) gives one number"):
                self.engine(labels, head=head)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def test_training_continues_bit_for_bit(self, model_path: Path, tmp_path: Path) -> None:
        optim = OptimSettings(lr=1e-2, warmup_steps=3, schedule="cosine", total_steps=9)
        engine = self.engine(model_path, optim=optim)
        for step in range(2):
            engine.train(make_batch(seed=step), WeightedLogprobs())
        engine.save(tmp_path / "checkpoint")
        drawn = torch.rand(3)
        straight = [engine.train(make_batch(seed=step), WeightedLogprobs()).to_dict() for step in (2, 3)]
        other = self.engine(model_path, optim=optim)
        other.train(make_batch(seed=9), WeightedLogprobs())
        other.load(tmp_path / "checkpoint")
        assert torch.equal(torch.rand(3), drawn)
        resumed = [other.train(make_batch(seed=step), WeightedLogprobs()).to_dict() for step in (2, 3)]
        assert resumed == straight
        first, second = exported(engine), exported(other)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_training_goes_on_while_a_checkpoint_is_written(self, model_path: Path, tmp_path: Path) -> None:
        """What `start_save` began is what `save` writes at that moment, and stays so."""
        engine = self.engine(model_path)
        assert engine.save_done()
        assert engine.finish_save() == {}
        for step in range(2):  # the second time with whatever the first one has left behind
            engine.train(make_batch(seed=step), WeightedLogprobs())
            now, later = tmp_path / f"now{step}", tmp_path / f"later{step}"
            engine.save(now)
            engine.finish_save()
            engine.start_save(later)
            drawn = torch.rand(3)
            straight = engine.train(make_batch(seed=9), WeightedLogprobs()).to_dict()
            records = engine.finish_save()
            assert engine.save_done()
            assert engine.finish_save() == {}
            files = {path.relative_to(now).as_posix(): path.read_bytes() for path in now.rglob("*") if path.is_file()}
            assert files.keys() == {path.relative_to(later).as_posix() for path in later.rglob("*") if path.is_file()}
            for name, content in files.items():
                assert (later / name).read_bytes() == content, name
                if records:
                    assert records[name] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            other = self.engine(model_path)
            other.load(later)
            assert torch.equal(torch.rand(3), drawn)
            assert other.train(make_batch(seed=9), WeightedLogprobs()).to_dict() == straight

    def test_a_checkpoint_that_cannot_be_written_is_named(self, model_path: Path, tmp_path: Path) -> None:
        engine = self.engine(model_path)
        (tmp_path / "file").write_text("mine")

        def begin_and_finish(path: Path) -> None:
            engine.start_save(path)
            engine.finish_save()

        for save in (engine.save, begin_and_finish):
            with pytest.raises(CheckpointError, match=str(tmp_path / "file")):
                save(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"
        engine.start_save(tmp_path / "good")
        engine.finish_save()
        engine.load(tmp_path / "good")

    def test_a_checkpoint_before_the_first_step_forgets_later_ones(self, model_path: Path, tmp_path: Path) -> None:
        engine = self.engine(model_path)
        engine.save(tmp_path / "checkpoint")
        first = engine.train(make_batch(), WeightedLogprobs()).to_dict()
        weights = exported(engine)
        engine.load(tmp_path / "checkpoint")
        assert engine.train(make_batch(), WeightedLogprobs()).to_dict() == first
        assert all(torch.equal(tensor, weights[name]) for name, tensor in exported(engine).items())

    def test_a_frozen_engine_takes_trained_weights(self, model_path: Path, tmp_path: Path) -> None:
        engine, frozen = self.engine(model_path), self.engine(model_path, optim=None)
        engine.train(make_batch(), WeightedLogprobs())
        engine.save(tmp_path / "checkpoint")
        frozen.load(tmp_path / "checkpoint")
        weights = exported(engine)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in exported(frozen).items())

    def test_a_damaged_checkpoint_changes_nothing(self, model_path: Path, tmp_path: Path) -> None:
        engine = self.engine(model_path)
        engine.train(make_batch(), WeightedLogprobs())
        good = tmp_path / "good"
        engine.save(good)
        files = [path.relative_to(good) for path in good.rglob("*") if path.is_file()]
        control = self.engine(model_path)
        control.load(good)
        engine.train(make_batch(seed=1), WeightedLogprobs())
        control.train(make_batch(seed=1), WeightedLogprobs())
        damages = [(file, how) for file in files for how in ("removed", "truncated")]
        for number, (file, how) in enumerate(damages):
            bad = tmp_path / f"bad{number}"
            shutil.copytree(good, bad)
            if how == "removed":
                (bad / file).unlink()
            else:
                content = (bad / file).read_bytes()
                (bad / file).write_bytes(content[: len(content) // 2])
            with pytest.raises(CheckpointError):
                engine.load(bad)
        with pytest.raises(CheckpointError):
            engine.load(tmp_path / "nowhere")
        before, after = exported(control), exported(engine)
        assert all(torch.equal(before[name], after[name]) for name in before)
        a, b = (e.train(make_batch(seed=2), WeightedLogprobs()).to_dict() for e in (engine, control))
        assert a == b

    def test_a_flipped_bit_in_a_checkpoint_is_found(self, model_path: Path, tmp_path: Path) -> None:
        engine = self.engine(model_path)
        engine.save(tmp_path / "checkpoint")
        largest = max((p for p in (tmp_path / "checkpoint").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) * 3 // 4] ^= 1
        largest.write_bytes(bytes(content))
        with pytest.raises(CheckpointError):
            engine.load(tmp_path / "checkpoint")

    def test_a_checkpoint_of_another_model_is_refused(self, model_path: Path, tmp_path: Path) -> None:
        wider = tiny_model(tmp_path / "wider", architecture=self.architecture, intermediate_size=96)
        self.engine(wider).save(tmp_path / "checkpoint")
        engine = self.engine(model_path)
        before = exported(engine)
        with pytest.raises(CheckpointError, match="another model"):
            engine.load(tmp_path / "checkpoint")
        assert all(torch.equal(tensor, before[name]) for name, tensor in exported(engine).items())

    # --- memory --------------------------------------------------------------------------------------------------

    def test_offloading_changes_no_result(self, model_path: Path) -> None:
        engine, control, batch = self.engine(model_path), self.engine(model_path), make_batch()
        for step in range(2):
            engine.offload()
            engine.offload("params")
            expected = control.train(make_batch(seed=step), WeightedLogprobs()).to_dict()
            assert engine.train(make_batch(seed=step), WeightedLogprobs()).to_dict() == expected
            engine.offload("optimizer")
            engine.onload()
            engine.onload("params", "optimizer")
        engine.offload("params")
        first, second = (e.forward(batch, ForwardRequest()).flat("logprobs") for e in (engine, control))
        assert torch.equal(first, second)
