"""What several folders of tests need."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from clinifed.config import Aggregation, Training
from clinifed.contract import BaseModelRef, Contract, ContractSite, Promise
from clinifed.models.specialties import SPECIALTIES


@pytest.fixture(scope="session", autouse=True)
def flare_messages() -> None:
    """FLARE's own forms of its messages, which its processes register when they start.

    Without them the first message that is encoded here gets a form that loses its content, for the whole session.
    """
    from nvflare.apis.utils.decomposers import flare_decomposers
    from nvflare.app_common.decomposers import common_decomposers

    flare_decomposers.register()
    common_decomposers.register()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, here and in what tests start; a shell starts what runs in its background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def make_contract() -> Callable[..., Contract]:
    """A contract over small heads, made without a model: (site → specialties, site → public key)."""

    def make(
        sites: Mapping[str, Sequence[str]],
        keys: Mapping[str, str] | None = None,
        dim: int = 4,
        projection: bool = False,
    ) -> Contract:
        names = sorted({name for mine in sites.values() for name in mine})
        shapes: dict[str, tuple[int, ...]] = {"trunk.projection.weight": (dim, dim)} if projection else {}
        for name in names:
            labels = len(SPECIALTIES[name].labels)
            shapes |= {f"heads.{name}.weight": (labels, dim), f"heads.{name}.bias": (labels,)}
        return Contract(
            federation="unit",
            clinifed_version="0",
            base_model=BaseModelRef(ref="tiny", sha256="0" * 64),
            specialties={name: SPECIALTIES[name] for name in names},
            training=Training(train="projection" if projection else "heads"),
            promise=Promise(
                mode="dp",
                epsilon=1,
                delta=1e-5,
                noise_multiplier=10,
                max_grad_norm=1,
                releases=3,
                objective="cross-entropy",
            ),
            rounds=3,
            min_clients=1,
            max_clients=max(3, len(sites)),
            aggregation=Aggregation(quorum=1, round_timeout_s=60),
            sites={
                name: ContractSite(
                    specialties=tuple(sorted(mine)),
                    nominal_patients=10,
                    weight=number + 1,
                    norm_bound=100,
                    public_key=(keys or {}).get(name),
                )
                for number, (name, mine) in enumerate(sites.items())
            },
            shapes=shapes,
        )

    return make
