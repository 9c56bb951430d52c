"""What federating is worth to each of the natural sites of ``real_sites.yaml``: a report, whatever it shows.

``python benchmarks/real_images.py`` writes its section of ``RESULTS.md``. It needs the folder of real, public images
that the configuration names. With the tiny tower, which was trained on drawings, the figures show the machinery; with
``--model local-dir:…`` they show a model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from results import HERE, write_section

CONFIG = HERE.parent / "simulator_configs" / "real_sites.yaml"
PUBLIC = {"cxr_nih_bethesda": "radiology", "derm_vienna_vidir": "dermatology"}  # set aside, never a site
UNSEEN = "derm_molemax"  # its model is the others'
HELD_OUT = "test_manifest.csv"  # patients of every hospital that its own table does not have
EPSILONS = (8.0, 3.0)
MINIMUM = 5  # patients on either side of a label
COLUMNS = {
    "zero_shot": "zero-shot",
    "local_only": "local only",
    "federated_no_dp": "federated",
    "federated_dp 8": "DP, epsilon 8",
    "federated_dp 3": "DP, epsilon 3",
    "personalised": "personalised",
}


def plan(model: str, basis: str, work: Path) -> dict[str, Any]:
    """The configuration, each site with held-out patients of its own."""
    content: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    root = (CONFIG.parent / content["data"]["root"]).resolve()
    content["data"]["root"] = str(root)
    content["model"] = {"ref": model}
    content["training"] |= {"basis": basis}
    content["evaluation"] = {"min_patients": MINIMUM}
    held_out = pd.read_csv(root / HELD_OUT, dtype=str)
    for name, site in content["sites"].items():
        index = site["index"]
        hospital, split = index["folder"], index.pop("split")
        own = pd.read_csv(root / hospital / "manifest.csv", dtype=str).assign(split=split)
        others = held_out[held_out["hospital"] == hospital].assign(split="holdout")
        own["image"], others["image"] = f"{root}/{hospital}/" + own["image"], f"{root}/" + others["image"]
        table = work / "tables" / f"{name}.csv"
        table.parent.mkdir(parents=True, exist_ok=True)
        pd.concat([own, others]).to_csv(table, index=False)
        index |= {"labels": [str(table)]}
    return content


def clinifed(*words: object) -> Any:
    """What the command prints as JSON."""
    command = [sys.executable, "-P", "-m", "clinifed", *map(str, words), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def policy_of(run: Path, site: str) -> Path:
    """A policy for what a hospital does by itself, over the run's own data."""
    home = run / "sites" / site
    content = {
        "site": site,
        "manifest": str(run / "data" / site / "manifest.csv"),
        "ledger": str(home / "ledger.jsonl"),
        "outbox": str(home / "outbox"),
        "signing_key": str(home / "signing.key"),
        "cache": str(home / "cache"),
        "diary": str(home / "diary.jsonl"),
        "budget": {"epsilon": 3.0, "delta": 1e-5},
        "min_nominal_patients": 1,
    }
    path = home / "own_policy.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def told(figure: dict[str, Any] | None) -> str:
    """A figure with its interval, or that there is none."""
    if figure is None or figure.get("value") is None:
        return "too few"
    return f"{figure['value']:.2f} ({figure['low']:.2f}–{figure['high']:.2f})"


