"""Text without a source (pretraining, dialogues), and instruction rows."""

import pytest
from readers import Reading, write_files

from megatron_iml.data.sources import dialogues, instruction_rows, pretraining_text
from megatron_iml.data.sources.pretraining_text import pieces


def test_pretraining_documents_are_all_target(tmp_path):
    folder = tmp_path / "replay"
    long = "x" * 30 + " " + "y" * 30
    rows = [{"text": "A page."}, {"text": " "}, {"text": long}, {"other": "z"}, {"text": "v" * 40 + "\n\n"}]
    found = Reading(pretraining_text.read, write_files(folder, {"00.jsonl": rows}), piece_characters=40)
    assert (found.tasks["replay"].benchmark, found.tasks["replay"].category) == ("Pretraining", "Pretraining")
    examples = found.examples("replay")
    assert {example.source for example in examples} == {""}
    assert [example.targets[0] for example in examples] == ["A page.", "x" * 30, "y" * 30, "v" * 40]
    assert examples[1].instance == examples[2].instance == "00-3"
    assert found.counts("replay").dropped == {"no text in text": 2}
    assert found.counts("replay").repaired == {"piece of a long document": 1}


def test_pieces_end_at_paragraphs_then_lines_then_blanks():
    assert list(pieces("aaaa\nbb\n\nccc ddd", 12)) == ["aaaa\nbb", "ccc ddd"]
    assert list(pieces("aaaa bbbb\ncccc", 12)) == ["aaaa bbbb", "cccc"]
    assert list(pieces("aaaa bbbb cccc", 12)) == ["aaaa bbbb", "cccc"]
    assert list(pieces("a" * 25, 12)) == ["a" * 12, "a" * 12, "a"]
    assert list(pieces("", 12)) == [""]
    # A piece of one word would be a poor document.
    assert list(pieces("a " + "b" * 18, 12)) == ["a " + "b" * 10, "b" * 8]
    text = " ".join(f"word{i}" for i in range(999))
    cut = list(pieces(text, 100))
    assert " ".join(cut) == text and max(map(len, cut)) <= 100


def test_dialogues_of_listed_turns(tmp_path):
    rows = [
        {"dialog": [{"speaker": "0", "text": "Hi! "}, {"text": "Hello."}]},
        {"turns": ["One.", "", "Two."]},
        {"utterances": ["alone"]},
        {"text": "none"},
    ]
    found = Reading(dialogues.read, write_files(tmp_path / "wow", {"train.json": rows}))
    examples = found.examples("wow")
    assert [(e.source, e.targets) for e in examples] == [("", ("Hi!\nHello.",)), ("", ("One.\nTwo.",))]
    assert found.counts("wow").dropped == {"fewer than two turns": 2}


def test_dialogues_of_parlais_lines(tmp_path):
    text = "1 your persona: I ski.\n2 Hi!\tHello.\t\tHi|Hello\n3 How are you?\tFine.\n1 Next.\tYes.\n\n"
    found = Reading(dialogues.read, write_files(tmp_path / "convai2", {"train.txt": text}))
    assert [e.targets[0] for e in found.examples("convai2")] == [
        "Hi!\nHello.\nHow are you?\nFine.",
        "Next.\nYes.",
    ]
    broken = Reading(dialogues.read, write_files(tmp_path / "b", {"train.txt": "1 a\tb\nHi\n"}))
    with pytest.raises(ValueError, match="train.txt:2: no number before the text"):
        broken.examples("b")


def test_instruction_rows(tmp_path):
    rows = [
        {"instruction": "Translate.", "input": "Hello.", "output": "Bonjour."},
        {"id": "s", "instruction": "Add.", "instances": [{"input": "", "output": 2}, {"output": "x"}, 3]},
        {"instruction": "", "output": "x"},
    ]
    found = Reading(instruction_rows.read, write_files(tmp_path, {"alpaca.json": rows, "b.jsonl": ""}))
    assert [(e.source, e.targets) for e in found.examples("alpaca")] == [
        ("Translate.\nHello.", ("Bonjour.",)),
        ("Add.", ("2",)),
        ("Add.", ("x",)),
    ]
    assert found.counts("alpaca").dropped == {
        "instance is not an object": 1,
        "no instruction or no output": 1,
    }
    assert found.drops.skipped_files == {"b.jsonl": "empty file"}
