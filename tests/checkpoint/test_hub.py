import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import LocalHub

from superweights.checkpoint import Checkpoint, ModelReference
from superweights.checkpoint import remote as remote_module
from superweights.errors import (
    CheckpointError,
    HubError,
    MissingTensorError,
    NotACheckpointError,
    PickleCheckpointError,
)

HEADER_BYTES = 2 * (64 << 10)  # the first request of each of the two shards


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_FIRST_WAIT_SECONDS", 0.0)


def equal_to_local(checkpoint: Checkpoint, local: Path, names: list[str]) -> bool:
    with Checkpoint.open(local) as expected:
        return all(torch.equal(checkpoint.view(name), expected.view(name)) for name in names)


def test_opening_fetches_only_the_headers(hub: LocalHub) -> None:
    with Checkpoint.open("acme/tiny") as checkpoint:
        assert len(checkpoint.tensors) == 6
        assert checkpoint.bytes_fetched == hub.weight_bytes() == HEADER_BYTES
        assert checkpoint.requests == len(hub.weight_requests()) == 2
        assert checkpoint.revision == hub.commit("acme/tiny")
        assert {path.name for path in checkpoint.directory.iterdir()} >= {"config.json", "tokenizer.json"}
        assert not list(checkpoint.directory.glob("*.safetensors"))


def test_one_tensor_costs_its_own_bytes(hub: LocalHub, sharded: Path) -> None:
    with Checkpoint.open("acme/tiny") as checkpoint:
        checkpoint.fetch(["layer.1.down"])
        assert (
            checkpoint.bytes_fetched == hub.weight_bytes() == HEADER_BYTES + checkpoint.tensors["layer.1.down"].nbytes
        )
        assert equal_to_local(checkpoint, sharded, ["layer.1.down"])
        assert not checkpoint.view("layer.3.down").any()


def test_a_second_opening_fetches_nothing(hub: LocalHub, sharded: Path) -> None:
    with Checkpoint.open("acme/tiny") as checkpoint:
        checkpoint.fetch(["layer.1.down"])
    before = hub.weight_bytes()
    with Checkpoint.open("acme/tiny") as checkpoint:
        checkpoint.fetch(["layer.1.down"])
        assert equal_to_local(checkpoint, sharded, ["layer.1.down"])
        assert (checkpoint.bytes_fetched, checkpoint.requests) == (0, 0)
    assert hub.weight_bytes() == before


def test_the_list_of_ranges_grows_over_runs(hub: LocalHub, sharded: Path) -> None:
    for name in ("layer.0.down", "layer.3.down"):
        with Checkpoint.open("acme/tiny") as checkpoint:
            checkpoint.fetch([name])
    with Checkpoint.open("acme/tiny") as checkpoint:
        checkpoint.fetch(["layer.0.down", "layer.3.down"])
        assert equal_to_local(checkpoint, sharded, ["layer.0.down", "layer.3.down"])
        assert checkpoint.bytes_fetched == 0


def test_rows_and_scalars_cost_little(hub: LocalHub, sharded: Path) -> None:
    with Checkpoint.open("acme/tiny") as checkpoint, Checkpoint.open(sharded) as local:
        opened = checkpoint.bytes_fetched
        index = (700, 5)
        assert checkpoint.read_scalar("layer.2.down", index).bits == local.read_scalar("layer.2.down", index).bits
        assert checkpoint.bytes_fetched == opened + 2
        checkpoint.fetch_rows("head", [3, 1000, 3])  # row 3 came with the header
        assert checkpoint.bytes_fetched == opened + 2 + 768 * 2
        assert torch.equal(checkpoint.view("head")[[3, 1000]], local.view("head")[[3, 1000]])
        assert (checkpoint.read_row("head", (1000,)) == local.read_row("head", (1000,))).all()
        assert checkpoint.bytes_fetched == opened + 2 + 768 * 2


def test_a_view_taken_before_its_bytes_come_shows_them_after(hub: LocalHub, sharded: Path) -> None:
    with Checkpoint.open("acme/tiny") as checkpoint, Checkpoint.open(sharded) as local:
        view = checkpoint.view("layer.1.down")
        assert not view[100:].any()
        checkpoint.fetch(["layer.1.down"])
        assert torch.equal(view, local.view("layer.1.down"))


