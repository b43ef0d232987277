import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.detection.search import default_prompts
from superweights.errors import CoordinateError, UsageError
from superweights.experiments.comparison import ALL_TOGETHER, compare
from superweights.measurements.windows import Windows
from superweights.model.architecture import read_architecture
from superweights.results.records import MeasurementRecord, NoteRecord
from superweights.testing import plant_super_weight, save_tiny_checkpoint, tiny_model, tiny_tokenizer

WEIGHT = Coordinate(2, None, 49, 7)
OTHER = Coordinate(3, None, 4, 6)
IDS = torch.randint(4, 100, (6, 20), generator=torch.Generator().manual_seed(0))
WINDOWS = Windows(IDS, "noise", "sha256:0", 20, False)


def save(directory: Path, change: Callable[[torch.nn.Module], None], *, family: str = "llama", layer: int = 2, **sizes):
    """A model with a planted super weight, changed after that."""
    model, tokenizer = tiny_model(family, **sizes), tiny_tokenizer()
    plant_super_weight(model, layer=layer, tokenizer=tokenizer)
    with torch.no_grad():
        change(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tune(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.05 * parameter.abs() * torch.randn_like(parameter)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted checkpoint, every weight changed by some percent of itself."""
    return save(tmp_path_factory.mktemp("tuned") / "llama", tune)


def compared(first: Path, second: Path, weights=None, *, windows=WINDOWS, residency="resident", **options):
    with sw.load(first, residency=residency) as one, sw.load(second, residency=residency) as other:
        return list(compare(one, other, windows, windows, weights=weights, **options))


def measured(records) -> dict[tuple[str, str, str], MeasurementRecord]:
    found = [each for each in records if isinstance(each, MeasurementRecord)]
    named = {(each.name, each.subject, each.condition): each for each in found}
    assert len(named) == len(found)
    return named


def notes(records) -> list[str]:
    return [each.text for each in records if isinstance(each, NoteRecord)]


def losses(model, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_number_by_hand(family, tmp_path):
    weights = [Coordinate(2, 1, 3, 5), Coordinate(3, 0, 4, 6)] if family == "mixtral" else [WEIGHT, OTHER]
    directories = [save(tmp_path / "one", lambda _: None, family=family), save(tmp_path / "two", tune, family=family)]
    found = measured(compared(*directories, weights))
    matrices = []
    for directory in directories:
        model = AutoModelForCausalLM.from_pretrained(directory)
        whole = losses(model, IDS)
        for weight in weights:
            projection = read_architecture(model).locate(weight)
            parameter = model.get_parameter(projection.name).data
            matrix = (parameter if weight.expert is None else parameter[weight.expert]).clone()
            matrices.append(matrix.t() if projection.transposed else matrix)
            value = matrices[-1][weight.row, weight.col].item()
            about = (str(weight), str(directory))
            assert found["weight", *about].value == value
            rank = found["weight_rank", *about]
            assert (rank.value, rank.count) == (1 + (matrix.abs() > abs(value)).sum(), matrix.numel())
            parameter[projection.index(weight)] = 0
            ratio = found["perplexity_ratio_removed", *about]
            assert ratio.value == pytest.approx(math.exp(losses(model, IDS) - whole), abs=1e-6)
            assert ratio.interval[0] <= ratio.value <= ratio.interval[1]
            assert ratio.intervention == {"kind": "scale", "factor": 0.0, "weights": [str(weight)]}
            parameter[projection.index(weight)] = value
        assert found["perplexity", "", str(directory)].value == pytest.approx(math.exp(whole), rel=1e-5)
        assert ("perplexity_ratio_removed", ALL_TOGETHER, str(directory)) in found
    for number, weight in enumerate(weights):
        before, after = matrices[number].flatten(), matrices[number + 2].flatten()
        changes = [abs(b - a) / abs(a) for a, b in zip(before.tolist(), after.tolist(), strict=True)]
        own = changes[weight.row * matrices[number].shape[1] + weight.col]
        about = (str(weight), f"{directories[0]} to {directories[1]}")
        assert found["weight_change", *about].value == pytest.approx(own, rel=1e-4)
        quantile = found["weight_change_quantile", *about]
        assert quantile.value == pytest.approx(sum(each < own for each in changes) / len(changes), abs=1e-3)
        assert (quantile.unit, quantile.count) == ("proportion", len(changes))


def test_the_super_activation_is_the_largest_value_of_the_row(planted_checkpoint, tuned):
    found = measured(compared(planted_checkpoint, tuned, [WEIGHT]))
    for directory in (planted_checkpoint, tuned):
        with sw.load(directory) as loaded:
            prompts = default_prompts(loaded)
        model = AutoModelForCausalLM.from_pretrained(directory)
        sizes = []
        for prompt in prompts:
            with torch.no_grad():
                output = model(torch.tensor([prompt.token_ids]), output_hidden_states=True)
            sizes += [abs(value) for states in output.hidden_states[1:-1] for value in states[0, :, 49].tolist()]
        record = found["super_activation", "2:49:7", str(directory)]
        assert record.value == pytest.approx(max(sizes), rel=1e-4)
        assert record.count == len(prompts)


def test_without_weights_both_models_are_searched(planted_checkpoint, tmp_path):
    other = save(tmp_path / "other", lambda _: None, layer=3)
    records = compared(planted_checkpoint, other)
    with sw.load(other) as model:
        elsewhere = str(sw.find(model).candidates[0].coordinate)
    subjects = {subject for name, subject, _ in measured(records) if name == "weight"}
    assert subjects == {"2:49:7", elsewhere}
    assert notes(records) == [
        f"Super weight candidates of {planted_checkpoint}: 2:49:7.",
        f"Super weight candidates of {other}: {elsewhere}.",
    ]


def test_residencies_agree(planted_checkpoint, tuned):
    assert compared(planted_checkpoint, tuned) == compared(planted_checkpoint, tuned, residency="streamed")


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_a_model_against_itself_changes_nothing(residency, planted_checkpoint):
    found = measured(compared(planted_checkpoint, planted_checkpoint, [WEIGHT, OTHER], residency=residency))
    names = (f"A: {planted_checkpoint}", f"B: {planted_checkpoint}")
    for weight in ("2:49:7", "3:4:6"):
        label = f"{names[0]} to {names[1]}"
        assert found["weight_change", weight, label].value == 0
        assert found["weight_change_quantile", weight, label].value == 0
        for name in ("weight", "weight_rank", "super_activation", "perplexity_ratio_removed"):
            one, other = (found[name, weight, each] for each in names)
            assert (one.value, one.interval) == (other.value, other.interval)


def test_a_weight_that_is_gone_in_one_model(planted_checkpoint, tmp_path):
    gone = save(tmp_path / "gone", lambda model: model.model.layers[2].mlp.down_proj.weight[49, 7].zero_())
    found = measured(compared(planted_checkpoint, gone, [WEIGHT]))
    ratio = found["perplexity_ratio_removed", "2:49:7", str(gone)]
    assert (ratio.value, ratio.interval) == (1, None)
    assert found["weight_change", "2:49:7", f"{planted_checkpoint} to {gone}"].value == 1
    assert found["weight_change_quantile", "2:49:7", f"{planted_checkpoint} to {gone}"].value == 1 - 1 / (64 * 112)
    back = measured(compared(gone, planted_checkpoint, [WEIGHT]))
    assert back["weight_change", "2:49:7", f"{gone} to {planted_checkpoint}"].value == math.inf


def test_one_window_gives_no_interval(planted_checkpoint, tuned):
    found = measured(compared(planted_checkpoint, tuned, [WEIGHT], windows=Windows(IDS[:1], "noise", "x", 20, False)))
    assert found["perplexity_ratio_removed", "2:49:7", str(tuned)].interval is None


def test_a_loss_that_is_not_finite_is_a_number_too(planted_checkpoint, tmp_path):
    def break_head(model):
        model.lm_head.weight[0] = math.inf

    broken = save(tmp_path / "broken", break_head)
    found = measured(compared(planted_checkpoint, broken, [WEIGHT]))
    assert not math.isfinite(found["perplexity", "", str(broken)].value)
    assert math.isnan(found["perplexity_ratio_removed", "2:49:7", str(broken)].value)


def test_other_widths_compare_without_a_change(planted_checkpoint, tmp_path):
    wide = save_tiny_checkpoint("llama", tmp_path / "wide", intermediate=144)
    records = compared(planted_checkpoint, wide, [WEIGHT])
    assert not [name for name, *_ in measured(records) if name.startswith("weight_change")]
    assert "have the shapes [64, 112] and [64, 144]" in notes(records)[0]


def test_candidates_that_one_model_has_no_place_for(planted_checkpoint, tmp_path):
    narrow = save(tmp_path / "narrow", lambda _: None, intermediate=6)
    records = compared(planted_checkpoint, narrow)
    assert "2:49:7" not in {subject for name, subject, _ in measured(records) if name == "weight"}
    assert "Left out, as they do not fit both models: 2:49:7." in notes(records)
    experts = save_tiny_checkpoint("mixtral", tmp_path / "experts")
    with pytest.raises(UsageError, match="the candidates 2:49:7 do not fit both"):
        compared(planted_checkpoint, experts)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"layers": 4}, "they have decoder layers 6 and 4"),
        ({"hidden": 96}, "they have hidden size 64 and 96"),
        ({"hidden": 96, "layers": 4}, "they have hidden size 64 and 96, decoder layers 6 and 4"),
    ],
)
def test_models_of_other_shapes_are_refused(sizes, says, planted_checkpoint, tmp_path):
    other = save_tiny_checkpoint("llama", tmp_path / "other", **sizes)
    with pytest.raises(UsageError, match=says):
        compared(planted_checkpoint, other)


def test_what_cannot_be_compared_is_said(planted_checkpoint, tmp_path):
    random = save_tiny_checkpoint("llama", tmp_path / "random")
    with pytest.raises(UsageError, match="neither has a candidate"):
        compared(random, random)
    with pytest.raises(UsageError, match="no weight is named"):
        compared(planted_checkpoint, random, [])
    narrow = save_tiny_checkpoint("llama", tmp_path / "narrow", intermediate=8)
    with pytest.raises(CoordinateError, match=r"in .*narrow, 2:49:70 is outside"):
        compared(planted_checkpoint, narrow, [Coordinate(2, None, 49, 70)])
