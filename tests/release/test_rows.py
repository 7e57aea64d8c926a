"""What the model in the box is trained and tuned on: stories left out, titles made, questions without an answer."""

import json
import re
from collections import Counter

import pytest

from tests.release.small_data import write

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
    write(tmp_path / "questions/fairytaleqa-valid.jsonl.xz", [asked])
    write(tmp_path / "text-small/train.jsonl.xz", [kept, named])
    write(tmp_path / "text-large/train-00.jsonl.xz", [copy, kept])
    left_out = {}
    assert list(base_records(tmp_path, shards=1, repeats=2, left_out=left_out)) == [kept, kept, kept]
    assert left_out == {"the-fox": ["fairytaleqa: x/the-fox-story.csv", "gutenberg: Tales.txt#3"]}


@pytest.fixture
def real_data(tmp_path):
    """Data in the form of the real ones: a story that is asked about later, one of the held-out text, and others."""
    long = " The hen sat by the river, and nobody spoke. Then the sun came up and the hen went home to her house." * 4
    fox = {"story": "the-fox", "text": STORY, "question": "Who met a hen?", "answers": ["the fox"], "explicit": True}
    rows = [
        {"story": "the-ship", "text": "A ship sailed. It sank.", "question": "What sank?", "answers": ["a ship"]},
        {"story": "the-bear", "text": "A bear lay in a cave.", "question": "Who lay in it?", "answers": ["a bear"]},
        {"story": "the-crow", "text": "A crow sang.", "question": "Who sang?", "answers": ["a crow"]},
    ]
    rows = [{**row, "explicit": True, "attribute": "action"} for row in rows]
    write(tmp_path / "questions/fairytaleqa-train.jsonl.xz", rows)
    write(tmp_path / "questions/fairytaleqa-valid.jsonl.xz", [{**fox, "attribute": "character"}])
    crow = {"src": "fairytaleqa", "id": "x/the-crow-story.csv", "text": "The crow sang, and sang again."}
    write(tmp_path / "text-small/valid.jsonl.xz", [crow])
    tale = "Tom saw a ball. The ball was red. One day Tom took the ball, and Tom ran. So Tom hid the ball."
    small = [
        {"src": "tinystories", "id": "1", "text": tale},
        {"src": "fairytaleqa", "id": "x/fox-again.csv", "text": STORY + long},
        {"src": "gutenberg", "id": "a.txt#1", "text": "It was morning." + long},
    ]
    write(tmp_path / "text-small/train.jsonl.xz", small)
    return tmp_path


def test_tuning_has_every_kind_that_is_measured_and_no_story_of_the_measurement(real_data):
    from rows import NOT_THERE, tuning_rows

    counts = {"words": 60, "instructions": 30, "hard_instructions": 6, "lists": 4, "passage_questions": 20}
    counts |= {"absent": 0.1, "readings": 2.5, "unanswerable": 2, "continuations": 5, "texts": 0.5}
    base_text = real_data / "text.jsonl"
    base_text.write_text("".join(json.dumps({"text": f"It was day {number}."}) + "\n" for number in range(4)))
    rows = tuning_rows(real_data, base_text, 0, **counts)
    texts, whole = [row["text"] for row in rows if "text" in row], rows
    assert len(texts) == 2
    assert not any(re.search(r"\b(Rufus|crow)\b", text) for text in texts)
    rows = [row for row in rows if "messages" in row]
    said = [[message["content"] for message in row["messages"]] for row in rows]
    asked, answered = map(set, zip(*said, strict=True))
    assert "A ship sailed. It sank.\n\nWhat sank?" in asked
    assert any("Tom and the ball" in one for one in asked)
    assert f" {NOT_THERE}" in answered
    assert all(re.match(r" \S", answer) for answer in answered)
    kinds = {row.get("kind", "question") for row in rows}
    assert {"question", "story", "continuation", "talk", "list", "passage", "repeat", "JSON"} <= kinds
    assert not any(re.search(r"\b(Rufus|crow)\b", text) for text in asked | answered)
    of_stories = [one for one in said if one[1] in (" a ship", " a bear") and "\n\n" in one[0]]
    assert len(of_stories) == 5  # each of two twice, and half of them again
    blind = tuning_rows(real_data, base_text, 0, **counts, blind=True)
    blind = [row["messages"] for row in blind if "messages" in row]
    assert "What sank?" in {messages[0]["content"] for messages in blind}
    assert f" {NOT_THERE}" not in {messages[1]["content"] for messages in blind}
    assert tuning_rows(real_data, base_text, 0, **counts) == whole


