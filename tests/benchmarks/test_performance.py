"""The page of speeds answers each question by its newest entry, and says what was not measured."""

import pytest

from fanformer.comparison.ledger import EXACT, Entry, Figure


@pytest.fixture
def performance(repository, monkeypatch):
    for folder in ("speed", "evidence"):
        monkeypatch.syspath_prepend(str(repository / "benchmarks" / folder))
    import performance

    return performance


def entry(name, date, result):
    return Entry(
        name=name,
        what="speeds",
        kind="benchmark",
        command="python benchmarks/speed/speed.py",
        date=date,
        seeds=[0],
        configuration={"scale": "92m"},
        data=None,
        hardware={"cpu": "a processor", "cores": 2},
        versions={},
        result=result,
    )


def page_of(performance, entries, **fields):
    import claims

    asked = {"id": "q", "claim": "Steps", "command": "run it", "entry": "speed-*", "figure": "times", "at_least": 2.0}
    rows = claims.judge([claims.Claim(**{**asked, **fields})], entries)
    return performance.performance_page(rows, entries)


def times(value):
    return {"times": Figure(value, "times", value - 0.1, value + 0.1, "range"), "share": Figure(0.42, "of the peak")}


def test_the_newest_entry_answers(performance):
    entries = [entry("speed-1", "2026-11-25", times(1.5)), entry("speed-2", "2026-11-26", times(2.5))]
    page = page_of(performance, entries, against="Llama", limit="share")
    (line,) = [line for line in page.splitlines() if line.startswith("| Steps")]
    for words in ("| Llama |", "at least 2", "**reached**", "| 2.5 (2.4 to 2.6, range), 92m |", "| 42% |"):
        assert words in line
    assert "| 2026-11-26 | a processor, 2 cores | `speed-2` | 0 | `python benchmarks/speed/speed.py` |" in page
    assert "`speed-1`" not in page
    assert "**not reached**" in page_of(performance, entries[:1])


def test_what_nobody_measured_says_so(performance):
    page = page_of(performance, [])
    assert "| Steps | - | at least 2 | not measured | by `run it` | - |" in page


def test_settings_and_profiles_have_tables(performance):
    settings = entry(
        "speed-settings-1",
        "2026-11-26",
        {"times_as_long_eager": times(1.2)["times"], "times_as_long_one_thread": times(1.8)["times"]},
    )
    shares = {"products": 0.7, "attention": 0.2, "other": 0.1}
    profile = {"milliseconds_step_ours": Figure(3600.0, "ms"), "milliseconds_token_ours": Figure(12.0, "ms")}
    for phase in ("step_ours", "token_ours"):
        profile |= {f"share_of_{kind}_{phase}": Figure(share, "", interval=EXACT) for kind, share in shares.items()}
    page = page_of(performance, [settings, entry("speed-profile-1", "2026-11-26", profile)], entry="nothing")
    lines = page.splitlines()
    assert lines.index("| one thread | 1.8 | 1.7 to 1.9, range |") + 1 == lines.index(
        "| eager | 1.2 | 1.1 to 1.3, range |"
    )
    assert "| | step ours | token ours |" in lines
    assert "| whole, ms | 3,600 | 12 |" in lines
    assert "| attention | 20% | 20% |" in lines


def test_operators_have_their_kind(performance):
    from profiles import KINDS
    from speed import kind_of

    assert kind_of("aten::mm", KINDS) == "products"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu_backward", KINDS) == "attention"
    assert kind_of("## Call CompiledFxGraph f6hg ##", KINDS) == "fused_by_the_compiler"
    assert kind_of("aten::argmax", KINDS) == "other"


def test_loads_have_a_line_for_each_number_of_clients(performance):
    result = {}
    for clients in (16, 1):
        for way in ("stream", "whole"):
            result[f"tokens_per_second_{clients}_clients_{way}"] = Figure(30.0 * clients, "tokens/s")
        for part in ("p50", "p99"):
            result[f"first_token_{part}_{clients}_clients_stream"] = Figure(0.25 * clients, "s")
    page = page_of(performance, [entry("serve-torch-2026-11-30", "2026-11-30", result)], entry="nothing")
    lines = page.splitlines()
    assert lines.index("| 1 | 30 | 30 | 0.25 | 0.25 |") + 1 == lines.index("| 16 | 480 | 480 | 4 | 4 |")
    assert "## The server under load, float32 on torch" in lines
    assert "q8_0 on ggml" not in page
