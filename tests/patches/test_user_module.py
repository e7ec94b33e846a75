"""--user-dir, with what users give for it."""

import argparse

import pytest
from fairseq import utils

from evomoe_plugin.config.errors import OptionError


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone", "there is no such folder"), ("a.py", "is a file: give the folder")],
)
def test_what_is_no_package_is_refused(tmp_path, name, message):
    (tmp_path / "a.py").touch()
    with pytest.raises(OptionError, match=f"^--user-dir {tmp_path / name}: {message}"):
        utils.import_user_module(argparse.Namespace(user_dir=str(tmp_path / name)))


def test_an_error_of_the_package_is_its_own(tmp_path):
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("open('/gone')")
    with pytest.raises(FileNotFoundError, match="/gone"):
        utils.import_user_module(argparse.Namespace(user_dir=str(tmp_path / "broken_package")))
