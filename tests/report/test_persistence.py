import pytest

from superweights.errors import UsageError
from superweights.report.persistence import persistence_chart

from .conftest import LAYERS, persistence, prompt


def panels_of(chart):
    return chart.to_dict()["vconcat"]


def test_a_cell_for_each_prompt_and_layer(persistences):
    rows = persistence_chart(persistences, title="Persistence").to_dict()["data"]["values"]
    assert len(rows) == 3 * (LAYERS + 1)
    assert [(row["left"], row["right"]) for row in rows[:2]] == [(-1.5, -0.5), (-0.5, 0.5)]
    assert [row["signed"] for row in rows[:5]] == [None, 0, -500, 510, 2]
    assert [row["size"] for row in rows[:5]] == [None, 0, 500, 510, 2]


def test_equal_prompts_are_told_apart_by_bos_and_then_by_number(persistences):
    sources = [prompt(0, "Hi", bos=True), prompt(1, "Hi", bos=False)]
    (panel,) = panels_of(persistence_chart([*persistences, *sources], title=""))
    names = panel["encoding"]["y"]["sort"]
    assert names[:2] == ["Hi (with BOS)", "Hi (no BOS)"]
    assert names[2] == r"A\nbA\nbA\nbA\nbA\nbA\nbA\nbA\nbA\nbA\n"[:39] + "…"
    (panel,) = panels_of(persistence_chart(persistences, title=""))
    assert panel["encoding"]["y"]["sort"][:2] == ["Hi (#0)", "Hi (#1)"]


def test_each_channel_has_a_panel_on_one_scale(persistences):
    panels = panels_of(persistence_chart([*persistences, persistence(0, 1, 9.0, channel=8)], title=""))
    assert [panel["title"]["text"] for panel in panels] == ["residual channel 3", "residual channel 8"]
    assert {tuple(panel["encoding"]["color"]["scale"]["domain"]) for panel in panels} == {(0.051, 510)}


def test_nothing_to_draw():
    with pytest.raises(UsageError, match="no value of it"):
        persistence_chart([persistence(0, 0, 0.0)], title="Persistence")
