"""The `hibio` command, called in this process."""

from __future__ import annotations

import pytest

from hibio import cli


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Call the command in an empty folder; gives exit code, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments):
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return call
