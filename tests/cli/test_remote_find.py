"""`find` on the Hub: the real client against a Hub on this machine that counts; only what is needed is fetched."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from hub_server import LocalHub

import superweights as sw
from superweights.checkpoint import Checkpoint
from superweights.checkpoint import remote as remote_module
from superweights.checkpoint.remote import HEADER_GUESS_BYTES
from superweights.detection.search import default_prompts
from superweights.results.store import read_records
from superweights.testing import plant_super_weight, tiny_model, tiny_tokenizer

from .conftest import Ask

LAYERS = 8


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A llama of 17 MB, large enough for single layers to be small parts of it, and its super weight in layer 1."""
    directory = tmp_path_factory.mktemp("served") / "model"
    model = tiny_model("llama", layers=LAYERS, hidden=256, intermediate=704, vocab=4096)
    tokenizer = tiny_tokenizer()
    planted = plant_super_weight(model, layer=1, tokenizer=tokenizer)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory, str(planted)


@pytest.fixture
def served(built: tuple[Path, str]) -> Path:
    """The folder of that model."""
    return built[0]


@pytest.fixture
def planted(built: tuple[Path, str]) -> str:
    """Its super weight."""
    return built[1]


@pytest.fixture
def hub(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub that serves it as acme/tiny."""
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(remote_module, "_FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with LocalHub({"acme/tiny": served}) as server:
        server.point_client_here(monkeypatch, tmp_path / "home")
        yield server
        close_session()


def needed_bytes(model: sw.LoadedModel, *, layers: int) -> int:
    """Bytes of the header request, of the prompts' embedding rows, of the first layers and of the last norm."""
    tensors = model.checkpoint.tensors if model.checkpoint else {}
    tokens = {token for prompt in default_prompts(model) for token in prompt.token_ids}
    embedding = tensors["model.embed_tokens.weight"]
    rows = (max(tokens) - min(tokens) + 1) * embedding.nbytes // embedding.shape[0]  # rows between them come along
    names = tuple(f"model.layers.{layer}." for layer in range(layers))
    blocks = sum(entry.nbytes for name, entry in tensors.items() if name.startswith(names))
    return HEADER_GUESS_BYTES + rows + blocks + tensors["model.norm.weight"].nbytes


def whole_file(directory: Path) -> int:
    return (directory / "model.safetensors").stat().st_size


def test_only_what_the_first_layers_need_is_fetched(hub: LocalHub, served: Path, planted: str) -> None:
    with sw.load("acme/tiny", residency="streamed") as model:
        found = sw.find(model, last_layer=2)
        assert model.checkpoint is not None
        assert [str(each.coordinate) for each in found.candidates] == [planted]
        assert model.checkpoint.bytes_fetched == hub.weight_bytes() == needed_bytes(model, layers=3)
        assert model.checkpoint.requests == len(hub.weight_requests())
    assert hub.weight_bytes() < whole_file(served) / 3


def test_all_layers_leave_the_head_and_the_other_embeddings(hub: LocalHub, served: Path) -> None:
    with sw.load("acme/tiny", residency="streamed") as model:
        sw.find(model)
        assert model.checkpoint is not None
        assert model.checkpoint.bytes_fetched == hub.weight_bytes() == needed_bytes(model, layers=LAYERS)


def test_the_command_fetches_the_same_and_a_second_run_nothing(
    hub: LocalHub, served: Path, ask: Ask, tmp_path: Path
) -> None:
    first = ask("find", "acme/tiny", "--layers", "0:2", "--out", tmp_path / "run.jsonl")
    with sw.load(served) as model:
        assert hub.weight_bytes() == needed_bytes(model, layers=2)
    requests = len(hub.weight_requests())
    assert ask("find", "acme/tiny", "--layers", "0:2") == first
    assert (first.status, first.err) == (0, "")
    assert len(hub.weight_requests()) == requests
    run = read_records(tmp_path / "run.jsonl")[0]
    assert (run.model, run.revision) == ("acme/tiny", hub.commit("acme/tiny"))


def test_the_answer_is_that_of_the_files(hub: LocalHub, served: Path, planted: str, ask: Ask) -> None:
    words = ("--layers", "0:4", "--format", "jsonl")
    remote, local = ask("find", "acme/tiny", *words), ask("find", served, *words)
    assert remote == local
    assert json.loads(remote.out)["coordinate"] == planted


def test_a_revision_can_be_named_in_two_ways(hub: LocalHub, ask: Ask, tmp_path: Path) -> None:
    commit = hub.commit("acme/tiny")
    for words in (("acme/tiny", "--revision", commit), (f"hf://acme/tiny@{commit}",)):
        assert ask("find", *words, "--layers", "0:1", "--out", tmp_path / "run.jsonl").status == 0
        run = read_records(tmp_path / "run.jsonl")[0]
        assert (run.model, run.revision) == ("acme/tiny", commit)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("acme/missing",), "the Hub shows no such repository"),
        (("missing",), "is no local path, and the Hub shows no such repository"),
        (("acme/gated",), "is gated: its owner decides who may read it. Ask for access at "),
        (("acme/tiny", "--revision", "no-such"), "acme/tiny has no revision 'no-such'"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    words: tuple[str, ...], says: str, hub: LocalHub, served: Path, ask: Ask
) -> None:
    hub.repositories["acme/gated"] = served
    hub.gated = frozenset({"acme/gated"})
    answer = ask("find", *words)
    assert (answer.status, answer.out) == (3, "")
    assert answer.err.startswith("superweights: error: ") and answer.err.count("\n") == 1
    assert says in answer.err
    assert hub.weight_bytes() == 0


