"""Prepared rows, and a member that trains on them."""

import contextlib

import pytest

from tests.training.conftest import corpus, tiny_run  # noqa: F401

ROUND_STEPS, ROUNDS = 3, 4


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory):  # noqa: F811
    """Folder of the corpus, prepared once for all members."""
    from fanformer.data.preparation.prepare import prepare
    from fanformer.data.sources.documents import open_source

    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(open_source(str(corpus)), folder, tokenizer=None, vocab_size=320)
    return folder


@pytest.fixture
def recipe(prepared, tmp_path):
    """Make the recipe of a run in rounds; keyword arguments replace its fields."""

    def make(**fields):
        known = {"compile": "off", "threads": 1, "model.dropout": 0.0, "sample_prompt": None}
        return tiny_run(prepared, tmp_path / "recipe", **known, **fields)

    return make


@pytest.fixture
def plan(prepared):
    """Make the plan of a run of four rounds of three steps; keyword arguments replace its fields."""

    def make(**fields):
        from fanformer.community.plan import Plan
        from fanformer.data.prepared import open_prepared

        known = {"rounds": ROUNDS, "round_steps": ROUND_STEPS, "batch_size": 2, "sequence_length": 32}
        return Plan(**{**known, "data_fingerprint": open_prepared(prepared).fingerprint, **fields})

    return make


@pytest.fixture
def member(recipe, plan, tmp_path):
    """Open a member in a folder of its name; it is closed when the test ends, or by `leave`."""
    from fanformer.community.member import joined, member_config

    with contextlib.ExitStack() as stack:

        def join(name="anna", the_plan=None, folder=None, listener=None, **fields):
            asked = the_plan or plan()
            config = member_config(recipe(), asked, output_dir=str(folder or tmp_path / name), **fields)
            options = {} if listener is None else {"listener": listener}
            return stack.enter_context(joined(config, asked, name, **options))

        join.leave = stack.close
        yield join


@pytest.fixture
def process_of_a_run(monkeypatch):
    """Let Flower believe this process to be run 7's: only there are messages made."""
    from flwr.supercore.task_identity import TaskIdentity

    for name, number in (("_run_id", 7), ("_task_id", 8), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, number)
