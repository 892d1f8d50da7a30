"""What mkdocs does with the pages beside rendering them.

A link out of docs/ leads to the file in the repository, and a picture from there is copied into the site. A page that
says `<!-- include: FILE -->` is that file of the repository. `llms.txt` lists all pages for language models.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
FIGURES = "figures"

_pages: list[Page] = []  # in the navigation's order
_first_sentences: dict[str, str] = {}


def on_files(files: Files, config: Any) -> Files:
    """Copies the pictures that pages show from outside docs/."""
    for page in files.documentation_pages():
        for mark, _, target, _ in LINK.findall(page.content_string):
            path = in_repository(f"docs/{page.src_uri}", target)
            if mark and not path.startswith("docs/"):
                uri = f"{FIGURES}/{posixpath.basename(path)}"
                if uri not in files.src_uris:
                    files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Includes whole files, and turns links out of docs/ into links to the repository."""
    uri, origin = page.file.src_uri, f"docs/{page.file.src_uri}"
    if included := INCLUDE.search(markdown):
        origin = included[1]
        markdown = (ROOT / origin).read_text(encoding="utf-8")
    _first_sentences[uri] = first_sentence(markdown)

    def link(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups(default="")
        path = in_repository(origin, target)
        if path.startswith("docs/"):
            inside = posixpath.relpath(path, posixpath.dirname(f"docs/{uri}"))
            return f"{mark}[{text}]({inside}{anchor})"
        if mark:
            return f"![{text}]({posixpath.relpath(f'{FIGURES}/{posixpath.basename(path)}', posixpath.dirname(uri))})"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{path}{anchor})"

    return LINK.sub(link, markdown)


def on_nav(nav: Navigation, config: Any, files: Files) -> None:
    """Keeps the order for llms.txt."""
    _pages[:] = nav.pages


def on_post_build(config: Any) -> None:
    """Writes llms.txt (llmstxt.org): a line for each page, by section."""
    lines, section = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Pages", ""], None
    for page in sorted(_pages, key=lambda page: bool(page.ancestors)):  # those of no section first
        of_page = page.ancestors[0].title if page.ancestors else None
        if of_page != section:
            lines += ["", f"## {of_page}", ""]
            section = of_page
        lines.append(f"- [{page.title}]({page.canonical_url}): {_first_sentences[page.file.src_uri]}")
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def first_sentence(markdown: str) -> str:
    """Of the first paragraph of prose."""
    paragraphs = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL).split("\n\n")
    prose = next(
        (
            text
            for text in paragraphs
            if text.strip() and text.strip()[0] not in "#<|!->:1" and not text.startswith("    ")
        ),
        "",
    )
    return re.split(r"(?<=\.) (?=[A-Z])", LINK.sub(lambda match: match[2], " ".join(prose.split())))[0]


def in_repository(origin: str, target: str) -> str:
    """The path from the repository's root that a link in a file means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
