"""The studio: a web page on an engine, to chat, draw, edit and reconstruct in a browser.

In:  an engine, what to say about its model, and samples to try. Out: an ASGI application that works without any other
host: nothing is loaded from elsewhere (a policy in every answer forbids it), nothing is reported to anybody.
What the buttons do is in studio_desk.py; this file is the page.
"""

from __future__ import annotations

import html
import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by gradio whenever it would report something

import asyncio
import hmac
import json
import logging
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from PIL import Image
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unilip import __version__
from unilip.errors import UniLIPError
from unilip.method.config import SOLVERS
from unilip.pictures import FITS
from unilip.serve.engine import Engine
from unilip.serve.guard import LOCAL_HOSTS, MAX_TEXT, Guard, Rules, replay
from unilip.serve.problems import Trouble
from unilip.serve.studio_desk import Desks, Studio, Update, is_within, note, parameters

logger = logging.getLogger(__name__)

BUTTONS: list[Any] = [
    "download",
    "fullscreen",
]  # of pictures; not "share", which would upload them to other people's machines
USER = "unilip"  # who logs in where a password is set
MAX_UPLOAD = 20 * 2**20  # bytes of one request
MAX_DISK = 2 * 2**30  # bytes of all files of all pages; a file counts as at least MIN_FILE
MIN_FILE = 64 * 2**10
UPLOAD = "/gradio_api/upload"
# what the page asks for, and nothing else that Gradio has: the bodies of what is posted, and the rest as a pattern
BODIES = {
    "/login": MAX_TEXT,
    UPLOAD: MAX_UPLOAD,
    "/gradio_api/queue/join": 4 * MAX_TEXT,
    "/gradio_api/run/predict": 4 * MAX_TEXT,
    "/gradio_api/cancel": MAX_TEXT,
    "/gradio_api/reset": MAX_TEXT,
}
PAGE = ("/", "/theme.css", "/favicon.ico", "/robots.txt", "/static/", "/assets/", "/svelte/")
READ = re.compile(
    "|".join(map(re.escape, PAGE[:4]))
    + r"|/(static|assets|svelte)/.*|/(config|logout|manifest\.json)|/gradio_api/((theme\.css|upload_progress|queue/data"
    r"|startup-events|info|login_check|user|token|app_id)/?|heartbeat/[^/]*|file=.*)"
)
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",  # the page is a compiled application
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "connect-src 'self' data: blob:",
        "object-src 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


@dataclass(frozen=True)
class About:
    """What the page says of its model: a name, what it can do, what it cannot. HTML is not read as such."""

    name: str
    can: str = ""
    cannot: str = ""


@dataclass(frozen=True)
class Samples:
    """What can be tried at once: prompts, pictures, (picture, instruction) and (picture, question)."""

    prompts: Sequence[str] = ()
    pictures: Sequence[Path] = ()
    edits: Sequence[tuple[Path, str]] = ()
    questions: Sequence[tuple[Path, str]] = ()


def capabilities(engine: Engine, about: About) -> str:
    """Return the head of the page as HTML: the model, where it runs, what it can and cannot do."""
    model = engine.model
    count = parameters(engine)
    size = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
    device = str(model.device).upper() if model.device.type in ("cpu", "mps") else str(model.device)
    facts = (
        about.name, f"{size} parameters", f"{engine.config.image_size} px",
        f"{device}, {str(model.dtype).removeprefix('torch.')}", f"unilip {__version__}",
    )  # fmt: skip
    lines = [f'<p class="facts">{" · ".join(html.escape(fact) for fact in facts)}</p>']
    lines += [
        f"<p><b>{label}</b> {html.escape(text)}</p>"
        for label, text in (("Can:", about.can), ("Cannot:", about.cannot))
        if text
    ]
    return f'<header class="about"><h1>UniLIP studio</h1>{"".join(lines)}</header>'


THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "monospace"],
)
STYLE = """
html{scrollbar-gutter:stable}
.gradio-container{max-width:76rem!important;width:100%!important;margin:0 auto!important}
.gradio-container .grid-wrap{max-height:none!important}
.about h1{font-size:1.4rem;margin:0;font-weight:650}
.about p{margin:.15rem 0;max-width:60rem;font-size:.92rem}
.about .facts{color:var(--body-text-color-subdued);font-variant-numeric:tabular-nums}
.note{min-height:2.4rem;padding:.45rem .7rem;border-left:3px solid var(--border-color-primary);border-radius:4px;
background:var(--background-fill-secondary);font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.note.done{border-left-color:#2e9e62}.note.error{border-left-color:#d0453a;font-weight:550}
.note:empty{visibility:hidden}
[aria-label=Share],[title=Share]{display:none!important}
#edit-difference img,#reconstruct-seen img,#reconstruct-again img,#reconstruct-difference img,
#edit-source img,#reconstruct-source img{width:100%;height:100%;object-fit:contain}
#chat .message img{width:min(14rem,60vw)!important;height:auto!important;object-fit:fill!important}
.note progress{appearance:none;border:0;width:min(60%,24rem);height:.6rem;vertical-align:middle;margin-right:.5rem;
border-radius:.3rem;overflow:hidden;background:var(--border-color-primary)}
.note progress::-webkit-progress-bar{background:var(--border-color-primary)}
.note progress::-webkit-progress-value{background:var(--primary-500)}
.note progress::-moz-progress-bar{background:var(--primary-500)}
#chat-status .note:empty{display:none}
.keys{font-size:.82rem;color:var(--body-text-color-subdued)}
#theme{max-width:9rem;margin-left:auto}
button:focus-visible,input:focus-visible,textarea:focus-visible,[tabindex]:focus-visible{
outline:2px solid var(--primary-500)!important;outline-offset:1px}
.hidden-download{position:absolute!important;width:1px!important;height:1px!important;overflow:hidden!important;
clip-path:inset(50%);min-width:0!important;padding:0!important;border:0!important}
@media(max-width:640px){.gradio-container{padding:.5rem!important}.about h1{font-size:1.2rem}
.about p{font-size:.85rem}button{min-height:2.6rem}}
"""
# Dark is applied early, so that the page does not flash white. Escape cancels, Alt+1 ... Alt+5 are the tabs.
HEAD = """
<script>
(() => {
  const kept = () => { try { return localStorage.getItem('unilip-theme') } catch { return null } };
  const wanted = () => kept() || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
  const apply = () => document.body.classList.toggle('dark', wanted() === 'dark');
  window.unilipTheme = () => {
    try { localStorage.setItem('unilip-theme', wanted() === 'dark' ? 'light' : 'dark') } catch {}
    apply();
  };
  const tabs = () => [...document.querySelectorAll('#tabs button')].filter(tab => !tab.closest('.visually-hidden'));
  window.unilipTab = name => tabs().find(tab => tab.textContent.trim() === name)?.click();
  addEventListener('DOMContentLoaded', apply);
  addEventListener('load', () => setTimeout(apply, 0));
  addEventListener('keydown', event => {
    if (event.key === 'Escape')
      for (const button of document.querySelectorAll('button.stop'))
        if (button.offsetParent && !button.disabled) button.click();
    if (event.altKey && event.key >= '1' && event.key <= '5')
      window.unilipTab(['Chat', 'Generate', 'Edit', 'Reconstruct', 'History'][event.key - 1]);
  });
})();
</script>
"""


def _path(payload: Any) -> str | None:
    """Return the path of an uploaded picture, unopened, so that a broken one can be answered kindly."""
    return payload.path if payload else None


@dataclass(frozen=True)
class _Bound:
    """A handler of studio_desk.py as the function of an event: names become components, buttons follow."""

    desks: Desks
    handler: Callable[..., Iterator[Update]]
    outputs: Mapping[str, gr.components.Component]
    go: gr.components.Component
    stop: gr.Button

    @property
    def components(self) -> list[gr.components.Component]:
        return [*self.outputs.values(), self.go, self.stop]

    def __call__(self, request: gr.Request, *inputs: Any) -> Iterator[dict[Any, Any]]:
        try:
            desk = self.desks.get(str(request.session_hash))
        except UniLIPError as error:
            yield {self.outputs["status"]: note(str(error), "error")}
            return
        yield {self.go: type(self.go)(interactive=False), self.stop: gr.Button(visible=True)}
        last: dict[Any, Any] = {}

        def shown(value: Any) -> Any:  # Gradio would keep a picture until the end; a file of the desk goes with it
            if isinstance(value, tuple):
                return tuple(shown(one) for one in value)
            return desk.show(value) if isinstance(value, Image.Image) else value

        for update in self.handler(desk, *inputs):
            last = {self.outputs[name]: shown(value) for name, value in update.items() if name in self.outputs}
            if last:
                yield last
        yield last | {self.go: type(self.go)(interactive=True), self.stop: gr.Button(visible=False)}


