"""Families of tiny bases: how each is written to disk, the size of its pictures, its frames."""

from . import cogvideox, ltx, wan

FAMILIES = {
    "cogvideox": (lambda f, text: cogvideox.write(f, "1.5", text()), (64, 96), 9),
    "ltx": (lambda f, text: ltx.write(f, "0.9.5", text()), (64, 64), 9),
    "wan 2.1": (lambda f, text: wan.write(f, "2.1", text(is_multilingual=True)), (64, 64), 5),
    "wan 2.2": (lambda f, text: wan.write(f, "2.2-A14B", text(is_multilingual=True)), (64, 64), 5),
}
