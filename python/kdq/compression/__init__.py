"""The whole road in one call: `compress`."""

from kdq.compression.report import CompressionReport
from kdq.compression.road import Compressed, compress

__all__ = ["Compressed", "CompressionReport", "compress"]
