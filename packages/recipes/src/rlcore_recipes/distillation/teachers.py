"""The teachers of a run: opened once, asked in every step."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlcore.batch import Batch
from rlcore.errors import DataError
from rlcore_kit.model_folder.vocabulary import positions
from rlcore_recipes.data.chat import Renderer
from rlcore_recipes.data.end_tokens import model_tokens, written_ends
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.distillation.chunks import onto_chunks, translated
from rlcore_recipes.distillation.contexts import CONTEXT_COLUMNS, onto_samples, rendered
from rlcore_recipes.distillation.served import ServedTeacher, Servers
from rlcore_recipes.distillation.teacher import EngineTeacher, Teacher, TeacherRequest
from rlcore_recipes.distillation.token_bytes import TokenBytes
from rlcore_recipes.distillation.translation import Translator
from rlcore_recipes.distillation.vocabulary import shared_tokens
from rlcore_recipes.run.open import micro_batches
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings.distillation import DistillConfig, TeacherSettings

OUTPUT_LAYER = "teacher"
"""The name under which the student's engine holds the teacher's output layer."""


@dataclass(frozen=True)
class OpenTeacher:
    """A teacher of a run.

    Attributes:
        renderer: makes the teacher's prompts; None if it sees completions after the student's own prompts.
        translator: into the teacher's tokens, where they are other ones than the student's.
        longest: longest sequence that a teacher with a translator reads, in tokens.
    """

    settings: TeacherSettings
    teacher: Teacher
    renderer: Renderer | None
    request: TeacherRequest
    translator: Translator | None = None
    longest: int = sys.maxsize


@dataclass(frozen=True)
class Teachers:
    """All teachers of a run, by name.

    Attributes:
        vocabulary: token ids that the student and its teachers share.
    """

    by_name: Mapping[str, OpenTeacher]
    vocabulary: int


def open_teachers(session: Session[DistillConfig]) -> Teachers:
    """Return the teachers of the run, whose engines are built; the student's engine gets their output layer."""
    config = session.config
    vocabulary = min(shared_tokens(config.model, teacher) for teacher in config.distill.teachers.values())
    divergence = config.actor.objective.divergence
    request = TeacherRequest(
        logprobs=config.distill.advantage_coeff > 0,
        top_k=(divergence.top_k or 0) if divergence.coeff else 0,
        states=bool(divergence.coeff) and divergence.top_k is None,
        temperature=config.rollout.temperature,
        vocabulary=vocabulary,
    )
    found = {name: _opened(session, name, settings, request) for name, settings in config.distill.teachers.items()}
    teachers = Teachers(found, vocabulary)
    if request.states:
        hold_output_layer(session, teachers)
        session.micro_batches = micro_batches(config, session.executor, session.roles)  # the layer takes memory
    return teachers


def _opened(
    session: Session[DistillConfig], name: str, settings: TeacherSettings, request: TeacherRequest
) -> OpenTeacher:
    config = session.config
    opened = OpenTeacher(settings, _teacher(session, name, settings, request), own_renderer(config, settings), request)
    translator = own_translator(config, settings)
    if translator is None:
        return opened
    longest = longest_read(config, settings)
    return replace(opened, request=replace(request, vocabulary=None), translator=translator, longest=longest)


def _teacher(session: Session[DistillConfig], name: str, settings: TeacherSettings, request: TeacherRequest) -> Teacher:
    servers = servers_of(session.config, settings)
    if servers is not None:
        return ServedTeacher(session.executor, servers)
    engine = session.roles.frozen.get(f"teacher_{name}")
    if engine is None:
        return EngineTeacher(session.roles.actor, adapters=settings.weights == "current")
    return EngineTeacher(engine, offload=settings.offload)


def own_renderer(config: DistillConfig, settings: TeacherSettings) -> Renderer | None:
    """Return what makes the prompts of a teacher; None if they are the student's.

    A teacher with another chat template sees the prompt under its own: under the student's it would rate text such as
    it never saw.
    """
    student = load_tokenizer(config.model)
    tokenizer = student if settings.model is None else load_tokenizer(settings.model)
    other = settings.sees_other_prompt or settings.cross_tokenizer or tokenizer.chat_template != student.chat_template
    return Renderer(config.data, tokenizer) if other else None


def servers_of(config: DistillConfig, settings: TeacherSettings) -> Servers | None:
    """Return the servers of a teacher; None if it is in a training engine of this run."""
    if settings.scoring is None:
        return None
    divergence = config.actor.objective.divergence
    top_k = (divergence.top_k or 0) if divergence.coeff else 0
    return Servers(settings.scoring, settings.model or config.model, top_k)


