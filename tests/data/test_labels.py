import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinifed.config import FolderIndex
from clinifed.data.labels import SYNONYMS, Meanings, read_mapping, spelling, tag_of
from clinifed.errors import ConfigError, DataError
from clinifed.models.specialties import SPECIALTIES


def meanings(**settings):
    return Meanings(FolderIndex(folder=".", **settings))


@pytest.mark.parametrize("text", ["MEL", "mel", "  Melanoma ", "MÉLANOME", "basal\tcell  Carcinoma", "malignant"])
def test_builtin_words_are_found_whatever_case_accents_and_blanks(text):
    assert meanings(builtin_synonyms=True).of("dermatology", text) == "malignant"


def test_builtin_words_need_to_be_asked_for():
    assert meanings().of("dermatology", "MEL") == "MEL"
    with pytest.raises(DataError, match="no meaning"):
        meanings(values={"dermatology": {"m": "malignant"}}).of("dermatology", "MEL")


def test_builtin_synonyms_are_of_labels_that_exist_and_mean_one_thing():
    for name, words in SYNONYMS.items():
        assert set(words) <= set(SPECIALTIES[name].labels)
        spelt = [spelling(word) for label, others in words.items() for word in {label, *others}]
        assert len(spelt) == len(set(spelt))


def test_what_a_site_says_goes_before_what_is_built_in():
    asked = {"builtin_synonyms": True, "synonyms": {"dermatology": {"naevus or worse": ("MEL",)}}}
    assert meanings(**asked).of("dermatology", "mel") == "naevus or worse"
    assert meanings(**asked).of("dermatology", "bcc") == "malignant"


def test_values_hold_words_exactly_and_first():
    these = meanings(
        values={"radiology": {"N": "normal", "n": "abnormal"}}, synonyms={"radiology": {"normal": ("clear", "N")}}
    )
    assert [these.of("radiology", word) for word in ("N", "n", "Clear", "NORMAL")] == [
        "normal",
        "abnormal",
        "normal",
        "normal",
    ]


def test_each_of_several_labels_is_translated_and_none_stands_twice():
    these = meanings(synonyms={"radiology": {"effusion": ("fluid",), "mass": (), "": ("none",)}})
    assert these.of("radiology", "Fluid|MASS|effusion") == "effusion|mass"
    assert these.of("radiology", "None") == ""
    with pytest.raises(DataError) as caught:
        these.of("radiology", "fluid|PLANTED")
    assert "PLANTED" not in str(caught.value)


def test_the_values_of_a_tag_are_translated_or_refused_never_copied():
    these = meanings(label_tag="StudyDescription", synonyms={"radiology": {"effusion": (), "mass": ()}})
    assert these.of_tag("radiology", "Mass\\effusion") == "mass|effusion"
    for specialty, text in (("radiology", "PLANTED"), ("dermatology", "PLANTED"), ("radiology", "")):
        with pytest.raises(DataError, match="no meaning") as caught:
            these.of_tag(specialty, text)
        assert "PLANTED" not in str(caught.value)


def test_a_tag_without_any_meanings_is_refused():
    with pytest.raises(ConfigError, match="label_tag: say what its values mean"):
        meanings(label_tag="StudyDescription")


@pytest.mark.parametrize("text", ["StudyDescription", "0008,1030", "(0008, 1030)", " StudyDescription "])
def test_a_tag_is_a_keyword_or_a_number(text):
    assert tag_of(text) == 0x00081030


@pytest.mark.parametrize("text", ["", "Study Description", "0008", "0008,10301", "00081030"])
def test_anything_else_is_no_tag(text):
    with pytest.raises(ConfigError, match="neither a DICOM keyword nor a tag"):
        tag_of(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"synonyms": {"radiology": {"a": ("x",), "b": ("X ",)}}},
        {"synonyms": {"radiology": {"a": ("B",), "b": ()}}},
        {"synonyms": {"radiology": {"a": ("b",)}}, "values": {"radiology": {"1": "b"}}},
    ],
)
def test_one_spelling_of_two_labels_is_refused(settings):
    with pytest.raises(ConfigError, match="one spelling means two labels of radiology"):
        meanings(**settings)


MAPPINGS = {
    "m.yaml": 'radiology:\n  "1": abnormal\n  "no finding": normal\n',
    "m.csv": "specialty,value,label\nradiology,1,abnormal\nradiology,no finding,normal\n",
    "m.tsv": "value\tspecialty\tlabel\n1\tradiology\tabnormal\nno finding\tradiology\tnormal\n",
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_mapping_says_the_same_in_every_form(tmp_path, name):
    path = tmp_path / name
    path.write_text(MAPPINGS[name])
    assert read_mapping(path) == {"radiology": {"1": "abnormal", "no finding": "normal"}}
    these = meanings(mapping=path)
    assert (these.of("radiology", "1"), these.of("radiology", "Normal")) == ("abnormal", "normal")


def test_a_mapping_that_contradicts_the_values_is_refused(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(MAPPINGS["m.csv"])
    assert meanings(mapping=path, values={"radiology": {"1": "abnormal"}}).of("radiology", "1") == "abnormal"
    with pytest.raises(ConfigError, match="a value of radiology means another label under `values`"):
        meanings(mapping=path, values={"radiology": {"1": "normal"}})


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("m.yaml", "radiology: {no: PLANTED}\n", "not a text; put it in quotes"),
        ("m.yaml", 'radiology: {"PLANTED": 1}\n', "not a text; put it in quotes"),
        ("m.yaml", "- PLANTED\n", "specialty: {value: label}"),
        ("m.yaml", "PLANTED: normal\n", "specialty: {value: label}"),
        ("m.yaml", "radiology: {PLANTED: [\n", "cannot be read"),
        ("m.csv", "specialty,value\nradiology,PLANTED\n", "missing column label"),
        ("m.csv", "specialty,value,label\nr,PLANTED,a\nr,PLANTED,b\n", "entry 2: the value means another label"),
        ("m.doc", "PLANTED", "a mapping ends in one of"),
    ],
)
def test_a_bad_mapping_is_refused_without_quoting_it(tmp_path, name, text, told):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_mapping(path)
    assert told in str(caught.value)
    assert "PLANTED" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_mapping(tmp_path / "absent.yaml")


@settings(deadline=None)
@given(st.text())
def test_spelling_is_settled_and_blind_to_case_and_blanks(text):
    assert spelling(spelling(text)) == spelling(text)
    assert spelling(f"  {text}\n") == spelling(text)
