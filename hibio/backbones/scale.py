"""Whether patches have the resolution that an encoder was trained at."""

from __future__ import annotations

import math

from hibio.backbones.registry import Backbone

#: Differences up to this share are not told.
TOLERANCE = 0.2


def scale_note(backbone: Backbone, patch_um: float, patch_px: int, slide_mpp: float) -> str:
    """What to know of the resolution, in one line; "" when it is what the encoder expects.

    The whole patch is resized to the encoder's input, so the encoder sees ``patch_um / input_px``
    micrometres a pixel, with the detail of the coarsest step before: the slide or the stored patch.

    Args:
        backbone: the encoder; nothing is told of those for natural images.
        patch_um: width of a patch, micrometres.
        patch_px: width of a stored patch, pixels.
        slide_mpp: micrometres per level-0 pixel of the slide.
    """
    if not backbone.mpp:
        return ""
    seen = patch_um / backbone.input_px
    expected = min(backbone.mpp, key=lambda mpp: abs(math.log(seen / mpp)))
    if abs(seen / expected - 1.0) > TOLERANCE:
        return (
            f"sees {seen:.3g} um/px, was trained at {expected:g}: prepare with "
            f"--patch-um {expected * backbone.input_px:g}"
        )
    stored = patch_um / patch_px
    if max(stored, slide_mpp) / expected <= 1.0 + TOLERANCE:
        return ""
    if slide_mpp >= stored:
        return f"the slide has only {slide_mpp:.3g} um/px, the encoder was trained at {expected:g}"
    return (
        f"stored at {stored:.3g} um/px, the encoder was trained at {expected:g}: prepare with "
        f"--patch-px {math.ceil(patch_um / expected)}"
    )
