import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from hub_server import LocalHub

from superweights.checkpoint import Checkpoint, copying
from superweights.checkpoint.copying import Pieces, copy_checkpoint
from superweights.errors import RecordError, UsageError

SECOND = "model-00002-of-00002.safetensors"


def nothing(_: str) -> Pieces:
    return ()


def two_bytes(file: str) -> Pieces:
    return [(1_000_000, memoryview(b"ab"))] if file == SECOND else []


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_the_pieces_differ(sharded: Path, tmp_path: Path) -> None:
    before = content(sharded)
    with Checkpoint.open(sharded) as checkpoint:
        copy_checkpoint(checkpoint, tmp_path / "new" / "copy", two_bytes)
    copied = content(tmp_path / "new" / "copy")
    assert copied.pop(SECOND) == before[SECOND][:1_000_000] + b"ab" + before[SECOND][1_000_002:]
    assert copied == {name: each for name, each in before.items() if name != SECOND}
    assert content(sharded) == before
    assert names(tmp_path / "new") == ["copy"]


def test_blocks_make_no_difference(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_BLOCK_BYTES", 1_000_001)
    with Checkpoint.open(sharded) as checkpoint:
        copy_checkpoint(checkpoint, tmp_path / "copy", nothing)
    assert content(tmp_path / "copy") == content(sharded)


def test_other_weights_in_the_folder_stay_behind(sharded: Path, tmp_path: Path) -> None:
    expected = content(sharded)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json", "README.md"):
        (sharded / name).write_text("{}")
    for name in ("chat_template.jinja", "additional_chat_templates/tool.jinja"):
        path = sharded / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("hello")
        expected[name] = b"hello"
    with Checkpoint.open(sharded) as checkpoint:
        copy_checkpoint(checkpoint, tmp_path / "copy", nothing)
    assert content(tmp_path / "copy") == expected


def test_from_the_hub(hub: LocalHub, sharded: Path, tmp_path: Path) -> None:
    with Checkpoint.open("acme/tiny") as checkpoint:
        copy_checkpoint(checkpoint, tmp_path / "copy", nothing)
    assert content(tmp_path / "copy") == content(sharded)


def test_from_a_url_the_index_is_written_anew(sharded: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{sharded}/", "/copied/tiny", recursive=True)
    try:
        with Checkpoint.open("memory://copied/tiny", cache_dir=tmp_path / "cache") as checkpoint:
            copy_checkpoint(checkpoint, tmp_path / "copy", nothing)
    finally:
        memory.rm("/copied", recursive=True)
    copied, expected = content(tmp_path / "copy"), content(sharded)
    assert copied.keys() == expected.keys()
    assert all(copied[name] == expected[name] for name in copied if not name.endswith("index.json"))
    with Checkpoint.open(tmp_path / "copy") as one, Checkpoint.open(sharded) as other:
        assert one.tensors == other.tensors


def test_a_folder_that_is_not_empty_is_refused(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    with Checkpoint.open(sharded) as checkpoint:
        with pytest.raises(UsageError, match="the folder is not empty"):
            copy_checkpoint(checkpoint, tmp_path / "copy", nothing)
        with pytest.raises(UsageError, match="holds no model, so it is not overwritten"):
            copy_checkpoint(checkpoint, tmp_path / "copy", nothing, overwrite=True)
    assert content(tmp_path / "copy") == {"notes.txt": b"mine"}


def test_a_model_is_replaced_as_a_whole_when_asked(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("of the old one")
    with Checkpoint.open(sharded) as checkpoint:
        copy_checkpoint(checkpoint, tmp_path / "copy", nothing, overwrite=True)
    assert content(tmp_path / "copy") == content(sharded)
    assert names(tmp_path) == ["copy", "sharded"]


def test_an_empty_folder_will_do_and_a_file_will_not(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "file").write_text("")
    with Checkpoint.open(sharded) as checkpoint:
        copy_checkpoint(checkpoint, tmp_path / "copy", nothing)
        with pytest.raises(UsageError, match="that is a file"):
            copy_checkpoint(checkpoint, tmp_path / "file", nothing, overwrite=True)
    assert content(tmp_path / "copy") == content(sharded)


@pytest.mark.parametrize("place", [".", "inside", "inside/deeper", "..", "../linked"])
def test_the_models_own_folder_is_never_written_to(place: str, sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(sharded)
    before = content(sharded)
    with Checkpoint.open(sharded) as checkpoint, pytest.raises(UsageError, match="the model itself lies there"):
        copy_checkpoint(checkpoint, sharded / place, nothing, overwrite=True)
    assert content(sharded) == before


def test_a_folder_that_the_weights_are_linked_from_is_not_replaced(sharded: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for path in sharded.iterdir():
        (links / path.name).symlink_to(path)
    with Checkpoint.open(links) as checkpoint:
        with pytest.raises(UsageError, match="the model itself lies there"):
            copy_checkpoint(checkpoint, sharded, nothing, overwrite=True)
        copy_checkpoint(checkpoint, tmp_path / "copy", nothing)
    assert content(tmp_path / "copy") == content(sharded)
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())


@pytest.mark.parametrize("overwritten", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["os.fsync", "_copy_file", "sync_folder", "_write_index"])
def test_what_fails_half_way_leaves_nothing(
    step: str,
    error: BaseException,
    overwritten: bool,
    sharded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    if overwritten:
        shutil.copytree(sharded, out / "copy")
        (out / "copy" / "notes.txt").write_text("of the old one")
    out.mkdir(exist_ok=True)
    before = content(out)
    monkeypatch.setattr(f"superweights.checkpoint.copying.{step}", failing(error))
    expected = RecordError if isinstance(error, OSError) else KeyboardInterrupt
    with Checkpoint.open(sharded) as checkpoint, pytest.raises(expected) as caught:
        copy_checkpoint(checkpoint, out / "copy", two_bytes, overwrite=overwritten)
    assert content(out) == before
    assert names(out) == (["copy"] if overwritten else [])
    if expected is RecordError:
        assert "No space left on device. Nothing was changed there." in str(caught.value)


def test_a_rename_that_fails_brings_the_old_one_back(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sharded, tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("of the old one")
    before, rename = content(tmp_path / "copy"), Path.rename

    def fail_once(path: Path, target: Path) -> Path:
        if target.name == "copy" and not path.name.endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with Checkpoint.open(sharded) as checkpoint, pytest.raises(RecordError, match="Input/output error"):
        copy_checkpoint(checkpoint, tmp_path / "copy", nothing, overwrite=True)
    assert content(tmp_path / "copy") == before
    assert names(tmp_path) == ["copy", "sharded"]


def test_progress_counts_every_byte(sharded: Path, tmp_path: Path) -> None:
    told: list[object] = []

    class Listener:
        def start(self, task: str, *, total: int | None, unit: str) -> None:
            told.append((task, total, unit))

        def advance(self, steps: int = 1, *, nbytes: int = 0) -> None:
            told.append(nbytes)

        def finish(self) -> None:
            told.append("finish")

    with Checkpoint.open(sharded) as checkpoint:
        copy_checkpoint(checkpoint, tmp_path / "copy", nothing, progress=Listener())
    sizes = [path.stat().st_size for path in sorted(sharded.glob("*.safetensors"))]
    assert told == [("copying weights", 2, "blocks"), *sizes, "finish"]
