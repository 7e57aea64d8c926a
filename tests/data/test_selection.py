"""Filters, exact repetitions, attribution and the lock."""

import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from fanformer.data.preparation import outputs
from fanformer.data.preparation.prepare import prepare
from fanformer.data.preparation.selection import FILTERS, SeenTexts, clean_urls, min_words
from fanformer.data.sources.documents import open_source
from fanformer.errors import CheckpointError, ConfigError, DataError
from fanformer.files.locking import hold

LONG = "one two three four five six seven eight nine ten eleven"


def test_min_words_drops_ten_words_or_fewer():
    assert min_words(LONG) == LONG
    assert min_words(LONG.rpartition(" ")[0]) is None
    assert min_words("word " * 10 + "\n\t ") is None


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("see https://example.org/a?b=c#d and http://x.y now", "see  and  now"),
        ("(www.example.org/page) [link](https://example.org)", "() [link]()"),
        ("no address here: http is a word, www too", "no address here: http is a word, www too"),
        ("https://example.org/", None),
        ("  \n", "  \n"),
    ],
)
def test_clean_urls_deletes_web_addresses_and_nothing_else(text, cleaned):
    assert clean_urls(text) == cleaned


def write(tmp_path, records):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def make(tmp_path):
    """Prepare records of jsonl and return the folder's description and its texts."""

    def run(records, fields=(), **options):
        source = open_source(write(tmp_path, records), **dict(fields))
        data = prepare(source, tmp_path / "out", tokenizer=None, vocab_size=300, held_out_fraction=0, **options)
        stream = data.split("train")
        text = data.tokenizer().decode(stream.tokens[:].tolist())
        return data, [part for part in text.split("<|endoftext|>") if part]

    return run


def test_filters_apply_in_order_and_dropped_documents_are_counted(make):
    records = [{"text": LONG}, {"text": "short"}, {"text": f"{LONG} http://a.b"}, {"text": "http://" + LONG}]
    data, texts = make(records, filters=["clean-urls", "min-words"])
    assert texts == [LONG, LONG + " "]
    assert data.metadata["dropped"] == {"min-words": 2}
    assert data.metadata["filters"] == ["clean-urls", "min-words"]
    assert [records[0]["text"]] == [LONG]  # filters are pure


def test_repeated_texts_are_dropped_after_filters_and_counted(make):
    records = [{"text": text} for text in (LONG, "other", LONG, f"{LONG}http://a.b", "other", "third")]
    data, texts = make(records, filters=["clean-urls"], deduplicate=True)
    assert texts == [LONG, "other", "third"]
    assert data.metadata["dropped"] == {"duplicate": 3}
    assert data.metadata["deduplicate"] is True


def test_unknown_filter_names_the_nearest(make):
    with pytest.raises(ConfigError, match=r"no filter `min-word`: did you mean `min-words`\?"):
        make([{"text": LONG}], filters=["min-word"])
    assert set(FILTERS) == {"min-words", "clean-urls"}


def test_filters_that_drop_everything_are_told(make):
    with pytest.raises(DataError, match=r"every document was dropped \(min-words 2\): leave out a filter"):
        make([{"text": "a"}, {"text": "b"}], filters=["min-words"])


def test_texts_after_a_position_are_forgotten_and_the_others_kept(tmp_path):
    seen = SeenTexts(tmp_path / "seen")
    assert [seen.add(text, number) for number, text in enumerate("ab", start=1)] == [True] * 2
    checksum_of_two = seen.checksum
    assert [seen.add(text, number) for number, text in enumerate("cab", start=3)] == [True, False, False]
    seen.commit()
    seen.add("d", 6)
    seen.close()
    seen = SeenTexts(tmp_path / "seen")
    seen.go_back(2, checksum_of_two)
    assert [seen.add(text, number) for number, text in enumerate("abcd", start=3)] == [False, False, True, True]
    seen.close()


