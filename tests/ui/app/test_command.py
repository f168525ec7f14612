"""`unlearner ui`: its flags, and the page before the model."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from ui.cli.commands.everyday.ui import planned


@pytest.fixture
def opened(run: Any, monkeypatch: Any) -> Any:
    """`opened("--host", ...)` runs `unlearner ui` up to the page; what it would have opened."""
    import ui.app.build

    class Page:
        def close(self, verbose: bool) -> None:
            assert not verbose

    def call(*words: object) -> tuple[Any, dict[str, Any]]:
        seen: dict[str, Any] = {}

        def launch(app: Any, **options: Any) -> tuple[Any, str]:
            seen.update(app=app, **options)
            monkeypatch.setattr(threading.Event, "wait", _interrupt)
            return Page(), "http://127.0.0.1:1/"

        monkeypatch.setattr(ui.app.build, "launch", launch)
        wait = threading.Event.wait
        ran = run("ui", *words)
        monkeypatch.setattr(threading.Event, "wait", wait)
        return ran, seen

    return call


def _interrupt(self: threading.Event, timeout: float | None = None) -> bool:
    raise KeyboardInterrupt


def test_every_flag_reaches_the_page(opened: Any, tmp_path: Path) -> None:
    auth = tmp_path / "auth"
    auth.write_text("mira:secret\n")
    auth.chmod(0o600)
    robust, strength = tmp_path / "r.json", tmp_path / "c.json"
    robust.write_text('{"kind": "unlearner-robustness", "schema": 1}')
    strength.write_text('{"kind": "unlearner-calibration", "schema": 1, "curve": []}')
    ran, seen = opened(
        "--base", "b", "--revision", "r", "--store", "s", "--data", "d",
        "--template", "llama2", "--dtype", "float32", "--load-in-4bit", "--device", "cpu",
        "--reference-log", "ref.json", "--logs", "x.json", "--host", "0.0.0.0", "--port", "7999",
        "--auth", auth, "--open", "--robustness", robust, "--calibration", strength,
    )  # fmt: skip
    app = seen["app"]
    base = app.session.base
    assert (base.name, base.revision, base.dtype, base.load_in_4bit) == ("b", "r", "float32", True)
    assert (app.session.store_path, app.session.data) == (Path("s"), Path("d"))
    assert app.session.template == "llama2"
    assert (app.files.logs, app.files.retain_log) == ((Path("x.json"),), Path("ref.json"))
    assert (seen["host"], seen["port"], seen["auth"]) == ("0.0.0.0", 7999, [("mira", "secret")])
    assert (app.files.robustness, app.files.calibration) == ((robust,), (strength,))
    assert seen["open_browser"]
    assert ran.out.startswith("http://127.0.0.1:1/")
    assert ran.code == 130


def test_by_default_it_is_this_machine_and_nothing_is_loaded(opened: Any) -> None:
    ran, seen = opened("--json")
    assert (seen["host"], seen["port"], seen["auth"]) == ("127.0.0.1", None, None)
    assert not seen["open_browser"]
    assert seen["app"].session.base is None
    assert ran.json == {"url": "http://127.0.0.1:1/"}


def test_jobs_lie_in_a_private_place_that_can_be_named(monkeypatch: Any, tmp_path: Path) -> None:
    from ui.cli.commands.everyday.ui import jobs_folder

    monkeypatch.setenv("UNLEARNER_JOBS", str(tmp_path))
    assert jobs_folder() == tmp_path
    monkeypatch.delenv("UNLEARNER_JOBS")
    assert jobs_folder().is_relative_to(Path.home())


def test_the_page_is_there_before_the_base_and_behind_a_password(
    tmp_path: Path, monkeypatch: Any
) -> None:
    from adapters.base.load import BaseSpec
    from adapters.errors import UserError
    from ui.app.build import App, launch
    from ui.app.jobs import Jobs
    from ui.app.session import Session

    hold = threading.Event()

    def slow(self: Session, spec: BaseSpec) -> None:
        hold.wait(30)
        raise UserError("This base is none.")

    monkeypatch.setattr(Session, "_load_model", slow)
    session = Session(tmp_path / "store", BaseSpec("b"), tmp_path / "nowhere")
    page, url = launch(App(session, Jobs(tmp_path / "jobs"), planned), auth=[("mira", "secret")])
    try:
        assert session.state == "loading"
        assert urllib.request.urlopen(url, timeout=10).status == 200  # the login form
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}config", timeout=10)
        with pytest.raises(UserError, match="still being loaded"):
            session.require()
        hold.set()
        assert session.wait(10)
        assert session.state == "failed"
        with pytest.raises(UserError, match="This base is none"):
            session.require()
    finally:
        hold.set()
        page.close(verbose=False)


def test_two_pages_load_the_base_once_and_rest_frees_it(
    tmp_path: Path, tiny_base: Path, put: Any, monkeypatch: Any
) -> None:
    import threading
    import weakref

    from adapters.base.load import BaseSpec
    from adapters.errors import UserError
    from ui.app import session as loading
    from ui.app.session import Session

    loaded: list[Any] = []
    load = loading.load_base

    def counted(spec: Any) -> Any:
        loaded.append(weakref.ref(model := load(spec)))
        return model

    monkeypatch.setattr(loading, "load_base", counted)
    slug = put("1")
    session = Session(tmp_path / "store", BaseSpec(str(tiny_base), dtype="float32", device="cpu"))

    def open_pages() -> None:
        pages = [threading.Thread(target=session.start) for _ in range(4)]
        for page in pages:
            page.start()
        for page in pages:
            page.join()
        assert session.wait(120)
        session.start()  # a page that comes late
        assert session.state == "ready", session.problem

    open_pages()
    assert len(loaded) == 1
    session.active([(slug, 1.0)])  # its layers refer to the model, and the model to them
    session.rest()
    assert loaded[0]() is None, "somebody still holds the weights"
    with pytest.raises(UserError, match="A training uses the GPU"):
        session.require()
    open_pages()
    assert len(loaded) == 2


@pytest.mark.parametrize("debug", [True, False])
def test_only_debug_prints_the_traceback_of_an_error(debug: bool, caplog: Any) -> None:
    import logging

    import gradio as gr

    from ui.app.tabs.pages import told

    def fail() -> None:
        raise ValueError("about Mira Okafor")

    level = logging.DEBUG if debug else logging.WARNING
    with caplog.at_level(level, "unlearner.app"), pytest.raises(gr.Error) as raised:
        told(fail)()
    assert "Mira" not in str(raised.value)
    assert ("Traceback" in caplog.text) is debug
    assert ("Mira" in caplog.text) is debug
    assert "ValueError in fail" in caplog.text


def test_the_page_is_for_this_machine_and_keeps_and_shares_nothing(
    tmp_path: Path, monkeypatch: Any
) -> None:
    import gradio as gr

    from ui.app import build as app_module
    from ui.app.jobs import Jobs
    from ui.app.session import Session

    seen: dict[str, Any] = {}

    def launch(self: gr.Blocks, **options: Any) -> tuple[None, str, None]:
        seen.update(options, analytics=self.analytics_enabled)
        return None, "http://127.0.0.1:1/", None

    monkeypatch.setattr(gr.Blocks, "launch", launch)
    app_module.launch(app_module.App(Session(tmp_path / "store"), Jobs(tmp_path / "jobs"), planned))
    assert seen["server_name"] == "127.0.0.1"
    for name in ("share", "run_history", "analytics", "enable_monitoring", "mcp_server"):
        assert seen[name] is False, name
    assert seen["allowed_paths"] == []
    assert seen["max_file_size"] == "6mb"


def test_only_this_machine_is_listened_to(tmp_path: Path) -> None:
    import socket
    from urllib.parse import urlparse

    from ui.app.build import App, launch
    from ui.app.jobs import Jobs
    from ui.app.session import Session

    page, url = launch(App(Session(tmp_path / "store"), Jobs(tmp_path / "jobs"), planned))
    try:
        port = urlparse(url).port
        assert port is not None
        assert urlparse(url).hostname == "127.0.0.1"
        socket.create_connection(("127.0.0.1", port), 5).close()
        # Another address of this machine: the whole of 127/8 is its own.
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port), 5)
    finally:
        page.close(verbose=False)


def test_uploads_lie_in_a_private_folder_that_goes_with_the_app(
    opened: Any, monkeypatch: Any
) -> None:
    import os

    monkeypatch.setenv("GRADIO_TEMP_DIR", "elsewhere")
    seen: list[Path] = []
    import ui.app.build

    make = ui.app.build.App.__init__

    def note(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder == options["scratch"]
        assert folder.stat().st_mode & 0o077 == 0
        assert self.new_file("x.csv").parent.parent == folder
        seen.append(folder)

    monkeypatch.setattr(ui.app.build.App, "__init__", note)
    opened()
    assert seen
    assert not seen[0].exists()
    assert os.environ["GRADIO_TEMP_DIR"] == "elsewhere"


def test_a_file_that_is_no_probe_is_refused_before_the_page_opens(
    opened: Any, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    path.write_text("{}")
    ran, seen = opened("--robustness", path)
    assert ran.code == 2
    assert "not 'unlearner-robustness'" in ran.err
    assert not seen
