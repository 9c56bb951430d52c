"""Federation → contract → FLARE job. Code is never shipped with a job: every site has clinifed installed."""

import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nvflare.app_common.app_constant import AppConstants
from nvflare.job_config.api import FedJob
from nvflare.recipe import SimEnv
from nvflare.recipe.secrets import PotentialSecretWarning
from nvflare.recipe.spec import Recipe

from clinifed import __version__
from clinifed.aggregators.flare import FederatedRounds, SafetensorsPersistor, SpecialtyAggregator
from clinifed.config import Federation
from clinifed.contract import BaseModelRef, Contract, ContractSite, Promise
from clinifed.errors import ConfigError
from clinifed.executors.flare import SiteExecutor
from clinifed.models.adapters import build_trainable
from clinifed.models.backbone import Backbone
from clinifed.models.specialties import resolve_specialties
from clinifed.privacy.accountant import noise_multiplier_for
from clinifed.privacy.objectives import resolve_objective

__all__ = ["FederationRecipe", "build_contract"]


def build_contract(
    federation: Federation, backbone: Backbone, public_keys: Mapping[str, str] | None = None
) -> Contract:
    """The contract of ``federation`` on ``backbone``: sigma is calibrated here, once for all rounds.

    Args:
        public_keys: site → Ed25519 key, hexadecimal, where the configuration names none (simulated sites).

    Raises:
        ConfigError: a specialty is not known.
        PrivacyError: the objective may not run.
    """
    names = {name for site in federation.sites.values() for name in site.specialties}
    try:
        specialties = resolve_specialties(names, federation.specialties)
    except KeyError as error:
        raise ConfigError(f"specialty {error.args[0]!r} is not known; define it under `specialties:`") from None
    training, privacy = federation.training, federation.privacy
    resolve_objective(privacy.objective)
    releases = (federation.rounds + privacy.reserve_rounds) * training.local_epochs
    private = privacy.mode == "dp"
    part = build_trainable(backbone, specialties, training.train, training.temperature)
    by_patients = federation.aggregation.weights == "nominal_patients"
    return Contract(
        federation=federation.name,
        clinifed_version=__version__,
        base_model=BaseModelRef(ref=backbone.ref, sha256=backbone.sha256),
        specialties=specialties,
        training=training,
        promise=Promise(
            mode=privacy.mode,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            noise_multiplier=noise_multiplier_for(privacy.epsilon, privacy.delta, releases) if private else 0.0,
            max_grad_norm=privacy.max_grad_norm,
            reserve_rounds=privacy.reserve_rounds,
            releases=releases,
            objective=privacy.objective,
        ),
        rounds=federation.rounds,
        min_clients=federation.min_clients,
        max_clients=federation.max_clients,
        min_updates=federation.min_updates(),
        round_timeout_s=federation.aggregation.round_timeout_s,
        rule=federation.aggregation.rule,
        sites={
            name: ContractSite(
                specialties=tuple(sorted(site.specialties)),
                nominal_patients=federation.nominal_patients(name),
                weight=float(federation.nominal_patients(name)) if by_patients else 1.0,
                public_key=(public_keys or {}).get(name, site.public_key),
            )
            for name, site in sorted(federation.sites.items())
        },
        shapes={name: tuple(tensor.shape) for name, tensor in sorted(part.state_dict().items())},
    )


class FederationRecipe(Recipe):
    """The FLARE recipe of one contract: controller, aggregator and persistor at the server, our executor at sites."""

    def __init__(self, contract: Contract) -> None:
        run = uuid.uuid4().hex
        text = contract.text()
        job = FedJob(name=contract.federation, min_clients=contract.min_clients)
        job.to_server(SafetensorsPersistor(text), id=AppConstants.DEFAULT_PERSISTOR_ID)
        job.to_server(FederatedRounds(text, run, SpecialtyAggregator(text)))
        job.to_clients(SiteExecutor(text, run), tasks=[AppConstants.TASK_TRAIN])
        # Without this FLARE copies our source into the job and marks it as bring-your-own-code.
        job.set_app_packages(["clinifed"])
        super().__init__(job)

    def write(self, folder: Path) -> None:
        """Write the job folder ``folder/<name>`` for ``nvflare job submit`` or ``nvflare simulator``."""
        with _public_hash():
            self.export(str(folder))

    def simulate(self, environment: SimEnv) -> None:
        """Run the job in FLARE's simulator, in this process."""
        with _public_hash():
            self.run(environment)


@contextmanager
def _public_hash() -> Iterator[None]:
    """FLARE warns of high-entropy text in a job; ours is the base model's hash, which is public."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PotentialSecretWarning)
        yield
