"""The judge: how far generated images are from real ones, and copies from their originals.

    FID = |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)),   mu, S: mean, covariance of features

Published figures take the features of the 2015 TensorFlow Inception. `--features dinov2_b`, or
`tiny`, offline, takes an encoder's mean-pooled tokens instead; the result is called `fd`.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz     # FID, IS, precision, recall
    python fid.py samples.npz shapes --features tiny              # FD, precision, recall
    python fid.py --rae out/dinov2_b --data data/imagenet/val     # rFID, PSNR, SSIM, LPIPS
    python fid.py --probe --features mae_b --data data/imagenet   # a linear probe's top-1
    torchrun --nproc_per_node=8 -- fid.py ...                     # the same figures, sooner

One line of JSON: figures, n, reference, and warnings of what makes figures incomparable.
Images come as the `arr_0` of an .npz, uint8 (N,H,W,3), shuffled. N images, D features of each.
Sources: FID Heusel 2017, IS Salimans 2016, precision, recall Kynkaanniemi 2019, SSIM Wang 2004,
all by the protocol of ADM (Dhariwal 2021), as in the paper (arXiv 2510.11690).
"""
import argparse
import hashlib
import json
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from scipy.linalg import lapack
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import Inception3
from tqdm import tqdm

from rae import (BROKEN, ENCODERS, RAE, Folder, UserError, at_least, good, in_fp32, load_rae,
                 load_strict, open_data, open_val, quiet_worker, read_image, read_weights, start,
                 worker_count, writing)

# Published weights, under the names that their makers gave them
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
VGG = "https://download.pytorch.org/models/vgg16-397923af.pth"


def download(url, otherwise):
    """A published state dict, through torch's cache; otherwise: what takes that file."""
    load = torch.hub.load_state_dict_from_url
    try:
        return load(url, map_location="cpu", progress=False, weights_only=True)
    except OSError as error:
        raise UserError(f"cannot download {Path(url).name} ({error}): bring that file and name it"
                        f" with {otherwise}") from None


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
            # Counters of training, which that file lacks and inference does not read
            own = net.state_dict()
            unused = {key: own[key] for key in own if key.endswith("num_batches_tracked")}
            load_strict(net, unused | state, "--inception-weights")

        # torchvision's network pools otherwise than that of 2015, which no weight can tell: there,
        # the average pools of blocks A, C and the first E leave the padding out of the mean ...
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            pooling = net.get_submodule(f"Mixed_{name}").branch_pool
            pooling.register_forward_pre_hook(self.without_padding)
        net.Mixed_7c.register_forward_hook(self.max_pooled)  # ... and the last E pools by maximum

        # The Inception Score leaves the last layer's bias out
        self.logits = nn.Linear(2048, 1008, bias=False)
        self.logits.weight = net.fc.weight
        net.fc = nn.Identity()
        self.eval().requires_grad_(False)

    @staticmethod
    def without_padding(conv, inputs):
        pooled, = inputs  # sums of up to 9 pixels, over 9
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


def root(sigma, name="one side"):
    """Covariance S (D,D) -> L (D,rank), S = L L^T; UserError if S has negative eigenvalues.

    Pivoted Cholesky ends at the numerical rank: fewer samples than dimensions are fine.
    """
    # sigma[pivots][:, pivots] = L L^T ...
    lower, pivots, rank, _ = lapack.dpstrf(sigma, lower=1)
    lower = np.tril(lower)[:, :rank]  # (D, rank)
    factor = np.empty((len(lower), rank))
    factor[pivots - 1] = lower  # rows back to their places, counted from 1
    rest = pivots[rank:] - 1
    left = sigma[np.ix_(rest, rest)] - lower[rank:] @ lower[rank:].T  # ... if nothing is left
    if np.abs(left).max(initial=0) <= 1e-10 * np.abs(sigma).max():
        return factor

    # A zero eigenvalue, rounded to float32 at worst, is a small negative one: a zero again
    values, vectors = np.linalg.eigh(sigma)  # ascending
    if values[0] < -1e-5 * values[-1]:
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
    L1 = torch.from_numpy(root(sigma1))  # (D, rank)
    L2 = torch.from_numpy(root(sigma2))
    trace = torch.linalg.svdvals(L1.T @ L2).sum().item()  # of (S1 S2)^(1/2)
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


