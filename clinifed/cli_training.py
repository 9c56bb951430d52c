"""``clinifed finetune`` and ``personalise``: what one hospital trains by itself."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

__all__ = ["add_training_verbs"]


class _Console(Protocol):
    def progress(self, text: str) -> None: ...
    def result(self, content: Any, *tables: Any) -> None: ...


def _policy(path: Path) -> Any:
    from clinifed.load import read_yaml, validate
    from clinifed.policy import SitePolicy

    return validate(SitePolicy, read_yaml(path), str(path))


def _finetune(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.load import load_federation

    federation = load_federation(args.config, args.set or ())  # a wrong setting is told before the heavy imports
    policy = None if args.policy is None else _policy(args.policy)
    from clinifed.jobs.finetune import fine_tune_for_specialty
    from clinifed.jobs.training_report import finetune_table

    given = {key: getattr(args, key) for key in ("epochs", "learning_rate", "batch_size", "start", "from_specialty")}
    given |= {key: getattr(args, key) for key in ("validation", "patience")}
    given |= {} if args.alike is None else {"alike": args.alike}
    report = fine_tune_for_specialty(
        federation, args.site, args.specialty, args.out, policy=policy, progress=console.progress, **given
    )
    console.result(report, finetune_table(report))


def _personalise(args: argparse.Namespace, console: _Console) -> None:
    policy = _policy(args.policy)
    from clinifed.jobs.personalise import personalise
    from clinifed.jobs.training_report import personalise_tables

    report = personalise(
        args.checkpoint, policy, args.out, specialties=args.specialty, model_ref=args.model, progress=console.progress
    )
    console.result(report, *personalise_tables(report))


def add_training_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs; ``verb(name, run, help)`` makes one with the common arguments."""
    tune = verb("finetune", _finetune, "fine-tune one site's specialty, by the federation's engine and ledger")
    tune.add_argument("config", type=Path, help="a federation's YAML")
    tune.add_argument("--set", action="append", metavar="KEY=VALUE", help="override one setting, e.g. rounds=3")
    tune.add_argument("--site", required=True, help="which of its sites")
    tune.add_argument("--specialty", required=True, action="append", metavar="NAME", help="repeat for more")
    tune.add_argument("--out", type=Path, required=True, help="run directory; an unfinished run in it goes on")
    tune.add_argument("--policy", type=Path, help="the hospital's own policy (default: made of the configuration)")
    tune.add_argument("--epochs", type=int, help="full-batch steps (default: rounds · local epochs)")
    tune.add_argument("--learning-rate", type=float, help="of a step (default: training.learning_rate)")
    tune.add_argument("--batch-size", type=int, help="images in memory at once; never changes the result")
    tune.add_argument("--start", type=Path, metavar="CHECKPOINT", help="begin with it (default: zero-shot)")
    tune.add_argument("--from-specialty", metavar="NAME", help="take over what this head of --start learned of ...")
    tune.add_argument("--alike", type=float, help="... labels whose prompts' cosine is at least this (default: 0.95)")
    tune.add_argument(
        "--validation",
        choices=("public", "holdout", "none"),
        help="what epochs are chosen by (default: the public set; holdout: with privacy off only)",
    )
    tune.add_argument("--patience", type=int, metavar="N", help="stop after N epochs without a better one")

    own = verb("personalise", _personalise, "a hospital's own heads on top of a global checkpoint; they never leave")
    own.add_argument("checkpoint", type=Path, help="the global checkpoint")
    own.add_argument("--policy", type=Path, required=True, help="the site's policy file")
    own.add_argument("--out", type=Path, required=True, help="folder to make, its owner's alone")
    own.add_argument("--specialty", action="append", metavar="NAME", help="default: all that both have")
    own.add_argument("--model", help="base model, if not where the policy or the card says")
