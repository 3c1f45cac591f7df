"""The judge: how far generated images are from a reference, and reconstructions from their originals.

    FID = |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)),    mu, S: mean and covariance of a network's features

The network of published figures is the 2015 TensorFlow Inception. `--features dinov2_b`, or `tiny`, offline,
takes a frozen encoder's mean-pooled tokens instead, and the result is called `fd`.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz     # FID, Inception Score, precision, recall
    python fid.py samples.npz shapes --features tiny              # FD, precision, recall, offline
    python fid.py --rae out/dinov2_b --data data/imagenet/val     # rFID, PSNR, SSIM, LPIPS
    python fid.py --probe --features mae_b --data data/imagenet   # top-1 of a linear probe (Table 1d)
    torchrun --nproc_per_node=8 fid.py ...                        # the same figures, sooner

One line of JSON: figures, n, reference and its hash, arithmetic, warnings of what makes them incomparable.
Images come as the `arr_0` of an .npz, uint8 (N,H,W,3), shuffled: N in all, B at a time, D features of each.
Sources: FID Heusel 2017, Inception Score Salimans 2016, precision, recall Kynkaanniemi 2019, SSIM Wang 2004,
all by the protocol of ADM (Dhariwal 2021), as in the paper (arXiv 2510.11690).
"""
import argparse
import hashlib
import json
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import lapack
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import Inception3
from tqdm import tqdm

from rae import (ENCODERS, RAE, Folder, UserError, at_least, load_rae, load_strict, open_data, open_val,
                 read_image, read_weights, start, worker_count)

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
VGG = "https://download.pytorch.org/models/vgg16-397923af.pth"

# ---------------------------------------------------------------------------------------------------------
# The Inception network of FID

def resize_tf1(x, side=299):
    """(B,C,H,W) float -> (B,C,side,side) as TensorFlow 1 resized: bilinear, source = destination * in / out.

    No half-pixel offset, no antialias: today's interpolations give another FID.
    """
    for dim in (2, 3):                                               # rows, then columns
        size = x.shape[dim]
        source = torch.arange(side, device=x.device) * (size / side)
        low = source.long()
        x0, x1 = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=size - 1))
        x = torch.lerp(x0, x1, (source - low).view(-1, *[1] * (3 - dim)))
    return x


class Inception(nn.Module):
    """uint8 images (B,3,H,W) -> features (B,2048) of the last pooling, logits (B,1008) without the last bias.

    weights: None for the usual download, the path of that file, "random", or a state dict.
    """
    def __init__(self, weights=None):
        super().__init__()
        self.net = net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        if weights is None:
            try:
                weights = torch.hub.load_state_dict_from_url(URL, map_location="cpu", weights_only=True)
            except OSError as error:
                raise UserError(f"cannot download {WEIGHTS} ({error}): bring that file and name it with"
                                " --inception-weights PATH, or judge by --features tiny") from None
        if weights != "random":
            state = weights if isinstance(weights, dict) else read_weights(weights)
            unused = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
            load_strict(net, {**unused, **state}, "--inception-weights")
        # torchvision's network pools otherwise than the one trained in 2015, which no weight can tell:
        # there, the average pools of blocks A, C and the first E leave the padding out of the mean ...
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            net.get_submodule(f"Mixed_{name}").branch_pool.register_forward_pre_hook(self.without_padding)
        net.Mixed_7c.register_forward_hook(self.max_pooled)          # ... and the last E pools by maximum.
        # The Inception Score multiplies features with the last layer's matrix and leaves its bias out.
        self.logits = nn.Linear(2048, 1008, bias=False)
        self.logits.weight, net.fc = net.fc.weight, nn.Identity()
        self.eval().requires_grad_(False)

    @staticmethod
    def without_padding(conv, inputs):
        pooled, = inputs                                             # sums of up to 9 pixels, over 9
        return pooled / F.avg_pool2d(torch.ones_like(pooled[:1, :1]), 3, stride=1, padding=1)

    @staticmethod
    def max_pooled(block, inputs, output):
        pooled = block.branch_pool(F.max_pool2d(inputs[0], 3, stride=1, padding=1))
        return torch.cat([output[:, :-pooled.shape[1]], pooled], 1)  # this branch's channels are the last

    def forward(self, images):
        if images.dtype != torch.uint8:
            raise UserError(f"Inception takes uint8 images, not {images.dtype}: round to 8 bits first")
        features = self.net((resize_tf1(images.float()) - 128) / 128)          # (B, 2048)
        return features, self.logits(features)

