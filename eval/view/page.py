"""The files of the page, and OpenSeadragon, which shows the slides and is got by npm."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

from hibio.config.files import ConfigError
from preprocessing.files import atomic_path

PAGE = Path(__file__).parent / "static"
VENDOR = PAGE / "vendor"  # made by `fetch_openseadragon`, never committed
OPENSEADRAGON = "openseadragon@6.1.1"
SHA256 = "b4ab2942f33b90e0448e4d20fc5ed14cee049f1f3ae49d70afd4b05e9a2f92d0"  # of its npm package
LICENCE, SCRIPT = "openseadragon.LICENSE.txt", "openseadragon.min.js"
_MEMBERS = {
    "package/build/openseadragon/openseadragon.min.js": SCRIPT,
    "package/LICENSE.txt": LICENCE,
}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".txt": "text/plain"}


def fetch_openseadragon(folder: Path = VENDOR) -> Path:
    """Get OpenSeadragon and its licence by npm, compared with the SHA-256 that is pinned here.

    Raises:
        ConfigError: npm is not there, cannot get it, or got another package.
    """
    with tempfile.TemporaryDirectory() as temporary:
        command = ["npm", "pack", OPENSEADRAGON, "--silent", "--pack-destination", temporary]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", "") or str(error)
            raise ConfigError(
                f"`{' '.join(command[:3])}` failed ({told.strip()[-300:]}); install Node.js with "
                "npm and try again where a package registry can be reached"
            ) from error
        (package,) = Path(temporary).glob("*.tgz")
        found = hashlib.sha256(package.read_bytes()).hexdigest()
        if found != SHA256:
            raise ConfigError(f"{OPENSEADRAGON} has sha256 {found}, expected {SHA256}; not used")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(package) as archive:
            for member, name in _MEMBERS.items():
                content = archive.extractfile(member)
                assert content is not None
                with atomic_path(folder / name) as target:
                    target.write_bytes(content.read())
    return folder / SCRIPT


def has_openseadragon() -> bool:
    """Whether it is there, so that the page can be shown."""
    return (VENDOR / SCRIPT).is_file()


def page_files() -> dict[str, Path]:
    """Name -> every file of the page.

    Raises:
        ConfigError: OpenSeadragon is not there.
    """
    files = {path.name: path for path in sorted([*PAGE.glob("*.*"), *VENDOR.glob("*.*")])}
    if not has_openseadragon():
        raise ConfigError(
            "this checkout has no OpenSeadragon, which shows the slides: run `make view-assets` "
            "(or `python -m eval.view.page`), which gets the pinned package by npm"
        )
    return files


def page_file(name: str) -> tuple[bytes, str]:
    """Content and type of a file of the page.

    Raises:
        ConfigError: there is none of this name, or OpenSeadragon is not there.
    """
    files = page_files()
    if name not in files:
        raise ConfigError("there is no such file")
    return files[name].read_bytes(), KINDS[files[name].suffix]


if __name__ == "__main__":
    try:
        print(fetch_openseadragon())
    except ConfigError as problem:
        raise SystemExit(f"hibio view: {problem}") from problem
