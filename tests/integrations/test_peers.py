"""Scores of quantized models against plain formulas, and, where their packages are installed, the peers themselves.

In the environment of a peer: `pytest -W ignore tests/integrations/test_peers.py`, as some packages warn when they are imported.
"""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import superweights as sw
from superweights.errors import ModelError, UnknownNameError, UsageError
from superweights.integrations import peers
from superweights.integrations.peers import PEERS, Peer, Source, quantized_by, score_peer
from superweights.interventions.conditions import ORIGINAL

TINY_BOOKS = Path(sw.__file__).parent / "data" / "tiny-books"
IDS = torch.arange(96).view(4, 24) * 7 % 997 + 3


def read(directory: Path, **options: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def original():
    with sw.load(TINY_BOOKS) as model:
        yield model


@pytest.fixture(scope="module")
def windows(original: sw.LoadedModel) -> sw.Windows:
    return sw.open_windows(original, windows=5, length=40)


@pytest.fixture
def rounded() -> torch.nn.Module:
    """The model with weights of its decoder layers rounded to 1/16, as a peer might."""
    model = read(TINY_BOOKS)
    with torch.no_grad():
        for each in model.model.layers.parameters():
            each.copy_((each * 16).round() / 16)
    return model


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """What a peer called "fake" was given."""
    given: list[Source] = []

    def quantize(source: Source) -> torch.nn.Module:
        given.append(source)
        return source.model().train()

    fake = Peer("fake", "fake-package", "json", "nothing", 16, False, quantize)
    monkeypatch.setattr(peers, "PEERS", {"fake": fake})
    return given


def test_an_unknown_name_has_near_matches():
    with pytest.raises(UnknownNameError, match="Did you mean 'gptqmodel-gptq'"):
        quantized_by("gptqmodel-gptk", TINY_BOOKS)


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_a_missing_package_is_named(peer, monkeypatch):
    monkeypatch.setitem(sys.modules, peer.module, None)
    with pytest.raises(UsageError, match=f"{peer.name} needs {peer.module}.*`pip install {peer.package}`"):
        quantized_by(peer.name, TINY_BOOKS, calibration=IDS)


@pytest.mark.parametrize("peer", [each for each in PEERS.values() if each.calibrated], ids=lambda each: each.name)
def test_a_calibrated_peer_wants_text(peer):
    with pytest.raises(UsageError, match="pass calibration"):
        quantized_by(peer.name, TINY_BOOKS)


def test_the_table_is_consistent():
    assert [each.name for each in PEERS.values()] == list(PEERS)
    assert all(4 < each.bits_per_weight < 16 and each.does for each in PEERS.values())


def test_a_peer_gets_directory_dtype_and_token_ids(original, seen):
    made = quantized_by("fake", original, calibration=["Once upon a time", "there was"], dtype=torch.bfloat16)
    quantized_by("fake", TINY_BOOKS, calibration=IDS)
    texts, ids = seen
    assert (texts.directory, texts.dtype, ids.dtype) == (TINY_BOOKS, torch.bfloat16, torch.float32)
    assert list(texts.rows) == [original.tokenizer(each)["input_ids"] for each in ("Once upon a time", "there was")]
    assert list(ids.rows) == IDS.tolist()
    assert made.dtype == torch.bfloat16
    assert not made.training


def test_what_a_package_refuses_is_a_model_error(seen, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"by fake \(nothing\): ValueError"):
        quantized_by("fake", tmp_path)


def test_a_model_without_a_directory_says_what_to_do(seen):
    with sw.load(read(TINY_BOOKS)) as model, pytest.raises(UsageError, match="save_pretrained"):
        quantized_by("fake", model)


@pytest.mark.parametrize("tokens", [8192, 80], ids=["one pass", "passes of two windows"])
def test_an_unquantized_peer_changes_nothing(original, windows, monkeypatch, tokens):
    expected = sw.evaluate(original, windows, [ORIGINAL]).scores
    monkeypatch.setattr(peers, "TOKENS_PER_PASS", tokens)
    scores = score_peer(read(TINY_BOOKS), original, windows)
    assert scores.nll_nats.shape == (1, 5)
    torch.testing.assert_close(scores.nll_nats, expected.nll_nats, rtol=0, atol=1e-6)  # other products, other rounding
    torch.testing.assert_close(scores.kl_nats, torch.zeros_like(scores.kl_nats), rtol=0, atol=1e-6)
    assert scores.agreement.tolist() == [[1.0] * 5]


def test_scores_are_those_of_plain_logits(original, windows, rounded):
    scores = score_peer(rounded, original, windows)
    with torch.no_grad():
        found, expected = (
            each(windows.ids).logits[:, :-1].double().log_softmax(-1) for each in (rounded, read(TINY_BOOKS))
        )
    targets = windows.ids[:, 1:, None]
    nll = -found.gather(-1, targets)[..., 0].mean(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean(-1)
    agreement = (found.argmax(-1) == expected.argmax(-1)).double().mean(-1)
    assert kl.min() > 0.01  # it is a real change
    torch.testing.assert_close(scores.nll_nats[0], nll, rtol=1e-5, atol=1e-5)  # float32 against float64
    torch.testing.assert_close(scores.kl_nats[0], kl, rtol=1e-4, atol=1e-5)
    assert scores.agreement[0].tolist() == agreement.tolist()


def test_scoring_leaves_the_peer_as_it_was(original, windows, rounded):
    with torch.no_grad():
        before = rounded(IDS).logits
        score_peer(rounded, original, windows)
        assert torch.equal(rounded(IDS).logits, before)
    assert not rounded.model.layers[0]._forward_hooks


def test_a_peer_with_other_modules_is_refused(original, windows):
    with pytest.raises(UsageError, match=r"Linear against .*no module model and no module model\.layers"):
        score_peer(torch.nn.Linear(2, 2), original, windows)


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_a_peer_quantizes_a_little(peer, original, windows):
    """Every peer changes the decoder layers by what 4 bits cost, and leaves embedding and head alone."""
    pytest.importorskip(peer.module, reason=f"a peer, in an environment of its own: pip install {peer.package}")
    others = sw.open_windows(original, windows=21, length=40).ids[len(windows.ids) :]  # not what is scored
    made = quantized_by(peer.name, TINY_BOOKS, calibration=others)
    scores = score_peer(made, original, windows)
    assert 0.001 < scores.kl_nats.mean() < 0.2
    assert scores.agreement.mean() > 0.6
    plain = read(TINY_BOOKS)
    for each in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(made, each)().weight, getattr(plain, each)().weight)
