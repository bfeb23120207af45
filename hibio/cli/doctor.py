"""`hibio doctor`: what this machine lacks, each with its remedy; and what acts in a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import operator
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hibio import __version__
from hibio.cli.command import Command
from preprocessing.findings import Finding, failed

_GIB = 1024**3

#: Extra of the package -> what it is for.
_EXTRAS = {
    "encoders": "frozen and tuned patch encoders: `hibio features`, data.image: patches",
    "hub": "weights and shared models of the hub",
    "slide": "a second reader of slides (pyvips)",
    "czi": "what OpenSlide does not read of CZI",
    "hdf5": "AnnData packed by other filters than gzip and lzf",
    "parquet": "tables in parquet: Space Ranger, Visium HD, Xenium",
    "spatialdata": "SpatialData folders, OME-Zarr",
    "view": "`hibio view`: slides in a browser",
    "tracking": "`log.to`: tensorboard, wandb, mlflow",
    "train": "training over several GPUs with ZeRO",
    "search": "`hibio index`, `hibio search`",
    "cluster": "`--scheduler`: slides and jobs on a Dask cluster",
    "completion": "completion of commands by the shell",
}


def diagnose() -> list[Finding]:
    """Look at this machine and this environment.

    Returns:
        One finding a subject: required packages, what only shows when it is loaded (torch and
        torchvision, OpenSlide, HDF5), devices, optional packages, disk space.
    """
    where = f"{platform.system()} {platform.machine()}"
    return [
        Finding("PASS", "python", f"{platform.python_version()} on {where}"),
        names_of_others(metadata.packages_distributions()),
        *required_packages(_requirements("hibio")),
        _torchvision(),
        _library("OpenSlide", "openslide", "__library_version__", "openslide-python openslide-bin"),
        _library("HDF5", "h5py", "version.hdf5_version", "--force-reinstall h5py"),
        _cpu(),
        _cuda(),
        *optional_packages(),
        disk_space(Path(tempfile.gettempdir())),
    ]


def names_of_others(owners: Mapping[str, Sequence[str]]) -> Finding:
    """Whether another project has installed a package of the same name over one of ours.

    What lies in a folder that Python looks into first was refused when `hibio` was imported.

    Args:
        owners: package -> distributions that brought it.
    """
    subject = "hibio"
    others = {
        name: [owner for owner in dict.fromkeys(owners.get(name, ())) if owner != "hibio"]
        for name in ("pathways", "preprocessing", "eval")
    }
    taken = {name: by for name, by in others.items() if by}
    if not taken:
        place = Path(__file__).resolve().parents[1]
        return Finding("PASS", subject, f"{__version__} in {place}; no file hides its packages")
    told = "; ".join(f"{name} is also of {', '.join(by)}" for name, by in taken.items())
    remove = " ".join(dict.fromkeys(one for by in taken.values() for one in by))
    fix = f"pip uninstall {remove}; pip install --force-reinstall --no-deps hibio"
    return Finding("FAIL", subject, f"{told}, whose files lie among ours", fix)


def format_findings(findings: Sequence[Finding]) -> str:
    """Aligned lines, `LEVEL  subject  message`, each fix on a line of its own below."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level}  {finding.subject:<{width}}  {finding.message}".rstrip())
        if finding.fix:
            lines.append(f"{'':<{width + 6}}  fix: {finding.fix}")
    return "\n".join(lines)


def tell_findings(findings: list[Finding]) -> int:
    """Print findings; the exit code: 1 when one is a FAIL."""
    print(format_findings(findings))
    return 1 if failed(findings) else 0


def required_packages(requirements: Iterable[Requirement]) -> list[Finding]:
    """Compare what is installed with the ranges of the package's own requirements."""
    findings = []
    for requirement in requirements:
        found = _version(requirement.name)
        fix = f"pip install '{requirement}'"
        if found is None:
            wanted = f"not installed, {requirement.specifier or 'any version'} is needed"
            findings.append(Finding("FAIL", requirement.name, wanted, fix))
        elif not requirement.specifier.contains(found, prereleases=True):
            wanted = f"{found}, expected {requirement.specifier}"
            findings.append(Finding("FAIL", requirement.name, wanted, fix))
        else:
            findings.append(Finding("PASS", requirement.name, found))
    return findings


def disk_space(folder: Path) -> Finding:
    """Free space where temporary files go."""
    free = shutil.disk_usage(folder).free / _GIB
    message = f"{free:.1f} GiB free in {folder}"
    fix = "free some space or point TMPDIR to a larger disk"
    if free < 0.5:
        return Finding("FAIL", "temporary files", message, fix)
    if free < 5:
        return Finding("WARN", "temporary files", message, fix)
    return Finding("PASS", "temporary files", message)


