"""What a result says beside its colours: the EXIF data kept of its input, and a mark that tells it from other pictures."""

import contextlib
import io

from PIL import ExifTags, Image, PngImagePlugin

from plumbing.files import read_file

# Texts alone: they hold what a person would miss, and cannot be odd in the ways that numbers in EXIF data are.
TEXTS = [ExifTags.Base[name] for name in ("ImageDescription", "Make", "Model", "DateTime", "Artist", "Copyright")]
SHOT = [ExifTags.Base[name] for name in (
    "DateTimeOriginal", "DateTimeDigitized", "OffsetTime", "OffsetTimeOriginal", "OffsetTimeDigitized",
    "SubsecTime", "SubsecTimeOriginal", "SubsecTimeDigitized", "LensMake", "LensModel",
)]  # fmt: skip


def keep_exif(image, metadata="basic"):
    """What a result keeps of a Pillow image's EXIF data, as bytes; b"" if there is nothing.

    metadata: "basic" for when and with which camera it was taken, author, rights and description; "gps" for where, too;
    "none". The rest is about the old pixels (size, orientation, thumbnail) or is the camera maker's own.
    """
    base, shot, place = {}, {}, {}
    if metadata != "none":
        with contextlib.suppress(Exception):  # damaged EXIF data is no fault of the picture
            exif = image.getexif()
            base, shot = _texts(exif, TEXTS), _texts(exif.get_ifd(ExifTags.IFD.Exif), SHOT)
            place = exif.get_ifd(ExifTags.IFD.GPSInfo) if metadata == "gps" else {}
    with contextlib.suppress(Exception):  # numbers of the place that cannot be written
        return _exif_bytes(base, shot, place)
    return _exif_bytes(base, shot, {})


def _texts(ifd, tags):
    texts = {}
    for tag in tags:
        with contextlib.suppress(Exception):
            if isinstance(ifd[tag], str) and len(ifd[tag]) < 1000:  # a JPEG has room for 64 KB
                texts[tag] = ifd[tag]
    return texts


def _exif_bytes(base, shot, place):
    if not (base or shot or place):
        return b""
    exif = Image.Exif()
    exif.update({tag: text.encode("latin-1") for tag, text in base.items()})  # as they stand in the file, be it UTF-8
    for ifd, values in ((ExifTags.IFD.Exif, shot), (ExifTags.IFD.GPSInfo, place)):
        if values:
            exif.get_ifd(ifd).update(values)
    data = exif.tobytes()
    return data if len(data) < 60_000 else _exif_bytes(base, shot, {})


MARK = "restored by DirectFlow"  # the same in every result: no date, no path
XMP = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:CreatorTool="{MARK}"/></rdf:RDF></x:xmpmeta>"""


def mark(suffix):
    """The arguments of Pillow's writer that put MARK into a file: PNG text, JPEG comment, WebP XMP."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", MARK)
    return {".png": {"pnginfo": text}, ".webp": {"xmp": XMP.encode()}}.get(suffix, {"comment": MARK})


def is_result(path):
    """Whether a file carries the mark of our results."""
    with contextlib.suppress(Exception):  # what cannot be read carries none
        info = Image.open(io.BytesIO(read_file(path)), formats=("PNG", "JPEG", "WEBP")).info
        return not {MARK, MARK.encode(), XMP.encode()}.isdisjoint(map(info.get, ("Software", "comment", "xmp")))
    return False
