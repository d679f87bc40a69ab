"""Writes metrics.json files as `evaluate` leaves them, with invented numbers."""

import copy
import json
from pathlib import Path
from typing import Any

from PIL import Image

DIGEST = "3f2a" * 16
PROTOCOL = {
    "preset": "dcae", "n": 50_000, "data": "imagenet-val-512", "data_digest": "0123456789abcdef",
    "reference": "imagenet-val-512", "reference_digest": "0123456789abcdef", "reference_n": 50_000,
    "crop": "centre", "resolution": 512, "quantisation": "uint8",
    "resize": {"features": "half_pixel"}, "weights": "ema", "dtype": "float32",
    "matmul_precision": "highest", "nets": {"inception": DIGEST, "lpips": DIGEST[::-1]},
    "commit": "0123abc",
}  # fmt: skip
SCORES = {"psnr": 26.15012, "ssim": 0.71049, "lpips": 0.0803, "rfid": 0.21683, "latent-rms": 3.4593}
IN64 = "dc-ae-f64c128-in-1.0"


def protocol(**fields: Any) -> dict[str, Any]:
    """PROTOCOL with other values; None takes a field out."""
    found = copy.deepcopy(PROTOCOL) | fields
    return {name: value for name, value in found.items() if value is not None}


def result(
    name: str = "512", kind: str = "autoencoder", scores: dict[str, float] | None = None,
    about: dict[str, dict] | None = None, **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    """One entry of "results"; `about`: more of single scores; `fields`: of the entry."""
    known = fields.pop("protocol", None) or protocol()
    values = SCORES if scores is None else scores
    made = {
        key: {"label": _label(key, known), "value": value, "error": None, "comparable": True,
              "note": "", **(about or {}).get(key, {})}
        for key, value in values.items()
    }  # fmt: skip
    subject = {"source": IN64, "release": IN64, "weights": "ema", "encoder": "ab" * 16}
    return {
        "name": name, "kind": kind, "subject": subject, "scores": made, "protocol": known,
        "pictures": [], **fields,
    }  # fmt: skip


def _label(key: str, known: dict[str, Any]) -> str:
    n = known["n"]
    count = f"{n // 1000}k" if n % 1000 == 0 else str(n)
    return f"{key}{count}[{known['reference']}]"


def record(*results: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A whole file."""
    made = {
        "command": "python -m dcae_jax evaluate", "time": "2026-01-02T03:04:05+00:00",
        "versions": {"jax": "0.10.2"}, "commit": "0123abc", "device": "1 x cpu", "processes": 1,
        "seconds": 12.5,
    }  # fmt: skip
    return {"format": "dcae_jax.metrics/1", "results": list(results), "made": made, **fields}


def write(folder: Path, *results: dict[str, Any], pictures: bool = False, **fields: Any) -> Path:
    """metrics.json of these results in the folder, and the pictures that they name."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in results:
        for name in entry["pictures"] if pictures else ():
            Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(folder / name)
    (folder / "metrics.json").write_text(json.dumps(record(*results, **fields)))
    return folder / "metrics.json"
