"""What a GPU makes of the work at BiomedCLIP's real size: embedding, and steps with and without privacy.

``python benchmarks/gpu.py`` writes its section of RESULTS.md and ``gpu_*`` entries of ``results.json``; without a GPU
it says so and writes nothing. Both sides of a ratio run in one process, in turns. How much of the chip a step uses is
the plain step's floating-point operations, counted by torch, over its seconds and over the rate of a large product.
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

import torch
from results import Entry, record, write_section
from torch.utils.flop_counter import FlopCounterMode
from training import TOKENS, in_turns, measured

from clinifed.config import Training
from clinifed.models.adapters import FrozenPart, TrainablePart, build_trainable
from clinifed.models.backbone import Backbone, load_backbone
from clinifed.models.specialties import SPECIALTIES
from clinifed.privacy.engine import Mechanism, PatientTensors, plain_step, private_step
from clinifed.privacy.noise import NoiseSource
from clinifed.privacy.objectives import OBJECTIVES

BATCHES = (32, 64, 128, 256)
PATIENTS, PAIRS = 512, 3  # of one image each: the most gradients that so many images can make
CHOSEN = {name: SPECIALTIES[name] for name in ("dermatology", "radiology")}
SIDE = 224
STEPS = {
    "lora": Training(train="lora", precision="bf16"),
    "lora, float32": Training(train="lora"),
    "full tower": Training(train="blocks", blocks=12, precision="bf16"),
}


def seconds(run: Callable[[], object], times: int) -> float:
    """Of one run, the median; the first is to warm up."""
    taken = []
    for turn in range(times + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if turn:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def matrix_rate() -> float:
    """Floating-point operations a second of a bfloat16 product of 8192³, on random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b, 20)


def operations(run: Callable[[], object]) -> int:
    """Of one run, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9


def embedding(backbone: Backbone) -> list[dict[str, Any]]:
    """Images of a site: from pixels in the CPU's memory to features there, as a site does it, and in bfloat16."""
    frozen = FrozenPart(backbone, build_trainable(backbone, CHOSEN, Training()).ready())
    found = []
    for precision in ("float32", "bfloat16"):
        for batch in BATCHES:
            pixels = torch.randn(batch, 3, SIDE, SIDE)

            @torch.no_grad()
            def run(pixels: torch.Tensor = pixels, precision: str = precision) -> torch.Tensor:
                with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                    return frozen.features(pixels.cuda()).cpu()

            free()
            taken = seconds(run, 10)
            rate = operations(run) / taken
            found.append(
                {"precision": precision, "batch": batch, "images_s": batch / taken, "flops": rate, "peak": peak_gb()}
            )
    return found


def drawn() -> PatientTensors:
    """Tokens of drawn images, in the CPU's memory as a site's are."""
    generator = torch.Generator().manual_seed(0)
    patient = torch.arange(PATIENTS)
    label = torch.randint(0, 2, (PATIENTS,), generator=generator)
    return PatientTensors(torch.randn(PATIENTS, *TOKENS, generator=generator), patient, patient % 2, label)


def step(what: str, part: TrainablePart, data: PatientTensors, batch: int) -> dict[str, Any]:
    """Both steps over all patients in physical batches of ``batch``; memory is each step's own."""
    objective, mechanism = OBJECTIVES["cross-entropy"], Mechanism(1.0, 1.0, PATIENTS)

    def plain() -> None:
        plain_step(part, data, objective, 1e-3, batch)
        torch.cuda.synchronize()

    def private() -> None:
        private_step(part, data, objective, mechanism, 1e-3, batch)
        torch.cuda.synchronize()

    peaks = []
    for run in (plain, private):
        free()
        run()
        peaks.append(peak_gb())
    private_s, plain_s = in_turns(private, plain, PAIRS)
    parameters = sum(p.numel() for p in part.parameters() if p.requires_grad)
    return {
        "what": what,
        "batch": batch,
        "private": private_s,
        "plain": plain_s,
        "peak_private": peaks[1],
        "peak_plain": peaks[0],
        "parameters": parameters,
        "noise_s": noise_seconds(parameters),
        "flops": operations_of_a_row(part, data) * PATIENTS / statistics.median(plain_s),
    }


