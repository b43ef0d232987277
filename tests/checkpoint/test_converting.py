"""A checkpoint with tensors replaced: what its files hold, and what is left when something goes wrong half-way."""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import fsspec
import pytest
import torch
from hub_server import LocalHub
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from superweights.checkpoint import Checkpoint, converting
from superweights.checkpoint.converting import NewTensor, Replacement, convert_checkpoint
from superweights.errors import MalformedFileError, RecordError, UsageError
from superweights.progress import NO_PROGRESS, Progress

SHARDS = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors")
FILES = {"config.json": '{"model_type": "other"}\n', "README.md": "# A card\n"}
REST = ".new.partial"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of several dtypes, some of odd sizes, with an index; nothing in the first is replaced. Do not change it."""
    directory = tmp_path_factory.mktemp("converting") / "source"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shards: dict[str, dict[str, torch.Tensor]] = {
        SHARDS[0]: {"embed": noise(64, 33).bfloat16(), "bytes": torch.arange(3, dtype=torch.uint8)},
        SHARDS[1]: {
            "layer.0.down": noise(32, 48),
            "layer.1.down": noise(5, 7).half(),
            "mask": torch.tensor([True, False, True]),
        },
        SHARDS[2]: {
            "layer.2.down": noise(32, 48).bfloat16(),
            "count": torch.tensor(7),
            "empty": torch.empty(0, 4),
            "eight": noise(5).to(torch.float8_e4m3fn),
            "head": noise(33, 64).bfloat16(),
        },
    }
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("hello")
    (directory / "pytorch_model.bin").write_text("other weights, which stay behind")
    return directory


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run makes of it."""
    directory = tmp_path_factory.mktemp("converting") / "new"
    convert(source, directory)
    return content(directory)


def halves(weights: torch.Tensor) -> list[torch.Tensor]:
    """What stands for a matrix here: tensors of four item sizes, not in their order."""
    wide = weights.float()
    return [
        (wide > 0).view(torch.uint8)[:, :3],
        wide.amax(1).half(),
        (wide * 1000).to(torch.int32).t(),
        torch.tensor(weights.shape),
    ]


def halved(checkpoint: Checkpoint, make: Callable[..., Sequence[torch.Tensor]] = halves) -> dict[str, Replacement]:
    """Replaces every matrix called down; `make` is told the name where it takes two arguments."""

    def replacement(name: str) -> Replacement:
        rows, cols = checkpoint.tensors[name].shape
        tensors = (
            NewTensor(f"{name}_signs", "U8", (rows, 3)),
            NewTensor(f"{name}_scale", "F16", (rows,)),
            NewTensor(f"{name}_codes", "I32", (cols, rows)),
            NewTensor(f"{name}_shape", "I64", (2,)),
        )
        return Replacement(tensors, make if make is halves else lambda weights: make(name, weights))

    return {name: replacement(name) for name in checkpoint.tensors if name.endswith("down")}


def convert(
    directory: Path,
    to: Path,
    *,
    make: Callable[..., Sequence[torch.Tensor]] = halves,
    files: Mapping[str, str] = FILES,
    recipe: str = "",
    overwrite: bool = False,
    threads: int | None = 1,
    progress: Progress = NO_PROGRESS,
) -> int:
    with Checkpoint.open(directory) as checkpoint:
        return convert_checkpoint(
            checkpoint,
            to,
            halved(checkpoint, make),
            files=files,
            recipe=recipe,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )


class Maker:
    """Makes what `halves` makes, and notes what was made; fails where it is told to."""

    def __init__(self, fail_at: str = "", error: BaseException | None = None) -> None:
        self.made: list[str] = []
        self.fail_at, self.error = fail_at, error

    def __call__(self, name: str, weights: torch.Tensor) -> list[torch.Tensor]:
        if name == self.fail_at and self.error is not None:
            raise self.error
        self.made.append(name)
        return halves(weights)


