"""The verb that opens the studio, a web page to work with a model."""

from __future__ import annotations

import ipaddress
import os
import threading
import webbrowser
from typing import TYPE_CHECKING, Any

from unilip.cli.options import LOADING, Options, Verb, whole
from unilip.cli.terminal import describe_model, load, say
from unilip.errors import UniLIPError

if TYPE_CHECKING:
    from unilip.serve.studio import About, Samples

PASSWORD = "UNILIP_PASSWORD"
CAN = (
    "draw, change, describe and answer about scenes of one to four flat emoji drawings on a plain background, at "
    "112 px: kinds of things, counts, colours, places."
)
CANNOT = (
    "photographs, faces, writing, anything else than its drawings: a photograph comes back as a blurred sketch, and a "
    "prompt about unknown things draws something it knows. It is small and often wrong; its mistakes are shown as they "
    "are."
)
OTHER = "what it was trained for; this page asks nothing of it that its parts cannot do."


def is_local(host: str) -> bool:
    """Whether an address is this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def samples() -> Samples:
    """What comes with the package to try, for the page."""
    from unilip.demo import examples
    from unilip.serve.studio import Samples

    found = examples()
    return Samples(
        prompts=found.prompts,
        pictures=[picture.path for picture in found.pictures],
        edits=[(edit.source, edit.instruction) for edit in found.edits],
        questions=[(picture.path, picture.questions[0].question) for picture in found.pictures[:4]],
    )


def about(o: Options, name: str) -> About:
    """What the page says of the model."""
    from unilip.serve.studio import About

    return About(name, CAN, CANNOT) if o.model is None else About(name, OTHER)


def studio(o: Options) -> int:
    """Serve the page until it is interrupted."""
    password = o.password if o.password is not None else os.environ.get(PASSWORD)
    if password is not None and not password.strip():
        raise UniLIPError(f"The password is empty; give one, or leave --password and {PASSWORD} out.")
    local = is_local(o.host)
    if not local and not password:
        raise UniLIPError(
            f"--host {o.host} can be reached from other machines; give a --password too, or set {PASSWORD}."
        )
    import uvicorn

    from unilip.serve.engine import Engine
    from unilip.serve.studio import create_app

    model = load(o)
    names = describe_model(o, model)
    shown = f"[{o.host}]" if ":" in o.host else o.host
    address = f"http://{'localhost' if o.host in ('0.0.0.0', '::') else shown}:{o.port}/"
    with Engine(model) as engine:
        hosts = ["localhost", "127.0.0.1", "[::1]", o.host] if local else ["*"]
        app = create_app(
            engine, about(o, names["model"]), samples(), hosts=hosts, password=password, metadata=o.metadata
        )
        say(f"{names['model']} on {names['device']}; the studio is at {address} (Ctrl+C ends it)")
        if o.open:
            threading.Timer(1.0, webbrowser.open, (address,)).start()
        config = uvicorn.Config(
            app, host=o.host, port=o.port, log_level="info" if o.debug else "warning", timeout_graceful_shutdown=3
        )
        server = uvicorn.Server(config)
        try:
            server.run()
        except SystemExit as stop:  # uvicorn's way to say that it could not start
            raise UniLIPError(f"The studio could not start at {address}; is port {o.port} taken? See --port.") from stop
    return 0


OPTIONS: dict[str, dict[str, Any]] = {
    "--host": dict(
        default="127.0.0.1", metavar="ADDRESS", help="where to listen; any but this machine needs a key or password"
    ),
    "--port": dict(type=whole(0, 65535), default=7860, metavar="N", help="the TCP port (7860)"),
    "--password": dict(
        metavar="TEXT", help=f"ask for it, and the user unilip, before the page is shown ({PASSWORD} is read too)"
    ),
    "--open": dict(action="store_true", help="open the page in a browser"),
}

VERBS: dict[str, Verb] = {
    "studio": Verb(
        studio,
        "[OPTIONS]",
        "Open a web page to chat, draw, edit and reconstruct. It needs no other host, and reports to nobody.",
        "unilip studio --open\nunilip studio --model runs/pico/sft/final --port 8080",
        ("--host", "--port", "--password", "--open", "--no-metadata", *LOADING, "--debug"),
        changes={"--port": dict(default=7860, help="the TCP port (7860)")},
    ),
}
