"""Teachers with another tokenizer or chat format: bytes of tokens, chunks of text, and what the teacher reads."""

from __future__ import annotations

import json
import random
from itertools import accumulate, permutations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlcore.batch import Batch, Jagged
from rlcore.errors import DataError
from rlcore_recipes.data.chat import Renderer
from rlcore_recipes.data.settings import DataSettings
from rlcore_recipes.distillation.chunks import (
    CHUNK,
    CHUNK_LOGPROBS,
    TRANSLATION,
    chunk_differences,
    chunk_metrics,
    onto_chunks,
    translated,
)
from rlcore_recipes.distillation.text_alignment import UNSCORED, align, readable
from rlcore_recipes.distillation.token_bytes import TokenBytes
from rlcore_recipes.distillation.translation import Translator
from rlcore_recipes.distillation.vocabulary import check_same_tokens
from rlcore_recipes.settings.distillation import TeacherSettings

WORDS = ["the", "a", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "42", "3.14", "x=1", "()"]
ODD = ["naïve", "éclair", "straße", "日本語", "テスト", "🎉", "🇩🇪", "e\u0301", "\t", "\n"]
CORPUS = [" ".join(random.Random(seed).choices(WORDS + ODD, k=40)) for seed in range(60)]
DATA = DataSettings(train_files=["none"])
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}END{% endfor %}[assistant]"


def byte_bpe(size, specials=("<|end|>", "<|user|>")):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), show_progress=False, initial_alphabet=alphabet
    )
    return trained(tokenizer, trainer, specials)


