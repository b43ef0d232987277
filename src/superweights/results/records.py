"""The one record schema: what each line of a result file may hold.

The first line of a file is a `Run`, which says how the numbers were made. Every other line is a `Record`, told apart by
its `type`. Records are frozen, refuse fields they do not know, and survive the trip through JSON, non-finite numbers
included. Nothing here imports torch.
"""

import math
from typing import Annotated, Literal, Self, get_args

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    model_validator,
)

from superweights.coordinates import Coordinate

SCHEMA_VERSION = 3
"""The version this package writes; it reads this one and every older one."""

_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _read_number(value: object) -> object:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _write_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _plain(value: object) -> object:
    """Makes free-form data what JSON will give back: lists for tuples, text for non-finite numbers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _write_number(value) if isinstance(value, float) else value


Number = Annotated[float, BeforeValidator(_read_number), PlainSerializer(_write_number, when_used="json")]
"""A float; "inf", "-inf" or "nan" in JSON where it is not finite."""
Index = Annotated[int, Field(ge=0)]
"""A position counted from 0."""
Count = Annotated[int, Field(ge=1)]
"""A number of things, at least one."""
Fraction = Annotated[Number, Field(ge=0, le=1)]
"""A part of a whole, 0 to 1."""
Texts = Annotated[tuple[str, ...], Field(strict=False)]
"""Several texts; any sequence is taken."""
Settings = Annotated[dict[str, JsonValue], BeforeValidator(_plain)]
"""Free-form data, held in the form in which JSON gives it back: a non-finite number in it is a text."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Run(_Line):
    """How the records of a file were made; always its first line."""

    type: Literal["run"] = "run"
    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    """Version of this schema."""
    command: Texts
    """The command line, one item per argument."""
    model: str
    """Model as the user named it: a path or a Hub name."""
    revision: str | None
    """Hub commit; None for a local path."""
    digest: str | None
    """Digest of the checkpoint; None where none was taken."""
    storage_dtype: str
    """Dtype of the weights in the files."""
    compute_dtype: str
    """Dtype of the forward pass; "float32 with bfloat16 products" where the processor multiplied bfloat16 weights itself."""
    residency: Literal["resident", "streamed"] | None
    """Where the weights lived; None where no forward pass was made."""
    device: str
    """Device of the forward pass."""
    seed: int | None
    """Seed of everything random; None where nothing is."""
    settings: Settings
    """Settings of the command, by name."""
    versions: dict[str, str]
    """Versions of superweights, torch, transformers, python and the platform."""
    started: AwareDatetime
    """Start of the run, in UTC."""
    warnings: Texts = ()
    """What the run warned about."""


class PromptRecord(_Line):
    """One prompt of the run, as the model saw it."""

    type: Literal["prompt"] = "prompt"
    index: Index
    """Number by which the other records name this prompt."""
    text: str
    """The text before tokenisation."""
    bos: bool
    """Whether a beginning-of-sequence token was put in front."""
    token_ids: Annotated[tuple[int, ...], Field(strict=False)]
    """Token ids, in order."""
    token_texts: Texts
    """Text of each token."""


class ActivationPeakRecord(_Line):
    """The largest |value| in the input or the output of one down projection."""

    type: Literal["activation_peak"] = "activation_peak"
    layer: Index
    """Decoder layer."""
    expert: Index | None
    """Routed expert; None for a dense or shared-expert projection."""
    module: str
    """Name of the down projection in the model."""
    side: Literal["input", "output"]
    """Which side of the down projection."""
    value: Number
    """The activation, with its sign."""
    channel: Index
    """Channel of the peak: a col of W on the input side, a row on the output side."""
    prompt: Index
    """Index of the prompt."""
    token: Index
    """Position in the prompt."""
    token_text: str
    """Text of the token."""
    token_id: Index
    """Id of the token."""
    round: Index
    """Search round; 0 is the unedited model."""
    edited: bool
    """Whether any weight was edited in this pass."""


class ResidualPeakRecord(_Line):
    """The largest |value| of the residual stream after one decoder layer."""

    type: Literal["residual_peak"] = "residual_peak"
    layer: Annotated[int, Field(ge=-1)]
    """Decoder layer; -1 is the embedding output."""
    value: Number
    """The residual value, with its sign."""
    channel: Index
    """Channel of the residual stream."""
    median: Number
    """Median of |residual| over the stream."""
    prompt: Index
    """Index of the prompt."""
    token: Index
    """Position in the prompt."""
    token_text: str
    """Text of the token."""
    round: Index
    """Search round; 0 is the unedited model."""
    edit: str
    """The edit in words, such as "scale=0 on 2:3968:7003"; empty for the unedited model."""


class PersistenceRecord(_Line):
    """One channel of the residual stream after one layer, at the token of a prompt where it is largest."""

    type: Literal["persistence"] = "persistence"
    prompt: Index
    """Index of the prompt."""
    prompt_text: str
    """The prompt's text."""
    layer: Annotated[int, Field(ge=-1)]
    """Decoder layer; -1 is the embedding output."""
    channel: Index
    """Channel of the residual stream."""
    value: Number
    """The residual value, with its sign."""
    token: Index
    """Position in the prompt."""
    token_text: str
    """Text of the token."""


