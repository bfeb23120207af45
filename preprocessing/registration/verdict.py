"""Is this the picture of these spots?

Docs/method.md 0.1. A slide answers it alone: the map of its counts is compared with the map of its
picture at the place given and at many others (flips, turns, shifts, half and twice the scale), and
with counts that are as smooth but lie anywhere (Moran spectral randomisation: Wagner and Dray,
2015). Lengths are in pitches: the median distance to the nearest spot, or more of many spots.
Shapes: S spots, n groups of spots, C candidate places; a place is (2, 3), from the pixels given.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from preprocessing.findings import Finding
from preprocessing.image_transform import TURNS, image_matrix, matrix_of, moved, transform_text
from preprocessing.registration.agreement import GIVEN, Agreement, Array
from preprocessing.store import SlidePicture, SlideStore
from preprocessing.tissue import DARK

Verdict = Literal["fits", "moved", "nowhere", "shuffled", "unknown"]
FITS: Verdict = "fits"
MOVED: Verdict = "moved"
NOWHERE: Verdict = "nowhere"
SHUFFLED: Verdict = "shuffled"
UNKNOWN: Verdict = "unknown"
# Limits of the verdict, set on the slides of benchmarks/registration.py.
FEWEST_SPOTS = 60  # of fewer nothing is said
SURE_SPOTS = 150  # of fewer it is not said that a picture fits nowhere
LEAST_MOVE = 0.7  # pitches: nearer is not another place
LEAST_GAIN = 3.5  # of agreement, in standard deviations of the null ...
LEAST_Z, LEAST_Z_ALONE = 3.0, 5.0  # ... which the best place also has; without outline
LEAST_OUTLINE_GAIN = 0.12
TRUSTED_OUTLINE = 0.75
LEAST_MORAN = 0.45  # of the smoothest component: shuffled 0.13 to 0.27, right 0.73 to 0.94
DARK_PICTURE = 90  # median grey value: bright-field pictures are brighter
LEAST_GENES = 21
LEAST_GLASS = 0.05  # of the picture, by which the edge of the tissue is known
# What is tried.
_STEPS = (-10, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 10)  # pitches
_SCALES = (1.0, 0.5, 2.0)
_TRIED, _STARTS = 250, 6  # places whose counts are compared; that are improved
_FIRST_STEP, _LAST_STEP, _MOST_STEPS = 0.5, 0.1, 40  # of the improvement, pitches
_TURN_STEP, _SCALE_STEP = np.radians(6.0), 0.06  # a pitch of them
_AWAY, _DEPTHS, _FEWEST_INSIDE, _FEWEST_PLACES = 3.0, (4.0, 3.0, 2.0), 60, 19  # for p


@dataclass(frozen=True)
class Registration:
    """What was found.

    Attributes:
        verdict: "fits", "moved" (another place fits better), "nowhere" (no place fits, or only by
            chance), "shuffled" (the counts have no order in space) or "unknown".
        reason: of "unknown", in words.
        n_spots: S.
        pitch_px: of the spots, level-0 pixels.
        z: agreement of picture and counts at the place given, in standard deviations above the
            null; NaN where it was not measured, as all that follow.
        z_best: at the best place.
        outline: share of the spots that are on tissue, less that of the ring around them.
        outline_best: at the best place.
        gain: agreement that the best place has more, in standard deviations.
        p: rank of the place given among places 3 pitches and more away, all on tissue, for the
            spots inside the tissue; NaN where there are fewer than 19 of these.
        shift: pitches between the two places, median of the spots.
        turn: words of the best place, such as "flip_x, turned by -6 degrees".
        matrix: (3, 3) from the places given to the best ones, level-0 pixels; None unless "moved"
            and trusted (by the outline, or because there is no glass beside the tissue).
        correction: this matrix in the words of the manifest column image_transform; "".
    """

    verdict: Verdict
    reason: str = ""
    n_spots: int = 0
    pitch_px: float = np.nan
    z: float = np.nan
    z_best: float = np.nan
    outline: float = np.nan
    outline_best: float = np.nan
    gain: float = np.nan
    p: float = np.nan
    shift: float = np.nan
    turn: str = ""
    matrix: NDArray[np.float64] | None = None
    correction: str = ""

    @property
    def warns(self) -> bool:
        """Whether something is wrong."""
        return self.verdict in (MOVED, NOWHERE, SHUFFLED)

    @property
    def figures(self) -> str:
        """The numbers that the verdict rests on, in words."""
        told = f"agreement z {self.z:.1f} as given"
        if self.warns:
            told += f", {self.z_best:.1f} at the best place"
        told += f"; outline {self.outline:.2f}"
        if self.warns:
            told += f", {self.outline_best:.2f} there"
        return told + ("" if np.isnan(self.p) else f"; p {self.p:.3f}")

    @property
    def message(self) -> str:
        """One sentence: whether the picture belongs to the spots."""
        if self.verdict == UNKNOWN:
            return f"cannot tell whether the image is the picture of these spots: {self.reason}"
        if self.verdict == FITS:
            return f"the image is the picture of these spots ({self.figures})"
        if self.verdict == SHUFFLED:
            return (
                "the counts have no order in space: their rows and the places do not belong "
                f"together ({self.figures})"
            )
        if self.verdict == NOWHERE:
            return f"the image does not look like the picture of these spots ({self.figures})"
        where = f"{self.shift:.1f} spots away" + f" ({self.turn})" * bool(self.turn)
        return (
            f"the spots do not lie where the image shows them; they fit {where}, or the image is "
            f"of a neighbouring section ({self.figures})"
        )

    @property
    def fix(self) -> str:
        """What to do; "" where nothing is wrong."""
        if self.correction:
            return (
                "look at the page of `hibio qc`; if the spots fit there, write into the manifest "
                f"column image_transform: {self.correction} (or prepare with --fix-registration)"
            )
        fixes = {
            MOVED: "look whether the image was flipped, turned, cropped or is another slide's; "
            "correct it, or write the manifest column image_transform",
            NOWHERE: "look whether image and counts are of one slide, and of one orientation",
            SHUFFLED: "look whether the table of spots is in the order of the counts",
        }
        return fixes.get(self.verdict, "")

    def finding(self, subject: str, correction: str = "") -> Finding:
        """The line of `hibio check`; ``correction``: what --fix-registration did before."""
        told = f" (places corrected by {correction})" if correction else ""
        return Finding("WARN" if self.warns else "PASS", subject, self.message + told, self.fix)


def store_registration(store: SlideStore) -> Registration:
    """Answer for a prepared slide, from its thumbnail and all its spots.

    Raises:
        DataError: the store is damaged.
    """
    small, downsample = store.thumbnail, store.thumbnail_downsample
    if small is None or downsample is None or not store.has_counts:
        return Registration(UNKNOWN, "it needs both an image and counts")
    width, height = map(int, store.attrs["slide_size_px0"])
    picture = SlidePicture((width, height), small, downsample, store.left_out_px0)
    return register(picture, store.xy_px0, store.counts(), store.image_transform)


def register(
    picture: SlidePicture,
    xy_px0: NDArray[np.float64],
    counts: csr_matrix,
    known: NDArray[np.float64] | None = None,
) -> Registration:
    """Say whether a picture is that of these spots, and where they fit better.

    Args:
        picture: some 8 to 30 pixels of its thumbnail between spots are enough.
        xy_px0: (S, 2) places, level-0 pixels.
        counts: (S, G) counts or intensities.
        known: (3, 3) transform by which the places came about, which a correction includes.
    """
    spots, down = len(xy_px0), picture.downsample
    reason = _unfit(picture.thumbnail, spots, counts)
    if reason:
        return Registration(UNKNOWN, reason, spots)
    others = picture.left_out_px0 / down
    agreement = Agreement(picture.thumbnail, xy_px0 / down, counts, others)
    found = _verdict(agreement, spots)
    found = replace(found, pitch_px=agreement.pitch * down)
    if found.matrix is None:
        return found
    matrix = found.matrix.copy()
    matrix[:2, 2] *= down
    tolerance = LEAST_MOVE * found.pitch_px
    matrix = _simplest(matrix, xy_px0, picture.size_px0, tolerance)
    whole = matrix if known is None else matrix @ known
    text = transform_text(whole, picture.size_px0, 0.5)
    return replace(found, matrix=matrix, correction=text)


def _simplest(
    matrix: NDArray[np.float64],
    xy: NDArray[np.float64],
    size: tuple[int, int],
    tolerance: float,
) -> NDArray[np.float64]:
    """A plain flip or turn of the picture, or a plain shift, where it takes the spots as far."""
    there = moved(xy, matrix)
    shift = matrix_of(np.column_stack([np.eye(2), (there - xy).mean(axis=0)]))
    for one in (*(image_matrix(name, size) for name in TURNS), shift):
        off = moved(xy, one) - there
        if np.hypot(*off.T).max() <= tolerance:
            return one
    return matrix


def _unfit(picture: NDArray[np.uint8], spots: int, counts: csr_matrix) -> str:
    """Why nothing can be said; "" where something can."""
    if spots < FEWEST_SPOTS:
        return f"{spots} spots, at least {FEWEST_SPOTS} are needed"
    if counts.shape[1] < LEAST_GENES:
        return f"{counts.shape[1]} genes, at least {LEAST_GENES} are needed"
    seen = picture[(picture > DARK).any(axis=2)]
    if len(seen) == 0 or float(np.median(seen)) < DARK_PICTURE:
        return "the image is dark; this is known for bright-field pictures only"
    return ""


@dataclass(frozen=True)
class _Pose:
    """A place in parts: turned about the middle of the spots, which goes to ``to`` + ``shift``."""

    to: NDArray[np.float64]
    turn: str = ""
    scale: float = 1.0
    angle: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)

    def place(self, middle: NDArray[np.float64]) -> NDArray[np.float64]:
        """The place (2, 3)."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        linear = self.scale * np.array([[cos, -sin], [sin, cos]])
        if self.turn:
            linear = linear @ np.array(TURNS[self.turn], dtype=np.float64)
        column = self.to + self.shift - linear @ middle
        return np.column_stack([linear, column])

    def stepped(self, part: int, step: float, pitch: float) -> "_Pose":
        """The pose a step away: 0 x, 1 y (pitches), 2 angle, 3 scale."""
        if part == 2:
            return replace(self, angle=self.angle + step * _TURN_STEP)
        if part == 3:
            return replace(self, scale=self.scale * (1 + step * _SCALE_STEP))
        shift = (self.shift[0] + step * pitch * (part == 0), self.shift[1] + step * pitch * part)
        return replace(self, shift=shift)

    @property
    def words(self) -> str:
        """What differs from the place given, but for shifts."""
        degrees = float(np.degrees(self.angle))
        words = [self.turn] if self.turn else []
        words += [f"turned by {degrees:.0f} degrees"] if abs(degrees) >= 1 else []
        words += [f"scaled by {self.scale:.2f}"] if abs(self.scale - 1) >= 0.05 else []
        return ", ".join(words)