def test_a_share_of_the_text_is_taken_evenly(real_data):
    from texts import base_records, write_rows

    write(real_data / "text-large/train-00.jsonl.xz", [{"src": "a", "id": str(n), "text": "b"} for n in range(2000)])
    found = list(base_records(real_data, {}, shards=1, repeats=1, share=0.1))
    numbers = [int(record["id"]) for record in found if record["src"] == "a"]
    # 200 of 2,000 are expected, with a standard deviation of 13; half of them of each half
    assert 150 < len(numbers) < 250
    assert 0.35 < sum(number < 1000 for number in numbers) / len(numbers) < 0.65
    count, size = write_rows(real_data / "rows.jsonl", found)
    assert (count, size) == (len(found), (real_data / "rows.jsonl").stat().st_size)


def test_sources_of_the_large_text_are_taken_by_their_shares(real_data):
    from texts import base_records

    from fanformer.errors import ConfigError

    large = [{"src": "abc"[n % 3], "id": str(n), "text": "b"} for n in range(3000)]
    write(real_data / "text-large/train-00.jsonl.xz", large)
    found = list(base_records(real_data, {}, shards=1, repeats=1, sources={"a": 1, "b": 0.2}))
    counts = Counter(record["src"] for record in found)
    assert counts["a"] == 1000
    assert 140 < counts["b"] < 260  # 200, with a standard deviation of 13
    assert counts["c"] == 0
    assert counts["tinystories"] == 1  # the small text is read whole
    with pytest.raises(ConfigError, match=r"must name sources of the text, got novels: expected .*tinystories"):
        list(base_records(real_data, {}, shards=1, repeats=1, sources={"a": 1, "novels": 1}))


def test_a_continuation_is_whole_sentences_with_their_quotation_marks():
    from rows import continuation_rows

    said = 'It was late. "Stop!" said the fox. "I am tired." The hen sat down. ' + "The river was wide and slow. " * 40
    (row,) = continuation_rows([{"src": "gutenberg", "text": said}], 1, seed=0)
    [user, assistant] = row["messages"]
    answer = assistant["content"]
    assert "It was late." in user["content"]
    assert answer.startswith('"Stop!" said the fox. "I am tired." The hen sat down. The river was wide and slow.')
    assert answer.endswith("slow.")
    assert 700 < len(answer) <= 800
    assert not list(continuation_rows([{"src": "gutenberg", "text": "A. " + "word " * 300 + "end. B."}], 1, seed=0))


def test_titles_and_human_stories_of_all_lengths(tmp_path):
    from rows import human_stories, titled_stories, titles

    tale = "Tom saw a ball. The ball was red. One day Tom took the ball, and Tom ran. So Tom hid the ball."
    long = "A goat walked. " * 200
    path = tmp_path / "part.jsonl.xz"
    write(
        path,
        [
            {"src": "tinystories", "id": "1", "text": tale},
            {"src": "african-storybook", "id": "en/1.md", "text": f"The goat\n\n{long}"},
            {"src": "fairytaleqa", "id": "x/the-fox-story.csv", "text": f"The fox\n\n{STORY}"},
            {"src": "wikipedia", "id": "3", "text": "Vienna\n\nA town."},
        ],
    )
    assert [title for title, _ in titled_stories(path)] == ["Tom and the ball"]
    assert titles(path) == ["Tom and the ball", "The goat", "The fox"]
    assert human_stories(path) == [long.strip(), STORY]
