"""The judge: how far generated images are from real ones, and copies from their originals.

    FID = |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)),   mu, S: mean, covariance of features

Published figures take the features of the 2015 TensorFlow Inception. `--features dinov2_b`, or
`tiny`, offline, takes an encoder's mean-pooled tokens instead; the result is called `fd`.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz     # FID, IS, precision, recall
    python fid.py samples.npz shapes --features tiny              # FD, precision, recall
    python fid.py --rae out/dinov2_b --data data/imagenet/val     # rFID, PSNR, SSIM, LPIPS
    torchrun --nproc_per_node=8 -- fid.py ...                     # the same figures, sooner

One line of JSON: figures, n, reference, and warnings of what makes figures incomparable.
Images come as the `arr_0` of an .npz, uint8 (N,H,W,3), shuffled. N images, D features of each.
Sources: FID Heusel 2017, IS Salimans 2016, precision, recall Kynkaanniemi 2019, all by the
protocol of ADM (Dhariwal 2021), as in the paper (arXiv 2510.11690).
"""
import argparse
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from torchvision.models import Inception3
from tqdm import tqdm

from rae import (ENCODERS, RAE, Folder, UserError, at_least, download, evenly, folders_in, in_order,
                 load_lpips, load_rae, load_strict, open_data, open_val, psnr, read_weights, say,
                 splits, ssim, start, writable)

# Published weights, under the name that their makers gave them
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"


# The Inception network of FID

def resize_tf1(x, side=299):
    """(B,C,H,W) float -> (B,C,side,side) as TensorFlow 1 did: source = destination * in / out.

    Bilinear, no half-pixel offset, no antialias: today's interpolations give another FID.
    """
    for dim in (2, 3):  # rows, then columns
        size = x.shape[dim]
        source = torch.arange(side, device=x.device) * (size / side)
        low = source.long()
        high = (low + 1).clamp(max=size - 1)
        share = (source - low).view(-1, *[1] * (3 - dim))  # weight of the higher one
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)
    return x


class Inception(nn.Module):
    """uint8 images (B,3,H,W) -> features (B,2048), logits (B,1008) without the last bias.

    weights: None for the usual download, the path of that file, "random", or a state dict.
    """
    def __init__(self, weights=None):
        super().__init__()

        # The network, and the weights of 2015
        self.net = net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        if weights is None:
            weights = download(URL, "--inception-weights PATH, or judge by --features tiny")
        if weights != "random":
            state = weights if isinstance(weights, dict) else read_weights(weights)
            # Counters of training, which the file lacks, are added by torch
            load_strict(net, state, "--inception-weights")

        # torchvision's pooling layers differ from the 2015 network's, and weights do not change
        # that. In 2015 the average pools of blocks A, C, E1 leave the padding out of the mean ...
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            pooling = net.get_submodule(f"Mixed_{name}").branch_pool
            pooling.register_forward_pre_hook(self.without_padding)
        net.Mixed_7c.register_forward_hook(self.max_pooled)  # ... and block E2 pools by maximum

        self.logits = net.fc
        self.logits.bias = None  # the Inception Score leaves it out
        net.fc = nn.Identity()
        self.eval().requires_grad_(False)

    @staticmethod
    def without_padding(conv, inputs):
        # avg_pool2d counted the padding as zeros: divide by the share of real pixels
        pooled, = inputs
        inside = torch.ones_like(pooled[:1, :1])
        return pooled / F.avg_pool2d(inside, 3, stride=1, padding=1)

    @staticmethod
    def max_pooled(block, inputs, output):
        pooled = block.branch_pool(F.max_pool2d(inputs[0], 3, stride=1, padding=1))
        others = output[:, :-pooled.shape[1]]  # this branch's channels are the last
        return torch.cat([others, pooled], 1)

    def forward(self, images):
        if images.dtype != torch.uint8:
            raise UserError(f"Inception takes uint8 images, not {images.dtype}: round them")
        x = (resize_tf1(images.float()) - 128) / 128  # 128 and not 127.5, as it was trained
        features = self.net(x)                        # (B, 2048)
        return features, self.logits(features)


# Metrics on features

