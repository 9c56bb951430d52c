"""Training at one site, without FLARE: (contract, policy) once, then (round, global delta) → Update."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clinifed.contract import Contract
from clinifed.errors import ModelError, UpdateError
from clinifed.executors.features import patient_tensors, site_manifest
from clinifed.executors.release import Releases, check_contract
from clinifed.messages import Parameters, Update, allowed_names, projected, rounded
from clinifed.models.adapters import FrozenPart, TrainablePart, accelerator, build_trainable
from clinifed.models.backbone import Backbone, load_backbone
from clinifed.models.basis import read_basis
from clinifed.models.state import apply_delta
from clinifed.policy import SitePolicy
from clinifed.privacy.engine import Mechanism, PatientTensors, mean_loss, plain_step, private_step, pull_towards
from clinifed.privacy.objectives import label_counts, resolve_objective
from clinifed.privacy.patients import rows_per_batch
from clinifed.privacy.self_test import self_test

__all__ = ["SiteTrainer", "local_steps"]

log = logging.getLogger(__name__)


def local_steps(
    part: TrainablePart,
    start: Mapping[str, Tensor],
    data: PatientTensors,
    contract: Contract,
    nominal_patients: int,
    steps: int,
) -> None:
    """``steps`` full-batch steps on ``part``, in place: private ones, already charged, unless privacy is off.

    Args:
        start: the zero-shot parameters, towards which ``training.pull`` draws after each step. It sees no data.
    """
    promise, training = contract.promise, contract.training
    objective, batch_size = resolve_objective(promise.objective), rows_per_batch(data, training.batch_size)
    for _ in range(steps):
        if promise.mode == "off":
            plain_step(part, data, objective, training.learning_rate, batch_size)
        else:
            mechanism = Mechanism(promise.noise_multiplier, promise.max_grad_norm, nominal_patients)
            private_step(part, data, objective, mechanism, training.learning_rate, batch_size)
        if training.pull:
            pull_towards(part, start, training.pull)


class SiteTrainer:
    """A site's part in one job. State that must outlive the process is on the site's disk only.

    Args:
        contract: what the job brings.
        policy: what the site permits.
        job: the run's name; a run may take several FLARE jobs, and its releases stay the same in each.
        coordinator: who submitted it, by FLARE's word.
        backbone: the base model, where the caller has loaded it already; it loses its text tower.
        start: what a global delta counts from, and what ``training.pull`` draws towards; default: zero-shot. It must
            be public: noised already, or made without patients.

    Guarantees:
        - Every release is charged to the ledger before its noise is drawn.
        - What leaves is the noised change of the trunk and of the site's own heads, and nothing un-noised that the
          policy does not declare.
        - A contract beyond the policy, or a budget that does not pay, is refused before any image is read.
        - Under differential privacy the noise is tested, without data, before anything is charged.
        - No image of a patient who withdrew is read, whatever the manifest lists.
    """

    def __init__(
        self,
        contract: Contract,
        policy: SitePolicy,
        job: str,
        coordinator: str,
        backbone: Backbone | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.contract, self.policy = contract, policy
        manifest = site_manifest(policy)
        check_contract(contract, policy, coordinator, manifest.data_class)
        if contract.promise.mode == "dp":
            self_test(accelerator())
        backbone = backbone or load_backbone(policy.model_ref or contract.base_model.ref, policy.cache)
        if backbone.sha256 != contract.base_model.sha256:
            raise ModelError(
                f"site {policy.site} holds base model {backbone.sha256}, the contract wants "
                f"{contract.base_model.sha256}; install the same weights"
            )
        if (agreed := contract.base_model.basis_sha256) is not None:
            if policy.basis is None:
                raise ModelError(
                    f"site {policy.site}: the contract's heads train in basis {agreed}; install its file, and name it "
                    "under `basis` in the policy"
                )
            backbone = backbone.with_basis(read_basis(policy.basis, agreed))
        self.releases = Releases(contract, policy, job)
        self.releases.reserve(manifest)  # before any image is read
        site = contract.sites[policy.site]
        mine = {name: contract.specialties[name] for name in sorted(site.specialties)}
        training = contract.training
        self.objective = resolve_objective(contract.promise.objective)
        self.part = build_trainable(backbone, mine, training, start).ready()
        backbone.free_text()  # its prompts are in the heads now
        self.start = self.part.shared()
        self.data = patient_tensors(
            FrozenPart(backbone, self.part),
            backbone,
            manifest,
            mine,
            split="train",
            batch_size=training.batch_size,
            cache=policy.cache,
            objective=self.objective,
            views=training.views,
        )

    def train(self, round_number: int, delta: Mapping[str, Tensor]) -> Update:
        """One round from the global ``delta`` (name → float32 tensor); returns this site's change.

        Asked again for a round that was released, it returns the same bytes.

        Raises:
            BudgetExceededError: the site's budget does not pay for the round.
            UpdateError: the global delta does not fit.
        """
        names = allowed_names(delta, self.contract.sites[self.policy.site].specialties)
        if names != set(self.start):
            raise UpdateError("wrong_names", f"the server sent {sorted(delta)}, this site needs {sorted(self.start)}")
        began = apply_delta(self.start, {name: delta[name] for name in names})

        def make() -> tuple[Parameters, dict[str, Any]]:
            started = time.perf_counter()
            self.part.load_shared(began)
            declared = self._declared()
            nominal = self.contract.sites[self.policy.site].nominal_patients
            epochs = self.contract.training.local_epochs
            local_steps(self.part, self.start, self.data, self.contract, nominal, epochs)
            log.info("round %d: trained in %.2f s", round_number, time.perf_counter() - started)
            change = {n: (t - began[n]).numpy() for n, t in self.part.shared().items()}
            # The server refuses what is longer than the contract's bound; after the noise, shortening it is free.
            bound = self.contract.sites[self.policy.site].norm_bound
            sent = rounded if self.contract.aggregation.update_dtype == "bfloat16" else projected
            return sent(change, bound), declared

        return self.releases.release(round_number, make)

    @torch.no_grad()
    def _declared(self) -> dict[str, Any]:
        """What the policy declares of the site's data, as it is, without noise; the model's card lists it."""
        specialties, data = self.contract.specialties, self.data
        names = sorted(self.contract.sites[self.policy.site].specialties)
        figures: dict[str, Any] = {}
        for what in self.policy.declare:
            if what == "patient_count":
                figures[what] = data.patients
            elif what == "image_count":
                figures[what] = int(data.first.sum())
            elif what == "label_counts":
                label, specialty = data.label[data.first], data.specialty[data.first]  # once for each image
                figures[what] = {
                    name: label_counts(self.objective, label[specialty == index], len(specialties[name].labels))
                    for index, name in enumerate(names)
                }
            elif what == "train_loss":
                figures[what] = mean_loss(self.part, data, self.objective, self.contract.training.batch_size)
        return figures
