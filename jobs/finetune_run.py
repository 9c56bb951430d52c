"""The epochs of a fine-tuning: each one release and one durable checkpoint; then the one that is kept."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clinifed.aggregators.checkpoint import write_checkpoint
from clinifed.data.manifest import Manifest
from clinifed.errors import BudgetExceededError
from clinifed.evaluation.scoring import score_part
from clinifed.evaluation.stopping import Figures, Watch
from clinifed.executors.features import patient_tensors
from clinifed.executors.trainer import SiteTrainer
from clinifed.files import write_json
from clinifed.jobs.card import agreed_card, public_paths, without_basis
from clinifed.jobs.finetune_card import claim_of, started_from
from clinifed.jobs.finetune_plan import PreparedSite, ValidationSet
from clinifed.models.adaptation import Start
from clinifed.models.adapters import FrozenPart, TrainablePart, build_trainable
from clinifed.models.backbone import Backbone
from clinifed.models.state import Checkpoint, arrays, read_checkpoint
from clinifed.privacy.engine import PatientTensors, mean_loss

__all__ = ["CHECKPOINT", "REPORT", "FineTuningRun", "Params"]

REPORT, CHECKPOINT, EPOCHS = "finetune.json", "checkpoint", "epochs"  # in the run's directory
Params = dict[str, Tensor]


class FineTuningRun:
    """The epochs of one fine-tuning, each a checkpoint, and the one that is kept.

    States, and what is written of them, read the embedding itself; the trainer's may be those of a basis.
    """

    def __init__(
        self,
        trainer: SiteTrainer,
        backbone: Backbone,
        prepared: PreparedSite,
        judges: ValidationSet,
        source: Checkpoint | None,
        begun: Start,
        out: Path,
        patience: int | None,
        progress: Callable[[str], None],
    ) -> None:
        self.trainer, self.backbone, self.prepared, self.judges = trainer, backbone, prepared, judges
        self.source, self.begun, self.out, self.progress = source, begun, out, progress
        self.names = sorted(trainer.contract.specialties)
        self.training = without_basis(trainer.contract).training
        self.watch, self.lost, self.declared = Watch(patience), list[int](), dict[str, Any]()
        self.judged = None if judges.manifest is None else self._features(judges.manifest, self.names, judges.split)

    def finish(self) -> dict[str, Any]:
        """Do the epochs that are not done, choose one, and write report and checkpoint."""
        state, done = self.begun.params, 0
        self._look(state)
        for number in range(1, self.trainer.contract.rounds + 1):
            if self.watch.stops:
                self.progress(f"stopped: no better epoch for {self.watch.patience}")
                break
            if not self._epoch(number).exists():
                state = self._step(number, state)
                write_checkpoint(self._epoch(number), arrays(state), self._card(self._epoch(number), number, number))
            kept = read_checkpoint(self._epoch(number))  # bit for bit what a run that goes on finds
            state, done = kept.params, number
            self.lost, self.declared = kept.card["fine_tuned"]["lost"], kept.card["fine_tuned"]["declared"]
            self._look(state)
        self.trainer.releases.finish()
        chosen = done if self.judged is None else self.watch.best
        params = self.begun.params if chosen == 0 else read_checkpoint(self._epoch(chosen)).params
        card = {**self._card(self.out / CHECKPOINT, chosen, done), "evaluation": self._evaluation(params)}
        report = {
            **card["fine_tuned"],
            "epochs": self.trainer.contract.rounds,
            "privacy": claim_of(self.trainer),
            "started_from": card["started_from"],
            "evaluation": card["evaluation"],
            "checkpoint": CHECKPOINT,
        }
        write_json(self.out / REPORT, report)  # first: the checkpoint says that all is done
        write_checkpoint(self.out / CHECKPOINT, arrays(params), card)
        self.progress(f"kept epoch {chosen} of {done}: {self.out / CHECKPOINT}")
        return report

    def _epoch(self, number: int) -> Path:
        return self.out / EPOCHS / f"{number:04d}"

    def _step(self, number: int, state: Params) -> Params:
        """One released step from ``state``; a step whose charge a crash lost changes nothing."""
        trainer, basis = self.trainer, self.backbone.basis
        began = basis.heads(state) if basis else state
        delta = {name: began[name] - trainer.start[name] for name in began}
        try:
            update = trainer.train(number - 1, delta)
        except BudgetExceededError:
            if not self._charged(number - 1):
                raise
            self.progress(f"epoch {number}: its charge was lost in a crash; it stays without a step")
            self.lost = [*self.lost, number]
            return state
        self.declared = dict(update.meta.get("declared", self.declared))
        ended = {name: began[name] + torch.from_numpy(update.params[name]) for name in began}
        return basis.folded(ended) if basis else ended

    def _charged(self, round_number: int) -> bool:
        """Whether the ledger holds a charge of this round: then its release was lost, and cannot be paid again."""
        releases = self.trainer.releases
        if not releases.private:
            return False
        return round_number in {r for r, _ in releases.ledger.account().jobs[releases.job].charges.values()}

    def _look(self, state: Params) -> None:
        """Judge one epoch on the validation set."""
        if self.judged is None:
            return
        contract = self.trainer.contract
        part = self._part(state)
        scores = score_part(part, self.judged, self.names, self.trainer.objective)
        loss = mean_loss(part, self.judged, self.trainer.objective, contract.training.batch_size)
        mean = float(np.mean([s.balanced_accuracy for s in scores.values()]))
        self.watch.add(Figures(mean, loss))
        self.progress(f"epoch {len(self.watch.seen) - 1}: balanced accuracy {mean:.3f}, loss {loss:.4f}")

    def _part(self, state: Params | None = None) -> TrainablePart:
        """What is judged: the trainable part with ``state``, without a basis."""
        specialties = self.trainer.contract.specialties
        return build_trainable(self.backbone, specialties, self.training, state).ready()

    def _features(self, manifest: Manifest, names: Sequence[str], split: str | None) -> PatientTensors:
        contract = self.trainer.contract
        return patient_tensors(
            FrozenPart(self.backbone, self._part()),
            self.backbone,
            manifest,
            {name: contract.specialties[name] for name in names},
            split=split,
            batch_size=contract.training.batch_size,
            cache=None if split is None else self.prepared.policy.cache,
            objective=self.trainer.objective,
        )

    def _evaluation(self, params: Params) -> dict[str, Any] | None:
        """Zero-shot, the start and what was kept, on the public test set, for the specialties that it has."""
        test = self.prepared.test
        tested = [] if test is None else [n for n in self.names if any(r.specialty == n for r in test.records)]
        if test is None or not tested:
            return None
        public = self._features(test, tested, None)
        states = {"zero_shot": None, "start": self.begun.params, "fine_tuned": params}
        found: dict[str, dict[str, Any]] = {name: {} for name in tested}
        for key, state in states.items():
            part = self._part(state)
            for name in set(self.names) - set(tested):
                del part.heads[name]
            for name, scores in score_part(part, public, tested, self.trainer.objective).items():
                found[name][key] = scores.to_dict()
        return {"data": "public test", "manifest_sha256": test.sha256, "metrics": found}

    def _card(self, where: Path, epoch: int, done: int) -> dict[str, Any]:
        """The card, to lie in ``where``, of the checkpoint of ``epoch`` after ``done`` epochs."""
        site, prepared = self.trainer.policy.site, self.prepared
        return {
            **agreed_card(self.trainer.contract, self.trainer.releases.job),
            "sites": {
                site: {
                    "specialties": self.names,
                    "rounds_accepted": done - len(self.lost),
                    "privacy": claim_of(self.trainer),
                    "declared": self.declared,
                }
            },
            "started_from": started_from(self.source, self.begun),
            "fine_tuned": {
                "site": site,
                "specialties": self.names,
                "epoch": epoch,
                "epochs_done": done,
                "lost": self.lost,
                "declared": self.declared,
                "validation": self.judges.kind,
                "history": self.watch.to_dict(),
            },
            "evaluation": None,
            "public": public_paths({"validation": prepared.validation, "test": prepared.test}, self.out, where),
        }
