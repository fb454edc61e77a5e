"""What `data.root` may name: the embedded digits, or any data set that index.py opens."""

from __future__ import annotations

from pixelgen_fast.data.digits import write_digits
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.index import open_index
from pixelgen_fast.errors import InputError

DIGITS = "digits"


def open_root(root: str, expected_classes: int | None = None) -> ImageIndex:
    """Open a data set. "digits" is scikit-learn's handwritten digits, written to the cache directory once.

    Raises ValueError when the data set has another number of classes than expected, and what `open_index` raises.
    """
    index = open_index(write_digits() if root == DIGITS else root)
    if expected_classes is not None and len(index.classes) != expected_classes:
        raise InputError(
            f"data.root {root} has {len(index.classes)} classes and data.num_classes is {expected_classes}; "
            "set data.num_classes to null to take what is there"
        )
    return index
