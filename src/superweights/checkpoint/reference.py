"""What a model is called: a directory, a name on the Hub, or a URL."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from superweights.errors import NotACheckpointError

_HUB_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_HUB_NAME = re.compile(rf"(?:{_HUB_PART}/)?{_HUB_PART}")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

Place = Literal["path", "hub", "url", "nowhere"]


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model by its name, and for the Hub a revision of it.

    Example:
        >>> ModelReference.parse("hf://allenai/OLMo-1B-0724-hf@main")
        ModelReference(name='allenai/OLMo-1B-0724-hf', revision='main')
    """

    name: str
    """A directory, a Hub name such as allenai/OLMo-1B-0724-hf, or a URL such as s3://bucket/model."""
    revision: str | None = None
    """A branch, tag or commit of a Hub repository; None is its main branch."""

    @classmethod
    def parse(cls, reference: "str | Path | ModelReference", *, revision: str | None = None) -> Self:
        """Takes what a caller has; `hf://` and `file://` become a Hub name and a path.

        Args:
            reference: a name, a path, or a reference, whose own revision holds unless `revision` is given.
            revision: a branch, tag or commit.
        """
        if isinstance(reference, ModelReference):
            return cls(reference.name, revision or reference.revision)
        name = str(reference)
        if name.startswith("file://"):
            return cls(name.removeprefix("file://"), revision)
        if name.startswith("hf://"):
            name, _, at = name.removeprefix("hf://").partition("@")
            return cls(name, revision or at or None)
        return cls(name, revision)

    @property
    def path(self) -> Path:
        """The name as a path, with `~` resolved."""
        return Path(self.name).expanduser()

    @property
    def place(self) -> Place:
        """Where the name leads; an existing path comes before the Hub, as in transformers."""
        if _URL.match(self.name):
            return "url"
        if self.name and self.path.exists():
            return "path"
        if self.name.lower().endswith(".gguf"):
            return "nowhere"
        hub_name = len(self.name) <= 96 and _HUB_NAME.fullmatch(self.name) and not self.name.endswith(".git")
        return "hub" if hub_name and "--" not in self.name and ".." not in self.name else "nowhere"

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} at revision {self.revision}"


def no_such_path(reference: ModelReference) -> NotACheckpointError:
    """The error for a name that leads nowhere."""
    return NotACheckpointError(
        f"There is no such path: {reference.name}. Give a directory with config.json and .safetensors files, a Hub "
        "name such as allenai/OLMo-1B-0724-hf, or a URL."
    )
