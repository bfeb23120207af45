"""Doctor: packages, disk, devices, broken libraries; the torchvision shim in a fresh process."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from hibio import cli
from hibio.cli import doctor
from preprocessing.findings import Finding


def by_subject() -> dict[str, Finding]:
    return {finding.subject: finding for finding in doctor.diagnose()}


def test_covers_every_requirement_and_device():
    findings = by_subject()
    assert set(findings) >= {"python", "torch", "torchvision", "timm", "h5py", "openslide-python"}
    assert set(findings) >= {"torch + torchvision", "OpenSlide", "HDF5", "CPU", "CUDA", "deepspeed"}
    assert findings["torch"].message == metadata.version("torch")
    assert not {"pytest", "ruff"} & set(findings)  # extras are not required


def test_every_trouble_has_a_remedy_and_no_success_has_one():
    for finding in doctor.diagnose():
        assert bool(finding.fix) == (finding.level != "PASS"), finding


def test_package_ranges():
    present = metadata.version("numpy")
    texts = ["numpy>=1", f"numpy>{present}", f"numpy=={present}", "no-such-thing>=2"]
    found = doctor.required_packages([Requirement(text) for text in texts])
    assert [finding.level for finding in found] == ["PASS", "FAIL", "PASS", "FAIL"]
    assert found[1].message == f"{present}, expected >{present}"
    assert found[3].message == "not installed, >=2 is needed"
    assert found[3].fix == "pip install 'no-such-thing>=2'"


def test_wrong_torch_for_torchvision(monkeypatch):
    wanted = [Requirement("torch==1.0.0")]
    monkeypatch.setattr(doctor, "_requirements", lambda package, extra="": wanted)
    finding = by_subject()["torch + torchvision"]
    assert finding.level == "FAIL"
    assert "built for torch==1.0.0" in finding.message


def test_not_installed_package(monkeypatch):
    assert doctor._requirements("no-such-package") == [Requirement("no-such-package")]
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    found = by_subject()
    assert found["torch + torchvision"].level == "WARN"  # only encoders of patches need the pair
    assert found["torch"].level == "FAIL"


def test_an_optional_package_is_told_with_its_extra(monkeypatch):
    texts = ["numpy>=1", 'nothing-such>=2; extra == "hub"', 'h5py>=99; extra == "czi"']
    texts += ['h5py>=1; extra == "hdf5"', 'tqdm>=1; extra == "hdf5"', 'pytest; extra == "test"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda package: texts)
    found = {finding.subject: finding for finding in doctor.optional_packages()}
    levels = {name: (one.level, one.fix) for name, one in found.items()}
    assert levels == {
        "nothing-such": ("WARN", "pip install 'hibio[hub]'"),
        "h5py": ("WARN", "pip install 'hibio[czi]'"),
        "tqdm": ("PASS", ""),
    }
    assert "not installed; optional: weights" in found["nothing-such"].message
    assert found["h5py"].message.endswith("expected >=99 (optional)")


@pytest.mark.parametrize(("free_gib", "level"), [(0.1, "FAIL"), (2, "WARN"), (50, "PASS")])
def test_disk_space(monkeypatch, tmp_path, free_gib, level):
    usage = namedtuple("usage", "total used free")(0, 0, int(free_gib * 1024**3))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    finding = doctor.disk_space(tmp_path)
    assert finding.level == level
    assert str(tmp_path) in finding.message


def test_broken_library_is_a_finding_not_a_crash(monkeypatch):
    real = doctor.importlib.import_module

    def broken(name: str):
        if name in ("openslide", "h5py", "torch"):
            raise OSError(f"{name}: cannot open shared object\nmore")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    findings = by_subject()
    for subject in ("OpenSlide", "HDF5", "CUDA"):
        assert findings[subject].level == "FAIL"
        assert findings[subject].message.endswith("cannot open shared object")


def test_another_project_with_our_names_is_told():
    """PyPI has projects that install `pathways` and `preprocessing`."""
    ours = {name: ["hibio"] for name in ("hibio", "pathways", "preprocessing", "eval")}
    assert doctor.names_of_others(ours).level == "PASS"
    assert doctor.names_of_others({}).level == "PASS"  # a checkout that is not installed
    found = doctor.names_of_others({**ours, "pathways": ["hibio", "pathways", "pathways"]})
    assert found.level == "FAIL"
    assert found.message.startswith("pathways is also of pathways,")
    assert found.fix.startswith("pip uninstall pathways; pip install --force-reinstall")


def test_the_findings_as_json(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda: [Finding("FAIL", "torch", "none", "pip it")])
    assert cli.main(["doctor", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found == {"level": "FAIL", "subject": "torch", "message": "none", "fix": "pip it"}


def test_every_licence_that_comes_with_hibio(capsys):
    found = {name: (version, licence) for name, version, licence in doctor.licences()}
    assert found["numpy"][0] == metadata.version("numpy")
    assert found["numpy"][1].startswith("BSD")  # an old one names a classifier
    assert {"torch", "sympy"} <= set(found)  # what torch needs too
    assert "pytest" not in found
    assert cli.main(["doctor", "--licenses"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_lines_are_aligned():
    findings = [Finding("PASS", "torch", "2.13.0"), Finding("WARN", "deepspeed", "none", "pip it")]
    assert doctor.format_findings(findings).splitlines() == [
        "PASS  torch      2.13.0",
        "WARN  deepspeed  none",
        "                 fix: pip it",
    ]
    assert doctor.format_findings([]) == ""


def test_shim_in_a_fresh_process():
    code = """
import torch
from hibio.backbones.networks import ensure_torchvision
first = ensure_torchvision()
assert first == ensure_torchvision()
import timm
from torchvision.extension import _has_ops
assert first == _has_ops()
model = timm.create_model("resnet10t", pretrained=False, num_classes=0).eval()
assert model(torch.zeros(1, 3, 64, 64)).shape == (1, model.num_features)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_shim_lets_other_failures_through(monkeypatch):
    from hibio.backbones import networks as torchvision_ops

    def fails(name: str):
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torchvision_ops.importlib, "import_module", fails)
    with pytest.raises(RuntimeError, match="driver too old"):
        torchvision_ops.ensure_torchvision()
