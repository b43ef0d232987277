import pytest

import superweights as sw
from superweights.errors import UsageError
from superweights.measurements.model_windows import longest_sequence, open_windows


def test_windows_are_as_long_as_the_model_takes(planted_checkpoint):
    with sw.load(planted_checkpoint) as model:
        limit = longest_sequence(model)
        assert limit == model.model.config.max_position_embeddings
        windows = open_windows(model, windows=2, at_most=100)
        assert tuple(windows.ids.shape) == (2, min(100, limit))
        assert tuple(open_windows(model, windows=3, length=17).ids.shape) == (3, 17)
        with pytest.raises(UsageError, match=str(limit)):
            open_windows(model, length=limit + 1)


def test_a_text_shorter_than_a_window_says_what_would_fit(planted_checkpoint, tmp_path):
    (tmp_path / "short.txt").write_text("the cat sat on the mat")
    with sw.load(planted_checkpoint) as model, pytest.raises(UsageError, match="length"):
        open_windows(model, str(tmp_path / "short.txt"), length=300)
