"""The recipe "An encoder" of CONTRIBUTING to the letter: a package of one's own, nothing else."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hibio.config.files import ConfigError, dump_config, load_config
from hibio.config.model import ModelConfig, OmicsConfig, VisionConfig
from hibio.config.run import DataConfig, RunConfig
from hibio.config.training import StageConfig
from hibio.encoders.base import build_encoder, refuse_code, trust_code
from hibio.model import HiBio
from tests.hibio.toy import SPOT, run_config

LAB = '''
import torch


class Colour(torch.nn.Module):
    """Mean colour of the patch, through one layer."""

    def __init__(self, width=6):
        super().__init__()
        self.embed_dim = width
        self.layer = torch.nn.Linear(3, width)

    def forward(self, batch):
        return self.layer(batch.patches_SCHW.float().mean(dim=(2, 3)) / 255.0)


class Profile(torch.nn.Module):
    """The spot vector, through one layer."""

    def __init__(self, context, config, depth):
        super().__init__()
        self.embed_dim = config.width
        width_in = context.factors_GV.shape[1]
        sizes = [width_in] + [config.width] * depth
        self.layers = torch.nn.Sequential(*map(torch.nn.Linear, sizes[:-1], sizes[1:]))

    def forward(self, batch):
        return self.layers(batch.vector_SV)


class Unsized(torch.nn.Module):
    pass
'''

ELSEWHERE = """
import sys
from hibio import HiBio
from hibio.config.files import ConfigError
try:
    model = HiBio.from_checkpoint(sys.argv[1])
except ConfigError as error:
    sys.exit(str(error))
print(type(model.vision).__name__, model.vision.embed_dim, len(model.omics.layers))
"""


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Path:
    (tmp_path / "lab" / "my_lab").mkdir(parents=True)
    (tmp_path / "lab" / "my_lab" / "__init__.py").touch()
    (tmp_path / "lab" / "my_lab" / "towers.py").write_text(LAB)
    monkeypatch.syspath_prepend(str(tmp_path / "lab"))
    for name in ("my_lab", "my_lab.towers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "lab"


def elsewhere(checkpoint: Path, lab: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(lab), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(checkpoint)],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_encoder_of_ones_own_trains_and_loads_elsewhere(run, lab, toy_stores, tmp_path):
    vision = VisionConfig(name="my_lab.towers:Colour", settings={"width": 5})
    omics = OmicsConfig(name="my_lab.towers:Profile", width=12, settings={"depth": 2})
    config = run_config(
        toy_stores,
        tmp_path / "run",
        data=DataConfig(toy_stores, image="patches"),
        stages=(StageConfig("spot", 1, SPOT),),
        model=ModelConfig(vision=vision, omics=omics, embed_dim=8),
    )
    dump_config(config, tmp_path / "mine.yaml")
    assert load_config(RunConfig, tmp_path / "mine.yaml") == config
    assert run("train", "--config", tmp_path / "mine.yaml")[0] == 0
    (checkpoint,) = (tmp_path / "run").glob("**/checkpoint")
    model = HiBio.from_checkpoint(checkpoint)
    assert (model.vision.embed_dim, model.omics.embed_dim) == (5, 12)
    state = Path(os.environ["XDG_STATE_HOME"])
    assert (state / "hibio" / "trusted_code.json").stat().st_mode & 0o777 == 0o600
    done = elsewhere(checkpoint, lab, HIBIO_PLUGINS="")
    assert (done.returncode, done.stdout.split()) == (0, ["Colour", "5", "2"]), done.stderr
    other = {"HIBIO_PLUGINS": "", "XDG_STATE_HOME": str(tmp_path / "another machine")}
    refused = elsewhere(checkpoint, lab, **other)
    assert refused.returncode == 1
    assert "HIBIO_PLUGINS=my_lab.towers" in refused.stderr


def test_what_was_trained_here_is_this_encoder_in_this_place(lab, tmp_path, monkeypatch, capsys):
    """Neither another class of the module nor a package without a file of its own elsewhere."""
    state, source = tmp_path / "state", tmp_path / "config.yaml"
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    trust_code("mlp", "my_lab.towers:Colour", "sys:Colour")
    assert str(lab / "my_lab" / "__init__.py") in capsys.readouterr().out
    trust_code("my_lab.towers:Colour")
    assert not capsys.readouterr().out  # told once
    refuse_code("my_lab.towers:Colour", source)
    assert "my_lab" not in sys.modules
    with pytest.raises(ConfigError, match="wants to run code"):
        refuse_code("my_lab.towers:Profile", source)
    shutil.copytree(lab, tmp_path / "copy")
    monkeypatch.syspath_prepend(str(tmp_path / "copy"))  # the same name in another place
    with pytest.raises(ConfigError, match=r"trained here with .*lab.my_lab.*finds .*copy"):
        refuse_code("my_lab.towers:Colour", source)
    (tmp_path / "copy" / "my_lab" / "__init__.py").unlink()
    (lab / "my_lab" / "__init__.py").unlink()  # now a namespace: any folder may add to it
    with pytest.raises(ConfigError, match=r"trained here with .*__init__\.py; Python finds"):
        refuse_code("my_lab.towers:Colour", source)
    trust_code("my_lab.towers:Colour")
    refuse_code("my_lab.towers:Colour", source)
    (state / "hibio" / "trusted_code.json").chmod(0o666)
    with (
        pytest.warns(UserWarning, match="others may write"),
        pytest.raises(ConfigError, match="wants to run code"),
    ):
        refuse_code("my_lab.towers:Colour", source)


@pytest.mark.parametrize("home", ["a file", "none"])
def test_a_home_that_cannot_be_written_is_told(lab, tmp_path, monkeypatch, capsys, home):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "a file"))
    if home == "none":
        monkeypatch.setattr(Path, "home", lambda: Path("~none").expanduser())
    with pytest.warns(UserWarning, match="not used"):
        trust_code("my_lab.towers:Colour")
    assert "will need HIBIO_PLUGINS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("Colour", {"wdth": 5}, "'wdth'.*vision.settings"),
        ("Profile", {}, "'context'.*none are set"),
        ("Unsized", {}, "no embed_dim"),
    ],
)
def test_settings_that_the_constructor_does_not_take(lab, name, settings, words):
    with pytest.raises(ConfigError, match=rf"{name}.*{words}"):
        build_encoder(f"my_lab.towers:{name}", {}, "vision", settings, config=VisionConfig())


@pytest.mark.parametrize("section", [VisionConfig(), OmicsConfig()])
def test_an_encoder_that_ships_with_hibio_has_keys_instead(section):
    with pytest.raises(ValueError, match=r"settings \(width\) are of an encoder"):
        dataclasses.replace(section, settings={"width": 5})
