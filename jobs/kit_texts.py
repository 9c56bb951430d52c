"""The texts of a startup kit: a page for whoever runs it, and a site's policy for its data steward to fill in."""

from datetime import datetime

from clinifed.config import Deployment
from clinifed.policy import POLICY_FOLDER

__all__ = ["admin_readme", "policy_template", "server_readme", "site_readme"]

_POLICY = """\
# What {site} permits. Data steward: fill in what is empty. Nothing may run here until this file is complete and names
# a contract; what it does not name, it does not permit. No job can read another file or change this one.
# Paths are absolute, on this site's own disks, outside this kit.

site: {site}  # as in the federation's configuration and in the kit's certificate

# Where things lie. `README.md` says how each is made.
manifest:     # which image belongs to which patient: FOLDER/manifest.csv
ledger:       # the budget ledger: one file for the site's lifetime, outside any run, backed up
signing_key:  # Ed25519, owner-only; signs what leaves
cache:        # a folder for embeddings of the frozen tower; owner-only, never leaves
diary:        # a file for local figures per round (seconds, bytes, skipped images); never leaves
anchor: null  # the ledger's head in a second file, best on another disk; null: beside the ledger
outbox: null  # what was released, to be sent again after a crash; null: beside the ledger

# The hospital decides this, with its data protection officer: what all jobs together may ever cost one patient.
budget:
  epsilon:  # per patient, over the site's lifetime; as the ledger was opened
  delta:    # below 1 / number of patients; as the ledger was opened

# Who and what may run. Empty: nobody and nothing.
approved_contracts: []  # their hashes, as `clinifed job` prints them; noise, steps, N0 and specialties are in each
coordinators: []  # whose jobs may run: the submitter's name, for this federation {coordinator}
min_nominal_patients:   # the least N0 that a contract may name; never above the site's true number of patients
reservation_hours: 168.0  # a reservation without a record for so long is a dead job's, and returns to the budget
cohort: all  # a name for whose images these are; recorded in the ledger, never a budget of its own

declare: []  # what may leave un-noised: patient_count, image_count, label_counts, train_loss; best none
officers: {{}}  # name: Ed25519 public key of who may sign a larger budget; `clinifed privacy key` prints it
permit_privacy_off: false  # only ever for data marked public or synthetic
model_ref: null  # where this site keeps the base model, if not where the contract says
basis: null  # the file of the public basis, where the contract's heads train in one
threads: null  # of the trainer's process; null: one for each core
"""

_SITE = """\
# {site}: a site of the federation {federation}

For the administrator of this machine. The kit holds this site's identity: keep it owner-only, copy it nowhere else. A
second process with this identity is refused while the first is alive.

Server `{host}`, ports {port} (federation) and {admin_port} (coordinators only); nothing connects to this machine. The
certificate is valid until {expires}; ask the coordinator for a new one before.

## Install, once

1. Python 3.11 or later; `pip install clinifed` into an environment of its own. Its `bin` must come first in `PATH`
   whenever the kit is started, since FLARE's scripts call `python3` by name.
2. Unpack the kit where the service's user may write, and nobody else may read: `chmod 700 KIT`. `startup/` is signed
   and stays as it is; `local/` is yours, and nothing sent later overwrites it.
3. Key, ledger, manifest:

```
clinifed privacy key /secure/clinifed/signing.key       # send the public half, which it prints, to the coordinator
clinifed privacy ledger init /secure/clinifed/ledger.jsonl --site {site} --epsilon E --delta D --anchor /other/disk/head
clinifed data index /images --out /secure/clinifed/manifest.csv --specialties {specialties} --labels labels.csv
```

4. The data steward fills in `local/{folder}/{site}.yaml`: paths, budget, and for each run the hash of its contract.
5. `clinifed preflight KIT` lists everything that is not as it must be; nothing is started before it is content.

## Start and stop

`startup/start.sh` starts FLARE and a small daemon that starts it again when it dies (five times within five minutes);
`startup/stop_fl.sh` stops both within ten seconds. Better is a service of the system, which survives a restart of the
machine and leaves no stale pid files:

```
[Service]
Environment=PATH=/opt/clinifed/bin:/usr/bin:/bin
ExecStart=KIT/startup/sub_start.sh --once
Restart=always
RestartSec=45
```

## When something fails

- The trainer dies, or a round is too much for it: the round goes on without this site, which is back in the next one.
  Look at `trainer.log` beside the diary.
- FLARE's job process is killed (memory): it is started again, and answers the same task from the outbox, so that
  nothing is spent twice. Give it more memory.
- This machine or its network is away: after {heart_beat:.0f} s the round goes on without it, and it takes part again
  from the run's next job on. Start the kit.
- The server is away: the site waits, and connects again by itself.
- The budget is exhausted, the contract not approved, the ledger damaged: a refusal before any image is read; the server
  learns "policy" and no more. `clinifed preflight KIT` says why.
- The certificate has expired: the site cannot connect. Ask the coordinator for a new kit, and keep `local/`.

Logs (`log.txt`, `error_log.txt`, and those of jobs beneath this folder) stay here; none is sent. The ledger is the
record of what this hospital has spent: back it up (`clinifed privacy ledger backup`).
"""

