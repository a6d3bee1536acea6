"""Draws scenes of coloured shapes and says exactly what is in them.

A scene is a Pillow image plus its ground truth. It knows nothing of models, tokens or questions.
"""

import io
import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

KINDS = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
HELD_OUT = frozenset({("cyan", "star")})  # (colour, kind) pairs never drawn nor named in training
CELL = 28  # pixels of one image token's side after preprocessing: patch 14 times merge 2
MIN_PIXELS, MAX_PIXELS = (
    CELL * CELL * 36,
    CELL * CELL * 50,
)  # a square gets 6x6 or 7x7; what preprocessor_config.json says, too

ANCHORS = {  # RGB; names as people and common palettes use them
    "red": ((255, 0, 0), (220, 30, 30), (200, 20, 40), (229, 57, 53), (214, 39, 40)),
    "orange": ((255, 165, 0), (255, 140, 0), (245, 124, 0), (255, 127, 14), (250, 150, 30)),
    "yellow": ((255, 255, 0), (250, 225, 30), (255, 220, 0), (253, 216, 53), (240, 230, 40)),
    "green": ((0, 128, 0), (0, 200, 0), (40, 160, 60), (67, 160, 71), (0, 255, 0), (44, 160, 44)),
    "cyan": ((0, 255, 255), (0, 200, 215), (38, 198, 218), (0, 188, 212), (60, 220, 230)),
    "blue": ((0, 0, 255), (30, 80, 220), (25, 90, 210), (30, 136, 229), (40, 60, 200), (31, 119, 180)),
    "purple": ((128, 0, 128), (140, 60, 200), (142, 36, 170), (148, 103, 189), (110, 20, 150)),
    "pink": ((255, 105, 180), (255, 192, 203), (240, 98, 146), (255, 150, 190), (255, 130, 170)),
}


@dataclass(frozen=True)
class Shape:
    """One shape. Centre, radius in source pixels; radius is that of the circle around it; box = (x0, y0, x1, y1)."""

    kind: str
    colour: str
    cx: float
    cy: float
    radius: float
    angle: float  # degrees, clockwise
    rgb: tuple[int, int, int]
    form: float  # star: inner radius; cross: half arm width; triangle: half base, all over the radius
    box: tuple[float, float, float, float]

    def truth(self) -> dict:
        return {"kind": self.kind, "colour": self.colour, "box": [round(value, 1) for value in self.box]}


@dataclass(frozen=True)
class Scene:
    """An image (RGB) and its shapes, back to front. `image` is what a user would send."""

    seed: int
    image: Image.Image
    shapes: tuple[Shape, ...]
    background: str = "plain"
    extra: dict = field(default_factory=dict)

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG")
        return buffer.getvalue()

    def jpeg(self, quality: int = 85) -> bytes:
        buffer = io.BytesIO()
        self.image.save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()


def grid_of(width: int, height: int) -> tuple[int, int]:
    """(rows, columns) of image tokens that Qwen2-VL's smart_resize gives an image under our pixel limits."""
    rows, columns = max(1, round(height / CELL)), max(1, round(width / CELL))
    pixels = rows * columns * CELL * CELL
    if pixels > MAX_PIXELS:
        beta = math.sqrt(height * width / MAX_PIXELS)
        rows, columns = (max(1, math.floor(side / beta / CELL)) for side in (height, width))
    elif pixels < MIN_PIXELS:
        beta = math.sqrt(MIN_PIXELS / (height * width))
        rows, columns = (math.ceil(side * beta / CELL) for side in (height, width))
    return rows, columns


