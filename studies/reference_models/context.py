"""How much does a model need its first token, by length of context? `python context.py MODEL --text FILE --channel 69`.

For windows of 8 to 128 tokens: perplexity ratio with the channel of the super activation at zero after every layer, and
with the first token hidden from attention altogether.
"""

import argparse

import torch

import superweights as sw
from superweights.interventions.conditions import Condition, EditSuperActivation
from superweights.interventions.rows import condition_states
from superweights.measurements.intervals import perplexity_ratio
from superweights.measurements.scores import score_states

TOKENS = 16384


def main() -> None:
    """Reads the command line, measures and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--channel", type=int, required=True)
    args = parser.parse_args()
    print("| tokens | super activation removed | first token hidden |\n| --- | --- | --- |")
    with sw.load(args.model) as model:
        layers = range(model.architecture.layer_count)
        removed = Condition("removed", tuple(EditSuperActivation(each, args.channel) for each in layers))
        for length in (8, 16, 32, 64, 128):
            ids = sw.open_windows(model, args.text, windows=TOKENS // length, length=length).ids
            hidden = torch.ones_like(ids)
            hidden[:, 0] = 0
            original = model.states(ids)
            without = condition_states(model, ids, [removed])[0]
            masked = model.states(ids, attention_mask=hidden)
            losses = [
                score_states(model, each[None, :, 1:], ids[:, 1:], None).nll_nats[0].numpy()  # after the first token
                for each in (original, without, masked)
            ]
            cells = [perplexity_ratio(each, losses[0]) for each in losses[1:]]
            row = " | ".join(f"x{each.value:.3f} ({each.low:.3f} to {each.high:.3f})" for each in cells)
            print(f"| {length} | {row} |")


if __name__ == "__main__":
    main()
