"""The report page: inert whatever the plan holds, the plan's own numbers, usable in a real browser by keyboard."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import cached, given_plan, prediction, scored_plan

from axolotl_layersel.plan import Plan
from axolotl_layersel.plan_parts import ScoredSample
from axolotl_layersel.report.inline_svg import inline_charts
from axolotl_layersel.report.page import _json, render, write_report

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>\u2028</title></style><!--"


class Structure(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem in ("script", "style"):
            self.raw[-1] += data


def evil_plan() -> Plan:
    """A plan with markup in every text that a plan can hold."""
    return scored_plan(
        base_model=EVIL,
        revision=EVIL,
        created_by={EVIL: EVIL},
        options={"policy": EVIL, "coverage": EVIL, "deviation": EVIL, EVIL: [EVIL]},
        sample=ScoredSample(128, seed=1, dataset_fingerprint=EVIL, tokenizer_fingerprint=EVIL, datasets=[EVIL]),
        notes=[EVIL],
        prediction=prediction(num_layers=12, first_trainable=3, why=EVIL),
        config_updates={EVIL: EVIL},
    )


def many_plans() -> dict[str, Plan]:
    costs = prediction(num_layers=12, first_trainable=5)
    return {
        "scored": scored_plan(num_layers=30, notes=["one note"]),
        "deep": scored_plan(num_layers=80, first_trainable=60, adapter="qlora"),
        "ratios between two decimals": scored_plan(num_layers=8, first_trainable=7),
        "one layer": scored_plan(num_layers=1),
        "two layers": scored_plan(num_layers=2, adapter=None),
        "given, costs known": given_plan(prediction=costs),
        "given": given_plan(),
        "long name": scored_plan(base_model="x" * 300),
        "hostile": evil_plan(),
    }


@pytest.mark.parametrize("plan", many_plans().values(), ids=list(many_plans()))
def test_a_page_needs_nothing_from_outside(plan: Plan) -> None:
    structure = Structure(render(plan, config_text="base_model: x\n"))
    for tag, attributes in structure.elements:
        assert not {"src", "style", "srcset", "action", "xlink:href"} & set(attributes), tag
        assert (attributes.get("href") or "#").startswith("#"), "a marker of the same chart"
        assert not [name for name in attributes if name.startswith("on")], tag
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")


def test_hostile_texts_are_inert() -> None:
    ordinary = Structure(render(scored_plan(notes=["n"]), config_text="c"))
    page = render(evil_plan(), config_text=f"</pre>{EVIL}")
    structure = Structure(page)
    assert [tag for tag, _ in structure.elements].count("script") == 2
    assert {tag for tag, _ in structure.elements} == {tag for tag, _ in ordinary.elements}
    assert "alert(1)" not in "".join(structure.raw)
    assert "<script>alert" not in page and "<img" not in page
    assert page.count("&lt;script&gt;alert(1)") > 8 and "&lt;/pre&gt;&quot;" in page


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_data_survives_and_cannot_leave_its_script(values: Any) -> None:
    text = _json(values)
    assert json.loads(text) == values
    assert not set("<>&\u2028\u2029") & set(text)


def test_the_policy_allows_the_page_s_own_style_and_script_and_nothing_else() -> None:
    page = render(scored_plan())
    (policy,) = (a["content"] or "" for _, a in Structure(page).elements if a.get("http-equiv"))
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    style, _, script = Structure(page).raw
    for name, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert page.index("Content-Security-Policy") < page.index("<style>") < page.index("<script")


def test_the_data_are_the_plan_s_curves() -> None:
    plan = scored_plan(num_layers=7)
    _, data, _ = Structure(render(plan)).raw
    values = json.loads(data)
    assert plan.prediction and plan.scores
    assert len(values["sentences"]) == 7 and values["first"] == plan.first_trainable
    assert values["curves"]["retention"] == plan.scores.retention
    for name in ("step", "backward", "saved_activation_bytes", "trainable_parameters"):
        assert values["curves"][name] == getattr(plan.prediction.per_cut, name)
        assert len(values["ratios"][name]) == len(values["amounts"][name]) == 7


def test_a_run_with_a_prefix_cache_has_a_tile_and_its_sentences() -> None:
    plan = cached(scored_plan(num_layers=7))
    page = render(plan)
    _, data, _ = Structure(page).raw
    assert plan.prediction and plan.prediction.cache
    assert json.loads(data)["curves"]["whole_run"] == plan.prediction.per_cut.whole_run
    text = unescape(re.sub(r"<[^>]+>", " ", page))
    assert f"FLOPs of the run, cached {plan.prediction.cache.whole_run:.2f}" in text
    assert "States take 8.19 GB on disk." in text and "5.53 GB at the peak of a step" in text
    assert "cached" not in render(scored_plan(num_layers=7))


def test_texts_of_the_page() -> None:
    plan = scored_plan(num_layers=30, first_trainable=6, notes=["a note"])
    page = render(plan, config_text="adapter: lora\n")
    text = unescape(re.sub(r"<[^>]+>", " ", page))
    assert "Train layers 6 to 29 (24 of 30)" in text
    assert "HuggingFaceTB/SmolLM2-135M, LoRA, yahma/alpaca-cleaned" in text
    assert "0.66 of the resamples choose it" in text and "a note" in text
    assert "layersel: {first_layer: 6}" in text and "adapter: lora" in text
    assert "Findings of ACL 2025. arXiv:2406.11753" in text
    assert page.count("<figure>") == 4 and page.count('<th scope="row">') == 30
    assert render(plan, config_text="adapter: lora\n") == page, "equal plans give equal pages"


def test_a_given_cut_shows_only_what_is_known() -> None:
    page = render(given_plan())
    assert "nothing was scored" in page and "No cost is known" in page
    assert "<figure>" not in page and "<table>" not in page and "Config" not in page.split("</style>")[1]
    with_costs = render(given_plan(prediction=prediction(num_layers=12, first_trainable=5)))
    assert with_costs.count("<figure>") == 1 and "What every cut costs" in with_costs


@pytest.mark.parametrize("plan", many_plans().values(), ids=list(many_plans()))
def test_charts_lie_inside_their_frame_and_are_inert(plan: Plan) -> None:
    ids: list[str] = []
    for chart in inline_charts(plan):
        root = ElementTree.fromstring(chart)
        left, top, width, height = map(float, root.attrib["viewBox"].split())
        frame = json.loads(root.attrib["data-frame"])
        assert left <= frame["left"] < frame["zero"] + (plan.num_layers - 1) * frame["step"] <= width
        assert top <= frame["top"] < frame["bottom"] <= height
        (edge,) = root.iterfind(".//g[@class]/path[@stroke='#d55e00']")
        x = float(edge.attrib["d"].split()[1])
        assert x == pytest.approx(frame["zero"] + plan.first_trainable * frame["step"], abs=0.01)
        for element in root.iter():
            assert element.tag in {"svg", "g", "path", "use", "text", "tspan", "defs", "clipPath", "rect"}
            assert "nan" not in element.get("d", "") and "style" not in element.attrib
            ids += [element.attrib["id"]] if "id" in element.attrib else []
    assert len(ids) == len(set(ids)), "no id occurs in two charts of one page"


def test_files_are_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "layersel"
    written = write_report(scored_plan(), folder, config_text=None)
    assert [path.name for path in written] == ["deviation.png", "deviation.svg", "report.html"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in written)
    assert written[2].read_text(encoding="utf-8") == render(scored_plan())


def test_a_plan_with_nothing_to_draw_has_a_page_and_no_figure(tmp_path: Path) -> None:
    assert [path.name for path in write_report(given_plan(), tmp_path, config_text=None)] == ["report.html"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_report(scored_plan(), tmp_path / "file" / "layersel", config_text=None)


KEYS = {"right": "\ue014", "home": "\ue011", "end": "\ue010", "tab": "\ue004", "enter": "\ue007"}


class Browser:
    """A headless Chromium, spoken to by WebDriver."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder = folder
        self.driver = subprocess.Popen(
            [shutil.which("chromedriver") or "", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.url = f"http://127.0.0.1:{port}"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        arguments = (
            "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
            f"--disable-component-update --disable-sync --user-data-dir={folder / 'profile'}"
        )
        wanted = {
            "goog:chromeOptions": {"binary": shutil.which("chromium"), "args": arguments.split()},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        deadline = time.monotonic() + 60
        while True:
            try:
                session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
                break
            except (ConnectionError, urllib.error.URLError):
                if self.driver.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        self.url += f"/session/{session['sessionId']}"

    def call(self, method: str, path: str, values: dict[str, Any] | None = None) -> Any:
        body = None if method != "POST" else json.dumps(values or {}).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"}, method=method)
        with self.opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: str, *, width: int = 1100, height: int = 900, dark: bool = False) -> None:
        file = self.folder / "page.html"
        file.write_text(page, encoding="utf-8")
        self.tool(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tool("Emulation.setEmulatedMedia", features=[scheme])
        self.call("POST", "/url", {"url": file.as_uri()})

    def tool(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": f"return {script}", "args": []})

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({selector!r}).textContent"))

    def press(self, *keys: str) -> None:
        """Press keys wherever the focus is."""
        actions = [{"type": kind, "value": KEYS[key]} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def complaints(self) -> list[str]:
        """What the browser logged: script errors, violations of the policy, failed loads."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        self.call("DELETE", "")
        self.driver.terminate()
        self.driver.wait(timeout=30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip(
            "chromium and chromedriver (Debian: chromium, chromium-driver) are not installed; runs where they are"
        )
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def test_a_hostile_plan_runs_nothing_in_a_browser(browser: Browser) -> None:
    browser.complaints()
    browser.open(render(evil_plan(), config_text=f"</pre>{EVIL}"))
    with pytest.raises(urllib.error.HTTPError):  # no dialog was opened
        browser.call("GET", "/alert/text")
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.images.length") == 0
    assert EVIL.replace("\u2028", " ") in browser.text(".note")
    assert browser.run("performance.getEntriesByType('resource').length") == 0
    assert browser.complaints() == []


def test_the_policy_holds_in_a_browser(browser: Browser) -> None:
    """Were a text to get through after all, the policy would stop it."""
    browser.complaints()
    browser.open(render(scored_plan()).replace("<footer>", "<footer><script>window.got_through = 1</script>"))
    assert browser.run("window.got_through === undefined")
    assert any("Content Security Policy" in line for line in browser.complaints())


def test_the_slider_by_keyboard(browser: Browser) -> None:
    plan = scored_plan(num_layers=30, first_trainable=6)
    assert plan.scores and plan.prediction
    curves = {
        "retention": plan.scores.retention,
        **{n: getattr(plan.prediction.per_cut, n) for n in ("step", "trainable_parameters")},
    }

    def shown() -> int:
        """The cut that the page shows, the same everywhere on it."""
        first = int(browser.run("document.getElementById('first').value"))
        assert browser.text("#at") == str(first)
        assert browser.text("output").startswith(f"Cut at {first}: ")
        for name, curve in curves.items():
            assert browser.text(f'.tile[data-curve="{name}"] b') == f"{curve[first]:.2f}"
        for part in (".strip .frozen", ".chart .frozen"):
            assert browser.run(f"document.querySelectorAll({part!r}).length") == first
        edges = browser.run("[...document.querySelectorAll('.edge, .ground')].map(c => c.classList.contains('hidden'))")
        assert edges == [first == 0] * 8
        return first

    browser.complaints()
    browser.open(render(plan))
    assert browser.run("document.getElementById('reset').disabled")
    assert shown() == 6
    assert browser.text('.tile[data-curve="trainable_parameters"] .amount') == "3.9 M"
    assert browser.text('.tile[data-curve="saved_activation_bytes"] .amount') == "1.1 GiB"
    browser.press("tab")
    assert browser.run("document.activeElement.id") == "first"
    assert browser.run("document.activeElement.labels[0].textContent") == "First trainable layer: 6"
    browser.press("right", "right")
    assert shown() == 8
    assert browser.run("document.activeElement.getAttribute('aria-valuetext')") == "first trainable layer 8"
    browser.press("end")
    assert shown() == 29
    assert f"layer 29 trained (1 of 30), improvement kept {plan.scores.retention[29]:.2f}" in browser.text("output")
    browser.press("home")
    assert shown() == 0
    assert browser.text("#sentence") == browser.text('output[aria-live="polite"][for="first"]')
    browser.press("tab", "enter")
    assert shown() == 6
    assert browser.run("document.activeElement.id") == "first", "the focus goes back to the slider"
    assert browser.complaints() == []


def test_the_slider_draws_what_a_plan_with_that_cut_draws(browser: Browser) -> None:
    script = (
        "[...document.querySelectorAll('.edge path, .ground path, .point use')]"
        ".map(part => part.getBBox()).map(box => [box.x, box.y, box.width, box.height])"
    )
    browser.open(render(scored_plan(num_layers=30, first_trainable=8)))
    wanted = browser.run(script)
    assert len(wanted) == 2 * 4 + 3
    for start in (6, 0):
        browser.open(render(scored_plan(num_layers=30, first_trainable=start)))
        assert start == 0 or browser.run(script) != wanted
        browser.press("tab", *["right"] * (8 - start))
        for got, box in zip(browser.run(script), wanted, strict=True):
            assert got == pytest.approx(box, abs=0.05)
        shown = browser.run("[...document.querySelectorAll('.edge path')].map(e => getComputedStyle(e).opacity)")
        assert shown == ["1"] * 4


@pytest.mark.slow
def test_the_static_page_says_what_the_script_says(browser: Browser) -> None:
    """Without the script the page is complete for the plan's own cut; the script adds the slider."""
    for plan in many_plans().values():
        page = render(plan)
        browser.open(page.replace('"use strict"', '"use strict"; stop_here()'))  # another hash: the policy stops it
        parts = "[...document.querySelectorAll('.tile, output, .chart, .strip')].map(part => part.outerHTML)"
        hidden = browser.run("document.getElementById('control').offsetHeight === 0")
        static = browser.run(parts.replace("outerHTML", "textContent"))
        browser.open(page)
        assert hidden and browser.run("document.getElementById('control').offsetHeight > 0")
        assert browser.run(parts.replace("outerHTML", "textContent")) == static


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 1100])
def test_no_page_scrolls_sideways(browser: Browser, width: int) -> None:
    for name, plan in many_plans().items():
        browser.open(render(plan, config_text="key: " + "x" * 400), width=width)
        inner = browser.run("document.documentElement.clientWidth")
        assert width - 20 <= inner <= width  # a desk's scrollbar takes some
        assert browser.run("document.documentElement.scrollWidth") == inner, name


def test_dark_screens_get_a_dark_page(browser: Browser) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    browser.open(render(scored_plan()))
    assert browser.run(background) == "rgb(255, 255, 255)"
    line = "getComputedStyle(document.querySelector('.edge path')).stroke"
    assert browser.run(line) == "rgb(213, 94, 0)"
    browser.open(render(scored_plan()), dark=True)
    assert browser.run(background) == "rgb(20, 23, 26)"
    assert browser.run(line) == "rgb(240, 128, 60)", "the charts follow"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_stand_out_from_their_ground(browser: Browser, dark: bool) -> None:
    """At least 4.5 : 1, as WCAG 2 asks of text."""
    browser.open(render(scored_plan(notes=["n"])), dark=dark)

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = browser.run(
        "['--ink', '--soft', '--trained'].flatMap(ink => ['--page', '--card'].map(ground => [ink, ground].map(name => {"
        "const probe = document.body.appendChild(document.createElement('i'));"
        "probe.style.color = `var(${name})`; return getComputedStyle(probe).color; })))"
    )
    assert len(pairs) == 6
    for ink, ground in pairs:
        low, high = sorted((luminance(ink), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)
