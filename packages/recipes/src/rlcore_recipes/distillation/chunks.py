"""Across tokenizers: the teacher's log-probs of chunks of text, as columns of the student's batch.

The teacher's log-prob of a chunk of text (`text_alignment`) is the sum over its own tokens. Its
difference to the student's sum, ``Δ = Σ log π_T − Σ log π_S``, stands at every student token of the chunk: all of them
decide together what the chunk says, so each gets the whole difference as its advantage, as it would get the difference
of a single token.

What the sum over a completion estimates. With ``x`` the text, ``s`` the student's tokens and ``t(x)`` the tokens that
the teacher's tokenizer makes of it, and chunks that cover all of the text::

    E[−Σ Δ] = KL(P_S ‖ P_T over texts) + E[log P_T(x) − log π_T(t(x))] − H(s | x)

The second term, at least 0, is what the teacher gives to other tokenisations of the same text; the third is the
student's uncertainty about how to divide its text. Both are small for models that were trained on the tokens of their
tokenizer (Cao and Rimell, 2021, https://aclanthology.org/2021.emnlp-main.161). Chunks that cover the same bytes are
those of Minixhofer et al. (2025, https://arxiv.org/abs/2503.20083).
"""

from __future__ import annotations

import torch

from rlcore.algorithms.sequences import per_token
from rlcore.batch import Batch, Jagged
from rlcore.errors import DataError
from rlcore.metrics import Metrics
from rlcore_recipes.data.chat import Renderer
from rlcore_recipes.data.end_tokens import end_of_turn
from rlcore_recipes.distillation.contexts import CONTEXT_COLUMNS, teacher_prompts
from rlcore_recipes.distillation.text_alignment import UNSCORED
from rlcore_recipes.distillation.translation import Translation, Translator
from rlcore_recipes.settings.distillation import TeacherSettings

TRANSLATION = "translation"
CHUNK = "teacher_chunk"
"""Jagged int64 column: the chunk of text of each token, counted per row; -1: the teacher has no say."""
CHUNK_LOGPROBS = "teacher_chunk_logprobs"
"""Jagged fp32 column: the teacher's log-prob of the token's chunk; 0 where there is none."""


def translated(
    batch: Batch, settings: TeacherSettings, renderer: Renderer, translator: Translator, longest: int
) -> Batch:
    """Return the samples of ``batch`` as a teacher with another tokenizer reads them.

    Args:
        renderer: of the teacher's tokenizer and chat template.
        longest: number of tokens in a sequence that the teacher reads.

    Returns:
        ``tokens`` and ``loss_mask`` (1 on completions) of the teacher, and the object column `TRANSLATION`: None where
        its tokenizer changes the text or makes a longer sequence of it, and ``tokens`` are the prompt alone.

    Raises:
        DataError: a row has turns that the student did not sample after its first one.
    """
    rows = list(batch.select(*CONTEXT_COLUMNS).rows())
    places = [f"prompt {position}" for position in batch["group"].tolist()]
    prompts = teacher_prompts(rows, settings, renderer, places)
    chat_end = end_of_turn(renderer)
    plain_end = renderer.tokenizer.eos_token_id
    tokens, masks, translations = [], [], list[Translation | None]()
    columns = zip(batch["tokens"].to_list(), batch["loss_mask"].to_list(), batch["prompt_length"].tolist())
    for (own, mask, start), row, prompt, where in zip(columns, rows, prompts, places):
        if bool((mask[start:] == 0).any()):
            raise DataError(
                f"{where} was answered in several turns, which a teacher with another tokenizer cannot read: take one "
                "with the student's tokenizer, or an environment of one turn"
            )
        chat = row["prompt_text"] is None and renderer.is_chat(row["messages"])
        made = translator.completion(own[start:].tolist(), chat_end if chat and chat_end is not None else plain_end)
        made = made if made is not None and len(prompt) + len(made.tokens) <= longest else None
        answer = [] if made is None else made.tokens
        tokens.append([*prompt, *answer])
        masks.append([0.0] * len(prompt) + [1.0] * len(answer))
        translations.append(made)
    return Batch(
        {
            "tokens": Jagged.from_list(tokens, torch.int64),
            "loss_mask": Jagged.from_list(masks, torch.float32),
            TRANSLATION: translations,
        }
    )


def onto_chunks(found: Batch, batch: Batch) -> Batch:
    """Return `CHUNK` and `CHUNK_LOGPROBS` over the tokens of ``batch``.

    Args:
        found: what `translated` made of ``batch``, with ``teacher_logprobs``.
    """
    chunks = torch.full((batch.total_tokens,), UNSCORED)
    sums = torch.zeros(batch.total_tokens)
    rows = zip(found[TRANSLATION], found["teacher_logprobs"].to_list(), batch.lengths.cumsum(0).tolist())
    for made, logprobs, end in rows:
        if made is None or not made.chunks:
            continue
        ours, theirs = torch.tensor(made.student_chunks), torch.tensor(made.teacher_chunks)
        scores, counted = logprobs[len(logprobs) - len(theirs) :].float(), theirs != UNSCORED
        of_chunk = torch.zeros(made.chunks).index_add(0, theirs[counted], scores[counted])
        chunks[end - len(ours) : end] = ours
        sums[end - len(ours) : end] = torch.where(ours != UNSCORED, of_chunk[ours.clamp(min=0)], 0.0)
    return Batch({CHUNK: batch.jagged(chunks), CHUNK_LOGPROBS: batch.jagged(sums)})


def chunk_differences(batch: Batch, logprobs: torch.Tensor) -> torch.Tensor:
    """Return ``Δ`` of each token's chunk, ``[T]`` fp32; 0 for tokens without one.

    Args:
        logprobs: of the student for the tokens of ``batch``, ``[T]`` fp32.
    """
    teacher = batch.flat(CHUNK_LOGPROBS)
    scored, chunk, count = _numbered(batch)
    student = torch.zeros(count).index_add(0, chunk, logprobs[scored].float())
    return torch.zeros_like(teacher).index_put((scored,), teacher[scored] - student[chunk])


def chunk_metrics(batch: Batch, differences: torch.Tensor, sampled: torch.Tensor) -> Metrics:
    """Return the reverse KL per token with a chunk, the share of sampled tokens that have one, and tokens per chunk.

    Args:
        differences: `chunk_differences`.
        sampled: tokens that the student sampled, ``[T]`` bool; it sampled rows as a whole.
    """
    scored, chunk, count = _numbered(batch)
    sizes = torch.zeros(count).index_add(0, chunk, torch.ones(len(chunk)))[chunk]
    counted = sampled[scored]
    tokens, chunks = int(counted.sum()), float((1 / sizes[counted]).sum())
    metrics = Metrics()
    metrics.mean("distill/sampled_reverse_kl", -(differences[scored] / sizes)[counted].sum() / max(tokens, 1), tokens)
    metrics.mean("distill/chunked_fraction", tokens / max(int(sampled.sum()), 1), sampled.sum())
    metrics.mean("distill/tokens_per_chunk", tokens / max(chunks, 1.0), chunks)
    return metrics


def _numbered(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return where tokens have a chunk ``[T]``, their chunks counted over all rows, and the number of chunks."""
    chunks = batch.flat(CHUNK)
    scored = chunks != UNSCORED
    row = per_token(torch.arange(len(batch)), batch.lengths)
    keys, numbers = torch.unique(torch.stack([row[scored], chunks[scored]]), dim=1, return_inverse=True)
    return scored, numbers, keys.shape[1]
