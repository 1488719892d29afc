"""The contexts of teachers, and what a student learns from which completion."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rlcore.batch import Batch, Jagged
from rlcore.engines import SamplingParams
from rlcore.engines.episode import PromptSample
from rlcore.errors import DataError
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_recipes.data.chat import Renderer
from rlcore_recipes.data.settings import DataSettings
from rlcore_recipes.distillation.contexts import onto_samples, rendered, teacher_prompts
from rlcore_recipes.distillation.teachers import rows_by_teacher
from rlcore_recipes.distillation.update import learned
from rlcore_recipes.rollouts.given import given_or_sampled
from rlcore_recipes.settings.distillation import TeacherSettings

OTHER_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[answer] {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def renderer(tokenizer: Any) -> Renderer:
    settings = DataSettings(train_files=["rows.jsonl"], max_prompt_length=8, max_response_length=8)
    return Renderer(settings, tokenizer)


def samples(tokenizer: Any) -> Batch:
    """Two conversations with completions of different lengths."""
    messages = [[{"role": "user", "content": text}] for text in ("one", "a longer {question}")]
    prompts = [
        tokenizer(f"<|student|>{text[0]['content']}", add_special_tokens=False)["input_ids"] for text in messages
    ]
    completions = [[70, 71, 1], [80, 81, 82, 83, 1]]
    tokens = Jagged.from_list([torch.tensor(p + c) for p, c in zip(prompts, completions)])
    mask = torch.cat([torch.tensor([0.0] * len(p) + [1.0] * len(c)) for p, c in zip(prompts, completions)])
    return Batch(
        {
            "tokens": tokens,
            "loss_mask": tokens.with_values(mask),
            "prompt_length": torch.tensor([len(prompt) for prompt in prompts]),
            "group": torch.tensor([4, 7]),
            "messages": messages,
            "prompt_text": [None, None],
            "ground_truth": ["x", "y"],
            "data_source": ["letters", "letters"],
            "extra": [{"hint": "{a}"}, {"hint": "b" * 50}],
        }
    )


def test_a_teacher_with_another_chat_template_sees_the_prompt_in_it_and_the_completion_token_for_token(
    tokenizer: Any, renderer: Renderer
) -> None:
    batch = samples(tokenizer)
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = OTHER_TEMPLATE
    context = rendered(batch, TeacherSettings(), Renderer(renderer.settings, other))
    for row, theirs, length in zip(batch.rows(), context.rows(), batch["prompt_length"].tolist()):
        completion = row["tokens"][length:].tolist()
        prompt = theirs["tokens"].tolist()[: -len(completion)]
        assert tokenizer.decode(prompt) == f"[user] {row['messages'][0]['content']}\n[answer] "
        assert theirs["tokens"].tolist()[-len(completion) :] == completion
        assert theirs["loss_mask"].tolist() == [0.0] * len(prompt) + [1.0] * len(completion)


def test_a_privileged_prompt_is_not_cut_and_keeps_braces_of_values(tokenizer: Any, renderer: Renderer) -> None:
    teacher = TeacherSettings(prompt_template="{prompt} ({hint}: {ground_truth}, {data_source})")
    texts = [tokenizer.decode(row["tokens"]) for row in rendered(samples(tokenizer), teacher, renderer).rows()]
    assert "one ({a}: x, letters)" in texts[0]
    assert f"a longer {{question}} ({'b' * 50}: y, letters)" in texts[1]


def test_a_missing_field_is_named_with_those_there_are(tokenizer: Any, renderer: Renderer) -> None:
    teacher = TeacherSettings(prompt_template="{prompt} {answer}")
    with pytest.raises(DataError, match=r"row 3: .* names \{answer\}, .*; there are .*hint, prompt"):
        teacher_prompts([next(samples(tokenizer).rows())], teacher, renderer, ["row 3"])


def test_columns_of_a_teacher_come_back_to_the_tokens_that_they_describe(tokenizer: Any, renderer: Renderer) -> None:
    batch = samples(tokenizer)
    context = rendered(batch, TeacherSettings(prompt_template="longer: {prompt}"), renderer)
    tokens = context.flat("tokens")
    marked = (tokens * context.flat("loss_mask")).float()
    found = Batch(
        {"teacher_logprobs": context.jagged(marked), "pairs": context.jagged(torch.stack([marked, -marked], 1))}
    )
    moved = onto_samples(found, batch)
    expected = batch.flat("tokens") * batch.flat("loss_mask")
    assert torch.equal(moved.flat("teacher_logprobs"), expected)
    assert torch.equal(moved.flat("pairs"), torch.stack([expected, -expected], 1))


def test_every_data_source_has_one_teacher() -> None:
    batch = Batch({"data_source": ["maths", "code", "maths", "prose"]})
    assert rows_by_teacher(batch, {"m": ["maths"], "rest": []}) == {"m": [0, 2], "rest": [1, 3]}
    with pytest.raises(DataError, match="'code'"):
        rows_by_teacher(batch, {"m": ["maths"]})


def test_given_completions_have_no_advantage_and_sampled_ones_no_likelihood() -> None:
    lengths = torch.tensor([3, 3])
    mask = Jagged(torch.tensor([0.0, 1, 1, 0, 1, 1]), lengths)
    columns = {
        name: Jagged(torch.arange(6.0) * scale, lengths) for name, scale in (("old_logprobs", -1), ("advantages", 2))
    }
    batch = Batch(
        {
            "loss_mask": mask,
            "finish_reason": ["stop", "given"],
            "teacher_logprobs": Jagged(torch.full((6,), -3.0), lengths),
            **columns,
        }
    )
    found, metrics = learned(batch, coeff=0.5)
    # of token 1: 2 − 0.5 · (−1 + 3), of token 2: 4 − 0.5 · (−2 + 3)
    assert found.flat("advantages").tolist() == [0, 1, 3.5, 0, 0, 0]
    assert found.flat("given_mask").tolist() == [0, 0, 0, 0, 1, 1]
    assert metrics["distill/sampled_reverse_kl"].value == pytest.approx(1.5)
    assert metrics["distill/given_fraction"].value == 0.5


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_share_of_prompts_that_the_student_completes(fraction: float) -> None:
    class Engine:
        async def generate(self, request: Any) -> Any:
            from rlcore.engines import Completion

            assert not request.sampling.logprobs
            return Completion(tokens=[5], logprobs=[], finish_reason="stop")

    async def all_reasons() -> list[list[Any]]:
        found = []
        for position in range(300):
            sample = PromptSample([3], [], position=position, completion=[8, 1])
            made = [
                await given_or_sampled(
                    Engine(),  # type: ignore[arg-type]
                    sample,
                    seed,
                    sampling=SamplingParams(max_tokens=1),
                    fraction=fraction,
                    run_seed=11,
                )
                for seed in (1, 2)
            ]
            found.append([trajectory.finish_reason for trajectory in made])
        return found

    reasons = asyncio.run(all_reasons())
    assert all(one == other for one, other in reasons)  # all completions of a prompt
    share = sum(one == "stop" for one, _ in reasons) / len(reasons)
    assert share == pytest.approx(fraction, abs=0.08 if 0 < fraction < 1 else 0)
