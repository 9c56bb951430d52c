"""What a private step costs at BiomedCLIP's real size: over the same step without privacy, and over stock Opacus.

``python benchmarks/training.py`` writes its section of ``RESULTS.md`` and its entries of ``results.json``. Every mode
runs in a process of its own, so that its peak memory is its own, and the process that starts them stays small, since
Linux counts a parent's memory into what it starts. Both sides of a ratio run in one process, in turns.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import Entry, peak_gb, printed, record, write_section

IMAGES = 4  # in a physical batch of the tower
PATIENTS = {"heads": 500, "projection": 500, "lora": 32, "blocks": 128}  # with two images where features are one row
PAIRS = {"heads": 51, "projection": 21, "lora": 3, "blocks": 3}  # of steps, in turns, after one to warm up
TOKENS = (197, 768)  # of one image at the cut
MODES = ("heads", "projection", "lora", "blocks", "stock")
MEMORY_GB = 3.0  # of lora
LIMITS = {"dp_step_lora": 1.1, "dp_step_blocks": 1.2, "dp_step_heads": 2.0}


def in_turns(one: Callable[[], object], other: Callable[[], object], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each, one after the other, so that what else the machine does falls on both."""
    taken: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs + 1):
        for run, times in zip((one, other), taken, strict=True):
            began = time.perf_counter()
            run()
            if pair:
                times.append(time.perf_counter() - began)
    return taken


def drawn_step(mode: str, ref: str, patients: int) -> tuple[Callable[[], None], Callable[[], None], int]:
    """A step of ``mode`` with and without privacy, on drawn features of the shape that this mode reads.

    Returns:
        The private step, the plain one, and how many parameters both train.
    """
    import torch

    from clinifed.config import Training
    from clinifed.models.adapters import build_trainable
    from clinifed.models.backbone import load_backbone
    from clinifed.models.specialties import SPECIALTIES
    from clinifed.privacy.engine import Mechanism, PatientTensors, plain_step, private_step
    from clinifed.privacy.objectives import OBJECTIVES
    from clinifed.privacy.patients import rows_per_batch

    backbone = load_backbone(ref)
    specialties = {name: SPECIALTIES[name] for name in ("dermatology", "radiology")}
    part = build_trainable(backbone, specialties, Training(train=mode, blocks=2))
    del backbone  # what trains holds what it needs of the tower; the prompts are in the heads
    gc.collect()
    generator, flat = torch.Generator().manual_seed(0), mode in ("heads", "projection")
    patient = torch.arange(patients).repeat_interleave(2 if flat else 1)
    shape = (512,) if mode == "heads" else (768,) if flat else TOKENS
    features = torch.randn(len(patient), *shape, generator=generator)
    if mode == "heads":
        features = torch.nn.functional.normalize(features, dim=-1)
    label = torch.randint(0, 2, (len(patient),), generator=generator)
    data = PatientTensors(features, patient, patient % 2, label)
    objective, mechanism = OBJECTIVES["cross-entropy"], Mechanism(1.0, 1.0, data.patients)
    rows = rows_per_batch(data, IMAGES)
    return (
        lambda: private_step(part, data, objective, mechanism, 1e-3, rows),
        lambda: plain_step(part, data, objective, 1e-3, rows),
        sum(t.numel() for t in part.shared().values()),
    )


def our_step(mode: str, ref: str) -> dict[str, Any]:
    """Both steps of ``mode``, in turns."""
    private_step, plain_step, parameters = drawn_step(mode, ref, PATIENTS[mode])
    private, plain = in_turns(private_step, plain_step, PAIRS[mode])
    return {"private": private, "plain": plain, "patients": PATIENTS[mode], "parameters": parameters}


def threads_of_a_step(ref: str) -> dict[str, Any]:
    """A private step of ``lora`` on one thread, as every trainer had, and on as many as torch takes, in turns."""
    import torch

    every = torch.get_num_threads()
    private, _, _ = drawn_step("lora", ref, 8)

    def on(threads: int) -> None:
        torch.set_num_threads(threads)
        private()

    one, several = in_turns(lambda: on(1), lambda: on(every), PAIRS["lora"])
    return {"one": one, "several": several, "threads": every}


