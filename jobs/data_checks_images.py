"""Checks of the images: which can be used, of what kind they are, and which are there twice."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from clinifed.data.manifest import changed_images
from clinifed.jobs.data_checks_header import MODALITIES, PHOTOMETRIC
from clinifed.jobs.data_checks_share import Counts, Shared, known, known_reason
from clinifed.jobs.data_checks_site import Finding, Level, Look, SiteUnderCheck, rows_text

__all__ = ["duplicates", "files_used", "kinds", "leakage", "unchanged"]

_PICTURE, _UNREAD = "PNG or JPEG", "not read"
_MANY = 0.05  # share of images left out above which something is wrong with more than single files


def files_used(site: SiteUnderCheck) -> Finding:
    """Every image (or a sample) is decoded as for training; what is left out is listed with its reason."""
    pictures, looked, listed = site.pictures, len(site.sampled), len(site.records)
    says = [f"{pictures.used} of {looked} images can be used" + (f", a sample of {listed}" if looked < listed else "")]
    says += [
        f"{count} × {reason}: {rows_text(sorted(pictures.rows[reason]))}"
        for reason, count in pictures.skipped.most_common()
    ]
    bare = [name for name in site.wanted if not pictures.by_specialty[name]]
    says += [f"no usable image of {name}" for name in bare]
    lost = looked - pictures.used
    level: Level = "PASS"
    if lost:
        level = "WARN"
    if not pictures.used or (bare and looked == listed) or lost > _MANY * looked:
        level = "FAIL"
    reasons = Counter[str]()
    for reason, count in pictures.skipped.items():
        reasons[known_reason(reason)] += count
    tree = Counts(
        "images looked at",
        looked,
        (
            Counts("can be used", pictures.used),
            *((Counts("left out", lost, tuple(Counts(r, n) for r, n in sorted(reasons.items()))),) if lost else ()),
        ),
    )
    remedy = "mend or remove the rows that are named, then `clinifed data index` again" if level != "PASS" else ""
    return Finding(level, tuple(says), remedy, Shared(counts=(tree,)))


def unchanged(site: SiteUnderCheck) -> Finding:
    """Every file is the one that was indexed, byte for byte; training leaves all others out."""
    contents = {look.record.image: look.content for look in site.looks}
    differing = changed_images(site.manifest, contents)
    gone = sorted(site.row_of[record.image] for record in differing if contents[record.image] is None)
    changed = sorted(site.row_of[record.image] for record in differing if contents[record.image] is not None)
    unknown = sum(not record.sha256 for record in site.records)
    says = [f"{len(site.records) - len(differing)} of {len(site.records)} files are as they were listed"]
    says += [f"{len(changed)} × changed since they were listed: {rows_text(changed)}"] if changed else []
    says += [f"{len(gone)} × gone, or not to be read: {rows_text(gone)}"] if gone else []
    says += [f"{unknown} were listed without a hash, so that a change would not be seen"] if unknown else []
    level: Level = "FAIL" if differing else "WARN" if unknown else "PASS"
    remedy = "" if level == "PASS" else "put the files back as they were, or `clinifed data index` again"
    share = Shared(
        counts=(
            Counts(
                "files listed",
                len(site.records),
                (
                    Counts("as listed", len(site.records) - len(differing)),
                    Counts("changed since", len(changed)),
                    Counts("gone", len(gone)),
                ),
            ),
        )
    )
    return Finding(level, tuple(says), remedy, share)


def kinds(site: SiteUnderCheck) -> Finding:
    """Modality (0008,0060), photometric interpretation (0028,0004) and burned-in annotation (0028,0301)."""
    opened = {record.image for record in site.sampled}
    looks = [look for look in site.looks if look.record.image in opened]
    modality = Counter(_term(look, "Modality", MODALITIES) for look in looks)
    photometric = Counter(_term(look, "PhotometricInterpretation", PHOTOMETRIC) for look in looks)
    burned = [look.row for look in looks if look.header.get("BurnedInAnnotation", "").upper() == "YES"]
    says = [
        f"modalities: {', '.join(f'{n} × {term}' for term, n in modality.most_common())}",
        f"photometric: {', '.join(f'{n} × {term}' for term, n in photometric.most_common())}",
    ]
    unread = [look.row for look in looks if look.kind == "dicom" and not look.header]
    if unread:
        says.append(f"{len(unread)} × the header cannot be read, so nothing is compared with it: {rows_text(unread)}")
    if burned:
        says.append(f"{len(burned)} × text is burned into the picture, says its header: {rows_text(burned)}")
    words = [
        f"{title}: {', '.join(sorted(term for term, n in counter.items() if n >= site.minimum)) or 'none often enough'}"
        for title, counter in (("modalities", modality), ("photometric", photometric))
    ]
    remedy = "look at the pictures: a name in them is a name that the model sees" if burned else ""
    return Finding("WARN" if burned or unread else "PASS", tuple(says), remedy, Shared(words=tuple(words)))


def _term(look: Look, keyword: str, public: Iterable[str]) -> str:
    if look.kind == "picture":
        return _PICTURE
    if look.kind == "unreadable" or not look.header:
        return _UNREAD
    return known(look.header.get(keyword, "").upper(), frozenset(public))


def duplicates(site: SiteUnderCheck) -> Finding:
    """Files of equal content: again for one patient, or for two."""
    groups = _groups(site, lambda look: look.content)
    again = [look.row for some in groups for look in some[1:] if len({x.record.patient for x in some}) == 1]
    two = [look.row for some in groups for look in some if len({x.record.patient for x in some}) > 1]
    says: list[str] = []
    level: Level = "PASS"
    if again:
        says.append(f"{len(again)} images are there again, of the same patient: {rows_text(sorted(again))}")
        level = "WARN"
    if two:
        says.append(f"{len(two)} images have the content of another patient's: {rows_text(sorted(two))}")
        level = "FAIL"
    share = Shared(
        counts=(Counts("again for the same patient", len(again)), Counts("content of another patient's", len(two)))
    )
    remedy = {
        "PASS": "",
        "WARN": "an image that is there twice counts twice in its patient's mean; remove one",
        "FAIL": "one person may be two patients here, whom the budget protects half: correct the patients, or remove",
    }[level]
    return Finding(level, tuple(says) or ("no two files are equal",), remedy, share)


def leakage(site: SiteUnderCheck) -> Finding:
    """What ties images of both splits, or of two patients, to one person: content, study, object, header's patient."""
    says: list[str] = []
    rows: set[int] = set()
    ties: dict[str, Callable[[Look], object]] = {
        "content": lambda look: look.content,
        "SOPInstanceUID": lambda look: look.header.get("SOPInstanceUID"),
        "StudyInstanceUID": lambda look: look.header.get("StudyInstanceUID"),
        "PatientID of the header": _person,
    }
    for name, tie in ties.items():
        groups = _groups(site, tie)
        split = [some for some in groups if len({look.record.split for look in some}) > 1]
        people = [some for some in groups if len({look.record.patient for look in some}) > 1 and some not in split]
        for what, found in (("both splits", split), ("two patients of one split", people)):
            here = sorted(look.row for some in found for look in some)
            # Equal files of two patients are told by their own check.
            if here and not (name == "content" and what != "both splits"):
                says.append(f"{len(here)} images of {what} share their {name}: {rows_text(here)}")
                rows.update(here)
    splits = Counter(record.split for record in site.records)
    share = Shared(counts=(Counts("images tied across splits or patients", len(rows)),))
    if says:
        remedy = "put all images of one person under one patient, and so into one split: `clinifed data index`"
        return Finding("FAIL", tuple(says), remedy, share)
    told = ", ".join(f"{count} images {name}" for name, count in sorted(splits.items()))
    return Finding("PASS", (f"nothing ties images across splits or patients ({told})",), "", share)


def _person(look: Look) -> object:
    number = " ".join(look.header.get("PatientID", "").split()).upper()
    issuer = " ".join(look.header.get("IssuerOfPatientID", "").split()).upper()
    return (issuer, number) if number else None


def _groups(site: SiteUnderCheck, tie: Callable[[Look], object]) -> list[list[Look]]:
    """Images that share something, in groups of two and more."""
    groups: dict[object, list[Look]] = defaultdict(list)
    for look in site.looks:
        if (value := tie(look)) is not None:
            groups[value].append(look)
    return [some for some in groups.values() if len(some) > 1]
