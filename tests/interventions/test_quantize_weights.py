"""Quantizing is one edit: the same bits in a resident model, a streamed model, a rewritten checkpoint and a model in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import superweights as sw
from superweights.checkpoint import Checkpoint
from superweights.checkpoint.stored_matrices import StoredMatrix, checkpoint_matrices
from superweights.coordinates import Coordinate
from superweights.errors import CoordinateError, NonFiniteWeightsError, UsageError
from superweights.interventions.conditions import Condition, QuantizeWeights
from superweights.interventions.weights import EditCount, locate_stored, prune_largest, weights_edited
from superweights.model.architecture import read_architecture
from superweights.quantization.clipping import Clip
from superweights.quantization.held_out import rounded
from superweights.quantization.scheme import Scheme
from superweights.testing import tiny_model, tiny_tokenizer

FAMILIES = ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "gpt_neox", "phi3", "gemma3_text", "llama4_text"]
IDS = torch.arange(4, 28)[None]
HOW = QuantizeWeights(Scheme.parse("int4-row"), clip=Clip("z", 3.0))
PLANTED = Coordinate(2, None, 49, 7)
PLANTED_TENSOR = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Coordinate]:
    """A checkpoint in bfloat16 with one large weight, and its coordinate. Do not change it."""
    model = tiny_model(request.param, layers=2)
    architecture = read_architecture(model)
    routed = any(each.experts for each in architecture.in_layer(1))
    weight = Coordinate(1, 1 if routed else None, 3, 5)
    projection = architecture.locate(weight)
    with torch.no_grad():
        model.get_parameter(projection.name)[projection.index(weight)] = 37.0
    directory = tmp_path_factory.mktemp("family") / "model"
    model.to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory, weight


def logits(model: sw.LoadedModel) -> torch.Tensor:
    return model.logits(model.states(IDS))


def edits_of(weight: Coordinate) -> dict[str, QuantizeWeights]:
    amplified = QuantizeWeights(Scheme.parse("nf4-g8"), keep=(weight,), keep_by="restore", amplify=1.5)
    return {
        "kept": QuantizeWeights(Scheme.parse("int3-g8-asym"), keep=(weight,)),
        "restored and amplified": replace(amplified, clip=Clip("z", 3.0)),
        "largest kept": QuantizeWeights(Scheme.parse("int4-tensor-minmax"), keep=(weight,), largest=2),
    }


Rewritten = dict[str, tuple[Path, EditCount]]


@pytest.fixture(scope="module")
def rewritten(family: tuple[Path, Coordinate], tmp_path_factory: pytest.TempPathFactory) -> Rewritten:
    """The checkpoints that `rewrite_checkpoint` makes of all edits, and how much it says it changed."""
    directory, weight = family
    place = tmp_path_factory.mktemp("rewritten")
    return {
        name: (place / name, sw.rewrite_checkpoint(directory, place / name, [how]))
        for name, how in edits_of(weight).items()
    }


def test_wherever_the_weights_live(family: tuple[Path, Coordinate], rewritten: Rewritten):
    directory, weight = family
    edits = edits_of(weight)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in edits}
    counts: dict[str, list[EditCount]] = {name: [] for name in edits}
    for residency in ("resident", "streamed"):
        with sw.load(directory, residency=residency) as model:
            before = logits(model)
            for name, how in edits.items():
                with weights_edited(model, [how]) as count:
                    found[name].append(logits(model))
                counts[name].append(count)
            assert torch.equal(logits(model), before)
    for name, (place, count) in rewritten.items():
        with sw.load(place) as model:
            found[name].append(logits(model))
        assert {count, *counts[name]} == {count}
        assert torch.equal(found[name][0], found[name][1]), name
        assert torch.equal(found[name][0], found[name][2]), name
    different = [before, *(each[0] for each in found.values())]
    assert all(not torch.equal(one, other) for at, one in enumerate(different) for other in different[:at])


def test_a_model_in_memory(family: tuple[Path, Coordinate], rewritten: Rewritten):
    """Experts that a checkpoint stores one by one are packed there, so nothing here may look at a whole matrix."""
    directory, weight = family
    edits = {name: how for name, how in edits_of(weight).items() if not how.largest}
    mine = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    before = {name: each.clone() for name, each in mine.state_dict().items()}
    with sw.load(mine) as model:
        for name, how in edits.items():
            theirs = AutoModelForCausalLM.from_pretrained(rewritten[name][0], dtype=torch.bfloat16)
            expected = theirs.state_dict()
            with weights_edited(model, [how]), sw.load(theirs) as other:
                assert torch.equal(logits(model), logits(other)), name
                assert all(torch.equal(each, expected[key]) for key, each in mine.state_dict().items()), name
            assert all(torch.equal(each, before[key]) for key, each in mine.state_dict().items())


def by_hand(
    tensor: torch.Tensor, matrix: StoredMatrix, how: QuantizeWeights, held: tuple[int, ...] | None
) -> torch.Tensor:
    """A stored tensor as it should be; `held` is where its kept weight is stored."""
    expected = tensor.clone()
    for part in range(matrix.experts or 1):
        stored = tensor if matrix.experts is None else tensor[part]
        by_rows = stored.mT.contiguous() if matrix.transposed else stored
        kept = []
        if held is not None and held[:-2] in ((), (part,)):
            row, col = reversed(held[-2:]) if matrix.transposed else held[-2:]
            kept = [row * matrix.cols + col]
        largest = prune_largest(by_rows, how.largest, kept).tolist() if how.largest else []
        new = rounded(by_rows, how.scheme, clip=how.clip, kept=[*kept, *largest], keep=how.keep_by)
        new.view(-1)[kept] *= how.amplify
        assert torch.equal(new.view(-1)[[*kept, *largest]][len(kept) :], by_rows.reshape(-1)[largest])
        (expected if matrix.experts is None else expected[part]).copy_(new.mT if matrix.transposed else new)
    return expected


def test_rewritten_files_hold_what_rounding_by_hand_gives(family: tuple[Path, Coordinate], rewritten: Rewritten):
    directory, weight = family
    old = load_file(directory / "model.safetensors")
    with Checkpoint.open(directory) as checkpoint:
        matrices = {each.tensor: each for each in checkpoint_matrices(checkpoint)}
        held_in, held = locate_stored(checkpoint, weight)
    for name, how in edits_of(weight).items():
        place, count = rewritten[name]
        new = load_file(place / "model.safetensors")
        for tensor, values in old.items():
            at = held if tensor == held_in else None
            expected = by_hand(values, matrices[tensor], how, at) if tensor in matrices else values
            assert torch.equal(new[tensor], expected), (name, tensor)
            assert torch.equal(new[tensor], values) == (tensor not in matrices), (name, tensor)
        assert new[held_in][held] == old[held_in][held] * how.amplify
        assert count.weights == sum(each.numel for each in matrices.values())
        assert count.matrices == sum(each.experts or 1 for each in matrices.values())


def edited(directory: Path, *interventions: QuantizeWeights) -> dict[str, torch.Tensor]:
    """The parameters of the layers while interventions last."""
    with sw.load(directory) as model, weights_edited(model, interventions):
        return {name: each.detach().clone() for name, each in model.model.named_parameters() if ".layers." in name}


@pytest.fixture(scope="module")
def original(planted_checkpoint: Path) -> dict[str, torch.Tensor]:
    return edited(planted_checkpoint)


def changed(found: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, each in found.items() if not torch.equal(each, original[name])]


def test_only_some_matrices(planted_checkpoint: Path, original: dict[str, torch.Tensor]):
    """Those that are kept lie outside as well, and so stay as they are."""
    name = "model.layers.1.mlp.up_proj.weight"
    found = edited(planted_checkpoint, replace(HOW, only=(name,), keep=(PLANTED,)))
    assert changed(found, original) == [name]
    assert torch.equal(found[name], rounded(original[name], HOW.scheme, clip=HOW.clip))


def test_the_largest_are_kept_beside_those_that_are_named(planted_checkpoint: Path, original: dict[str, torch.Tensor]):
    how = QuantizeWeights(Scheme.parse("int2-tensor"), keep=(PLANTED,), largest=3, only=(PLANTED_TENSOR,))
    values, found = original[PLANTED_TENSOR], edited(planted_checkpoint, how)[PLANTED_TENSOR]
    order = values.abs().flatten().argsort(descending=True)[:4].tolist()
    assert order[0] == 49 * 112 + 7
    assert torch.equal(found.flatten()[order], values.flatten()[order])
    assert found.unique().numel() <= 3 + 4


def test_keeping_holds_out_of_the_range_or_restores(planted_checkpoint: Path, original: dict[str, torch.Tensor]):
    """Held out, a super weight leaves its neighbours their own steps; restored, it takes them along."""
    row, found = original[PLANTED_TENSOR][49], {}
    for keep_by in ("hold-out", "restore"):
        how = QuantizeWeights(Scheme.parse("int4-row"), keep=(PLANTED,), keep_by=keep_by, only=(PLANTED_TENSOR,))
        found[keep_by] = edited(planted_checkpoint, how)[PLANTED_TENSOR][49]
        assert found[keep_by][7] == row[7]
    assert found["restore"].count_nonzero() == 1
    assert found["hold-out"].count_nonzero() > 90
    assert (found["hold-out"] - row).norm() < 0.2 * (found["restore"] - row).norm()


def test_amplified_weights_are_multiplied_once(planted_checkpoint: Path, original: dict[str, torch.Tensor]):
    how = QuantizeWeights(Scheme.parse("int4-g16"), keep=(PLANTED, PLANTED), largest=1)
    plain, found = (edited(planted_checkpoint, replace(how, amplify=each)) for each in (1.0, 2.0))
    assert changed(found, plain) == [PLANTED_TENSOR]
    assert (found[PLANTED_TENSOR] != plain[PLANTED_TENSOR]).nonzero().tolist() == [[49, 7]]
    assert found[PLANTED_TENSOR][49, 7] == 2 * original[PLANTED_TENSOR][49, 7]


def test_smoothed_weights_are_multiplied_before(planted_checkpoint: Path, original: dict[str, torch.Tensor]):
    factors = torch.linspace(0.5, 2, 112)
    how = replace(HOW, factors={PLANTED_TENSOR.removesuffix(".weight"): factors}, only=(PLANTED_TENSOR,))
    found = edited(planted_checkpoint, how)[PLANTED_TENSOR]
    assert torch.equal(found, rounded(original[PLANTED_TENSOR] * factors, HOW.scheme, clip=HOW.clip))


def test_one_after_the_other(planted_checkpoint: Path, original: dict[str, torch.Tensor]):
    rows, groups = (QuantizeWeights(Scheme.parse(each)) for each in ("int2-row", "int3-g8"))
    found = edited(planted_checkpoint, groups, rows)
    expected = rounded(rounded(original[PLANTED_TENSOR], groups.scheme), rows.scheme)
    assert torch.equal(found[PLANTED_TENSOR], expected)
    assert not torch.equal(edited(planted_checkpoint, rows, groups)[PLANTED_TENSOR], expected)


@pytest.mark.parametrize("residency", ["resident", "streamed", "in memory"])
def test_the_original_comes_back_when_the_body_fails(residency: str, planted_checkpoint: Path):
    source: Any = planted_checkpoint
    if residency == "in memory":
        source, residency = AutoModelForCausalLM.from_pretrained(planted_checkpoint), "resident"
    with sw.load(source, residency=residency) as model:
        before = logits(model)
        with pytest.raises(RuntimeError, match="no"), weights_edited(model, [HOW]):
            assert not torch.equal(logits(model), before)
            raise RuntimeError("no")
        assert torch.equal(logits(model), before)


def test_a_weight_that_is_no_number_is_named_by_its_tensor_and_all_comes_back():
    model = tiny_model("llama", layers=2)
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 4] = torch.nan
    before = {key: each.clone() for key, each in model.state_dict().items()}
    with (
        sw.load(model) as loaded,
        pytest.raises(NonFiniteWeightsError, match=rf"^{name}: Quantizing a matrix of 112 x 64: 1 weight is NaN"),
        weights_edited(loaded, [HOW]),
    ):
        raise AssertionError("not reached")
    assert all(torch.equal(each.nan_to_num(9), before[key].nan_to_num(9)) for key, each in model.state_dict().items())


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        (QuantizeWeights(Scheme.parse("int4-g24")), UsageError, "groups of 24 do not divide"),
        (QuantizeWeights(Scheme.parse("int4-tile5x8")), UsageError, "tiles of 5 x 8 do not divide"),
        (replace(HOW, only=("model.norm.weight",)), UsageError, "model.norm.weight is no matrix of its decoder layers"),
        (replace(HOW, only=("lm_head.weight",)), UsageError, "lm_head.weight is no matrix of its decoder layers"),
        (replace(HOW, factors={"model.norm": torch.ones(2)}), UsageError, "have no matrix model.norm"),
        (replace(HOW, keep=(Coordinate(6, None, 0, 0),)), CoordinateError, "layers are 0 to 5"),
        (replace(HOW, keep=(Coordinate(2, None, 64, 0),)), CoordinateError, "rows are 0 to 63"),
        (replace(HOW, keep=(Coordinate(2, 1, 0, 0),)), CoordinateError, "no routed experts"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(
    how: QuantizeWeights, error: type[Exception], says: str, planted_checkpoint: Path, tmp_path: Path
):
    with sw.load(planted_checkpoint) as model, pytest.raises(error, match=says), weights_edited(model, [how]):
        raise AssertionError("not reached")
    with pytest.raises(error, match=says):
        sw.rewrite_checkpoint(planted_checkpoint, tmp_path / "new", [how])
    assert not list(tmp_path.iterdir())


def test_rows_of_a_batch_refuse_it(planted_checkpoint: Path):
    from superweights.interventions.rows import condition_states

    with sw.load(planted_checkpoint) as model, pytest.raises(UsageError, match="use `applied`"):
        condition_states(model, IDS, [Condition("original"), Condition("rounded", (HOW,))])


def test_as_a_condition(planted_checkpoint: Path):
    how = replace(HOW, keep=(PLANTED,), only=(PLANTED_TENSOR,), amplify=2.0)
    with sw.load(planted_checkpoint) as model:
        with sw.applied(model, Condition("rounded", (how,))):
            applied = logits(model)
        with weights_edited(model, [how]):
            assert torch.equal(logits(model), applied)
    assert how.describe() == {
        "kind": "quantize weights",
        "scheme": "int4-row",
        "clip": "z=3",
        "keep": ["2:49:7"],
        "keep_by": "hold-out",
        "amplify": 2.0,
        "only": [PLANTED_TENSOR],
    }
    assert HOW.describe() == {"kind": "quantize weights", "scheme": "int4-row", "clip": "z=3"}
