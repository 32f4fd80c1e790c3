"""Processors of vision-language models by name, with Pillow alone: without torchvision they do without videos."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import AutoProcessor, processing_utils
from transformers.utils import cached_file
from transformers.video_processing_utils import VideoProcessorMixin

CONFIGS = ("processor_config.json", "preprocessor_config.json")
"""files of a folder, or of a repository, that has a processor"""
_MAY_MISS: Any = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


class NoVideos(VideoProcessorMixin):
    """Stands where a processor wants something that reads videos, which needs torchvision; it reads none.

    `settings`: those of what it stands for, which are saved again.
    """

    merge_size = 2
    num_frames = 1
    fps = 1

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        self.settings = settings or {}

    def __call__(self, *videos: Any, **options: Any) -> Any:
        raise ValueError("videos: torchvision reads them; install it, or give pictures")

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    @classmethod
    def from_pretrained(cls, source: Any, **options: Any) -> NoVideos:  # type: ignore[override]
        for name, key in (("processor_config.json", "video_processor"), ("video_preprocessor_config.json", None)):
            file = cached_file(os.fspath(source), name, **_MAY_MISS)
            settings = json.loads(Path(file).read_text()) if file else {}
            if settings := settings.get(key, {}) if key else settings:
                return cls(settings)
        return cls()


def has_processor(source: str | os.PathLike[str], **where: Any) -> bool:
    """Whether a folder or a Hub repository has a processor beside its tokenizer."""
    return any(cached_file(os.fspath(source), name, **where, **_MAY_MISS) is not None for name in CONFIGS)


def load_processor(source: str | os.PathLike[str], **options: Any) -> Any:
    """The processor of a folder or a Hub repository; without torchvision one that reads pictures, not videos."""
    try:
        return AutoProcessor.from_pretrained(source, **options)
    except (ImportError, ValueError) as error:
        if "torchvision" not in str(error) and "num2words" not in str(error):
            raise
    with _without_videos():
        return AutoProcessor.from_pretrained(source, **options)


@contextmanager
def _without_videos() -> Iterator[None]:
    """Within it a processor that insists on a processor of videos gets `NoVideos`."""
    from transformers.models.smolvlm import processing_smolvlm

    module, table = processing_utils.transformers_module, type(processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING)
    loader_of = table.__getitem__

    def loader(autos: Any, kind: str) -> Any:
        return NoVideos if kind == "video_processor" else loader_of(autos, kind)

    with (
        mock.patch.object(table, "__getitem__", loader),
        mock.patch.object(module, "VideoProcessorMixin", VideoProcessorMixin, create=True),
        mock.patch.object(processing_smolvlm, "num2words", processing_smolvlm.num2words or str),
    ):
        yield
