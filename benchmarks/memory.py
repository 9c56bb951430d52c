"""Peak memory of a base model of BiomedCLIP's real size: of loading it, and of a site that trains heads with it.

``python benchmarks/memory.py`` writes its section of ``RESULTS.md`` and its entries of ``results.json``. Every way runs
in a process of its own, so that its peak (``ru_maxrss``, imports and mapped files included) is its own; the process
that starts them stays small, since Linux counts a parent's memory into what it starts.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from results import Entry, peak_gb, printed, record, write_section

LIMIT_GB = 1.2  # of a site whose images are all in the cache
PLAN = {
    "name": "memory",
    "rounds": 3,
    "min_clients": 1,
    "max_clients": 1,
    "training": {"train": "heads", "batch_size": 4},
    "privacy": {"epsilon": 8.0},
    "aggregation": {"quorum": 1, "round_timeout_s": 60},
    "data": {"synthesize": {"patients_per_specialty": 8, "public_patients_per_specialty": 4, "max_images": 2}},
    "sites": {"alder": {"specialties": ["dermatology", "radiology"]}},
}
MEANING = {
    "imports": "the imports alone",
    "open_clip": "loading, by open_clip itself",
    "load": "loading, by clinifed",
    "first": "a site's first start: both towers, every image and prompt, a round",
    "images": "its images are new, its prompts are not: the image tower, every image, a round",
    "cached": "all images and prompts are in the cache: no tower, a round",
}


def imports(folder: Path) -> dict[str, Any]:
    import open_clip  # noqa: F401

    import clinifed.executors.trainer  # noqa: F401

    return {}


def open_clip_itself(folder: Path) -> dict[str, Any]:
    """As clinifed loaded it before: random weights first, then the file over them."""
    import open_clip

    from clinifed.models.model_files import ModelFiles
    from clinifed.models.tower import state_sha256

    imports(folder)
    files = ModelFiles("base", folder / "base")
    model = open_clip.create_model(f"local-dir:{files.root}", require_pretrained=True, **files.overrides)
    return {"sha256": state_sha256(model.state_dict())}


def load(folder: Path) -> dict[str, Any]:
    from clinifed.models.backbone import load_backbone

    imports(folder)
    return {"sha256": load_backbone(f"local-dir:{folder / 'base'}").sha256}


def site(folder: Path, round_number: int) -> dict[str, Any]:
    """The trainer of a site, from its contract to one round's update."""
    import torch

    from clinifed.contract import Contract
    from clinifed.executors.flare import SIMULATOR
    from clinifed.executors.trainer import SiteTrainer
    from clinifed.models.backbone import load_backbone
    from clinifed.policy import SitePolicy

    contract = Contract.model_validate_json((folder / "contract.json").read_text())
    policy = SitePolicy.model_validate_json((folder / "policy.json").read_text())
    backbone = load_backbone(contract.base_model.ref, policy.cache)
    trainer = SiteTrainer(contract, policy, "run", SIMULATOR, backbone)
    update = trainer.train(round_number, {name: torch.zeros_like(value) for name, value in trainer.start.items()})
    return {"sha256": backbone.sha256, "loaded": backbone.loaded, "round": update.round}


def prepare(folder: Path) -> dict[str, Any]:
    """A hospital, its policy, and a contract over a base model of real size, which is made where there is none."""
    from real_size import make_base

    from clinifed.config import Federation
    from clinifed.executors.flare import SIMULATOR
    from clinifed.jobs.prepare import make_site_keys, prepare_data, site_policies
    from clinifed.jobs.recipe import build_contract
    from clinifed.models.backbone import load_backbone

    if not (folder / "base").exists():
        make_base(folder / "base")
    federation = Federation.model_validate({**PLAN, "model": {"ref": f"local-dir:{folder / 'base'}"}})
    keys = make_site_keys(federation, folder)
    contract = build_contract(federation, load_backbone(federation.model.ref), keys)
    data = prepare_data(federation, folder / "data", lambda text: None)
    policy = site_policies(federation, data, folder, contract, (SIMULATOR,))["alder"]
    (folder / "contract.json").write_text(contract.model_dump_json())
    (folder / "policy.json").write_text(policy.model_dump_json())
    return {}


WAYS = {
    "prepare": prepare,
    "imports": imports,
    "open_clip": open_clip_itself,
    "load": load,
    "first": partial(site, round_number=0),
    "images": partial(site, round_number=1),
    "cached": partial(site, round_number=2),
}


def measured(way: str, folder: Path) -> dict[str, Any]:
    """The figures of ``way``, from a process of its own."""
    figures: dict[str, Any] = printed(__file__, "--way", way, "--folder", str(folder))
    return figures


def report(found: dict[str, dict[str, Any]]) -> None:
    peak = {way: figures["peak"] for way, figures in found.items()}
    ours, site_peak = peak["load"], peak["cached"]
    entries = [
        Entry("load_memory_vs_open_clip", ours / peak["open_clip"], ours, peak["open_clip"], "GB, peak", 0.0),
        Entry("cached_site_memory", site_peak / peak["first"], site_peak, peak["first"], "GB, peak", 0.0),
    ]
    record(entries)
    lines = ["| process | peak | seconds |", "|---|---|---|"]
    for way, meaning in MEANING.items():
        goal = f" (goal ≤ {LIMIT_GB} GB)" if way == "cached" else ""
        lines.append(f"| {meaning}{goal} | {peak[way]:.2f} GB | {found[way]['seconds']:.1f} |")
    write_section("Memory of a base model of real size", lines)
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS, help="measure this one, here, and print it as JSON")
    parser.add_argument("--folder", type=Path, help="where its files are")
    parser.add_argument("--base", help="reference of a base model; default: one of real size is made")
    options = parser.parse_args()
    if options.way:
        began = time.perf_counter()
        figures = WAYS[options.way](options.folder)
        print(json.dumps({**figures, "peak": peak_gb(), "seconds": time.perf_counter() - began}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.base is not None:
            (folder / "base").symlink_to(Path(options.base.removeprefix("local-dir:")))
        found = {}
        for way in WAYS:
            if way == "images":  # forget the embeddings, and nothing else
                for shard in Path(json.loads((folder / "policy.json").read_text())["cache"]).glob("*.safetensors"):
                    shard.unlink()
            found[way] = measured(way, folder)
        assert len({figures["sha256"] for figures in found.values() if "sha256" in figures}) == 1
        assert found["images"]["loaded"]
        assert not found["cached"]["loaded"]
        report(found)


if __name__ == "__main__":
    main()
