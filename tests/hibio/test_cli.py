"""The command line: help, usage, exit codes, options; gene-set databases."""

import dataclasses
import os
import socket
import subprocess
import sys

import pytest

from hibio import cli
from hibio.cli.command import STOPPED, build_parser
from hibio.config.files import ConfigError, dump_config
from tests.hibio.toy import assert_refused, replace_command

SUBCOMMANDS = [*cli.COMMANDS]
ACTIONS = ["list", "show", "coverage", "fetch"]


# ------------------------------------------------------------------ help and usage
@pytest.mark.parametrize("command", [[], *([name] for name in SUBCOMMANDS)])
def test_help_of_every_command(run, command):
    code, told, _ = run(*command, "--help")
    assert code == 0
    assert told.startswith(" ".join(["usage: hibio", *command]))
    assert not command or "Example: hibio" in " ".join(told.split())


@pytest.mark.parametrize("action", ACTIONS)
def test_help_of_every_pathways_action(run, action):
    assert run("pathways", action, "--help")[0] == 0


def test_the_general_help_names_every_command(run):
    told = run("--help")[1]
    assert all(f"\n    {name}" in told for name in SUBCOMMANDS)
    assert set(SUBCOMMANDS) >= {
        *("demo", "simulate", "prepare", "check", "pathways"),
        *("train", "embed", "query", "eval", "doctor"),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trane"],
        ["train"],
        ["train", "--config"],
        ["simulate", "--out", "x", "--slides", "many"],
        ["prepare", "m.csv"],
        [
            "query",
            "--checkpoint",
            "a",
            "--data",
            "b",
            "--out",
            "c",
            "--gene-set",
            "d",
            "--readout",
            "x",
        ],
        ["pathways"],
        ["pathways", "coverage", "default"],
        ["doctor", "--fix"],
    ],
)
def test_wrong_usage_exits_with_two(run, arguments):
    code, _, told = run(*arguments)
    assert code == 2
    assert "usage: hibio" in told


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("view --checkpoint c --data d --names ERBB2", ("--names", "--export")),
        ("view --checkpoint c --data d --export e --port 8000", ("--port", "--export")),
        ("view --checkpoint c --data d --export e --host 0.0.0.0", ("--host", "--export")),
        ("search i --out o --checkpoint c --genes ERBB2 --by image", ("--by", "--like", "--genes")),
        ("search i --out o --checkpoint c --patch p --by omics", ("--by", "--like", "--patch")),
        ("search i --out o --checkpoint c --like s:1", ("--checkpoint", "--like")),
        ("share --checkpoint c --out o --public", ("--public", "--push")),
    ],
)
def test_an_option_that_would_not_be_used_is_refused(run, line, named):
    code, _, told = run(*line.split())
    assert code == 2
    assert all(name in told.splitlines()[-1] for name in named)


def test_every_command_has_its_function():
    parser = build_parser({name: one for name, one in cli.COMMANDS.items() if name != "eval"})
    with pytest.raises(SystemExit):
        parser.parse_args(["eval", "--out", "x"])
    options = build_parser(cli.COMMANDS).parse_args(["eval", "--out", "x"])
    assert options.run is cli.COMMANDS["eval"].run


def test_stopping_by_hand_is_no_traceback(run, monkeypatch):
    def stopped(options):
        raise KeyboardInterrupt

    replace_command(monkeypatch, "doctor", stopped)
    assert_refused(run("doctor"), "stopped")