def test_many_threads_fetch_each_byte_once(hub: LocalHub, sharded: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with Checkpoint.open("acme/tiny") as checkpoint:
        names = list(checkpoint.tensors)
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(checkpoint.fetch, [names[i:] + names[:i] for i in range(6)]))
        assert equal_to_local(checkpoint, sharded, names)
        assert checkpoint.bytes_fetched == sum(file.stat().st_size for file in sharded.glob("*.safetensors"))


def test_large_ranges_are_split_over_requests(hub: LocalHub, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_REQUEST_BYTES", 100_000)
    with Checkpoint.open("acme/tiny") as checkpoint:
        checkpoint.fetch(["layer.1.down"])
        assert checkpoint.requests == 2 + -(-1024 * 768 * 2 // 100_000)
        assert equal_to_local(checkpoint, sharded, ["layer.1.down"])


def test_an_address_is_resolved_once_and_again_when_it_expires(hub: LocalHub, sharded: Path) -> None:
    def resolved() -> int:
        return sum(each.method == "HEAD" and each.path.endswith(".safetensors") for each in hub.served)

    with Checkpoint.open("acme/tiny") as checkpoint:
        checkpoint.fetch(["layer.1.down"])
        assert resolved() == 2
        hub.expire_addresses()
        checkpoint.fetch(["layer.0.down"])
        assert resolved() == 3
        assert equal_to_local(checkpoint, sharded, ["layer.0.down", "layer.1.down"])


@pytest.mark.parametrize("status", [None, 503, 429])
def test_a_transfer_that_breaks_is_continued(hub: LocalHub, sharded: Path, status: int | None) -> None:
    with Checkpoint.open("acme/tiny") as checkpoint:
        hub.fail(3, status=status)
        checkpoint.fetch(["layer.1.down"])
        assert equal_to_local(checkpoint, sharded, ["layer.1.down"])
        assert checkpoint.bytes_fetched == HEADER_BYTES + checkpoint.tensors["layer.1.down"].nbytes


def test_a_server_that_stays_broken_is_named_and_what_came_is_kept(hub: LocalHub, sharded: Path) -> None:
    with Checkpoint.open("acme/tiny") as checkpoint:
        hub.fail(1000, status=503)
        with pytest.raises(HubError, match="status 503"):
            checkpoint.fetch(["layer.1.down"])
        hub.fail(0)
        checkpoint.fetch(["layer.1.down"])
        assert equal_to_local(checkpoint, sharded, ["layer.1.down"])


def test_a_server_without_ranges_is_refused(hub: LocalHub) -> None:
    hub.ignore_ranges = True
    with pytest.raises(HubError, match="part of a file"):
        Checkpoint.open("acme/tiny")


def test_the_token_stays_with_the_hub(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Checkpoint.open("acme/tiny") as checkpoint:
        checkpoint.fetch(["head"])
    assert not any(each.authorized for each in hub.weight_requests())
    assert all(each.authorized for each in hub.served if not each.storage)


def test_a_new_commit_never_mixes_with_the_old(hub: LocalHub, sharded: Path) -> None:
    with Checkpoint.open("acme/tiny") as checkpoint:
        checkpoint.fetch(["layer.1.down"])
        old = checkpoint.view("layer.1.down").clone()
    shard = sharded / "model-00001-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2000] + bytes(2000))
    with Checkpoint.open("acme/tiny") as checkpoint:
        checkpoint.fetch(["layer.1.down"])
        assert not torch.equal(checkpoint.view("layer.1.down"), old)
        assert equal_to_local(checkpoint, sharded, ["layer.1.down"])


def test_a_file_that_changes_within_a_commit_is_refused(
    hub: LocalHub, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit("acme/tiny")
    monkeypatch.setattr(hub, "commit", lambda name: commit)
    with Checkpoint.open("acme/tiny") as checkpoint:
        os.utime(sharded / "model-00001-of-00002.safetensors", ns=(0, 0))
        hub.expire_addresses()
        with pytest.raises(HubError, match=r"model-00001-of-00002\.safetensors"):
            checkpoint.fetch(["layer.1.down"])


def test_a_listing_without_sizes_will_do(sharded: Path, hub: LocalHub) -> None:
    hub.listed = False
    with Checkpoint.open("acme/tiny") as checkpoint:
        checkpoint.fetch(["head"])
        assert equal_to_local(checkpoint, sharded, ["head"])


def test_a_whole_model_in_the_cache_needs_no_network(
    hub: LocalHub, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, snapshot_download

    folder = snapshot_download("acme/tiny")
    commit = hub.commit("acme/tiny")
    requests = len(hub.served)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with Checkpoint.open("acme/tiny") as checkpoint:
        assert checkpoint.directory == Path(folder)
        assert checkpoint.revision == commit
        checkpoint.fetch(checkpoint.tensors)
        assert equal_to_local(checkpoint, sharded, list(checkpoint.tensors))
        assert checkpoint.bytes_fetched == 0
    assert len(hub.served) == requests


def test_offline_without_the_model_is_one_line(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as caught:
        Checkpoint.open("acme/tiny")
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_network_names_the_server(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError) as caught:
        Checkpoint.open("acme/tiny")
    assert "http://127.0.0.1:1" in str(caught.value)
    assert "local directory" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("acme/missing", None, "no such repository"),
        ("missing", None, "no local path"),
        ("acme/tiny", "no-such-branch", "no revision 'no-such-branch'"),
        ("acme/gated", None, "gated: its owner"),
    ],
)
def test_each_refusal_is_one_line(hub: LocalHub, sharded: Path, name: str, revision: str | None, words: str) -> None:
    hub.repositories["acme/gated"] = sharded
    hub.gated = frozenset({"acme/gated"})
    with pytest.raises(HubError) as caught:
        Checkpoint.open(name, revision=revision)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gate_that_only_guards_the_weights_is_named(hub: LocalHub) -> None:
    with Checkpoint.open("acme/tiny") as checkpoint:
        hub.gated = frozenset({"acme/tiny"})
        hub.expire_addresses()
        with pytest.raises(HubError, match="gated"):
            checkpoint.fetch(["head"])


def repository(hub: LocalHub, folder: Path, files: dict[str, str]) -> str:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    hub.repositories["acme/other"] = folder
    return "acme/other"


def test_pickles_on_the_hub_are_refused_before_any_is_fetched(hub: LocalHub, tmp_path: Path) -> None:
    name = repository(hub, tmp_path / "pickled", {"config.json": "{}", "pytorch_model.bin": "x"})
    with pytest.raises(PickleCheckpointError, match="save_pretrained"):
        Checkpoint.open(name)
    assert not hub.weight_requests()


def test_a_repository_without_weights_is_named(hub: LocalHub, tmp_path: Path) -> None:
    name = repository(hub, tmp_path / "data", {"config.json": "{}", "notes.md": "x"})
    with pytest.raises(NotACheckpointError, match=r"acme/other on the Hub holds no \.safetensors"):
        Checkpoint.open(name)


def test_a_repository_without_config_is_named(hub: LocalHub, sharded: Path) -> None:
    (sharded / "config.json").unlink()
    with pytest.raises(NotACheckpointError, match=r"no config\.json"):
        Checkpoint.open("acme/tiny")


def test_an_index_that_names_a_missing_shard_is_named(hub: LocalHub, sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingTensorError, match="model-00002-of-00002"):
        Checkpoint.open("acme/tiny")


def test_a_lying_header_on_the_hub_closes_everything(hub: LocalHub, sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="header of"):
        Checkpoint.open("acme/tiny")


def test_a_closed_checkpoint_fetches_no_more(hub: LocalHub) -> None:
    checkpoint = Checkpoint.open("acme/tiny")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoint.fetch(["head"])


def test_hub_urls_and_revisions_are_the_same_model(hub: LocalHub) -> None:
    commit = hub.commit("acme/tiny")
    with (
        Checkpoint.open(f"hf://acme/tiny@{commit}") as pinned,
        Checkpoint.open(ModelReference("acme/tiny", "main")) as branch,
    ):
        assert pinned.revision == branch.revision == commit
        assert pinned.digest == branch.digest


def test_the_environment_alone_points_a_process_here(hub: LocalHub, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from superweights.checkpoint import Checkpoint\n"
        "with Checkpoint.open('acme/tiny') as checkpoint:\n"
        "    print(checkpoint.read_scalar('head', (0, 0)).bits, checkpoint.bytes_fetched, 'torch' in sys.modules)\n"
    )
    environment = {**os.environ, **hub.environment(tmp_path / "child")}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    with Checkpoint.open(hub.repositories["acme/tiny"]) as local:
        assert done.stdout.split() == [str(local.read_scalar("head", (0, 0)).bits), str(HEADER_BYTES), "False"]
    assert done.stderr == ""
