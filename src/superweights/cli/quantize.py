"""The verb `quantize`: round a model's weights without losing its super weights, as files or only measured."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from superweights.checkpoint import Checkpoint, ModelReference
from superweights.checkpoint.copying import check_target
from superweights.checkpoint.gguf_writing import WRITTEN_KINDS
from superweights.cli.model_card import card_of, settings_of
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
from superweights.cli.quantize_gguf import GgufSettings, is_gguf, quantize_gguf
from superweights.cli.quantize_tables import show_measured, show_written
from superweights.cli.task_options import DEFAULT_TASK_OPTIONS, TaskOptions, task_records
from superweights.cli.text_options import DEFAULT_TEXT_OPTIONS, TextOptions, open_windows
from superweights.cli.weights_option import weights_of
from superweights.coordinates import Coordinate
from superweights.errors import UnknownNameError, UsageError
from superweights.experiments.activation_quantization import (
    ActivationSettings,
    activation_conditions,
    compare_activation_quantization,
)
from superweights.experiments.evaluation import evaluate
from superweights.experiments.quantization_budget import Allocation, allocate
from superweights.experiments.weight_quantization import (
    DEFAULT_CLIP,
    Comparison,
    bits_record,
    compare_weight_quantization,
    conditions_of,
    tuned_clip,
)
from superweights.integrations.peers import PEERS, peer_records
from superweights.interventions.conditions import ORIGINAL, Condition, QuantizeWeights
from superweights.interventions.quantized_checkpoint import (
    KeepIn,
    QuantizedCheckpoint,
    plan_quantized_checkpoint,
    quantize_checkpoint,
)
from superweights.measurements.windows import Windows, split_windows
from superweights.model.loading import LoadedModel
from superweights.progress import RichProgress
from superweights.quantization.clipping import Clip
from superweights.quantization.scheme import Scheme
from superweights.results.records import NoteRecord, Record, Run
from superweights.results.store import STANDARD_STREAM, write_records

_BLOCKS = ",".join(f"int4-block{side}x{side}-minmax" for side in (8, 64, 128, 256, 512, 1024))
"""The block sizes of the paper's figure 7 and of its appendix."""


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class QuantizeSettings:
    """What `quantize` does with the weights."""

    scheme: str | None = None
    """How weights are rounded: int4-g128 (the default), int8-row, int4-g64-asym, nf4-g64, int4-block512x512-minmax (the
    paper's) ... For a .gguf file a type of llama.cpp: q4_0 (the default), q4_1, q5_0, q5_1, q8_0, f16 ... With --compare
    several, separated by commas (default: the paper's block sizes); with --activations the scheme of the weights (default:
    int8-tensor, the paper's)."""
    keep: Annotated[str, HYPHEN_ALLOWED, Parameter(metavar="WEIGHTS")] = "auto"
    """Which weights keep their value to the bit: auto (find the super weights first), none, published (from the index), a
    .jsonl file of `find` (- for stdin), or coordinates such as 2:3968:7003, separated by commas."""
    keep_in: KeepIn = "plain"
    """How kept weights are exact in the files. plain: their whole matrix stays as it is stored, and every reader gets them.
    adapter: all matrices are packed, and a LoRA in DIR/adapter adds the weights: kilobytes that have to be loaded. int8: their
    matrix is packed in 8 bits, where the largest weight of a group is exact and its neighbours are coarse."""
    kept_type: str | None = None
    """In a .gguf file, the type of tensors that hold a kept weight, such as q8_0; by default f16, or what holds it exactly."""
    to: Annotated[Path | None, Parameter(metavar="TARGET")] = None
    """Write the quantized model to this new folder, for transformers and vLLM, or to this new .gguf file, for llama.cpp."""
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
    gguf-q4_0. Each has to be installed, best in an environment of its own; those that are calibrated are so on the last
    windows."""
    activations: bool = False
    """The paper's tables 3 to 5: weights and activations in 8 bits, plain, by SmoothQuant, and with super activations kept."""
    budget: Annotated[str | None, Parameter(metavar="BITS")] = None
    """Bits per weight, as 4.25 or 4.25bits: choose for every matrix between the scheme, 8 bits and no rounding by measured KL,
    super weights first."""
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


_DEFAULT_SETTINGS = QuantizeSettings()
_DEFAULT_ACTIVATIONS = Parameter(name="*", negative=(), group="Activations (with --activations)")(ActivationSettings)()


