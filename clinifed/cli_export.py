"""``clinifed export``, ``verify``, ``inspect``, ``bench``, ``keys``: bundles, made, judged and measured."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from clinifed.errors import ConfigError

__all__ = ["add_export_verbs"]


class _Console(Protocol):
    def progress(self, text: str) -> None: ...

    def result(self, content: Any, *tables: Any) -> None: ...


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(text.split(","))


def _export(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.signing import public_key, read_signing_key

    if args.images is not None and args.images < 1:
        raise ConfigError(f"--images {args.images}: parity needs at least one image")
    key = None if args.sign_key is None else public_key(read_signing_key(args.sign_key))  # before the heavy imports
    from clinifed.export.pipeline import export_checkpoint
    from clinifed.jobs.report import export_table

    report = export_checkpoint(
        args.checkpoint,
        args.out,
        profile=args.profile,
        precisions=tuple(args.precision.split(",")),
        targets=_names(args.target),
        specialties=_names(args.specialty),
        text=args.text,
        calibration=args.calibration,
        test=args.test,
        hospital_data=args.hospital_data,
        parity_images=args.images,
        model_ref=args.model,
        sign_key=args.sign_key,
        timing_cache=args.timing_cache,
        progress=console.progress,
    ).to_dict()
    said = f"bundle {args.out}" + ("" if key is None else f", signed by {key}")
    console.result(report, export_table(report), said)
    if key is None:
        console.progress(
            "not signed: nobody can tell this bundle from another's, and `clinifed verify` will say so; sign it with "
            "--sign-key KEY (`clinifed keys new` makes one)"
        )


def _keys(sources: Sequence[str] | None) -> tuple[str, ...]:
    from clinifed.signing import trusted_keys

    found: list[str] = []
    problems: list[str] = []
    for source in sources or ():
        try:
            found += trusted_keys(source)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return tuple(dict.fromkeys(found))


def _verify(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.bundle import verify

    found = verify(args.bundle, _keys(args.key), _keys(args.local_key))
    size = sum(entry.bytes for entry in found.files.values())
    local = {model: {"key": engine.key, "onnx": engine.onnx} for model, engine in found.local.items()}
    content = {
        "verified": True,
        "files": len(found.files),
        "bytes": size,
        "key": found.key,
        "manifest_sha256": found.manifest_sha256,
        "exportable": found.exportable,
        "reasons": list(found.reasons),
        "local": local,
    }
    lines = [
        f"verified: {len(found.files)} files, {size / 1e6:.2f} MB, nothing changed, missing or added",
        f"signed by {found.key}",
        "exportable" if found.exportable else f"NOT exportable: {'; '.join(found.reasons)}",
        *(f"local engine {m}: from {entry['onnx']}, signed by {entry['key']}" for m, entry in local.items()),
    ]
    console.result(content, *_plain(lines))


def _inspect(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.bundle import check
    from clinifed.bundle_contents import describe, told

    found = describe(check(args.bundle, _keys(args.key), _keys(args.local_key)))
    console.result(found, *_plain(told(found)))


def _bench(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.bundle import check
    from clinifed.export.speed import measure, subjects
    from clinifed.jobs.report import speed_table

    if args.threads < 1:
        raise ConfigError(f"--threads {args.threads}: a backend needs at least one")
    contents = check(args.bundle, _keys(args.key))
    found = measure(subjects(args.bundle, contents, args.checkpoint, args.model, args.threads), console.progress)
    content = {"bundle": contents.manifest_sha256, "threads": args.threads, "backends": [m.to_dict() for m in found]}
    console.result(content, speed_table(found))


def _plain(lines: Sequence[str]) -> list[Any]:
    """Lines as they are: what a bundle says is no markup of ours."""
    from rich.text import Text

    from clinifed.bundle_files import shown

    return [Text(shown(line, 1000)) for line in lines]


def _new(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.signing import PUBLIC_SUFFIX, make_key_pair, public_key

    public = public_key(make_key_pair(args.out))
    content = {"key": str(args.out), "public": f"{args.out}{PUBLIC_SUFFIX}", "public_key": public}
    console.result(
        content,
        f"private {args.out}: keep it where only you can read it",
        f"public  {args.out}{PUBLIC_SUFFIX}: give it to whoever verifies",
        public,
    )


def _show(args: argparse.Namespace, console: _Console) -> None:
    from clinifed.signing import PUBLIC_SUFFIX, public_key, read_signing_key, trusted_keys

    is_public = args.path.suffix == PUBLIC_SUFFIX
    public = trusted_keys(args.path)[0] if is_public else public_key(read_signing_key(args.path))
    console.result({"public_key": public}, public)


def add_export_verbs(verbs: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs; ``verb(name, run, help, group)`` makes one with the common arguments."""
    export = verb("export", _export, "global checkpoint to ONNX, FP16, INT8 and TensorRT engines")
    export.add_argument("checkpoint", type=Path)
    export.add_argument("--out", type=Path, required=True, help="bundle directory to make")
    export.add_argument(
        "--profile", default="workstation", help="workstation, datacenter, jetson-orin (default: workstation)"
    )
    export.add_argument("--precision", default="fp32,fp16,int8", help="comma-separated (default: fp32,fp16,int8)")
    export.add_argument("--target", help="onnx, tensorrt, tensorrt-rtx; comma-separated (default: the profile's)")
    export.add_argument("--specialty", help="export these heads only; comma-separated (default: all)")
    export.add_argument("--text", action="store_true", help="export the text tower as well")
    export.add_argument("--calibration", type=Path, help="manifest of public images (default: the card's)")
    export.add_argument("--test", type=Path, help="manifest of the public test set (default: the card's)")
    export.add_argument(
        "--hospital-data", action="store_true", help="allow a hospital's images; the bundle may then not leave it"
    )
    export.add_argument("--images", type=int, metavar="N", help="most test images that parity is measured on")
    export.add_argument("--model", help="base model, if not where the card says")
    export.add_argument("--timing-cache", type=Path, metavar="FILE", help="kernel timings, kept between exports")
    export.add_argument("--sign-key", type=Path, metavar="KEY", help="private key to sign with, of `keys new`")

    key_help = "public key: 64 hexadecimal digits, a file *.pub, or a folder of them; repeatable"
    for name, run, help_text in (
        ("verify", _verify, "is this bundle, whole, what the holder of a trusted key signed?"),
        ("inspect", _inspect, "what is inside a bundle, by its own account"),
    ):
        parser = verb(name, run, help_text)
        parser.add_argument("bundle", type=Path)
        parser.add_argument("--key", action="append", metavar="PUB", help=key_help)
        parser.add_argument(
            "--local-key", action="append", metavar="PUB", help="likewise, of devices that built engines"
        )

    bench = verb("bench", _bench, "latency, throughput and memory of a bundle's models on this machine, by backend")
    bench.add_argument("bundle", type=Path)
    bench.add_argument("--key", action="append", metavar="PUB", help=key_help)
    bench.add_argument("--checkpoint", type=Path, help="what it was exported from: torch and torch.compile as well")
    bench.add_argument("--model", help="base model of the checkpoint, if not where its card says")
    bench.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each backend (default: all cores)")

    text = "keys that sign bundles"
    group = verbs.add_parser("keys", help=text, description=text).add_subparsers(
        title="verbs", required=True, metavar="VERB"
    )
    new = verb("new", _new, "make an Ed25519 key pair", group)
    new.add_argument(
        "--out", type=Path, required=True, help="file of the private key; the public one is beside it, .pub"
    )
    show = verb("show", _show, "the public half of a key", group)
    show.add_argument("path", type=Path)