def stock_opacus(ref: str) -> dict[str, Any]:
    """What one would write without clinifed: Opacus' PrivacyEngine on the whole tower, a gradient per image."""
    import torch
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    from clinifed.models.backbone import load_backbone

    backbone = load_backbone(ref)
    tower = torch.nn.Sequential(backbone.model.visual.requires_grad_(True), torch.nn.Linear(512, 2)).train()
    loader = DataLoader(TensorDataset(torch.randn(IMAGES, 3, 224, 224), torch.randint(0, 2, (IMAGES,))), IMAGES)
    module, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=tower,
        optimizer=torch.optim.SGD(tower.parameters(), lr=1e-3),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    taken = []
    for turn in range(4):
        began = time.perf_counter()
        for pixels, label in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(pixels), label).backward()
            optimizer.step()
        if turn:
            taken.append(time.perf_counter() - began)
    return {"private": taken, "patients": IMAGES, "parameters": sum(p.numel() for p in tower.parameters())}


def measured(mode: str, ref: str) -> Any:
    """What a process of its own prints for ``mode``."""
    return printed(__file__, "--mode", mode, "--base", ref)


def report_threads(found: dict[str, Any]) -> None:
    ratios = [a / b for a, b in zip(found["one"], found["several"], strict=True)]
    a, b, ratio = (statistics.median(values) for values in (found["one"], found["several"], ratios))
    unit = f"s, private step of lora on one thread over {found['threads']}"
    record([Entry("threads_lora", ratio, a, b, unit, max(ratios) - min(ratios))])
    lines = ["| private step of `lora`, 8 patients, real size | ratio | here |", "|---|---|---|"]
    what = f"one thread over {found['threads']}, which a trainer has by default"
    lines.append(f"| {what} | {ratio:.2f} | {a:.2f} s over {b:.2f} s |")
    write_section("Threads of a trainer", lines)


def report(found: dict[str, dict[str, Any]]) -> None:
    entries, lines = [], ["| step at real size | ratio | here | peak memory | parameters |", "|---|---|---|---|---|"]
    for mode in MODES[:-1]:
        figures = found[mode]
        ratios = [a / b for a, b in zip(figures["private"], figures["plain"], strict=True)]
        a, b = statistics.median(figures["private"]), statistics.median(figures["plain"])
        name = f"dp_step_{mode}"
        ratio = statistics.median(ratios)
        entries.append(Entry(name, ratio, a, b, "s, DP step over plain step", max(ratios) - min(ratios)))
        goal = f" (goal ≤ {LIMITS[name]})" if name in LIMITS else ""
        lines.append(
            f"| `{name}`{goal} | {ratio:.2f} | {a:.3f} s over {b:.3f} s, {figures['patients']} patients "
            f"| {figures['peak']:.2f} GB | {figures['parameters']:,} |"
        )
    stock = found["stock"]
    rates = {mode: [found[mode]["patients"] / t for t in found[mode]["private"]] for mode in MODES}
    for mode, goal in (("lora", "≥ 2.5"), ("heads", "≥ 100")):
        ours, theirs = statistics.median(rates[mode]), statistics.median(rates["stock"])
        ends = [min(rates[mode]) / max(rates["stock"]), max(rates[mode]) / min(rates["stock"])]
        unit = "patients/s, DP step over stock Opacus on the full tower"
        entries.append(Entry(f"{mode}_vs_opacus_full", ours / theirs, ours, theirs, unit, ends[1] - ends[0]))
        lines.append(
            f"| `{mode}_vs_opacus_full` (goal {goal}) | {ours / theirs:.1f} | {ours:.2f} over {theirs:.2f} patients/s "
            f"| {stock['peak']:.2f} GB (stock) | {stock['parameters']:,} (stock) |"
        )
    peak, limit = found["lora"]["peak"], MEMORY_GB
    entries.append(Entry("lora_memory", peak / limit, peak, limit, "GB, peak of a process over its limit", 0))
    record(entries)
    write_section("Private steps at real size", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--mode", choices=(*MODES, "base", "threads"), help="measure this one, here, and print it as JSON"
    )
    parser.add_argument("--base", help="reference of a base model; default: one of real size is made")
    options = parser.parse_args()
    if options.mode == "base":
        from real_size import make_base

        print(json.dumps(make_base(Path(options.base))))
        return
    if options.mode == "threads":
        print(json.dumps(threads_of_a_step(options.base)))
        return
    if options.mode:
        figures = stock_opacus(options.base) if options.mode == "stock" else our_step(options.mode, options.base)
        print(json.dumps({**figures, "peak": peak_gb()}))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or measured("base", str(Path(folder) / "base"))
        report({mode: measured(mode, base) for mode in MODES})
        report_threads(measured("threads", base))


if __name__ == "__main__":
    main()
