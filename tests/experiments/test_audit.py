"""An audit finds what a quantizer did, on checkpoints that were quantized on the spot."""

from pathlib import Path

import pytest
import torch

import superweights as sw
from superweights.checkpoint import Checkpoint
from superweights.checkpoint.opening import open_dequantized
from superweights.checkpoint.packed.unpacked import UnpackedCheckpoint
from superweights.coordinates import Coordinate
from superweights.errors import QuantizedCheckpointError, UsageError
from superweights.experiments.audit import audit_weights, measure_audit
from superweights.interventions.conditions import QuantizeWeights
from superweights.interventions.quantized_checkpoint import quantize_checkpoint
from superweights.quantization.clipping import Clip
from superweights.quantization.scheme import Scheme

from .conftest import OwnText


def quantized(own_text: OwnText, to: Path, scheme: str, **how):
    quantize_checkpoint(own_text.directory, to, [QuantizeWeights(Scheme.parse(scheme), **how)])
    return open_dequantized(to)


def test_kept_as_stored_is_exact(own_text: OwnText, tmp_path: Path) -> None:
    with (
        quantized(own_text, tmp_path / "q", "int4-g16", keep=(own_text.weight,)) as packed,
        Checkpoint.open(own_text.directory) as original,
    ):
        (found,) = audit_weights(packed, [own_text.weight], original=original)
    assert (found.verdict, found.format, found.error, found.clipped) == ("kept", "plain", 0, False)


def test_rounded_it_is_off_by_less_than_half_a_step(own_text: OwnText, tmp_path: Path) -> None:
    other = Coordinate(own_text.weight.layer, None, own_text.weight.row, own_text.weight.col + 1)
    with (
        quantized(own_text, tmp_path / "q", "int4-g16") as packed,
        Checkpoint.open(own_text.directory) as original,
    ):
        found, neighbour = audit_weights(packed, [own_text.weight, other], original=original)
    assert found.verdict == "kept" and abs(found.error_steps) <= 0.5 and found.block_size == 16
    assert found.block_error > 0.9  # the neighbours are rounded to nothing
    assert neighbour.verdict == "lost" and neighbour.stored == 0


def test_clipped_it_is_lost_and_cut_off_and_costs_the_model(own_text: OwnText, tmp_path: Path) -> None:
    with (
        quantized(own_text, tmp_path / "q", "int8-row", clip=Clip("z", 3.0)) as packed,
        sw.load(own_text.directory) as model,
    ):
        audited = list(audit_weights(packed, [own_text.weight], original=model.checkpoint))
        records = list(measure_audit(model, packed, audited, own_text.windows))
    assert (audited[0].verdict, audited[0].clipped) == ("lost", True)
    ratio = {each.condition: each.value for each in records if each.name == "perplexity_ratio"}
    assert ratio["errors of the super weights alone"] > 2
    assert ratio["quantized"] > 2
    assert ratio["quantized, super weights put back"] < 1.5


def test_without_the_original_published_values_stand_in(own_text: OwnText, tmp_path: Path) -> None:
    with quantized(own_text, tmp_path / "q", "int8-row") as packed:
        (unknown,) = audit_weights(packed, [own_text.weight])
        (known,) = audit_weights(packed, [own_text.weight], values={own_text.weight: unknown.stored * 1.3})
    assert (unknown.verdict, unknown.error) == ("unknown", None)
    assert known.verdict == "bent"


def test_a_rescaled_column_is_told_from_an_error(own_text: OwnText, tmp_path: Path) -> None:
    with Checkpoint.open(own_text.directory) as original:
        matrix = original.view(f"model.layers.{own_text.weight.layer}.mlp.down_proj.weight")
        matrix[:, own_text.weight.col] *= 4  # a private copy of the page: what AWQ does
        with Checkpoint.open(own_text.directory) as before:
            (found,) = audit_weights(original, [own_text.weight], original=before)
    assert found.column_scale == pytest.approx(4) and abs(found.error) < 1e-6 and found.verdict == "kept"


def test_another_model_is_refused(own_text: OwnText, planted_checkpoint: Path, tmp_path: Path) -> None:
    from superweights.testing import save_tiny_checkpoint

    other = save_tiny_checkpoint("llama", tmp_path / "wide", hidden_size=32)
    with (
        Checkpoint.open(own_text.directory) as here,
        Checkpoint.open(other) as before,
        pytest.raises(UsageError, match="Give the model it was made from"),
    ):
        list(audit_weights(here, [Coordinate(2, None, 3, 4)], original=before))


def test_every_verb_reads_a_quantized_model(own_text: OwnText, tmp_path: Path) -> None:
    quantized(own_text, tmp_path / "q", "int8-g16", keep=(own_text.weight,)).close()
    with sw.load(tmp_path / "q", residency="streamed") as model:
        assert isinstance(model.checkpoint, UnpackedCheckpoint)
        found = sw.find(model)
        assert own_text.weight in [each.coordinate for each in found.candidates]
        assert any("dequantized" in each for each in model.warnings)
        logits = model.logits(model.states(own_text.windows.ids))
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    with torch.no_grad():
        assert torch.allclose(theirs(own_text.windows.ids).logits, logits, rtol=1e-4, atol=1e-3)


def test_what_is_packed_has_no_bytes_of_its_own(own_text: OwnText, tmp_path: Path) -> None:
    with (
        quantized(own_text, tmp_path / "q", "int8-row") as packed,
        pytest.raises(QuantizedCheckpointError, match="superweights audit"),
    ):
        packed.read_scalar("model.layers.0.mlp.down_proj.weight", (0, 0))