_SERVER = """\
# The server of the federation {federation}

Listens on `{host}`, ports {port} (sites) and {admin_port} (coordinators); both must be reachable, and nothing else. Its
certificate is valid until {expires}.

1. Python 3.11 or later; `pip install clinifed`; its `bin` first in `PATH`.
2. `clinifed preflight KIT` before the first start.
3. `startup/start.sh` starts it, `startup/stop_fl.sh` stops it within ten seconds. As a service of the system:
   `ExecStart=KIT/startup/sub_start.sh --once`, `Restart=always`, `RestartSec=45`.

Jobs, their results and the state of runs lie beneath this folder (`storage/`), and in no shared temporary folder. A
site that is silent for {heart_beat:.0f} s is dead; rounds go on without it. Jobs that a crash of the server left are
closed at its next start, and the run goes on from its last whole round. A second process with the identity of a living
site is refused, and `log.txt` says so with a security alert.

The server sees noised updates only. Its administrator may neither bring code into a job nor read files of a site.
"""

_ADMIN = """\
# {coordinator}: coordinator of the federation {federation}

This kit is the right to submit jobs, and to watch, stop and download one's own. It gives no right to bring code, to
read files of the server or of a site, or to stop or restart them. Keep it owner-only; its certificate is valid until
{expires}. Every job is signed with its key, and the server and each site refuse a job that is not.

Server `{host}`, port {admin_port}. `clinifed preflight KIT` says whether all is well.
"""


def _date(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M} UTC"


def policy_template(site: str, deployment: Deployment) -> str:
    """A policy with every key and what it means, which permits nothing and is refused until it is filled in."""
    return _POLICY.format(site=site, coordinator=deployment.coordinator)


def site_readme(
    site: str,
    federation: str,
    specialties: tuple[str, ...],
    deployment: Deployment,
    address: tuple[str, int],
    expires: datetime,
    heart_beat_timeout_s: float,
) -> str:
    """One page for a site's administrator; ``address`` is where this site's kit connects to."""
    return _SITE.format(
        site=site,
        federation=federation,
        specialties=",".join(specialties),
        folder=POLICY_FOLDER,
        host=address[0],
        port=address[1],
        admin_port=deployment.admin_port,
        expires=_date(expires),
        heart_beat=heart_beat_timeout_s,
    )


def server_readme(federation: str, deployment: Deployment, expires: datetime, heart_beat_timeout_s: float) -> str:
    """The page of the server's administrator."""
    return _SERVER.format(
        federation=federation,
        host=deployment.host,
        port=deployment.port,
        admin_port=deployment.admin_port,
        expires=_date(expires),
        heart_beat=heart_beat_timeout_s,
    )


def admin_readme(federation: str, deployment: Deployment, expires: datetime) -> str:
    """The coordinator's page."""
    return _ADMIN.format(
        coordinator=deployment.coordinator,
        federation=federation,
        host=deployment.host,
        admin_port=deployment.admin_port,
        expires=_date(expires),
    )