class Page:
    """Builds the page, a tab at a time."""

    def __init__(self, engine: Engine, desks: Desks, about: About, samples: Samples, folder: Path) -> None:
        self.engine, self.desks, self.about, self.samples = engine, desks, about, samples
        self.studio = Studio(engine, folder)

    def build(self) -> gr.Blocks:
        """Return the page; tabs are there for what the model can do."""
        verbs = self.engine.verbs
        with gr.Blocks(title="UniLIP studio", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            with gr.Row():
                with gr.Column(scale=8, min_width=280):
                    gr.HTML(capabilities(self.engine, self.about), elem_id="about")
                with gr.Column(scale=1, min_width=120):
                    theme = gr.Button("Light / dark", size="sm", elem_id="theme")
            theme.click(None, js="() => window.unilipTheme()")
            with gr.Tabs(elem_id="tabs"):
                if "ask" in verbs:
                    self._chat()
                if "generate" in verbs:
                    self._generate()
                if "edit" in verbs:
                    self._edit()
                self._reconstruct()
                self._history()
            self._links()
            gr.HTML(
                '<p class="keys">Keys: Enter sends a prompt, Escape cancels, Alt+1 to Alt+5 change the tab. '
                "The history is kept on this machine, until the page is closed.</p>"
            )
            page.unload(self._leave)
        return page

    def _leave(self, request: gr.Request) -> None:
        self.desks.drop(str(request.session_hash))

    # --- pieces

    def _bind(
        self, handler: Callable[..., Iterator[Update]], outputs: Mapping[str, Any], go: Any, stop: gr.Button, place: str
    ) -> _Bound:
        def cancel(request: gr.Request) -> None:
            self.desks.get(str(request.session_hash)).cancel(place)

        stop.click(cancel, queue=False, show_progress="hidden", api_visibility="private")
        return _Bound(self.desks, handler, outputs, go, stop)

    @staticmethod
    def _on(triggers: Sequence[Any], bound: _Bound, inputs: Sequence[Any]) -> Any:
        return gr.on(
            list(triggers), bound.__call__, list(inputs), bound.components, show_progress="hidden",
            trigger_mode="once", concurrency_limit=16, api_visibility="private",
        )  # fmt: skip

    def _buttons(self, label: str, name: str) -> tuple[gr.Button, gr.Button]:
        with gr.Row():
            go = gr.Button(label, variant="primary", elem_id=f"{name}-go", scale=3)
            stop = gr.Button("Cancel", variant="stop", elem_id=f"{name}-stop", visible=False, scale=1, min_width=90)
        return go, stop

    def _sampling(self, name: str) -> list[Any]:
        """The settings of drawing: negative prompt, seed, fresh, steps, guidance, solver."""
        own, limits = self.engine.config.sampling, self.engine.limits
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=110, elem_id=f"{name}-seed")
            fresh = gr.Checkbox(True, label="New seed each time", min_width=130, elem_id=f"{name}-fresh")
        steps = gr.Slider(
            1, min(limits.steps, 100), own.num_inference_steps, step=1, label="Steps", elem_id=f"{name}-steps"
        )
        guidance = gr.Slider(
            0, 15, own.guidance_scale, step=0.1, label="Guidance", info="1 and below: off", elem_id=f"{name}-guidance"
        )
        with gr.Accordion("More settings", open=False):
            negative = gr.Textbox(label="Negative prompt", placeholder="what to move away from", max_lines=3)
            solver = gr.Dropdown(list(SOLVERS), value=own.solver, label="Solver")
        return [negative, seed, fresh, steps, guidance, solver]

    # --- the tabs

    def _chat(self) -> None:
        with gr.Tab("Chat", id="chat"):
            chat = gr.Chatbot(
                label="Conversation", height="min(46vh, 30rem)", elem_id="chat", buttons=["copy"], layout="bubble",
                placeholder="Ask about a picture, have one drawn, or change the last one.\n\n"
                "For instance: draw three yellow stars",
            )  # fmt: skip
            status = gr.HTML(note(""), elem_id="chat-status", padding=False)
            box = gr.MultimodalTextbox(
                placeholder="A question, “draw …”, or “change …”; pictures can be added", file_types=["image"],
                file_count="multiple", label="Message", show_label=False, elem_id="chat-box",
                max_plain_text_length=8000,
            )  # fmt: skip
            with gr.Row():
                mode = gr.Radio(
                    [("Automatic", "auto"), ("Answer", "ask"), ("Draw", "generate"), ("Edit", "edit")], value="auto",
                    label="What to do with the message", elem_id="chat-mode", scale=4, min_width=260,
                )  # fmt: skip
                stop = gr.Button("Cancel", variant="stop", elem_id="chat-stop", visible=False, min_width=90)
                new = gr.Button("New conversation", size="sm", elem_id="chat-new", min_width=120)
            outputs = {"messages": chat, "box": box, "status": status}
            bound = self._bind(self.studio.say, outputs, box, stop, "chat")
            message = gr.State(None)

            def take(given: Any) -> tuple[Any, Any]:
                return given, gr.MultimodalTextbox(value={"text": "", "files": []}, interactive=False)

            box.submit(
                take, box, [message, box], show_progress="hidden", trigger_mode="once", api_visibility="private"
            ).then(
                bound.__call__, [message, mode], bound.components, show_progress="hidden", concurrency_limit=16,
                api_visibility="private",
            )  # fmt: skip

            def forget(request: gr.Request) -> list[Any]:
                update = self.studio.forget(self.desks.get(str(request.session_hash)))
                return [update["messages"], update["status"]]

            new.click(forget, None, [chat, status], show_progress="hidden", api_visibility="private")
            talks = [[{"text": question, "files": [str(path)]}] for path, question in self.samples.questions]
            talks += [[{"text": f"draw {prompt}", "files": []}] for prompt in self.samples.prompts[:2]]
            if talks:
                gr.Examples(talks, [box], label="Try one of these, then press Enter", elem_id="chat-examples")
            self.chat_box = box

    def _generate(self) -> None:
        with gr.Tab("Generate", id="generate"):
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    prompt = gr.Textbox(
                        label="Prompt", placeholder="three yellow stars", max_lines=6, elem_id="generate-prompt"
                    )
                    go, stop = self._buttons("Draw", "generate")
                    status = gr.HTML(note(""), elem_id="generate-status", padding=False)
                    count = gr.Slider(
                        1, min(8, self.engine.limits.count), 1, step=1, label="Pictures", elem_id="generate-count"
                    )
                    settings = self._sampling("generate")
                with gr.Column(scale=3, min_width=300):
                    gallery = gr.Gallery(
                        label="Pictures", columns=2, object_fit="contain", format="png", elem_id="generate-gallery",
                        height="auto", interactive=False, fit_columns=False, buttons=BUTTONS,
                    )  # fmt: skip
                    with gr.Row():
                        self.edit_it = gr.Button("Edit this picture", size="sm", elem_id="generate-edit")
                        self.ask_it = gr.Button("Ask about it", size="sm", elem_id="generate-ask")
            outputs = {"pictures": gallery, "seed": settings[1], "status": status}
            bound = self._bind(self.studio.generate, outputs, go, stop, "generate")
            inputs = [prompt, *settings, count]
            self._on([go.click, prompt.submit], bound, inputs)
            self.chosen = gr.State(0)
            gallery.select(_index, None, self.chosen, show_progress="hidden", api_visibility="private")
            gallery.change(lambda: 0, None, self.chosen, show_progress="hidden", api_visibility="private")
            self.gallery = gallery
            if self.samples.prompts:
                tried = gr.Examples(
                    [[text] for text in self.samples.prompts], [prompt], label="Examples: a click draws them"
                )
                tried.load_input_event.then(
                    bound.__call__, inputs, bound.components, show_progress="hidden", concurrency_limit=16,
                    api_visibility="private",
                )  # fmt: skip

    def _edit(self) -> None:
        with gr.Tab("Edit", id="edit"):
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    source = self._upload("Picture to change", "edit")
                    instruction = gr.Textbox(
                        label="Instruction", placeholder="change the background to pink", max_lines=6,
                        elem_id="edit-instruction",
                    )  # fmt: skip
                    go, stop = self._buttons("Change it", "edit")
                    status = gr.HTML(note(""), elem_id="edit-status", padding=False)
                    settings = self._sampling("edit")
                    with gr.Row():
                        fit = gr.Dropdown(list(FITS), value="resize", label="Fit into a square by", min_width=140)
                        keep = gr.Checkbox(False, label="Give the result the shape of the source", min_width=140)
                with gr.Column(scale=3, min_width=300):
                    slider = gr.ImageSlider(
                        label="Before / after", format="png", elem_id="edit-slider", interactive=False,
                        max_height=460, type="filepath", buttons=BUTTONS,
                    )  # fmt: skip
                    edited = gr.State(None)
                    again = gr.Button("Go on with the result", size="sm", elem_id="edit-again")
                    gap = gr.Image(
                        label="Difference: black is unchanged, white changed most", format="png", interactive=False,
                        buttons=BUTTONS, elem_id="edit-difference", height=260,
                    )  # fmt: skip
            outputs = {"slider": slider, "difference": gap, "edited": edited, "seed": settings[1], "status": status}
            bound = self._bind(self.studio.edit, outputs, go, stop, "edit")
            inputs = [source, instruction, *settings, fit, keep]
            self._on([go.click, instruction.submit], bound, inputs)
            again.click(
                lambda path: path or gr.skip(), edited, source, show_progress="hidden", api_visibility="private"
            )
            if self.samples.edits:
                tried = gr.Examples(
                    [[str(path), text] for path, text in self.samples.edits], [source, instruction],
                    label="Examples: a click tries them",
                )  # fmt: skip
                tried.load_input_event.then(
                    bound.__call__, inputs, bound.components, show_progress="hidden", concurrency_limit=16,
                    api_visibility="private",
                )  # fmt: skip
            self.edit_source = source

    def _reconstruct(self) -> None:
        with gr.Tab("Reconstruct", id="reconstruct"):
            with gr.Row():
                with gr.Column(min_width=240):
                    source = self._upload("Picture", "reconstruct")
                    fit = gr.Dropdown(list(FITS), value="resize", label="Fit into a square by")
                    go, stop = self._buttons("Reconstruct", "reconstruct")
                    status = gr.HTML(note(""), elem_id="reconstruct-status", padding=False)
                with gr.Column(scale=2, min_width=300):
                    with gr.Row():
                        seen = gr.Image(
                            label="As the model saw it", format="png", interactive=False, min_width=140, height=300,
                            buttons=BUTTONS, elem_id="reconstruct-seen",
                        )  # fmt: skip
                        again = gr.Image(
                            label="Drawn again", format="png", interactive=False, min_width=140, height=300,
                            buttons=BUTTONS, elem_id="reconstruct-again",
                        )  # fmt: skip
                    gap = gr.Image(
                        label="Difference: black is none, white is most", format="png", interactive=False, height=220,
                        buttons=BUTTONS, elem_id="reconstruct-difference",
                    )  # fmt: skip
            outputs = {"seen": seen, "again": again, "difference": gap, "status": status}
            bound = self._bind(self.studio.reconstruct, outputs, go, stop, "reconstruct")
            self._on([go.click], bound, [source, fit])
            if self.samples.pictures:
                tried = gr.Examples(
                    [[str(path)] for path in self.samples.pictures], [source], label="Examples: a click tries them"
                )
                tried.load_input_event.then(
                    bound.__call__, [source, fit], bound.components, show_progress="hidden", concurrency_limit=16,
                    api_visibility="private",
                )  # fmt: skip

    @staticmethod
    def _upload(label: str, name: str) -> gr.Image:
        picture = gr.Image(
            label=label, type="filepath", sources=["upload", "clipboard"], height=260, elem_id=f"{name}-source",
            image_mode=None, buttons=["fullscreen"],
        )  # fmt: skip
        # set, not overridden: for a subclass gradio would write a stub beside this file
        picture.preprocess = _path  # type: ignore[method-assign]
        return picture

    def _history(self) -> None:
        with gr.Tab("History", id="history") as tab:
            with gr.Row():
                load = gr.Button("Download everything (zip)", variant="primary", elem_id="history-zip")
                clear = gr.Button("Clear", elem_id="history-clear", min_width=90)
            file = gr.DownloadButton("zip", elem_id="history-file", elem_classes="hidden-download")
            status = gr.HTML(note(""), elem_id="history-status", padding=False)
            gallery = gr.Gallery(
                label="Pictures of this page, newest first", columns=4, object_fit="contain", format="png",
                interactive=False, elem_id="history-gallery", buttons=BUTTONS, height="auto", fit_columns=False,
            )  # fmt: skip

            def show(request: gr.Request) -> tuple[Any, str]:
                desk = self.desks.get(str(request.session_hash))
                count = len(desk.entries)
                text = f"{count} {'entry' if count == 1 else 'entries'}." if count else "Nothing was made here yet."
                return desk.pictures(), note(text)

            def pack(request: gr.Request) -> tuple[Any, str]:
                desk = self.desks.get(str(request.session_hash))
                try:
                    return str(desk.archive()), note(f"{len(desk.entries)} entries in the file.", "done")
                except UniLIPError as error:
                    return None, note(str(error), "error")

            def empty(request: gr.Request) -> tuple[Any, str]:
                self.desks.get(str(request.session_hash)).clear()
                return show(request)

            private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            tab.select(show, None, [gallery, status], **private)
            clear.click(empty, None, [gallery, status], **private)
            load.click(pack, None, [file, status], **private).then(
                None, [file], None, js="(file) => { if (file) document.querySelector('#history-file').click() }"
            )

    def _links(self) -> None:
        """Let a drawn picture go on to the other tabs."""
        private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        if not hasattr(self, "gallery"):
            return

        def chosen(gallery: Sequence[Any] | None, index: int) -> str | None:
            return gallery[min(index, len(gallery) - 1)][0] if gallery else None

        def to_edit(gallery: Sequence[Any] | None, index: int) -> Any:
            return chosen(gallery, index) or gr.skip()

        def to_chat(gallery: Sequence[Any] | None, index: int) -> Any:
            path = chosen(gallery, index)
            return {"text": "", "files": [path]} if path else gr.skip()

        # the tab changes in the browser, after the picture has arrived
        picked = [self.gallery, self.chosen]
        change = "(pictures) => { if (pictures && pictures.length) window.unilipTab('%s') }"
        if hasattr(self, "edit_source"):
            went = self.edit_it.click(to_edit, picked, self.edit_source, **private)
            went.then(None, [self.gallery], None, js=change % "Edit")
        if hasattr(self, "chat_box"):
            went = self.ask_it.click(to_chat, picked, self.chat_box, **private)
            went.then(None, [self.gallery], None, js=change % "Chat")


