"""On datatrove's local executor, with several tasks, the result is that of one machine."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest

from fanformer.data.preparation.prepare import open_prepared, prepare
from fanformer.data.sources.documents import open_source
from fanformer.data.tokenizer import load_tokenizer, train_tokenizer
from fanformer.errors import ConfigError, DataError

WORDS = "a small model spoke of many things while rain fell on the old bridge".split()  # noqa: SIM905

PROGRAM = """
import sys, json
from datatrove.executor import LocalPipelineExecutor
from fanformer.data.preparation.datatrove_pipeline import Job, stages

if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[1]) | {"filters": ("min-words",)})
    for number, (pipeline, tasks) in enumerate(stages(job, 2)):
        logs = f"{sys.argv[2]}/{number}"
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=tasks, logging_dir=logs).run()
"""


@pytest.fixture
def corpus(tmp_path):
    chance = random.Random(3)
    texts = [" ".join(chance.choices(WORDS, k=chance.randrange(5, 60))) + f" {i}" for i in range(1500)]
    texts += chance.sample(texts, 200)
    chance.shuffle(texts)
    for number in range(5):
        lines = [json.dumps({"text": text, "origin": f"book {len(text) % 3}"}) for text in texts[number::5]]
        (tmp_path / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer(texts[:100], 400).save_pretrained(tmp_path / "tokenizer")
    return tmp_path


@pytest.mark.ci
@pytest.mark.parametrize("deduplicate", [True, False], ids=["without repetitions", "with repetitions"])
def test_two_tasks_give_the_folder_of_one_machine(corpus, deduplicate):
    pytest.importorskip("datatrove")
    arguments = {
        "spec": f"{corpus}/*.jsonl",
        "output_dir": str(corpus / "many"),
        "tokenizer": str(corpus / "tokenizer"),
        "source_field": "origin",
        "deduplicate": deduplicate,
        "shard_tokens": 5000,
    }
    (corpus / "run.py").write_text(PROGRAM)
    command = [sys.executable, str(corpus / "run.py"), json.dumps(arguments), str(corpus / "logs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    many = open_prepared(corpus / "many", verify=True)
    one = prepare(
        open_source(arguments["spec"], source_field="origin"),
        corpus / "one",
        tokenizer=load_tokenizer(arguments["tokenizer"]),
        vocab_size=0,
        filters=("min-words",),
        deduplicate=deduplicate,
        shard_tokens=5000,
    )
    assert many.metadata == one.metadata
    assert one.metadata["dropped"].keys() == ({"min-words", "duplicate"} if deduplicate else {"min-words"})
    names = sorted(path.name for path in one.folder.iterdir())
    assert names == sorted(path.name for path in many.folder.iterdir())
    assert all((one.folder / name).read_bytes() == (many.folder / name).read_bytes() for name in names)


def test_jobs_that_cannot_be_done_are_refused_before_they_start(corpus):
    pytest.importorskip("datatrove")
    from fanformer.data.preparation.datatrove_pipeline import Job, JoinParts, stages

    job = Job(f"{corpus}/*.jsonl", str(corpus / "out"), str(corpus / "tokenizer"))
    with pytest.raises(ConfigError, match=r"`tasks` must be at least 1, got 0"):
        stages(job, 0)
    with pytest.raises(DataError, match=r"exists already: choose another `output_dir`, or delete it first"):
        stages(Job(job.spec, str(corpus), job.tokenizer), 2)
    (corpus / "book.txt").write_text("one text only, with some words in it")
    with pytest.raises(ConfigError, match=r"too few documents to hold out 0.05 of them by their names: prepare it"):
        stages(Job(str(corpus / "book.txt"), job.output_dir, job.tokenizer), 2)
    job.work.mkdir(parents=True)
    with pytest.raises(DataError, match=r"encoded/00000/state.json is missing: run the stage that encodes again"):
        list(JoinParts(job).run())


def run_stages(job):
    from fanformer.data.preparation.datatrove_pipeline import stages

    for pipeline, tasks in stages(job, 2):
        for rank in range(tasks):
            list(pipeline[0].run(rank=rank, world_size=tasks))


def test_spoilt_part_is_refused_with_what_to_do(corpus):
    pytest.importorskip("datatrove")
    from fanformer.data.preparation.datatrove_pipeline import EncodeParts, Job, JoinParts, stages

    job = Job(f"{corpus}/*.jsonl", str(corpus / "out"), str(corpus / "tokenizer"))
    stages(job, 1)
    list(EncodeParts(job).run())
    part = job.work / "encoded" / "00001"
    for name, message in (
        ("state.json", r"encoded/00001/state.json is damaged"),
        ("train-00000.bin", r"encoded/00001/train-00000.bin is not as it was left"),
        ("heldout.txt", r"encoded/00001/heldout.txt is not as it was left"),
    ):
        kept = (part / name).read_bytes()
        for content in (b"", kept[:-3], kept[:9] + b"#" + kept[10:]):
            (part / name).write_bytes(content)
            with pytest.raises(DataError, match=message + r": delete \S+/00001 and run the stage that encodes again"):
                list(JoinParts(job).run())
        (part / name).write_bytes(kept)
    list(JoinParts(job).run())
    assert open_prepared(corpus / "out", verify=True)


def test_work_of_another_job_is_refused(corpus):
    pytest.importorskip("datatrove")
    from fanformer.data.preparation.datatrove_pipeline import EncodeParts, Job, stages

    job = Job(f"{corpus}/*.jsonl", str(corpus / "out"), str(corpus / "tokenizer"))
    stages(job, 1)
    list(EncodeParts(job).run())
    with pytest.raises(DataError, match=r"was begun with `filters` \[\], not \['min-words'\]: give the same again"):
        stages(replace(job, filters=("min-words",)), 1)
    with pytest.raises(DataError, match=r"out.partial is in the way and holds what no preparation on one machine has"):
        prepare(open_source(job.spec), corpus / "out", tokenizer=None, vocab_size=300)
    text = (corpus / "part-4.jsonl").read_text()
    (corpus / "part-4.jsonl").write_text(text + '{"text": "one more"}\n')
    with pytest.raises(DataError, match=r"another source \(`files` as they were before part-4.jsonl changed\)"):
        stages(job, 1)
    (corpus / "part-4.jsonl").write_text(text)
    run_stages(job)
    (corpus / "other.partial").mkdir()
    (corpus / "other.partial" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"other.partial is in the way and holds what no pipeline has left: choose"):
        stages(replace(job, output_dir=str(corpus / "other")), 1)


def test_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.pipeline.base", None)
    monkeypatch.delitem(sys.modules, "fanformer.data.preparation.datatrove_pipeline", raising=False)
    from fanformer.errors import DependencyError

    with pytest.raises(DependencyError, match=r"needs the package `datatrove`.*'fanformer\[cluster\]'"):
        import fanformer.data.preparation.datatrove_pipeline  # noqa: F401
