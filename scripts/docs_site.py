"""A hook of mkdocs: links that leave the folder of the docs lead to nothing on the site, so their text stands alone."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = posixpath.dirname(page.file.src_uri)

    def kept(match: re.Match[str]) -> str:
        text, target = match[1], posixpath.normpath(posixpath.join(here, match[2]))
        return match[0] if files.get_file_from_path(target) is not None else text

    return LINK.sub(kept, markdown)
