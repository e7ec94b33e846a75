"""dict.txt as users have it."""

import pytest

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.dictionary import load_dictionary

BAD_DICTIONARIES = [
    (b"the 10\nof\n", "is not a fairseq dictionary: Incorrect dictionary format"),
    (b"the 10\nof many\n", "is not a fairseq dictionary: Incorrect dictionary format"),
    (
        b"the 10\nof 5\nthe 3\n",
        "is not a fairseq dictionary: Duplicate word found when loading Dictionary: 'the'",
    ),
    (b"caf\xe9 10\n", "is not a fairseq dictionary: it is not UTF-8"),
]


@pytest.mark.parametrize(("content", "message"), BAD_DICTIONARIES)
def test_one_line_for_what_is_none(tmp_path, content, message):
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    with pytest.raises(OptionError) as caught:
        load_dictionary("data", path)
    assert str(caught.value).startswith(f"--data {path}: {message}")
    assert "\n" not in str(caught.value)


def test_what_fairseq_reads_is_read(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("the 10\n\u2581of 5\nthe 3 #fairseq:overwrite\n")
    dictionary = load_dictionary("data", str(path))
    assert (len(dictionary), dictionary.count[dictionary.index("the")]) == (7, 3)
    with pytest.raises(OptionError, match="no such file"):
        load_dictionary("data", tmp_path)
