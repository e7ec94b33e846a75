"""The site has the layout of the repository, so that links work in both; formulas are MathML."""

import html
import re
from pathlib import Path

import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = ("*.md", "docs/*.md", "examples/**/*.md", "benchmarks/**/*.md", "tests/torture/*.md")
ASSETS = ("docs/site/*.css", "docs/site/*.js", "docs/pictures/*.svg")


def on_files(files: Files, config) -> Files:
    """Our pages under their paths in the repository, with the files that they link to."""
    ours = {path for pattern in (*PAGES, *ASSETS) for path in ROOT.glob(pattern)}
    for page in [path for path in ours if path.suffix == ".md"]:
        for target in re.findall(r"\]\(([^)#:]+)", page.read_text(encoding="utf-8")):
            linked = (page.parent / target).resolve()
            if linked.is_file():
                ours.add(linked)
    files = Files([file for file in files if file.src_dir != config.docs_dir])
    for path in sorted(ours):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_content(content: str, **_) -> str:
    """Formulas between $ and $ without a script that draws them."""

    def mathml(match: re.Match) -> str:
        display = "block" if match[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(match[2]), display=display)

    return re.sub(
        r'<(div|span) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', mathml, content, flags=re.S
    )


def on_post_page(output: str, page, **_) -> None:
    """Refuse what a browser would load from the network."""
    loaded = r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//|<link[^>]* href=\"?(?:https?:)?//"
    if found := re.search(loaded + r"[^>]*", output):
        raise PluginError(f"{page.file.src_uri} is not readable offline: {found[0]}")