def moments(features):
    """features (N,D) -> mean (D,), covariance (D,D) with ddof 1, numpy float64."""
    features = torch.as_tensor(features)
    if len(features) < 2:
        raise UserError(f"{len(features)} image given, a covariance needs at least 2: add more")
    blocks = features.split(4096)  # in float64 one at a time
    mu = sum(rows.double().sum(0) for rows in blocks) / len(features)  # (D,)
    centred = (rows.double() - mu for rows in blocks)  # before squaring, against cancellation
    sigma = sum(rows.T @ rows for rows in centred) / (len(features) - 1)  # (D, D)
    return mu.cpu().numpy(), sigma.cpu().numpy()


def factor(sigma, name):
    """Covariance S (D,D) -> L (D,D) with S = L L^T; UserError if S has negative eigenvalues."""
    values, vectors = np.linalg.eigh(sigma)  # ascending
    # Rounding can make a zero eigenvalue slightly negative: it counts as zero
    if values[0] < -1e-5 * max(values[-1], 0) - 1e-30:
        raise UserError(f"the covariance of {name} has eigenvalues from {values[0]:.3g} to"
                        f" {values[-1]:.3g}, none may be negative: make its statistics anew")
    return vectors * np.sqrt(values.clip(min=0))


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians, >= 0; mu (D,), sigma (D,D).

    With S1 = L1 L1^T and S2 = L2 L2^T the eigenvalues of S1 S2 are the squares of the singular
    values of L1^T L2, whose sum is Tr (S1 S2)^(1/2): no root of a matrix or of a negative number.
    """
    given = [np.asarray(x, np.float64) for x in (mu1, mu2, sigma1, sigma2)]
    mu1, mu2, sigma1, sigma2 = given
    # Nothing may be nan: max(0.0, nan), below, is 0.0, a perfect distance
    shapes = {mu1.shape * 2, mu2.shape * 2, sigma1.shape, sigma2.shape}
    if len(shapes) > 1 or not all(np.isfinite(x).all() for x in given):
        raise UserError(f"statistics must be finite and of one dimension, these are {sigma1.shape},"
                        f" {sigma2.shape}: make both with the same --features, of sound images")
    product = factor(sigma1, "one side").T @ factor(sigma2, "the other side")
    trace = np.linalg.svd(product, compute_uv=False).sum()  # of (S1 S2)^(1/2)
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(0.0, float(distance))  # rounding may leave less than zero


def inception_score(logits, splits=10):
    """logits (N,1008) -> mean over consecutive splits of exp(mean KL(p(y|x) || p(y)))."""
    scores = []
    for part in torch.as_tensor(logits).tensor_split(min(splits, len(logits))):
        log_p = part.double().log_softmax(1)                    # log p(y|x), (n, 1008)
        log_marginal = log_p.logsumexp(0) - np.log(len(log_p))  # log p(y), (1008,)
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(1)  # of each image
        scores.append(divergence.mean().exp().item())  # at most the number of classes
    return float(np.mean(scores))


def precision_recall(real, fake, k=3, block=2 ** 25):
    """features (M,D), (N,D) -> precision, the share of fakes in a real image's ball; recall, the share
    of reals in a fake image's ball.

    A ball's radius is the distance to the k-th nearest neighbour; `block`: distances held at a time.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"{len(real)} and {len(fake)} images: {k} neighbours need {k + 1} of each")
    centre = real.mean(0)  # smaller norms, less cancellation
    real = real - centre
    fake = fake - centre

    def covered(x, y):
        """The share of x in the balls of y."""
        rows = max(1, block // len(y))  # at a time
        nearest = [torch.cdist(part, y).topk(k + 1, largest=False).values for part in y.split(rows)]
        radii = torch.cat(nearest)[:, -1]  # the first neighbour is the image itself
        inside = [(torch.cdist(part, y) <= radii).any(1) for part in x.split(rows)]
        return torch.cat(inside).double().mean().item()

    return covered(fake, real), covered(real, fake)


# What is judged: images, statistics of their features, or both

class Array(Dataset):
    """uint8 images (N,H,W,3) of an .npz: items (index, key) -> (uint8 (3,H,W), label 0, key)."""
    def __init__(self, path, images):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise UserError(f"{path}: arr_0 is {images.dtype} {images.shape}:"
                            " write images as uint8 (N, H, W, 3) from 0 to 255")
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        index, key = item
        return torch.from_numpy(self.images[index]).permute(2, 0, 1), 0, key


class Source(NamedTuple):
    """GENERATED or REFERENCE."""
    name: str = None
    images: Dataset = None
    size: list = None   # [h, w] of the images; None: not known
    arrays: dict = {}   # what else its .npz holds: mu, sigma, n, labels


def open_source(path, size=None):
    """The Source of that name; size [h, w]: its partner's, to which class folders are cropped.
    Errors: no images."""
    side = min(size or [32])
    if path == "shapes":  # 50,000 for training
        return Source(path, open_data("shapes", side), [side, side])
    if path == "shapes/val":  # 10,000 held out
        return Source(path, open_val("shapes", None, side), [side, side])
    if size and folders_in(path):
        return Source(path, Folder(splits(path)[0], side), [side, side])
    if Path(path).is_dir():  # files as they are: a resized image would be another image
        images = Folder(path, None)
        first = next(filter(None, (images[i, 0] for i in range(len(images)))), None)
        if first is None:
            raise UserError(f"{path}: not one image can be read")
        images.shape = first[0].shape  # (3, h, w), which all must have
        return Source(path, images, [*images.shape[1:]])
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy, zipfile and zlib have many kinds
        raise UserError(f"{path} cannot be read as an .npz ({error}): give an .npz with arr_0 (uint8"
                        " images) or mu and sigma, a folder of images, or `shapes`") from None
    if "arr_0" in arrays:
        images = Array(path, arrays.pop("arr_0"))
        return Source(path, images, [*images.images.shape[1:3]], arrays)
    size = np.broadcast_to(arrays.get("size", 0), 2).tolist()  # 0: not known
    return Source(path, None, size if any(size) else None, arrays)


def check(source, args):
    """Refuse, before the long work, too few images, and statistics of other features or of none."""
    path, images, _, arrays = source
    if images is not None and len(images) < 2:
        raise UserError(f"{path}: {len(images)} image given, a covariance needs at least 2")
    if images is not None and not arrays.keys() & {"mu", "sigma"}:
        return
    mu, sigma = (np.asarray(arrays.get(name, 0), np.float64) for name in ("mu", "sigma"))
    made_by = str(arrays.get("features", args.features))
    fits = made_by == args.features and mu.shape * 2 == sigma.shape == (args.dim, args.dim)
    if not fits or not np.isfinite(mu.sum() + sigma.sum()):
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}: mu {mu.shape}, sigma"
                        f" {sigma.shape} of {made_by}; --features {args.features} needs images, or"
                        f" finite statistics of {args.dim} dimensions")
    factor(sigma, path)  # refuses negative variances


