"""The canonical image: what a person sees, whatever the file; and what is refused before it costs anything."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from lookonce.core.errors import ErrorKind, LookonceError
from tests.vision.files import encoded, png_of_declared_size
from vision_service.images import BYTES_A_PIXEL, Decoder, ImageLimits


@pytest.fixture
def decoder():
    return Decoder(ImageLimits(max_bytes=1 << 20, max_pixels=1_000_000))


def pixels(decoder, data):
    image = decoder.decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def gradient(width=40, height=24):
    """An image without symmetry, so that every turn of it differs."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 6, y * 10, (x * y) % 256], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_files_come_out_as_they_went_in(decoder, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(pixels(decoder, encoded(gradient(), kind, **options)), np.asarray(gradient()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(decoder, kind, orientation):
    """The file is turned the inverse way and tagged; the image must come out upright."""
    t = Image.Transpose
    undo = [None, None, t.FLIP_LEFT_RIGHT, t.ROTATE_180, t.FLIP_TOP_BOTTOM, t.TRANSPOSE, t.ROTATE_90, t.TRANSVERSE]
    undo.append(t.ROTATE_270)
    upright = gradient()
    stored = upright if undo[orientation] is None else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    options |= {"lossless": True} if kind == "WEBP" else {}
    result = pixels(decoder, encoded(stored, kind, exif=exif, **options)).astype(int)
    assert result.shape == np.asarray(upright).shape
    assert np.abs(result - np.asarray(upright)).max() <= (24 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore")
def test_broken_exif_counts_as_none(decoder):
    data = encoded(gradient(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffrubbish")
    assert pixels(decoder, data).shape == (24, 40, 3)


def test_transparency_lies_on_white(decoder):
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:8, :, 3] = 255
    rgba[8:, :, 3] = 51  # a fifth
    result = pixels(decoder, encoded(Image.fromarray(rgba)))
    assert (result[:8] == [200, 0, 0]).all()
    assert (np.abs(result[8:].astype(int) - [244, 204, 204]) <= 1).all()


def test_hidden_colours_of_clear_pixels_stay_hidden(decoder):
    rgba = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    rgba[..., 3] = 0
    assert (pixels(decoder, encoded(Image.fromarray(rgba))) == 255).all()


def test_large_transparent_images_are_composited_whole():
    """More rows than one strip holds."""
    rgba = np.random.default_rng(0).integers(0, 256, (1100, 2000, 4), dtype=np.uint8)
    image = Image.fromarray(rgba)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    expected = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    decoder = Decoder(ImageLimits())
    assert np.array_equal(pixels(decoder, encoded(image, compress_level=0)), expected)


def test_grey_with_alpha(decoder):
    image = Image.new("LA", (16, 16), (0, 0))
    image.paste((100, 255), (0, 0, 8, 16))
    result = pixels(decoder, encoded(image))
    assert (result[:, :8] == 100).all() and (result[:, 8:] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_a_transparent_colour(decoder, kind):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (0, 0, 8, 16))
    result = pixels(decoder, encoded(image, kind, transparency=0))
    assert (result[:, :8] == [200, 100, 50]).all() and (result[:, 8:] == 255).all()


def test_palette_with_half_transparent_colours(decoder):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 0, 0, 200, 100, 50])
    result = pixels(decoder, encoded(image, transparency=bytes([51, 255])))
    assert (np.abs(result.astype(int) - 204) <= 1).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_colour_declared_transparent(decoder, mode):
    colour = (1, 2, 3) if mode == "RGB" else 7
    result = pixels(decoder, encoded(Image.new(mode, (16, 16), colour), transparency=colour))
    assert (result == 255).all()


@pytest.mark.parametrize(("mode", "colour", "seen"), [("L", 77, 77), ("1", 1, 255), ("1", 0, 0)])
def test_grey_and_bilevel(decoder, mode, colour, seen):
    assert (pixels(decoder, encoded(Image.new(mode, (16, 16), colour))) == seen).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(decoder, kind):
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    result = pixels(decoder, encoded(Image.fromarray(values), kind))
    assert (np.abs(result[..., 0] - values / 257) <= 0.51).all()
    assert np.array_equal(result[..., 0], result[..., 2])


def test_sixteen_bit_transparent_grey(decoder):
    values = np.full((16, 16), 1000, np.uint16)
    values[:8] = 40000
    result = pixels(decoder, encoded(Image.fromarray(values), transparency=1000))
    assert (result[8:] == 255).all() and (result[:8] == 156).all()


def test_thirty_two_bit_and_float_tiff(decoder):
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    expected = np.rint(ramp * 255)
    for values in (ramp, ramp * 1e6, (ramp * 2e9).astype(np.int32), ramp * 50 - 20):
        result = pixels(decoder, encoded(Image.fromarray(values), "TIFF"))
        assert (np.abs(result[..., 1] - expected) <= 1).all()