def holdout_rows(runs: dict[float, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Site → patients, and each model's balanced accuracy on the site's own held-out patients."""
    rows: dict[str, dict[str, Any]] = {}
    for epsilon, summary in runs.items():
        for row in summary["comparison"]:
            if row["patients_of"] != "holdout" or row["site"] is None:
                continue
            mine = rows.setdefault(row["site"], {"patients": row["patients"], "specialty": row["specialty"]})
            for key, figures in row["models"].items():
                mine[f"{key} {epsilon:g}" if key == "federated_dp" else key] = figures["balanced_accuracy"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--basis", default="centre", help="training.basis")
    parser.add_argument("--work", type=Path, help="folder to keep the runs in")
    parser.add_argument("--dry", action="store_true", help="print, and leave RESULTS.md alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(exist_ok=True)
        content = plan(options.model, options.basis, work)
        unseen = content["sites"].pop(UNSEEN)
        content |= {"min_clients": len(content["sites"]), "max_clients": len(content["sites"])}
        (work / "plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        runs = {}
        for epsilon in EPSILONS:
            out = work / f"epsilon{epsilon:g}"
            if not (out / "summary.json").is_file():
                clinifed("simulate", work / "plan.yaml", "--out", out, "--set", f"privacy.epsilon={epsilon}")
            runs[epsilon] = json.loads((out / "summary.json").read_text())
        rows, notes, last = holdout_rows(runs), [], work / f"epsilon{EPSILONS[-1]:g}"
        for site, row in rows.items():
            out = last / "sites" / site / "own"
            if not out.exists():
                clinifed("personalise", last / "checkpoint", "--policy", policy_of(last, site), "--out", out)
            choice = json.loads((out / "choice.json").read_text())["specialties"][row["specialty"]]
            chosen = choice["candidates"][choice["chosen"]]
            row["personalised"] = {"value": chosen["balanced_accuracy"], "name": choice["chosen"]}
            gap = choice["candidates"]["local-only"].get("difference")  # over the global head
            if choice["chosen"] == "global" and gap is not None and gap["difference"] > 0:
                where = "beyond" if gap["low"] > 0 else "within"
                notes.append(
                    f"{site}: local only is ahead of the head that was kept by {gap['difference']:.2f} "
                    f"({gap['low']:.2f} to {gap['high']:.2f}), {where} its interval."
                )
        root = Path(content["data"]["root"])
        index = unseen["index"]
        manifest = work / "unseen" / "manifest.csv"
        if not manifest.exists():
            from clinifed.config import FolderIndex
            from clinifed.data.index import index_folder

            manifest.parent.mkdir(exist_ok=True)
            settings = FolderIndex(**{**index, "folder": root / index["folder"]})
            index_folder(settings, manifest, tuple(unseen["specialties"]), "public")
        lines = [
            f"Public, and no site: {', '.join(PUBLIC)}. Unseen, and no site: {UNSEEN}. Base model `{options.model}`,",
            f"basis `{options.basis}`, 10 rounds. Balanced accuracy by patient with 95 % intervals over the site's own",
            f"held-out patients, those of {HELD_OUT}; the personalised head was chosen on those same patients, so that",
            "its figure flatters. The tiny model was trained on drawings: its figures here are chance, or near it.",
            "",
            f"| site | patients | {' | '.join(COLUMNS.values())} |",
            "|---|---|" + "---|" * len(COLUMNS),
        ]
        for site, row in sorted(rows.items(), key=lambda item: (item[1]["specialty"], item[0])):
            cells = [told(row.get(key)) for key in COLUMNS if key != "personalised"]
            own = row["personalised"]
            cells.append("–" if own["value"] is None else f"{own['value']:.2f} ({own['name']})")
            lines.append(f"| {site} ({row['specialty']}) | {row['patients']} | {' | '.join(cells)} |")
        for epsilon in EPSILONS:
            checkpoint = work / f"epsilon{epsilon:g}" / "checkpoint"
            found = clinifed("evaluate", checkpoint, "--test", manifest, "--min-patients", MINIMUM)
            for row in found["comparison"]:
                models = {key: told(figures["balanced_accuracy"]) for key, figures in row["models"].items()}
                if row["site"] is None:
                    lines.append(f"\n{UNSEEN}, unseen, epsilon {epsilon:g}, {row['patients']} patients: {models}.")
        lines += ["", *notes]
        print("\n".join(lines))
        if not options.dry:
            write_section("Natural sites, real images", lines)


if __name__ == "__main__":
    main()
