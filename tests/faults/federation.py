"""One federation of real processes for many runs, and what must hold after each of them, whatever happened in it."""

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from clinifed.aggregators.run_state import SERVER_FOLDER, RunState
from clinifed.config import Federation
from clinifed.contract import Contract
from clinifed.errors import ClinifedError
from clinifed.files import read_lines, write_atomic
from clinifed.jobs.chain import JOBS_FILE, RunChain
from clinifed.jobs.kit_processes import LocalKits
from clinifed.jobs.prepare import PreparedData, make_site_keys, prepare_data, site_policies, write_policy
from clinifed.jobs.recipe import build_contract
from clinifed.models.backbone import load_backbone
from clinifed.policy import SitePolicy
from clinifed.privacy.account import JobAccount
from clinifed.privacy.ledger import Ledger
from clinifed.privacy.outbox import Outbox

from .proxy import Proxy

TAP = Path(__file__).with_name("tap")
SITES = ("alder", "birch", "cedar")
PLAN: dict[str, Any] = {
    "name": "faults",
    "rounds": 2,
    "min_clients": 2,
    "max_clients": 3,
    "training": {"learning_rate": 4.0},
    "privacy": {"epsilon": 1.0, "delta": 1e-5, "reserve_rounds": 4},
    "aggregation": {"quorum": 2, "round_timeout_s": 40, "start_timeout_s": 120, "norm_bound": 1000.0},
    "data": {
        "synthesize": {
            "seed": 1,
            "patients_per_specialty": 6,
            "public_patients_per_specialty": 8,
            "max_images": 1,
        }
    },
    "sites": {
        "alder": {"specialties": ["radiology", "dermatology"], "budget_epsilon": 60.0},
        "birch": {"specialties": ["radiology", "cardiology"], "budget_epsilon": 60.0},
        "cedar": {"specialties": ["dermatology", "cardiology"], "budget_epsilon": 60.0},
    },
    "deployment": {"rounds_per_job": 100},
}
OFF = {"privacy": {"mode": "off"}}


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``change`` laid over it, group by group."""
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


@dataclass
class Outcome:
    """One run that ended."""

    run: str
    contract: Contract
    state: RunState
    events: list[dict[str, Any]]
    told: list[str]
    jobs: list[str]
    spent: dict[str, int]  # site → units charged in this run
    seconds: float

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return self.state.rounds

    def accepted(self) -> list[list[str]]:
        return [entry["accepted"] for entry in self.rounds]

    def delta(self) -> bytes:
        return b"".join(self.state.delta[name].tobytes() for name in sorted(self.state.delta))


@dataclass
class LiveFederation:
    """Three sites and a server, provisioned, running, and told of faults through a folder."""

    home: Path
    kits: LocalKits
    paths: dict[str, Path]
    plan: dict[str, Any]
    data: PreparedData
    faults: Path
    proxy: Proxy  # birch's way to the server
    policies: dict[str, SitePolicy] = field(default_factory=dict)

    @property
    def admin(self) -> Path:
        return next(path for name, path in self.paths.items() if "@" in name)

    def fault(self, kit: str, point: str, do: str, **more: Any) -> None:
        """Let ``do`` happen in the first process of ``kit`` that passes ``point`` (in ``round``, if given)."""
        content = {"kit": kit, "point": point, "do": do, **more}
        write_atomic(self.faults / f"{len(list(self.faults.iterdir())):03d}.json", json.dumps(content).encode())

    def fired(self) -> list[dict[str, Any]]:
        return [json.loads(p.read_text()) for p in sorted(self.faults.glob("*.fired.*"))]

    def waiting(self) -> list[dict[str, Any]]:
        """Faults that no process came past: a test that expected them shows nothing."""
        return [f for p in sorted(self.faults.glob("*.json")) if not (f := json.loads(p.read_text())).get("every")]

    def clear_faults(self) -> None:
        for path in self.faults.iterdir():
            path.unlink()

    def federation(self, **change: Any) -> Federation:
        return Federation.model_validate(merged(self.plan, change))

    def contract(self, federation: Federation) -> Contract:
        return build_contract(federation, load_backbone("tiny"), make_site_keys(federation, self.home))

    def approve(self, federation: Federation, contract: Contract, without: Iterable[str] = (), **more: Any) -> None:
        """Every steward, but those of ``without``, lets ``contract`` in; ``more`` changes the policies."""
        coordinators = (federation.deployment.coordinator,)
        for name, policy in site_policies(federation, self.data, self.home, contract, coordinators).items():
            hidden = {"approved_contracts": ()} if name in without else {}
            self.policies[name] = policy.model_copy(update={**hidden, **more})
            write_policy(self.paths[name] / "local", self.policies[name])

    def server_run(self, run: str) -> Path:
        """The run's folder on the server."""
        return self.paths["server"] / SERVER_FOLDER / run

    @contextmanager
    def chain(self, contract: Contract, run: str, told: list[str], per_job: int, patience_s: float = 90.0):
        folder = self.home / "runs" / run
        with RunChain(contract, run, folder, self.admin, per_job, told.append, patience_s) as chain:
            yield chain

    def run(
        self,
        change: Mapping[str, Any] | None = None,
        without: Iterable[str] = (),
        run: str | None = None,
        told: Callable[[str], None] | None = None,
        policy: Mapping[str, Any] | None = None,
        check: bool = True,
    ) -> Outcome:
        """A whole run under faults that were named before; checks what must hold after any run."""
        federation = self.federation(**(change or {}))
        contract = self.contract(federation)
        self.approve(federation, contract, without, **(policy or {}))
        name, lines, started = run or uuid.uuid4().hex, _Told(told), time.monotonic()
        before = self.spent()
        with self.chain(contract, name, lines, federation.deployment.rounds_per_job) as chain:
            chain.finish()
        outcome = Outcome(
            name,
            contract,
            RunState(self.server_run(name), name, contract),
            read_lines(self.server_run(name) / "events.jsonl"),
            list(lines),
            [entry["job"] for entry in read_lines(self.home / "runs" / name / JOBS_FILE)],
            {site: units - before[site] for site, units in self.spent().items()},
            time.monotonic() - started,
        )
        if check:
            self.check(outcome)
        return outcome

    def spent(self) -> dict[str, int]:
        """What each ledger adds up to; the sum of a ledger that cannot be read is not known."""
        units = {}
        for site in SITES:
            try:
                units[site] = Ledger.of(self.policies[site]).state().spent_units if site in self.policies else 0
            except ClinifedError:
                units[site] = 0
        return units

    def job(self, outcome: Outcome, site: str) -> JobAccount:
        """What ``site``'s ledger says of this run."""
        return Ledger.of(self.policies[site]).account().jobs[outcome.run]

    def check(self, outcome: Outcome) -> None:
        """The invariants: every release was charged, the aggregate is that of the accepted updates, nothing is left."""
        self.check_no_orphans()  # first: a site hears of the run's end a moment after the coordinator
        self.check_ledgers(outcome)
        self.check_aggregate(outcome)

    def check_ledgers(self, outcome: Outcome) -> None:
        if outcome.contract.promise.mode == "off":
            return
        for site in SITES:
            account = Ledger.of(self.policies[site]).account()  # verifies the chain
            job = account.jobs.get(outcome.run)
            for entry in outcome.rounds:
                if site in entry["accepted"]:
                    nonce = entry["nonces"][site]
                    assert job is not None
                    assert nonce in job.charges, f"{site}, round {entry['round']}: accepted and never charged"
                    assert nonce in job.releases, f"{site}, round {entry['round']}: accepted and never recorded"
                    assert job.charges[nonce][0] == entry["round"]
            if job is not None:
                assert job.reserved == 0, f"{site}: the run is over and still holds {job.reserved} units"
                assert set(job.releases) <= set(job.charges)
                assert job.charged == sum(units for _, units in job.charges.values())
            assert account.spent <= account.budget

    def check_aggregate(self, outcome: Outcome) -> None:
        """The global delta, added up once more from what lies in the sites' outboxes; fedavg with equal weights."""
        kept = {site: Outbox(self.policies[site].outbox_folder) for site in SITES}
        if outcome.contract.promise.mode == "off":
            return  # the outboxes of such runs are cleared at their end
        expected = {name: np.zeros(shape, np.float32) for name, shape in outcome.contract.shapes.items()}
        for entry in outcome.rounds:
            if not entry["counted"]:
                continue
            sent = {site: kept[site].get(outcome.run, entry["round"]) for site in entry["accepted"]}
            for name in expected:
                parts = [u.params[name] for s in sorted(sent) if (u := sent[s]) is not None and name in u.params]
                if parts:
                    mean = sum(part.astype(np.float64) for part in parts) / len(parts)
                    expected[name] = expected[name] + mean.astype(np.float32)
        for name, value in expected.items():
            assert np.array_equal(value, outcome.state.delta[name]), f"{name} is not the mean of what was accepted"

    def check_no_orphans(self, patience_s: float = 20.0) -> None:
        """No job and no trainer outlives its run."""
        deadline = time.monotonic() + patience_s
        while True:
            left = {n: self.kits.processes(n, part) for n in ("server", *SITES) for part in ("job", "trainer")}
            left = {name: found for name, found in left.items() if found}
            if not left or time.monotonic() > deadline:
                break
            time.sleep(0.3)
        assert not left, f"left running: {left}"


