"""The verb that opens the studio, a web page to work with a model."""

from __future__ import annotations

import os
import threading
import webbrowser
from typing import TYPE_CHECKING, Any

from unilip.cli.options import LOADING, Options, Verb
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
    from unilip.serve.guard import LOCAL_HOSTS
    from unilip.serve.server import MIN_KEY, is_local, listen, run

    local = is_local(o.host)
    if not local and len(password or "") < MIN_KEY:
        raise UniLIPError(
            f"--host {o.host} can be reached from other machines; give a --password of at least {MIN_KEY} characters, "
            f"or set {PASSWORD}."
        )
    taken = listen(o.host, o.port)
    port = taken.getsockname()[1]
    host = "localhost" if o.host in ("0.0.0.0", "::") else f"[{o.host.strip('[]')}]" if ":" in o.host else o.host
    from unilip.serve import log
    from unilip.serve.engine import Engine
    from unilip.serve.studio import create_app

    log.set_up("debug" if o.debug else o.log_level, o.log_format, o.access_log)

    with taken:
        model = load(o)
        names = describe_model(o, model)
        with Engine(model) as engine:
            app = create_app(
                engine, about(o, names["model"]), samples(), hosts=[*LOCAL_HOSTS, host.lower()] if local else ["*"],
                origins=o.allow_origin or (), password=password, metadata=o.metadata,
            )  # fmt: skip
            address = f"http://{host}:{port}/"
            say(f"{names['model']} on {names['device']}; the studio is at {address} (Ctrl+C ends it)")
            if o.open:
                threading.Timer(1.0, webbrowser.open, (address,)).start()
            run(app, taken, 3.0)
    return 0


OPTIONS: dict[str, dict[str, Any]] = {
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
        (
            "--host",
            "--port",
            "--password",
            "--open",
            "--allow-origin",
            "--no-metadata",
            *LOADING,
            "--decoder",
            "--log-level",
            "--log-format",
            "--access-log",
            "--debug",
        ),
        changes={"--port": dict(default=7860, help="the TCP port (7860)")},
    ),
}
