"""Logs are parsed whatever else they contain."""

import pytest

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.metrics import parse_log, read_log
from tests.metrics.logs import interval, line


def losses(log):
    return dict(zip(*log.series("loss"), strict=True))


def test_lines_that_are_no_metrics_are_passed_over():
    log = parse_log(
        [
            "2026-01-02 03:04:05 | INFO | fairseq_cli.train | {'_name': None, 'common': {}}\n",
            '{"num_updates": "not a number", "loss": "1"}\n',
            '{"some": "other program"}\n',
            '["num_updates"]\n',
            interval(10, loss=9.5),
            "Traceback (most recent call last):\n",
            "\x1b[2K" + interval(20, loss=8.5).rstrip() + "\x1b[0m\n",
        ]
    )
    assert losses(log) == {10: 9.5, 20: 8.5}


def test_values_that_are_no_numbers_are_left_out():
    log = parse_log([interval(10, loss="nan", lr="None"), interval(20, loss="inf")])
    assert log.series("lr") == ([], [])
    assert [str(value) for value in log.series("loss")[1]] == ["nan", "inf"]


def test_a_bare_log_file_reads_like_what_was_printed():
    """--log-file has only the JSON objects, each epoch's twice as often as the previous one's."""
    bare = [text[text.index("{") :] for text in (interval(10, loss=9), interval(20, loss=8))]
    assert losses(parse_log([bare[0], bare[1], bare[1]])) == {10: 9.0, 20: 8.0}


def test_summaries_are_identified_by_their_prefix():
    log = parse_log(
        [
            interval(10, loss=9),
            line("valid", num_updates="10", loss="8.5"),
            line("valid1", num_updates="10", loss="8.7"),
            line("train", num_updates="10", loss="9.1"),
        ]
    )
    assert losses(log) == {10: 9.0}
    assert [log.series("loss", name) for name in ("valid", "valid1", "train")] == [
        ([10], [8.5]),
        ([10], [8.7]),
        ([10], [9.1]),
    ]
    assert log.series("loss", "test") == ([], [])


def test_a_resumed_run_replaces_what_it_repeats():
    log = parse_log(
        [
            interval(10, loss=9),
            line("valid", num_updates="10", loss="9"),
            interval(20, loss=8),
            line("valid", num_updates="20", loss="8"),
            interval(30, loss=7),
            # resumed at 10 with another interval: 20 and 30 were of a run that is no more
            interval(25, loss=6.5),
            interval(40, loss=5),
            line("valid", num_updates="40", loss="5"),
        ]
    )
    assert losses(log) == {10: 9.0, 20: 8.0, 25: 6.5, 40: 5.0}
    log.add(interval(15, loss=4))
    assert losses(log) == {10: 9.0, 15: 4.0}
    assert log.series("loss", "valid") == ([10], [9.0])


def test_a_last_line_cut_off_is_passed_over():
    cut = interval(20, loss=8)[:-12]
    assert losses(parse_log([interval(10, loss=9), cut])) == {10: 9.0}


def test_a_file_is_named_and_need_not_be_utf8(tmp_path):
    path = tmp_path / "run.log"
    path.write_bytes(b"\xff\xfe caf\xe9\n" + interval(10, loss=9).encode())
    log = read_log(path)
    assert (log.name, losses(log)) == ("run", {10: 9.0})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        ("", "no training metrics"),
        ("epoch 1: loss 9\n", "no training"),
        (line("valid", num_updates="10", loss="8"), "no training metrics"),
    ],
)
def test_a_log_without_metrics_is_refused(tmp_path, content, reason):
    path = tmp_path / "run.log"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OptionError, match=reason) as error:
        read_log(path)
    assert str(path) in str(error.value)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(OptionError, match="cannot be read"):
        read_log(tmp_path)
