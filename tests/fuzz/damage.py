"""Strategies: damaged bytes of a sound file, hostile text, JSON of any shape."""

from __future__ import annotations

from hypothesis import strategies as st

HOSTILE = (
    "../../etc/passwd",
    "/etc/passwd",
    "a|b`c`<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "\x1b[2J\x1b]0;owned\x07",
    "line\nbreak\r\n# heading",
    "\u202egnp.exe",
    "$\\frac{1}{2$ ^_{",
    "![x](javascript:alert(1))",
    "]]>&lt;&#60;",
    "a\x00b",
    "%2e%2e%2f",
    "-" * 300,
    "con::",
    "~root/x",
)
texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40))
numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 10**12, "nan", "inf", "-inf"])
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
json_values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """A sound file with bytes changed, cut out, doubled or put in."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("flip", "cut", "insert", "double", "end", "number")))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        elif kind == "end":
            del data[at:]
        else:
            data[at : at + 8] = draw(st.sampled_from((2**63 - 1, 2**64 - 1, 2**40, 0))).to_bytes(8, "little")
    return bytes(data)


@st.composite
def altered(draw: st.DrawFn, sound: object, depth: int = 6) -> object:
    """A sound JSON value with one place replaced, removed or added to."""
    if depth and isinstance(sound, dict) and sound and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(sound)))
        return {**sound, key: draw(altered(sound[key], depth - 1))}
    if depth and isinstance(sound, list) and sound and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(sound) - 1))
        return [*sound[:at], draw(altered(sound[at], depth - 1)), *sound[at + 1 :]]
    if isinstance(sound, dict) and sound and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(sound)))
        return {name: value for name, value in sound.items() if name != key} | draw(
            st.dictionaries(texts, json_values, max_size=1)
        )
    return draw(json_values)