def _poses(agreement: Agreement) -> list[_Pose]:
    """Flips, turns and scales about the middle of the picture, of the spots and of the tissue."""
    pitch, middle, size = agreement.pitch, agreement.middle, agreement.size.astype(np.float64)
    found = []
    for turn, scale in product(("", *TURNS), _SCALES):
        about = middle if not turn else moved(middle, image_matrix(turn, (size[0], size[1])))
        targets = [scale * about]
        for other in (middle, agreement.tissue_middle):
            if all(np.abs(other - one).max() > pitch for one in targets):
                targets.append(other)
        for to, x, y in product(targets, _STEPS, _STEPS):
            found.append(_Pose(to, turn, scale, 0.0, (x * pitch, y * pitch)))
    return found


def _places(agreement: Agreement, poses: list[_Pose]) -> NDArray[np.float64]:
    return np.stack([pose.place(agreement.middle) for pose in poses])


def _search(agreement: Agreement) -> tuple[_Pose, float, float]:
    """The best pose, what it gains over the place given, and the largest outline anywhere."""
    poses = [_Pose(agreement.middle), *_poses(agreement)]
    places = _places(agreement, poses)
    outline = agreement.outline(places)
    most = float(outline.max())
    tried = np.union1d([0], np.argsort(-outline, kind="stable")[:_TRIED])
    if trusted := most >= TRUSTED_OUTLINE:
        agreement.measure_at(places[int(outline.argmax())])
    else:  # the outline says nothing: look everywhere at the scale given
        plain = np.flatnonzero([pose.scale == 1 for pose in poses])
        tried = np.union1d(tried, plain[:: max(1, len(plain) // (2 * _TRIED))])
    totals = agreement.total(places[tried], outline[tried] if trusted else None)
    starts: list[int] = []
    for one in tried[np.argsort(-totals, kind="stable")]:
        if all(agreement.apart(places[one], places[other]) > 2 for other in starts):
            starts.append(int(one))
        if len(starts) == _STARTS:
            break
    improved = [_improved(agreement, poses[one], trusted) for one in dict.fromkeys((0, *starts))]
    best, total = max(improved, key=lambda found: found[1])
    return best, total - float(totals[np.searchsorted(tried, 0)]), most


def _improved(agreement: Agreement, pose: _Pose, trusted: bool) -> tuple[_Pose, float]:
    """Climb from a pose by steps of shift, angle and scale that get smaller; and its agreement."""

    def totals(poses: list[_Pose]) -> Array:
        places = _places(agreement, poses)
        return agreement.total(places, agreement.outline(places) if trusted else None)

    best, step = float(totals([pose])[0]), _FIRST_STEP
    for _ in range(_MOST_STEPS):
        near = [pose.stepped(k, s, agreement.pitch) for k in range(4) for s in (step, -step)]
        found = totals(near)
        if found.max() > best + 1e-9:
            pose, best = near[int(found.argmax())], float(found.max())
        elif step > _LAST_STEP:
            step /= 2
        else:
            break
    return pose, best


def _rank(agreement: Agreement) -> float:
    """Rank of the place given among others, all on tissue, of the spots inside the tissue: p.

    All tissue goes from its centre to its edge, so that a place at the edge says little.
    """
    inside = (agreement.inside(depth) for depth in _DEPTHS)
    only = next((mask for mask in inside if mask.sum() >= _FEWEST_INSIDE), None)
    if only is None:
        return float("nan")
    middle = agreement.middle_of(only)
    steps = [agreement.pitch * step for step in range(-6, 7)]
    places = np.stack(
        [
            _Pose(middle, turn, shift=shift).place(middle)
            for turn in ("", *TURNS)
            for shift in product(steps, steps)
        ]
    )
    places = places[agreement.distance(places) >= _AWAY]
    places = places[agreement.on_tissue(places, only) >= 0.98]
    if len(places) < _FEWEST_PLACES:
        return float("nan")
    found = agreement.counts_fit(np.concatenate([GIVEN[None], places]), only)
    return float((found[1:] >= found[0]).sum() + 1) / (len(places) + 1)


def _verdict(agreement: Agreement, spots: int) -> Registration:
    """Search, and compare with the limits; the matrix is in pixels of the thumbnail."""
    pose, gain, most = _search(agreement)
    best = pose.place(agreement.middle)
    z, z_best = agreement.z(GIVEN), agreement.z(best)
    outline, there = map(float, agreement.outline(np.stack([GIVEN, best])))
    most = max(most, there)
    trusted = most >= TRUSTED_OUTLINE
    shift = float(agreement.distance(best[None])[0])
    far = shift >= LEAST_MOVE or pose.turn != "" or abs(pose.scale - 1) > 0.25
    by_counts = gain >= LEAST_GAIN and z_best >= (LEAST_Z if trusted else LEAST_Z_ALONE)
    by_outline = trusted and there - outline >= LEAST_OUTLINE_GAIN
    found = Registration(
        FITS,
        n_spots=spots,
        z=z,
        z_best=z_best,
        outline=outline,
        outline_best=there,
        gain=gain,
        p=_rank(agreement),
        shift=shift,
        turn=pose.words,
    )
    if agreement.moran < LEAST_MORAN and z < LEAST_Z:
        return replace(found, verdict=SHUFFLED)
    if far and (by_counts or by_outline):
        sure = trusted or agreement.glass < LEAST_GLASS
        return replace(found, verdict=MOVED, matrix=matrix_of(best) if sure else None)
    if z >= (LEAST_Z if trusted else LEAST_Z_ALONE):
        return found
    if spots < SURE_SPOTS or agreement.glass < LEAST_GLASS:
        why = f"{spots} spots" if spots < SURE_SPOTS else "the tissue fills the image"
        return replace(found, verdict=UNKNOWN, reason=f"{why}, and {found.figures}")
    return replace(found, verdict=NOWHERE)