def statistics(source, features):
    """(mu, sigma, n): those of a file that has them, else of its images' features (N,D)."""
    if "mu" not in source.arrays:
        return *moments(features), len(features)
    mu, sigma = (source.arrays[name].astype(np.float64) for name in ("mu", "sigma"))
    return mu, sigma, int(source.arrays.get("n", 0)) or None  # ADM's do not say


@torch.no_grad()
def per_image(dataset, measure, batch, device, num=None):
    """measure: uint8 images (b,3,H,W) -> (b,F). All rows (N,F), in the data set's order, on every
    rank. num: so many images, evenly spread. Call it on all ranks. Errors: broken files."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    loader = in_order(dataset, batch, device, rank, world, most=num)
    for images, _, numbers in tqdm(loader, disable=rank > 0, leave=False):
        rows = measure((images * 255).round().byte()).float()         # (b, F)
        found.append((numbers, rows.cpu()))
    shares = [None] * world
    dist.all_gather_object(shares, found)
    found = sum(shares, [])
    chosen = evenly(len(dataset), num)
    lost = sorted({*range(len(chosen))}.difference(*(numbers.tolist() for numbers, _ in found)))
    if lost:
        path, _ = dataset.samples[chosen[lost[0]]]
        raise UserError(f"{len(lost)} of {len(chosen)} images cannot be read (the first: {path}):"
                        " mend or remove them; a figure of the others would not be of this data set")
    numbers, rows = map(torch.cat, zip(*found))
    return rows[numbers.argsort()].to(device)


def feature_function(args, device):
    """What compares images: uint8 (b,3,H,W) -> (b,D), with Inception's logits behind them."""
    if args.features == "inception":
        network = Inception(args.inception_weights).to(device)
        return lambda images: torch.cat(network(images), 1)  # (b, D + 1008)
    spec = ENCODERS[args.features]
    rae = RAE(args.features, "tiny", spec.image_side)
    rae.load_encoder(args.encoder_weights).eval().to(device)

    def features(images):
        x = images.float() / 255
        if x.shape[2] != x.shape[3]:  # squashed, as Inception does it
            x = F.interpolate(x, (spec.input_side,) * 2, mode="bicubic").clamp(0, 1)
        return rae.tokens(x).mean(1)
    return features


