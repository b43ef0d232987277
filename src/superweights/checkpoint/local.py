"""Opens a model that is a directory on this machine."""

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from superweights.checkpoint.mapped import MappedFile, close_files
from superweights.checkpoint.reference import ModelReference
from superweights.checkpoint.shards import Shards, choose_shards, is_one_of_many
from superweights.errors import NotACheckpointError


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where a checkpoint's bytes come from."""

    directory: Path
    """The local directory with config.json and the tokenizer's files."""
    revision: str | None
    """The commit, for a model of the Hub."""
    shards: Shards
    """Which files hold weights."""
    files: Mapping[str, MappedFile]
    """Those files, opened, by their names."""
    pool: Executor | None = None
    """The threads that fetch, for remote files."""

    def close(self) -> None:
        """Ends running transfers and closes the files."""
        close_files(self.files.values(), self.pool)


def directory_source(reference: ModelReference) -> WeightSource:
    """Opens a directory, or a single .safetensors file that has its config.json beside it.

    Raises:
        NotACheckpointError: there is no model at the path.
    """
    path = reference.path
    if path.is_dir():
        return open_directory(path, find_shards(path))
    if path.suffix.lower() == ".gguf":
        raise NotACheckpointError(
            f"{path} is a GGUF file, and this needs a safetensors checkpoint. GGUF files are read by `find`, `show`, `audit` "
            "and all verbs that only run a model."
        )
    if path.suffix != ".safetensors":
        raise NotACheckpointError(
            f"{path} is a file, not a model. Give the directory that holds config.json and the .safetensors files."
        )
    if is_one_of_many(path.name):
        raise NotACheckpointError(f"{path} is one shard of several. Give its directory {path.parent}.")
    _require_config(path.parent)
    return open_directory(path.parent, Shards((path.name,)))


def open_directory(directory: Path, shards: Shards, *, revision: str | None = None) -> WeightSource:
    """Opens the weight files of a directory whose shards are known."""
    files = {name: MappedFile(directory / name, name=name) for name in shards.files}
    return WeightSource(directory, revision, shards, files)


def find_shards(directory: Path) -> Shards:
    """Which files of a directory hold its weights; the errors are those of `choose_shards`."""
    _require_config(directory)
    names = {each.relative_to(directory).as_posix() for each in directory.iterdir() if each.is_file()}
    index = [name for name in names if name.endswith(".index.json")]
    if index:  # an index may name shards in folders below
        names |= {each.relative_to(directory).as_posix() for each in directory.rglob("*.safetensors") if each.is_file()}
    return choose_shards(names, lambda name: (directory / name).read_bytes(), where=str(directory))


def _require_config(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        found = sorted(each.name for each in directory.iterdir())
        gguf = next((each for each in found if each.lower().endswith(".gguf")), None)
        advice = f" Give the file, such as {directory / gguf}." if gguf else ""
        raise NotACheckpointError(
            f"{directory} is not a model: it has no config.json. Found: {', '.join(found[:8]) or 'nothing'}.{advice}"
        )
