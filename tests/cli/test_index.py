import csv
import io
import json

from superweights.detection.published import published_models

from .conftest import Ask

OLMO = "allenai/OLMo-1B-0724-hf"


def test_without_a_model_all_models_are_counted(ask: Ask) -> None:
    rows = json.loads(ask("index", "--format", "json").out)
    assert [row["model"] for row in rows] == list(published_models())
    assert sum(row["entries"] for row in rows) == 137
    assert sum(row["residual_channel_records"] for row in rows) == 41
    assert next(row for row in rows if row["model"] == OLMO)["usable_scalars"] == 2


def test_the_table_of_models_names_them_all(ask: Ask) -> None:
    lines = ask("index").out.splitlines()
    assert {line.split()[0] for line in lines[3:]} == set(published_models())


def test_an_erratum_is_shown_with_its_note(ask: Ask) -> None:
    [line] = [line for line in ask("index", "olmo-1b-0724-hf").out.splitlines() if "published-wrong" in line]
    assert line.startswith("1:1764:8041 ") and "real layer is 2" in line


def test_conflicts_are_shown_below(ask: Ask) -> None:
    out = ask("index", OLMO).out
    assert out.index("Conflict: paper Table 2 layer typo") > out.rindex("1:1764:1710")
    assert "  disagree: paper L1; haziq-exe and sunmoonron copied L1\n" in out


def test_residual_channels_are_shown(ask: Ask) -> None:
    out = ask("index", "meta-llama/Llama-2-7b-hf").out
    assert "Massive channels of the residual stream" in out
    assert "1415: 1632, 2533: 2768, 1512: 173" in out


def test_a_model_without_coordinates_says_so(ask: Ask) -> None:
    assert ask("index", "gemma-2-2b").out.startswith("google/gemma-2-2b: no published entries\n")


def test_programs_get_all_records_with_their_kind(ask: Ask) -> None:
    rows = [json.loads(line) for line in ask("index", "llama-2-7b-hf", "--format", "jsonl").out.splitlines()]
    assert [sum(row["record"] == kind for row in rows) for kind in ("weight", "residual_channels", "conflict")] == [
        9,
        3,
        1,
    ]
    first = rows[0]
    assert (first["layer"], first["row"], first["col"], first["status"]) == (1, 2533, 7890, "published")


def test_csv_has_the_same_records(ask: Ask) -> None:
    rows = list(csv.DictReader(io.StringIO(ask("index", "llama-2-7b-hf", "--format", "csv").out)))
    assert len(rows) == 13 and rows[0]["row"] == "2533"


def test_an_unknown_model_is_usage(ask: Ask) -> None:
    answer = ask("index", "meta-llama/Llama-2-7b")
    assert (answer.status, answer.out) == (2, "")
    assert "Did you mean 'meta-llama/Llama-2-7b-hf'" in answer.err
