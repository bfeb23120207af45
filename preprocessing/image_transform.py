"""From the places that a source gives to those of the picture: flips, turns, any affine map.

A transform is a (3, 3) matrix on columns (x, y, 1); it takes level-0 pixels as the coordinates and
the scale of a slide give them to level-0 pixels of the image file. The manifest column
`image_transform` names one: a word of `TURNS`, ``shift:DX DY`` and ``affine:A B C D E F`` in pixels
(x' = A x + B y + C, y' = D x + E y + F), or a file of 3 x 3 numbers; or one of Loupe, which
`preprocessing.readers.alignment` reads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preprocessing.errors import DataError

Matrix = NDArray[np.float64]
#: The picture of the spots became the picture at hand by this: (2, 2) on x, y (y downwards), about
#: the middle of the frame. rot90 is numpy's, against the clock; flip_x changes left and right.
TURNS: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "flip_x": ((-1, 0), (0, 1)),
    "flip_y": ((1, 0), (0, -1)),
    "rot90": ((0, 1), (-1, 0)),
    "rot180": ((-1, 0), (0, -1)),
    "rot270": ((0, -1), (1, 0)),
    "transpose": ((0, 1), (1, 0)),
    "transverse": ((0, -1), (-1, 0)),
}
FILES = (".csv", ".json")
_NUMBERS = {"shift": 2, "affine": 6}
_WAYS = (
    f"choose {', '.join(TURNS)}, 'shift:DX DY' or 'affine:A B C D E F' (pixels of the image), or a "
    "file: .csv of 3 x 3 numbers, .json of Loupe's alignment"
)


def turn_matrix(name: str, size: tuple[float, float]) -> Matrix:
    """Matrix of a word of `TURNS`; ``size``: (width, height) of the picture at hand, pixels."""
    turn, new = np.array(TURNS[name], dtype=np.float64), np.asarray(size, dtype=np.float64)
    old = new if turn[0, 0] else new[::-1]
    return matrix_of(np.column_stack([turn, new / 2 - turn @ old / 2]))


def matrix_of(rows: NDArray[np.float64]) -> Matrix:
    """The (3, 3) matrix of an affine map given as (2, 3)."""
    return np.vstack([rows, [0.0, 0.0, 1.0]])


def check_transform(text: str) -> None:
    """Check the words of a transform; files are not looked for.

    Raises:
        DataError: none of the forms; lists them.
    """
    if text not in TURNS and Path(text).suffix.lower() not in FILES:
        _numbers(text)


def _numbers(text: str) -> list[float]:
    kind, _, told = text.partition(":")
    try:
        numbers = [float(part) for part in told.replace(",", " ").split()]
    except ValueError:
        numbers = []
    if len(numbers) != _NUMBERS.get(kind) or not np.isfinite(numbers).all():
        raise DataError(f"image_transform {text!r} is not known; {_WAYS}")
    return numbers


def image_matrix(transform: str | Path, size: tuple[float, float]) -> Matrix:
    """The matrix of a transform.

    Args:
        transform: as the manifest column holds it.
        size: (width, height) of the image, level-0 pixels.

    Raises:
        DataError: unknown words, or a file that holds no usable transform.
    """
    if transform in TURNS:
        return turn_matrix(str(transform), size)
    path, transform = Path(transform), str(transform)
    if path.suffix.lower() in FILES:
        return read_matrix(path)
    numbers = _numbers(transform)
    if transform.startswith("shift"):
        numbers = [1.0, 0.0, numbers[0], 0.0, 1.0, numbers[1]]
    return _usable(matrix_of(np.reshape(numbers, (2, 3))), f"image_transform {transform!r}")


def read_matrix(path: Path) -> Matrix:
    """Read a text of 3 x 3 numbers, as 10x writes ``*_imagealignment.csv``.

    Raises:
        DataError: not such a text, or not an affine map.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").replace(",", " ").split("\n")
        rows = [[float(part) for part in line.split()] for line in lines if line.strip()]
        matrix = np.array(rows, dtype=np.float64)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a table of 3 x 3 numbers ({error})") from error
    return _usable(matrix, str(path))


def _usable(matrix: NDArray[Any], where: str) -> Matrix:
    """The matrix with a last row of exactly 0 0 1; refuses what is no affine map."""
    fine = matrix.shape == (3, 3) and np.isfinite(matrix).all() and matrix[2, 2] != 0
    if fine:
        matrix = matrix / matrix[2, 2]
        fine = np.abs(matrix[2, :2]).max() < 1e-6 and abs(np.linalg.det(matrix)) > 1e-12
    if not fine:
        raise DataError(
            f"{where}: expected an affine transform, 3 x 3 numbers with the last row 0 0 1; found "
            f"{np.array2string(np.asarray(matrix), separator=', ', threshold=16)}"
        )
    return matrix_of(matrix[:2])


def moved(xy: NDArray[np.float64], matrix: Matrix) -> NDArray[np.float64]:
    """Points (S, 2) under a transform (3, 3)."""
    return np.asarray(xy @ matrix[:2, :2].T + matrix[:2, 2])


def enlarges(matrix: Matrix) -> float:
    """Pixels after a transform per pixel before it."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))


def transform_text(matrix: Matrix, size: tuple[float, float], tolerance_px: float) -> str:
    """The shortest words for a transform, such as the manifest column takes.

    Args:
        matrix: (3, 3).
        size: (width, height) of the image, level-0 pixels.
        tolerance_px: how far a corner of the image may land elsewhere for a simpler form.
    """
    (width, height) = size
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], dtype=np.float64)
    there = moved(corners, matrix)
    for name in TURNS:
        if np.abs(moved(corners, turn_matrix(name, size)) - there).max() <= tolerance_px:
            return name
    shift = (there - corners).mean(axis=0)
    if np.abs(corners + shift - there).max() <= tolerance_px:
        return f"shift:{shift[0]:.6g} {shift[1]:.6g}"
    return "affine:" + " ".join(f"{value:.6g}" for value in matrix[:2].ravel())
