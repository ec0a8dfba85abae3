"""Byte-level BPE as OPT uses it: text enters, token ids leave, and back.

    Tokenizer.load(Path("opt-tokenizer")).encode("Hello world")  ->  [31414, 232]      (OPT's own vocabulary)

No BOS, no added prefix space, and no text is ever parsed as a special token: "</s>" in a text is the three
tokens "</", "s", ">", so data cannot forge a document's end. Two encoders give the same ids: `gigatoken`, 40
to 80 times faster, and `tokenizers`, the reference, which also decodes. `verify` compares them on a sample.

Suffixes: T tokens of all texts, N texts.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import gigatoken
import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

from megatron_iml.data.text_files import json_object

Backend = Literal["gigatoken", "tokenizers"]
Ids = NDArray[np.int32]

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0..3, OPT's order
# The embedding is a multiple of 8 rows, as in OPT (50,265 entries, 50,272 rows).
VOCAB_MULTIPLE = 8
# gigatoken remembers every word it has met, some 50 bytes each, and forgets none: it is made anew, in a tenth
# of a second, after this many characters.
RENEWAL_CHARACTERS = 1 << 28
FILE_NAMES = (("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"))
# What byte-level BPE implementations have disagreed on: separators, control characters, literal specials.
NASTY_TEXTS = (
    "",
    " ",
    "  two  spaces ",
    "\n\n\n",
    "line\r\nline\u2028line\x00\x85\t",
    "\ufeffBOM and \ufffd",
    "a</s><pad> <|endoftext|><mask>",
    "it's they'LL we've 'd",
    "e\u0301 \U0001f9d1\u200d\U0001f680 \u0661\u0662\u0663 \u4f60\u597d",
    "3.14159 1,000,000 ___ ''' \u00a0nbsp\u3000wide",
)


def find_files(folder: Path) -> tuple[Path, Path]:
    """Paths of vocabulary and merges in a folder, under the names of either convention."""
    for vocab_name, merges_name in FILE_NAMES:
        vocab, merges = folder / vocab_name, folder / merges_name
        if vocab.is_file() and merges.is_file():
            return vocab, merges
    allowed = " or ".join(" + ".join(pair) for pair in FILE_NAMES)
    raise FileNotFoundError(
        f"{folder} holds no tokenizer: expected {allowed}; "
        "point to OPT's folder or train one with tools/preprocess/train_tokenizer.py"
    )


def _check_vocabulary(vocab: Path, reference: tokenizers.ByteLevelBPETokenizer) -> None:
    found = [reference.token_to_id(token) for token in SPECIAL_TOKENS]
    expected = list(range(len(SPECIAL_TOKENS)))
    if found != expected:
        raise ValueError(
            f"{vocab}: special tokens {SPECIAL_TOKENS} have ids {found}, OPT's models need {expected}; "
            "use OPT's vocabulary or train one with tools/preprocess/train_tokenizer.py"
        )
    # Without all bytes an emoji or a tab would vanish from the text without a word.
    missing = [byte for byte in ByteLevel.alphabet() if reference.token_to_id(byte) is None]
    if missing:
        raise ValueError(
            f"{vocab}: {len(missing)} of the 256 bytes have no entry (first: {min(missing)!r}), so some "
            "texts could not be encoded; use a byte-level vocabulary"
        )


class Tokenizer:
    """An OPT tokenizer from its two files; `encode` and `encode_batch` never add or parse special tokens."""

    def __init__(self, reference: tokenizers.ByteLevelBPETokenizer, backend: Backend, sha256: str) -> None:
        self.backend: Backend = backend
        self.sha256 = sha256
        self.eos_id = SPECIAL_TOKENS.index("</s>")
        self.vocab_size: int = reference.get_vocab_size()
        self.padded_vocab_size = -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self._reference = reference
        self._fast: gigatoken.Tokenizer | None = None
        self._renew()

    def _renew(self) -> None:
        self._characters = 0
        if self.backend == "gigatoken":
            # It reads a `tokenizers.Tokenizer`; `_tokenizer` is how our ByteLevelBPETokenizer holds one.
            self._fast = gigatoken.Tokenizer(self._reference._tokenizer)

    @classmethod
    def load(cls, folder: Path, backend: Backend = "gigatoken") -> "Tokenizer":
        """Read vocab.json and merges.txt (or metaseq's gpt2-vocab.json and gpt2-merges.txt) of `folder`.

        Raises FileNotFoundError when they are missing, ValueError for special tokens at other ids than OPT's.
        """
        vocab, merges = find_files(folder)
        # Of both files: equal vocabularies with other merges give other ids.
        digest = hashlib.sha256(vocab.read_bytes() + merges.read_bytes()).hexdigest()
        # Parsed here first: tokenizers says of a broken file no more than a bare Exception.
        json_object(vocab)
        # No prefix space, as OPT-IML's trainer: the first word of a text has the ids of a first word.
        reference = tokenizers.ByteLevelBPETokenizer.from_file(
            str(vocab), str(merges), add_prefix_space=False
        )
        _check_vocabulary(vocab, reference)
        return cls(reference, backend, digest)

    def encode(self, text: str) -> Ids:
        """Return the ids of one text, int32 [length]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of every text, int32 [length] each (views of one array)."""
        ids_T, offsets = self.encode_flat(texts)
        bounds = offsets.tolist()
        return [ids_T[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        """Return all ids end to end, int32 [T], and offsets [N+1]; text n: ids_T[offsets[n]:offsets[n+1]]."""
        if self._fast is None:
            return self._encode_flat_reference(texts)
        self._characters += sum(map(len, texts))
        if self._characters > RENEWAL_CHARACTERS:
            self._renew()
        # An awkward array: ids end to end and offsets into them, of which the first need not be 0.
        layout = self._fast.encode_batch(list(texts)).layout
        offsets = np.asarray(layout.offsets.data).astype(np.int64)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]].astype(np.int32), offsets - offsets[
            0
        ]

    def _encode_flat_reference(self, texts: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        encodings = self._reference.encode_batch(list(texts), add_special_tokens=False)
        offsets = np.zeros(len(encodings) + 1, dtype=np.int64)
        np.cumsum([len(encoding.ids) for encoding in encodings], out=offsets[1:])
        ids_T = np.fromiter((i for encoding in encodings for i in encoding.ids), np.int32, int(offsets[-1]))
        return ids_T, offsets

    def verify(self, texts: Sequence[str]) -> int:
        """Compare the fast encoder with `tokenizers` on texts and built-in nasty strings; return how many.

        Raises ValueError with the first text on which they differ.
        """
        # The nasty ones always: a bench may hold none of them in the rows sampled.
        sample = [*NASTY_TEXTS, *texts]
        ids_T, offsets = self.encode_flat(sample)
        expected_T, expected_offsets = self._encode_flat_reference(sample)
        if np.array_equal(offsets, expected_offsets) and np.array_equal(ids_T, expected_T):
            return len(sample)
        # One by one, to name the text: somebody has to reproduce it.
        for text in sample:
            got, want = self.encode(text).tolist(), self._encode_flat_reference([text])[0].tolist()
            if got != want:
                raise ValueError(
                    f"backend {self.backend} encodes {text[:80]!r} as {got[:12]}, tokenizers as {want[:12]}; "
                    "choose the backend 'tokenizers' and report the text"
                )
        raise ValueError(
            f"backend {self.backend} differs from tokenizers in batches but not one by one; use 'tokenizers'"
        )

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Return the text of ids without special tokens; bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary (the embedding has more rows than entries).
        """
        # By id and not by text: "</s>" written out by a model is three ordinary tokens.
        kept = [int(i) for i in ids if int(i) >= len(SPECIAL_TOKENS)]
        beyond = [i for i in kept if i >= self.vocab_size]
        if beyond:
            raise ValueError(
                f"cannot decode id {beyond[0]}: the vocabulary has ids 0..{self.vocab_size - 1}; "
                "mask the padded embedding rows before choosing a token"
            )
        return str(self._reference.decode(kept))


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Learn a byte-level BPE of `vocab_size` entries and write vocab.json and merges.txt to `folder`.

    Ids 0..3 are <s>, <pad>, </s>, <unk>; the 256 bytes are always there, so any text can be encoded. The same
    texts in the same order give the same bytes. Raises ValueError below 260 entries and for too little text.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}, it must be at least {smallest}: 4 special tokens, 256 bytes"
        )
    trained = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    trained.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    # Merging ends where no pair of symbols is left that comes twice.
    if trained.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the texts only give {trained.get_vocab_size()} entries, vocab_size asks for {vocab_size}; "
            "lower it or add text"
        )
    folder.mkdir(parents=True, exist_ok=True)
    trained.save_model(str(folder))