def unigram():
    """As SentencePiece writes it: a space before the text, and bytes for characters without a token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    specials = ("</s>", "<unk>", "<|user|>")
    texts = [text.replace("🎉", "").replace("日", "") for text in CORPUS]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(specials), show_progress=False, unk_token="<unk>"
    )
    tokenizer.train_from_iterator(texts, trainer)
    described = json.loads(tokenizer.to_str())
    described["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    described["model"]["byte_fallback"] = True
    return fast(Tokenizer.from_str(json.dumps(described)), specials)


def wordpiece(**normalizer):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, **normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    specials = ("[SEP]", "[UNK]", "<|user|>")
    return trained(
        tokenizer,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=list(specials), show_progress=False),
        specials,
    )


def trained(tokenizer, trainer, specials):
    tokenizer.train_from_iterator(CORPUS, trainer)
    return fast(tokenizer, specials)


def fast(tokenizer, specials):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=specials[0], additional_special_tokens=list(specials[1:])
    )


TOKENIZERS = {"small-bpe": byte_bpe(290), "bpe": byte_bpe(500), "unigram": unigram(), "wordpiece": wordpiece()}
TABLES = {name: TokenBytes(tokenizer, name) for name, tokenizer in TOKENIZERS.items()}
LOSSLESS = [name for name in TABLES if name != "wordpiece"]


def texts(count):
    draw = random.Random(1)
    pieces = [word + space for word in WORDS + ODD for space in ("", " ", "  ")]
    return ["".join(draw.choices(pieces, k=draw.randint(0, 12))) for _ in range(count)]


def translator(student, teacher):
    return Translator(TABLES[student], TABLES[teacher], frozenset({TOKENIZERS[student].eos_token_id}))


def translation(student, teacher, tokens):
    return translator(student, teacher).completion(tokens, TOKENIZERS[teacher].eos_token_id)


def by_chunk(chunks, parts):
    """Return the bytes of every chunk."""
    found = {}
    for chunk, part in zip(chunks, parts, strict=True):
        found[chunk] = found.get(chunk, b"") + part
    found.pop(UNSCORED, None)
    return found


# --- bytes of tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
def test_tokens_have_the_bytes_of_the_text(name):
    """Without a space in front, which SentencePiece would write before a separate text."""
    table = TABLES[name]
    for text in texts(60):
        tokens = table.encode(text)
        assert tokens is not None
        assert b"".join(table.of(tokens)).decode() == text
        decoded = TOKENIZERS[name].decode(tokens)
        assert decoded == (text.removeprefix(" ") if name == "unigram" else text)


def test_wordpiece_reads_texts_of_single_spaces():
    table = TABLES["wordpiece"]
    assert table.of(table.encode("the quick 42")) == [b"the", b" quick", b" 42"]
    assert table.encode("the  quick") is None
    assert table.encode("unseen: Q") is None


def test_names_of_special_tokens_in_a_text_are_text():
    for name in LOSSLESS:
        tokens = TABLES[name].encode("a <|user|> b")
        assert not set(tokens) & TABLES[name].special


def test_tokenizers_whose_bytes_are_unknown_are_refused():
    odd = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    odd.decoder = decoders.CTC()
    with pytest.raises(DataError, match=r"the decoder CTC of its tokenizer\.json is not supported"):
        TokenBytes(fast(odd, ("[UNK]",)), "the teacher")
    with pytest.raises(DataError, match="the teacher is no tokenizer of the library tokenizers"):
        TokenBytes(object(), "the teacher")


# --- chunks ----------------------------------------------------------------------------------------------------------


def boundaries(parts):
    return set(accumulate(map(len, parts)))


@pytest.mark.parametrize(("student", "teacher"), list(permutations(LOSSLESS, 2)))
def test_chunks_have_the_same_bytes_and_are_the_smallest(student, teacher):
    """For canonical tokens, and for tokens drawn at random, as a model may sample them."""
    draw, table = random.Random(2), TABLES[student]
    plain = [token for token in TOKENIZERS[student].get_vocab().values() if token not in table.special]
    made = [table.encode(text) for text in texts(40)] + [draw.choices(plain, k=draw.randint(1, 20)) for _ in range(40)]
    for tokens in made:
        found = translation(student, teacher, tokens)
        ours, theirs = table.of(tokens), TABLES[teacher].of(found.tokens)
        raw = b"".join(ours)
        text = raw.decode(errors="replace")
        assert text.startswith(b"".join(theirs).decode())  # B5: the same text, but for a character that was cut off
        chunks = by_chunk(found.student_chunks, ours)
        assert chunks == by_chunk(found.teacher_chunks, theirs)
        assert sorted(chunks) == list(chunks)
        if raw == b"".join(theirs):
            assert len(chunks) == len((boundaries(ours) & boundaries(theirs)) - {0})
            assert b"".join(chunks.values()) == raw


def test_wordpiece_on_either_side():
    for text in (" ".join(random.Random(seed).choices(WORDS, k=6)) for seed in range(20)):
        for student, teacher in (("wordpiece", "bpe"), ("bpe", "wordpiece"), ("wordpiece", "unigram")):
            tokens = TABLES[student].encode(text)
            found = translation(student, teacher, tokens)
            chunks = by_chunk(found.student_chunks, TABLES[student].of(tokens))
            assert chunks == by_chunk(found.teacher_chunks, TABLES[teacher].of(found.tokens))
            assert b"".join(chunks.values()).decode() == text


def test_the_worked_example():
    student, teacher = (bytes_of("un|believ|able| is| it"), bytes_of("unbe|liev|able| is it"))
    assert align(student, teacher) == ([0, 0, 1, 2, 2], [0, 0, 1, 2])


def bytes_of(text):
    return [part.encode() for part in text.split("|")]


def test_a_character_that_was_cut_off_is_not_scored():
    flag = "🎉".encode()
    assert align([b"a", flag[:2], flag[2:3]], [b"a"], cut=True) == ([0, -1, -1], [0])
    assert readable(b"a" + flag[:3], cut=True).data == b"a"
    assert readable(b"a" + flag[:3], cut=False).data == "a\N{REPLACEMENT CHARACTER}".encode()


def test_what_follows_bytes_that_are_no_text_is_scored_again():
    broken = "\N{REPLACEMENT CHARACTER}".encode()
    ours, theirs = align([b"a", b"\xff", b"b", b"c"], [b"a", broken, b"bc"])
    assert (ours, theirs) == ([0, -1, 2, 2], [0, -1, 2])
    assert align([b"a", b"x\xff", b"\xffb"], [b"ax", broken, broken, b"b"])[0][0] == UNSCORED


def test_ends_and_special_tokens_are_mapped():
    bpe, other = TOKENIZERS["bpe"], TOKENIZERS["unigram"]
    user = bpe.convert_tokens_to_ids("<|user|>")
    words = TABLES["bpe"].encode("the fox")
    found = translation("bpe", "unigram", [*words, user, *words, bpe.eos_token_id])
    assert found.tokens[-1] == other.eos_token_id
    assert other.convert_tokens_to_ids("<|user|>") in found.tokens
    assert UNSCORED not in found.student_chunks
    assert found.student_chunks[-1] == found.teacher_chunks[-1] == found.chunks - 1
    again = translation("bpe", "unigram", [bpe.eos_token_id, *words])  # no end, as it is not last
    assert again.student_chunks[0] == UNSCORED
    assert TABLES["unigram"].of(again.tokens)[0] != b"</s>"


def test_a_text_that_the_teachers_tokenizer_changes_has_no_translation():
    assert translation("bpe", "wordpiece", TABLES["bpe"].encode("the  fox\n")) is None


# --- the teacher's reading -------------------------------------------------------------------------------------------

PROMPTS, ANSWERS = ["the quick", "a lazy dog"], ["brown fox 🎉", "jumps over straße"]


def batch_of(completions, student="bpe"):
    """Return a batch as rollouts make it."""
    tokenizer = TOKENIZERS[student]
    rows = [tokenizer.encode(prompt) + completion for prompt, completion in zip(PROMPTS, completions, strict=True)]
    lengths = torch.tensor([len(tokenizer.encode(prompt)) for prompt in PROMPTS])
    tokens = Jagged.from_list(rows, torch.int64)
    mask = torch.cat([(torch.arange(len(row)) >= length).float() for row, length in zip(rows, lengths.tolist())])
    return Batch(
        {
            "tokens": tokens,
            "loss_mask": tokens.with_values(mask),
            "group": torch.arange(len(rows)),
            "prompt_length": lengths,
            "messages": [[{"role": "user", "content": prompt}] for prompt in PROMPTS],
            **{name: [None] * len(rows) for name in ("prompt_text", "ground_truth", "data_source")},
            "extra": [{}] * len(rows),
        }
    )


def answers(student="bpe"):
    end = TOKENIZERS[student].eos_token_id
    return batch_of([[*TABLES[student].encode(answer), end] for answer in ANSWERS], student)


def read(batch, student="bpe", teacher="unigram", template=TEMPLATE, longest=1000):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[teacher].backend_tokenizer,
        eos_token=TOKENIZERS[teacher].eos_token,
        chat_template=template,
    )
    return translated(batch, TeacherSettings(), Renderer(DATA, tokenizer), translator(student, teacher), longest)


def with_chunks(batch, found, logprobs):
    columns = onto_chunks(found.with_columns(teacher_logprobs=found.jagged(logprobs)), batch)
    return batch.with_columns(**{name: columns[name] for name in columns.names})


def test_the_teacher_reads_its_own_chat_format_and_tokens():
    found, tokenizer = read(answers()), TOKENIZERS["unigram"]
    for row, mask, prompt, answer in zip(
        found["tokens"].to_list(), found["loss_mask"].to_list(), PROMPTS, ANSWERS, strict=True
    ):
        completion = row[mask > 0].tolist()
        assert tokenizer.decode(row[mask == 0]) == f"[user] {prompt}END[assistant]"
        assert b"".join(TABLES["unigram"].of(completion[:-1])).decode() == answer
        assert completion[-1] == tokenizer.eos_token_id


def test_chunk_sums_against_sums_over_the_text():
    """An oracle that knows nothing of chunks: each byte has a log-prob, and a token has the sum of its bytes'."""
    batch, found = answers(), read(answers())
    ours = of_bytes(batch["tokens"].to_list(), "bpe", scale=1.0)
    batch = with_chunks(batch, found, of_bytes(found["tokens"].to_list(), "unigram", scale=3.0))
    scored = batch.flat(CHUNK) != UNSCORED
    assert torch.equal(scored, batch.flat("loss_mask") > 0)
    differences = chunk_differences(batch, ours)
    # a chunk's difference is 2 (3 - 1) times the student's sum over it
    for chunks, student, difference in zip(
        batch[CHUNK].to_list(), batch.jagged(ours).to_list(), batch.jagged(differences).to_list(), strict=True
    ):
        for chunk in set(chunks.tolist()) - {UNSCORED}:
            inside = chunks == chunk
            torch.testing.assert_close(difference[inside], (2 * student[inside].sum()).expand(int(inside.sum())))
    metrics = chunk_metrics(batch, differences, scored).to_dict()
    assert metrics["distill/chunked_fraction"] == 1
    assert metrics["distill/sampled_reverse_kl"] == pytest.approx(-2 * float(ours[scored].mean()), rel=1e-5)


