import pytest

import superweights as sw
from superweights.cli.text_options import TextOptions, open_windows
from superweights.errors import UnknownNameError, UsageError
from superweights.measurements.model_windows import longest_sequence
from superweights.testing import save_tiny_checkpoint


def test_by_default_the_embedded_text_in_windows_of_2048(planted_checkpoint):
    with sw.load(planted_checkpoint) as model:
        windows = open_windows(model, TextOptions(windows=2))
    assert (tuple(windows.ids.shape), windows.text_name, windows.bos) == ((2, 2048), "heldout", True)
    assert (windows.ids[:, 0] == 1).all()


def test_the_model_limits_the_length(tmp_path):
    with sw.load(save_tiny_checkpoint("gpt2", tmp_path)) as model:
        assert longest_sequence(model) == 64
        assert open_windows(model, TextOptions(windows=3)).ids.shape == (3, 64)
        with pytest.raises(UsageError, match=r"The window length is 65, but .* takes at most 64 tokens"):
            open_windows(model, TextOptions(length=65))


@pytest.mark.parametrize(
    ("family", "limit"), [("gpt2", 64), ("opt", 64), ("mpt", 64), ("llama", 2048), ("mistral", 131072), ("bloom", None)]
)
def test_limits_by_family(family, limit, tmp_path):
    with sw.load(save_tiny_checkpoint(family, tmp_path)) as model:
        assert longest_sequence(model) == limit


def test_a_file_and_an_unknown_text(planted_checkpoint, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("a b c d e f g h i j")
    with sw.load(planted_checkpoint) as model:
        windows = open_windows(model, TextOptions(text=str(file), length=8))
        assert (len(windows.ids), windows.text_name) == (2, str(file))
        with pytest.raises(UnknownNameError, match="'wikitext2'"):
            open_windows(model, TextOptions(text="wikitext"))
        with pytest.raises(UsageError, match="must be 1 or more"):
            open_windows(model, TextOptions(windows=0))