@dataclass(frozen=True, slots=True)
class _Request:
    """What the command line asks."""

    model: str
    settings: QuantizeSettings
    activations: ActivationSettings
    tasks: TaskOptions
    text: TextOptions
    options: ModelOptions
    schemes: tuple[Scheme, ...]

    @property
    def reference(self) -> ModelReference:
        """The model that is quantized."""
        return ModelReference.parse(self.model, revision=self.options.revision)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is done to the weights, and what led there."""

    how: tuple[QuantizeWeights, ...]
    weights: tuple[Coordinate, ...] = ()
    """Those that are kept."""
    records: tuple[Record, ...] = ()
    run: Run | None = None
    """How the records were made; None where no pass was run."""


def quantize(
    model: str,
    /,
    *,
    settings: QuantizeSettings = _DEFAULT_SETTINGS,
    activations: ActivationSettings = _DEFAULT_ACTIVATIONS,
    tasks: TaskOptions = DEFAULT_TASK_OPTIONS,
    text: TextOptions = DEFAULT_TEXT_OPTIONS,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Quantizes a model without losing its super weights: writes it with --to, or only measures.

    A name that ends in .gguf gives one file for llama.cpp; the source may then be a .gguf file as well. Any other is a folder
    in the layout of compressed-tensors (pack-quantized), which transformers, vLLM and llm-compressor read. A matrix that holds
    a super weight stays as it is stored: exact, readable everywhere, a few percent of the bytes at most in a large model;
    --keep-in has two other ways. Any model size goes through the memory of a few matrices; an interrupted run goes on where it
    was.

    Args:
        model: A directory, a Hub name or a URL.
    """
    _check(settings, tasks, options)
    check_targets(records=settings.out, charts=[settings.plot])
    progress = RichProgress()
    if settings.to is not None and is_gguf(settings.to):
        _check_gguf(settings, tasks)
        file = GgufSettings(settings.to, settings.scheme, settings.kept_type, settings.overwrite, settings.threads)
        return quantize_gguf(model, settings.keep, file, options, progress, output)
    request = _Request(model, settings, activations, tasks, text, options, _schemes(settings))
    plan = _prepare(request, progress)
    started = time.perf_counter()
    written = None if settings.to is None else _write(request, settings.to, plan, progress)
    seconds = time.perf_counter() - started
    try:
        _leave(settings, plan, model)
    finally:  # a full disk must not cost the answer
        if settings.out != STANDARD_STREAM:
            if written is not None and settings.to is not None:
                show_written(written, model=model, to=settings.to, weights=plan.weights, seconds=seconds, output=output)
            if plan.records:
                show_measured(plan.records, model=model, output=output)
    return 0


def _check(settings: QuantizeSettings, tasks: TaskOptions, options: ModelOptions) -> None:
    """Refuses requests that contradict themselves, before anything is read."""
    if settings.to is not None and options.nonfinite == "zero":
        raise UsageError(
            "--nonfinite zero is for passes: no file is written of NaN and infinite weights. Repair the model first."
        )
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
    if settings.kept_type is not None and (settings.to is None or not is_gguf(settings.to)):
        raise UsageError(
            "--kept-type is about .gguf files (--to NAME.gguf); other files keep such a matrix as it is stored."
        )
    if settings.keep_in != "plain" and (settings.to is None or settings.budget is not None):
        why = "--budget leaves matrices with super weights as they are stored" if settings.budget else "add --to DIR"
        raise UsageError(f"--keep-in {settings.keep_in} is about files: {why}.")
    if tasks.tasks and not settings.measures:
        raise UsageError("--tasks measures: add --measure, --compare or --activations.")
    if settings.peers and not (settings.measure or settings.compare):
        raise UsageError("--peers are measured beside ours: add --measure or --compare.")
    if settings.plot is not None and not settings.measures:
        raise UsageError("--plot draws what was measured: add --measure, --compare or --activations.")


def _check_gguf(settings: QuantizeSettings, tasks: TaskOptions) -> None:
    """Refuses what a GGUF file does not go with."""
    named = {
        "--measure": settings.measures or settings.peers is not None or bool(tasks.tasks),
        "--clip": settings.clip is not None,
        "--amplify": settings.amplify != 1,
        "--budget": settings.budget is not None,
        "--out": settings.out is not None,
    }
    if settings.keep_in != "plain":
        raise UsageError(
            f"--keep-in {settings.keep_in} is about folders of compressed-tensors. In a .gguf file --kept-type says how the "
            "tensor of a kept weight is stored; `superweights adapter` makes an adapter for a file that exists."
        )
    fault = next((option for option, asked in named.items() if asked), None)
    if fault is not None:
        raise UsageError(
            f"{fault} does not go with a .gguf target: the blocks are llama.cpp's. Write the file, then `superweights audit "
            f"{settings.to} --original MODEL` measures what it costs."
        )


