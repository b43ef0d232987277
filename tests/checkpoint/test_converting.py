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


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three shards of several dtypes, some of odd sizes, with an index. Nothing in the first shard is replaced by `halved`."""
    directory = tmp_path / "source"
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


class Interruption:
    """A listener that is interrupted when so many tensors are done."""

    def __init__(self, at: int) -> None:
        self.left = at

    def start(self, task: str, *, total: int | None, unit: str) -> None:
        pass

    def advance(self, steps: int = 1, *, nbytes: int = 0) -> None:
        self.left -= steps
        if self.left <= 0:
            raise KeyboardInterrupt

    def finish(self) -> None:
        pass


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
def test_threads_make_no_difference(threads: int, source: Path, tmp_path: Path):
    convert(source, tmp_path / "one", threads=1)
    convert(source, tmp_path / "several", threads=threads)
    assert content(tmp_path / "one") == content(tmp_path / "several")


def test_pieces_short_writes_and_early_syncs_make_no_difference(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    convert(source, tmp_path / "one")
    monkeypatch.setattr(converting, "_COPY_BYTES", 501)
    monkeypatch.setattr(converting, "_SYNC_BYTES", 1)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: pwrite(descriptor, data[:200], at))
    convert(source, tmp_path / "other")
    assert content(tmp_path / "one") == content(tmp_path / "other")


def test_where_room_cannot_be_reserved_the_file_grows(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert(source, tmp_path / "one")

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    convert(source, tmp_path / "other")
    monkeypatch.delattr(os, "posix_fallocate")
    convert(source, tmp_path / "third")
    assert content(tmp_path / "one") == content(tmp_path / "other") == content(tmp_path / "third")


def test_from_the_hub(hub: LocalHub, sharded: Path, tmp_path: Path):
    convert(sharded, tmp_path / "local")
    with Checkpoint.open("acme/tiny") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "new", halved(checkpoint), files=FILES, threads=2)
    assert content(tmp_path / "new") == content(tmp_path / "local")


def test_from_a_url(source: Path, tmp_path: Path):
    convert(source, tmp_path / "local")
    memory = fsspec.filesystem("memory")
    memory.put(f"{source}/", "/converted/tiny", recursive=True)
    try:
        with Checkpoint.open("memory://converted/tiny", cache_dir=tmp_path / "cache") as checkpoint:
            convert_checkpoint(checkpoint, tmp_path / "new", halved(checkpoint), files=FILES, threads=2)
    finally:
        memory.rm("/converted", recursive=True)
    assert content(tmp_path / "new") == content(tmp_path / "local")


def test_progress_counts_every_tensor_and_its_bytes(source: Path, tmp_path: Path):
    told: list[object] = []

    class Listener:
        def start(self, task: str, *, total: int | None, unit: str) -> None:
            told.append((task, total, unit))

        def advance(self, steps: int = 1, *, nbytes: int = 0) -> None:
            told.append(nbytes)

        def finish(self) -> None:
            told.append("finish")

    convert(source, tmp_path / "new", progress=Listener())
    with Checkpoint.open(source) as checkpoint:
        sizes = [entry.nbytes for entry in checkpoint.tensors.values()]
    assert told == [("writing", len(sizes), "tensors"), *sizes, "finish"]


@pytest.mark.parametrize("overwritten", [False, True])
@pytest.mark.parametrize(
    "step", ["os.posix_fallocate", "os.pwrite", "os.fsync", "copy_small_files", "sync_folder", "put_in_place"]
)
@pytest.mark.parametrize("calls", [1, 2])
def test_a_full_disk_leaves_what_was_there_and_says_how_much_is_needed(
    calls: int, step: str, overwritten: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    out.mkdir()
    if overwritten:
        shutil.copytree(source, out / "new")
        (out / "new" / "notes.txt").write_text("of the old one")
    needed = convert(source, tmp_path / "whole")
    before = content(out)
    owner = os if step.startswith("os.") else converting
    name, seen = step.removeprefix("os."), []
    whole = getattr(owner, name)

    def fail(*arguments: object, **named: object) -> object:
        seen.append(name)
        if len(seen) >= calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(*arguments, **named)

    monkeypatch.setattr(owner, name, fail)
    if calls > 1 and step in ("copy_small_files", "put_in_place"):
        convert(source, out / "new", overwrite=overwritten)  # called once only
        return
    with pytest.raises(RecordError) as caught:
        convert(source, out / "new", overwrite=overwritten)
    assert content(out) == before
    assert names(out) == (["new"] if overwritten else [])
    for part in (
        str(out / "new"),
        "No space left on device. Nothing was changed there.",
        f"{needed / 1e9:.3g} GB free",
    ):
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
    assert names(tmp_path) == ["source"]


@pytest.fixture(params=range(1, 11))
def interruption(request: pytest.FixtureRequest) -> Interruption:
    """After each of the ten tensors."""
    return Interruption(request.param)


def test_the_same_run_goes_on_from_the_last_whole_shard(interruption: Interruption, source: Path, tmp_path: Path):
    convert(source, tmp_path / "whole")
    done = interruption.left
    first, second = Maker(), Maker()
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", make=first, progress=interruption)
    assert names(tmp_path) == [REST, "source", "whole"]
    convert(source, tmp_path / "new", make=second, threads=4)
    assert content(tmp_path / "new") == content(tmp_path / "whole")
    assert names(tmp_path) == ["new", "source", "whole"]
    # The shards hold 2, 3 and 5 tensors. The last tensor of a shard is done before its file has its name.
    finished = {"layer.0.down", "layer.1.down"} if done > 5 else set()
    assert sorted(second.made) == sorted({"layer.0.down", "layer.1.down", "layer.2.down"} - finished)
    assert set(first.made) >= finished


def test_a_run_can_be_interrupted_again_and_again(source: Path, tmp_path: Path):
    convert(source, tmp_path / "whole")
    made = []
    for _ in range(3):
        maker = Maker()
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "new", make=maker, progress=Interruption(6))
        made.append(maker.made)
    convert(source, tmp_path / "new")
    assert all(set(each) <= {"layer.2.down"} for each in made[1:])
    assert content(tmp_path / "new") == content(tmp_path / "whole")


def test_an_interrupted_maker_is_an_interruption(source: Path, tmp_path: Path):
    """Ctrl-C may reach any line."""
    convert(source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", make=Maker("layer.2.down", KeyboardInterrupt()), threads=2)
    again = Maker()
    convert(source, tmp_path / "new", make=again)
    assert again.made == ["layer.2.down"]
    assert content(tmp_path / "new") == content(tmp_path / "whole")


@pytest.mark.parametrize("step", ["copy_small_files", "_write_texts", "sync_folder"])
def test_an_interruption_after_the_last_shard_makes_nothing_again(
    step: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    convert(source, tmp_path / "whole")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(converting, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "new")
    again = Maker()
    convert(source, tmp_path / "new", make=again)
    assert again.made == []
    assert content(tmp_path / "new") == content(tmp_path / "whole")


def test_what_is_at_the_target_stays_while_a_run_is_interrupted(source: Path, tmp_path: Path):
    convert(source, tmp_path / "whole")
    shutil.copytree(source, tmp_path / "new")
    (tmp_path / "new" / "notes.txt").write_text("of the old one")
    before = content(tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", overwrite=True, progress=Interruption(6))
    assert content(tmp_path / "new") == before
    convert(source, tmp_path / "new", overwrite=True)
    assert content(tmp_path / "new") == content(tmp_path / "whole")
    assert names(tmp_path) == ["new", "source", "whole"]


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.ENOSPC, "No space left on device")])
def test_an_error_after_an_interruption_leaves_nothing(error: Exception, source: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", progress=Interruption(6))
    with pytest.raises((ValueError, RecordError)):
        convert(source, tmp_path / "new", make=Maker("layer.2.down", error))
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("changed", ["files", "recipe", "values"])
def test_another_request_starts_over(changed: str, source: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", progress=Interruption(6))
    files, recipe = FILES, ""
    if changed == "files":
        files = {**FILES, "config.json": "{}"}
    elif changed == "recipe":
        recipe = "by other rules"
    else:  # same names and shapes
        tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(source / SHARDS[1]).items()}
        save_file(tensors, source / SHARDS[1])
    again = Maker()
    convert(source, tmp_path / "new", make=again, files=files, recipe=recipe)
    assert sorted(again.made) == ["layer.0.down", "layer.1.down", "layer.2.down"]
    convert(source, tmp_path / "whole", files=files, recipe=recipe)
    assert content(tmp_path / "new") == content(tmp_path / "whole")


def test_other_tensors_start_over(source: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", progress=Interruption(6))
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


def test_an_empty_folder_and_one_without_a_shard_will_do(source: Path, tmp_path: Path):
    convert(source, tmp_path / "whole")
    (tmp_path / REST).mkdir()
    convert(source, tmp_path / "new")
    (tmp_path / REST).mkdir()
    (tmp_path / REST / "superweights-partial.txt").write_text("")
    convert(source, tmp_path / "new", overwrite=True)
    assert content(tmp_path / "new") == content(tmp_path / "whole")


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
    assert names(tmp_path) == ["new", "source"]


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