def noise_seconds(parameters: int) -> float:
    """Of drawing the noise of one release."""
    began = time.perf_counter()
    NoiseSource().standard_normal((parameters,), torch.device("cuda"))
    torch.cuda.synchronize()
    return time.perf_counter() - began


def operations_of_a_row(part: TrainablePart, data: PatientTensors) -> float:
    few = PatientTensors(data.features[:4], data.patient[:4], data.specialty[:4], data.label[:4])
    return operations(lambda: plain_step(part, few, OBJECTIVES["cross-entropy"], 0.0, 4)) / 4


def steps(ref: str) -> list[dict[str, Any]]:
    found, data = [], drawn()
    for what in STEPS:
        part = build_trainable(load_backbone(ref), CHOSEN, STEPS[what]).ready()
        for batch in BATCHES:
            try:
                found.append(step(what, part, data, batch))
            except torch.OutOfMemoryError:
                found.append({"what": what, "batch": batch, "reason": "does not fit"})
            print(json.dumps(found[-1]), flush=True)
        del part
        free()
    return found


def report(rate: float, embedded: list[dict[str, Any]], trained: list[dict[str, Any]]) -> None:
    name = torch.cuda.get_device_name()
    lines = [
        f"{name}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB. A bfloat16 product of 8192³ runs at "
        f"{rate / 1e12:.0f} TFLOP/s; shares are of that.",
        "",
        "Embedding, from pixels in the CPU's memory to features there (a site does it in float32, once an image):",
        "",
        "| precision | batch | images/s | GPU memory, GB | share of the matrix rate |",
        "|---|---|---|---|---|",
    ]
    entries = []
    for e in embedded:
        share = e["flops"] / rate
        lines.append(
            f"| {e['precision']} | {e['batch']} | {e['images_s']:,.0f} | {e['peak']:.2f} | {100 * share:.1f} % |"
        )
        unit = "FLOP/s, embedding over a large bfloat16 product"
        entries.append(Entry(f"gpu_embedding_{e['precision']}_{e['batch']}", share, e["flops"], rate, unit, 0))
    lines += [
        "",
        f"Steps over {PATIENTS} patients of one image, noise included; the full tower is `blocks` with all twelve:",
        "",
        "| step | physical batch | DP over plain | images/s, DP / plain | GPU memory, GB, DP / plain | noise, s "
        "| share of the matrix rate, DP / plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for t in trained:
        if "reason" in t:
            lines.append(f"| {t['what']} | {t['batch']} | {t['reason']} | | | | |")
            continue
        ratios = [a / b for a, b in zip(t["private"], t["plain"], strict=True)]
        private, plain = statistics.median(t["private"]), statistics.median(t["plain"])
        share = t["flops"] / rate
        lines.append(
            f"| {t['what']} | {t['batch']} | {statistics.median(ratios):.2f} | "
            f"{PATIENTS / private:,.0f} / {PATIENTS / plain:,.0f} | {t['peak_private']:.1f} / {t['peak_plain']:.1f} | "
            f"{t['noise_s']:.2f} | {100 * share * plain / private:.1f} % / {100 * share:.1f} % |"
        )
        key = t["what"].replace(", ", "_").replace(" ", "_")
        unit = "s, DP step over plain step, on a GPU"
        spread = max(ratios) - min(ratios)
        entries.append(
            Entry(f"gpu_dp_step_{key}_{t['batch']}", statistics.median(ratios), private, plain, unit, spread)
        )
    record(entries)
    write_section("On a GPU", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="reference of a base model; default: one of real size is made")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing is measured")
        return
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or measured("base", str(Path(folder) / "base"))
        rate = matrix_rate()
        embedded = embedding(load_backbone(base))
        print(json.dumps(embedded), flush=True)
        report(rate, embedded, steps(base))


if __name__ == "__main__":
    main()