def _index(event: gr.SelectData) -> int:
    return int(event.index)


def names_outside(content: Any, folder: Path) -> bool:
    """Whether JSON of a browser holds a file (an object with a "path") that does not lie in a folder."""
    if isinstance(content, dict):
        path = content.get("path")
        if path is not None and not is_within(path, folder):
            return True
        content = list(content.values())
    return isinstance(content, list) and any(names_outside(one, folder) for one in content)


def disk_use(folder: Path) -> int:
    """Bytes of all files below a folder; each counts as at least MIN_FILE."""
    sizes = []
    for path in folder.rglob("*"):
        with suppress(OSError):  # it was deleted meanwhile
            sizes.append(max(MIN_FILE, path.stat().st_size))
    return sum(sizes)


class Fence:
    """What of Gradio is served: the routes of this page, files of `folder`, uploads while there is room.

    It also adds the headers that keep a page to its own host. Gradio has checks of its own, which a version may drop.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app, self.folder = app, folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http":
            os.environ["GRADIO_TEMP_DIR"] = str(self.folder)  # of the latest studio in this process, if there are more
            found, receive = await self._check(scope, receive)
            if found is not None:
                await found.response()(scope, receive, send)
                return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)

    async def _check(self, scope: Scope, receive: Receive) -> tuple[Trouble | None, Receive]:
        path = scope["path"]
        if not (path in BODIES if scope["method"] == "POST" else READ.fullmatch(path)):
            return Trouble(404, "There is nothing here.", "not_found"), receive
        if "/file=" in path and not is_within(path.partition("/file=")[2], self.folder):
            return Trouble(403, "This file is none of the page's.", "forbidden_file"), receive
        if path == UPLOAD and await asyncio.to_thread(disk_use, self.folder) > MAX_DISK:
            text = "The studio's folder is full; close pages that are not needed, or try again later."
            return Trouble(507, text, "full"), receive
        if scope["method"] != "POST" or path in (UPLOAD, "/login"):
            return None, receive
        body = (await receive()).get("body", b"")  # whole: it comes from Guard
        try:
            if names_outside(json.loads(body), self.folder):
                return Trouble(403, "A file is named that is none of the page's.", "forbidden_file"), receive
        except (ValueError, RecursionError):
            return Trouble(400, "This is no JSON.", "invalid_json"), receive
        return None, replay(body, receive)


def create_app(
    engine: Engine,
    about: About,
    samples: Samples | None = None,
    *,
    hosts: Sequence[str] = LOCAL_HOSTS,
    origins: Sequence[str] = (),
    password: str | None = None,
    metadata: bool = True,
) -> FastAPI:
    """Return the studio as an ASGI application; its files are in a temporary folder that ends with it.

    Args:
        engine: who draws and answers; it stays the caller's.
        about: what to say of the model.
        samples: what can be tried at once.
        hosts: names by which the page may be called; others are refused, so that no other web page can reach it
            through a name of its own. "*" allows all.
        origins: the page's own address where a proxy stands before it that gives another Host.
        password: of the user "unilip"; nobody has to log in without one.
        metadata: write model, prompt, seed and settings into the PNG files.
    """
    folder = Path(tempfile.mkdtemp(prefix="unilip-studio-")).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    desks = Desks(folder / "desks", about.name, metadata)
    maker = Page(engine, desks, about, samples or Samples(), folder)
    page = maker.build()
    maker.studio.kept = frozenset(path for path in folder.rglob("*") if path.is_file())
    page.queue(default_concurrency_limit=16, max_size=256)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        desks.close()
        shutil.rmtree(folder, ignore_errors=True)

    def allowed(user: str, given: str) -> bool:
        right = hmac.compare_digest(given.encode(), (password or "").encode())
        return hmac.compare_digest(user.encode(), USER.encode()) and right

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app = gr.mount_gradio_app(
        app, page, path="/", theme=THEME, css=STYLE, head=HEAD, footer_links=[], run_history=False, ssr_mode=False,
        mcp_server=False, pwa=False, enable_monitoring=False, show_error=False, max_file_size=MAX_UPLOAD,
        auth=allowed if password else None,
        auth_message=f"The user is {html.escape(USER)}; the password was chosen by whoever started the studio.",
    )  # fmt: skip
    page.has_launched = page.is_running = True  # else Gradio takes paths on trust, and serves scripts in pictures
    inner = next(route.app for route in app.routes if isinstance(getattr(route, "app", None), gr.routes.App))

    def known(scope: Scope) -> bool:
        return any(token in inner.tokens for token in HTTPConnection(scope).cookies.values())

    rules = Rules(
        max_body=MAX_UPLOAD, rate_limit=0, hosts=tuple(hosts), origins=tuple(origins), bodies=BODIES,
        open_paths=(*PAGE, "/login"),
    )  # fmt: skip
    app.add_middleware(Fence, folder=folder)
    app.add_middleware(Guard, rules=rules, known=known if password else None)
    app.state.desks, app.state.engine = desks, engine
    return app