class CandidateRecord(_Line):
    """One weight that may be a super weight, with its evidence."""

    type: Literal["candidate"] = "candidate"
    coordinate: str
    """`LAYER:ROW:COL` or `LAYER/EXPERT:ROW:COL`."""
    layer: Index
    """Decoder layer."""
    expert: Index | None
    """Routed expert; None for a dense or shared-expert projection."""
    row: Index
    """Output channel."""
    col: Index
    """Input channel."""
    module: str
    """Name of the down projection in the model."""
    value: Number
    """The weight."""
    rank: Count
    """Place of |value| in its matrix; 1 is the largest."""
    matrix_size: Count
    """Weights in that matrix."""
    input_peak: Number
    """Input of the down projection at `col` and `token`."""
    output_peak: Number
    """Output of the layer's down projections at `row` and `token`."""
    share: Number
    """Part of `output_peak` that this weight makes: value * input_peak / output_peak."""
    stream_share: Number | None
    """Part of the super activation that this weight makes; None where the stream was not looked at."""
    persistence: Fraction | None
    """Part of the later layers in which the super activation stays; None where the stream was not looked at."""
    super_activation: Number | None
    """Largest residual value that `row` reaches at `token`; None where the stream was not looked at."""
    median: Number | None
    """Median of |residual| after the layer where it does; None where the stream was not looked at."""
    prompt: Index
    """Index of the prompt."""
    token: Index
    """Position in the prompt."""
    token_text: str
    """Text of the token."""
    token_id: Index
    """Id of the token."""
    round: Index
    """Search round in which the weight was found, from 0."""
    set: Index
    """Number of its set: the candidates of one matrix that are linked by a common row or col."""
    method: str
    """Detection method."""

    @model_validator(mode="after")
    def _coordinate_agrees(self) -> Self:
        """Refuses a text form that names another weight than the numbers beside it."""
        expected = str(Coordinate(self.layer, self.expert, self.row, self.col))
        if self.coordinate != expected:
            raise ValueError(f"coordinate {self.coordinate!r} contradicts layer, expert, row and col ({expected})")
        return self


class NoteRecord(_Line):
    """Something a reader must know to understand the numbers."""

    type: Literal["note"] = "note"
    level: Literal["info", "warning"]
    """How much it matters."""
    text: str
    """Why none was found, a cast, an overflow, something skipped."""


class MeasurementRecord(_Line):
    """One number measured on a model under one condition."""

    type: Literal["measurement"] = "measurement"
    name: str
    """What was measured."""
    subject: str = ""
    """What the number is about, where a name has several: a token, a task, a layer; empty where it is the whole model."""
    condition: str = "original"
    """The state of the model in words, as tables and plots name it; "original" is the unedited model."""
    unit: str
    """Unit of `value`, `standard_error` and `interval`."""
    value: Number
    """The number."""
    standard_error: Number | None
    """Standard error; None where there is none."""
    interval: tuple[Number, Number] | None
    """Low and high end of the 95 % interval; None where there is none."""
    count: Index
    """Independent items behind the number."""
    dataset: str | None
    """Data set; None where none was used."""
    dataset_digest: str | None
    """Digest of the data; None where none was used."""
    intervention: Settings
    """What was done to the model, as data; empty for the unedited model."""


class VerdictRecord(_Line):
    """What removing one weight, or one set of weights, does to a model, and how sure that is."""

    type: Literal["verdict"] = "verdict"
    kind: Literal["single", "all", "minimal set"]
    """One weight alone, all candidates together, or the smallest critical set that the greedy search left."""
    weights: Texts
    """Coordinates of the weights removed together."""
    label: Literal["critical alone", "critical jointly", "contributing", "inert", "undecided"]
    """The verdict."""
    ratio: Number
    """Perplexity with the weights removed over perplexity of the original."""
    interval: tuple[Number, Number]
    """Low and high end of the 95 % interval of `ratio`, paired over windows."""
    without: Number | None
    """Ratio with all candidates removed but these, against the original; None where there is one candidate or no such run."""
    null_maximum: Number | None
    """Largest ratio of the null: as many random weights of the largest |W| of the same matrices."""
    null_count: Index
    """Draws of the null."""
    count: Index
    """Windows behind the ratio."""
    tokens: Index
    """Predicted tokens behind the ratio."""
    dataset: str
    """Data set."""
    dataset_digest: str
    """Digest of the data."""
    reason: str
    """The verdict in a sentence."""


class AuditRecord(_Line):
    """What a quantizer did to one weight, read from the quantized files."""

    type: Literal["audit"] = "audit"
    coordinate: str
    """The weight."""
    tensor: str
    """Name of the matrix that holds it."""
    format: str
    """How the quantized files store it; "plain" where it is not packed."""
    bits: Number
    """Bits of a stored code."""
    original: Number | None
    """Its value before; None where it is not known."""
    stored: Number
    """The value that the quantized files give."""
    column_scale: Number
    """What the quantizer multiplied the whole column by (as AWQ does), taken out of `error`; 1 where it did not."""
    error: Number | None
    """stored / (column_scale * original) - 1; None where the original is not known."""
    error_steps: Number | None
    """stored - column_scale * original, in steps of the grid at the weight; None for plain weights."""
    clipped: bool | None
    """Whether it is at the end of its grid, below its own size; None where the original is not known."""
    block_error: Number | None
    """Root mean square error of the other weights that share its scale, over the root mean square of those weights."""
    block_size: Count
    """How many weights share its scale."""
    verdict: Literal["kept", "bent", "lost", "unknown"]
    """Within 5 % of its value; within a half; beyond; or the original is not known."""
    reason: str
    """The verdict in a sentence."""

    @model_validator(mode="after")
    def _check_coordinate(self) -> Self:
        Coordinate.parse(self.coordinate)
        return self


Record = (
    PromptRecord
    | ActivationPeakRecord
    | ResidualPeakRecord
    | PersistenceRecord
    | CandidateRecord
    | NoteRecord
    | MeasurementRecord
    | VerdictRecord
    | AuditRecord
)
"""Any line of a result file but the first."""

RECORD_CLASSES: dict[str, type[Record]] = {each.model_fields["type"].default: each for each in get_args(Record)}
"""The class of each record type, by the text in its `type` field."""
