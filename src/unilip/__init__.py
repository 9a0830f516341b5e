"""UniLIP: one CLIP encoder that understands, reconstructs, generates and edits images (arXiv 2507.23278).

    from unilip import UniLIP
    model = UniLIP.from_pretrained()
    model.generate("three yellow stars").images[0].save("stars.png")

Heavy libraries are imported when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ImageOutput", "UniLIP", "UniLIPConfig", "UniLIPError", "preset"]

if TYPE_CHECKING:
    from unilip.errors import UniLIPError
    from unilip.method.config import UniLIPConfig
    from unilip.model import ImageOutput, UniLIP
    from unilip.sizes import preset

_HOMES = {
    "ImageOutput": "unilip.model",
    "UniLIP": "unilip.model",
    "UniLIPConfig": "unilip.method.config",
    "UniLIPError": "unilip.errors",
    "preset": "unilip.sizes",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'unilip' has no attribute {name!r}")
