"""Federation → contract → FLARE job. Code is never shipped with a job: every site has clinifed installed."""

import math
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
from clinifed.aggregators import rule_problems
from clinifed.aggregators.flare import FederatedRounds
from clinifed.aggregators.specialty import SpecialtyAggregator
from clinifed.aggregators.tracking import FiguresReceiver
from clinifed.config import Federation
from clinifed.contract import BaseModelRef, Contract, ContractSite, Promise
from clinifed.errors import ConfigError
from clinifed.executors.flare import SiteExecutor
from clinifed.messages import TASK_FINISH, TASK_HANDSHAKE, allowed_names
from clinifed.models.adapters import build_trainable
from clinifed.models.backbone import Backbone
from clinifed.models.specialties import resolve_specialties
from clinifed.privacy.accountant import noise_multiplier_for, update_norm_bound
from clinifed.privacy.objectives import resolve_objective

__all__ = ["FederationRecipe", "build_contract", "new_run"]


# A dead site is noticed within 30 s of silence (the server's heart_beat_timeout), taken for dead after so many more,
# and no longer waited for; FLARE's own defaults add up to a quarter of an hour.
_DEAD_SITES = {"dead_client_grace_period": 10.0, "dead_client_check_lead_time": 5.0}


def new_run() -> str:
    """A name for a run that no ledger and no server knows yet."""
    return uuid.uuid4().hex


def build_contract(
    federation: Federation, backbone: Backbone, public_keys: Mapping[str, str] | None = None
) -> Contract:
    """The contract of ``federation`` on ``backbone``: sigma is calibrated here, once for all rounds.

    Args:
        public_keys: site → Ed25519 key, hexadecimal, where the configuration names none (simulated sites).

    Raises:
        ConfigError: a specialty is not known, or the sites are too few for the aggregation rule.
        PrivacyError: the objective may not run.
    """
    names = {name for site in federation.sites.values() for name in site.specialties}
    try:
        specialties = resolve_specialties(names, federation.specialties)
    except KeyError as error:
        raise ConfigError(f"specialty {error.args[0]!r} is not known; define it under `specialties:`") from None
    offered = {name: site.specialties for name, site in federation.sites.items()}
    if problems := rule_problems(federation.aggregation, offered):
        raise ConfigError(*problems)
    training, privacy = federation.training, federation.privacy
    resolve_objective(privacy.objective)
    releases = (federation.rounds + privacy.reserve_rounds) * training.local_epochs
    private = privacy.mode == "dp"
    part = build_trainable(backbone, specialties, training)
    basis = backbone.basis.sha256() if backbone.basis and training.basis != "none" else None
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(part.shared().items())}
    sigma = noise_multiplier_for(privacy.epsilon, privacy.delta, releases) if private else 0.0

    def norm_bound(site: str) -> float:
        sent = allowed_names(shapes, federation.sites[site].specialties)
        return federation.aggregation.norm_bound or update_norm_bound(
            sigma,
            privacy.max_grad_norm,
            federation.nominal_patients(site),
            learning_rate=training.learning_rate,
            steps=training.local_epochs,
            dimension=sum(math.prod(shapes[name]) for name in sent),
        )

    by_patients = federation.aggregation.weights == "nominal_patients"
    return Contract(
        federation=federation.name,
        clinifed_version=__version__,
        base_model=BaseModelRef(ref=backbone.ref, sha256=backbone.sha256, basis_sha256=basis),
        specialties=specialties,
        training=training,
        aggregation=federation.aggregation,
        promise=Promise(
            mode=privacy.mode,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            noise_multiplier=sigma,
            max_grad_norm=privacy.max_grad_norm,
            reserve_rounds=privacy.reserve_rounds,
            releases=releases,
            objective=privacy.objective,
        ),
        rounds=federation.rounds,
        min_clients=federation.min_clients,
        max_clients=federation.max_clients,
        sites={
            name: ContractSite(
                specialties=tuple(sorted(site.specialties)),
                nominal_patients=federation.nominal_patients(name),
                weight=float(federation.nominal_patients(name)) if by_patients else 1.0,
                norm_bound=norm_bound(name),
                public_key=(public_keys or {}).get(name, site.public_key),
            )
            for name, site in sorted(federation.sites.items())
        },
        shapes=shapes,
    )


class FederationRecipe(Recipe):
    """The FLARE recipe of one job of a run: controller and aggregator at the server, our executor at sites.

    Args:
        run: the run's name; default: a new one. Jobs with the name of a run go on where it stands.
        until: the job does the rounds before this one; default: all of them.
    """

    def __init__(self, contract: Contract, run: str | None = None, until: int | None = None) -> None:
        self.run_name = run or new_run()
        text = contract.text()
        # FLARE ends a job in which fewer than its own min_clients are left alive; ours goes on while the quorum is.
        job = FedJob(name=contract.federation, min_clients=contract.aggregation.quorum)
        job.to_server(FederatedRounds(text, self.run_name, until or contract.rounds, SpecialtyAggregator(text)))
        job.to_server(FiguresReceiver(), id="figures")
        tasks = [AppConstants.TASK_TRAIN, TASK_HANDSHAKE, TASK_FINISH]
        job.to_clients(SiteExecutor(text, self.run_name), tasks=tasks)
        # Without this FLARE copies our source into the job and marks it as bring-your-own-code.
        job.set_app_packages(["clinifed"])
        super().__init__(job)
        self.add_server_config(_DEAD_SITES)
        # A result whose answer does not come (the server was killed, or a firewall swallowed it) is sent again while
        # the round lasts; the answer comes after the arrays, so a long round has long transfers.
        self.add_client_config({"submit_task_result_timeout": max(10.0, contract.aggregation.round_timeout_s / 2)})

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
