"""The contract of rollout engines, over peers of the two protocols."""

from __future__ import annotations

import sys

import pytest
from transformers import PreTrainedTokenizerFast

from rlcore.engines import ModelSettings, RolloutSpec
from rlcore_http.engine import build
from rlcore_http.settings import HTTPSettings
from rlcore_kit.testing.inference_peer import OpenAIPeer, TGIPeer
from rlcore_kit.testing.peer_model import PeerModel
from rlcore_kit.testing.rollout_engine import RolloutEngineConformance
from rlcore_kit.testing.tiny_model import SPECIAL_TOKENS, tiny_tokenizer

TOKEN_S = 0.01
"""Seconds per token, so that long completions are still running when they are aborted or paused."""


class OverAPeer(RolloutEngineConformance):
    draws = 300

    def settings(self, url, folder):
        raise NotImplementedError

    def engine_over(self, peer, max_model_len, **model):
        folder = peer.model.folder
        settings = self.settings(peer.url, folder.with_name(f"{folder.name}-weights"))
        return build(RolloutSpec(ModelSettings(path=str(folder), **model), settings, max_model_len))


class TestOpenAI(OverAPeer):
    """With SGLang's meaning of log-probs (of the sampling temperature, before the filters), and its way of weights."""

    def make_engine(self, model, max_model_len):
        return self.engine_over(OpenAIPeer(model, token_s=TOKEN_S), max_model_len)

    def settings(self, url, folder):
        return HTTPSettings(urls=(url,), reload="sglang", weights_dir=folder, max_connections=32)


class TestTGI(OverAPeer):
    """Log-probs are those after the filters, and there is no min-p: what the suite checks of both is left out."""

    def make_engine(self, model, max_model_len):
        tokenizer = character_tokenizer(model.with_name(f"{model.name}-tokenizer"))
        peer = TGIPeer(PeerModel(model, tokenizer), token_s=TOKEN_S)
        return self.engine_over(peer, max_model_len, tokenizer_path=str(tokenizer))

    def settings(self, url, folder):
        restart = (
            f'{sys.executable} -c "import sys, urllib.request as web; '
            'web.urlopen(sys.argv[1] + \'/peer/restart\', sys.argv[2].encode())" {url} \'{{"folder": "{folder}"}}\''
        )
        return HTTPSettings(
            urls=(url,), reload="command", reload_command=restart, weights_dir=folder, max_connections=32
        )

    @pytest.mark.parametrize("changes", [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"temperature": 0.0}], ids=str)
    def test_logprobs_are_those_of_the_model(self, engine, reference, changes):
        super().test_logprobs_are_those_of_the_model(engine, reference, changes)

    @pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
    def test_greedy(self, engine, reference, changes):
        super().test_greedy(engine, reference, {"logprobs": False, **changes})

    @pytest.mark.parametrize("changes", [{}, {"temperature": 0.5}, {"top_k": 20}, {"top_p": 0.7}], ids=str)
    def test_tokens_follow_the_distribution(self, engine, reference, changes):
        super().test_tokens_follow_the_distribution(engine, reference, {"logprobs": False, **changes})

    test_filters = None


def character_tokenizer(folder):
    """Write a tokenizer with the ids of the tiny model's, whose tokens are characters instead of bytes.

    The suite's prompts are no text in UTF-8, so the tiny model's tokenizer has no text for them.
    """
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(tiny_tokenizer().get_vocab(), merges=[]))
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1]}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, additional_special_tokens=list(SPECIAL_TOKENS[2:])
    ).save_pretrained(folder)
    return folder
