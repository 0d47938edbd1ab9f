"""Texts as in users' files and browsers: any characters, including halves of surrogate pairs."""

from __future__ import annotations

from hypothesis import strategies as st

# ``st.text`` joins its alphabets into one range of a million characters and hardly ever draws one of the 2,048 halves.
any_text = st.lists(st.characters() | st.characters(categories=["Cs"]), max_size=30).map("".join)
