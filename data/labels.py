"""What the text of a table or a header means as a label: a site's own values, a mapping file, synonyms."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import yaml
from pydicom.datadict import tag_for_keyword

from clinifed.config import SEPARATOR, FolderIndex
from clinifed.data.tables import TABLES, read_table
from clinifed.errors import ConfigError, DataError

__all__ = ["SYNONYMS", "Meanings", "read_mapping", "spelling", "tag_of"]

# Specialty → label of clinifed's own SPECIALTIES → other words for it. Left out is what is read either way: actinic
# keratosis (AKIEC of HAM10000) is a precancer to some and a carcinoma in situ to others.
SYNONYMS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "radiology": {
        "normal": (
            "no finding",
            "no findings",
            "no abnormality",
            "no acute disease",
            "unremarkable",
            "NAD",
            "unauffällig",
        ),
        "abnormal": (
            "opacity",
            "lung opacity",
            "pneumonia",
            "consolidation",
            "infiltrate",
            "infiltration",
            "auffällig",
        ),
    },
    "dermatology": {
        "benign": (
            *("NV", "nevus", "naevus", "melanocytic nevus", "melanocytic naevus", "BKL", "benign keratosis"),
            *("seborrheic keratosis", "seborrhoeic keratosis", "DF", "dermatofibroma", "VASC", "vascular lesion"),
            *("bénin", "benigno", "gutartig"),
        ),
        "malignant": (
            *("MEL", "melanoma", "malignant melanoma", "mélanome", "melanom", "BCC", "basal cell carcinoma"),
            *("SCC", "squamous cell carcinoma", "malin", "maligno", "bösartig"),
        ),
    },
    "emergency": {
        "superficial": ("first degree", "1st degree", "epidermal", "grade 1"),
        "partial": ("partial thickness", "second degree", "2nd degree", "grade 2"),
        "deep": ("full thickness", "third degree", "3rd degree", "grade 3"),
    },
    "cardiology": {
        "normal": ("normal ventricle", "unremarkable"),
        "dilated": ("dilated ventricle", "dilatation", "dilated cardiomyopathy", "DCM", "LV dilatation"),
    },
    "pathology": {
        "absent": ("no platelets", "platelets absent", "negative"),
        "present": ("platelets", "platelets present", "positive"),
    },
}

_UNKNOWN = "label has no meaning in `values`, `mapping` or `synonyms`"


def spelling(text: str) -> str:
    """One spelling of a word: case, accents and blanks do not make another label."""
    # The Unicode Standard, D146: decomposing may make capitals, and casefolding what decomposes.
    plain = unicodedata.normalize("NFD", text).casefold()
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", plain).casefold())
    return " ".join("".join(c for c in plain if not unicodedata.combining(c)).split())


def tag_of(text: str) -> int:
    """The tag of a DICOM keyword (``StudyDescription``), or of ``0008,1030``, with or without brackets.

    Raises:
        ConfigError: it is neither.
    """
    digits = re.fullmatch(r"\(?([0-9A-Fa-f]{4}),\s*([0-9A-Fa-f]{4})\)?", text.strip())
    tag = int(digits[1] + digits[2], 16) if digits else tag_for_keyword(text.strip() or "none")
    if tag is None:
        raise ConfigError(f"label_tag: {text!r} is neither a DICOM keyword nor a tag like 0008,1030")
    return tag


def read_mapping(path: Path) -> dict[str, dict[str, str]]:
    """Specialty → value → label, from YAML of that form or a table with the columns specialty, value, label.

    Raises:
        DataError: it cannot be read, or one value means two labels. The text quotes no value.
    """
    meaning: dict[str, dict[str, str]] = defaultdict(dict)
    entries = _of_yaml(path) if path.suffix.lower() in (".yaml", ".yml") else _of_table(path)
    for number, (specialty, value, label) in enumerate(entries, start=1):
        if meaning[specialty].setdefault(value, label) != label:
            raise DataError(f"{path}: entry {number}: the value means another label already; keep one of the two")
    return dict(meaning)


def _of_table(path: Path) -> Iterator[tuple[str, str, str]]:
    if path.suffix.lower() not in TABLES:
        raise DataError(f"{path}: a mapping ends in one of .yaml, .yml, {', '.join(TABLES)}")
    table, columns = read_table(path), ["specialty", "value", "label"]
    if missing := [name for name in columns if name not in table.columns]:
        raise DataError(f"{path}: missing column {', '.join(missing)}")
    yield from table[columns].itertuples(index=False, name=None)


def _of_yaml(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # YAML's own text quotes the file
        raise DataError(f"{path}: the mapping cannot be read ({type(error).__name__})") from None
    if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
        raise DataError(f"{path}: a mapping is specialty: {{value: label}}")
    for specialty, part in content.items():
        for value, label in part.items():
            # YAML reads a bare `no` as false and 01 as 1; what was meant is anybody's guess.
            if not isinstance(value, str) or not isinstance(label, str):
                raise DataError(f"{path}: a value or label is not a text; put it in quotes")
            yield str(specialty), value, label


class Meanings:
    """From a site's words to labels, as its index says.

    ``values`` and the ``mapping`` file hold words exactly as they stand, and come first. The labels themselves, their
    ``synonyms`` and, where they were asked for, the built-in ones are compared by :func:`spelling`; what a site says
    itself goes before what is built in.

    Raises:
        ConfigError: two settings give one word two meanings, or a label is read from a tag without any meanings: then
            whatever stands in headers would enter the manifest.
        DataError: the mapping file cannot be used.
    """

    def __init__(self, index: FolderIndex) -> None:
        self._exact: dict[str, dict[str, str]] = {name: dict(words) for name, words in index.values.items()}
        for name, words in (read_mapping(index.mapping) if index.mapping else {}).items():
            mine = self._exact.setdefault(name, {})
            if any(mine.get(word, label) != label for word, label in words.items()):
                raise ConfigError(f"mapping: a value of {name} means another label under `values`; keep one of the two")
            mine.update(words)
        built_in = SYNONYMS if index.builtin_synonyms else {}
        self._spelt: dict[str, dict[str, str]] = {}
        for name in {*index.synonyms, *built_in, *self._exact}:
            labels = {label for text in self._exact.get(name, {}).values() for label in text.split(SEPARATOR) if label}
            said = set(_spellings(index.synonyms.get(name, {}))) | {(spelling(label), label) for label in labels}
            if len(said) > len(dict(said)):
                raise ConfigError(f"synonyms: one spelling means two labels of {name}; keep one of the two")
            self._spelt[name] = {**dict(_spellings(built_in.get(name, {}))), **dict(said)}
        if index.label_tag is not None and not self._spelt:
            raise ConfigError("label_tag: say what its values mean, under `values`, `mapping` or `synonyms`")

    def of(self, specialty: str, text: str) -> str:
        """The label that ``text`` means; of several joined by ``|``, each one's, none twice.

        A specialty without any meanings takes the text as it stands.

        Raises:
            DataError: a word has no meaning; the reason does not quote it.
        """
        if specialty not in self._spelt:
            return text
        whole = self._word(specialty, text)
        meant = [whole] if whole is not None else [self._word(specialty, part) for part in text.split(SEPARATOR)]
        if any(label is None for label in meant):
            raise DataError(_UNKNOWN)
        return SEPARATOR.join(dict.fromkeys(label for label in meant if label))

    def of_tag(self, specialty: str, text: str) -> str:
        r"""The same for the text of a DICOM element, whose values are joined by ``\`` (PS3.5 6.4).

        Raises:
            DataError: a word has no meaning, and so have all words of a specialty that was given none.
        """
        if specialty not in self._spelt:
            raise DataError(_UNKNOWN)
        return self.of(specialty, text.replace("\\", SEPARATOR))

    def _word(self, specialty: str, word: str) -> str | None:
        exact = self._exact.get(specialty, {}).get(word)
        return self._spelt[specialty].get(spelling(word)) if exact is None else exact


def _spellings(words: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, str]]:
    """(spelling, label) for each label and each other word for it."""
    for label, others in words.items():
        yield from ((spelling(word), label) for word in (label, *others))
