"""The demo's data set: ten coloured shapes, drawn on the fly, so that everything runs without a download.

    index -> hash -> colours, place, size, angle -> the class's distance template -> image (3,size,size)

Wherever a data set is named, `shapes` names this one: `python train_decoder.py --data shapes`.
B images, H = W = size, K corners of the right half of an outline.
"""
import math

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from rae import mix

TEMPLATE = 128         # side of a class's distance template
REACH = 1.25           # a template covers [-REACH, REACH] in both directions; outlines have a radius of 1


def arc(start, stop, count=64, radius=1.0, y=0.0):
    """Points (count, 2) of a circle about (0, y): `start` to `stop` half turns, clockwise from the top."""
    angle = torch.linspace(start, stop, count) * math.pi
    return torch.stack([radius * angle.sin(), y - radius * angle.cos()], -1)


def right_half(name):
    """The right half (K, 2) of a polygon's outline, from the top down; y points downwards."""
    if name == "star":
        long_and_short = torch.tensor([1.0, 0.45]).repeat(3)
        return arc(0, 1, 6) * long_and_short[:, None]
    if name == "crescent":
        bite = arc(1, 0.347, radius=0.75, y=-0.4)
        return torch.cat([bite, arc(0.232, 1)])
    if name == "heart":
        a = torch.linspace(0, math.pi, 33)
        x = 16 * a.sin() ** 3
        y = 5 * (2 * a).cos() + 2 * (3 * a).cos() + (4 * a).cos() - 13 * a.cos() - 2.5
        return torch.stack([x, y], -1) / 16
    return torch.tensor({
        "square":   [(0.82, -0.82), (0.82, 0.82)],
        "triangle": [(0.0, -0.95), (1.0, 0.75)],
        "plus":     [(0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3), (0.3, 1.0)],
        "diamond":  [(0.0, -1.0), (0.6, 0.0), (0.0, 1.0)],
        "arrow":    [(0.0, -1.0), (0.9, 0.05), (0.34, 0.05), (0.34, 1.0)],
    }[name])


def signed_distance(name, q):
    """Signed distance (...) of the points q (..., 2) to an outline of radius 1; inside is < 0."""
    r = q.norm(dim=-1)
    if name == "circle":
        return r - 0.95
    if name == "ring":
        return (r - 0.78).abs() - 0.22

    # A polygon: the right half, closed by its mirror image
    right = right_half(name)
    corners = torch.cat([right, right.flip(0) * torch.tensor([-1.0, 1.0])])
    edge = corners.roll(-1, 0) - corners                                # (2K, 2)
    to = corners - q[..., None, :]                                      # (..., 2K, 2)

    # How far away the nearest edge is: the foot of q on each, kept between its two ends
    along = -(to * edge).sum(-1) / edge.square().sum(-1).clamp(min=1e-9)
    nearest = (to + along.clamp(0, 1)[..., None] * edge).norm(dim=-1).amin(-1)

    # Inside is where a ray to the right crosses the outline an odd number of times
    spans = (to[..., 1] > 0) != ((to + edge)[..., 1] > 0)               # edges at the height of q
    crossed = spans & (to[..., 0] > to[..., 1] * edge[:, 0] / edge[:, 1])
    inside = crossed.sum(-1) % 2 == 1
    return torch.where(inside, -nearest, nearest)