class Listener:
    """Notes what it is told; interrupted when so many tensors are done."""

    def __init__(self, interrupted_at: int | None = None) -> None:
        self.told: list[object] = []
        self.done, self.interrupted_at = 0, interrupted_at

    def start(self, task: str, *, total: int | None, unit: str) -> None:
        self.told.append((task, total, unit))

    def advance(self, steps: int = 1, *, nbytes: int = 0) -> None:
        self.done += steps
        self.told.append((steps, nbytes))
        if self.interrupted_at is not None and self.done >= self.interrupted_at:
            raise KeyboardInterrupt

    def finish(self) -> None:
        self.told.append("finish")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def expected(source: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The new tensors by shard, made by hand."""
    found = {}
    for file in sorted(path.name for path in source.glob("*.safetensors")):
        tensors = load_file(source / file)
        for name in [each for each in tensors if each.endswith("down")]:
            new = dict(zip(("signs", "scale", "codes", "shape"), halves(tensors.pop(name)), strict=True))
            tensors |= {f"{name}_{part}": tensor for part, tensor in new.items()}
        found[file] = tensors
    return found


@pytest.mark.parametrize("threads", [1, 4, None])
def test_replaced_and_copied_tensors_land_where_the_header_says(threads: int | None, source: Path, tmp_path: Path):
    before = content(source)
    nbytes = convert(source, tmp_path / "deep" / "new", threads=threads)
    shards = expected(source)
    with Checkpoint.open(tmp_path / "deep" / "new") as checkpoint:
        assert {name: entry.file for name, entry in checkpoint.tensors.items()} == {
            name: file for file, tensors in shards.items() for name in tensors
        }
        for file, tensors in shards.items():
            with safe_open(tmp_path / "deep" / "new" / file, framework="pt") as opened:
                assert set(opened.keys()) == set(tensors)
                assert opened.metadata() == {"format": "pt"}
                for name, tensor in tensors.items():
                    for found in (opened.get_tensor(name), checkpoint.view(name)):
                        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
                        assert raw(found) == raw(tensor), name
    assert nbytes == sum(path.stat().st_size for path in (tmp_path / "deep" / "new").glob("*.safetensors"))
    assert content(source) == before
    assert names(tmp_path / "deep") == ["new"]


def test_every_tensor_starts_at_a_multiple_of_its_item_size(source: Path, tmp_path: Path):
    convert(source, tmp_path / "new")
    with Checkpoint.open(tmp_path / "new") as checkpoint:
        assert all(entry.start % entry.itemsize == 0 for entry in checkpoint.tensors.values())
        assert len({entry.itemsize for entry in checkpoint.tensors.values()}) == 4


def test_the_index_names_the_new_tensors_and_their_size(source: Path, tmp_path: Path):
    convert(source, tmp_path / "new")
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    shards = expected(source)
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(each.nbytes for part in shards.values() for each in part.values())


def test_small_files_are_copied_or_replaced_and_other_weights_stay_behind(source: Path, tmp_path: Path):
    convert(source, tmp_path / "new")
    found = content(tmp_path / "new")
    assert {name: found[name].decode() for name in FILES} == FILES
    for name in ("tokenizer.json", "additional_chat_templates/tool.jinja"):
        assert found[name] == content(source)[name]
    assert found.keys() == content(source).keys() - {"pytorch_model.bin"} | {"README.md"}


def test_one_file_without_an_index(source: Path, tmp_path: Path):
    single = tmp_path / "single"
    single.mkdir()
    save_file(load_file(source / SHARDS[1]), single / "model.safetensors")
    (single / "config.json").write_text("{}")
    convert(single, tmp_path / "new")
    assert names(tmp_path / "new") == ["README.md", "config.json", "model.safetensors"]
    found, made = load_file(tmp_path / "new" / "model.safetensors"), expected(source)[SHARDS[1]]
    assert {name: raw(each) for name, each in found.items()} == {name: raw(each) for name, each in made.items()}


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_make_no_difference(threads: int, source: Path, whole: dict[str, bytes], tmp_path: Path):
    convert(source, tmp_path / "several", threads=threads)
    assert content(tmp_path / "several") == whole


def test_pieces_short_writes_and_early_syncs_make_no_difference(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(converting, "_COPY_BYTES", 501)
    monkeypatch.setattr(converting, "_SYNC_BYTES", 1)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: pwrite(descriptor, data[:200], at))
    convert(source, tmp_path / "other")
    assert content(tmp_path / "other") == whole


def test_where_room_cannot_be_reserved_the_file_grows(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    convert(source, tmp_path / "other")
    monkeypatch.delattr(os, "posix_fallocate")
    convert(source, tmp_path / "third")
    assert content(tmp_path / "other") == content(tmp_path / "third") == whole


def test_from_the_hub(hub: LocalHub, sharded: Path, tmp_path: Path):
    convert(sharded, tmp_path / "local")
    with Checkpoint.open("acme/tiny") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "new", halved(checkpoint), files=FILES, threads=2)
    assert content(tmp_path / "new") == content(tmp_path / "local")


def test_from_a_url(source: Path, whole: dict[str, bytes], tmp_path: Path):
    memory = fsspec.filesystem("memory")
    memory.put(f"{source}/", "/converted/tiny", recursive=True)
    try:
        with Checkpoint.open("memory://converted/tiny", cache_dir=tmp_path / "cache") as checkpoint:
            convert_checkpoint(checkpoint, tmp_path / "new", halved(checkpoint), files=FILES, threads=2)
    finally:
        memory.rm("/converted", recursive=True)
    assert content(tmp_path / "new") == whole


def test_progress_counts_every_tensor_and_its_bytes(source: Path, tmp_path: Path):
    first, second = Listener(interrupted_at=6), Listener()
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", progress=first)
    convert(source, tmp_path / "new", progress=second)
    with Checkpoint.open(source) as checkpoint:
        sizes = [(1, entry.nbytes) for entry in checkpoint.tensors.values()]
    assert first.told == [("writing", 10, "tensors"), *sizes[:6], "finish"]
    assert second.told == [("writing", 10, "tensors"), (2, 0), (3, 0), *sizes[5:], "finish"]


def test_the_memory_of_every_tensor_is_given_back(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dropped, drop = [], Checkpoint.drop

    def note(checkpoint: Checkpoint, names: Sequence[str]) -> None:
        dropped.extend(names)
        drop(checkpoint, names)

    monkeypatch.setattr(Checkpoint, "drop", note)
    convert(source, tmp_path / "new", threads=2)
    with Checkpoint.open(source) as checkpoint:
        assert sorted(dropped) == sorted(checkpoint.tensors)


def test_a_file_is_on_the_disk_before_it_gets_its_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: dict[int, list[str]] = {}
    pwrite, fsync, rename = os.pwrite, os.fsync, Path.rename

    def note(what: str, inode: int) -> None:
        events.setdefault(inode, []).append(what)

    def noting_pwrite(descriptor: int, data: bytes, at: int) -> int:
        note("write", os.fstat(descriptor).st_ino)
        return pwrite(descriptor, data, at)

    def noting_fsync(descriptor: int) -> None:
        note("sync", os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def noting_rename(path: Path, to: Path) -> Path:
        note("rename", path.stat().st_ino)
        return rename(path, to)

    monkeypatch.setattr(os, "pwrite", noting_pwrite)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "rename", noting_rename)
    convert(source, tmp_path / "new")
    for name in SHARDS:
        assert events[(tmp_path / "new" / name).stat().st_ino][-3:] == ["write", "sync", "rename"]
    assert events[(tmp_path / "new").stat().st_ino][-2:] == ["sync", "rename"]  # an inode may have been another file's
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert events[(tmp_path / "new" / name).stat().st_ino][-1:] == ["sync"]


@pytest.mark.parametrize("overwritten", [False, True])
@pytest.mark.parametrize(
    ("step", "calls"),
    [
        ("os.posix_fallocate", 1),
        ("os.posix_fallocate", 3),
        ("os.pwrite", 1),
        ("os.pwrite", 8),
        ("os.fsync", 2),
        ("copy_small_files", 1),
        ("sync_folder", 2),
        ("put_in_place", 1),
    ],
)
def test_a_full_disk_leaves_what_was_there_and_says_how_much_is_needed(
    step: str, calls: int, overwritten: bool, source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch
):
    if overwritten:
        shutil.copytree(source, tmp_path / "new")
        (tmp_path / "new" / "notes.txt").write_text("of the old one")
    before = content(tmp_path)
    owner, name, seen = os if step.startswith("os.") else converting, step.removeprefix("os."), []
    function = getattr(owner, name)

    def fail(*arguments: object, **named: object) -> object:
        seen.append(name)
        if len(seen) >= calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*arguments, **named)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RecordError) as caught:
        convert(source, tmp_path / "new", overwrite=overwritten)
    assert content(tmp_path) == before
    assert names(tmp_path) == (["new"] if overwritten else [])
    needed = sum(len(each) for name, each in whole.items() if name.endswith(".safetensors"))
    for part in (str(tmp_path), "No space left on device. Nothing was changed there.", f"{needed / 1e9:.3g} GB free"):
        assert part in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("no"), UsageError("no"), MalformedFileError("no")])
@pytest.mark.parametrize("name", ["layer.0.down", "layer.2.down"])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_cannot_be_made_leaves_nothing(threads: int, name: str, error: Exception, source: Path, tmp_path: Path):
    with pytest.raises(type(error), match="no") as caught:
        convert(source, tmp_path / "out" / "new", make=Maker(name, error), threads=threads)
    assert caught.value is error
    assert content(tmp_path / "out") == {}
    assert names(tmp_path / "out") == []


def test_no_thread_writes_once_the_file_is_closed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its number may be that of another file by then."""
    begun, failed, closed, pwrite = threading.Event(), threading.Event(), [], os.pwrite

    def make(name: str, weights: torch.Tensor) -> list[torch.Tensor]:
        if name == "layer.0.down":
            assert begun.wait(10)
            failed.set()
            raise ValueError("no")
        begun.set()
        assert failed.wait(10)
        time.sleep(0.2)  # the main thread has the error by now
        return halves(weights)

    def note(descriptor: int, data: bytes, at: int) -> int:
        try:
            return pwrite(descriptor, data, at)
        except OSError as error:
            closed.append(error.errno)
            raise

    monkeypatch.setattr(os, "pwrite", note)
    with pytest.raises(ValueError, match="no"):
        convert(source, tmp_path / "new", make=make, threads=2)
    assert closed == []
    assert names(tmp_path) == []


@pytest.mark.parametrize("done", range(1, 11))
def test_the_same_run_goes_on_from_the_last_whole_shard(
    done: int, source: Path, whole: dict[str, bytes], tmp_path: Path
):
    """Whichever of its ten tensors was the last."""
    first, second = Maker(), Maker()
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", make=first, progress=Listener(interrupted_at=done))
    assert names(tmp_path) == [REST]
    convert(source, tmp_path / "new", make=second, threads=4)
    assert content(tmp_path / "new") == whole
    assert names(tmp_path) == ["new"]
    # The shards hold 2, 3 and 5 tensors. The last tensor of a shard is done before its file has its name.
    finished = {"layer.0.down", "layer.1.down"} if done > 5 else set()
    assert sorted(second.made) == sorted({"layer.0.down", "layer.1.down", "layer.2.down"} - finished)
    assert set(first.made) >= finished


def test_a_run_can_be_interrupted_again_and_again(source: Path, whole: dict[str, bytes], tmp_path: Path):
    made = []
    for _ in range(3):
        maker = Maker()
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "new", make=maker, progress=Listener(interrupted_at=6))
        made.append(maker.made)
    convert(source, tmp_path / "new")
    assert all(set(each) <= {"layer.2.down"} for each in made[1:])
    assert content(tmp_path / "new") == whole