def squared_distances(a, b):
    """(M,D), (N,D) -> (M,N), >= 0."""
    # |a|^2 - 2 a b + |b|^2: one matrix product, in place
    d = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return d.add_(a.square().sum(1)[:, None]).clamp_(min=0)


def precision_recall(real, fake, k=3, block=2 ** 25):
    """features (M,D), (N,D) -> share of fakes within a real's radius, of reals within a fake's.

    A radius is the distance to the k-th nearest neighbour; `block`: distances held at a time.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"{len(real)} and {len(fake)} images: {k} neighbours need {k + 1} of each")
    centre = real.mean(0)  # smaller norms, less cancellation
    real = real - centre
    fake = fake - centre

    # A ball around each image, as wide as its k-th neighbour in its own set is far
    def squared_radii(x):
        radii = torch.empty(len(x), device=x.device)
        for rows in torch.arange(len(x), device=x.device).split(max(1, block // len(x))):
            d = squared_distances(x[rows], x)
            d[rows - rows[0], rows] = torch.inf  # not its own neighbour
            radii[rows] = d.topk(k, largest=False).values[:, -1]
        return radii

    radii_real = squared_radii(real)  # (M,)
    radii_fake = squared_radii(fake)  # (N,)

    # Which image of one set lies in a ball of the other
    precise = 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in torch.arange(len(fake), device=fake.device).split(max(1, block // len(real))):
        d = squared_distances(fake[rows], real)  # (rows, M)
        precise += (d <= radii_real).any(1).sum().item()
        recalled |= (d <= radii_fake[rows, None]).any(0)
    return precise / len(fake), recalled.double().mean().item()


def fit_probe(features, labels, num_classes, decay=1e-4):
    """features (N,D), labels (N,) -> a function (M,D) -> logits (M,C): logistic regression."""
    mean = features.mean(0)
    std = features.std(0) + 1e-6  # L-BFGS wants one scale; a constant feature stays 0
    x = (features - mean) / std

    # The loss is convex: zero is as good a start as any
    head = nn.Linear(features.shape[1], num_classes).to(features.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = F.cross_entropy(head(x), labels) + decay / 2 * head.weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    head.requires_grad_(False)
    return lambda features: head((features - mean) / std)


def linear_probe(train_features, train_labels, test_features, test_labels):
    """(N,D), (N,) and (M,D), (M,) -> top-1 of a linear classifier (Table 1d)."""
    num_classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    guess = fit_probe(train_features, train_labels, num_classes)(test_features).argmax(1)  # (M,)
    return (guess == test_labels).double().mean().item()


# Metrics on pairs of images (B,3,H,W) in [0,1]: a number for each pair

def psnr(a, b):
    """-10 log10(mean squared error) in dB (B,), float64; 100 dB when identical."""
    return -10 * (a.double() - b.double()).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(a, b):
    """Structural similarity (B,), float64: Gaussian windows of 11 x 11, sigma 1.5."""
    if min(a.shape[2:]) < 11:
        raise UserError(f"images of {tuple(a.shape[2:])} pixels, and SSIM needs at least 11 x 11")
    offsets = torch.arange(11, device=a.device).double() - 5
    window = torch.exp(-offsets ** 2 / (2 * 1.5 ** 2))
    window = (window / window.sum()).view(1, 1, 11, 1)  # down, then across: separable

    def blur(x):  # (B,3,H,W) -> (3B,1,H-10,W-10)
        return F.conv2d(F.conv2d(x.flatten(0, 1)[:, None], window), window.mT)

    # Local means, variances and covariance, each (3B, 1, H-10, W-10)
    a = a.double()
    b = b.double()
    mean_a = blur(a)
    mean_b = blur(b)
    var_a = blur(a * a) - mean_a ** 2
    var_b = blur(b * b) - mean_b ** 2
    cov = blur(a * b) - mean_a * mean_b

    # Luminance, times contrast and structure
    c1, c2 = 0.01 ** 2, 0.03 ** 2  # against small denominators
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    score = luminance * (2 * cov + c2) / (var_a + var_b + c2)
    return score.view(len(a), -1).mean(1)  # of each image


def load_lpips(device="cpu", vgg=None):
    """LPIPS with VGG, frozen: images (B,3,H,W), both in [-1,1] -> (B,1,1,1).

    vgg: None for torchvision's weights from their home, the path of that file, or "random".
    """
    import lpips  # wanted here alone
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision the old way
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for linear in net.lins:
        linear.forward = in_fp32(linear.forward)  # small differences, too fine for bf16
    # The five layers that weigh come with the package; the network beneath, VGG16, does not
    if vgg != "random":
        otherwise = "--lpips-vgg PATH (LPIPS), or train without LPIPS: --lpips-weight 0"
        state = read_weights(vgg) if vgg else download(VGG, otherwise)
        # Its five slices are one numbered sequence in the file
        names = {f"features.{key.split('.', 1)[1]}": key for key in net.net.state_dict()}
        own = {names[key]: value for key, value in state.items() if key in names}
        load_strict(net.net, own, "VGG16 of LPIPS")
    return net.to(device).eval().requires_grad_(False)


# Sources of images, and features of each image

class Pictures(Folder):
    """A folder's image files, all of one size, taken as they are; the items of a Folder."""
    def __init__(self, path, files):
        # A resized image would be another image: all must have one size
        try:
            sizes = {Image.open(file).size[::-1]: file.name for file in files}  # headers only
        except BROKEN as error:
            raise UserError(f"{path}: {error}; every file there should be an image") from None
        if len(sizes) > 1:
            raise UserError(f"{path}: images of mixed sizes, {str([*sizes.items()][:2])[1:-1]}:"
                            " crop them to one size, or give class folders as REFERENCE")
        self.size, = sizes  # (h, w)
        self.samples = [(str(file), 0) for file in files]  # all of one class
        self.train = False  # no file takes another's place
        self.broken = torch.zeros(len(files), dtype=torch.bool).share_memory_()

    def prepare(self, path, key):
        return TF.pil_to_tensor(read_image(path))


