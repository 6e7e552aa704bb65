"""The page of troubleshooting explains every error message of the package, and no other."""
import ast
import re
from collections import Counter

from messages import entries, is_explained, messages, strings, texts

MESSAGES, ENTRIES = messages(), entries()


def test_messages_are_found():
    assert len(MESSAGES) > 250
    assert any(message.startswith("--tp … cannot split") for message in MESSAGES)
    assert texts(ast.parse("f'a{b}c' + (d if e else 'f')", mode="eval").body) == ["a…c…", "a…cf"]


def test_every_message_is_explained():
    """`python tests/docs/messages.py` prints those that are not, with the modules they are in."""
    assert not {message: modules for message, modules in MESSAGES.items() if not is_explained(message, ENTRIES)}


def test_every_entry_is_a_message():
    """Messages that functions compose are texts of the package all the same."""
    known = {message.replace("`", "") for message in (*MESSAGES, *strings())}
    stale = [entry for entry in ENTRIES if not any(message.startswith(entry) for message in known)]
    assert not stale, stale


def test_entries_are_narrow_and_once():
    """An entry that begins half of all messages would explain none."""
    assert [entry for entry, count in Counter(ENTRIES).items() if count > 1] == []
    for entry in ENTRIES:
        assert re.search(r"[a-z]{2}", entry), entry
        assert sum(message.replace("`", "").startswith(entry) for message in MESSAGES) <= 20, entry
