import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from superweights.model.prompts import DEFAULT_TEXTS, VARIED_TEXTS
from superweights.results.records import (
    ActivationPeakRecord,
    NoteRecord,
    PersistenceRecord,
    PromptRecord,
    Record,
    ResidualPeakRecord,
)
from superweights.results.store import read_records
from superweights.testing import save_tiny_checkpoint

from .conftest import Ask

TEXTS = [text for text in (*DEFAULT_TEXTS, *VARIED_TEXTS) for _ in range(2)]  # without BOS, then with it


def residuals(records: Sequence[Record], *, edited: bool) -> dict[int, float]:
    """The largest |residual| by layer."""
    peaks = [each for each in records if isinstance(each, ResidualPeakRecord) and bool(each.edit) == edited]
    return {each.layer: abs(each.value) for each in peaks}


@pytest.fixture
def traced(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> tuple[str, list[Record]]:
    """The table and the records of a trace that removes the planted weight."""
    answer = ask("trace", planted_checkpoint, "--edit", "scale=0", "--out", tmp_path / "run.jsonl")
    assert (answer.status, answer.err) == (0, "")
    return answer.out, read_records(tmp_path / "run.jsonl")[1]


def test_without_an_edit_one_row_a_layer(ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("trace", planted_checkpoint)
    title, _, header, *rows = answer.out.splitlines()
    assert (answer.status, answer.err) == (0, "")
    assert (
        title
        == f"Largest |residual| by layer in {planted_checkpoint}, over 24 prompts; layer -1 is the embedding output."
    )
    assert header.split() == ["layer", "value", "channel", "medians", "token", "prompt"]
    assert [int(row.split()[0]) for row in rows] == [-1, 0, 1, 2, 3, 4, 5]
    assert [row.split()[2] for row in rows[3:]] == ["49"] * 4


def test_removing_the_weight_removes_the_super_activation(traced: tuple[str, list[Record]]) -> None:
    table, records = traced
    before, after = residuals(records, edited=False), residuals(records, edited=True)
    assert {layer: before[layer] for layer in (-1, 0, 1)} == {layer: after[layer] for layer in (-1, 0, 1)}
    assert all(after[layer] < before[layer] / 10 for layer in (2, 3, 4, 5))
    assert {each.edit for each in records if isinstance(each, ResidualPeakRecord)} == {"", "scale=0 on 2:49:7"}
    assert "edited value  edited channel" in table.splitlines()[2]
    assert table.splitlines()[-1] == "edited: scale=0 on 2:49:7"


def test_both_passes_leave_the_peaks_of_every_down_projection(traced: tuple[str, list[Record]]) -> None:
    peaks = [each for each in traced[1] if isinstance(each, ActivationPeakRecord)]
    assert Counter((each.edited, each.side) for each in peaks) == {
        (edited, side): 6 for edited in (False, True) for side in ("input", "output")
    }
    outputs = {each.edited: abs(each.value) for each in peaks if (each.layer, each.side) == (2, "output")}
    assert outputs[True] < outputs[False] / 10


def test_doubling_the_weight_doubles_the_super_activation(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    ask("trace", planted_checkpoint, "--edit", "scale=2", "--weights", "2:49:7", "--out", out)
    run, records = read_records(out)
    assert residuals(records, edited=True)[2] == pytest.approx(2 * residuals(records, edited=False)[2], rel=0.05)
    assert (run.settings["edit"], run.settings["weights"]) == (["scale=2"], "2:49:7")


def test_the_channel_is_followed_over_the_prompts_of_the_prompt_records(traced: tuple[str, list[Record]]) -> None:
    prompts = [each for each in traced[1] if isinstance(each, PromptRecord)]
    cells = [each for each in traced[1] if isinstance(each, PersistenceRecord)]
    assert [each.index for each in prompts] == list(range(24))
    assert [each.text for each in prompts] == TEXTS
    assert {(each.prompt, each.layer) for each in cells} == {(p, layer) for p in range(24) for layer in range(-1, 6)}
    assert {each.channel for each in cells} == {49}
    for cell in cells:
        prompt = prompts[cell.prompt]
        assert (cell.prompt_text, cell.token_text) == (prompt.text, prompt.token_texts[cell.token])
    for peak in traced[1]:
        if isinstance(peak, ResidualPeakRecord):
            assert peak.token_text == prompts[peak.prompt].token_texts[peak.token]


def test_a_further_prompt_keeps_the_numbering(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    ask("trace", planted_checkpoint, "--prompt", "Mine", "--out", out)
    records = read_records(out)[1]
    prompts = {each.index: each.text for each in records if isinstance(each, PromptRecord)}
    assert (prompts[6], prompts[7], len(prompts)) == ("Mine", "Mine", 26)
    assert {each.prompt: each.prompt_text for each in records if isinstance(each, PersistenceRecord)} == prompts


def test_several_edits_stand_side_by_side(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    edits = ("scale=0", "scale=0+restore-sa", "sa=mean", "sa=0", "prune-largest=3")
    words = [word for edit in edits for word in ("--edit", edit)]
    table = ask("trace", planted_checkpoint, *words, "--weights", "2:49:7", "--out", out).out
    assert "edit 5 value" in table
    assert "edit 2: scale=0+restore-sa on 2:49:7" in table
    peaks = {
        edit: {each.layer: abs(each.value) for each in read_records(out)[1]
               if isinstance(each, ResidualPeakRecord) and each.edit.partition(" ")[0] == edit}
        for edit in ("", *edits)
    }  # fmt: skip
    original = peaks[""][3]
    assert peaks["scale=0"][3] < 0.9 * original, "another channel is the largest now"
    assert peaks["sa=0"][3] < 0.9 * original
    assert peaks["scale=0+restore-sa"][3] == pytest.approx(original, rel=0.02)
    assert peaks["sa=mean"][3] > 0.5 * original
    assert peaks["prune-largest=3"][3] == pytest.approx(original, rel=0.5)


def test_the_weights_of_an_earlier_search_are_edited(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    ask("find", planted_checkpoint, "--out", tmp_path / "found.jsonl")
    by_file = ask("trace", planted_checkpoint, "--edit", "scale=0", "--weights", tmp_path / "found.jsonl")
    assert by_file == ask("trace", planted_checkpoint, "--edit", "scale=0", "--weights", "2:49:7")
    assert by_file == ask("trace", planted_checkpoint, "--edit", "scale=0")


def test_find_pipes_into_trace(
    planted_checkpoint: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from superweights.cli import main

    assert main(["find", str(planted_checkpoint), "--out", "-"]) == 0
    piped = io.TextIOWrapper(io.BytesIO(capfdbinary.readouterr().out))
    monkeypatch.setattr(sys, "stdin", piped)
    assert main(["trace", str(planted_checkpoint), "--edit", "scale=0", "--weights", "-"]) == 0
    assert b"edited: scale=0 on 2:49:7" in capfdbinary.readouterr().out


def test_nothing_found_edits_nothing_and_says_so(ask: Ask, random_checkpoint: Path, tmp_path: Path) -> None:
    answer = ask("trace", random_checkpoint, "--edit", "scale=0", "--out", tmp_path / "run.jsonl")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.endswith("\nNo super weight candidate was found, so nothing was edited.\n")
    records = read_records(tmp_path / "run.jsonl")[1]
    assert [each.level for each in records if isinstance(each, NoteRecord)] == ["warning"]
    assert residuals(records, edited=True) == {}


def test_the_formats_hold_the_same_rows(ask: Ask, planted_checkpoint: Path) -> None:
    words = ("trace", planted_checkpoint, "--edit", "scale=0", "--weights", "2:49:7", "--format")
    lines = [json.loads(line) for line in ask(*words, "jsonl").out.splitlines()]
    assert lines == json.loads(ask(*words, "json").out)
    rows = list(csv.DictReader(io.StringIO(ask(*words, "csv").out)))
    assert [(int(row["layer"]), row["edit"]) for row in rows] == [
        (layer, edit) for edit in ("", "scale=0 on 2:49:7") for layer in range(-1, 6)
    ]
    assert [ResidualPeakRecord.model_validate(each).layer for each in lines] == [int(row["layer"]) for row in rows]


def test_both_plots(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    curve, heat = tmp_path / "curve.svg", tmp_path / "heat.html"
    answer = ask("trace", planted_checkpoint, "--edit", "scale=0", "--plot", curve, "--plot-persistence", heat)
    assert (answer.status, answer.err) == (0, "")
    drawn = curve.read_text()
    assert all(words in drawn for words in ("max |residual|", "24 prompts", "scale=0 on 2:49:7", "emb"))
    page = heat.read_text()
    assert all(words in page for words in ("residual channel 49", "yes yes yes yes yes (with BOS)", VARIED_TEXTS[3]))


@pytest.mark.parametrize("layers", ["0:1", "0:3"])
def test_the_first_layers_alone(layers: str, ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("trace", planted_checkpoint, "--layers", layers, "--format", "jsonl")
    assert [json.loads(line)["layer"] for line in answer.out.splitlines()] == list(range(-1, int(layers[-1])))


def test_a_model_of_one_layer(ask: Ask, tmp_path: Path) -> None:
    answer = ask("trace", save_tiny_checkpoint("llama", tmp_path / "one", layers=1), "--format", "csv")
    assert (answer.status, answer.err) == (0, "")
    assert len(answer.out.splitlines()) == 1 + 2


def test_residencies_give_the_same_answer(ask: Ask, planted_checkpoint: Path) -> None:
    words = ("trace", planted_checkpoint, "--edit", "scale=0", "--format", "jsonl", "--residency")
    assert ask(*words, "streamed") == ask(*words, "resident")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--edit", "scale"), "--edit scale: 'scale' has no value that fits. Write scale=FACTOR"),
        (("--edit", "scale=x"), "'scale=x' has no value that fits"),
        (("--edit", "scale=nan"), "has no value that fits"),
        (("--edit", "scale=inf"), "has no value that fits"),
        (("--edit", "scale=0+prune-largest=0"), "'prune-largest=0' has no value that fits"),
        (("--edit", "scal=1"), "There is no edit 'scal'. Did you mean 'scale', 'sa'?"),
        (("--edit", "restore-sa"), "no weight of it is edited"),
        (("--weights", "2:49:7"), "Add --edit, for example --edit scale=0"),
        (("--edit", "scale=1", "--weights", "2:49:7"), "changes nothing"),
        (("--edit", "scale=0", "--weights", "2:49:112"), "rows are 0 to 63, cols are 0 to 111"),
        (("--edit", "scale=0", "--weights", "6:49:7"), "the layers are 0 to 5"),
        (("--edit", "scale=0", "--weights", "published"), "There is no published model 'llama'"),
    ],
)
def test_a_wrong_request_is_usage(words: tuple[str, ...], says: str, ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("trace", planted_checkpoint, *words)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("superweights: error: ") and answer.err.count("\n") == 1
    assert says in answer.err


def test_a_wrong_coordinate_costs_no_pass(ask: Ask, planted_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[object] = []
    monkeypatch.setattr("superweights.model.loading.LoadedModel.run", lambda *_, **__: passes.append(1))
    assert ask("trace", planted_checkpoint, "--edit", "scale=0", "--weights", "9:0:0").status == 2
    assert passes == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_does_not_cost_the_answer(ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("trace", planted_checkpoint, "--out", "/dev/full")
    assert answer.status == 3
    assert "No space left on device" in answer.err
    assert "Largest |residual|" in answer.out


def test_ctrl_c_leaves_no_file(
    ask: Ask, planted_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    answer = ask("trace", planted_checkpoint, "--out", tmp_path / "run.jsonl", "--plot", tmp_path / "curve.svg")
    assert (answer.status, answer.err) == (130, "superweights: interrupted\n")
    assert list(tmp_path.iterdir()) == []
