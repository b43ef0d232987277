"""The verb `index`: what papers and repositories say about super weights."""

from dataclasses import asdict, fields
from typing import Any

from superweights.cli.output import DEFAULT_OUTPUT, OutputSettings, cell_text, write_rows, write_table, write_text
from superweights.detection.published import (
    Conflict,
    PublishedWeight,
    ResidualChannels,
    conflicts_for,
    published_models,
    published_name,
    published_weights,
    residual_channels,
    usable_weights,
)


def index(model: str | None = None, /, *, output: OutputSettings = DEFAULT_OUTPUT) -> int:
    """Lists the published super weights: all models, or everything about one.

    A coordinate with a star is about a whole row, column, expert or model. Errata and false positives are listed with a
    status that says so; `--weights published` leaves them out.

    Args:
        model: Full name such as allenai/OLMo-1B-0724-hf, in any case, or its part after the slash. Without it, all models
            are listed with counts.
    """
    if model is not None:
        _show_model(published_name(model), output)
    elif output.format == "table":
        write_table(
            _model_rows(), title="Published super weights. `superweights index MODEL` lists those of one model."
        )
    else:
        write_rows(_model_rows(), format=output.format)
    return 0


def _model_rows() -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "entries": len(published_weights(model)),
            "usable_scalars": len(usable_weights(model)),
            "sources": len(_sources(model)),
            "residual_channel_records": len(residual_channels(model)),
            "conflicts": len(conflicts_for(model)),
        }
        for model in published_models()
    ]


def _sources(model: str) -> set[str]:
    return {entry.source for entry in published_weights(model)} | {entry.source for entry in residual_channels(model)}


def _show_model(model: str, output: OutputSettings) -> None:
    weights, channels, conflicts = published_weights(model), residual_channels(model), conflicts_for(model)
    if output.format != "table":
        rows = [_row("weight", entry) for entry in weights]
        rows += [_row("residual_channels", entry) for entry in channels]
        rows += [_row("conflict", entry) for entry in conflicts]
        write_rows(rows, format=output.format)
        return
    title = f"{model}: {len(weights) or 'no'} published {'entry' if len(weights) == 1 else 'entries'}"
    write_table([_weight_cells(entry) for entry in weights], title=title)
    if channels:
        write_text("\n")
        write_table([_channel_cells(entry) for entry in channels], title="Massive channels of the residual stream")
    for conflict in conflicts:
        sides = {"agree": conflict.agree, "disagree": conflict.disagree}
        said = "".join(f"\n  {side}: {'; '.join(sources)}" for side, sources in sides.items() if sources)
        write_text(f"\nConflict: {conflict.issue}{said}\n")


def _row(kind: str, entry: PublishedWeight | ResidualChannels | Conflict) -> dict[str, Any]:
    row = {"record": kind, **{field.name: getattr(entry, field.name) for field in fields(entry)}}
    if isinstance(entry, ResidualChannels):
        row["top_tokens"] = [asdict(token) for token in entry.top_tokens]
    return row


def _weight_cells(entry: PublishedWeight) -> dict[str, Any]:
    cells = ("value", "status", "effect", "note", "source")
    return {"coordinate": entry.coordinate_text, **{cell: getattr(entry, cell) for cell in cells}}


def _channel_cells(entry: ResidualChannels) -> dict[str, Any]:
    layers = "" if entry.onset_layer is None else f"{entry.onset_layer} to {cell_text(entry.last_layer) or '?'}"
    perplexity = {treatment: by_set["wikitext2"] for treatment, by_set in entry.perplexity.items()}
    return {
        "bos": entry.bos,
        "layers": layers,
        "max_abs_by_channel": entry.max_abs,
        "wikitext2_perplexity": perplexity,
        "note": entry.note,
        "source": entry.source,
    }
