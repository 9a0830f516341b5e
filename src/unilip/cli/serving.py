"""The verbs that serve a model over HTTP: to other programs, and as a page in the browser."""

from __future__ import annotations

import os
import re
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unilip.cli.options import Options
from unilip.cli.terminal import adapter_of, describe_model, load, pick, plural, say, source_of
from unilip.errors import UniLIPError
from unilip.machine import choose_device

if TYPE_CHECKING:
    from unilip.model import UniLIP
    from unilip.serve.engine import Engine
    from unilip.serve.training import Trainer

KEYS = "UNILIP_API_KEY"
CAN = "scenes of one to four flat emoji drawings on a plain background: kinds of things, counts, colours, places."
CANNOT = (
    "photographs, faces, writing, or anything else than its drawings. It is small and often wrong; its mistakes are "
    "shown as they are."
)


def name_of(o: Options) -> str:
    """What the model is called to clients: never the path of a folder of this machine."""
    if o.model_name:
        return o.model_name
    if o.model is None:
        return "unilip"
    return Path(o.model).name if os.path.exists(o.model) else o.model


def about(o: Options, model: UniLIP) -> dict[str, Any]:
    """What the page says of a model, and what it offers to try."""
    from unilip import __version__
    from unilip.demo import examples

    parameters = sum(p.numel() for p in model.parameters())
    found = describe_model(o, model) | {"performance": o.performance, "version": __version__, "parameters": parameters}
    if o.model is None:
        given = examples()
        found |= {"can": CAN, "cannot": CANNOT, "prompts": given["prompts"]}
        found["edits"] = [(edit["source"], edit["instruction"]) for edit in given["edits"]]
        found["questions"] = [(one["file"], one["questions"][0]["question"]) for one in given["pictures"]]
    else:
        found["model"] = name_of(o)
    return found


def serve(o: Options) -> None:
    """Serve until a signal ends it."""
    from unilip.serve import log
    from unilip.serve.app import Settings, create_app
    from unilip.serve.guard import Rules
    from unilip.serve.metrics import Metrics
    from unilip.serve.server import check_access, listen, run

    log.set_up("debug" if o.debug else o.log_level, o.log_format, o.access_log)
    given = o.api_key or [key for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    keys = tuple(key.strip() for key in given)
    if not all(keys):
        raise UniLIPError(f"An --api-key is empty; give one, or leave it and {KEYS} out.")
    rules = check_access(o.host, Rules(keys, o.max_body * 2**20, o.rate_limit, origins=tuple(o.allow_origin or ())))
    pixels = int(o.max_pixels * 1e6)
    if o.max_replicas is not None and (o.ray is None or o.max_replicas < o.ray):
        raise UniLIPError("--max-replicas goes with --ray N, and must be at least N.")
    common = pick(o, "max_queue", "max_batch", "deadline") | {"adapters": offered(o)}
    taken = listen(o.host, o.port)
    metrics, trainer = Metrics(), None
    if o.ray is not None:
        engine, what = spread(o, common)
        facts: dict[str, Any] = {"model": name_of(o)}
    else:
        from unilip.serve.engine import Engine

        model = load(o)
        what, facts = f"{describe_model(o, model)['model']} on {model.device}", about(o, model)
        engine = Engine(model, on_batch=metrics.batch, **common)
        if hasattr(o, "runs"):
            trainer = training(o, engine)
            facts["trains"] = trainer is not None
    settings = Settings(name_of(o), rules, pixels, o.allow_url_images, o.metadata, o.drain, o.strict, o.chat, facts)
    app = create_app(engine, settings, metrics, trainer)
    number, port = taken.getsockname()[:2]
    host = f"[{number}]" if ":" in number else number
    page = getattr(o, "open", None)  # of the studio: whether to open it
    studio = f"http://{'localhost' if number in ('0.0.0.0', '::') else host}:{port}/"

    def started() -> None:
        key = "with an API key" if keys else "for this machine alone"
        if page is None:
            address = f"http://{host}:{port}"
            say(f"{what}; serving at {address}/v1 {key}, its description at {address}/docs (Ctrl+C ends it)")
            return
        say(f"{what}; the studio is at {studio} {key} (Ctrl+C ends it)")
        if page:
            threading.Timer(1.0, webbrowser.open, (studio,)).start()

    run(app, taken, o.drain, started)
    say("ended")


def training(o: Options, engine: Engine) -> Trainer | None:
    """Return what trains adapters of the engine's model, and lend those that it trained before; None: it cannot."""
    from unilip.checkpoints.hub import adapted
    from unilip.serve.training import Trainer
    from unilip.sizes import PRESETS

    if engine.config.name not in PRESETS:
        return None
    base = adapted(source_of(o)).base
    where = "embedded" if base is None else os.path.abspath(base) if os.path.exists(base) else str(base)
    trainer = Trainer(Path(o.runs), where, engine.config.name, str(engine.model.device), engine.lend)
    for name, folder in trainer.kept().items():
        if name not in engine.checker.adapters:
            try:
                engine.lend(name, folder)
            except UniLIPError as error:
                say(f"the adapter {name} is not lent: {error}")
    return trainer


def offered(o: Options) -> dict[str, tuple[str, float]]:
    """Take adapters with names, NAME=PATH[:SCALE], out of the options. Raises UniLIPError: a name twice, no adapter."""
    found: dict[str, tuple[str, float]] = {}
    given, o.adapter = o.adapter, []
    for text in given:
        named = None if os.path.exists(text) else re.fullmatch(r"([\w-]+)=(.+)", text)
        if named is None:
            o.adapter.append(text)  # acts on all requests
            continue
        if named[1] in found:
            raise UniLIPError(f"--adapter {named[1]} is given twice; give each adapter a name of its own.")
        found[named[1]] = adapter_of(named[2])
    return found


def spread(o: Options, common: dict[str, Any]) -> tuple[Any, str]:
    """Start the replicas."""
    from unilip.serve.remote import RemoteEngine

    device = choose_device(o.device)
    if o.decoder is not None:
        raise UniLIPError("--decoder is for one process; save a model with it, and give that to --ray.")
    most = o.max_replicas or o.ray
    say(f"starting {plural(o.ray, 'replica')} on Ray")
    common |= {"device": device, "gpus": 1.0 if device.startswith("cuda") else 0.0} | pick(o, "dtype", "performance")
    engine = RemoteEngine(source_of(o), replicas=o.ray, most=most, **common)
    return engine, f"{o.model or f'embedded ({engine.config.name})'} on {o.ray} to {most} replicas ({device})"
