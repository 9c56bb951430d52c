"""The command ``clinifed``: one thin function per verb; what a verb needs is imported inside it."""

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from clinifed import __version__
from clinifed.cli_data import add_index_verb
from clinifed.cli_data_check import add_check_verbs
from clinifed.cli_deidentify import add_deidentify
from clinifed.cli_export import add_export_verbs
from clinifed.cli_federation import add_federation_verbs, spelled_out
from clinifed.cli_models import add_models_verbs
from clinifed.cli_privacy import add_privacy_verbs
from clinifed.cli_training import add_training_verbs
from clinifed.errors import INTERRUPTED, ClinifedError, ConfigError

__all__ = ["build_parser", "main"]


class _Console:
    """Where a verb speaks: progress to stderr, the result to stdout (as JSON where asked for)."""

    def __init__(self, as_json: bool) -> None:
        from rich.console import Console

        self.as_json = as_json
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
        self.out = Console(highlight=False)

    def progress(self, text: str) -> None:
        self.err.print(text, markup=False)

    def result(self, content: Any, *tables: Any) -> None:
        if self.as_json:
            print(json.dumps(content, indent=2, default=str))
        else:
            for table in tables:
                self.out.print(table)


def _federation(args: argparse.Namespace) -> Any:
    from clinifed.load import load_federation

    return load_federation(args.config, args.set or ())


def _simulate(args: argparse.Namespace, console: _Console) -> None:
    federation = _federation(args)  # a wrong setting is told before the heavy imports
    from clinifed.jobs.report import DISCLAIMER, summary_tables
    from clinifed.jobs.simulate import simulate

    summary = simulate(federation, args.out, console.progress, args.threads)
    console.result(summary, *summary_tables(summary), DISCLAIMER)