def _schemes(settings: QuantizeSettings) -> tuple[Scheme, ...]:
    default = _BLOCKS if settings.compare else "int8-tensor" if settings.activations else "int4-g128"
    if settings.to is not None and str(settings.scheme).upper() in WRITTEN_KINDS:
        raise UsageError(f"{settings.scheme} is a type of llama.cpp's files: name the target {settings.to}.gguf.")
    found = tuple(Scheme.parse(each) for each in (settings.scheme or default).split(","))
    if len(found) > 1 and not settings.compare:
        raise UsageError(f"--scheme {settings.scheme} names {len(found)} schemes; only --compare takes several.")
    return found


def _prepare(request: _Request, progress: RichProgress) -> _Plan:
    """Which weights are kept, what is done to all others, and what was measured; without a pass where none is needed."""
    settings, scheme = request.settings, request.schemes[0]
    tuned = settings.clip in ("auto", "auto-text")
    if settings.to is not None:
        _check_writable(request, settings.to)
    if settings.keep == "none" and not tuned and not settings.measures and settings.budget is None:
        return _Plan((QuantizeWeights(scheme, clip=_clip(settings.clip)),))
    with open_model(request.model, request.options) as loaded:
        described = {**asdict(settings), "to": str(settings.to or ""), **request.tasks.described()}
        described |= {**asdict(request.activations), **asdict(request.text)}
        run = describe_model_run(loaded, request.options, command=sys.argv, settings=described)
        weights: tuple[Coordinate, ...] = ()
        records: list[Record] = []
        if settings.keep != "none":
            weights = weights_of(settings.keep, loaded, request.options, progress)
            none = f"No super weight candidate in {request.model}: nothing is kept."
            records += [] if weights else [NoteRecord(level="info", text=none)]
        windows = open_windows(loaded, request.text) if settings.measures or settings.budget or tuned else None
        clip, windows, tried = _tuned(loaded, request, weights, windows, progress)
        how: tuple[QuantizeWeights, ...] = (QuantizeWeights(scheme, clip=clip, keep=weights, amplify=settings.amplify),)
        records += tried
        if settings.budget is not None and windows is not None:
            windows, aside = split_windows(windows)
            found = allocate(
                loaded,
                replace(windows, ids=aside),
                weights,
                scheme,
                budget=_bits(settings.budget),
                clip=clip,
                progress=progress,
            )
            how = found.how(weights)
            records.append(_allocated(found))
            kept = tuple(each for step in how for each in step.keep)
            if len(kept) < len(weights):
                left = ", ".join(str(each) for each in weights if each not in kept)
                records.append(NoteRecord(level="warning", text=f"The budget does not reach to keep {left}."))
            weights = kept
        if settings.measures and windows is not None:
            records += _measured(loaded, request, weights, how, clip, windows, progress)
        return _Plan(how, weights, tuple(records), add_warnings(run, loaded))


def _check_writable(request: _Request, to: Path) -> None:
    """What would stop the writing shows before the forward pass that finds super weights."""
    with Checkpoint.open(request.reference) as checkpoint:
        plan_quantized_checkpoint(checkpoint, [QuantizeWeights(request.schemes[0])])
        check_target(checkpoint, to.expanduser().resolve(), overwrite=request.settings.overwrite)


def _clip(text: str | None) -> Clip | None:
    return None if text is None else Clip.parse(text)


def _tuned(
    loaded: LoadedModel,
    request: _Request,
    weights: Sequence[Coordinate],
    windows: Windows | None,
    progress: RichProgress,
) -> tuple[Clip | None, Windows | None, list[Record]]:
    """The clip, tuned where that is asked; the windows that did not tune it; what was tried."""
    how, scheme = request.settings.clip, request.schemes[0]
    if how not in ("auto", "auto-text"):
        return _clip(how), windows, []
    aside = None
    if how == "auto-text" and windows is not None:
        windows, ids = split_windows(windows)
        aside = replace(windows, ids=ids)
    clip, tried = tuned_clip(loaded, scheme, weights, windows=aside, progress=progress)
    return clip, windows, [*tried, NoteRecord(level="info", text=f"Clip chosen for {scheme}: {clip}.")]


