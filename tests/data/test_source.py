"""What a reader keeps in memory stays within its bound, counted with all that Python puts around it."""

import gc
import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.source import Source


class Repeated(ImageIndex):
    """One image again and again, in new memory each time."""

    def __init__(self, count: int) -> None:
        super().__init__(Path("/nowhere"), ["a"], np.zeros(count))
        file = io.BytesIO()
        Image.new("L", (9, 9), 100).save(file, "PNG")
        self.data, self.reads = file.getvalue(), 0

    def path(self, i: int) -> str:
        return f"/nowhere/{i}"

    def holder(self, i: int) -> Path:
        return self.root

    def read(self, i: int) -> bytes:
        self.reads += 1
        return bytes(bytearray(self.data))


@pytest.mark.parametrize("crop, halvings", [("adm", 3), ("later", 0)])
def test_kept_images_take_no_more_memory_than_they_may(crop, halvings):
    index, most = Repeated(1200), 400_000
    source = Source(index, 0, size=4, crop=crop, halvings=halvings, kept_bytes=most)
    for _ in source.items([0]):
        pass
    gc.collect()
    tracemalloc.start()
    for _ in source.items(range(1, 1200)):
        pass
    gc.collect()
    ours = [tracemalloc.Filter(True, file) for file in (__file__, "*pixelgen_fast*")]  # not those of other threads
    now = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(ours).traces)
    tracemalloc.stop()
    assert most / 3 < now < most
    before = index.reads
    for _ in source.items(range(1200)):
        pass
    assert before == 1200 and 200 < 1200 - (index.reads - before) < 1000


def test_nothing_is_kept_where_nothing_may_be():
    index = Repeated(10)
    source = Source(index, 0, size=9, crop="none", halvings=0, kept_bytes=0)
    for _ in range(2):
        assert len(list(source.items(range(10)))) == 10
    assert index.reads == 20
