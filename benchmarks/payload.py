"""What a site sends in a round at BiomedCLIP's real size, over the whole model: the message as FLARE writes it.

``python benchmarks/payload.py`` writes its section of ``RESULTS.md`` and its entries of ``results.json``. The updates
are those of a site's trainer: noised, signed, with claim and ledger head.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory import PLAN
from nvflare.app_common.decomposers import common_decomposers
from nvflare.fuel.utils import fobs
from real_size import NAMES, make_base
from results import Entry, record, write_section

from clinifed.config import Federation
from clinifed.executors.filters import to_shareable
from clinifed.executors.flare import SIMULATOR
from clinifed.executors.trainer import SiteTrainer
from clinifed.jobs.prepare import make_site_keys, prepare_data, site_policies
from clinifed.jobs.recipe import build_contract
from clinifed.models.backbone import load_backbone

GOAL = 150  # the whole model is at least so many times what is sent
CASES = {  # entry → what trains, and how it travels
    "payload_heads": ("heads", "float32"),
    "payload_heads_projection": ("projection", "float32"),
    "payload_heads_projection_bfloat16": ("projection", "bfloat16"),
    "payload_lora": ("lora", "float32"),
}


def sent(folder: Path, ref: str, train: str, dtype: str) -> tuple[int, int]:
    """Bytes of an update of four heads and a trunk, and of the whole model."""
    plan: dict[str, Any] = {
        **PLAN,
        "model": {"ref": ref},
        "training": {"train": train, "batch_size": 4},
        "aggregation": {**PLAN["aggregation"], "update_dtype": dtype},
        "sites": {"alder": {"specialties": list(NAMES)}},
    }
    federation = Federation.model_validate(plan)
    backbone = load_backbone(ref)
    contract = build_contract(federation, backbone, make_site_keys(federation, folder))
    data = prepare_data(federation, folder / "data", lambda text: None)
    policy = site_policies(federation, data, folder, contract, (SIMULATOR,))["alder"]
    whole = backbone.parameter_bytes
    trainer = SiteTrainer(contract, policy, "run", SIMULATOR, backbone)
    update = trainer.train(0, {name: torch.zeros_like(value) for name, value in trainer.start.items()})
    return len(fobs.dumps(to_shareable(update, pack=dtype == "bfloat16"))), whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="reference of a base model; default: one of real size is made")
    options = parser.parse_args()
    common_decomposers.register()  # as FLARE does when it starts
    lines = [
        "| what a site of four specialties sends in a round | bytes | of the whole model | 1 / |",
        "|---|---|---|---|",
    ]
    entries = []
    with tempfile.TemporaryDirectory() as scratch:
        ref = options.base or make_base(Path(scratch) / "base")
        for name, (train, dtype) in CASES.items():
            folder = Path(scratch) / name
            folder.mkdir()
            payload, whole = sent(folder, ref, train, dtype)
            entries.append(Entry(name, payload / whole, payload, whole, "bytes, update over whole model", 0))
            goal = f" (goal ≥ {GOAL})" if name == "payload_heads_projection" else ""
            lines.append(f"| `{name}`, {dtype} | {payload:,} | {whole:,} | {whole / payload:,.0f}{goal} |")
    record(entries)
    write_section("Payload at real size", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
