"""How an instruction and its answer are joined: OPT-IML's delimiters and metaseq's handling of blanks.

What enters: the source and targets of an `Example`. What leaves: the `src` and `tgt` of a bench row.

    "Is it day? "   ->  "Is it day?\\nAnswer:"     one of eight delimiters, chosen by seed, task and id
    "Q: hi\\nA:"     ->  "Q: hi\\nA:"               ends with ":", so nothing is added
    ""              ->  ""                        pretraining text: everything is target
    " Yes \\n"       ->  "Yes"                     the joining space is added when the row is tokenised

The delimiters are those of the paper's footnote 5; its last one is printed as `"\\output:"`, read here as
`"\\noutput:"`. metaseq cuts spaces, but not newlines, from the end of a source, and all blanks from the
end of a target.
"""

from hashlib import blake2b

DELIMITERS = (
    "\nAnswer:",
    " Answer:",
    "\nA:",
    " A:",
    "\nOutput:",
    " Output:",
    "\nanswer:",
    "\noutput:",
)


def choose_delimiter(seed: int, task: str, example_id: str) -> str:
    """One of `DELIMITERS`, uniformly, as a pure function of its arguments."""
    # `person` keeps this draw independent of the one that picks held-out instances from the same key.
    digest = blake2b(f"{seed}\0{task}\0{example_id}".encode(), digest_size=8, person=b"delimiter").digest()
    return DELIMITERS[int.from_bytes(digest, "little") % len(DELIMITERS)]


def with_delimiter(source: str, seed: int, task: str, example_id: str) -> str:
    """The `src` of a row: without trailing spaces, and with a delimiter unless blank or ending with ":"."""
    source = source.rstrip(" ")
    # The paper adds no delimiter there: the source asks for its answer by itself.
    if source.endswith(":"):
        return source
    # A delimiter alone would make pretraining text the answer to nothing.
    if not source.strip():
        return ""
    return source + choose_delimiter(seed, task, example_id)


def clean_target(target: str) -> str:
    """The `tgt` of a row: no blanks at the end, no spaces at the start; may be empty."""
    # A space at the start would stand beside the one that joins; a newline there is part of the answer.
    return target.rstrip().lstrip(" ")
