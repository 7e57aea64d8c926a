"""Text on its way out: stop strings never leak, whole characters only, tokens leave with their text."""

import random

import pytest

from fanformer.server.stopping import OutgoingText, StopStrings, Token


def cuts(text):
    """All ways to cut a text into pieces."""
    for bits in range(2 ** max(len(text) - 1, 0)):
        pieces, start = [], 0
        for place in range(1, len(text)):
            if bits >> (place - 1) & 1:
                pieces.append(text[start:place])
                start = place
        yield [*pieces, text[start:]]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("ab\n\ncd", ["\n\n"], "ab"),
        ("aabaabc", ["aabc"], "aab"),
        ("abcabd", ["abd", "cab"], "ab"),
        ("xaby", ["ab", "b"], "x"),
        ("xyz", ["yzz"], "xyz"),
        ("aaaa", ["aaa"], ""),
        ("stop", ["stop"], ""),
        ("a<b<c", ["<c", "<d", "<e", "<f", "<g"], "a<b"),
        ("abc", [], "abc"),
    ],
)
def test_the_text_ends_before_the_stop_string_however_it_is_cut(text, stops, expected):
    for pieces in cuts(text):
        matcher, sent = StopStrings(stops), ""
        for piece in pieces:
            sent += matcher.push(piece)
            assert expected.startswith(sent), f"{sent!r} leaked of {pieces}"
            if matcher.found:
                break
        if not matcher.found:
            sent += matcher.finish()
        assert sent == expected
        assert (matcher.found is not None) == any(stop in text for stop in stops)


def test_random_texts_end_where_a_search_in_the_whole_text_finds_the_first_stop():
    random_ = random.Random(0)
    for _ in range(500):
        text = "".join(random_.choices("ab", k=12))
        stops = ["".join(random_.choices("ab", k=random_.randint(1, 4))) for _ in range(6)]
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        matcher, sent = StopStrings(stops), ""
        for character in text:
            sent += matcher.push(character)
            if matcher.found:
                break
        assert sent + matcher.finish() == (text[: min(ends)[1]] if ends else text)


def outgoing(tokenizer, text, stops=(), beginning=""):
    """Send the tokens of `text` out; return the pieces, and the tokens with the text sent before they left."""
    out, pieces, tokens = OutgoingText(tokenizer, [0], beginning, stops), [], []
    ids = tokenizer.encode(text, add_special_tokens=False)
    for number in ids:
        written = out.push(Token(number, -1.0))
        pieces.append(written.text)
        tokens += written.tokens
        if out.stopped:
            break
    written = out.finish()
    return [*pieces, written.text], [*tokens, *written.tokens], ids, out


def test_characters_of_several_tokens_come_whole(tiny_tokenizer):
    text = "a\u4e16\u754c \U0001f680 b\u00e9"
    pieces, tokens, ids, _ = outgoing(tiny_tokenizer, text)
    assert len(ids) > len(text)
    assert "".join(pieces) == text
    assert all(piece == piece.encode("utf-8", "strict").decode() and "\ufffd" not in piece for piece in pieces)
    assert [token.id for token in tokens] == ids


def test_tokens_of_a_stop_string_never_leave(tiny_tokenizer):
    text = "the cat sat on the mat"
    pieces, tokens, ids, out = outgoing(tiny_tokenizer, text, [" on the"])
    assert out.stopped
    assert "".join(pieces) == "the cat sat"
    assert tiny_tokenizer.decode([token.id for token in tokens]) == "the cat sat"
    assert len(tokens) < len(ids)


def test_what_belongs_to_the_prompt_is_left_out(tiny_tokenizer):
    pieces, _, _, _ = outgoing(tiny_tokenizer, "  the cat", beginning="  ")
    assert "".join(pieces) == "the cat"