# The judges: figures, and warnings of what makes them incomparable

def judge_samples(args, device):
    """GENERATED against REFERENCE, or alone: FID or FD, IS, precision and recall."""
    # What is wrong is found out before the long work
    generated = open_source(args.generated)
    check(generated, args)
    reference = Source()
    if args.reference:
        reference = open_source(args.reference, generated.size)
        check(reference, args)

    # Features of both sides. Saved statistics need none; images beside them serve precision, recall
    fake = real = logits = None
    compared = reference.images is not None and "mu" not in reference.arrays
    if generated.images is not None or compared:
        measure = feature_function(args, device)
        if generated.images is not None:
            rows = per_image(generated.images, measure, args.batch, device, args.num)
            fake, logits = rows.tensor_split([args.dim], 1)
        if reference.images is not None:
            real = per_image(reference.images, lambda x: measure(x)[:, :args.dim], args.batch, device)
    if dist.get_rank():
        return None  # one rank reports

    # Figures
    figures = {}
    warnings = []
    generated_stats = reference_stats = statistics(generated, fake)
    if args.reference:
        reference_stats = statistics(reference, real)
        figures[args.figure] = frechet_distance(*generated_stats[:2], *reference_stats[:2])
    if fake is not None and args.features == "inception":
        figures["inception_score"] = inception_score(logits)
    if fake is not None and real is not None:
        real = real[np.random.RandomState(0).permutation(len(real))[:10_000]]  # as ADM's file has
        if min(len(real), len(fake)) > 3:
            figures["precision"], figures["recall"] = precision_recall(real, fake)
        else:
            warnings.append("precision and recall need 4 images on both sides")

    # Warnings
    labels = generated.arrays.get("labels", generated.arrays.get("arr_1", np.zeros(0)))  # ADM's name
    _, counts = np.unique(labels, return_counts=True)
    if len({*counts.tolist()}) > 1:
        warnings.append("classes are not equally frequent, and published figures are balanced")
    if len(counts) > 1 and (np.diff(labels) >= 0).all():
        warnings.append("images are sorted by class, and the Inception Score needs them shuffled")
    if args.reference and Path(args.generated).resolve() == Path(args.reference).resolve():
        warnings.append(f"{args.generated} is compared with itself: no figure says anything")
    files = [path for path, _ in getattr(generated.images, "samples", ())]
    if any(path.lower().endswith((".jpg", ".jpeg", ".webp")) for path in files):
        warnings.append("generated images are compressed with loss, which changes every figure")
    return report(args, figures, generated_stats[2], generated, reference, reference_stats, warnings)


def judge_reconstructions(args, device):
    """--rae's copies of --data against the originals: rFID or rFD, PSNR, SSIM, LPIPS."""
    # What is wrong is found out before the long work
    rae = load_rae(args.rae, device)
    name = "shapes/val" if args.data == "shapes" else args.data  # as GENERATED would name it
    images = open_val(args.data, None, rae.output_size)          # its val/, or all
    originals = Source(name, images, [rae.output_size] * 2)
    measure = feature_function(args, device)
    warnings = []
    try:
        perceptual = load_lpips(device, args.lpips_vgg)
    except UserError as error:
        if args.lpips_vgg:
            raise  # a file that was named has to be right
        perceptual = None
        warnings.append(f"no LPIPS: {error}")

    # Copies are rounded to 8 bits, as a file would hold them, and measured beside originals
    def compare(images):  # uint8 (b,3,H,W) -> metrics (b,3), features of both (b,2D)
        a = images.float() / 255
        copies = rae.decode(rae.encode(a)).clamp(0, 1).mul(255).round().byte()
        b = copies.float() / 255
        lpips = perceptual(2 * a - 1, 2 * b - 1).flatten() if perceptual else 0 * psnr(a, b)
        metrics = torch.stack([psnr(a, b), ssim(a, b), lpips], 1)
        features = [measure(x)[:, :args.dim] for x in (copies, images)]
        return torch.cat([metrics, *features], 1)

    rows = per_image(images, compare, args.batch, device, args.num)
    metrics, fake, real = rows.tensor_split([3, 3 + args.dim], 1)
    if dist.get_rank():
        return None  # one rank reports

    # Figures
    stats = statistics(originals, real)
    figures = {"r" + args.figure: frechet_distance(*moments(fake), *stats[:2])}
    figures |= zip(("psnr", "ssim", "lpips"), metrics.double().mean(0).tolist())
    if not perceptual:
        figures["lpips"] = None
    return report(args, figures, len(metrics), originals, originals, stats, warnings)


