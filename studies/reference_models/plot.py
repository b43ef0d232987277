"""Draws training logs and tabulates them: `python plot.py LOG ... --to FILE.png`, one colour per log.

Four panels over the tokens read: the largest stream value in medians, the share of it that the largest scalar product makes,
mean attention to the first token, and what removal costs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import altair as alt

from superweights.report.appearance import COLORS, dress
from superweights.report.saving import save_chart

PANELS = {
    "medians": "largest stream value, medians",
    "share": "share of its largest scalar product",
    "sink": "mean attention to the first token",
    "ratio": "perplexity without the 8 largest scalars, ratio",
}


def read_log(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The recipe, where the log begins with one, and the probed steps."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return (lines[0]["recipe"], lines[1:]) if "recipe" in lines[0] else ({}, lines)


def summarise(step: dict[str, Any]) -> dict[str, float]:
    """The numbers of one probed step that are drawn."""
    inner = step["peaks"][:-1]  # the last layer takes the value away
    layer = max(range(len(inner)), key=inner.__getitem__)
    held = max(abs(value) for value in step["in_channel"][:-1])
    row = [each for each in step["products"] if each["scalar"].split(":")[1] == str(step["channel"])]
    return {
        "tokens": step["tokens"],
        "medians": inner[layer] / step["medians"][layer],
        "share": max((abs(each["product"]) / held for each in row), default=0.0),
        "sink": sum(step["sink"]) / len(step["sink"]),
        "ratio": step["ratios"]["largest 8"],
        "single": max(value for name, value in step["ratios"].items() if ":" in name),
        "activation": step["ratios"]["super activation"],
        "nll_nats": step["nll_nats"],
    }


def table(paths: list[Path]) -> str:
    """One row of Markdown a log, of its last step."""
    rows = [
        "| run | hidden x layers, vocabulary | sequence x batch | rate, decay | tokens, M | loss, nats | medians | share | "
        "sink | one scalar | eight | super activation |",
        "| --- " * 12 + "|",
    ]
    for path in paths:
        recipe, steps = read_log(path)
        last = summarise(steps[-1])
        size = f"{recipe.get('hidden', '')} x {recipe.get('layers', '')}, {recipe.get('vocabulary', '')}"
        batches = f"{recipe.get('sequence', '')} x {recipe.get('batch', '')}"
        optimiser = f"{recipe.get('learning_rate', '')}, {recipe.get('weight_decay', '')}"
        rows.append(
            f"| {path.stem} | {size} | {batches} | {optimiser} | {last['tokens'] / 1e6:.2f} | {last['nll_nats']:.3f} | "
            f"{last['medians']:.0f} | {last['share']:.2f} | {last['sink']:.2f} | x{last['single']:.3f} | "
            f"x{last['ratio']:.3f} | x{last['activation']:.3f} |"
        )
    return "\n".join(rows)


def draw(paths: list[Path]) -> alt.TopLevelMixin:
    """All panels, one line a log."""
    rows = [
        {"run": path.stem, "panel": panel, "value": found[panel], "tokens": found["tokens"]}
        for path in paths
        for step in read_log(path)[1]
        if step["tokens"]
        for found in [summarise(step)]
        for panel in PANELS
    ]
    names = [path.stem for path in paths]
    colors = [*COLORS, "#c0392b", "#111111", "#b5651d", "#6b8e23", "#888888"][: len(names)]
    color = alt.Color("run:N", scale=alt.Scale(domain=names, range=colors), title="run")
    panels = [
        alt.Chart(alt.Data(values=[row for row in rows if row["panel"] == panel]))
        .mark_line(point=alt.OverlayMarkDef(size=18))
        .encode(
            x=alt.X(
                "tokens:Q", scale=alt.Scale(type="log"), title="tokens read", axis=alt.Axis(format="~s", tickCount=5)
            ),
            y=alt.Y(
                "value:Q", title=title, scale=alt.Scale(type="log" if panel == "medians" else "linear", zero=False)
            ),
            color=color,
            tooltip=["run:N", "tokens:Q", "value:Q"],
        )
        .properties(width=380, height=220)
        for panel, title in PANELS.items()
    ]
    grid = alt.vconcat(alt.hconcat(*panels[:2]), alt.hconcat(*panels[2:]))
    return dress(grid, title="Super activations in training", subtitle="probed at step 1, 2, 4, ... and every 5 %")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    save_chart(draw(args.logs), str(args.to))
    print(table(args.logs))


if __name__ == "__main__":
    main()