# ---------------------------------------------------------------------------------------------------------
# Metrics on features

def moments(features):
    """features (N,D) -> mean (D,), covariance (D,D) with ddof 1, numpy float64; two passes over blocks."""
    features = torch.as_tensor(features)
    if len(features) < 2:
        raise UserError(f"{len(features)} image given, and a covariance needs at least 2: generate more")
    mu = sum(rows.double().sum(0) for rows in features.split(4096)) / len(features)
    centred = (rows.double() - mu for rows in features.split(4096))
    sigma = sum(rows.T @ rows for rows in centred) / (len(features) - 1)
    return mu.cpu().numpy(), sigma.cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians, >= 0; mu (D,), sigma (D,D).

    With S1 = L1 L1^T and S2 = L2 L2^T the eigenvalues of S1 S2 are the squares of the singular values of
    L1^T L2, whose sum is Tr (S1 S2)^(1/2): no root of a matrix, nor of a rounding error below zero. The
    pivoted Cholesky factorisation ends at the numerical rank: fewer samples than dimensions are fine.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(x, np.float64) for x in (mu1, mu2, sigma1, sigma2))
    shapes = mu1.shape * 2, mu2.shape * 2, sigma1.shape, sigma2.shape
    if len({*shapes}) > 1 or not all(np.isfinite(x).all() for x in (mu1, mu2, sigma1, sigma2)):
        raise UserError(f"statistics must be finite and of one dimension, these are {shapes[2]}, {shapes[3]}:"
                        " make both with the same --features, from sound images")
    factors = []
    for sigma in (sigma1, sigma2):
        L, pivots, rank, _ = lapack.dpstrf(sigma, lower=1)           # sigma[pivots][:, pivots] = L L^T
        factor = np.empty((len(L), rank))
        factor[pivots - 1] = np.tril(L)[:, :rank]
        factors.append(torch.from_numpy(factor))
    root = torch.linalg.svdvals(factors[0].T @ factors[1]).sum().item()
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root))


def inception_score(logits, splits=10):
    """logits (N,1008) -> mean over consecutive splits of exp(mean KL(p(y|x) || p(y)))."""
    scores = []
    for part in torch.as_tensor(logits).tensor_split(min(splits, len(logits))):
        log_p = part.double().log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores))


