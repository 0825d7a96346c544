"""Draws the pictures of the concepts page into docs/images: `python docs/pictures.py`. Plain SVG, so that the site loads nothing else."""

from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
INK, MUTED, BLUE, ORANGE, PALE, PAPER = "#1b1e23", "#5f6670", "#0072b2", "#d55e00", "#dbeaf5", "#ffffff"


def box(x: int, y: int, w: int, h: int, *lines: str, fill: str = PALE, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    frame = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="{BLUE}"{dash}/>'
    top = y + h / 2 - 9 * (len(lines) - 1) + 5
    return frame + "".join(text(x + w / 2, top + 18 * i, line, size=13 if i == 0 else 11) for i, line in enumerate(lines))


def circle(x: int, y: int, name: str, r: int = 26) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{r}" fill="{PAPER}" stroke="{INK}"/>' + text(x, y + 5, name, size=15)


def text(x: float, y: float, line: str, size: int = 12, colour: str = INK, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{escape(line)}</text>'


def arrow(*points: tuple[int, int], dashed: bool = False, label: str = "", at: tuple[int, int] = (0, 0)) -> str:
    way = " ".join(f"{x},{y}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<polyline points="{way}" fill="none" stroke="{INK}" marker-end="url(#tip)"{dash}/>' + text(*at, label, 11, MUTED)


def picture(width: int, height: int, title: str, *parts: str) -> str:
    size = 'markerWidth="9" markerHeight="9" refX="8" refY="4" orient="auto"'
    tip = f'<marker id="tip" {size}><path d="M0,0 L8,4 L0,8" fill="{INK}"/></marker>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" role="img">'
    ground = f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<defs>{tip}</defs>", ground, *parts, "</svg>\n"])


def modalities() -> str:
    """Records by modalities: observed, missing, with gaps; and the same when they are completed."""
    names, held = ("labs", "rna", "codes", "scan"), ("1.1.", "1111", "01.1", "1g10", "g0.1")
    parts = []
    for left, title, filled in ((40, "a shard", False), (400, "the enriched shard", True)):
        parts += [text(left + 140, 26, title, 14)] + [text(left + 35 + 70 * k, 50, name) for k, name in enumerate(names)]
        for row, flags in enumerate(held):
            for k, flag in enumerate(flags):
                x, y = left + 70 * k + 4, 60 + 34 * row
                whole = flag == "1" or flag == "g"
                colour = PALE if whole else (ORANGE if filled else PAPER)
                opacity = ' fill-opacity="0.35"' if not whole and filled else ""
                dash = "" if whole else ' stroke-dasharray="4 3"'
                parts.append(f'<rect x="{x}" y="{y}" width="62" height="26" rx="4" fill="{colour}"{opacity} stroke="{BLUE}"{dash}/>')
                if flag == "g":
                    gap = f'fill="{ORANGE}" fill-opacity="0.35"' if filled else f'fill="{PAPER}"'
                    parts.append(f'<rect x="{x + 20}" y="{y + 1}" width="14" height="24" {gap}/>')
                if filled and flag != "1":
                    parts.append(text(x + 31, y + 17, "± std", 10, MUTED))
    parts += [arrow((330, 145), (390, 145), label="impute", at=(358, 136))]
    parts += [text(180, 252, "dashed: missing; white inside: single values missing", 11, MUTED)]
    parts += [text(540, 252, "orange: imputed; what was observed is unchanged", 11, MUTED)]
    return picture(720, 268, "Records with missing modalities, and the same completed", *parts)


def model() -> str:
    """The model graph: a shared latent, private latents, decoders; and what infers them."""
    parts = [circle(360, 50, "z0"), text(360, 16, "shared latent: what all modalities tell together", 11, MUTED)]
    for x, name, start, end in ((130, "1", (334, 56), (156, 132)), (360, "2", (360, 76), (360, 112)), (590, "3", (386, 56), (564, 132))):
        seen = name != "3"
        parts += [circle(x, 140, f"z{name}"), arrow(start, end), arrow((x, 166), (x, 210))]
        lines, fill = (f"x{name}", "observed" if seen else "missing: drawn"), PALE if seen else PAPER
        parts += [box(x - 62, 212, 124, 46, *lines, dashed=not seen, fill=fill)]
    parts += [arrow((342, 70), (180, 210)), arrow((376, 71), (402, 130), (402, 210)), arrow((380, 67), (540, 210))]
    parts += [arrow((80, 212), (80, 44), (332, 44), dashed=True), arrow((312, 212), (312, 110), (338, 70), dashed=True)]
    told = "full: p(zj | z0) and p(xj | zj, z0), one likelihood per feature; dashed: q(z0 | what is observed)"
    parts += [text(360, 286, told, 11, MUTED)]
    return picture(720, 300, "The model: z0, private latents and modalities", *parts)


def engine() -> str:
    """Why every shard is imputed exactly once."""
    parts = [
        box(20, 30, 130, 50, "input shard", "name, ETag"),
        box(20, 100, 130, 50, "champion", "model digest"),
        box(20, 170, 130, 50, "settings", "digest"),
        box(230, 96, 140, 58, "output key", "a function of these"),
        *(arrow((150, y), (228, at)) for y, at in ((55, 110), (125, 125), (195, 140))),
        arrow((370, 125), (430, 125)),
        box(432, 66, 126, 118, "object", "published whole;", "a retry or a twin", "writes the same"),
        arrow((558, 125), (600, 125)),
        box(602, 82, 104, 86, "one commit", "of a Delta table", "if its version"),
        text(654, 186, "is still the one read", 11, MUTED),
        arrow((495, 184), (495, 236), (300, 236), (300, 156), dashed=True),
        text(398, 254, "what is there is found by listing, and not done again", 11, MUTED),
    ]
    return picture(720, 270, "Output keys and commits: every shard exactly once", *parts)


def flow() -> str:
    """From a drop of new shards to a new champion."""
    parts = [
        box(20, 40, 110, 54, "new shards", "a drop settles"),
        arrow((130, 67), (170, 67)),
        box(172, 40, 146, 54, "impute what is new", "with the champion"),
        arrow((318, 67), (358, 67)),
        box(360, 40, 110, 54, "drift?", "or 20% growth?"),
        arrow((470, 67), (538, 67), label="no", at=(502, 60)),
        box(540, 40, 160, 54, "done", "next drop"),
        arrow((415, 94), (415, 148), label="yes", at=(432, 125)),
        box(350, 150, 130, 54, "retrain", "a challenger"),
        arrow((350, 177), (310, 177)),
        box(172, 150, 136, 54, "gate", "beside the champion"),
        arrow((172, 177), (132, 177), label="worse", at=(151, 168)),
        box(20, 150, 110, 54, "kept", "with the reason"),
        arrow((240, 204), (240, 240), (540, 240), label="better beyond noise, nowhere worse", at=(390, 234)),
        box(542, 214, 158, 52, "promoted", "impute everything again"),
        arrow((620, 266), (620, 286), (8, 286), (8, 18), (245, 18), (245, 38), dashed=True),
    ]
    return picture(720, 300, "Drop, drift, retraining, gate, promotion", *parts)


def main() -> None:
    for draw in (modalities, model, engine, flow):
        (IMAGES / f"{draw.__name__}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
