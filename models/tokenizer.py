"""The tokenizer of a model, from data alone, and whether it knows the words that it is asked for.

transformers takes a tokenizer whose vocabulary it did not find for one of five words, and says nothing: every prompt
then means the same. So the vocabulary is counted when it is loaded, and a prompt with an unknown word is refused.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from clinifed.errors import ModelError
from clinifed.models.model_files import TEXT_CONFIG, ModelFiles

__all__ = ["Tokenizer", "load_tokenizer", "prompt_problems", "unknown_words"]

Tokenizer = Callable[[Sequence[str]], Tensor]  # N texts → (N, L) int64, padded


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer in a model's directory.

    A model's ``tokenizer_kwargs`` reach transformers, and with ``trust_remote_code`` among them the model's own
    Python would run. What the caller says wins over them.

    Raises:
        ModelError: it cannot be loaded, or its vocabulary is not as large as the text tower's.
    """
    import open_clip
    from transformers import dynamic_module_utils

    # transformers would ask on the terminal whether to run a model's own code, for so many seconds; the answer is no.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    of_transformers = bool(files.text_cfg().get("hf_tokenizer_name"))  # open_clip's own run no model's code
    try:
        found: Tokenizer = open_clip.get_tokenizer(
            f"local-dir:{files.root}", **({"trust_remote_code": False} if of_transformers else {})
        )
    except Exception as error:  # transformers, tokenizers and open_clip each raise their own kinds
        raise ModelError(f"{files.ref} could not be loaded: its tokenizer ({type(error).__name__}: {error})") from error
    inner: Any = getattr(found, "tokenizer", None)
    if inner is not None and (files.root / TEXT_CONFIG).is_file():
        wanted = _vocabulary(files)
        if len(inner) != wanted:
            raise ModelError(
                f"{files.ref} could not be loaded: its tokenizer knows {len(inner)} tokens, its text tower {wanted} "
                f"({TEXT_CONFIG}: vocab_size); put the tokenizer's own files (tokenizer.json, vocab.txt) beside "
                "the weights"
            )
    return found


def _vocabulary(files: ModelFiles) -> int:
    try:
        return int(json.loads((files.root / TEXT_CONFIG).read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{files.ref} could not be loaded: {TEXT_CONFIG} says no vocab_size ({type(error).__name__}: {error})"
        ) from error


def unknown_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of ``text``, split at blanks, for which the tokenizer has only its unknown token."""
    inner: Any = getattr(tokenizer, "tokenizer", None)
    unknown = getattr(inner, "unk_token_id", None)
    if unknown is None:  # a tokenizer of bytes knows every word
        return []
    if not (tokenizer([text]) == unknown).any():
        return []
    return [word for word in text.split() if (tokenizer([word]) == unknown).any()] or [text]


def prompt_problems(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """One sentence for each prompt that has a word the tokenizer does not know."""
    problems = []
    for text in texts:
        if words := unknown_words(tokenizer, text):
            unknown: Any = getattr(tokenizer, "tokenizer", None)
            problems.append(
                f"prompt {text!r}: the tokenizer knows no {', '.join(map(repr, words))} ({unknown.unk_token}); "
                "word the prompt otherwise"
            )
    return problems