def test_an_interrupted_maker_is_an_interruption(source: Path, whole: dict[str, bytes], tmp_path: Path):
    """Ctrl-C may reach any line."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", make=Maker("layer.2.down", KeyboardInterrupt()), threads=2)
    again = Maker()
    convert(source, tmp_path / "new", make=again)
    assert again.made == ["layer.2.down"]
    assert content(tmp_path / "new") == whole


@pytest.mark.parametrize("step", ["copy_small_files", "_write_texts", "sync_folder"])
def test_an_interruption_after_the_last_shard_makes_nothing_again(
    step: str, source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(converting, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "new")
    again = Maker()
    convert(source, tmp_path / "new", make=again)
    assert again.made == []
    assert content(tmp_path / "new") == whole


def test_what_is_at_the_target_stays_while_a_run_is_interrupted(source: Path, whole: dict[str, bytes], tmp_path: Path):
    shutil.copytree(source, tmp_path / "new")
    (tmp_path / "new" / "notes.txt").write_text("of the old one")
    before = content(tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", overwrite=True, progress=Listener(interrupted_at=6))
    assert content(tmp_path / "new") == before
    convert(source, tmp_path / "new", overwrite=True)
    assert content(tmp_path / "new") == whole
    assert names(tmp_path) == ["new"]


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.ENOSPC, "No space left on device")])
def test_an_error_after_an_interruption_leaves_nothing(error: Exception, source: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", progress=Listener(interrupted_at=6))
    with pytest.raises((ValueError, RecordError)):
        convert(source, tmp_path / "new", make=Maker("layer.2.down", error))
    assert names(tmp_path) == []


@pytest.mark.parametrize("changed", ["files", "recipe", "values"])
def test_another_request_starts_over(changed: str, source: Path, tmp_path: Path):
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    with pytest.raises(KeyboardInterrupt):
        convert(copy, tmp_path / "new", progress=Listener(interrupted_at=6))
    files, recipe = FILES, ""
    if changed == "files":
        files = {**FILES, "config.json": "{}"}
    elif changed == "recipe":
        recipe = "by other rules"
    else:  # same names and shapes
        tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(copy / SHARDS[1]).items()}
        save_file(tensors, copy / SHARDS[1])
    again = Maker()
    convert(copy, tmp_path / "new", make=again, files=files, recipe=recipe)
    assert sorted(again.made) == ["layer.0.down", "layer.1.down", "layer.2.down"]
    convert(copy, tmp_path / "whole", files=files, recipe=recipe)
    assert content(tmp_path / "new") == content(tmp_path / "whole")


def test_other_tensors_start_over(source: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", progress=Listener(interrupted_at=6))
    with Checkpoint.open(source) as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "new", {}, files=FILES)
    for file in SHARDS:
        found, stored = load_file(tmp_path / "new" / file), load_file(source / file)
        assert {name: raw(each) for name, each in found.items()} == {name: raw(each) for name, each in stored.items()}


def test_a_folder_that_no_run_left_is_refused_and_stays(source: Path, tmp_path: Path):
    (tmp_path / REST).mkdir()
    (tmp_path / REST / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"\.new\.partial is not a folder of an interrupted run"):
        convert(source, tmp_path / "new")
    assert content(tmp_path / REST) == {"notes.txt": b"mine"}
    assert not (tmp_path / "new").exists()


def test_an_empty_folder_and_one_without_a_shard_will_do(source: Path, whole: dict[str, bytes], tmp_path: Path):
    (tmp_path / REST).mkdir()
    convert(source, tmp_path / "new")
    (tmp_path / REST).mkdir()
    (tmp_path / REST / "superweights-partial.txt").write_text("")
    convert(source, tmp_path / "new", overwrite=True)
    assert content(tmp_path / "new") == whole


def test_a_file_in_the_place_of_the_folder_is_refused_and_stays(source: Path, tmp_path: Path):
    (tmp_path / REST).write_text("mine")
    with pytest.raises(RecordError, match="File exists"):
        convert(source, tmp_path / "new")
    assert (tmp_path / REST).read_text() == "mine"


def test_a_model_is_replaced_only_when_asked_and_as_a_whole(source: Path, tmp_path: Path):
    convert(source, tmp_path / "new", files={**FILES, "notes.json": "{}"})
    before, unused = content(tmp_path / "new"), Maker()
    with pytest.raises(UsageError, match="the folder is not empty"):
        convert(source, tmp_path / "new", make=unused)
    assert (content(tmp_path / "new"), unused.made) == (before, [])
    convert(source, tmp_path / "new", overwrite=True)
    assert content(tmp_path / "new") == {name: each for name, each in before.items() if name != "notes.json"}
    assert names(tmp_path) == ["new"]


def test_a_folder_without_a_model_is_never_replaced(source: Path, tmp_path: Path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no model, so it is not overwritten"):
        convert(source, tmp_path / "new", overwrite=True)
    assert content(tmp_path / "new") == {"notes.txt": b"mine"}


@pytest.mark.parametrize("place", [".", "inside", "inside/deeper", ".."])
def test_the_models_own_folder_is_never_written_to(place: str, source: Path):
    before = content(source.parent)
    with pytest.raises(UsageError, match="the model itself lies there"):
        convert(source, source / place, overwrite=True)
    assert content(source.parent) == before


def test_a_shard_that_is_cut_off(sharded: Path, tmp_path: Path):
    shard = sharded / "model-00002-of-00002.safetensors"
    with Checkpoint.open(sharded) as checkpoint:
        assert checkpoint.view("head").any()
        os.truncate(shard, 1_000_000)
        with pytest.raises(MalformedFileError, match="cannot be read to its end now"):
            convert_checkpoint(checkpoint, tmp_path / "new", halved(checkpoint), files=FILES, threads=2)
    with pytest.raises(MalformedFileError, match="truncated"):
        convert(sharded, tmp_path / "new")
    assert names(tmp_path) == ["sharded"]
