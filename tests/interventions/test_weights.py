"""What is pruned and scaled, that it comes back, and what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.errors import CoordinateError, MissingTensorError, QuantizedCheckpointError, UsageError
from superweights.interventions.conditions import PruneLargest, ScaleWeights
from superweights.interventions.weights import EditCount, plan_stored_edits, prune_largest, weights_edited
from superweights.model.architecture import read_architecture
from superweights.testing import tiny_model, tiny_tokenizer

RESIDENCIES = ["resident", "streamed"]
PLACES = [*RESIDENCIES, "in memory"]
LARGE = Coordinate(1, None, 3, 5)
OTHER = Coordinate(0, None, 8, 9)
MATRICES = 2 * 7  # of a llama with two layers


def largest_by_loop(values: list[float], count: int, kept: set[int]) -> list[int]:
    """One after the other, the largest that is left; the first of equal ones."""
    taken: list[int] = []
    for _ in range(count):
        best = None
        for place, value in enumerate(values):
            if place in kept or place in taken:
                continue
            size = -1.0 if math.isnan(value) else abs(value)
            if best is None or size > (-1.0 if math.isnan(values[best]) else abs(values[best])):
                best = place
        if best is not None:
            taken.append(best)
    return sorted(taken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("piece", [1, 10, 1 << 18])
def test_what_is_pruned_is_what_a_loop_finds(piece, seed, dtype, monkeypatch):
    monkeypatch.setattr("superweights.interventions.weights._PIECE", piece)
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(-4, 5, (7, 11), generator=generator).float()  # many ties
    if seed % 2:
        matrix[2, 3], matrix[5, 5], matrix[6, 10] = math.nan, math.inf, -math.inf
    matrix = matrix.to(dtype)
    kept = set(torch.randint(0, 77, (5,), generator=generator).tolist())
    for count in (1, 2, 10, 40, 77 - len(kept), 77, 1000):
        found = prune_largest(matrix, count, sorted(kept))
        assert found.tolist() == largest_by_loop(matrix.float().flatten().tolist(), count, kept)


@pytest.mark.parametrize(("share", "count"), [(0.29, 29), (0.009, 0), (0.01, 1), (1.0, 100), (1, 1), (0.999, 99)])
def test_a_share_is_rounded_down_as_it_is_written(share, count):
    assert len(prune_largest(torch.ones(10, 10), share)) == count


def test_the_matrix_is_not_changed_and_may_lie_across():
    matrix = torch.arange(12.0).reshape(3, 4).t()
    assert prune_largest(matrix, 2).tolist() == [8, 11]  # 11 and 10 of [4, 3], row by row
    assert matrix.equal(torch.arange(12.0).reshape(3, 4).t())


@pytest.mark.parametrize("amount", [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, "3", None])
def test_an_amount_out_of_range(amount: Any):
    with pytest.raises(UsageError, match=r"the amount is .* Give a whole number of weights from 1 on, or a share"):
        prune_largest(torch.ones(3, 3), amount)


@pytest.mark.parametrize("index", [-1, 9])
def test_a_kept_index_outside(index):
    with pytest.raises(CoordinateError, match="outside a matrix of 9 weights"):
        prune_largest(torch.ones(3, 3), 1, [index])


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A llama in float32 with two large weights."""
    directory = tmp_path_factory.mktemp("weights") / "model"
    planted("llama").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def planted(family: str) -> Any:
    model = tiny_model(family, layers=2)
    with torch.no_grad():
        for coordinate in (LARGE, OTHER):
            projection = read_architecture(model).locate(coordinate)
            model.get_parameter(projection.name)[projection.index(coordinate)] = 40.0
    return model


def load(directory: Path, place: str) -> sw.LoadedModel:
    if place == "in memory":
        return sw.load(planted("llama"), tokenizer=tiny_tokenizer())
    return sw.load(directory, residency=place)


