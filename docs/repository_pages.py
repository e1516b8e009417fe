"""Hook of the documentation site: shows pages and pictures of the repository that lie outside ``docs``.

Links between them are written as paths of the repository, so that they work where the files are read, and become links of
the site here.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[1]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "dina_reward/families/README.md": "families.md",
    "dina_reward/integrations/README.md": "integrations.md",
    "recipes/README.md": "recipes.md",
}
"""Pages of the repository, and where they stand on the site."""

PICTURES = (
    "examples/demo.png",
    "recipes/results/ablation.png",
    "recipes/results/comparison.png",
    "recipes/results/comparison_runs.png",
    "recipes/results/pixel.png",
    "recipes/results/refresh.png",
    "recipes/results/refresh_samples.png",
    "recipes/results/search.png",
    "recipes/results/search_samples.png",
)

_LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages and pictures."""
    for source, target in [*PAGES.items(), *((picture, _picture(picture)) for picture in PICTURES)]:
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turns paths of the repository into paths of the site; links to files that the site lacks become their names."""
    source = Path(page.file.abs_src_path).resolve().relative_to(ROOT)

    def replace(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(source.parent.as_posix(), match[2]))
        target = PAGES.get(path) or (_picture(path) if path in PICTURES else path.removeprefix("docs/"))
        start = posixpath.dirname(page.file.src_uri)
        return f"{match[1]}{posixpath.relpath(target, start or '.')}{match[3] or ''})"

    return _LINK.sub(replace, markdown)


def _picture(path: str) -> str:
    return f"pictures/{os.path.basename(path)}"