def of_bytes(rows, name, scale):
    """Return a log-prob for every token that is ``scale`` times a function of its bytes; ends count as one byte."""
    special = TABLES[name].special
    parts = [b"\0" if token in special else TABLES[name].of([0, token])[1] for row in rows for token in row.tolist()]
    return -scale * torch.tensor([sum(1 + byte % 7 for byte in part) / 10 for part in parts])


def test_a_teacher_with_the_students_tokens_and_weights_has_difference_zero():
    batch, found = answers(), read(answers(), teacher="bpe")
    logprobs = -torch.rand(batch.total_tokens)
    theirs = torch.zeros(found.total_tokens)
    theirs[found.flat("loss_mask") > 0] = logprobs[batch.flat("loss_mask") > 0]
    batch = with_chunks(batch, found, theirs)
    differences = chunk_differences(batch, logprobs)
    assert differences.abs().max() < 1e-6
    assert chunk_metrics(batch, differences, batch.flat("loss_mask") > 0).to_dict()["distill/tokens_per_chunk"] == 1


@pytest.mark.parametrize(
    "how", [{"teacher": "wordpiece", "template": "the fox"}, {"teacher": "bpe", "template": "a", "longest": 2}]
)
def test_an_answer_that_the_teacher_cannot_read_has_no_scores(how):
    """Its tokenizer changes the text, or makes too many tokens of it."""
    batch = batch_of([TABLES["bpe"].encode("the"), TABLES["bpe"].encode("the  fox")])
    found = read(batch, **how)
    assert found[TRANSLATION][0] is not None
    assert found[TRANSLATION][1] is None
    batch = with_chunks(batch, found, -torch.ones(found.total_tokens))
    first, second = batch[CHUNK].to_list()
    assert first.max() >= 0
    assert second.max() == UNSCORED
    assert batch[CHUNK_LOGPROBS].to_list()[1].abs().max() == 0
    differences = chunk_differences(batch, -torch.ones(batch.total_tokens))
    metrics = chunk_metrics(batch, differences, batch.flat("loss_mask") > 0).to_dict()
    assert 0 < metrics["distill/chunked_fraction"] < 1


def test_several_turns_are_refused():
    batch = answers()
    mask = batch.flat("loss_mask").clone()
    mask[-2] = 0
    with pytest.raises(DataError, match="prompt 1 was answered in several turns, which a teacher with another"):
        read(batch.with_columns(loss_mask=batch.jagged(mask)))


def test_other_tokens_are_named_without_cross_tokenizer():
    small, large, key = byte_bpe(290), byte_bpe(300), "distill.teachers.big"
    message = (
        rf"{key}: the teacher's tokenizer differs from the student's in 10 tokens \(290 is '.+' there and no token"
    )
    with pytest.raises(DataError, match=message):
        check_same_tokens(key, small, large, len(small), both=True)
    check_same_tokens(key, small, large, len(small), both=False)
    with pytest.raises(DataError, match=rf"290 is no token there and .* set {key}\.cross_tokenizer=true"):
        check_same_tokens(key, large, small, len(large), both=False)