def report(args, figures, n, judged, reference, stats, warnings):
    """The line of JSON, and --save-stats. stats: REFERENCE's (mu, sigma, n), or GENERATED's."""
    # Statistics, for the next time
    size = reference.size or judged.size
    if args.save_stats:
        np.savez(args.save_stats, mu=stats[0], sigma=stats[1], n=stats[2] or 0,
                 features=args.features, size=size or 0, source=reference.name or judged.name)

    # What makes figures incomparable
    least = min(n or np.inf, stats[2] or np.inf)
    if least <= args.dim:
        warnings.append(f"n = {least} is not above {args.dim} dimensions: a covariance lacks rank")
    if n not in (None, 50_000):
        warnings.append("published figures have n = 50,000, others do not compare with them")
    if judged.images is not None and (args.num or 0) > len(judged.images):
        warnings.append(f"--num {args.num} is more than the {len(judged.images)} images there are")
    if judged.size and size != judged.size:
        warnings.append(f"the reference's images are {size} pixels and these {judged.size}")
    if getattr(reference.images, "small", False):
        warnings.append(f"images of {reference.name} are below {size} pixels, and were enlarged")
    if "random" in (args.inception_weights, args.encoder_weights, args.rae and args.lpips_vgg):
        warnings.append("random weights: mechanics only")

    # Which file that was
    digest = None  # of a folder, or of what is drawn
    if reference.name and Path(reference.name).is_file():
        digest = hashlib.sha256(np.memmap(reference.name, mode="r")).hexdigest()[:16]
    return dict(figures, n=n, features=args.features, reference=reference.name,
                reference_n=stats[2] if reference.name else None, reference_sha256=digest,
                arithmetic="images uint8, features float32, moments float64", warnings=warnings)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    # what is judged
    add("generated", nargs="?", help="an .npz (arr_0; or mu, sigma), a folder, `shapes` or `shapes/val`")
    add("reference", nargs="?", help="likewise, or class folders, centre-cropped to GENERATED's size")
    add("--rae", metavar="RUN", help="judge the copies of --data by a run folder, rae.pt or release:X")
    add("--data", metavar="VAL", help="class folders of held-out images, or `shapes`")
    # by what networks
    add("--features", default="inception", choices=["inception", *ENCODERS], help="what compares images")
    add("--inception-weights", metavar="PATH", help=f"{WEIGHTS}, or `random` (default: downloaded)")
    add("--encoder-weights", metavar="PATH", help="those of --features, or `random` (default: pretrained)")
    add("--lpips-vgg", metavar="PATH", help="VGG16's weights for LPIPS, or `random` (default: downloaded)")
    # how
    add("--num", type=at_least(2), help="judge so many images, evenly spread (default: all)")
    add("--save-stats", metavar="NPZ", help="keep the statistics of the reference (of GENERATED, when alone)")
    add("--batch", type=at_least(1), default=64, help="images at a time; no figure depends on it")
    args = parser.parse_args(argv)

    # What goes together, and what must not be written over
    samples = args.generated and not args.rae and not args.data
    copies = args.rae and args.data and not args.generated
    if not samples and not copies:
        parser.error("give GENERATED [REFERENCE], or --rae and --data")
    if args.save_stats:
        args.save_stats = args.save_stats.removesuffix(".npz") + ".npz"  # as numpy would name it
        for path in (args.generated, args.reference):
            if path and Path(path).resolve() == Path(args.save_stats).resolve():
                parser.error(f"--save-stats {args.save_stats} would overwrite {path}: name another")
    args.dim = 2048 if args.features == "inception" else ENCODERS[args.features].dim
    args.figure = "fid" if args.features == "inception" else "fd"
    return args


def main():
    args = parse_args()
    device, *_ = start()
    torch.set_float32_matmul_precision("highest")  # a judge computes in fp32, not TF32
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)  # `random` weights: the same everywhere
    if args.save_stats:
        writable(args.save_stats)
    judge = judge_reconstructions if args.rae else judge_samples
    say(json.dumps(judge(args, device)))


if __name__ == "__main__":
    main()