class Shapes(Dataset):
    """Ten coloured shapes on a coloured ground: image i is a function of i alone.

    Colours, position, size and angle come from a hash of (index, parameter) and say nothing about the class,
    which is index % 10. Outlines mirror about their own vertical axis and angles are symmetric about 0, so a
    mirrored picture is as likely as the original. Indices from 50,000 on are never trained on.

    Items are (index, key) -> (uint8 image (3,size,size), label, key), as those of an image folder.

    captioned: the label is a caption such as "a small red star at the top left on dark blue". All that it says
    is true, and some of it is left out, as the key decides. Of each class one colour is never trained on.
    """
    classes = "circle square triangle star ring plus diamond crescent arrow heart".split()
    ranges = {  # places and the radius are in halves of the side
        "hue":        (0, 1),          "ground hue":        (0, 1),
        "saturation": (0.55, 1),       "ground saturation": (0.3, 0.9),
        "value":      (0.75, 1),       "ground value":      (0.08, 0.35),
        "gradient x": (-0.15, 0.15),   "gradient y":        (-0.15, 0.15),
        "x":          (-0.18, 0.18),   "y":                 (-0.18, 0.18),
        "radius":     (0.52, 0.80),    "angle":             (-math.pi / 12, math.pi / 12),
    }

    colours_by_name = "red orange lime green cyan blue purple pink".split()  # each an eighth of the hues

    def __init__(self, size=32, first=0, count=50_000, captioned=False):
        self.captioned = captioned
        self.size = size
        self.first = first
        self.count = count
        self.low, self.high = torch.tensor(list(self.ranges.values())).float().T

        # The classes' templates, one above the other: distances on a grid over [-REACH, REACH]^2
        grid = F.affine_grid(torch.eye(2, 3)[None], (1, 1, TEMPLATE, TEMPLATE), align_corners=False)[0]
        templates = [signed_distance(name, REACH * grid) for name in self.classes]
        self.templates = torch.cat(templates)                           # (10 * TEMPLATE, TEMPLATE)

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        return self.__getitems__([item])[0]

    def __getitems__(self, items):
        """What DataLoader calls for a batch: [(index, key), ...] -> [(uint8 image, label, key), ...]."""
        indices, keys = zip(*items)
        indices = self.first + torch.tensor(indices)
        images, labels = self.render(indices)
        labels = self.caption(indices, torch.tensor(keys)) if self.captioned else labels.tolist()
        return list(zip(images, labels, keys))

    def uniform(self, indices):
        """(B,) int64 -> (B, 12) numbers in [0, 1), each a hash of (index, parameter)."""
        bits = mix(indices[:, None], torch.arange(len(self.low))) >> 39   # the 24 highest of 63
        u = bits.float() / 2 ** 24
        if self.captioned and self.first == 0:                            # training
            u[:, 0] = (u[:, 0] + self.held_out(u, indices) / 8) % 1       # takes the next colour
        return u

    def held_out(self, u, indices):
        """Which drawings (B,), u (B,12), have the colour that their class is never trained in."""
        return (8 * u[:, 0] + 0.5).long() % 8 == indices % len(self.classes) % 8

    def captions(self, index):
        """All the words that captions have, as one line: those of all images."""
        return [" ".join(["a small large at the top bottom left right on dark", *self.colours_by_name, *self.classes])]

    def caption(self, indices, keys, chance=0.5):
        """(B,) -> B captions; what is unclear is not said. Half of them say all that is clear; the others
        say each clear thing with this chance."""
        u = self.uniform(indices)
        draws = (mix(keys[:, None], torch.arange(5)) >> 39).float() / 2 ** 24     # (B, 5)
        said = (draws[:, :4] < chance) | (draws[:, 4:] < 0.5)
        captions = []
        for (hue, ground, *_, x, y, radius, _), label, (size, colour, place, on) in zip(
                u.tolist(), (indices % len(self.classes)).tolist(), said.tolist()):
            words = ["a"]
            if size and abs(radius - 0.5) > 0.1:
                words.append("small" if radius < 0.5 else "large")
            if colour:
                words += self.colour(hue)
            words.append(self.classes[label])
            where = [] if abs(y - 0.5) < 0.1 else ["top" if y < 0.5 else "bottom"]
            where += [] if abs(x - 0.5) < 0.1 else ["left" if x < 0.5 else "right"]
            if place and where:
                words += ["at", "the", *where]
            if on and self.colour(ground):
                words += ["on", "dark", *self.colour(ground)]
            captions.append(" ".join(words))
        return captions

    def colour(self, hue):
        """The name of a hue in [0,1), if it is clearly one, as a list."""
        number = round(8 * hue)
        return [self.colours_by_name[number % 8]] if abs(8 * hue - number) < 0.4 else []

    def render(self, indices):
        """(B,) int64 -> images uint8 (B, 3, size, size), labels int64 (B,)."""
        labels = indices % len(self.classes)
        drawing = torch.lerp(self.low, self.high, self.uniform(indices))        # (B, 12)
        shape, ground = self.colours(drawing[:, :6])                            # (B, 3, 1, 1)
        gx, gy, x, y, radius, angle = drawing[:, 6:, None, None].unbind(1)      # (B, 1, 1)
        axis = (torch.arange(self.size) + 0.5) / self.size * 2 - 1              # pixel centres in [-1, 1]

        # Each pixel's place in a template: move, divide by the radius, turn back
        px = (axis - x) / (REACH * radius)
        py = (axis[:, None] - y) / (REACH * radius)
        qx = px * angle.cos() + py * angle.sin()
        qy = py * angle.cos() - px * angle.sin()
        q = torch.stack([qx, qy], -1)                                           # (B, H, W, 2)

        # The template of its class, of which no pixel may leave the edge: others lie above and below it
        q = q.clamp(1 / TEMPLATE - 1, 1 - 1 / TEMPLATE)
        q[..., 1] = (q[..., 1] + 2 * labels[:, None, None] + 1) / len(self.classes) - 1
        distance = F.grid_sample(self.templates[None, None], q.flatten(0, 1)[None], align_corners=False)
        distance = distance.view_as(q[..., 0])                                  # (B, H, W)

        # How much of a pixel the shape covers, by its distance in pixels: anti-aliased
        cover = (0.5 - distance * radius * self.size / 2).clamp(0, 1)
        ground = ground * (1 + gx * axis + gy * axis[:, None])[:, None]         # (B, 3, H, W)
        images = torch.lerp(ground, shape, cover[:, None]) * 255
        return images.round().byte(), labels

    @staticmethod
    def colours(hsv):
        """(B, 6), hue, saturation and value of shape and ground in turn -> RGB of both, (B, 3, 1, 1) each."""
        h, s, v = hsv.view(-1, 3, 2, 1).unbind(1)                               # (B, shape and ground, 1)
        k = (torch.tensor([5, 3, 1]) + 6 * h) % 6
        rgb = v * (1 - s * torch.minimum(k, 4 - k).clamp(0, 1))                 # (B, shape and ground, 3)
        return rgb[..., None, None].unbind(1)