def test_seen_texts_go_from_thread_to_thread_as_tokenizer_training_wants(tmp_path):
    seen = SeenTexts(tmp_path / "seen")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(seen.add, "a", 1).result()
        assert pool.submit(seen.add, "a", 2).result() is False
    assert seen.add("a", 3) is False
    seen.close()


def test_attribution_has_a_row_for_every_source_and_licence(make, tmp_path):
    records = [
        {"text": "first text", "src": "a", "terms": "CC0"},
        {"text": "second", "src": "b", "terms": "MIT"},
        {"text": "third text", "src": "a", "terms": "CC0"},
    ]
    data, texts = make(records, fields={"source_field": "src", "licence_field": "terms"})
    rows = json.loads((tmp_path / "out" / "ATTRIBUTION.json").read_text())
    assert [(row["source"], row["licence"], row["documents"], row["bytes"]) for row in rows] == [
        ("a", "CC0", 2, 20),
        ("b", "MIT", 1, 6),
    ]
    assert sum(row["tokens"] for row in rows) == data.metadata["splits"]["train"]["tokens"] - 1  # the closing one
    assert len(texts) == 3


def test_attribution_without_fields_names_the_source_and_the_licence_given(make, tmp_path):
    make([{"text": "first text"}], licence="CC BY 4.0")
    [row] = json.loads((tmp_path / "out" / "ATTRIBUTION.json").read_text())
    assert (row["source"], row["licence"]) == (str(tmp_path / "data.jsonl"), "CC BY 4.0")


def test_standard_library_names_its_licence(tmp_path):
    source = open_source("stdlib")
    prepare(source, tmp_path / "out", tokenizer=None, vocab_size=300, max_bytes=50_000)
    [row] = json.loads((tmp_path / "out" / "ATTRIBUTION.json").read_text())
    assert (row["source"], row["licence"]) == ("Python's standard library", "PSF-2.0")


def test_a_source_field_with_a_value_for_every_document_is_refused(make, monkeypatch):
    monkeypatch.setattr(outputs, "MOST_SOURCES", 5)
    records = [{"text": "text", "url": f"page {number}"} for number in range(9)]
    with pytest.raises(ConfigError, match=r"has more than 5 values, such as 'page 5': name one that groups documents"):
        make(records, fields={"source_field": "url"})


def test_missing_attribution_field_is_named(make):
    with pytest.raises(DataError, match=r"data.jsonl:1: no field `src`; it has `text`: name the one that holds text"):
        make([{"text": "x"}], fields={"source_field": "src"})


def test_attribution_fields_of_the_standard_library_are_refused():
    with pytest.raises(ConfigError, match=r"apply to jsonl, parquet and hub datasets, got `stdlib`: leave them out"):
        open_source("stdlib", source_field="src")


def test_parquet_columns_give_the_attribution(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"src": ["a", "b"], "text": ["x", "y"]}), tmp_path / "a.parquet")
    documents = list(open_source(str(tmp_path / "a.parquet"), source_field="src"))
    assert [(document.text, document.source, document.licence) for document in documents] == [
        ("x", "a", None),
        ("y", "b", None),
    ]


def _hold_and_wait(path, ready, release):
    with hold(path, "the folder"):
        ready.set()
        release.wait(60)


def test_lock_is_held_by_one_process_and_free_after_it(tmp_path):
    path, context = tmp_path / "lock", multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold_and_wait, args=(path, ready, release))
    process.start()
    assert ready.wait(60)
    message = rf"the folder is in use by process {process.pid} on \S+ since \S+: wait until it ends, or stop it"
    with pytest.raises(CheckpointError, match=message), hold(path, "the folder", CheckpointError):
        pass
    release.set()
    process.join()
    with hold(path, "the folder"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_lock_without_a_readable_holder_still_holds(tmp_path):
    path = tmp_path / "lock"
    with hold(path, "the folder"):
        path.write_text("")
        with pytest.raises(DataError, match="in use by another process: wait"), hold(path, "the folder"):
            pass


def test_lock_that_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(DataError, match=r"none/lock cannot be written: No such file"),
        hold(tmp_path / "none/lock", "x"),
    ):
        pass