class Array(Dataset):
    """uint8 images (N,H,W,3) of an .npz, perhaps still on disk; the items of a Folder."""
    def __init__(self, path, images):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise UserError(f"{path}: arr_0 is {images.dtype} {images.shape}:"
                            " write images as uint8 (N, H, W, 3) from 0 to 255")
        self.images = images
        self.size = images.shape[1:3]  # (h, w)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        index, key = item
        return torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1), 0, key


def map_images(path):
    """`arr_0` of an .npz: mapped where it is stored as it is, so that eight ranks share one copy of
    its 10 GB; else read."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        info = archive.getinfo("arr_0.npy")
        plain = info.compress_type == zipfile.ZIP_STORED
        plain = plain and np.lib.format.read_magic(member) == (1, 0)
        if plain:  # numpy's header, then the array
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            header = member.tell()
            plain = not fortran and not dtype.hasobject
        if not plain:
            return np.load(path, allow_pickle=False)["arr_0"]
        while dist.get_rank() == 0 and member.read(2 ** 24):
            pass  # to its end, where the checksum is compared, by one rank for all

    # It begins behind the archive's header of this member, whose length varies, and numpy's
    lengths = np.fromfile(path, "<u2", 2, offset=info.header_offset + 26)  # of name and extras
    start = info.header_offset + 30 + int(lengths.sum()) + header
    return np.memmap(path, dtype, "r", start, shape)


class Source(NamedTuple):
    """GENERATED or REFERENCE: images, or statistics of their features, or both (ADM's)."""
    name: str = None
    images: Dataset = None
    arrays: dict = {}  # what else its file holds: mu, sigma, n, size, labels

    @property
    def size(self):  # [h, w] of the images; None: nobody knows
        size = self.arrays.get("size", 0) if self.images is None else self.images.size
        return np.broadcast_to(size, 2).tolist() if np.min(size) else None


def open_source(path, size=None):
    """The Source of that name. size [h, w]: its partner's, for class folders to be cropped to."""
    wanted = ("give an .npz with arr_0 (uint8 images) or mu and sigma, a folder of images, or"
              " `shapes`")

    # Drawn: 50,000 for training, 10,000 held out
    if path in ("shapes", "shapes/val"):
        side = min(size or [32])
        images = open_data(path, side) if path == "shapes" else open_val("shapes", None, side)
        return Source(path, images)

    # A folder: class folders are cropped to their partner's size, else files taken as they are
    if Path(path).is_dir():
        if size and any(child.is_dir() for child in Path(path).iterdir()):
            inner = Path(path, "train")
            return Source(path, Folder(inner if inner.is_dir() else path, min(size)))
        files = sorted(Path(path).rglob("*"))
        files = [file for file in files if file.suffix.lower() in IMG_EXTENSIONS]
        if not files:
            raise UserError(f"{path} is a folder without images: {wanted}")
        return Source(path, Pictures(path, files))

    # An archive: images, statistics, or both
    try:
        archive = np.load(path, allow_pickle=False)
        arrays = {name: archive[name] for name in archive.files if name != "arr_0"}
        images = map_images(path) if "arr_0" in archive.files else None
    except (AttributeError, OSError, ValueError, EOFError, zlib.error,
            zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz ({error}): {wanted}") from None
    given = arrays.keys() & {"mu", "sigma"}
    if len(given) == 1 or images is None and not given:
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}: {wanted}")
    return Source(path, None if images is None else Array(path, images), arrays)


def statistics(source, features=None):
    """(mu, sigma, n): those of a file that has them, else of its images' features (N,D)."""
    if "mu" not in source.arrays:
        return *moments(features), len(features)
    mu, sigma = (source.arrays[name].astype(np.float64) for name in ("mu", "sigma"))
    return mu, sigma, int(source.arrays.get("n", 0)) or None  # ADM's do not say


def check(source, args):
    """Refuse, before the long work, what would spoil it."""
    name, images, arrays = source

    # Images: enough of them, and files that are there
    if images is not None and len(images) < 2:
        raise UserError(f"{name}: {len(images)} image given, a covariance needs at least 2")
    for path, _ in getattr(images, "samples", ()):
        if not Path(path).exists():
            raise UserError(f"{path} is a link that leads nowhere: mend or remove it")

    # Statistics: of these features, and finite
    if "mu" in arrays:
        mu, sigma, _ = statistics(source)
        of = str(arrays.get("features", args.features))
        fits = of == args.features and mu.shape * 2 == sigma.shape == (args.dim, args.dim)
        finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
        if not fits or not finite:
            raise UserError(f"{name} holds statistics {mu.shape}, {sigma.shape} of {of}; --features"
                            f" {args.features} needs {args.dim}, all finite: make it with these")
        root(sigma, name)  # refuses negative variances


@torch.no_grad()
def per_image(dataset, measure, batch, device, num=None):
    """measure: uint8 images (b,3,H,W) -> (b,F). All rows (N,F), labels (N,), on every rank.

    Batches are cut from the whole and dealt to the ranks: the same batches, so the same figures,
    for any number of ranks. num: a fixed random choice of so many images.
    """
    # All batches, and this rank's
    some = np.random.RandomState(0).permutation(len(dataset))[:num]
    order = np.sort(some).tolist()  # in the files' order
    items = [(index, row) for row, index in enumerate(order)]
    batches = [items[i:i + batch] for i in range(0, len(items), batch)]
    mine = batches[dist.get_rank()::dist.get_world_size()]
    loader = DataLoader(dataset, batch_sampler=mine, num_workers=worker_count(dataset),
                        collate_fn=good, worker_init_fn=quiet_worker)

    # Measured
    done = []  # (rows, their part of the table)
    width = torch.zeros((), dtype=torch.int64, device=device)
    bar = tqdm(loader, disable=dist.get_rank() > 0, leave=False)
    for images, labels, rows in filter(None, bar):
        values = measure(images.to(device)).float()  # (b, F)
        here = torch.ones_like(values[:, :1])  # to see which rows were filled
        done.append((rows, torch.cat([values, labels[:, None].to(values), here], 1)))
        width.fill_(values.shape[1])

    # One table for all: each rank adds its rows to the zeros of the others
    dist.all_reduce(width, dist.ReduceOp.MAX)  # for ranks without a batch
    table = torch.zeros(len(items), int(width) + 2, device=device)
    for rows, values in done:
        table[rows] = values
    dist.all_reduce(table)

    # Broken files: the same for all ranks, which end together
    lost = (table[:, -1] == 0).nonzero().flatten().tolist()
    if lost:
        path, _ = dataset.samples[order[lost[0]]]
        raise UserError(f"{len(lost)} of {len(items)} images cannot be decoded (the first: {path}):"
                        " mend or remove them; without them a figure would be of other images")
    return table[:, :-2], table[:, -2].long()


def bare_encoder(args, device):
    """The encoder of --features, as an RAE with an untrained decoder."""
    rae = RAE(args.features, "tiny", ENCODERS[args.features].image)
    rae.load_encoder(args.encoder_weights)
    return rae.eval().requires_grad_(False).to(device)


def feature_function(args, device):
    """What compares images: uint8 (b,3,H,W) -> (b,D), with Inception's logits behind them."""
    if args.features == "inception":
        network = Inception(args.inception_weights).to(device)
        return lambda images: torch.cat(network(images), 1)  # (b, D + 1008)
    rae = bare_encoder(args, device)
    return lambda images: rae.tokens(images.float() / 255).mean(1)


# The judges: figures, and warnings of what makes them incomparable

def judge_samples(args, device):
    """GENERATED against REFERENCE, or alone: FID or FD, IS, precision and recall."""
    # What is wrong is found out before the long work.
    generated = open_source(args.generated)
    reference = open_source(args.reference, generated.size) if args.reference else Source()
    for source in (generated, reference):
        check(source, args)

    # Features of both sides. Statistics need none; images beside them serve precision, recall
    measure = fake = real = None
    compared = reference.images is not None and "mu" not in reference.arrays
    if generated.images is not None or compared:
        measure = feature_function(args, device)
    if generated.images is not None:
        rows, _ = per_image(generated.images, measure, args.batch, device, args.num)
        fake, logits = rows.tensor_split([args.dim], 1)
    if reference.images is not None and measure:
        rows, _ = per_image(reference.images, measure, args.batch, device)
        real = rows[:, :args.dim]
    if dist.get_rank():
        return None  # one rank reports

    # Figures
    figures = {}
    mine = saved = statistics(generated, fake)
    if args.reference:
        saved = statistics(reference, real)
        figures[args.figure] = frechet_distance(*mine[:2], *saved[:2])
    if fake is not None and args.features == "inception":
        figures["inception_score"] = inception_score(logits)
    if fake is not None and real is not None:
        order = np.random.RandomState(0).permutation(len(real))
        some = order[:10_000]  # as many as ADM's file has
        figures["precision"], figures["recall"] = precision_recall(real[some], fake)

    # Warnings
    said = []
    arrays = generated.arrays
    labels = arrays.get("labels", arrays.get("arr_1", np.zeros(0)))  # our name, ADM's
    _, counts = np.unique(labels, return_counts=True)
    if len({*counts.tolist()}) > 1:
        said.append("classes are not equally frequent, and published figures are balanced")
    if len(counts) > 1 and (np.diff(labels) >= 0).all():
        said.append("images are sorted by class, and the Inception Score needs them shuffled")
    if args.reference and Path(args.generated).resolve() == Path(args.reference).resolve():
        said.append(f"{args.generated} is compared with itself: no figure says anything")
    return report(args, figures, mine[2], generated, reference, saved, said)


def judge_reconstructions(args, device):
    """--rae's copies of --data against the originals: rFID or rFD, PSNR, SSIM, LPIPS."""
    # What is wrong is found out before the long work.
    rae = load_rae(args.rae, device)
    side = rae.output_size
    name = "shapes/val" if args.data == "shapes" else args.data  # as GENERATED would name it
    images = open_val(None, args.data, side) or open_val(args.data, None, side)  # val/, or all
    originals = Source(name, images)
    check(originals, args)
    measure = feature_function(args, device)
    said = []
    try:
        perceptual = load_lpips(device, args.lpips_vgg)
    except UserError as error:
        if args.lpips_vgg:
            raise  # a file that was named has to be right
        perceptual = None
        said.append(f"no LPIPS: {error}")

    # Copies are rounded to 8 bits, as a file would hold them, and measured beside originals
    def compare(images):  # uint8 (b,3,H,W) -> metrics (b,3), features of both (b,2D)
        a = images.float() / 255
        copies = rae.decode(rae.encode(a)).clamp(0, 1).mul(255).round().byte()
        b = copies.float() / 255
        lpips = perceptual(2 * a - 1, 2 * b - 1).flatten() if perceptual else 0 * psnr(a, b)
        metrics = torch.stack([psnr(a, b), ssim(a, b), lpips], 1)
        features = [measure(x)[:, :args.dim] for x in (copies, images)]
        return torch.cat([metrics, *features], 1)

    rows, _ = per_image(originals.images, compare, args.batch, device, args.num)
    metrics, fake, real = rows.tensor_split([3, 3 + args.dim], 1)
    if dist.get_rank():
        return None  # one rank reports

    # Figures
    saved = statistics(originals, real)
    figures = {"r" + args.figure: frechet_distance(*moments(fake), *saved[:2])}
    figures |= zip(("psnr", "ssim", "lpips"), metrics.double().mean(0).tolist())
    if not perceptual:
        figures["lpips"] = None
    return report(args, figures, len(metrics), originals, originals, saved, said)


def report(args, figures, n, judged, reference, saved, said):
    """The line of JSON, and --save-stats. saved: REFERENCE's (mu, sigma, n), or GENERATED's."""
    # Statistics, for the next time
    size = reference.size or judged.size
    if args.save_stats:
        with writing(args.save_stats):
            np.savez(args.save_stats, mu=saved[0], sigma=saved[1], n=saved[2] or 0,
                     features=args.features, size=size or 0,
                     source=reference.name or judged.name)

    # What makes figures incomparable
    least = min(n or np.inf, saved[2] or np.inf)
    if least <= args.dim:
        said.append(f"n = {least} is not above {args.dim} dimensions: a covariance lacks rank")
    if n not in (None, 50_000):
        said.append("published figures have n = 50,000, others do not compare with them")
    if judged.images is not None and (args.num or 0) > len(judged.images):
        said.append(f"--num {args.num} is more than the {len(judged.images)} images there are")
    if judged.size and size != judged.size:
        said.append(f"the reference's images are {size} pixels and these {judged.size}")
    if getattr(reference.images, "small", False):
        said.append(f"images of {reference.name} are below {size} pixels, and were enlarged")
    if "random" in (args.inception_weights, args.encoder_weights, args.rae and args.lpips_vgg):
        said.append("random weights: mechanics only")

    # Which file that was
    digest = None  # of a folder, or of what is drawn
    if reference.name and Path(reference.name).is_file():
        digest = hashlib.sha256(np.memmap(reference.name, mode="r")).hexdigest()[:16]
    return dict(figures, n=n, features=args.features, reference=reference.name,
                reference_n=saved[2] if reference.name else None, reference_sha256=digest,
                arithmetic="images uint8, features float32, moments float64", warnings=said)


def probe(args, device):
    """Table 1d: top-1 of a linear classifier on the encoder's mean-pooled tokens."""
    # The encoder, and images whose labels mean the same on both sides
    rae = load_rae(args.rae, device) if args.rae else bare_encoder(args, device)
    train = open_data(args.data, rae.output_size)
    test = open_val(None, args.data, rae.output_size)
    if test is None or train.classes != test.classes:
        raise UserError(f"--data {args.data}: a probe needs train/ and val/, of the same classes")
    train.train = False  # here, no neighbour takes a broken file's place
    for split in (train, test):
        check(Source(args.data, split), args)

    # Fitted to the one, judged on the other
    def pooled(images):  # uint8 (b,3,H,W) -> (b,D)
        return rae.tokens(images.float() / 255).mean(1)

    x, y = per_image(train, pooled, args.batch, device, args.num)
    u, v = per_image(test, pooled, args.batch, device, args.num)
    top1 = linear_probe(x, y, u, v) if dist.get_rank() == 0 else None
    return dict(probe_top1=top1, n=len(v), n_train=len(y), classes=len(test.classes),
                encoder=rae.name)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    # what is judged
    add("generated", nargs="?", help="an .npz (arr_0; or mu, sigma), a folder, `shapes` or `shapes/val`")
    add("reference", nargs="?", help="likewise, or class folders, centre-cropped to GENERATED's size")
    # by what network
    add("--features", default="inception", choices=["inception", *ENCODERS], help="what compares images")
    add("--inception-weights", metavar="PATH", help=f"{WEIGHTS}, or `random` (default: downloaded)")
    add("--encoder-weights", metavar="PATH", help="those of --features, or `random` (default: pretrained)")
    add("--lpips-vgg", metavar="PATH", help="VGG16's weights for LPIPS, or `random` (default: downloaded)")
    # or what else
    add("--rae", metavar="RUN", help="judge the copies of --data by a run folder, rae.pt or release:X")
    add("--data", metavar="VAL", help="class folders of held-out images, or `shapes`; --probe: train/, val/")
    add("--probe", action="store_true", help="top-1 of a linear probe on the tokens of --rae or --features")
    # how
    add("--num", type=at_least(2), help="judge a fixed random choice of so many images (default: all)")
    add("--save-stats", metavar="NPZ", help="keep the statistics of the reference (of GENERATED, when alone)")
    add("--batch", type=at_least(1), default=64, help="images at a time; no figure depends on it")
    args = parser.parse_args()

    # What goes together, and what must not be written over
    pairs = bool(args.generated) != bool(args.data) == bool(args.rae or args.probe)
    if not pairs or args.probe and args.save_stats:
        parser.error("give GENERATED [REFERENCE], or --rae and --data, or --probe and --data")
    if args.probe and not args.rae and args.features == "inception":
        parser.error("--probe needs an encoder: --rae RUN, or --features with one of"
                     f" {', '.join(ENCODERS)}")
    if args.save_stats:
        args.save_stats = args.save_stats.removesuffix(".npz") + ".npz"  # as numpy would name it
        for path in (args.generated, args.reference):
            if path and Path(path).resolve() == Path(args.save_stats).resolve():
                parser.error(f"--save-stats {args.save_stats} would overwrite {path}: name another")
        with writing(args.save_stats):
            Path(args.save_stats).parent.mkdir(parents=True, exist_ok=True)
    args.dim = 2048 if args.features == "inception" else ENCODERS[args.features].dim
    args.figure = "fid" if args.features == "inception" else "fd"
    return args


def main():
    args = parse_args()
    device, rank, _ = start()
    torch.set_float32_matmul_precision("highest")  # a judge computes in fp32, not TF32
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)  # `random` weights: the same everywhere
    if args.probe:
        result = probe(args, device)
    elif args.rae:
        result = judge_reconstructions(args, device)
    else:
        result = judge_samples(args, device)
    if rank == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
