"""The verb `quantize`: round a model's weights without losing its super weights, as files or only measured."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from superweights.cli.ablate import task_records
from superweights.cli.model_options import (
    DEFAULT_MODEL_OPTIONS,
    FILE,
    HYPHEN_ALLOWED,
    ModelOptions,
    add_warnings,
    check_targets,
    describe_model_run,
    open_model,
)
from superweights.cli.output import DEFAULT_OUTPUT, OutputSettings, write_text
from superweights.cli.quantize_tables import show_measured, show_written
from superweights.cli.text_options import DEFAULT_TEXT_OPTIONS, TextOptions, open_windows
from superweights.cli.weights_option import weights_of
from superweights.coordinates import Coordinate
from superweights.errors import UnknownNameError, UsageError
from superweights.progress import RichProgress
from superweights.quantization.scheme import Scheme
from superweights.results.records import NoteRecord, Record, Run
from superweights.results.store import STANDARD_STREAM, write_records

if TYPE_CHECKING:
    from superweights.experiments.quantization_budget import Allocation
    from superweights.interventions.conditions import QuantizeWeights
    from superweights.interventions.quantized_checkpoint import QuantizedCheckpoint
    from superweights.measurements.windows import Windows
    from superweights.model.loading import LoadedModel
    from superweights.quantization.clipping import Clip

_BLOCKS = ",".join(f"int4-block{side}x{side}-minmax" for side in (8, 64, 128, 256, 512, 1024))
"""The block sizes of the paper's figure 7 and of its appendix."""


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class QuantizeSettings:
    """What `quantize` does with the weights."""

    scheme: str | None = None
    """How weights are rounded: int4-g128 (the default), int8-row, int4-g64-asym, nf4-g64, int4-block512x512-minmax (the
    paper's) ... With --compare several, separated by commas (default: the paper's block sizes); with --activations the scheme
    of the weights (default: int8-tensor, the paper's)."""
    keep: Annotated[str, HYPHEN_ALLOWED, Parameter(metavar="WEIGHTS")] = "auto"
    """Which weights keep their value to the bit: auto (find the super weights first), none, published (from the index), a
    .jsonl file of `find` (- for stdin), or coordinates such as 2:3968:7003, separated by commas."""
    to: Annotated[Path | None, Parameter(metavar="DIR")] = None
    """Write the quantized model to this new folder."""
    overwrite: bool = False
    """Replace a model that is at --to already."""
    clip: Annotated[str | None, Parameter(metavar="HOW")] = None
    """Clip before rounding: z=9 (the paper's), signed-z=3, block-fraction=1e-4, tensor-fraction=1e-6, iqr=3, mse; auto (the z
    with the least error of all weights, no text needed) or auto-text (the z with the least KL on the last windows)."""
    amplify: float = 1.0
    """Multiply kept weights by this once they are back (the paper's appendix)."""
    measure: bool = False
    """Measure on text what rounding costs; without --to nothing is written."""
    compare: bool = False
    """The paper's figure 7: every scheme, plain, clipped, clipped with super weights kept, kept alone, and with the largest
    other weights kept instead."""
    methods: Annotated[str, Parameter(metavar="NAMES")] = "rtn,clip,clip+keep,keep,largest"
    """What --compare compares: of rtn, clip, clip+keep, keep, paper, largest."""
    largest: int = 0
    """How many weights of every matrix the method largest keeps; by default as many as there are super weights."""
    peers: Annotated[str | None, Parameter(metavar="NAMES")] = None
    """Quantize by other packages as well, with --measure or --compare, in 4 bits: of torchao, bitsandbytes, hqq, quanto,
    llmcompressor-rtn, llmcompressor-gptq, llmcompressor-awq, gptqmodel-rtn, gptqmodel-gptq, auto-round-rtn, auto-round,
    gguf-q4_0. Each
    has to be installed, best in an environment of its own; those that are calibrated are so on the last windows."""
    activations: bool = False
    """The paper's tables 3 to 5: weights and activations in 8 bits, plain, by SmoothQuant, and with super activations kept."""
    budget: Annotated[str | None, Parameter(metavar="BITS")] = None
    """Bits per weight, as 4.25 or 4.25bits: choose for every matrix between the scheme, 8 bits and no rounding by measured KL,
    super weights first."""
    tasks: Annotated[str | None, Parameter(metavar="NAMES")] = None
    """Zero-shot tasks as well, with --measure, --compare or --activations; see `ablate`. Needs `superweights[eval]`."""
    tasks_data: Path | None = None
    """Folder with the tasks as NAME.jsonl files, to run without a network."""
    limit: int | None = None
    """At most so many items of each task, the first ones."""
    threads: int | None = None
    """Matrices rounded at once when writing; by default one per core."""
    out: Annotated[str | None, FILE, HYPHEN_ALLOWED] = None
    """Write all records to this .jsonl file; - writes them to stdout in place of the table."""
    plot: Annotated[str | None, FILE] = None
    """Draw what was measured to this .png, .svg, .pdf or .html file."""

    @property
    def measures(self) -> bool:
        """Whether text is read."""
        return self.measure or self.compare or self.activations


