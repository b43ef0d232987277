import json
from pathlib import Path

import pytest
import torch

from superweights.checkpoint import Checkpoint
from superweights.interventions.adapter import check_adapter, open_quantized
from superweights.results.records import MeasurementRecord
from superweights.results.store import read_records

from .conftest import Ask

QUICK = ("--windows", "6", "--length", "24")


def test_a_model_is_written_with_its_super_weight(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    to = tmp_path / "q"
    answer = ask("quantize", planted_checkpoint, "--scheme", "int4-g16", "--to", to)
    assert (answer.status, answer.err) == (0, "")
    assert "2:49:7" in answer.out and "Stored unrounded: model.layers.2.mlp.down_proj.weight." in answer.out
    config = json.loads((to / "config.json").read_text())["quantization_config"]
    assert config["super_weights"][0]["coordinate"] == "2:49:7"
    assert "2:49:7" in (to / "README.md").read_text()
    assert json.loads((to / "superweights.json").read_text())["interventions"][0]["keep"] == ["2:49:7"]
    with Checkpoint.open(planted_checkpoint) as before, Checkpoint.open(to) as after:
        name = "model.layers.2.mlp.down_proj.weight"
        assert torch.equal(before.view(name), after.view(name))
        assert after.nbytes < before.nbytes


def test_the_cost_of_a_plain_matrix_is_said(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    words = ("--scheme", "int4-g16", "--keep", "2:49:7", "--to", tmp_path / "q")
    answer = ask("quantize", planted_checkpoint, *words)
    with Checkpoint.open(tmp_path / "q") as checkpoint:
        plain, rest = 4 * 64 * 112, checkpoint.nbytes
    packed = 64 * 112 // 2 + 4 * 64 * 7 + 16  # codes, float32 scales, the shape
    assert f"Keeping weights exact takes {plain - packed} of {rest} bytes (" in answer.out
    assert " bits per weight, 6.0" in answer.out  # 4 + 32 / 16 and the shapes


def test_an_adapter_is_written_beside_the_model_and_said(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    to = tmp_path / "q"
    answer = ask("quantize", planted_checkpoint, "--scheme", "int4-g16", "--keep-in", "adapter", "--to", to)
    assert (answer.status, answer.err) == (0, "")
    assert f"the LoRA in {to / 'adapter'} adds them" in answer.out and "unrounded" not in answer.out
    card = (to / "README.md").read_text()
    assert 'PeftModel.from_pretrained(model, FOLDER + "/adapter")' in card
    assert "CompressedTensorsConfig(dequantize=True)" in card and "--enable-lora --lora-modules" in card
    assert json.loads((to / "superweights.json").read_text())["keep_in"] == "adapter"
    assert json.loads((to / "adapter" / "superweights.json").read_text())["quantized"]["name"] == str(to)
    with open_quantized(to) as files:
        assert [str(each.coordinate) for each in check_adapter(to / "adapter", files).weights] == ["2:49:7"]
    audited = ask("audit", to, "--original", planted_checkpoint, "--weights", "2:49:7", "--no-measure")
    assert audited.status == 1 and "lost" in audited.out
    assert f"The adapter in {to / 'adapter'} was made for these files and restores 2:49:7." in audited.out


def test_an_adapter_of_another_model_is_found_by_the_audit(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    words = ("--scheme", "int4-g16", "--keep", "2:49:7", "--keep-in", "adapter")
    ask("quantize", planted_checkpoint, *words, "--to", tmp_path / "q")
    ask("quantize", planted_checkpoint, "--scheme", "int8-row", "--keep", "none", "--to", tmp_path / "other")
    (tmp_path / "q" / "adapter").rename(tmp_path / "other" / "adapter")
    audited = ask("audit", tmp_path / "other", "--original", planted_checkpoint, "--weights", "2:49:7", "--no-measure")
    assert "is another model: its tensors differ" in audited.out


def test_int8_holds_the_super_weight(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    words = (
        "--scheme",
        "int4-g16",
        "--keep",
        "2:49:7",
        "--keep-in",
        "int8",
        "--to",
        tmp_path / "q",
        "--format",
        "json",
    )
    (row,) = json.loads(ask("quantize", planted_checkpoint, *words).out)
    assert row["kept_in"] == "int8" and row["unrounded"] == [] and row["bytes_to_keep"] == 64 * 112 // 2
    assert "packed in 8 bits" in (tmp_path / "q" / "README.md").read_text()
    words = ("--original", planted_checkpoint, "--weights", "2:49:7", "--no-measure", "--format", "json")
    (audited,) = json.loads(ask("audit", tmp_path / "q", *words).out)
    assert (audited["verdict"], audited["error"]) == ("kept", 0)


def test_keeping_none_needs_no_forward_pass(
    ask: Ask, planted_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("superweights.cli.quantize.open_model", None)
    answer = ask("quantize", planted_checkpoint, "--scheme", "int8-row", "--keep", "none", "--to", tmp_path / "q")
    assert (answer.status, answer.err) == (0, "")


def test_measuring_writes_records_and_no_model(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    words = ("--scheme", "int4-g16", "--clip", "z=5", "--measure", "--out", out, *QUICK)
    answer = ask("quantize", planted_checkpoint, *words)
    assert (answer.status, answer.err) == (0, "")
    records = [each for each in read_records(out)[1] if isinstance(each, MeasurementRecord)]
    names = list(dict.fromkeys(each.condition for each in records))
    assert names == ["original", "int4-g16, rtn", "int4-g16, clip z=5 + keep"]
    assert {"perplexity", "kl_to_original", "bits_per_weight"} <= {each.name for each in records}
    assert list(tmp_path.iterdir()) == [out]


def test_written_and_measured_the_card_has_the_numbers(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    answer = ask("quantize", planted_checkpoint, "--scheme", "int4-g16", "--measure", "--to", tmp_path / "q", *QUICK)
    assert answer.status == 0
    assert "| int4-g16, keep | kl to original |" in (tmp_path / "q" / "README.md").read_text()


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_figure_7_is_drawn(ask: Ask, planted_checkpoint: Path, tmp_path: Path, suffix: str) -> None:
    plot = tmp_path / f"figure7.{suffix}"
    schemes = "int4-block8x8-minmax,int4-block16x16-minmax"
    answer = ask("quantize", planted_checkpoint, "--compare", "--scheme", schemes, "--plot", plot, *QUICK)
    assert (answer.status, answer.err) == (0, "")
    assert plot.stat().st_size > 1000
    assert "neighbours' error if held out" in answer.out


def test_the_activation_table_is_made_and_drawn(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    plot = tmp_path / "w8a8.svg"
    answer = ask("quantize", planted_checkpoint, "--activations", "--scales", "tensor", "--plot", plot, *QUICK)
    assert (answer.status, answer.err) == (0, "")
    assert "SmoothQuant" in answer.out and "Super activations in" in answer.out and plot.is_file()


@pytest.mark.parametrize("clip", ["auto", "auto-text"])
def test_a_clip_is_tuned(ask: Ask, planted_checkpoint: Path, clip: str) -> None:
    answer = ask("quantize", planted_checkpoint, "--scheme", "int3-row", "--clip", clip, "--measure", *QUICK)
    assert answer.status == 0
    assert "Clip chosen for int3-row: z=" in answer.out


def test_a_budget_is_spent_and_written(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    to = tmp_path / "q"
    words = ("--scheme", "int4-g16", "--budget", "7.5bits", "--measure", "--to", to, *QUICK)
    answer = ask("quantize", planted_checkpoint, *words)
    assert (answer.status, answer.err) == (0, "")
    assert "of 7.5 bits per weight are used" in answer.out
    groups = json.loads((to / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(each["weights"]["num_bits"] for each in groups.values()) in ([4], [4, 8])


def test_what_a_budget_does_not_reach_is_not_called_kept(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    for budget, kept in (("6.05", None), ("12", "2:49:7")):
        words = ("--scheme", "int4-g16", "--keep", "2:49:7", "--budget", budget, "--to", tmp_path / budget, *QUICK)
        answer = ask("quantize", planted_checkpoint, *words, "--format", "json")
        assert answer.status == 0
        assert json.JSONDecoder().raw_decode(answer.out)[0][0]["kept"] == kept
        table = ask("quantize", planted_checkpoint, *words, "--overwrite").out
        assert ("The budget does not reach to keep 2:49:7." in table) == (kept is None)
        config = json.loads((tmp_path / budget / "config.json").read_text())["quantization_config"]
        assert [each["coordinate"] for each in config["super_weights"]] == [kept] * (kept is not None)


def test_nothing_to_keep_is_said(ask: Ask, random_checkpoint: Path, tmp_path: Path) -> None:
    answer = ask("quantize", random_checkpoint, "--scheme", "int4-g16", "--to", tmp_path / "q")
    assert answer.status == 0
    assert "No super weight candidate" in answer.out and "nothing is kept" in answer.out


def test_json_says_what_was_written(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    words = ("--scheme", "int4-g16", "--keep", "2:49:7", "--to", tmp_path / "q", "--format", "json")
    answer = ask("quantize", planted_checkpoint, *words)
    (row,) = json.loads(answer.out)
    assert row["kept"] == "2:49:7" and row["unrounded"] == ["model.layers.2.mlp.down_proj.weight"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "Nothing to do"),
        (("--scheme", "int4_g128", "--measure"), "Did you mean 'int4-g128'"),
        (("--scheme", "int4-g100", "--keep", "none", "--to", "TO"), "groups of 100 do not divide rows of"),
        (("--scheme", "int4-tensor", "--to", "TO"), "`--measure` evaluates it without writing"),
        (("--scheme", "int4-g16,int8-row", "--measure"), "only --compare takes several"),
        (("--scheme", "int4-g16", "--keep", "2:700:7", "--to", "TO"), "rows are 0 to"),
        (("--compare", "--methods", "kep"), "Did you mean 'keep'"),
        (("--compare", "--activations"), "run one after the other"),
        (("--compare", "--to", "TO"), "run one after the other"),
        (("--clip", "zz=3", "--measure"), "Did you mean 'z'"),
        (("--clip", "z=-1", "--measure"), "out of range"),
        (("--budget", "many", "--to", "TO", "--scheme", "int4-g16"), "no number of bits per weight"),
        (("--budget", "3", "--to", "TO", "--scheme", "int4-g16", *QUICK), "Give that or more"),
        (("--tasks", "all", "--to", "TO"), "--tasks measures"),
        (("--keep-in", "adapter", "--measure"), "--keep-in adapter is about files: add --to DIR"),
        (("--keep-in", "int8", "--budget", "5", "--to", "TO"), "--budget leaves matrices with super weights as they"),
        (
            ("--keep-in", "int8", "--scheme", "int4-row", "--keep", "2:48:7", "--to", "TO"),
            "only the largest weight of a row is exact there",
        ),
        (("--keep-in", "adapter", "--amplify", "2", "--scheme", "int4-g16", "--to", "TO"), "Amplify them in the plain"),
        (("--nonfinite", "zero", "--to", "TO"), "no file is written of NaN"),
        (("--plot", "x.png", "--to", "TO"), "--plot draws what was measured"),
    ],
)
def test_a_wrong_request_is_usage(
    words: tuple[str, ...], says: str, ask: Ask, planted_checkpoint: Path, tmp_path: Path
) -> None:
    answer = ask("quantize", planted_checkpoint, *(str(tmp_path / "q") if each == "TO" else each for each in words))
    assert (answer.status, answer.out) == (2, "")
    assert says in answer.err
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_says_what_it_is(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    assert (
        ask("quantize", planted_checkpoint, "--scheme", "int8-row", "--keep", "none", "--to", tmp_path / "q").status
        == 0
    )
    answer = ask("quantize", tmp_path / "q", "--scheme", "int8-row", "--to", tmp_path / "again")
    assert answer.status == 3
    assert "quantized (compressed-tensors, 8 bits)" in answer.err
