"""The evaluation page: metrics, the audit's evidence, and pairs before and after the attack, in one offline file."""

from __future__ import annotations

import difflib
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from dashboards.page import caveat_section, html_page, interval_cell, table_section

if TYPE_CHECKING:
    from trainables.evaluation.examples import Answer, Example
    from trainables.results import Audit, EvaluationManifest

SHOWN = ("rsum", "tr_asr_r1", "ir_asr_r1")
"""Measures beside the recalls: their sum, and the share of the queries answered when clean that an attack loses."""

OWN_STYLE = """
.example { display: grid; gap: 1rem; grid-template-columns: repeat(3, minmax(0, 10rem)); }
.example img { width: 100%; image-rendering: pixelated; border: 1px solid #d9dfe6; }
.found { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.found ol { margin: 0; padding-left: 1.4rem; font-size: .875rem; }
.thumbnails { display: flex; gap: .25rem; list-style: none; }
.thumbnails img { width: 3.25rem; image-rendering: pixelated; border: 3px dotted #d9dfe6; }
.thumbnails .right img { border: 3px solid #009e73; }
.found .right { color: #00694e; font-weight: 600; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
del { background: #fde2d4; } ins { background: #d5f2e5; text-decoration: none; font-weight: 600; }
.failed { color: #b3261e; font-weight: 600; }
"""


def evaluation_page(manifest: EvaluationManifest, target: str, examples: Sequence[Example]) -> str:
    """The whole page; captions and names are escaped.

    Args:
        manifest: what was measured.
        target: the attack that the examples show.
        examples: pairs before and after it.
    """
    title = f"Robustness of {manifest.model}"
    protocol = manifest.protocol
    summary = (
        f"{manifest.queries['tr']} images, {manifest.queries['ir']} captions · epsilon "
        f"{255 * protocol.epsilon:g}/255, words {protocol.words} · protocol {manifest.protocol_hash}"
    )
    if manifest.transfer_from is not None:
        summary += f" · attacked: {manifest.transfer_from}"
    body = caveat_section(manifest.caveats) + _metrics_section(manifest)
    if manifest.audit is not None:
        body += _audit_section(manifest.audit)
    if examples:
        body += f"<section>\n<h2>What {escape(target)} does</h2>\n" + "".join(map(_example, examples)) + "</section>\n"
    return html_page(title, escape(summary), body, OWN_STYLE)


def _metrics_section(manifest: EvaluationManifest) -> str:
    measured = dict.fromkeys(name.partition("/")[2] for name in manifest.metrics)
    names = [name for name in measured if name.startswith(("tr_r", "ir_r")) or name in SHOWN]
    targets = list(dict.fromkeys(name.partition("/")[0] for name in manifest.metrics))
    rows = [
        [escape(target), *(interval_cell(manifest.metrics.get(f"{target}/{name}")) for name in names)]
        for target in targets
    ]
    return table_section("Recall", "recall", ["attack", *names], rows)


def _audit_section(audit: Audit) -> str:
    rows = []
    for check in audit.checks:
        evidence = ", ".join(f"{name}: {value:.3f}" for name, value in check.evidence.items())
        passed = "passed" if check.passed else '<span class="failed">failed</span>'
        rows.append([escape(check.name), escape(check.loss), passed, escape(evidence)])
    heads = ["check", "loss", "result", "evidence"]
    return table_section("Gradient masking", "audit", heads, rows, f"The model: {audit.finding}.")


def _example(example: Example) -> str:
    names = ("clean", "attacked", f"difference × {example.amplified:.0f}")
    pictures = "".join(
        f"<figure>{_image(image, name)}<figcaption>{name}</figcaption></figure>"
        for image, name in zip(example.images, names, strict=True)
    )
    found = ""
    for when, captions, images in zip(("before", "after"), example.captions_found, example.images_found, strict=True):
        found += (
            f"<div><p>{when}: captions found with the image</p><ol>{''.join(map(_caption, captions))}</ol>"
            f"<p>{when}: images found with the caption</p>"
            f'<ol class="thumbnails">{"".join(map(_thumbnail, images))}</ol></div>'
        )
    return (
        f'<h3>image {example.place}</h3>\n<div class="example">{pictures}</div>\n'
        f"<p>{marked(*example.captions)}</p>\n"
        f'<div class="found">{found}</div>\n'
    )


def marked(before: str, after: str) -> str:
    """The caption with what was taken out and put in marked, escaped."""
    old, new = before.split(), after.split()
    parts: list[str] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            parts += map(escape, old[i:j])
            continue
        if i < j:
            parts.append(f"<del>{escape(' '.join(old[i:j]))}</del>")
        if k < m:
            parts.append(f"<ins>{escape(' '.join(new[k:m]))}</ins>")
    return " ".join(parts)


def _caption(answer: Answer) -> str:
    return f"<li{_right(answer)}>{escape(answer.caption)}</li>"


def _thumbnail(answer: Answer) -> str:
    return f"<li{_right(answer)}>{_image(answer.image, 'right' if answer.right else 'wrong')}</li>"


def _right(answer: Answer) -> str:
    return ' class="right"' if answer.right else ""


def _image(png: bytes, name: str) -> str:
    return f'<img src="data:image/png;base64,{b64encode(png).decode()}" alt="{escape(name)}">'
