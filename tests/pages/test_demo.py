"""The page to draw with: the pixels of `pixelgen sample`, errors in one line, and the page in a browser."""

import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image
from support.browser import opened, overflow
from support.runs import newest, train

from pixelgen_fast.cli import main
from pixelgen_fast.errors import InputError
from pixelgen_fast.pages.demo import Demo, settings_of
from pixelgen_fast.pages.server import Gone, Server
from pixelgen_fast.signals import Stopped


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run with two averages, and its raw weights exported."""
    root = tmp_path_factory.mktemp("demo")
    assert main(train(root / "run", 32, "optimizer.warmup_images=0", "optimizer.ema=[0.5,0.9]")) == 0
    assert main(["export", str(root / "run"), str(root / "exported"), "--weights", "raw"]) == 0
    return [root / "run", root / "exported"]


@pytest.fixture(scope="module")
def server(folders: list[Path]) -> Iterator[Server]:
    with Server(Demo([str(folder) for folder in folders], "cpu"), "127.0.0.1", 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.05,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def ask(server: Server, **asked: object) -> tuple[np.ndarray, str]:
    """A sheet uint8 [H, W, 3], and the image of the run that its model is of."""
    with urlopen(f"{server.address}draw?{urlencode(asked)}") as answer:
        assert answer.headers["Content-Type"] == "image/png"
        return np.asarray(Image.open(io.BytesIO(answer.read()))), answer.headers["X-Nimg"]


def refused(server: Server, path: str) -> tuple[int, str]:
    with pytest.raises(HTTPError) as error:
        urlopen(server.address + path)
    return error.value.code, json.loads(error.value.read())["error"]


@pytest.mark.parametrize(("choice", "of", "weights"), [(0, 0, "ema"), (1, 0, "ema_0.9"), (2, 0, "raw"), (3, 1, "raw")])
def test_the_pixels_are_those_of_sample(
    server: Server, folders: list[Path], tmp_path: Path, choice: int, of: int, weights: str
) -> None:
    drawn = ["--classes", "3", "7", "--per-class", "2", "--seed", "5", "--steps", "3", "--guidance", "2", "--out"]
    assert main(["sample", str(folders[of]), "--weights", weights, *drawn, str(tmp_path / "out")]) == 0
    sheet, nimg = ask(server, choice=choice, classes="3,7", per_class=2, seed=5, steps=3, guidance=2)
    assert sheet.shape == (32, 32, 3) and nimg == "32"
    for number in range(4):
        row, column = divmod(number, 2)
        wanted = np.asarray(Image.open(tmp_path / "out" / "37"[row] / f"{number:06d}.png"))
        assert np.array_equal(sheet[16 * row : 16 * row + 16, 16 * column : 16 * column + 16], wanted)


def test_what_is_not_given_is_as_the_run_has_it(server: Server) -> None:
    plain, _ = ask(server, choice=0, classes="1", per_class=1)
    same, _ = ask(server, choice=0, classes="1", per_class=1, seed=0, steps=2, solver="adams2", guidance=1.5, shift=3)
    assert np.array_equal(plain, same)


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ("", "choose at least one class"),
        ("classes=12", "class 12 is none of this model, which has 10"),
        ("classes=1&steps=0", "steps is 0; it must be above 0"),
        ("classes=1&steps=many", "steps is 'many'; it must be a whole number"),
        ("classes=1&guidance=nan", "guidance is nan; it must be a finite number"),
        ("classes=1&solver=magic", "solver is 'magic'; there are euler, heun, adams2"),
        ("classes=1&interval=0.2", "interval is '0.2'; give two times"),
        ("classes=1&interval=0.9,0.1", "the first must be below the second"),
        ("classes=1&temperature=2", "pixeldit has no use for it"),
        ("classes=1&choice=9", "choice is 9; there are 4"),
        ("classes=1,2&per_class=200", "a page draws 1 to 256 at once"),
    ],
)
def test_a_bad_value_is_a_line(server: Server, query: str, line: str) -> None:
    status, said = refused(server, f"draw?{query}")
    assert status == 400 and line in said and "\n" not in said


def test_another_address_and_the_page_itself(server: Server) -> None:
    assert refused(server, "etc/passwd") == (404, "/etc/passwd: there are / and /draw")
    with urlopen(server.address) as answer:
        text = answer.read().decode()
    assert "{{" not in text and "ema_0.9" in text and "http" not in text.replace(server.address, "")


def test_settings_are_read_as_numbers_choices_and_pairs() -> None:
    asked = {"seed": "-3", "guidance": "1.5", "interval": "0.1,0.9", "solver": "heun", "steps": "", "other": "x"}
    assert settings_of({"interval": "none"}) == {"interval": None}
    assert settings_of(asked) == {"seed": -3, "guidance": 1.5, "interval": (0.1, 0.9), "solver": "heun"}


def test_a_newer_checkpoint_of_a_run_is_drawn_with(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for images in (32, 64):
        assert main(train(run, images, "optimizer.warmup_images=0")) == 0
        if images == 32:
            demo = Demo([str(run)], "cpu")
        assert demo.sheet({"classes": "0", "per_class": "1"})[1] == images == int(newest(run).name)


def test_a_reader_that_has_gone_ends_its_drawing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def until_gone(asked: dict, before_pass) -> None:
        begin = time.monotonic()
        try:
            while time.monotonic() < begin + 30:
                before_pass()
        except Gone:
            ended.set()
            raise

    monkeypatch.setattr(server.demo, "sheet", until_gone)
    with socket.create_connection(server.server_address[:2]) as reader:
        reader.sendall(b"GET /draw?classes=0 HTTP/1.0\r\n\r\n")
    assert ended.wait(30)


def test_a_fault_is_a_line_and_the_server_stays(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(server.demo, "sheet", fault)
        assert refused(server, "draw?classes=0") == (500, "RuntimeError: no memory")
    assert ask(server, classes="0", per_class=1, steps=1)[0].shape == (16, 16, 3)


def test_an_address_that_is_taken_is_a_line(server: Server) -> None:
    with pytest.raises(InputError, match="choose another --port"):
        Server(server.demo, "127.0.0.1", server.server_address[1])


def test_the_command_says_where_and_ends_in_good_order(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Server) -> None:
        raise Stopped("SIGINT")

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    assert main(["demo", str(folders[1]), "--port", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")
    assert main(["demo", str(folders[0].parent)]) == 2
    assert "no valid checkpoint" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 800])
def test_two_models_side_by_side(server: Server, width: int) -> None:
    with opened(server.address, width) as page:
        assert page.locator(".side select").nth(1).input_value() == "3"  # the second folder that was given
        page.locator("#steps").fill("2")
        page.get_by_role("button", name="Draw").click()
        page.wait_for_function("document.querySelectorAll('.images canvas').length === 32")
        page.wait_for_function("!document.getElementById('draw').disabled")
        assert overflow(page) == 0 and page.locator("#error").inner_text() == ""
        sheet, _ = ask(server, choice=3, classes="0,1,2,3", per_class=4, steps=2)
        shown = page.evaluate(
            """[...document.querySelectorAll('.side')[1].querySelectorAll('canvas')].map(
                (c) => [...c.getContext('2d').getImageData(0, 0, 16, 16).data])"""
        )
        tiles = sheet.reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 16, 16, 3)
        assert np.array_equal(np.array(shown).reshape(16, 16, 16, 4)[..., :3], tiles)
        page.locator(".images canvas").nth(5).click()
        assert page.locator("#large figure").count() == 2
        page.locator("#large canvas").first.click()
        assert page.locator("#dialog").is_hidden()


@pytest.mark.browser
def test_choosing_classes_and_one_model(server: Server) -> None:
    with opened(server.address) as page:
        page.locator("#compare").uncheck()
        assert page.locator(".side").nth(1).is_hidden()
        page.get_by_role("button", name="none").click()
        page.locator(".classes input[value='7']").check()
        page.locator("#per_class").fill("3")
        page.get_by_role("button", name="Draw").click()
        page.wait_for_function("document.querySelectorAll('.images canvas').length === 3")
        assert page.locator(".images span").all_inner_texts() == ["7"]
        page.locator("#steps").fill("9")
        page.get_by_role("button", name="as the run has them").click()
        assert page.locator("#steps").input_value() == "2"
