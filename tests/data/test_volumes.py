import pytest

from clinifed.data.volumes import Frames
from clinifed.errors import ConfigError


@pytest.mark.parametrize(("count", "available", "chosen"), [
    (1, 1, (0,)),
    (1, 2, (1,)),
    (1, 3, (1,)),
    (1, 100, (50,)),
    (3, 9, (1, 4, 7)),
    (4, 4, (0, 1, 2, 3)),
    (5, 2, (0, 1)),
])  # fmt: skip
def test_frames_are_the_middles_of_equal_parts(count, available, chosen):
    assert Frames(count).of(available) == chosen


@pytest.mark.parametrize("available", [1, 2, 7, 63, 64, 65, 1000])
def test_no_frame_is_taken_twice(available):
    for count in range(1, 65):
        chosen = Frames(count).of(available)
        assert len(set(chosen)) == len(chosen) == min(count, available)
        assert list(chosen) == sorted(chosen)
        assert set(chosen) <= set(range(available))


@pytest.mark.parametrize("count", [0, -1, 65, 1.5, True, "3"])
def test_a_wrong_number_is_refused(count):
    with pytest.raises(ConfigError, match="1 to 64"):
        Frames(count)