def own_translator(config: DistillConfig, settings: TeacherSettings) -> Translator | None:
    """Return what turns completions into the teacher's tokens; None if those are the student's.

    Raises:
        DataError: the bytes of the tokens of one are not known.
    """
    if not settings.cross_tokenizer:
        return None
    assert settings.model is not None
    student, teacher = (load_tokenizer(model) for model in (config.model, settings.model))
    written = written_ends(Renderer(config.data, student), chat=bool(student.chat_template))
    return Translator(
        TokenBytes(student, f"the tokenizer of {config.model.path}"),
        TokenBytes(teacher, f"the tokenizer of {settings.model.path}"),
        model_tokens(config.model)[1] | written,
    )


def longest_read(config: DistillConfig, settings: TeacherSettings) -> int:
    """Return the longest sequence that a teacher with another tokenizer reads, in its tokens."""
    servers = servers_of(config, settings)
    if servers is not None:
        return servers.client().longest
    assert settings.model is not None
    return positions(settings.model) or sys.maxsize


def hold_output_layer(session: Session[DistillConfig], teachers: Teachers) -> None:
    """Give the student's engine the output layer of the teacher whose hidden states it compares with."""
    (opened,) = teachers.by_name.values()
    assert isinstance(opened.teacher, EngineTeacher)
    session.roles.actor.hold_output_layer(OUTPUT_LAYER, opened.teacher.engine.output_layer())


def teacher_columns(session: Session[DistillConfig], teachers: Teachers, batch: Batch) -> Batch:
    """Return the ``teacher_…`` columns of ``batch``; where teachers run in other processes, only request them.

    Raises:
        DataError: a sample has no teacher.
    """
    with session.timed("teacher"):
        opened = teachers.by_name
        if any(teacher.request.states and teacher.settings.weights == "current" for teacher in opened.values()):
            hold_output_layer(session, teachers)  # of the weights that are about to teach
        if len(opened) == 1 and not any(teacher.settings.data_sources for teacher in opened.values()):
            return _rated(session, batch, *opened.values())
        sources = {name: teacher.settings.data_sources for name, teacher in opened.items()}
        rows = session.executor.compute(rows_by_teacher, batch.select("data_source"), sources)
        parts = [_rated(session, batch.take(rows[name]), opened[name]) for name in rows]
        order = torch.tensor([row for name in rows for row in rows[name]]).argsort()
        return session.executor.compute(joined_in_order, order, *parts)


def _rated(session: Session[DistillConfig], batch: Batch, opened: OpenTeacher) -> Batch:
    """Return the columns of one teacher for all samples of ``batch``."""
    if opened.renderer is None:
        rated = opened.teacher.add_columns(batch.select("tokens", "loss_mask"), opened.request)
        return rated.drop("tokens", "loss_mask")
    needed = ("tokens", "loss_mask", "prompt_length", "group")
    whole = batch.select(*needed, *CONTEXT_COLUMNS)
    if opened.translator is not None:
        how = opened.settings, opened.renderer, opened.translator, opened.longest
        translation = session.executor.compute(translated, whole, *how)
        return session.executor.compute(onto_chunks, opened.teacher.add_columns(translation, opened.request), whole)
    context = session.executor.compute(rendered, whole, opened.settings, opened.renderer)
    rated = opened.teacher.add_columns(context, opened.request).drop("tokens", "loss_mask")
    return session.executor.compute(onto_samples, rated, batch.select("tokens", "prompt_length"))


def joined_in_order(order: torch.Tensor, *parts: Batch) -> Batch:
    """Return the samples of all ``parts`` as one batch, in the given order."""
    return Batch.concat(parts).take(order)


def rows_by_teacher(batch: Batch, sources: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Return the rows that each teacher rates, by their ``data_source``; teachers without rows are left out.

    Raises:
        DataError: a data source has no teacher.
    """
    named = {source: name for name, taught in sources.items() for source in taught}
    other = next((name for name, taught in sources.items() if not taught), None)
    rows: dict[str, list[int]] = {}
    for row, source in enumerate(batch["data_source"]):
        name = named.get(source, other)
        if name is None:
            raise DataError(
                f"no teacher has the data source {source!r}: name it in distill.teachers.NAME.data_sources, or leave "
                f"those of one teacher empty; taught are {', '.join(sorted(named))}"
            )
        rows.setdefault(name, []).append(row)
    return rows


def check_sources_taught(config: DistillConfig, sources: Any) -> None:
    """Raise DataError if one of the data sources ``sources`` has no teacher."""
    taught = {name: teacher.data_sources for name, teacher in config.distill.teachers.items()}
    rows_by_teacher(Batch({"data_source": sorted(set(sources))}), taught)
