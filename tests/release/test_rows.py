"""What the model in the box is trained and tuned on: stories left out, titles made, questions without an answer."""

import json
import lzma

import pytest

STORY = "Once upon a time a fox named Rufus met a hen. The hen was afraid. Rufus sat by the river, and the hen sat too."


@pytest.fixture
def questions(tmp_path):
    """A file of FairytaleQA's form with two stories."""
    rows = [
        {"story": "the-fox", "text": STORY, "question": "Who met a hen?", "answers": ["the fox"], "explicit": True},
        {
            "story": "the-ship",
            "text": "A ship sailed. It sank.",
            "question": "What sank?",
            "answers": ["a ship"],
            "explicit": True,
        },
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_title_names_who_and_what_a_story_is_about():
    from rows import title_of

    text = "Tom saw a ball. The ball was red. One day Tom took the ball, and Tom ran. So Tom hid the ball."
    assert title_of(text) == "Tom and the ball"
    assert title_of("Nothing happened here.") is None


def test_a_question_behind_another_story_has_no_answer_there(questions):
    from rows import NOT_THERE, unanswerable_rows

    [first, second] = unanswerable_rows(questions, frozenset(), 2, seed=0)
    for row in (first, second):
        [user, assistant] = row["messages"]
        assert assistant["content"] == NOT_THERE
        passage, question = user["content"].split("\n\n")
        assert ("fox" in passage) == ("sank" in question)


def test_the_base_reads_no_story_that_is_asked_about(tmp_path):
    from texts import base_records

    asked = {"story": "the-fox", "text": STORY, "question": "Who met a hen?", "answers": ["the fox"], "explicit": True}
    kept = {"src": "tinystories", "id": "1", "text": "A dog ran. It was happy."}
    copy = {"src": "gutenberg", "id": "Tales.txt#3", "text": f"Chapter 3.\n\n{STORY.upper()}"}
    named = {"src": "fairytaleqa", "id": "x/the-fox-story.csv", "text": "The Fox\n\nIn other words."}
    for name, rows in {
        "questions/fairytaleqa-valid": [asked],
        "text-small/train": [kept, named],
        "text-large/train-00": [copy, kept],
    }.items():
        path = tmp_path / f"{name}.jsonl.xz"
        path.parent.mkdir(exist_ok=True)
        with lzma.open(path, "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    left_out = {}
    assert list(base_records(tmp_path, shards=1, repeats=2, left_out=left_out)) == [kept, kept, kept]
    assert left_out == {"the-fox": ["fairytaleqa: x/the-fox-story.csv", "gutenberg: Tales.txt#3"]}
