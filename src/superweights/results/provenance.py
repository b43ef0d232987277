"""How the numbers were made: fills in the `Run` line without importing what it names."""

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from superweights import __version__
from superweights.results.records import Run


def describe_run(
    *,
    command: Sequence[str],
    model: str,
    storage_dtype: str,
    compute_dtype: str,
    residency: Literal["resident", "streamed"] | None,
    device: str,
    revision: str | None = None,
    digest: str | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> Run:
    """The first line of a result file; its fields are those of `Run`.

    Versions and the start time are filled in here, so call it when the work starts. `Run.model_copy(update=...)` adds
    what is known only later, such as warnings.
    """
    return Run(
        command=tuple(_as_unicode(argument) for argument in command),
        model=_as_unicode(model),
        revision=revision,
        digest=digest,
        storage_dtype=storage_dtype,
        compute_dtype=compute_dtype,
        residency=residency,
        device=device,
        seed=seed,
        settings=dict(settings or {}),
        versions=software_versions(),
        started=datetime.now(UTC).replace(microsecond=0),
        warnings=tuple(warnings),
    )


def software_versions() -> dict[str, str]:
    """Versions of superweights, torch, transformers and python, and the platform."""
    return {
        "superweights": __version__,
        "torch": _installed("torch"),
        "transformers": _installed("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _as_unicode(text: str) -> str:
    """Replaces the bytes of a path that are not UTF-8, which Python carries as lone surrogates and JSON cannot."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
