"""What all pages are made of: templates, tables, embedded pictures.  Free of jax."""

import base64
import io
from dataclasses import dataclass, field
from typing import Any

from etils import epath

PICTURE_BYTES = 3_000_000  # of all pictures together; base64 makes 4 MB of them


def page(template: str, values: dict[str, Any]) -> str:
    """A template of this folder with its values, which are escaped unless they are markup."""
    import jinja2

    folder = epath.resource_path("dcae_jax") / "report"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text()),
    )  # fmt: skip
    return environment.get_template(template).render(**values)


@dataclass(slots=True)
class Table:
    """Cells as text; `rules` are rows before which a line is drawn, `notes` stand below."""

    head: list[str]
    rows: list[list[str]]
    rules: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Picture:
    """One embedded picture with what stands below it."""

    caption: str
    note: str
    uri: str


def embedded(caption: str, scores: str, path: epath.Path, budget: int) -> Picture:
    """The file itself where it is small enough, else a JPEG, made smaller until it fits."""
    data = path.read_bytes()
    if len(data) <= budget:
        return Picture(caption, scores, _uri("png", data))
    data, size = _as_jpeg(data, budget)
    note = f"{scores}{'; ' if scores else ''}shown as JPEG, {size}; lossless: {path.name}"
    return Picture(caption, note, _uri("jpeg", data))


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _as_jpeg(png: bytes, budget: int) -> tuple[bytes, str]:
    """(JPEG bytes within the budget, "full size" or its share of the width)."""
    from PIL import Image

    original = Image.open(io.BytesIO(png)).convert("RGB")
    for scale in (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1):
        size = (max(round(original.width * scale), 1), max(round(original.height * scale), 1))
        image = original if scale == 1.0 else original.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=92, subsampling=0)
        if buffer.tell() <= budget:
            break
    return buffer.getvalue(), "full size" if scale == 1.0 else f"{scale:.0%} of its width"
