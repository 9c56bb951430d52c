"""What the card of a fine-tuned checkpoint says beside a federation's: its cost so far, and what it began with."""

from typing import Any

from clinifed.executors.trainer import SiteTrainer
from clinifed.models.adaptation import Start
from clinifed.models.state import Checkpoint
from clinifed.privacy.claims import make_claim

__all__ = ["claim_of", "started_from"]


def claim_of(trainer: SiteTrainer) -> dict[str, Any]:
    """What this fine-tuning has cost so far, as the site's ledger has it."""
    contract, releases = trainer.contract, trainer.releases
    site = trainer.policy.site
    if not releases.private:
        return make_claim(contract, site, "job")
    charged = releases.ledger.account().jobs[releases.job].charged
    return make_claim(contract, site, "job", charged, contract.promise.delta, releases.ledger.state().head)


def started_from(source: Checkpoint | None, begun: Start) -> dict[str, Any] | None:
    """Which checkpoint this began with, what was taken of it, and what its sites claim: their patients are in it."""
    if source is None:
        return None
    card, earlier = source.card, source.card.get("started_from") or {}
    return {
        "weights_sha256": card.get("weights_sha256"),
        "contract_sha256": card.get("contract_sha256"),
        "federation": card.get("federation"),
        "jobs": [card.get("job"), *earlier.get("jobs", [])],
        "sites": card.get("sites", {}),
        "earlier": earlier or None,
        "taken": begun.to_dict(),
    }