def _allocated(found: Allocation) -> NoteRecord:
    """What each matrix gets, in words."""
    ways: dict[str, list[str]] = {}
    for each in found.choices:
        ways.setdefault(each.what, []).append(each.tensor.removesuffix(".weight"))
    parts = "; ".join(
        f"{what}: {len(names)} ({', '.join(names) if len(names) <= 8 else '...'})" for what, names in ways.items()
    )
    used = f"{found.bits_per_weight:.4g} of {found.budget:g} bits per weight are used."
    return NoteRecord(level="info", text=f"{used} {parts}.")


def _bits(text: str) -> float:
    try:
        return float(text.removesuffix("bits").strip())
    except ValueError as error:
        raise UsageError(f"--budget {text} is no number of bits per weight. Write 4.25 or 4.25bits.") from error


def _measured(
    loaded: LoadedModel,
    request: _Request,
    weights: Sequence[Coordinate],
    how: tuple[QuantizeWeights, ...],
    clip: Clip | None,
    windows: Windows,
    progress: RichProgress,
) -> Iterator[Record]:
    """What was asked to be measured."""
    settings, schemes = request.settings, request.schemes
    if settings.activations:
        windows, calibration = split_windows(windows)
        made = activation_conditions(loaded, calibration, request.activations, weights=schemes[0])
        yield from compare_activation_quantization(loaded, windows, made, progress=progress)
        yield from task_records(loaded, request.tasks, made.conditions, progress)
        return
    names = settings.peers.split(",") if settings.peers else []
    for name in names:
        if name not in PEERS:
            raise UnknownNameError.among("peer", name, PEERS)
    methods = tuple(settings.methods.split(","))
    comparison = Comparison(schemes, methods, clip or DEFAULT_CLIP, settings.largest, settings.amplify)
    conditions = conditions_of(comparison, weights) if settings.compare else _conditions(request, weights, how, clip)
    peers: list[Record] = []
    if names:
        windows, calibration = split_windows(windows)
        peers = [record for name in names for record in peer_records(name, loaded, windows, calibration)]
    if settings.compare:
        yield from compare_weight_quantization(loaded, windows, weights, comparison, progress=progress)
    else:
        yield from evaluate(loaded, windows, conditions, progress=progress).records()
        yield from (bits_record(loaded, each) for each in conditions[1:])
    yield from peers
    yield from task_records(loaded, request.tasks, conditions, progress)


def _conditions(
    request: _Request, weights: Sequence[Coordinate], how: tuple[QuantizeWeights, ...], clip: Clip | None
) -> tuple[Condition, ...]:
    """The original, plain rounding, and what was asked for where that is more."""
    scheme = request.schemes[0]
    plain = Condition(f"{scheme}, rtn", (replace(how[0], clip=None, keep=(), amplify=1.0, only=None),))
    made = Condition(_name(request.settings, scheme, weights, clip), how)
    return (ORIGINAL, plain) if made.interventions == plain.interventions else (ORIGINAL, plain, made)


def _name(settings: QuantizeSettings, scheme: Scheme, weights: Sequence[Coordinate], clip: Clip | None) -> str:
    if settings.budget is not None:
        return f"{scheme}, budget {_bits(settings.budget):g} bits"
    parts = [f"clip {clip}" if clip else "", "keep" if weights else "", f"x {settings.amplify:g}" if weights else ""]
    return f"{scheme}, {' + '.join(each for each in parts if each and each != 'x 1') or 'rtn'}"


def _write(request: _Request, to: Path, plan: _Plan, progress: RichProgress) -> QuantizedCheckpoint:
    return quantize_checkpoint(
        request.reference,
        to,
        plan.how,
        keep_in=request.settings.keep_in,
        settings=settings_of(request.model, plan.how, request.settings.keep_in),
        card=card_of(request.model, plan.how, plan.records, request.settings.keep_in),
        trust_remote_code=request.options.trust_remote_code,
        overwrite=request.settings.overwrite,
        threads=request.settings.threads,
        progress=progress,
    )


def _leave(settings: QuantizeSettings, plan: _Plan, model: str) -> None:
    from superweights.report.saving import save_chart

    if settings.out is not None:
        if plan.run is None:
            write_text("Nothing was measured, so there are no records.\n")
        else:
            write_records(settings.out, plan.run, plan.records)
    if settings.plot is None:
        return
    if settings.activations:
        from superweights.report.activation_quantization import activation_quantization_chart as chart

        title = "Rounding activations"
    else:
        from superweights.report.weight_quantization import weight_quantization_chart as chart

        title = "Rounding weights"
    save_chart(chart(plan.records, title=title, model=model), settings.plot)