@Parameter(name="*", negative=(), group="Activations (with --activations)")
@dataclass(frozen=True, slots=True)
class ActivationOptions:
    """How activations are rounded."""

    activation_bits: int = 8
    """Bits of an activation."""
    scales: Literal["token", "tensor", "static"] = "token"
    """What shares a scale: a token (the paper), all tokens of a sequence, or all there will ever be, from a calibration."""
    median: Literal["token", "tensor"] = "token"
    """What a super activation takes the median of meanwhile."""
    attention: bool = False
    """Round queries, keys, probabilities and values of attention too."""
    outputs: bool = False
    """Round what goes into the output projections of attention too; the paper does not list them."""
    alpha: float = 0.85
    """How much of the range SmoothQuant moves into weights, 0 to 1."""
    massive_ratio: float = 20.0
    """Largest |value| of an input over the median |value| of its token, from which it counts as a super activation."""


_DEFAULT_SETTINGS = QuantizeSettings()
_DEFAULT_ACTIVATIONS = ActivationOptions()


def quantize(
    model: str,
    /,
    *,
    settings: QuantizeSettings = _DEFAULT_SETTINGS,
    activations: ActivationOptions = _DEFAULT_ACTIVATIONS,
    text: TextOptions = DEFAULT_TEXT_OPTIONS,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Quantizes a model without losing its super weights: writes it with --to, or only measures.

    The files are those of compressed-tensors (pack-quantized), which transformers, vLLM and llm-compressor read. A matrix that
    holds a super weight stays as it is stored: exact, readable everywhere, a few percent of the bytes at most in a large model.
    Any model size goes through the memory of a few matrices; an interrupted run goes on where it was.

    Args:
        model: A directory, a Hub name or a URL.
    """
    _check(settings)
    check_targets(records=settings.out, charts=[settings.plot])
    progress = RichProgress()
    schemes = _schemes(settings)
    weights, how, records, run = _prepare(model, settings, activations, text, options, schemes, progress)
    written: QuantizedCheckpoint | None = None
    seconds = 0.0
    if settings.to is not None:
        started = time.perf_counter()
        written = _write(model, settings, options, how, weights, records, progress)
        seconds = time.perf_counter() - started
    try:
        _leave(settings, run, records, model)
    finally:  # a full disk must not cost the answer
        if settings.out != STANDARD_STREAM:
            if written is not None and settings.to is not None:
                show_written(written, model=model, to=settings.to, weights=weights, seconds=seconds, output=output)
            if records:
                show_measured(records, model=model, output=output)
    return 0


def _check(settings: QuantizeSettings) -> None:
    """Refuses requests that contradict themselves, before anything is read."""
    if settings.to is None and not settings.measures and settings.budget is None:
        raise UsageError(
            "Nothing to do: say where to write (--to DIR), or what to measure (--measure, --compare, --activations)."
        )
    if settings.compare and settings.activations:
        raise UsageError("--compare is about weights and --activations about activations: run one after the other.")
    if settings.to is not None and (settings.compare or settings.activations):
        raise UsageError(
            "--to writes one model, and --compare and --activations only measure: run one after the other."
        )
    if settings.tasks and not settings.measures:
        raise UsageError("--tasks measures: add --measure, --compare or --activations.")
    if settings.peers and not (settings.measure or settings.compare):
        raise UsageError("--peers are measured beside ours: add --measure or --compare.")
    if settings.plot is not None and not settings.measures:
        raise UsageError("--plot draws what was measured: add --measure, --compare or --activations.")


def _schemes(settings: QuantizeSettings) -> tuple[Scheme, ...]:
    default = _BLOCKS if settings.compare else "int8-tensor" if settings.activations else "int4-g128"
    found = tuple(Scheme.parse(each) for each in (settings.scheme or default).split(","))
    if len(found) > 1 and not settings.compare:
        raise UsageError(f"--scheme {settings.scheme} names {len(found)} schemes; only --compare takes several.")
    return found


def _prepare(
    model: str,
    settings: QuantizeSettings,
    activations: ActivationOptions,
    text: TextOptions,
    options: ModelOptions,
    schemes: tuple[Scheme, ...],
    progress: RichProgress,
) -> tuple[tuple[Coordinate, ...], "tuple[QuantizeWeights, ...]", list[Record], Run | None]:
    """Which weights are kept, what is done to all others, and what was measured; without a pass where none is needed."""
    from superweights.interventions.conditions import QuantizeWeights

    records: list[Record] = []
    tuned = settings.clip in ("auto", "auto-text")
    if settings.to is not None:
        _check_writable(model, settings, options, schemes[0])
    if settings.keep == "none" and not tuned and not settings.measures and settings.budget is None:
        return (), (QuantizeWeights(schemes[0], clip=_clip(settings.clip)),), records, None
    with open_model(model, options) as loaded:
        described = {**asdict(settings), "to": str(settings.to or ""), "tasks_data": str(settings.tasks_data or "")}
        run = describe_model_run(
            loaded, options, command=sys.argv, settings={**described, **asdict(activations), **asdict(text)}
        )
        weights = () if settings.keep == "none" else weights_of(settings.keep, loaded, options, progress)
        if not weights and settings.keep != "none":
            records.append(NoteRecord(level="info", text=f"No super weight candidate in {model}: nothing is kept."))
        windows = open_windows(loaded, text) if settings.measures or settings.budget or tuned else None
        clip, windows = _tuned(loaded, settings, schemes[0], weights, windows, records, progress)
        how: tuple[QuantizeWeights, ...] = (
            QuantizeWeights(schemes[0], clip=clip, keep=weights, amplify=settings.amplify),
        )
        if settings.budget is not None and windows is not None:
            how, windows = _allocated(loaded, settings, schemes[0], weights, clip, windows, records, progress)
        if settings.measures and windows is not None:
            _measure(loaded, settings, activations, schemes, weights, how, clip, windows, records, progress)
        run = add_warnings(run, loaded)
    return weights, how, records, run


def _check_writable(model: str, settings: QuantizeSettings, options: ModelOptions, scheme: Scheme) -> None:
    """What would stop the writing shows before the forward pass that finds super weights."""
    from superweights.checkpoint import Checkpoint, ModelReference
    from superweights.checkpoint.copying import check_target
    from superweights.interventions.conditions import QuantizeWeights
    from superweights.interventions.quantized_checkpoint import plan_quantized_checkpoint

    with Checkpoint.open(ModelReference.parse(model, revision=options.revision)) as checkpoint:
        plan_quantized_checkpoint(checkpoint, [QuantizeWeights(scheme)])
        check_target(checkpoint, Path(settings.to or "").expanduser().resolve(), overwrite=settings.overwrite)


def _clip(text: str | None) -> "Clip | None":
    from superweights.quantization.clipping import Clip

    return None if text is None else Clip.parse(text)


def _tuned(
    loaded: "LoadedModel",
    settings: QuantizeSettings,
    scheme: Scheme,
    weights: Sequence[Coordinate],
    windows: "Windows | None",
    records: list[Record],
    progress: RichProgress,
) -> "tuple[Clip | None, Windows | None]":
    """The clip, tuned where that is asked; windows that tuned it are no longer scored."""
    from superweights.experiments.activation_quantization import split_windows
    from superweights.experiments.weight_quantization import tuned_clip

    if settings.clip not in ("auto", "auto-text"):
        return _clip(settings.clip), windows
    aside = None
    if settings.clip == "auto-text" and windows is not None:
        windows, ids = split_windows(windows)
        aside = replace(windows, ids=ids)
    clip, tried = tuned_clip(loaded, scheme, weights, windows=aside, progress=progress)
    records += tried
    records.append(NoteRecord(level="info", text=f"Clip chosen for {scheme}: {clip}."))
    return clip, windows


def _allocated(
    loaded: "LoadedModel",
    settings: QuantizeSettings,
    scheme: Scheme,
    weights: Sequence[Coordinate],
    clip: "Clip | None",
    windows: "Windows",
    records: list[Record],
    progress: RichProgress,
) -> "tuple[tuple[QuantizeWeights, ...], Windows]":
    from superweights.experiments.activation_quantization import split_windows
    from superweights.experiments.quantization_budget import allocate

    scored, ids = split_windows(windows)
    found: Allocation = allocate(
        loaded,
        replace(windows, ids=ids),
        weights,
        scheme,
        budget=_bits(str(settings.budget)),
        clip=clip,
        progress=progress,
    )
    ways: dict[str, list[str]] = {}
    for each in found.choices:
        ways.setdefault(each.what, []).append(each.tensor.removesuffix(".weight"))
    parts = "; ".join(
        f"{what}: {len(names)} ({', '.join(names) if len(names) <= 8 else '...'})" for what, names in ways.items()
    )
    records.append(
        NoteRecord(
            level="info", text=f"{found.bits_per_weight:.4g} of {found.budget:g} bits per weight are used. {parts}."
        )
    )
    return found.how(weights), scored


def _bits(text: str) -> float:
    try:
        return float(text.removesuffix("bits").strip())
    except ValueError as error:
        raise UsageError(f"--budget {text} is no number of bits per weight. Write 4.25 or 4.25bits.") from error


def _measure(
    loaded: "LoadedModel",
    settings: QuantizeSettings,
    activations: ActivationOptions,
    schemes: tuple[Scheme, ...],
    weights: Sequence[Coordinate],
    how: "tuple[QuantizeWeights, ...]",
    clip: "Clip | None",
    windows: "Windows",
    records: list[Record],
    progress: RichProgress,
) -> None:
    """Adds what was measured."""
    from superweights.experiments import activation_quantization as w8a8
    from superweights.experiments.evaluation import evaluate
    from superweights.experiments.weight_quantization import (
        DEFAULT_CLIP,
        Comparison,
        bits_record,
        compare_weight_quantization,
        conditions_of,
    )
    from superweights.interventions.conditions import ORIGINAL, Condition

    if settings.activations:
        scored, calibration = w8a8.split_windows(windows)
        chosen = w8a8.ActivationSettings(
            schemes[0],
            activations.activation_bits,
            activations.scales,
            activations.median,
            activations.attention,
            activations.outputs,
            activations.alpha,
            activations.massive_ratio,
        )
        conditions = w8a8.activation_conditions(loaded, calibration, chosen)
        records += w8a8.compare_activation_quantization(loaded, scored, conditions, progress=progress)
        records += task_records(loaded, settings, conditions.conditions, progress)
        return
    if settings.compare:
        comparison = Comparison(
            schemes, tuple(settings.methods.split(",")), clip or DEFAULT_CLIP, settings.largest, settings.amplify
        )
        made_of = conditions_of(comparison, weights)  # a wrong name shows before a peer starts
        peers, windows = _peer_records(loaded, settings, windows)
        records += compare_weight_quantization(loaded, windows, weights, comparison, progress=progress)
        records += peers
        records += task_records(loaded, settings, made_of, progress)
        return
    peers, windows = _peer_records(loaded, settings, windows)
    plain = Condition(f"{schemes[0]}, rtn", (replace(how[0], clip=None, keep=(), amplify=1.0, only=None),))
    made = Condition(_name(settings, schemes[0], weights, clip), how)
    conditions_made = [ORIGINAL, plain] if made.interventions == plain.interventions else [ORIGINAL, plain, made]
    records += evaluate(loaded, windows, conditions_made, progress=progress).records()
    records += (bits_record(loaded, each) for each in conditions_made[1:])
    records += peers
    records += task_records(loaded, settings, conditions_made, progress)


def _peer_records(
    loaded: "LoadedModel", settings: QuantizeSettings, windows: "Windows"
) -> "tuple[list[Record], Windows]":
    """What other packages' models score, and the windows that none of them was calibrated on."""
    from superweights.experiments.activation_quantization import split_windows
    from superweights.integrations.peers import PEERS, peer_records

    names = settings.peers.split(",") if settings.peers else []
    for name in names:
        if name not in PEERS:
            raise UnknownNameError.among("peer", name, PEERS)
    if not names:
        return [], windows
    scored, calibration = split_windows(windows)
    return [record for name in names for record in peer_records(name, loaded, scored, calibration)], scored


def _name(settings: QuantizeSettings, scheme: Scheme, weights: Sequence[Coordinate], clip: "Clip | None") -> str:
    if settings.budget is not None:
        return f"{scheme}, budget {_bits(settings.budget):g} bits"
    parts = [f"clip {clip}" if clip else "", "keep" if weights else "", f"x {settings.amplify:g}" if weights else ""]
    return f"{scheme}, {' + '.join(each for each in parts if each and each != 'x 1') or 'rtn'}"


def _write(
    model: str,
    settings: QuantizeSettings,
    options: ModelOptions,
    how: "tuple[QuantizeWeights, ...]",
    weights: Sequence[Coordinate],
    records: Sequence[Record],
    progress: RichProgress,
) -> "QuantizedCheckpoint":
    from superweights.checkpoint import ModelReference
    from superweights.cli.model_card import card_of, settings_of
    from superweights.interventions.quantized_checkpoint import quantize_checkpoint

    assert settings.to is not None
    return quantize_checkpoint(
        ModelReference.parse(model, revision=options.revision),
        settings.to,
        how,
        settings=settings_of(model, how),
        card=card_of(model, how, records),
        overwrite=settings.overwrite,
        threads=settings.threads,
        progress=progress,
    )


def _leave(settings: QuantizeSettings, run: Run | None, records: Sequence[Record], model: str) -> None:
    from superweights.report.saving import save_chart

    if settings.out is not None:
        if run is None:
            write_text("Nothing was measured, so there are no records.\n")
        else:
            write_records(settings.out, run, records)
    if settings.plot is None:
        return
    if settings.activations:
        from superweights.report.activation_quantization import activation_quantization_chart as chart

        title = "Rounding activations"
    else:
        from superweights.report.weight_quantization import weight_quantization_chart as chart

        title = "Rounding weights"
    save_chart(chart(records, title=title, model=model), settings.plot)
