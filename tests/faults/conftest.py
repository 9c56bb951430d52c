"""A federation of real processes, started once; each test runs in it and leaves it as it was."""

from collections.abc import Iterator

import pytest

from .federation import SITES, LiveFederation, make_federation


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFederation]:
    made = make_federation(tmp_path_factory.mktemp("federation"))
    with made.proxy, made.kits:
        made.kits.start()
        made.kits.wait_connected(SITES, 120)
        yield made
    assert not [p for name in made.kits.kits for p in made.kits.processes(name)]


@pytest.fixture
def live(started: LiveFederation) -> Iterator[LiveFederation]:
    """The federation with every process up, and no fault waiting."""
    started.clear_faults()
    started.proxy.mode = "pass"
    started.kits.start()
    started.kits.wait_connected(SITES, 120)
    yield started
    started.clear_faults()