def stream_of(model: sw.LoadedModel) -> torch.Tensor:
    return sw.trace(model, sw.make_prompts(model.tokenizer, ["What a day."], vocabulary=128)).stream


@pytest.mark.parametrize("place", PLACES)
def test_a_model_is_pruned_until_the_context_ends(place, directory):
    with load(directory, place) as model:
        before = stream_of(model)
        with weights_edited(model, [PruneLargest(0.01, keep=(LARGE,))]) as count:
            sizes = [each.numel() for each in planted("llama").model.layers.parameters() if each.ndim == 2]
            assert count == EditCount(sum(size // 100 for size in sizes), MATRICES)
            pruned = stream_of(model)
            assert not torch.equal(pruned, before)
            assert torch.equal(stream_of(model), pruned)
            with model.attached(model.architecture.locate(LARGE)) as parameter:
                assert (parameter == 0).sum() == 71
                assert parameter[3, 5] == 40
        assert torch.equal(stream_of(model), before)


def test_where_a_checkpoint_stores_what_the_model_has_all_places_are_the_same(directory):
    edits, streams = [ScaleWeights((LARGE,), 0.3), PruneLargest(5, keep=(OTHER,))], []
    for place in PLACES:
        with load(directory, place) as model, weights_edited(model, edits):
            streams.append(stream_of(model))
    assert torch.equal(streams[0], streams[1])
    # transformers adds its bias inside the product; none here, so only the order of sums may differ
    torch.testing.assert_close(streams[0], streams[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_packed_experts_of_a_model_in_memory_are_pruned_one_by_one(family):
    model = tiny_model(family, layers=2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with sw.load(model, tokenizer=tiny_tokenizer()) as loaded:
        with weights_edited(loaded, [PruneLargest(2, keep=(Coordinate(1, 3, 8, 9),))]) as count:
            weights = matrices = 0
            for name, value in model.named_parameters():
                zeroed = (value == 0) & (before[name] != 0)
                packed = value.ndim == 3
                if ".layers." in name and value.ndim > 1 and not name.endswith("bias"):
                    assert (zeroed.flatten(1).sum(1).tolist() if packed else [zeroed.sum()]) == [2] * (
                        value.shape[0] if packed else 1
                    )
                    matrices += value.shape[0] if packed else 1
                weights += int(zeroed.sum())
            assert count == EditCount(weights, matrices)
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("place", PLACES)
def test_nothing_to_do_is_the_original(place, directory):
    with load(directory, place) as model:
        before = stream_of(model)
        with weights_edited(model, []) as count:
            assert count == EditCount(0, 0)
            assert torch.equal(stream_of(model), before)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("edits", [[ScaleWeights((LARGE, OTHER, LARGE), 0.5)], [ScaleWeights((LARGE,), 0.5)] * 2])
def test_scaling_counts_each_weight_once_per_intervention(edits, place, directory):
    with load(directory, place) as model:
        before = stream_of(model)
        with weights_edited(model, edits) as count:
            assert count == (EditCount(2, 2) if len(edits) == 1 else EditCount(2, 1))
            with model.attached(model.architecture.locate(LARGE)) as parameter:
                assert parameter[3, 5] == (20 if len(edits) == 1 else 10)
        assert torch.equal(stream_of(model), before)


@pytest.mark.parametrize("place", PLACES)
def test_interventions_come_in_order(place, directory):
    """A weight that was removed is no longer the largest; one that was pruned cannot be removed."""
    removed, pruned = ScaleWeights((LARGE,)), PruneLargest(1)
    with load(directory, place) as model:
        before = stream_of(model)
        with weights_edited(model, [removed, pruned]) as count:
            assert count == EditCount(MATRICES + 1, MATRICES)
            with model.attached(model.architecture.locate(LARGE)) as parameter:
                assert (parameter == 0).sum() == 2
        with (
            pytest.raises(UsageError, match=r"Scaling 1:3:5 .* changes nothing: the weight is 0"),
            weights_edited(model, [pruned, removed]),
        ):
            stream_of(model)
        assert torch.equal(stream_of(model), before)


@pytest.mark.parametrize("place", RESIDENCIES)
@pytest.mark.parametrize("scaled_first", [True, False])
def test_scaled_weights_stay_scaled_while_others_are_pruned(scaled_first, place, directory):
    with load(directory, place) as model:
        before = stream_of(model)
        with weights_edited(model, [ScaleWeights((LARGE,), 0.5)]):
            scaled = stream_of(model)
        with weights_edited(model, [ScaleWeights((LARGE,), 0.5), PruneLargest(1, keep=(LARGE,))]):
            both = stream_of(model)
        contexts = [lambda: model.edited({LARGE: 0.5}), lambda: weights_edited(model, [PruneLargest(1, keep=(LARGE,))])]
        outer, inner = contexts if scaled_first else contexts[::-1]
        with outer():
            alone = stream_of(model)
            with inner():
                assert torch.equal(stream_of(model), both)
            assert torch.equal(stream_of(model), alone)
        assert torch.equal(alone, scaled) == scaled_first
        assert torch.equal(stream_of(model), before)


@pytest.mark.parametrize("place", RESIDENCIES)
def test_pruning_a_pruned_model_takes_the_next(place, directory):
    with load(directory, place) as model:
        before = stream_of(model)
        with weights_edited(model, [PruneLargest(4)]):
            together = stream_of(model)
        with weights_edited(model, [PruneLargest(1)]):
            alone = stream_of(model)
            with weights_edited(model, [PruneLargest(3)]):
                assert torch.equal(stream_of(model), together)
            assert torch.equal(stream_of(model), alone)
        assert torch.equal(stream_of(model), before)


@pytest.mark.parametrize("place", RESIDENCIES)
def test_a_layer_that_is_attached_twice_is_pruned_once(place, directory):
    with load(directory, place) as model:
        projection = model.architecture.locate(LARGE)
        with model.attached(projection) as parameter:
            before = parameter.clone()
            with weights_edited(model, [PruneLargest(3)]):
                for _ in range(3):
                    with model.attached(projection) as once, model.attached(projection) as twice:
                        assert (once == 0).sum() == (twice == 0).sum() == 3
        with model.attached(projection) as parameter:
            assert torch.equal(parameter, before)


@pytest.mark.parametrize("place", PLACES)
def test_pruning_ends_when_its_block_fails(place, directory):
    with load(directory, place) as model:
        before = stream_of(model)
        with pytest.raises(RuntimeError, match="on purpose"), weights_edited(model, [PruneLargest(1)]):
            raise RuntimeError("on purpose")
        assert torch.equal(stream_of(model), before)


@pytest.mark.parametrize("place", PLACES)
def test_an_edit_that_fails_half_way_leaves_nothing(place, directory, monkeypatch):
    with load(directory, place) as model:
        before, calls = stream_of(model), []

        def fail_later(*arguments: Any) -> torch.Tensor:
            calls.append(arguments)
            if len(calls) == MATRICES - 2:
                raise KeyboardInterrupt
            return prune_largest(*arguments)

        monkeypatch.setattr("superweights.interventions.weights.prune_largest", fail_later)
        with pytest.raises(KeyboardInterrupt), weights_edited(model, [PruneLargest(3)]):
            stream_of(model)
        assert torch.equal(stream_of(model), before)


@pytest.mark.parametrize("place", RESIDENCIES)
def test_pruning_never_reaches_the_file(place, directory):
    before = (directory / "model.safetensors").read_bytes()
    with load(directory, place) as model, weights_edited(model, [PruneLargest(0.5)]):
        stream_of(model)
    assert (directory / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("place", RESIDENCIES)
def test_tensors_that_are_not_aligned(place, directory, tmp_path):
    """A header of odd length moves all tensors to odd addresses: their views are copies."""
    odd = Path(shutil.copytree(directory, tmp_path / "odd"))
    content = (odd / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" "
    (odd / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    edits, streams = [ScaleWeights((LARGE,), 0.3), PruneLargest(5)], []
    for each in (directory, odd):
        with load(each, place) as model:
            with weights_edited(model, edits):
                streams.append(stream_of(model))
            streams.append(stream_of(model))
    assert torch.equal(streams[0], streams[2])
    assert torch.equal(streams[1], streams[3])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (PruneLargest(1e-5), UsageError, r"1e-05 of every matrix of .* the largest matrix has 7168 .* a weight is 0\.00014\."),
        (PruneLargest(2.0), UsageError, r"the amount is 2\.0"),
        (PruneLargest(1, keep=(Coordinate(1, None, 64, 0),)), CoordinateError, "rows are 0 to 63"),
        (PruneLargest(1, keep=(Coordinate(1, None, 0, 112),)), CoordinateError, "cols are 0 to 111"),
        (PruneLargest(1, keep=(Coordinate(2, None, 0, 0),)), CoordinateError, "layers are 0 to 1"),
        (PruneLargest(1, keep=(Coordinate(1, 0, 0, 0),)), CoordinateError, "no routed experts"),
        (ScaleWeights(()), UsageError, "none is named"),
        (ScaleWeights((Coordinate(1, None, 64, 0),)), CoordinateError, "rows are 0 to 63"),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(edit, error, says, place, directory):
    with load(directory, place) as model:
        before = stream_of(model)
        with pytest.raises(error, match=says), weights_edited(model, [edit]):
            raise AssertionError("the edit was entered")
        assert torch.equal(stream_of(model), before)


def test_the_smallest_share_that_is_named_prunes(directory):
    with load(directory, "resident") as model, weights_edited(model, [PruneLargest(0.00014)]) as count:
        assert count == EditCount(6, 6)


def changed_copy(directory: Path, to: Path, **config: Any) -> Path:
    copy = Path(shutil.copytree(directory, to))
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | config))
    return copy


def test_layers_beyond_the_configs_are_not_part_of_the_model(directory, tmp_path):
    with sw.load(changed_copy(directory, tmp_path / "copy", num_hidden_layers=1, layer_types=None)) as model:
        with pytest.raises(CoordinateError, match="layers are 0 to 0"):
            plan_stored_edits(model.checkpoint, [ScaleWeights((LARGE,))])
        assert plan_stored_edits(model.checkpoint, [PruneLargest(1)]).count == EditCount(MATRICES // 2, MATRICES // 2)


def test_integers_are_not_scaled(directory, tmp_path):
    from safetensors.torch import save_file

    copy = changed_copy(directory, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].to(torch.int8)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with sw.checkpoint.Checkpoint.open(copy) as checkpoint:
        with pytest.raises(QuantizedCheckpointError, match=r"1:3:5 is in .*down_proj\.weight, which is stored as I8"):
            plan_stored_edits(checkpoint, [ScaleWeights((LARGE,))])
        assert plan_stored_edits(checkpoint, [PruneLargest(1)]).count.matrices == MATRICES - 1


def test_a_tensor_that_makes_no_layer_cannot_be_edited(directory):
    with (
        load(directory, "resident") as model,
        pytest.raises(MissingTensorError, match=r"no decoder layer of LlamaForCausalLM is made of lm_head\.weight"),
        model.stored_edited({"lm_head.weight": torch.Tensor.zero_}),
    ):
        raise AssertionError("the edit was entered")


def test_a_model_in_memory_has_no_stored_tensors(directory):
    with (
        load(directory, "in memory") as model,
        pytest.raises(UsageError, match="it was in memory already"),
        model.stored_edited({}),
    ):
        raise AssertionError("the edit was entered")
