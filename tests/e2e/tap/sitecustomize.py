"""Records every message that leaves a simulated site's FLARE process, as it leaves, into the folder CLINIFED_TAP.

Python imports this at its start when its folder is on PYTHONPATH. Two places are tapped: where FLARE encodes a payload,
which shows it whole and decodable, and where bytes go to the network, which shows that nothing else does.
"""

import os
import sys

FOLDER = os.environ.get("CLINIFED_TAP")


def tap() -> None:
    import json
    import threading
    from pathlib import Path

    from nvflare.fuel.f3 import communicator
    from nvflare.fuel.f3.cellnet import cell, core_cell, utils

    client = sys.orig_argv[sys.orig_argv.index("--client") + 1]
    path = Path(FOLDER or "") / f"{client}-{os.getpid()}.jsonl"
    lock = threading.Lock()

    def record(where: str, message: object) -> None:
        payload = message.payload or b""
        parts = payload if isinstance(payload, list) else [payload]
        content = b"".join(bytes(part) for part in parts)
        headers = {str(key): repr(value) for key, value in message.headers.items()}
        line = json.dumps({"where": where, "headers": headers, "payload": content.hex()})
        with lock, path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    encode, send = utils.encode_payload, communicator.Communicator.send

    def tapped_encode(message, *args, **more):
        size = encode(message, *args, **more)
        record("encoded", message)
        return size

    def tapped_send(self, endpoint, app_id, message):
        record("wire", message)
        return send(self, endpoint, app_id, message)

    cell.encode_payload = core_cell.encode_payload = tapped_encode
    communicator.Communicator.send = tapped_send


if FOLDER and any(part.endswith("simulator_worker") for part in sys.orig_argv) and "--client" in sys.orig_argv:
    tap()