def _demo(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.export.pipeline import export_checkpoint
    from clinifed.jobs.report import DISCLAIMER, export_table, summary_tables
    from clinifed.jobs.simulate import simulate
    from clinifed.load import load_federation

    config = Path(str(files("clinifed.simulator_configs") / "demo.yaml"))
    federation = load_federation(config, args.set or ())
    console.progress(f"clinifed simulate {config} --out {args.out}")
    summary = simulate(federation, args.out, console.progress)
    checkpoint, bundle = args.out / "checkpoint", args.out / "bundle"
    console.progress(f"clinifed export {checkpoint} --out {bundle}")
    report = export_checkpoint(
        checkpoint,
        bundle,
        precisions=federation.export.precisions,
        targets=federation.export.targets,
        calibration=None,
        test=None,
        progress=console.progress,
    ).to_dict()
    paths = "\n".join(
        f"{name:10} {args.out / name}" for name in ("summary.json", "checkpoint", "bundle", "sites", "log.txt")
    )
    console.result(
        {"summary": summary, "export": report},
        *summary_tables(summary),
        export_table(report),
        DISCLAIMER,
        paths,
    )


def _job(args: argparse.Namespace, console: _Console) -> None:
    federation = _federation(args)
    from clinifed.jobs.export_job import export_job

    written = export_job(federation, args.out, args.workspace, console.progress)
    console.result({k: str(v) for k, v in written.items()}, *(f"{k:10} {v}" for k, v in written.items()))


def _basis(args: argparse.Namespace, console: _Console) -> None:
    federation = _federation(args)
    from dataclasses import asdict

    from clinifed.jobs.basis import write_basis

    folder = args.out.with_name(f"{args.out.stem}-data")
    basis, trials = write_basis(federation, None, args.out, folder, console.progress)
    content = {"out": str(args.out), "sha256": basis.sha256(), "trials": [asdict(trial) for trial in trials]}
    console.result(content, f"{args.out}\nsha256 {basis.sha256()}")


def _evaluate(args: argparse.Namespace, console: _Console) -> None:
    if args.site is not None and args.test is not None:
        raise ConfigError("give either --test MANIFEST, of public patients, or --site POLICY, for a hospital's own")
    from clinifed.jobs.evaluate import evaluate_at_site, evaluate_checkpoint
    from clinifed.jobs.report_comparison import comparison_tables, relinkage_tables

    if args.site is not None:
        report = evaluate_at_site(args.checkpoint, args.site, args.model, args.min_patients)
    else:
        report = evaluate_checkpoint(args.checkpoint, args.test, args.model, args.min_patients)
    tables = [*comparison_tables(report["comparison"], "trained"), *relinkage_tables(report["relinkage"])]
    console.result(report, *tables, *([report["note"]] if report["note"] else []))


def _synthesize(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.config import Synthesize
    from clinifed.data.synthesize import synthesize
    from clinifed.load import validate

    settings = {k: v for k, v in vars(args).items() if k in Synthesize.model_fields and v is not None}
    sites = {}
    for text in args.site:
        name, _, specialties = text.partition("=")
        sites[name] = tuple(specialties.split(","))
    synthesize(validate(Synthesize, settings, "command line"), sites, args.out)
    console.result({"out": str(args.out), "sites": sites}, f"synthetic hospitals in {args.out}")


def _count(text: str) -> int:
    """A number of patients, 1 or more."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a federation's YAML, for example simulator_configs/demo.yaml")
    _set_argument(parser)


def _set_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="override one setting, e.g. rounds=3")


def build_parser() -> argparse.ArgumentParser:
    """The command line, all verbs."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    common.add_argument("--verbose", action="store_true", help="log more, to stderr")
    parser = argparse.ArgumentParser(prog="clinifed", description="Differentially private federated BiomedCLIP.")
    parser.add_argument("--version", action="version", version=f"clinifed {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, run: Callable[..., None], help_text: str, parent: Any = verbs) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = parent.add_parser(
            name, help=help_text, description=help_text, parents=[common]
        )
        added.set_defaults(run=run)
        return added

    demo = verb("demo", _demo, "the main job on synthetic hospitals: simulate, then export; no download, no GPU")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run directory (default: runs/demo)")
    _set_argument(demo)

    simulate = verb("simulate", _simulate, "run a federation on this machine through FLARE's simulator")
    _config_arguments(simulate)
    simulate.add_argument("--out", type=Path, required=True, help="run directory to make")
    simulate.add_argument("--threads", type=int, help="FLARE simulator threads (default: one per site, at most 16)")

    add_export_verbs(verbs, verb)

    evaluate = verb(
        "evaluate", _evaluate, "a checkpoint on a public test set, or at a hospital on its own held-out patients"
    )
    evaluate.add_argument("checkpoint", type=Path)
    evaluate.add_argument("--test", type=Path, help="manifest of the public test set (default: the card's)")
    evaluate.add_argument(
        "--site",
        type=Path,
        metavar="POLICY",
        help="at a hospital: on its own held-out patients; the report stays there",
    )
    evaluate.add_argument(
        "--min-patients", type=_count, default=10, metavar="N", help="below which a figure is suppressed (default: 10)"
    )
    evaluate.add_argument("--model", help="base model, if not where the card says")

    job = verb("job", _job, "write the FLARE job folder of a federation")
    _config_arguments(job)
    job.add_argument("--out", type=Path, required=True, help="folder to write the job into")
    job.add_argument("--workspace", type=Path, help="also prepare data and a workspace for `nvflare simulator`")

    basis = verb("basis", _basis, "make the public basis that a federation's heads train in, of public images")
    _config_arguments(basis)
    basis.add_argument("--out", type=Path, required=True, help="file to write; every site installs it")

    add_federation_verbs(verbs, verb)
    add_training_verbs(verb)

    privacy_parser = verbs.add_parser("privacy", help="plan, lint, audit, and the budget ledger")
    add_privacy_verbs(privacy_parser.add_subparsers(title="verbs", required=True, metavar="VERB"), verb)

    models_parser = verbs.add_parser("models", help="base models as directories that need no network")
    add_models_verbs(models_parser.add_subparsers(title="verbs", required=True, metavar="VERB"), verb)

    data_parser = verbs.add_parser("data", help="images and manifests of one site")
    data = data_parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    synthetic = verb("synthesize", _synthesize, "write synthetic hospitals as DICOM files", data)
    synthetic.add_argument("--out", type=Path, required=True)
    synthetic.add_argument(
        "--site",
        action="append",
        required=True,
        metavar="NAME=SPECIALTY,…",
        help="one hospital; repeat for more",
    )
    for name in (
        "seed",
        "style-seed",
        "patients-per-specialty",
        "public-patients-per-specialty",
        "max-images",
    ):
        synthetic.add_argument(f"--{name}", type=int)
    synthetic.add_argument("--shuffle-labels", action="store_true", default=None, help="a control: labels mean nothing")
    add_index_verb(data, verb)
    add_check_verbs(data, verb)
    add_deidentify(data, verb)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exits with the code of the error that ended it."""
    args = build_parser().parse_args(spelled_out(sys.argv[1:] if argv is None else argv))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped service ends what it started, as Ctrl-C does
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        args.run(args, _Console(args.json))
    except ClinifedError as error:
        for problem in error.problems:
            print(f"clinifed: {problem}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("clinifed: interrupted; everything started has been ended", file=sys.stderr)
        sys.exit(INTERRUPTED)