class _Told(list[str]):
    """Progress lines, handed on as they come."""

    def __init__(self, also: Callable[[str], None] | None) -> None:
        super().__init__()
        self.also = also

    def append(self, text: str) -> None:
        super().append(text)
        if self.also is not None:
            self.also(text)


def make_federation(home: Path, plan: Mapping[str, Any] = PLAN) -> LiveFederation:
    """Provisioned kits, data and ledgers in ``home``; nothing started."""
    from clinifed.jobs.kit_processes import free_ports
    from clinifed.jobs.provision import provision

    first, second, third = free_ports(3)
    ports = {"deployment": {"host": "localhost", "port": first, "admin_port": second}}
    plan = merged(plan, ports)
    federation = Federation.model_validate(plan)
    faults = home / "faults"
    faults.mkdir(parents=True)
    data = prepare_data(federation, home / "data", lambda text: None)
    paths = provision(federation, home / "kits", lambda text: None, {"birch": ("localhost", third)})
    environment = {"CLINIFED_FAULTS": str(faults), "PYTHONPATH": str(TAP)}
    kits = LocalKits(paths, f"faults-{uuid.uuid4().hex}", home / "logs", environment)
    return LiveFederation(home, kits, paths, plan, data, faults, Proxy(third, first))


def write_config(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content)))
    return path


def copy_kit(kit: Path, to: Path) -> Path:
    return Path(shutil.copytree(kit, to))
