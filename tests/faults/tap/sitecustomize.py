"""Faults at named points of real processes. Loaded by every Python of a federation whose environment names a folder.

``CLINIFED_FAULTS`` is a folder of JSON files, one fault each: ``{"kit": …, "point": …, "round": …, "do": …}``. The
first process of that kit that passes that point in that round takes the file (by renaming it) and does what it says:

``kill``     SIGKILL of this very process
``kill-job`` SIGKILL of the FLARE process that started this one (a trainer's parent)
``stop``     SIGSTOP of this process, until somebody continues it
``sleep``    so many seconds (``seconds``)
``full``     OSError: no space left on device
``alter``    hands the result to ``alterations.py``, by the name in ``how``
"""

import errno
import functools
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = os.environ.get("CLINIFED_FAULTS")
KIT = os.environ.get("CLINIFED_KIT", "")

# module → (class or None, function, before | after, the point's name, how to see the round in its arguments)
POINTS = {
    "clinifed.executors.flare": [
        ("SiteExecutor", "_round", "before", "task-received", lambda a: a[1].get_header("current_round")),
        ("SiteExecutor", "_round", "after", "answered", None),
        ("SiteExecutor", "_handshake", "before", "handshake", lambda a: -1),
    ],
    "clinifed.executors.filters": [("ReleaseFilter", "process", "after", "before-send", None)],
    "clinifed.executors.trainer": [
        ("SiteTrainer", "train", "before", "trainer-asked", lambda a: a[1]),
        (None, "local_steps", "before", "before-noise", None),
        (None, "local_steps", "after", "after-noise", None),
        ("SiteTrainer", "train", "after", "before-answer", None),
    ],
    "clinifed.privacy.ledger": [
        ("Ledger", "charge", "before", "before-charge", lambda a: a[2]),
        ("Ledger", "charge", "after", "after-charge", None),
        ("Ledger", "release", "before", "before-release", lambda a: a[2]),
        ("Ledger", "release", "after", "after-release", None),
    ],
    "clinifed.privacy.chain": [
        (None, "sync_folder", "before", "ledger-write", None),
        (None, "write_atomic", "before", "anchor-write", None),
    ],
    "clinifed.privacy.outbox": [
        ("Outbox", "put", "before", "before-outbox", lambda a: a[2].round),
        ("Outbox", "put", "after", "after-outbox", None),
        (None, "write_atomic", "before", "outbox-write", None),
    ],
    "clinifed.aggregators.flare": [
        ("FederatedRounds", "_round", "before", "round-opens", lambda a: a[1].next_round),
        ("FederatedRounds", "_round", "after", "round-closed", None),
    ],
    "clinifed.aggregators.specialty": [
        ("SpecialtyAggregator", "accept_model", "after", "one-accepted", lambda a: a[0].round),
        ("SpecialtyAggregator", "aggregate_model", "after", "after-average", lambda a: a[0].round),
    ],
    "clinifed.aggregators.run_state": [
        (None, "write_atomic", "before", "weights-written-not-yet", None),
        (None, "append_line", "before", "record-written-not-yet", None),
        (None, "write_json", "before", "commit-not-yet", None),
        (None, "write_json", "after", "committed", None),
    ],
}
_round = None  # the round this process was last seen in


def _due(point):
    """The fault that waits at ``point`` for this process, taken so that nobody else takes it."""
    for path in sorted(Path(FOLDER).glob("*.json")):
        fault = json.loads(path.read_text())
        if fault["kit"] != KIT or fault["point"] != point or fault.get("round", _round) != _round:
            continue
        if fault.get("every"):  # stays
            return fault
        try:
            path.rename(path.with_suffix(f".fired.{os.getpid()}"))
        except FileNotFoundError:
            continue
        return fault
    return None


def _do(point, fault, result):
    if fault["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault["do"] == "kill-job":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # we end when our standard input does
    if fault["do"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault["do"] == "sleep":
        time.sleep(fault["seconds"])
    if fault["do"] == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault["do"] == "alter":
        sys.path.append(str(Path(__file__).parent))
        import alterations

        return alterations.alter(fault["how"], result)
    return result


def _pass(point, result=None):
    fault = _due(point)
    return result if fault is None else _do(point, fault, result)


def _wrap(owner, name, when, point, see):
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args, **kwargs):
        global _round
        if see is not None:
            _round = see(args)
        if when == "before":
            _pass(point)
            return inner(*args, **kwargs)
        return _pass(point, inner(*args, **kwargs))

    setattr(owner, name, outer)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in POINTS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module):
            run(module)
            for owner, function, when, point, see in POINTS[name]:
                _wrap(getattr(module, owner) if owner else module, function, when, point, see)

        loader.exec_module = exec_module
        return spec


if FOLDER and KIT:
    sys.meta_path.insert(0, _Finder())
