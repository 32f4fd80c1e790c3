import pytest

pytest.importorskip("bm25s")
from datasets import Dataset

from trl.environment.tools import DocumentSearchTool

TEXTS = ["The cat sat on the mat.", "A dog runs in the park. The park is green.", "Paris is the capital of France."]


@pytest.mark.parametrize("rows", [TEXTS, [{"text": text} for text in TEXTS], Dataset.from_dict({"text": TEXTS})])
def test_finds_the_passage_with_the_words(rows):
    search = DocumentSearchTool(rows)
    assert search("What is the capital of France?") == TEXTS[2]
    assert search("PARK") == TEXTS[1]
    assert search("zebra") == search("") == search("the") == "Nothing found."


def test_best_first_and_no_more_than_asked():
    search = DocumentSearchTool(TEXTS, results=2)
    assert search("park dog cat") == f"{TEXTS[1]}\n\n{TEXTS[0]}"
    assert search("Paris") == TEXTS[2]
    (first, high), (second, low) = search.search("park dog cat", results=9)
    assert (first, second) == (TEXTS[1], TEXTS[0])
    assert high > low > 0


def test_reads_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("alpha beta", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"gamma \xff delta")
    (tmp_path / "c.bin").write_text("epsilon")
    search = DocumentSearchTool(tmp_path)
    assert search("beta") == "alpha beta"
    assert search("gamma") == "gamma � delta"
    assert search("epsilon") == "Nothing found."
    assert DocumentSearchTool(str(tmp_path), patterns=("*.bin",))("epsilon") == "epsilon"


def test_long_documents_are_cut_between_words():
    words = [f"word{i}" for i in range(100)]
    search = DocumentSearchTool([" ".join(words)], passage_length=50)
    assert " ".join(search.passages) == " ".join(words)
    assert max(map(len, search.passages)) <= 50 + len("word99")
    assert "word57" in search("word57").split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents": "/nowhere"}, "documents='/nowhere': not a folder"),
        ({"documents": []}, "no text in them"),
        ({"documents": [{"title": "x"}]}, r"text_field='text': not in documents\[0\]; it has \['title'\]"),
        ({"documents": TEXTS, "results": 0}, "results=0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DocumentSearchTool(**arguments)