def test_float_tiff_with_nothing_finite(decoder):
    result = pixels(decoder, encoded(Image.fromarray(np.full((16, 16), np.nan, np.float32)), "TIFF"))
    assert (result == 0).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(decoder, kind):
    """No ink is white, whether stored inverted (as Adobe's JPEG is, and Pillow writes) or not."""
    image = Image.new("CMYK", (32, 32), (0, 0, 0, 0))
    image.paste((255, 0, 0, 0), (0, 0, 16, 32))
    result = pixels(decoder, encoded(image, kind)).astype(int)
    assert (np.abs(result[:, 24:] - 255) <= 6).all()
    assert (np.abs(result[:, :8] - [0, 255, 255]) <= 6).all()


def test_the_first_frame_and_the_first_page(decoder):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (pixels(decoder, data) == [255, 0, 0]).all()


def refused(decoder, data):
    with pytest.raises(LookonceError) as caught:
        decoder.decode(data)
    assert caught.value.param == "image"
    return caught.value


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (b"", ErrorKind.IMAGE_INVALID, "empty"),
        (b"hello world", ErrorKind.IMAGE_INVALID, "not a JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        (encoded(gradient(), "PPM"), ErrorKind.IMAGE_INVALID, "not a JPEG"),
        (encoded(gradient(), "ICO"), ErrorKind.IMAGE_INVALID, "not a JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", ErrorKind.IMAGE_INVALID, "not a JPEG"),
        (encoded(Image.new("RGB", (1, 1))), ErrorKind.IMAGE_INVALID, "1x1 pixels, each side must have at least 8"),
        (encoded(Image.new("RGB", (30000, 1))), ErrorKind.IMAGE_INVALID, "at least 8"),
        (encoded(Image.new("RGB", (2000, 9))), ErrorKind.IMAGE_INVALID, "at most 200 times the other"),
        (encoded(Image.new("L", (1001, 1000))), ErrorKind.IMAGE_TOO_LARGE, "1001000 pixels, the limit is 1000000"),
        (png_of_declared_size(1 << 30, 1 << 30), ErrorKind.IMAGE_TOO_LARGE, "limit is 1000000"),
        (png_of_declared_size(900, 900), ErrorKind.IMAGE_INVALID, "damaged or truncated"),
        (bytes((1 << 20) + 1), ErrorKind.PAYLOAD_TOO_LARGE, "1048577 bytes, the limit is 1.0 MiB"),
    ],
)
def test_refusals_name_reason_and_limit(decoder, data, kind, text):
    error = refused(decoder, data)
    assert error.kind is kind
    assert text in error.message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(decoder, kind, share):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    assert refused(decoder, data[: int(len(data) * share)]).kind is ErrorKind.IMAGE_INVALID


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it could read around
def test_no_file_however_mangled_makes_another_error(decoder):
    """Bytes flipped all over every format: decoded or refused, never anything else."""
    random, kinds = np.random.default_rng(2), set()
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        whole = np.frombuffer(encoded(gradient(), kind), np.uint8)
        for _ in range(60):
            data = whole.copy()
            data[random.integers(0, min(len(data), 400), 4)] = random.integers(0, 256, 4)
            try:
                assert decoder.decode(data.tobytes()).mode == "RGB"
            except LookonceError as error:
                kinds.add(error.kind)
    assert kinds <= {ErrorKind.IMAGE_INVALID, ErrorKind.IMAGE_TOO_LARGE}
    assert ErrorKind.IMAGE_INVALID in kinds


def test_a_bomb_costs_no_memory():
    """A 24 kB file of 400 megapixels, refused by a process that may not grow."""
    script = """
import resource
from io import BytesIO
from PIL import Image
from lookonce.core.errors import LookonceError
from vision_service.images import BYTES_A_PIXEL, Decoder, ImageLimits
from tests.vision.files import png_of_declared_size
decoder = Decoder(ImageLimits())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for side in (20000, 12000):
    try:
        decoder.decode(png_of_declared_size(side, side))
    except LookonceError as error:
        print(error.kind.value)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 < 20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["image_too_large", "image_too_large", "True"]


def test_a_format_that_takes_more_memory_may_have_fewer_pixels():
    decoder = Decoder(ImageLimits(max_pixels=100 * 100))
    assert decoder.decode(encoded(Image.new("RGB", (70, 70)), "WEBP")).size == (70, 70)
    with pytest.raises(LookonceError, match="the limit for WEBP files is 5000") as caught:
        decoder.decode(encoded(Image.new("RGB", (71, 71)), "WEBP"))
    assert caught.value.kind is ErrorKind.IMAGE_TOO_LARGE


def test_images_decoded_at_once_share_one_budget():
    """Eight threads, each image over half the budget: never two at a time."""
    decoder = Decoder(ImageLimits(max_pixels=10_000))
    peak, lock = [0], threading.Lock()
    space = decoder._space

    def watched(pixels):
        context = space(pixels)
        enter = context.__enter__

        class Watch:
            def __enter__(self):
                enter()
                with lock:
                    peak[0] = max(peak[0], decoder._held)

            def __exit__(self, *error):
                return context.__exit__(*error)

        return Watch()

    decoder._space = watched
    data = encoded(Image.new("RGB", (80, 80)))
    threads = [threading.Thread(target=decoder.decode, args=(data,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert peak[0] == 6400 * BYTES_A_PIXEL
    assert decoder._held == 0
