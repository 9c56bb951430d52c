"""A tokenizer with another vocabulary is refused when it is loaded; a prompt with an unknown word when it is used."""

import json
import shutil
from pathlib import Path

import pytest

import clinifed.models
from clinifed.config import Federation
from clinifed.errors import ModelError
from clinifed.jobs.recipe import build_contract
from clinifed.models.backbone import load_backbone
from clinifed.models.model_files import ModelFiles
from clinifed.models.tokenizer import load_tokenizer, prompt_problems

TINY = Path(clinifed.models.__file__).parent / "tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model")


def test_a_vocabulary_that_was_not_found_is_refused(folder: Path) -> None:
    """transformers makes do with the five special tokens, and says nothing."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink()
    with pytest.raises(ModelError, match="could not be loaded: its tokenizer"):
        load_backbone(f"local-dir:{folder}")


@pytest.mark.parametrize("size", [108, 30_522])
def test_a_vocabulary_of_another_size_than_the_text_towers_is_refused(size: int, folder: Path) -> None:
    config = folder / "text" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": size}))
    with pytest.raises(ModelError, match=f"knows 109 tokens, its text tower {size}"):
        load_tokenizer(ModelFiles("other", folder))


def test_a_text_tower_without_a_vocabulary_is_refused(folder: Path) -> None:
    (folder / "text" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="says no vocab_size"):
        load_tokenizer(ModelFiles("other", folder))


def test_every_unknown_word_of_every_prompt_is_named() -> None:
    tokenizer = load_backbone("tiny").tokenizer
    assert prompt_problems(tokenizer, ["a photo of skin"]) == []
    problems = prompt_problems(tokenizer, ["a photo of skin", "a (red) lesion", "лёгкие"])
    assert len(problems) == 2
    assert "'a (red) lesion': the tokenizer knows no '(red)' ([UNK])" in problems[0]
    assert "'лёгкие'" in problems[1]


def test_no_contract_is_built_with_a_prompt_of_unknown_words() -> None:
    labels = {"benign": ["a photo (benign)"], "malignant": ["malignant melanoma"]}
    federation = Federation.model_validate(
        {
            "name": "unit",
            "rounds": 1,
            "min_clients": 1,
            "max_clients": 1,
            "aggregation": {"quorum": 1, "round_timeout_s": 60},
            "specialties": {"dermatology": {"modality": "photograph", "labels": labels}},
            "data": {"synthesize": {}},
            "sites": {"alder": {"specialties": ["dermatology"]}},
        }
    )
    with pytest.raises(ModelError, match=r"prompt 'a photo \(benign\)': the tokenizer knows no '\(benign\)'"):
        build_contract(federation, load_backbone("tiny"))
