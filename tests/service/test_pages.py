"""The playground at `/` and `/docs`: whole, of this service alone, and open where keys are configured."""

from __future__ import annotations

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import pytest

from service.keys import new_key
from service.pages import BELOW, PATHS
from tests.service.conftest import serving

if TYPE_CHECKING:
    import httpx

    from tests.service.conftest import MakeSettings

ROOT = Path(__file__).parents[2]
FILES = ROOT / "service" / "playground"
SCRIPTS = sorted((FILES / "static").glob("*.js"))
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}
PAGES = ("/", "/docs")


class Page(HTMLParser):
    """What a page loads, and what of it a strict policy would forbid."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.labeled: list[str] = []
        self.inline: list[str] = []
        self.language: str | None = None
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "html":
            self.language = given.get("lang")
        self.ids += [given["id"]] if "id" in given else []
        self.labeled += [given["for"]] if tag == "label" and "for" in given else []
        self.links += [given["href"]] if tag == "a" else []
        self.loaded += [given[name] for name in ("src", "href") if name in given and tag != "a"]
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        self.inline += [tag] if tag == "style" else []
        self._script = tag == "script" and "src" not in given

    def handle_data(self, data: str) -> None:
        if self._script and data.strip():
            self.inline.append(data)


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_and_all_that_it_loads_come_from_here(client: httpx.AsyncClient, path: str) -> None:
    """Each file is there, in the type that a browser insists on; what a script imports, too."""
    response = await client.get(path)
    assert response.headers["content-type"].startswith("text/html")
    page = Page(response.text)
    assert len(page.loaded) >= 3
    imported = re.findall(r'(?:from|fetch\() ?"([^"]+\.(?:js|jpg))"', "".join(map(Path.read_text, SCRIPTS)))
    assert {"./api.js", "playground/scene.jpg"} <= set(imported)
    files = [urljoin(path, each) for each in page.loaded]
    files += [urljoin("/playground/" if each.startswith("./") else "/", each) for each in imported]
    for each in files:
        assert each.startswith(BELOW), each
        loaded = await client.get(each)
        assert loaded.status_code == 200, each
        assert loaded.headers["content-type"].split(";")[0] == TYPES[Path(each).suffix], each
    for link in page.links:
        if not link.startswith("#"):
            assert (await client.get(urljoin(path, link))).status_code == 200, link


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_runs_no_script_of_others(client: httpx.AsyncClient, path: str) -> None:
    """The policy lets in files of this service alone, and the page has nothing inline that it would stop."""
    response = await client.get(path)
    policy = dict(
        each.strip().split(" ", 1) for each in response.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert path == "/docs" or policy["style-src"] == "'self'"
    page = Page(response.text)
    assert page.inline == []
    assert page.language == "en"


def test_every_field_of_the_playground_has_a_label() -> None:
    """And every element that the script looks for is in the page."""
    text = (FILES / "index.html").read_text()
    page = Page(text)
    fields = re.findall(r'<(?:input|select)\b[^>]*\bid="([^"]+)"([^>]*)>', text)
    wrapped = re.findall(r'<label class="check"><input id="([^"]+)"', text)
    for name, rest in fields:
        assert name in page.labeled or name in wrapped or "aria-label=" in rest, name
    wanted = re.findall(r'\$\("([^"]+)"\)', (FILES / "static" / "page.js").read_text())
    assert set(wanted) <= set(page.ids)


def test_scripts_name_no_other_host_and_write_no_markup() -> None:
    """Answers and names of files are text on the page, never HTML; the key goes into no storage."""
    for script in SCRIPTS:
        text = script.read_text().replace("http://www.w3.org/2000/svg", "")
        for forbidden in (
            "http://",
            "https://",
            "innerHTML",
            "outerHTML",
            "eval(",
            "localStorage",
            "cookie =",
        ):
            assert forbidden not in text, (script.name, forbidden)


async def test_the_docs_are_named_for_the_product(client: httpx.AsyncClient) -> None:
    """Not for the tool that shows them."""
    assert "<title>PrismPrune API</title>" in (await client.get("/docs")).text


async def test_a_browser_asks_again_and_gets_the_file_once(client: httpx.AsyncClient) -> None:
    """After an update it has the new file at once; until then a 304."""
    for path in ("/", "/playground/page.js", "/docs/static/swagger-ui.css"):
        first = await client.get(path)
        assert first.headers["cache-control"] == "no-cache"
        again = await client.get(path, headers={"If-None-Match": first.headers["etag"]})
        assert again.status_code == 304
        assert (await client.head(path)).status_code == 200


async def test_pages_are_no_part_of_the_api(client: httpx.AsyncClient) -> None:
    """Neither in the document, nor with a metric's label for each file, found or not."""
    paths = (
        "/",
        "/playground/page.js",
        "/playground/a",
        "/playground/b",
        "/docs/static/c",
        "/playground/../x",
    )
    for path in paths:
        await client.get(path)
    assert not {*PATHS, "/playground/{name}"} & set((await client.get("/openapi.json")).json()["paths"])
    labels = set(re.findall(r'route="([^"]*)"', (await client.get("/metrics")).text))
    assert labels <= {*PATHS, *(f"{each}{{name}}" for each in BELOW), "unmatched"}


async def test_pages_are_open_where_keys_are_asked_for(make_settings: MakeSettings) -> None:
    """They hold no data, and a browser has a key only once somebody typed it into one of them."""
    _, line = new_key("alice")
    async with serving(make_settings(api_keys=(line,))) as client:
        for path in (*PATHS, "/playground/page.css", "/docs/static/swagger-ui-bundle.js"):
            assert (await client.get(path)).status_code == 200, path
        for path in ("/v1/models", "/metrics", "/playground", "/docs/", "/docs/static/../../v1/models"):
            assert (await client.get(path)).status_code in (401, 404), path
        for path in ("/docs/static/%2e%2e/%2e%2e/v1/models", "/playground/..%2f..%2fapp.py"):
            assert (await client.get(path)).status_code in (401, 404), path
        assert (await client.post("/")).status_code == 405


async def test_the_documented_command_is_for_the_address_asked(make_settings: MakeSettings) -> None:
    """It names host and port of the reader's own request, a picture that exists, and a key if one is due."""
    _, line = new_key("alice")
    for keys, key in (((), ""), ((line,), ' -H "Authorization: Bearer $KEY"')):
        async with serving(make_settings(api_keys=keys)) as client:
            document = (await client.get("/openapi.json", headers={"Host": "prism.example:81"})).json()
        said = document["info"]["description"]
        assert f"curl -s http://prism.example:81/v1/answer{key} \\" in said
        (picture,) = re.findall(r"image=@(\S+)", said)
        assert (ROOT / picture).is_file()


async def test_behind_a_prefix_the_document_has_it(make_settings: MakeSettings) -> None:
    """As a proxy that strips a prefix tells the server."""
    async with serving(make_settings()) as client:
        client._transport.root_path = "/prism"  # type: ignore[attr-defined]
        document = (await client.get("/prism/openapi.json")).json()
    assert document["servers"] == [{"url": "/prism"}]


def test_the_files_are_in_the_package() -> None:
    """So that an image, which has no source tree, serves them as well."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "service"
    ]
    packed = {path for pattern in told for path in (ROOT / "service").glob(pattern)}
    assert {path for path in FILES.rglob("*") if path.is_file()} <= packed