def squared_distances(a, b):
    """(M,D), (N,D) -> (M,N), >= 0."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1)[:, None]).clamp_(min=0)


def precision_recall(real, fake, k=3, block=2 ** 25):
    """features (M,D), (N,D) -> shares (of fakes within the radius of any real, of reals within any fake's).

    A radius is the distance to the k-th nearest neighbour other than itself. `block` distances are held.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"{len(real)} and {len(fake)} images: {k} neighbours of each need at least {k + 1}")
    centre = real.mean(0)                                            # smaller norms, less cancellation
    real, fake = real - centre, fake - centre

    def squared_radii(x):
        radii = torch.empty(len(x), device=x.device)
        for rows in torch.arange(len(x), device=x.device).split(max(1, block // len(x))):
            d = squared_distances(x[rows], x)
            d[rows - rows[0], rows] = torch.inf                      # not its own neighbour
            radii[rows] = d.topk(k, largest=False).values[:, -1]
        return radii

    radii_real, radii_fake = squared_radii(real), squared_radii(fake)
    precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in torch.arange(len(fake), device=fake.device).split(max(1, block // len(real))):
        d = squared_distances(fake[rows], real)                      # (rows, M)
        precise += (d <= radii_real).any(1).sum().item()
        recalled |= (d <= radii_fake[rows, None]).any(0)
    return precise / len(fake), recalled.double().mean().item()


def fit_probe(features, labels, decay=1e-4):
    """features (N,D), labels (N,) -> a function (M,D) -> logits (M,C): logistic regression on standardised
    features, by L-BFGS from zero."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    x, head = (features - mean) / std, nn.Linear(features.shape[1], int(labels.max()) + 1).to(features.device)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

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
    guess = fit_probe(train_features, train_labels)(test_features).argmax(1)
    return (guess == test_labels).double().mean().item()

# ---------------------------------------------------------------------------------------------------------
# Metrics on pairs of images (B,3,H,W) in [0,1]: a number for each pair

def psnr(a, b):
    """-10 log10(mean squared error) in dB (B,), float64; 100 dB when identical."""
    return -10 * (a.double() - b.double()).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(a, b):
    """Structural similarity (B,), float64: Gaussian windows of 11 x 11, sigma 1.5, inside the image."""
    if min(a.shape[2:]) < 11:
        raise UserError(f"images of {tuple(a.shape[2:])} pixels, and SSIM's window needs at least 11 x 11")
    window = torch.exp(-(torch.arange(11, device=a.device).double() - 5) ** 2 / (2 * 1.5 ** 2))
    window = (window / window.sum()).view(1, 1, 11, 1)

    def blur(x):                                                     # (B,3,H,W) -> (3B,1,H-10,W-10)
        return F.conv2d(F.conv2d(x.flatten(0, 1)[:, None], window), window.mT)

    a, b = a.double(), b.double()
    mean_a, mean_b, c1, c2 = blur(a), blur(b), 0.01 ** 2, 0.03 ** 2
    var_a, var_b = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2
    cov = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    return (luminance * (2 * cov + c2) / (var_a + var_b + c2)).view(len(a), -1).mean(1)


def load_lpips(device="cpu", vgg=None):
    """LPIPS with VGG, frozen: images (B,3,H,W), both in [-1,1] -> (B,1,1,1).

    vgg: None for torchvision's weights from their home, the path of that file, or "random".
    """
    import lpips
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # it calls torchvision the old way
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # its own linear layers come with it
    if vgg != "random":
        try:
            state = read_weights(vgg) if vgg else torch.hub.load_state_dict_from_url(
                VGG, map_location="cpu", progress=False, weights_only=True)
        except OSError as error:
            raise UserError(f"cannot download {Path(VGG).name} for LPIPS ({error}): bring that file and name"
                            " it with --lpips-vgg PATH, or train without LPIPS: --lpips-weight 0") from None
        for part in range(1, 6):                                     # five slices of one numbered sequence
            layers = getattr(net.net, f"slice{part}")
            names = [f"features.{name}." for name, _ in layers.named_children()]
            load_strict(layers, {key.removeprefix("features."): value for key, value in state.items()
                                 if key.startswith(tuple(names))}, "VGG16 of LPIPS")
    return net.to(device).eval().requires_grad_(False)

# ---------------------------------------------------------------------------------------------------------
# Images, statistics, and a row of numbers per image

class Pictures(Dataset):
    """Images of one size as they are: an array uint8 (N,H,W,3), or a list of files. Items as rae.Folder's."""
    def __init__(self, path, images):
        self.images, self.samples = images, [] if isinstance(images, np.ndarray) else images
        if self.samples:
            try:
                sizes = {Image.open(file).size[::-1]: file.name for file in images}      # reads headers only
            except OSError as error:
                raise UserError(f"{path}: {error}; every file there should be an image") from None
            if len(sizes) > 1:
                raise UserError(f"{path}: images of mixed sizes, {str([*sizes.items()][:2])[1:-1]}:"
                                " crop them to one size, or give class folders as REFERENCE")
        elif images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise UserError(f"{path}: arr_0 is {images.dtype} {images.shape}:"
                            " write images as uint8 (N, H, W, 3) from 0 to 255")
        self.size = [*sizes][0] if self.samples else images.shape[1:3]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        index, key = item
        try:
            image = np.array(read_image(self.images[index]) if self.samples else self.images[index])
            return torch.from_numpy(image).permute(2, 0, 1), 0, key
        except (OSError, ValueError, SyntaxError) as error:
            print(f"skipped {self.images[index]}: {error}", file=sys.stderr, flush=True)
            return torch.zeros(3, *self.size, dtype=torch.uint8), -1, key     # -1: to be dropped


def open_source(path, size=(0, 0)):
    """GENERATED or REFERENCE -> (data set or None, the arrays of its file beside the images).

    size (h, w): that of the images to compare with, if known; class folders are centre-cropped to it.
    """
    wanted = "give an .npz with arr_0 (uint8 images) or mu and sigma, a folder of images, or `shapes`"
    if path in ("shapes", "shapes/val"):                             # 50,000 for training, 10,000 held out
        side = min(size) or 32
        return open_data(path, side) if path == "shapes" else open_val("shapes", None, side), {}
    if Path(path).is_dir():
        if min(size) and any(child.is_dir() for child in Path(path).iterdir()):
            return Folder(Path(path, "train") if Path(path, "train").is_dir() else path, min(size)), {}
        files = sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise UserError(f"{path} is a folder without images: {wanted}")
        return Pictures(path, files), {}
    try:
        archive = np.load(path, allow_pickle=False)
        arrays = {key: archive[key] for key in archive.files}
    except (AttributeError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz archive ({error}): {wanted}") from None
    if "arr_0" not in arrays and not {"mu", "sigma"} <= arrays.keys():
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}: {wanted}")
    images = arrays.pop("arr_0", None)
    return None if images is None else Pictures(path, images), arrays


@torch.no_grad()
def per_image(dataset, measure, batch, device, num=None):
    """measure: uint8 images (b,3,H,W) -> (b,F). All rows (N,F) and labels (N,), in order, on every rank.

    Batches are cut from the whole and dealt to the ranks, each adding its rows to the zeros of the others:
    the same batches, so the same figures, for any number of ranks. num: a fixed random choice of so many.
    """
    order = np.sort(np.random.RandomState(0).permutation(len(dataset))[:num]).tolist()
    items = [(index, row) for row, index in enumerate(order)]
    batches = [items[i:i + batch] for i in range(0, len(items), batch)]
    loader = DataLoader(dataset, batch_sampler=batches[dist.get_rank()::dist.get_world_size()],
                        num_workers=worker_count(dataset, None if getattr(dataset, "samples", ()) else 0))
    done, width = [], torch.zeros((), dtype=torch.int64, device=device)
    for images, labels, rows in tqdm(loader, disable=dist.get_rank() > 0, leave=False):
        values = measure(images.to(device)).float()
        done.append((rows, torch.cat([values, labels[:, None].to(values) + 1], 1)))
        width.fill_(done[0][1].shape[1])
    dist.all_reduce(width, dist.ReduceOp.MAX)                        # for ranks without a batch
    table = torch.zeros(len(items), int(width), device=device)
    for rows, values in done:
        table[rows] = values
    dist.all_reduce(table)
    table = table[table[:, -1] > 0]                                  # the label + 1; 0: not decodable
    return table[:, :-1], table[:, -1].long() - 1


def sha256(path):
    """16 hex digits: of a file's bytes, of names and sizes in a folder, or of a data set's name."""
    names = [f"{file.relative_to(path)} {file.stat().st_size}" for file in sorted(Path(path).rglob("*"))]
    content = Path(path).read_bytes() if Path(path).is_file() else "\n".join(names or [path]).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def statistics(arrays, features):
    """(mu, sigma, n): those of a file that has them, else of its images' features."""
    if "mu" in arrays:
        return arrays["mu"], arrays["sigma"], int(arrays.get("n", 0)) or None
    return *moments(features), len(features)


def bare_encoder(args, device):
    """The encoder of --features, as an RAE with an untrained decoder."""
    rae = RAE(args.features, "tiny", ENCODERS[args.features].image, encoder_weights=args.encoder_weights)
    return rae.eval().requires_grad_(False).to(device)

# ---------------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("generated", nargs="?", help="an .npz (arr_0; or mu, sigma), a folder, `shapes` or `shapes/val`")
    add("reference", nargs="?", help="likewise, or class folders, centre-cropped to GENERATED's size")
    add("--features", default="inception", choices=["inception", *ENCODERS], help="what compares images")
    add("--inception-weights", metavar="PATH", help=f"{WEIGHTS}, or `random` (default: downloaded)")
    add("--encoder-weights", metavar="PATH", help="those of --features, or `random` (default: pretrained)")
    add("--lpips-vgg", metavar="PATH", help="VGG16's weights for LPIPS, or `random` (default: downloaded)")
    add("--rae", metavar="RUN", help="judge reconstructions of --data by a run folder, rae.pt or release:X\n"
        "against the originals, or against statistics in GENERATED's place")
    add("--weights", metavar="DIR", help="folder with the released files for --rae, in place of the hub")
    add("--data", metavar="VAL", help="class folders of held-out images, or `shapes`; --probe: train/, val/")
    add("--probe", action="store_true", help="top-1 of a linear probe on the tokens of --rae or --features")
    add("--num", type=at_least(2), help="judge a fixed random choice of so many images (default: all)")
    add("--save-stats", metavar="NPZ", help="keep the statistics of the reference (of GENERATED, when alone)")
    add("--batch", type=at_least(1), default=64, help="images at a time; no figure depends on it")
    args = parser.parse_args()
    if bool(args.rae or args.probe) != bool(args.data) or not (args.data or args.generated):
        parser.error("give GENERATED [REFERENCE], or --data with --rae or --probe")
    if args.probe and not args.rae and args.features == "inception":
        parser.error(f"--probe needs an encoder: --rae RUN, or --features with one of {', '.join(ENCODERS)}")
    return args


def probe(args, device):
    """Table 1d: top-1 of a linear classifier on the encoder's mean-pooled tokens."""
    rae = load_rae(args.rae, device, weights=args.weights) if args.rae else bare_encoder(args, device)
    size = rae.image_size * rae.upsample
    train, test = open_data(args.data, size), open_val(None, args.data, size)
    if test is None or train.classes != test.classes:
        raise UserError(f"--data {args.data}: a probe needs train/ and val/ in it, with the same classes")

    def pooled(images):                                              # uint8 (b,3,H,W) -> (b,D)
        return rae.tokens(images.float() / 255).mean(1)

    (x, y), (u, v) = (per_image(split, pooled, args.batch, device, args.num) for split in (train, test))
    top1 = linear_probe(x, y, u, v) if dist.get_rank() == 0 else None
    return dict(probe_top1=top1, n=len(v), n_train=len(y), classes=len(test.classes), encoder=rae.name)


def judge(args, device):
    """Everything else: GENERATED, or the reconstructions of --rae, against a reference."""
    # What is judged, and by what. Whatever is wrong with it is found out before the long work.
    inception = args.features == "inception"
    rae = load_rae(args.rae, device, weights=args.weights) if args.rae else None
    dim = 2048 if inception else ENCODERS[args.features].dim
    path, against = (args.data, args.generated) if rae else (args.generated, args.reference)
    data, own = (open_val(path, None, rae.image_size * rae.upsample), {}) if rae else open_source(path)
    size = np.broadcast_to(data.size if data else own.get("size", 0), 2).tolist()
    reference, theirs = open_source(against, size) if against else (None, {})
    size_real = np.broadcast_to(theirs.get("size", getattr(reference, "size", size)), 2).tolist()
    for name, images, arrays in ((path, data, own), (against, reference, theirs)):
        if images is not None and len(images) < 2:
            raise UserError(f"{name}: {len(images)} image given, and a covariance needs at least 2: add more")
        of, mu, sigma = str(arrays.get("features", args.features)), arrays.get("mu"), arrays.get("sigma")
        if mu is not None and (of != args.features or mu.shape != (dim,) or sigma.shape != (dim, dim)):
            raise UserError(f"{name} holds statistics {mu.shape}, {sigma.shape} of {of}, --features"
                            f" {args.features} has {dim}: make both sides with the same features")
    if "mu" in theirs and (rae or not data):
        reference = None                                             # its images would serve recall alone
    if data or reference:
        network = Inception(args.inception_weights).to(device) if inception else bare_encoder(args, device)
    lpips = no_lpips = None
    if rae:
        try:
            lpips = load_lpips(device, args.lpips_vgg)
        except UserError as error:
            no_lpips = f"no LPIPS: {error}"

    def features(images):                                            # uint8 (b,3,H,W) -> (b,D), or (b,D+1008)
        return torch.cat(network(images), 1) if inception else network.tokens(images.float() / 255).mean(1)

    def reconstruction(images):                                      # -> copies (b,D), metrics (b,3), ...
        copies = rae.decode(rae.encode(images.float() / 255)).clamp(0, 1).mul(255).round().byte()
        a, b = images.float() / 255, copies.float() / 255
        metrics = [psnr(a, b), ssim(a, b), lpips(2 * a - 1, 2 * b - 1).flatten() if lpips else 0 * psnr(a, b)]
        originals = [] if against else [features(images)[:, :dim]]   # ... and originals (b,D)
        return torch.cat([features(copies)[:, :dim], torch.stack(metrics, 1), *originals], 1)

    measure, run = reconstruction if rae else features, (args.batch, device)
    fake = per_image(data, measure, *run, args.num)[0] if data else None
    real = per_image(reference, features, *run)[0] if reference else None
    if dist.get_rank():
        return None

    # The figures.
    mu, sigma, n = statistics(own, fake[:, :dim] if data else None)
    real = fake[:, dim + 3:] if rae and not against else real[:, :dim] if reference else None
    result, saved = {}, (mu, sigma, n)
    if against or rae:
        saved = statistics(theirs, real)
        result["r" * bool(rae) + ("fid" if inception else "fd")] = frechet_distance(mu, sigma, *saved[:2])
    if rae:
        result.update(zip(("psnr", "ssim", "lpips"), fake[:, dim:dim + 3].double().mean(0).tolist()))
        result["lpips"] = result["lpips"] if lpips else None
    elif data and inception:
        result["inception_score"] = inception_score(fake[:, dim:])
    if data and reference and not rae:
        some = np.random.RandomState(0).permutation(len(real))[:10_000]        # as many as ADM's file has
        result["precision"], result["recall"] = precision_recall(real[some], fake[:, :dim])
    if args.save_stats:
        np.savez(args.save_stats, mu=saved[0], sigma=saved[1], n=saved[2] or 0, features=args.features,
                 size=size_real, source=against or path)

    # What makes them incomparable.
    lost = min(args.num or np.inf, len(data)) - len(fake) if data else 0
    labels = own.get("labels", own.get("arr_1", np.zeros(0, int)))
    counts, smallest = np.unique(labels, return_counts=True)[1], min(n or np.inf, saved[2] or np.inf)
    caveats = {
        f"n = {smallest} is not above the {dim} dimensions: a covariance lacks rank": smallest <= dim,
        "published figures have n = 50,000, and figures of another n do not compare": (n or 50_000) != 50_000,
        f"the reference's images are {size_real} pixels and these {size}": size_real != size and min(size),
        f"{lost} undecodable images were left out": lost,
        f"{against} was not made of {args.data}: published rFIDs compare with the originals":
            rae and against and str(theirs.get("source")) != args.data,
        "classes are not equally frequent: published figures are class-balanced": len({*counts.tolist()}) > 1,
        "the images are sorted by class, and the Inception Score's consecutive splits need them shuffled":
            len(counts) > 1 and (np.diff(labels) >= 0).all(),
        "random weights: mechanics only":
            "random" in (args.inception_weights, args.encoder_weights, rae and args.lpips_vgg),
        str(no_lpips): no_lpips,
    }
    name = against or (path if rae else None)
    return dict(result, n=n, features=args.features, reference=name, reference_n=saved[2] if name else None,
                reference_sha256=sha256(name) if name else None,
                arithmetic="images uint8, features float32, moments float64",
                warnings=[sentence for sentence, true in caveats.items() if true])


def main():
    args = parse_args()
    device, rank, _ = start()
    torch.set_float32_matmul_precision("highest")                    # a judge computes in fp32, not TF32
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)                                             # `random` weights: the same everywhere
    result = probe(args, device) if args.probe else judge(args, device)
    if rank == 0:
        print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
