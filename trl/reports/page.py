"""A page: a template with the common style, which escapes every text and loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Undefined
from markupsafe import Markup

STYLE = Path(__file__).parent / "templates" / "style.css"


def rendered(
    package: str,
    template: str,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    strict: bool = True,
    **values: Any,
) -> str:
    """The page of a template that lies in a package's folder `templates`. strict: a value that lacks is an error."""
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined if strict else Undefined,
        trim_blocks=True,
    )
    environment.filters |= dict(filters or {})
    style = Markup(STYLE.read_text(encoding="utf-8"))  # ours: no text of a run is in it
    return environment.get_template(template).render(style=style, **values)