def _requirements(package: str, extra: str = "") -> list[Requirement]:
    """Requirements of an installed package that hold here: its own, or what an extra adds."""
    try:
        texts = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return [] if extra else [Requirement(package)]
    parsed = [Requirement(text) for text in texts]
    if not extra:
        return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    added = [r for r in parsed if r.marker is not None and not r.marker.evaluate({"extra": ""})]
    return [r for r in added if r.marker is not None and r.marker.evaluate({"extra": extra})]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torchvision() -> Finding:
    """The two come in pairs; torchvision names its partner exactly."""
    subject = "torch + torchvision"
    if _version("torch") is None or _version("torchvision") is None:
        told = "one of the two is not installed; optional: encoders of patches"
        return Finding("WARN", subject, told, "pip install 'hibio[encoders]'")
    for partner in _requirements("torchvision"):
        found = _version("torch") or ""
        if partner.name == "torch" and not partner.specifier.contains(found, prereleases=True):
            message = f"torch {found}, but this torchvision was built for torch{partner.specifier}"
            return Finding("FAIL", subject, message, f"pip install 'torch{partner.specifier}'")
    from hibio.backbones.networks import ensure_torchvision
    from hibio.config.files import ConfigError

    try:
        compiled = ensure_torchvision()
    except (ConfigError, ImportError, OSError, RuntimeError) as error:
        fix = "reinstall both: pip install --force-reinstall torch torchvision"
        return Finding("FAIL", subject, f"cannot be imported: {_first_line(error)}", fix)
    extra = "" if compiled else "; without compiled operators (not needed by HiBio)"
    return Finding("PASS", subject, f"a pair that loads{extra}")


def _library(subject: str, module: str, version: str, fix: str) -> Finding:
    """A compiled library, loaded: ``version`` is the attribute that tells its own."""
    try:
        found = operator.attrgetter(version)(importlib.import_module(module))
    except (ImportError, OSError) as error:
        told = f"{module} cannot be loaded: {_first_line(error)}"
        return Finding("FAIL", subject, told, f"pip install {fix}")
    return Finding("PASS", subject, f"library {found}")


def _cpu() -> Finding:
    """Cores that this process may use, and the machine's memory."""
    may_use = getattr(os, "sched_getaffinity", None)
    cores = len(may_use(0)) if may_use else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    except (AttributeError, ValueError, OSError):
        message = f"{cores} cores, memory unknown on {platform.system()}"
        return Finding("WARN", "CPU", message, "have at least 8 GiB of memory")
    message = f"{cores} cores, {memory:.0f} GiB memory"
    if memory < 7:
        fix = "use smaller batches and fewer workers, or a machine with 8 GiB or more"
        return Finding("WARN", "CPU", message, fix)
    return Finding("PASS", "CPU", message)


def _cuda() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return Finding("FAIL", "CUDA", f"torch cannot be loaded: {_first_line(error)}", "see torch")
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        fix = "fine for the demo; for training install a CUDA build of torch and the NVIDIA driver"
        return Finding("WARN", "CUDA", f"no device (torch is {build}); the CPU is used", fix)
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    listed = ", ".join(f"{d.name} {d.total_memory / _GIB:.0f} GiB" for d in devices)
    return Finding("PASS", "CUDA", f"{torch.version.cuda}: {listed}")


def optional_packages() -> list[Finding]:
    """What the extras bring, looked up and not imported: some of it takes seconds or compiles.

    Returns:
        One finding a package, by the first extra that names it; WARN where it is missing.
    """
    found: dict[str, Finding] = {}
    for extra, purpose in _EXTRAS.items():
        for requirement in _requirements("hibio", extra):
            name, version = requirement.name, _version(requirement.name)
            if name in found:
                continue
            fix = f"pip install 'hibio[{extra}]'"
            if version is None:
                told = f"not installed; optional: {purpose}"
                found[name] = Finding("WARN", name, told, fix)
            elif not requirement.specifier.contains(version, prereleases=True):
                told = f"{version}, expected {requirement.specifier} (optional)"
                found[name] = Finding("WARN", name, told, fix)
            else:
                found[name] = Finding("PASS", name, f"{version} (optional)")
    return list(found.values())


def licences() -> list[tuple[str, str, str]]:
    """Name, version and licence, as each declares it, of every package that comes with HiBio.

    They are what the base and the extras need, and what these need in turn, where it is installed.
    """
    found: dict[str, tuple[str, str, str]] = {}
    todo = [r.name for extra in ("", *_EXTRAS) for r in _requirements("hibio", extra)]
    while todo:
        name = canonicalize_name(todo.pop())
        version = _version(name)
        if name not in found and version is not None:
            found[name] = (name, version, _licence(metadata.metadata(name)))
            todo += [requirement.name for requirement in _requirements(name)]
    return sorted(found.values())


