"""Encoding many documents at once gives what encoding them one by one gives."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iml.data.corpus.encoding import encode_documents, encode_flat_documents
from megatron_iml.data.corpus.tokenizer import Tokenizer

# Sources that end in words, blanks and line breaks (encoded jointly), and none at all.
SOURCES = st.sampled_from(
    ["What is 3 + 4?\nAnswer:", "Blank line\n", "a\n \n", "tab\t", "blanks   ", "", "  "]
)
TARGETS = st.lists(st.sampled_from(["7", "\nwell", "one two ", "\n\nyes", "b"]), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(examples=st.lists(st.tuples(SOURCES, TARGETS), min_size=1, max_size=6))
def test_flat_documents_are_the_documents(
    tokenizer: Tokenizer, examples: list[tuple[str, list[str]]]
) -> None:
    flat = encode_flat_documents(tokenizer, examples)
    documents = [document for group in encode_documents(tokenizer, examples) for document in group]
    sequences = [sequence.tolist() for document in documents for sequence in document.sequences]
    assert flat.ids_T.tolist() == [i for sequence in sequences for i in sequence]
    assert flat.sizes_S.tolist() == [len(sequence) for sequence in sequences]
    assert flat.counts_D.tolist() == [len(document.sequences) for document in documents]
    assert flat.target_tokens == sum(len(target) for document in documents for target in document.targets)