def test_no_network_is_one_line(hub: LocalHub, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    answer = ask("find", "acme/tiny")
    assert (answer.status, answer.out, answer.err.count("\n")) == (3, "", 1)
    assert "Cannot reach the Hub at http://127.0.0.1:1 for acme/tiny" in answer.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    answer = ask("find", "acme/tiny")
    assert (answer.status, answer.out, answer.err.count("\n")) == (3, "", 1)
    assert "HF_HUB_OFFLINE forbids the network" in answer.err


def test_a_network_that_breaks_in_the_middle_is_one_line_and_can_be_resumed(
    hub: LocalHub, ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetch = Checkpoint.fetch
    out = tmp_path / "run.jsonl"

    def break_first(checkpoint: Checkpoint, names: tuple[str, ...], **how: bool) -> None:
        if any(".layers.2." in name for name in names):
            hub.fail(1000, status=503)
        fetch(checkpoint, names, **how)

    monkeypatch.setattr(Checkpoint, "fetch", break_first)
    answer = ask("find", "acme/tiny", "--layers", "0:4", "--out", out)
    assert (answer.status, answer.out, answer.err.count("\n")) == (3, "", 1)
    assert "status 503" in answer.err
    assert not out.exists()
    monkeypatch.setattr(Checkpoint, "fetch", fetch)
    hub.fail(0)
    assert ask("find", "acme/tiny", "--layers", "0:4").status == 0


def test_a_url_is_read_in_ranges_too(
    served: Path, planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERWEIGHTS_CACHE", str(tmp_path / "ranges"))
    memory = fsspec.filesystem("memory")
    try:
        for file in served.iterdir():
            memory.pipe(f"/bucket/model/{file.name}", file.read_bytes())
        with sw.load("memory://bucket/model", residency="streamed") as model:
            found = sw.find(model, last_layer=2)
            assert model.checkpoint is not None
            assert [str(each.coordinate) for each in found.candidates] == [planted]
            assert model.checkpoint.bytes_fetched == needed_bytes(model, layers=3)
        with sw.load("memory://bucket/model", residency="streamed") as model:
            sw.find(model, last_layer=2)
            assert model.checkpoint is not None
            assert model.checkpoint.bytes_fetched == 0
    finally:
        memory.rm("/bucket", recursive=True)