@pytest.mark.parametrize("words", [["config", "list"], ["doctor", "--licenses"]])
@pytest.mark.parametrize("socket_pair", [False, True])
def test_nobody_who_reads_on_is_no_error(words, socket_pair):
    """`hibio config list | head -1`; a socket says POLLHUP where a pipe of Linux says POLLERR."""
    read, write = (one.detach() for one in socket.socketpair()) if socket_pair else os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "hibio.cli", *words]
    done = subprocess.run(command, check=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_pipe_of_something_else_that_breaks_is_told(run, monkeypatch):
    def fail(options):
        raise BrokenPipeError("the tracker went away")

    replace_command(monkeypatch, "simulate", fail)
    assert_refused(run("simulate", "--out", "x"), "the tracker went away")


def test_a_signal_has_an_exit_code_of_its_own_and_ends_a_chain(run, monkeypatch):
    def stopped(options):
        raise InterruptedError("stopped at step 3; saved")

    begun = []
    replace_command(monkeypatch, "simulate", lambda options: begun.append("simulate") or 0)
    replace_command(monkeypatch, "prepare", stopped)
    replace_command(monkeypatch, "train", lambda options: begun.append("train") or 0)
    code, _, told = run("demo")
    assert (code, begun) == (STOPPED, ["simulate"])
    assert "hibio: stopped at step 3; saved" in told


def test_an_unexpected_error_is_one_line_and_a_log(run, monkeypatch, tmp_path):
    def fails(options):
        raise IndexError("list index\nout of range")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    replace_command(monkeypatch, "doctor", fails)
    result = run("doctor")
    assert_refused(result, "unexpected IndexError: list index out of range", "hibio check")
    (log,) = tmp_path.glob("hibio-*.log")
    assert str(log) in result[2]
    assert "Traceback" in log.read_text()


def test_an_error_of_several_lines_is_told_in_one(run, monkeypatch):
    def fails(options):
        raise ConfigError("first\n  second\n\tthird")

    replace_command(monkeypatch, "doctor", fails)
    assert_refused(run("doctor"), "hibio: first second third")


# ------------------------------------------------------------------ gene sets
def test_a_gmt_with_spaces_in_names_and_descriptions(run, tmp_path):
    path = tmp_path / "my.gmt"
    path.write_text("B CELLS\tcells that make antibodies\tCD19\tMS4A1\nT\t\tCD3D\tCD3E\tCD8A\n")
    code, told, _ = run("pathways", "show", path)
    assert code == 0
    assert "B CELLS\t2\tcells that make antibodies\tCD19 MS4A1" in told.splitlines()
    assert "T\t3\t\tCD3D CD3E CD8A" in told.splitlines()


def test_a_gmt_separated_by_spaces_is_refused(run, tmp_path):
    path = tmp_path / "my.gmt"
    path.write_text("B_CELLS description CD19 MS4A1\n")
    assert_refused(run("pathways", "show", path), "my.gmt, line 1", "tab")


def test_pathways_list_and_coverage(run, toy_stores):
    code, told, _ = run("pathways", "list")
    assert code == 0
    assert "default" in told
    code, told, _ = run("pathways", "coverage", "default", "--data", toy_stores)
    assert code == 0
    assert "103 sets" in told
    assert_refused(run("pathways", "show", "hallmrk"), "hallmark")
    assert_refused(run("pathways", "coverage", "default", "--data", "none"), "none")


def test_options_reach_the_configuration(run, toy_config, tmp_path, monkeypatch):
    seen = []

    def train_all(config, *, resume):
        seen.append((config, resume))
        return []

    monkeypatch.setattr("hibio.run.train_all", train_all)
    path = tmp_path / "config.yaml"
    dump_config(toy_config, path)
    run("train", "--config", path, "--set", "model.embed_dim=8", "--set", "seeds=[3,4]")
    run("train", "--config", path, "--resume", "elsewhere")
    run("train", "--config", path, "--test", "a", "b")
    assert seen.pop()[0].data.test == ("a", "b")
    (first, no), (second, yes) = seen
    assert (no, yes) == (False, True)
    assert (first.model.embed_dim, first.seeds, first.out) == (8, (3, 4), toy_config.out)
    assert str(second.out) == "elsewhere"
    assert dataclasses.replace(second, out=toy_config.out) == toy_config


def test_knobs_reach_the_simulator(run, tmp_path, monkeypatch):
    seen = []

    def simulate_cohort(out, programmes, config):
        seen.append(config)
        return out / "manifest.csv"

    monkeypatch.setattr("preprocessing.simulate.simulate_cohort", simulate_cohort)
    run("simulate", "--out", tmp_path)
    knobs = ("--signal", "0.3", "--contiguity", "0.5", "--overlap", "0.25")
    run("simulate", "--out", tmp_path, *knobs, "--outcome-effect", "0.1", "--spots", "50")
    first, second = seen
    assert (first.contiguity, first.overlap) == (1.0, 0.0)
    assert (second.signal, second.contiguity, second.overlap) == (0.3, 0.5, 0.25)
    assert (second.outcome_effect, second.n_spots) == (0.1, 50)
    run("simulate", "--out", tmp_path, "--misregister", "rot90")
    assert [config.misregister for config in seen] == ["", "", "rot90"]
    assert_refused(run("simulate", "--out", tmp_path, "--misregister", "rot9"), "rot90")
    run("simulate", "--out", tmp_path, "--like", "her2st", "--slides", "9")
    assert (seen[-1].n_slides, seen[-1].n_patients, seen[-1].pitch_um) == (9, 3, 200.0)
    assert_refused(run("simulate", "--out", tmp_path, "--like", "her2"), "her2st")
    assert_refused(run("simulate", "--out", tmp_path, "--contiguity", "2"), "contiguity")
