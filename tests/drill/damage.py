"""Damage to bytes, as strategies of hypothesis: a flipped bit, a cut, something put in, taken out or repeated."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass(frozen=True)
class Change:
    """One thing done to bytes. at: where, as a share of their length. data: what is put there; length: of what goes."""

    how: str
    at: float
    data: bytes
    length: int

    def of(self, content: bytes) -> bytes:
        at = int(self.at * len(content))
        before, behind = content[:at], content[at:]
        if self.how == "bit":
            return before + bytes(x ^ 1 << self.length % 8 for x in behind[:1]) + behind[1:]
        if self.how == "replace":
            return before + self.data + behind[len(self.data) :]
        if self.how == "cut":
            return before
        if self.how == "insert":
            return before + self.data + behind
        if self.how == "repeat":
            return before + behind[: self.length] + behind
        if self.how == "remove":
            return before + behind[self.length :]
        return before + bytes(len(behind[: self.length])) + behind[self.length :]


CHANGES = st.lists(
    st.builds(
        Change,
        st.sampled_from(["bit", "replace", "cut", "insert", "repeat", "remove", "zeros"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from([b"null", b"-1", b"1e999", b"[]", b"{}", b'"', b"9" * 30]),
        ),
        st.integers(1, 64),
    ),
    min_size=1,
    max_size=3,
)


def changed(content: bytes, changes: list[Change]) -> bytes:
    for change in changes:
        content = change.of(content)
    return content


def damaged(content: bytes) -> st.SearchStrategy:
    return CHANGES.map(lambda changes: changed(content, changes))
