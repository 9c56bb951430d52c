"""Which epoch is kept, and when to stop."""

from hypothesis import given
from hypothesis import strategies as st

from clinifed.evaluation.stopping import Figures, Watch


def watched(patience: int | None, *accuracy: float, loss: float = 1.0) -> Watch:
    watch = Watch(patience)
    for value in accuracy:
        watch.add(Figures(value, loss))
    return watch


def test_the_earliest_of_equals_is_kept_and_the_loss_breaks_ties():
    watch = watched(None, 0.5, 0.8, 0.8)
    assert watch.best == 1
    watch.add(Figures(0.8, 0.9))
    assert watch.best == 3


def test_a_run_that_only_loses_ends_as_it_began():
    assert watched(None, 0.8, 0.7, 0.6).best == 0


def test_it_stops_after_patience_epochs_without_a_better_one_and_never_without_patience():
    assert [watched(2, *[0.5, 0.6, 0.6, 0.6][:n]).stops for n in (1, 2, 3, 4)] == [False, False, False, True]
    assert not watched(None, *[0.5] * 50).stops


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 4))
def test_a_run_is_stopped_by_its_past_alone(accuracy, patience):
    """A resumed run, which judges its epochs anew, stops where the first one did."""
    stops = [watched(patience, *accuracy[: n + 1]).stops for n in range(len(accuracy))]
    for n, value in enumerate(stops):
        assert value == (n - max(range(n + 1), key=lambda i: (accuracy[i], -i)) >= patience)