def outline_points(shape: Shape, scale: float = 1.0) -> list[tuple[float, float]] | None:
    """Corners of a shape in pixels times scale, or None for a circle."""
    if shape.kind == "circle":
        return None
    if shape.kind == "square":
        unit = [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)]
    elif shape.kind == "triangle":
        unit = [(0.0, -1.0), (shape.form, 0.62), (-shape.form, 0.62)]
    elif shape.kind == "star":
        unit = [
            (math.sin(i * math.pi / 5) * r, -math.cos(i * math.pi / 5) * r)
            for i in range(10)
            for r in ((1.0 if i % 2 == 0 else shape.form),)
        ]
    else:
        a, b = shape.form, 0.95
        unit = [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    cosine, sine = math.cos(math.radians(shape.angle)), math.sin(math.radians(shape.angle))
    return [
        (
            (shape.cx + (x * cosine - y * sine) * shape.radius) * scale,
            (shape.cy + (x * sine + y * cosine) * shape.radius) * scale,
        )
        for x, y in unit
    ]


def _paint(draw: ImageDraw.ImageDraw, shape: Shape, scale: float, fill, outline=None, width: int = 0) -> None:
    points = outline_points(shape, scale)
    if points is None:
        r = shape.radius * 0.9
        box = [(shape.cx - r) * scale, (shape.cy - r) * scale, (shape.cx + r) * scale, (shape.cy + r) * scale]
        draw.ellipse(box, fill=fill, outline=outline, width=width)
        return
    draw.polygon(points, fill=fill)
    if outline is not None and width:
        draw.line([*points, points[0], points[1]], fill=outline, width=width, joint="curve")


def _rgb(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    anchor = np.array(ANCHORS[colour][rng.integers(len(ANCHORS[colour]))])
    return tuple(int(v) for v in np.clip(anchor + rng.integers(-12, 13, 3), 0, 255))


def _form(kind: str, rng: np.random.Generator) -> float:
    low, high = {"star": (0.38, 0.5), "cross": (0.22, 0.34), "triangle": (0.72, 0.98)}.get(kind, (1.0, 1.0))
    return float(rng.uniform(low, high))


def _make(kind: str, colour: str, cx: float, cy: float, radius: float, rng: np.random.Generator) -> Shape:
    angle = 0.0 if kind == "circle" or rng.random() < 0.35 else float(rng.uniform(-20, 20))
    shape = Shape(kind, colour, cx, cy, radius, angle, _rgb(colour, rng), _form(kind, rng), (0, 0, 0, 0))
    points = outline_points(shape)
    if points is None:
        r = radius * 0.9
        box = (cx - r, cy - r, cx + r, cy + r)
    else:
        xs, ys = zip(*points, strict=True)
        box = (min(xs), min(ys), max(xs), max(ys))
    return Shape(kind, colour, cx, cy, radius, angle, shape.rgb, shape.form, box)


def _place(
    count: int, width: int, height: int, grid: tuple[int, int], rng: np.random.Generator, pairs: list[tuple[str, str]]
) -> list[Shape]:
    """Up to `count` shapes whose centres lie in different cells and that overlap at most a little."""
    rows, columns = grid
    short = min(width, height)
    largest = 0.26 if count <= 3 else 0.21 if count <= 6 else 0.15
    closeness = 0.8 if rng.random() < 0.25 else 1.0
    shapes: list[Shape] = []
    for colour, kind in pairs:
        for _ in range(30):
            radius = float(rng.uniform(0.085, largest)) * short
            x, y = rng.uniform(radius * 0.95, width - radius * 0.95), rng.uniform(radius * 0.95, height - radius * 0.95)
            clear = True
            for other in shapes:
                apart = max(abs(x - other.cx) / width * columns, abs(y - other.cy) / height * rows)
                if apart < 1.1 or math.hypot(x - other.cx, y - other.cy) < (radius + other.radius) * closeness * 0.93:
                    clear = False
                    break
            if clear:
                shapes.append(_make(kind, colour, float(x), float(y), radius, rng))
                break
    return shapes


def _pairs(count: int, rng: np.random.Generator, held_out: str) -> list[tuple[str, str]]:
    """Colour-kind pairs; now and then one colour or kind is favoured so that counts above one are common."""
    favourite_kind = KINDS[rng.integers(len(KINDS))] if rng.random() < 0.35 else None
    favourite_colour = COLOURS[rng.integers(len(COLOURS))] if rng.random() < 0.35 else None
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        kind = favourite_kind if favourite_kind and rng.random() < 0.6 else KINDS[rng.integers(len(KINDS))]
        colour = favourite_colour if favourite_colour and rng.random() < 0.6 else COLOURS[rng.integers(len(COLOURS))]
        if held_out == "never" and (colour, kind) in HELD_OUT:
            continue
        pairs.append((colour, kind))
    if held_out == "one":
        pairs[0] = sorted(HELD_OUT)[rng.integers(len(HELD_OUT))]
    return pairs


def alike(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Colour-kind pairs, none held out, among which the same pair and the same colour come again and again."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        dice = rng.random() if pairs else 1.0
        colour, kind = COLOURS[rng.integers(len(COLOURS))], KINDS[rng.integers(len(KINDS))]
        if dice < 0.35:
            colour, kind = pairs[rng.integers(len(pairs))]
        elif dice < 0.65:
            colour = pairs[rng.integers(len(pairs))][0]
        if (colour, kind) not in HELD_OUT:
            pairs.append((colour, kind))
    return [pairs[i] for i in rng.permutation(count)]


def layout(
    rng: np.random.Generator, count: int, width: int, height: int, grid: tuple[int, int], held_out: str = "never"
) -> tuple[Shape, ...]:
    """The shapes of a scene without its image: what the language model is taught on first."""
    return tuple(_place(count, width, height, grid, rng, _pairs(count, rng, held_out)))


def _ground_colour(rng: np.random.Generator) -> np.ndarray:
    choice = rng.random()
    if choice < 0.2:
        return np.array([255.0, 255.0, 255.0])
    if choice < 0.3:
        return rng.uniform(0, 25, 3)
    if choice < 0.6:
        return np.clip(rng.uniform(20, 250) + rng.uniform(-8, 8, 3), 0, 255)
    if choice < 0.85:
        return rng.uniform(190, 255, 3)
    return rng.uniform(10, 90, 3)


def _background(width: int, height: int, shapes: list[Shape], rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Float image [height, width, 3] that every shape stands out against, and its sort."""
    colours = np.array([shape.rgb for shape in shapes], dtype=float).reshape(-1, 3)

    def clear_colour() -> np.ndarray:
        for _ in range(60):
            ground = _ground_colour(rng)
            if not len(colours) or np.sqrt(((colours - ground) ** 2).sum(1)).min() > 95:
                return ground
        return np.array([30.0, 30.0, 30.0])

    sort = ("plain", "gradient", "noisy")[int(rng.choice(3, p=(0.5, 0.25, 0.25)))]
    ground = clear_colour()
    image = np.broadcast_to(ground, (height, width, 3)).astype(np.float32)
    if sort == "gradient":
        end = np.clip(ground + rng.uniform(-60, 60) + rng.uniform(-12, 12, 3), 0, 255)
        if not len(colours) or np.sqrt(((colours - end) ** 2).sum(1)).min() > 80:
            angle = rng.uniform(0, 2 * math.pi)
            ys, xs = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
            ramp = xs * math.cos(angle) + ys * math.sin(angle)
            ramp = ((ramp - ramp.min()) / (np.ptp(ramp) + 1e-6))[..., None]
            image = ground * (1 - ramp) + end * ramp
    elif sort == "noisy":
        if rng.random() < 0.6:
            image = image + rng.normal(0, rng.uniform(4, 16), (height, width, 1 if rng.random() < 0.5 else 3))
        else:
            coarse = rng.normal(0, rng.uniform(5, 14), (6, 6)).astype(np.float32)
            smooth = np.asarray(Image.fromarray(coarse, "F").resize((width, height), Image.Resampling.BICUBIC))
            image = image + smooth[..., None]
    return image, sort


def _shade(canvas: Image.Image, shape: Shape, scale: float, rng: np.random.Generator) -> None:
    """Fill one shape with a brightness ramp instead of one flat colour."""
    mask = Image.new("L", canvas.size, 0)
    _paint(ImageDraw.Draw(mask), shape, scale, 255)
    ramp = np.linspace(1 - rng.uniform(0.05, 0.25), 1 + rng.uniform(0, 0.12), canvas.size[1])[:, None, None]
    filled = np.clip(np.array(shape.rgb) * ramp, 0, 255).astype(np.uint8)
    canvas.paste(Image.fromarray(np.broadcast_to(filled, (canvas.size[1], canvas.size[0], 3)).copy()), (0, 0), mask)


def _render(width: int, height: int, shapes: list[Shape], rng: np.random.Generator) -> tuple[Image.Image, str]:
    ground, sort = _background(width, height, shapes, rng)
    image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    factor = 3 if max(width, height) < 260 else 2  # antialiasing: draw larger, then average down
    if rng.random() < 0.06:
        factor = 1  # as plain screenshots and naive drawings come: jagged edges
    canvas = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    outlined, shaded = rng.random() < 0.15, rng.random() < 0.12
    ink = (0, 0, 0) if rng.random() < 0.6 else (255, 255, 255)
    for shape in shapes:
        stroke = max(1, round(shape.radius * factor * 0.09)) if outlined else 0
        _paint(draw, shape, factor, shape.rgb, ink if outlined else None, stroke)
        if shaded and not outlined:
            _shade(canvas, shape, factor, rng)
    return (canvas.reduce(factor) if factor > 1 else canvas), sort


def _wear(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """What happens to images on their way: JPEG, blur, a small icon made larger."""
    if rng.random() < 0.1:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1)))
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(40, 96)))
        image = Image.open(buffer).convert("RGB")
    return image


def _canvas(rng: np.random.Generator, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Width and height in source pixels; near the wanted grid's proportions where one is given."""
    if grid:
        rows, columns = grid
        scale = float(rng.choice([0.28, 0.35, 0.6, 1.0, 1.3, 2.0, 4.0], p=[0.05, 0.06, 0.11, 0.58, 0.11, 0.07, 0.02]))
        scale *= float(rng.uniform(0.9, 1.1))
        return round(columns * CELL * scale * rng.uniform(0.95, 1.05)), round(
            rows * CELL * scale * rng.uniform(0.95, 1.05)
        )
    aspect = math.exp(float(np.clip(rng.normal(0, 0.25), -0.7, 0.7)))
    side = float(rng.choice([64, 128, 192, 224, 256, 384, 512]))
    return round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))


def draw(
    seed: int,
    count: int | None = None,
    *,
    size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    held_out: str = "never",
    wear: bool = True,
    pairs: list[tuple[str, str]] | None = None,
) -> Scene:
    """Draw the scene of a seed; the same arguments always give the same pixels.

    count: shapes wanted (default: 1 to 6 at random). size: (width, height) in pixels (default: at random).
    grid: (rows, columns) of image tokens to aim at, for training in batches of one grid.
    held_out: "never" | "one" (the first shape is a held-out pair) | "any" (all pairs alike). pairs: exact (colour,
    kind) list.
    """
    rng = np.random.default_rng([seed, 7])
    width, height = size or _canvas(rng, grid)
    count = count or int(rng.integers(1, 7))
    wanted = pairs if pairs is not None else _pairs(count, rng, held_out)
    shapes = _place(len(wanted), width, height, grid or grid_of(width, height), rng, wanted)
    image, sort = _render(width, height, shapes, rng)
    return Scene(seed, _wear(image, rng) if wear else image, tuple(shapes), sort)
