"""The trainer's process: one per site and job, started by the executor, ended with it. No FLARE in it.

Both directions speak in frames: one line of JSON, then as many bytes of safetensors as it says.
"""

import logging
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from clinifed.errors import ClinifedError, ConfigError, PrivacyError
from clinifed.executors.frames import Frame, read_frame, write_frame

__all__ = ["main"]

log = logging.getLogger(__name__)


def _listen(source: BinaryIO, frames: "queue.Queue[Frame]") -> None:
    """Pass frames on. When the executor is gone, so are we, in the middle of a step if need be: state is on disk."""
    while (frame := read_frame(source.read)) is not None:
        frames.put(frame)
    os._exit(0)


def _failure(error: Exception) -> dict[str, Any]:
    """What the executor may log, at the site: our own texts as they are, of others only type and place."""
    if isinstance(error, ClinifedError):
        kind = "policy" if isinstance(error, PrivacyError | ConfigError) else "failed"
        return {"failed": kind, "problems": list(error.problems)}
    place = traceback.extract_tb(error.__traceback__)[-1]  # the text may quote data
    where = f"{Path(place.filename).name}:{place.lineno}"
    return {"failed": "unexpected", "problems": [f"{type(error).__name__} at {where}"]}


def _serve(frames: "queue.Queue[Frame]", sink: BinaryIO) -> None:
    """Prepare for the job of the first frame, then answer each further frame: a handshake, or a round."""
    first = frames.get().header
    site: Any = None
    while True:
        frame = frames.get()
        try:
            if site is None:
                site = _Site(first)
            header, body = site.answer(frame)
        except Exception as error:
            log.warning("a task failed", exc_info=not isinstance(error, ClinifedError))
            write_frame(sink.write, _failure(error))
        else:
            write_frame(sink.write, header, body)
        sink.flush()


class _Site:
    """This site in one job; what it needs is heavy, and imported only now."""

    def __init__(self, first: dict[str, Any]) -> None:
        from clinifed.contract import Contract
        from clinifed.models.backbone import load_backbone
        from clinifed.policy import SitePolicy

        self.contract = Contract.model_validate(first["contract"])
        self.policy = SitePolicy.model_validate(first["policy"])
        self.job, self.coordinator = first["job"], first["coordinator"]
        self.backbone = load_backbone(self.policy.model_ref or self.contract.base_model.ref, self.policy.cache)
        self.trainer: Any = None

    def answer(self, frame: Frame) -> tuple[dict[str, Any], bytes]:
        """Header and body of the answer to one frame."""
        from safetensors.torch import load

        from clinifed.executors.trainer import SiteTrainer
        from clinifed.privacy.outbox import pack

        hello = "hello" in frame.header
        if hello and self.backbone.sha256 != self.contract.base_model.sha256:
            return {"base_model_sha256": self.backbone.sha256}, b""  # the server says what is wrong, with both values
        if self.trainer is None:
            self.trainer = SiteTrainer(self.contract, self.policy, self.job, self.coordinator, self.backbone)
        if hello:
            return {"base_model_sha256": self.backbone.sha256}, b""
        update = self.trainer.train(int(frame.header["round"]), load(frame.body))
        return {"round": update.round}, pack(update)


def main() -> None:
    """``python -m clinifed.executors.child``: frames in on stdin, frames out on stdout, words on stderr."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints, prints into the log
    frames: queue.Queue[Frame] = queue.Queue()
    listener = threading.Thread(target=_listen, args=(sys.stdin.buffer, frames), daemon=True)
    listener.start()
    _serve(frames, sink)


if __name__ == "__main__":
    main()
