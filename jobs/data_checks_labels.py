"""Checks of labels and patients: is there enough of each class, in words that everybody shares?"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from statistics import median

from clinifed.config import SEPARATOR
from clinifed.data.manifest import Record
from clinifed.jobs.data_checks_share import Counts, Shared
from clinifed.jobs.data_checks_site import Finding, Level, SiteUnderCheck, rows_text
from clinifed.privacy.objectives import encode_labels

__all__ = ["label_support", "patient_bags", "patients_by_class"]

_MANY = 50  # images of one patient


def patients_by_class(site: SiteUnderCheck, split: str = "train") -> dict[str, dict[str, set[str]]]:
    """Specialty → label → patients of ``split``: of the specialties that the site is to train, and known labels."""
    found = {name: {label: set[str]() for label in site.vocabulary[name].labels} for name in site.wanted}
    for record in site.records:
        if record.split == split and record.specialty in found:
            for label in record.label.split(SEPARATOR):
                if label in found[record.specialty]:
                    found[record.specialty][label].add(record.patient)
    return found


def label_support(site: SiteUnderCheck) -> Finding:
    """Patients to train on, of each class of each specialty; labels and specialties without a meaning."""
    support = patients_by_class(site)
    unknown: dict[str, list[int]] = defaultdict(list)
    for row, record in enumerate(site.records, start=2):
        if record.specialty not in site.vocabulary:
            unknown["a specialty that is not known"].append(row)
        elif record.specialty not in site.wanted:
            unknown["a specialty that this site does not train"].append(row)
        elif what := _trouble(site, record):
            unknown[what].append(row)
    says = [
        f"{name}: {', '.join(f'{len(who)} patients {label}' for label, who in classes.items())}"
        for name, classes in support.items()
    ]
    says += [f"{len(rows)} images have {what}: {rows_text(rows)}" for what, rows in sorted(unknown.items())]
    empty = [name for name, classes in support.items() if not any(classes.values())]
    few = [
        f"{label} of {name}" for name, classes in support.items() for label, who in classes.items()
        if len(who) < site.minimum
    ]  # fmt: skip
    level: Level = "PASS"
    if unknown or few:
        level = "WARN"
    if not support or empty or _refused(site, unknown):
        level = "FAIL"
    says += [f"{name}: nothing to train on" for name in empty] or ([] if support else ["no specialty to train"])
    remedies = []
    if unknown:
        remedies.append("give the table's values a meaning (`values` of the index), or define the specialty")
    if few:
        remedies.append(f"fewer than {site.minimum} patients of a class teach little: {', '.join(few)}")
    return Finding(level, tuple(says), "; ".join(remedies), Shared(counts=(_tree(site, support),)))


def _refused(site: SiteUnderCheck, unknown: Mapping[str, object]) -> bool:
    """Whether training would not begin."""
    labels = {what for what in unknown if "specialty" not in what}
    return bool(labels - {"no label"}) or (bool(labels) and site.objective is not None)


def _trouble(site: SiteUnderCheck, record: Record) -> str | None:
    """Why training would refuse the label; where nobody names the objective, any number of known labels will do."""
    labels = list(site.vocabulary[record.specialty].labels)
    nothing, strange = "no label", f"a label that is none of {record.specialty}'s"
    if site.objective is None:
        named = record.label.split(SEPARATOR) if record.label.strip() else []
        return nothing if not named else None if set(named) <= set(labels) else strange
    try:
        encode_labels(site.objective, labels, record.label)
    except KeyError:
        parts = set(record.label.split(SEPARATOR))
        if len(parts) > 1 and parts <= set(labels):
            return "several labels, where the objective takes one"
        return nothing if not record.label.strip() else strange
    return None


def _tree(site: SiteUnderCheck, support: dict[str, dict[str, set[str]]]) -> Counts:
    """Patients to train on, by specialty and class: public terms alone."""
    parts = tuple(
        Counts(
            name,
            len(set[str]().union(*classes.values())),
            tuple(Counts(label, len(who)) for label, who in classes.items()),
        )
        for name, classes in support.items()
    )
    everybody = set[str]().union(*(who for classes in support.values() for who in classes.values()))
    return Counts("patients to train on", len(everybody), parts)


def patient_bags(site: SiteUnderCheck) -> Finding:
    """Patients of each split, and how many images a patient has."""
    says: list[str] = []
    levels: list[Level] = []
    counts = Counter(record.patient for record in site.records)
    for split in ("train", "holdout"):
        bags = Counter(record.patient for record in site.records if record.split == split)
        if bags:
            sizes = sorted(bags.values())
            says.append(
                f"{split}: {len(bags)} patients, images of each {sizes[0]}–{sizes[-1]}, median {median(sizes):g}"
            )
        elif split == "train":
            says.append("train: no patient")
            levels.append("FAIL")
    heavy = sum(size > _MANY for size in counts.values())
    if heavy:
        says.append(f"{heavy} patients have more than {_MANY} images; each counts as one patient all the same")
        levels.append("WARN")
    level: Level = "FAIL" if "FAIL" in levels else "WARN" if levels else "PASS"
    remedy = "see that these patients are not several, or nobody's number" if heavy else ""
    remedy = "give patients to the split train" if level == "FAIL" else remedy
    # Neither least nor most: each is one patient's own.
    share = Shared(counts=(Counts("images of a patient, median", int(median(counts.values()))),))
    return Finding(level, tuple(says), remedy, share)