def _licence(declared: Any) -> str:
    """SPDX where it is declared, else the classifiers, else the first line of the text."""
    if declared.get("License-Expression"):
        return str(declared["License-Expression"])
    classified = [line for line in declared.get_all("Classifier") or () if "License ::" in line]
    named = [line.rpartition(" :: ")[2] for line in classified]
    text = str(declared.get("License") or "").strip()
    return ", ".join(named) or (text.splitlines()[0][:60] if text else "not declared")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def what_acts(checkpoint: Path, stores: Path) -> list[dict[str, Any]]:
    """Every path of a checkpoint's model at the start of its training and after it.

    Args:
        checkpoint: its folder, or that of its job.
        stores: holds at least one slide that it was trained on.

    Returns:
        One row a path, see :func:`hibio.paths.beside`.

    Raises:
        ConfigError: no checkpoint, or no training slide of it among the stores.
    """
    from hibio.checkpoint import CONFIG, find_checkpoint
    from hibio.config.files import ConfigError, load_saved
    from hibio.config.run import RunConfig
    from hibio.data.dataset import PreparedSlides
    from hibio.data.splits import read_entries
    from hibio.model import HiBio
    from hibio.paths import beside, path_shares
    from hibio.run import Job, new_model, start_of
    from preprocessing.store.read import stores_in

    folder = find_checkpoint(checkpoint) or checkpoint
    trained = HiBio.from_checkpoint(folder)
    config = load_saved(RunConfig, folder / CONFIG)
    known = set(trained.artifacts.train_slides)
    entries = [one for one in read_entries(stores_in(stores)) if one.slide_id in known]
    if not entries:
        raise ConfigError(
            f"{stores}: none of the slides that {folder} was trained on "
            f"({', '.join(sorted(known)[:3])} ...); give the folder of its training stores"
        )
    dataset = PreparedSlides(entries, trained.artifacts, None)
    start = start_of(Job(config, config.folds[0], config.seeds[0], folder))
    vision = dataclasses.replace(trained.config.vision, weights=None, pretrained=False)
    before = new_model(
        dataclasses.replace(trained.config, vision=vision), dataset, config.seeds[0], start
    )
    batch = dataset.sample(trained.halo)
    return beside(path_shares(before, batch), path_shares(trained, batch))


def format_paths(rows: Sequence[dict[str, Any]]) -> str:
    """An aligned table; what makes less than 1 % of the output after training is marked."""
    lines = [("path", "output", "", "token", "", "")]
    lines.append(("", "start", "trained", "start", "trained", ""))
    for row in rows:
        parts = [row[when] for when in ("start", "trained")]
        numbers = [f"{one['output']:.3f}" for one in parts]
        numbers += ["" if one["token"] is None else f"{one['token']:.3f}" for one in parts]
        names = parts[1]["facts"]
        told = [f"{n} {parts[0]['facts'][n]:.3g} -> {parts[1]['facts'][n]:.3g}" for n in names]
        told += [] if row["acts"] else ["does not act"]
        lines.append((row["path"], *numbers, "; ".join(told)))
    widths = [max(len(line[place]) for line in lines) for place in range(5)]
    return "\n".join(
        "  ".join(
            [f"{line[0]:<{widths[0]}}", *(f"{line[i]:>{widths[i]}}" for i in range(1, 5)), line[5]]
        ).rstrip()
        for line in lines
    )


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="tell what acts in this model instead"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="its training stores")
    parser.add_argument("--json", action="store_true", help="as JSON, e.g. for an issue")
    parser.add_argument(
        "--licenses", action="store_true", help="tell the licence of every package instead"
    )


def doctor(options: argparse.Namespace) -> int:
    """``hibio doctor``."""
    from hibio.config.files import ConfigError

    if options.licenses:
        found = licences()
        lines = [f"{name:<28} {version:<18} {licence}" for name, version, licence in found]
        print(json.dumps(found, indent=1) if options.json else "\n".join(lines))
        return 0
    if options.checkpoint is None:
        if options.data is not None:
            raise ConfigError("--data goes with --checkpoint DIR")
        findings = diagnose()
        if not options.json:
            return tell_findings(findings)
        print(json.dumps([dataclasses.asdict(one) for one in findings], indent=1))
        return 1 if failed(findings) else 0
    if options.data is None:
        raise ConfigError("--checkpoint needs --data DIR, the stores that it was trained on")
    rows = what_acts(options.checkpoint, options.data)
    print(json.dumps(rows, indent=1) if options.json else format_paths(rows))
    return 0


COMMANDS = (
    Command(
        "doctor",
        "versions, devices and optional parts, each with its fix; or what acts in a model",
        "hibio doctor --checkpoint runs/demo/hibio/fold-A/seed-0 --data stores",
        doctor,
        _doctor_arguments,
    ),
)
