"""The files of the page, read once: a request can ask for one of these names, and names nothing on the disk."""

from importlib import resources
from pathlib import PurePath

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".png": "image/png"}
HEADERS = {  # that let a browser load nothing from elsewhere
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Vary": "Accept",
}


def files() -> dict[str, tuple[bytes, str]]:
    """Return content and media type of every file of the page by its name, example pictures among them."""
    home = resources.files("unilip")
    found: dict[str, tuple[bytes, str]] = {}
    for folder in (home / "serve" / "page", home / "weights" / "examples"):
        for one in folder.iterdir() if folder.is_dir() else ():
            if kind := KINDS.get(PurePath(one.name).suffix):
                found[one.name] = one.read_bytes(), kind
    return found
