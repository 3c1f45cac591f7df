"""Do the tests notice? One-line mistakes, put into a copy of the code one at a time. Not run by pytest.

    python tests/mutants.py                  # all of them, two at a time
    python tests/mutants.py --only ema       # those whose file, texts or tests contain `ema`

Every row is (file, old text, new text, tests that must notice): a mistake that a maintainer could make and
that would change numbers silently, or bring back a fault that was mended. The named tests pass on the code as
it is and must fail on the mutant, or not come to an end. Exit status 0 if every mutant is killed.
"""
import argparse
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
AT_ONCE = 2                                                                   # mutants
LIMIT = 200  # seconds; a hang is noticed, too
LEFT_OUT = (".git", "out", "data", "__pycache__", ".pytest_cache", "venv", ".venv")

RAE = "tests/test_rae.py"
FID = "tests/test_fid.py"
STEPS = "tests/test_steps.py"
DECODER = "tests/test_train_decoder.py"
DIT = "tests/test_train_dit.py"
SAMPLE = "tests/test_sample.py"
SCRIPTS = "tests/test_scripts.py"
FAULTS = "tests/test_faults.py"
RELEASE = "tests/test_release.py"
ENCODERS = "tests/test_encoders.py"
BEYOND = "tests/test_beyond.py"

MUTANTS = [
    # rae.py, assets/shapes.py, assets/release.py
    ("rae.py", "if not low <= value <= most or math.isinf(value):", "if value < low or value > most:", RAE),
    ("rae.py",
     'with torch.autocast("cuda" if args[-1].is_cuda else "cpu", enabled=False):\n            return '
     "function",
     'with torch.autocast("cuda" if args[-1].is_cuda else "cpu", enabled=True):\n            return '
     "function", RAE),
    ("rae.py",
     "h = (h ^ shift(h, 27)) * -0x6B2FB644ECCEEE15",
     "h = (h ^ h >> 27) * -0x6B2FB644ECCEEE15", RAE),
    ("rae.py", "row.normal_(generator=generator.manual_seed(key))", "row.normal_(generator=generator)", RAE),
    ("rae.py", "while min(image.size) >= 2 * size:", "while min(image.size) > 2 * size + 999:", RAE),
    ("rae.py",
     "image = TF.resize(image, size * 3 // 2, TF.InterpolationMode.BICUBIC)",
     "image = TF.resize(image, size, TF.InterpolationMode.BICUBIC)", RAE),
    ("rae.py", "left = rng.integers(image.width - size + 1)", "left = (image.width - size) // 2", RAE),
    ("rae.py", "image = ImageOps.exif_transpose(image)", "image = image.copy()", RAE),
    ("rae.py",
     "            if not self.train:\n                return None",
     "            if False:\n                return None", RAE),
    ("rae.py", "                if not self.broken[place]:\n", "                if True:\n", RAE),
    ("rae.py", "if len({os.path.realpath(place) for place in places}) < len(places):", "if False:", RAE),
    ("rae.py", "        if self.train and self.crop:", "        if self.train or self.crop:", RAE),
    ("rae.py", "if min(image.size) < self.size and not self.small:", "if min(image.size) < self.size:", RAE),
    ("rae.py", "return Shapes(size, first=50_000, count=10_000)", "return Shapes(size, count=10_000)", RAE),
    ("rae.py",
     'allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)',
     "allowed = range(os.cpu_count())", RAE),
    ("rae.py", 'len(allowed) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))', "len(allowed)", RAE),
    ("rae.py", "    signal.signal(signal.SIGTERM, signal.SIG_IGN)", "    pass", RAE),
    ("rae.py",
     "for i, place in enumerate(spread(len(dataset), most))][rank::world]",
     "for i, place in enumerate(spread(len(dataset), most))]", RAE),
    ("rae.py",
     "return F.layer_norm(x[:, self.extra:], x.shape[-1:], eps=self.eps)",
     "return F.layer_norm(x[:, 1:], x.shape[-1:], eps=self.eps)", ENCODERS),
    ("rae.py", 'state["cls_token"] = state["cls_token"] + position', "pass", ENCODERS),
    ("rae.py", "antialias=spec.antialias,", "antialias=True,", ENCODERS),
    ("rae.py",
     "torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], 1)",
     "torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], 1)", RAE),
    ("rae.py", "return torch.cat([rows, columns], 1)", "return torch.cat([columns, rows], 1)", RAE),
    ("rae.py",
     "x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)",
     "x = torch.cat([0 * self.cls_token.expand(len(x), -1, -1), x], 1)", RELEASE),
    ("rae.py", "x = self.embed(x) + self.pos_embed ", "x = self.embed(x) + 0 * self.pos_embed ", RELEASE),
    ("rae.py", "x = z * self.std + self.mean ", "x = z * self.std ", RAE),
    ("rae.py", "x = z * self.std + self.mean ", "x = z ", RAE),
    ("rae.py", "return (x - self.mean) / self.std", "return x / self.std", RAE),
    ("rae.py", "return x * self.pixel_std + self.pixel_mean", "return x * self.pixel_std", RAE),
    ("rae.py", "images = F.avg_pool2d(images, self.upsample)", "pass", RAE),
    ("rae.py",
     'for key, value in saved["ema"].items()}\n    load_strict(rae.decoder',
     'for key, value in saved["model"].items()}\n    load_strict(rae.decoder', RAE),
    ("rae.py", 'rae.load_encoder(saved["encoder"]', "rae.load_encoder(None", RAE),
    ("rae.py", 'rae.data = saved.get("data")', "rae.data = None", RAE),
    ("rae.py", "weights_only=True, mmap=mapped)", "weights_only=True, mmap=False)", RAE),
    ("rae.py", "weights_only=True, mmap=mapped)", "weights_only=False, mmap=mapped)", RAE),
    ("rae.py", "            os.replace(temporary, path)", "            temporary.unlink()", RAE),
    ("rae.py",
     '            with open(temporary, "wb") as file:',
     '            with open(path, "wb") as file:', RAE),
    ("rae.py", '"foreign": shape.keys() - own.keys(),', '"foreign": set(),', RELEASE),
    ("rae.py",
     'return state.get("ema") or state.get("model") or state',
     'return state.get("model") or state.get("ema") or state', RAE),
    ("assets/shapes.py", "inside = crossed.sum(-1) % 2 == 1", "inside = crossed.sum(-1) > 0", RAE),
    ("assets/shapes.py",
     "qy = py * angle.cos() - px * angle.sin()",
     "qy = py * angle.cos() + px * angle.sin()", RAE),
    ("assets/shapes.py",
     "images, labels = self.render(self.first + torch.tensor(indices))",
     "images, labels = self.render(torch.tensor(indices))", RAE),
    ("assets/shapes.py",
     "bits = mix(indices[:, None], torch.arange(len(self.low))) >> 39",
     "bits = mix(indices[:, None] % 10, torch.arange(len(self.low))) >> 39", RAE),
    ("assets/release.py",
     "return mean.flatten(1).T.contiguous(), var.flatten(1).T.contiguous()",
     "return mean.mT.flatten(1).T.contiguous(), var.mT.flatten(1).T.contiguous()", RELEASE),
    ("assets/release.py",
     'for part in ("query", "key", "value")]',
     'for part in ("key", "query", "value")]', RELEASE),
    ("assets/release.py", "return width // buffer.shape[1]", "return 16", RELEASE),
    ("assets/release.py", "again or not (target / file).is_file()]", "True]", RELEASE),
    ("assets/release.py", "if not together or dist.get_rank() == 0:", "if True:", RELEASE),
    ("assets/release.py",
     'alpha = math.sqrt(config["tokens"] * config["token_dim"] / 4096)',
     "alpha = 1.0", RELEASE),
    ("assets/release.py", '"ImageNet256/DiTDH-S_ep14", 1.42)', '"ImageNet256/DiTDH-S_ep14", 1.5)', RELEASE),
    ("assets/release.py",
     "    finally:                                                # also when it failed: the others are "
     "waiting\n        if together:",
     "    finally:                                                # also when it failed: the others are "
     "waiting\n        if together and done:", RELEASE),

    # fid.py
    ("fid.py",
     "source = torch.arange(side, device=x.device) * (size / side)",
     "source = torch.arange(side, device=x.device) * ((size - 1) / (side - 1))", FID),
    ("fid.py", "net.Mixed_7c.register_forward_hook(self.max_pooled)", "pass", FID),
    ("fid.py",
     "x = (resize_tf1(images.float()) - 128) / 128",
     "x = (resize_tf1(images.float()) - 127.5) / 127.5", FID),
    ("fid.py",
     "sigma = sum(rows.T @ rows for rows in centred) / (len(features) - 1)",
     "sigma = sum(rows.T @ rows for rows in centred) / len(features)", FID),
    ("fid.py", "if np.abs(left).max(initial=0) <= 1e-10 * np.abs(sigma).max():", "if True:", FID),
    ("fid.py", "if values[0] < -1e-5 * values[-1]:", "if False:", FID),
    ("fid.py", "np.trace(sigma2) - 2 * trace", "np.trace(sigma2) - trace", FID),
    ("fid.py", "def inception_score(logits, splits=10):", "def inception_score(logits, splits=1):", FID),
    ("fid.py", "d[rows - rows[0], rows] = torch.inf", "pass", FID),
    ("fid.py",
     "precise += (d <= radii_real).any(1).sum().item()",
     "precise += (d <= radii_fake[rows, None]).any(1).sum().item()", FID),
    ("fid.py",
     "recalled |= (d <= radii_fake[rows, None]).any(0)",
     "recalled |= (d <= radii_real).any(0)", FID),
    ("fid.py", "clamp(min=1e-10).log10()", "clamp(min=1e-8).log10()", FID),
    ("fid.py", "c1, c2 = 0.01 ** 2, 0.03 ** 2", "c1, c2 = 0.01 ** 2, 0.01 ** 2", FID),
    ("fid.py", "linear.forward = in_fp32(linear.forward)", "pass", FID),
    ("fid.py", "plain = not fortran and not dtype.hasobject", "plain = not dtype.hasobject", FID),
    ("fid.py", "if not Path(path).exists():", "if False:", FID),
    ("fid.py",
     "some = np.random.RandomState(0).permutation(len(dataset))[:num]",
     "some = np.arange(len(dataset))[:num]", FID),
    ("fid.py", "return table[:, :-2], table[:, -2].long()", "return table[:, :-2], table[:, -1].long()", FID),
    ("fid.py",
     "some = order[:10_000]",
     "some = np.arange(len(real))[:10_000]", FID),
    ("fid.py", "precision_recall(real[some], fake)", "precision_recall(fake, real[some])", FID),
    ("fid.py",
     'figures["inception_score"] = inception_score(logits)',
     'figures["inception_score"] = inception_score(fake)', FID),
    ("fid.py", ".clamp(0, 1).mul(255).round().byte()", ".clamp(0, 1).mul(255).byte()", FID),
    ("fid.py", "perceptual(2 * a - 1, 2 * b - 1).flatten()", "perceptual(a, b).flatten()", FID),
    ("fid.py", "b = copies.float() / 255", "b = a", FID),
    ("fid.py", "copies = rae.decode(rae.encode(a))", "copies = rae.decode(rae.encode(a * 255 / 256))", FID),
    ("fid.py", "for x in (copies, images)]", "for x in (copies, copies)]", FID),
    ("fid.py", "n=saved[2] or 0,", "n=n or 0,", FID),
    ("fid.py", "linear_probe(x, y, u, v)", "linear_probe(u, v, x, y)", FID),

    # train_decoder.py, train_dit.py, sample.py: what the loops compute, and what is drawn
    ("rae.py", 'for key, value in saved["ema"].items()', 'for key, value in saved["model"].items()', STEPS),
    ("train_decoder.py",
     "both = torch.cat([images, images.flip(-1)])",
     "both = torch.cat([images, images])", STEPS),
    ("train_decoder.py", "(square - mean.square()).clamp", "square.clamp", STEPS),
    ("train_decoder.py", "still.train = False ", "still.train = True ", STEPS),
    ("train_decoder.py", "sigma = tau * (u.abs() if", "sigma = tau * (u.square() if", DECODER),
    ("train_decoder.py", "sigma[:, None, None] * eps / std", "sigma[:, None, None] * eps", STEPS),
    ("train_decoder.py", "u = draws[:, -1]", "u = draws[:1, -1]", STEPS),
    ("train_decoder.py", "noisy = noise_augment(z, rae.std, keys, args.tau, args.noise)", "noisy = z", STEPS),
    ("train_decoder.py",
     "noise_augment(z, rae.std, keys, args.tau, args.noise)",
     "noise_augment(z, rae.std, keys, args.tau)", STEPS),
    ("train_decoder.py", "x = x + brightness - 0.5", "x = x + brightness", DECODER),
    ("train_decoder.py",
     "x.mean(1, keepdim=True), x, 2 * saturation)",
     "x.mean(1, keepdim=True), x, saturation)", DECODER),
    ("train_decoder.py", "column = left[:, 0] +", "column = top[:, 0] +", DECODER),
    ("train_decoder.py", "(self.residual(x) + x) / math.sqrt(2)", "self.residual(x) + x", DECODER),
    ("train_decoder.py", "x = (x / 2 + 0.5 - self.pixel_mean)", "x = (x - self.pixel_mean)", DECODER),
    ("train_decoder.py", "maps = [maps[-1], *maps]", "maps = [maps[0], *maps]", DECODER),
    ("train_decoder.py",
     "F.relu(1 - real).mean() + F.relu(1 + fake)",
     "F.relu(1 + real).mean() + F.relu(1 - fake)", DECODER),
    ("train_decoder.py", "gan = -logits.mean()", "gan = logits.mean()", STEPS),
    ("train_decoder.py",
     "(gan_gradient.norm() + 1e-6)).clamp(0, 1e4)",
     "(gan_gradient.norm() + 1e-6)).clamp(0, 1)", DECODER),
    ("train_decoder.py", "dist.all_reduce(gradient)", "pass", DECODER),
    ("train_decoder.py", "d_rec + gan_weight * weight * d_gan", "d_rec + weight * d_gan", STEPS),
    ("train_decoder.py", "d_rec + gan_weight * weight * d_gan", "d_rec + gan_weight * d_gan", STEPS),
    ("train_decoder.py",
     "adaptive_weight(at_last(d_rec), at_last(d_gan))",
     "adaptive_weight(d_rec, d_gan)", STEPS),
    ("train_decoder.py",
     "adaptive_weight(at_last(d_rec), at_last(d_gan))",
     "adaptive_weight(at_last(d_gan), at_last(d_rec))", STEPS),
    ("train_decoder.py",
     'parts["lpips"] = perceptual(copies * 2 - 1, images * 2 - 1).mean()',
     'parts["lpips"] = perceptual(copies, images).mean()', STEPS),
    ("train_decoder.py",
     'loss = loss + args.lpips_weight * parts["lpips"]',
     'loss = loss + parts["lpips"]', STEPS),
    ("train_decoder.py",
     "disc.eval()(augment(copies * 2 - 1, mix(keys, 1)))",
     "disc.eval()(copies * 2 - 1)", STEPS),
    ("train_decoder.py",
     "disc.eval()(augment(copies * 2 - 1, mix(keys, 1)))",
     "disc.eval()(augment(copies, mix(keys, 1)))", STEPS),
    ("train_decoder.py", "disc.eval()(augment(", "disc.train()(augment(", STEPS),
    ("train_decoder.py",
     "    else:\n        (loss / args.accum).backward()",
     "    else:\n        loss.backward()", STEPS),
    ("train_decoder.py", "gan / args.accum, copies", "gan, copies", STEPS),
    ("train_decoder.py", "z = noise_augment(z, rae.std, mix(keys, 4), args.tau, args.noise)", "pass", STEPS),
    ("train_decoder.py", 'if args.disc_input == "noisy":', "if True:", STEPS),
    ("train_decoder.py", "copies = rae.decode(z).clamp(0, 1)", "copies = rae.decode(z)", STEPS),
    ("train_decoder.py", "fakes = (copies * 255).round() / 255", "fakes = copies", STEPS),
    ("train_decoder.py",
     "fakes = (copies * 255).round() / 255",
     "fakes = (copies * 255).floor() / 255", STEPS),
    ("train_decoder.py", "real = augment(images * 2 - 1, mix(keys, 2))", "real = images * 2 - 1", STEPS),
    ("train_decoder.py",
     "fake = augment(fakes * 2 - 1, mix(keys, 3))",
     "fake = augment(fakes, mix(keys, 3))", STEPS),
    ("train_decoder.py", "torch.cat([real, fake])", "torch.cat([fake, real])", STEPS),
    ("train_decoder.py",
     "hinge_loss(*logits.chunk(2))\n    (loss / args.accum)",
     "hinge_loss(*logits.chunk(2))\n    (loss)", STEPS),
    ("train_decoder.py",
     "keys = mix(seed, step, places).tolist()",
     "keys = mix(seed, places).tolist()", STEPS),
    ("train_decoder.py",
     "keys = mix(seed, step, places).tolist()",
     "keys = mix(0, step, places).tolist()", STEPS),
    ("train_decoder.py", "non_blocking=True).float() / 255", "non_blocking=True).float() / 256", STEPS),
    ("train_decoder.py", 'group["lr"] = lr', "pass", STEPS),
    ("train_decoder.py", "if clip:", "if False:", STEPS),
    ("train_decoder.py", "sums / dist.get_world_size()", "sums", DECODER),
    ("train_decoder.py",
     "copies = rae.decode(z + sigma * eps, decoder)",
     "copies = rae.decode(z, decoder)", DECODER),
    ("train_decoder.py",
     "copies = rae.decode(z + sigma * eps, decoder)",
     "copies = rae.decode(z + sigma * eps)", STEPS),
    ("train_decoder.py",
     "row[2] += perceptual(copies * 2 - 1, images * 2 - 1).sum()",
     "row[2] += perceptual(copies, images).sum()", STEPS),
    ("train_decoder.py", "mix(0, 2, numbers)", "mix(0, 2, numbers - numbers[0])", DECODER),
    ("train_decoder.py", "evaluate(rae, ema.module, held_out", "evaluate(rae, decoder, held_out", STEPS),
    ("train_decoder.py", "picture(rae, ema.module, shown)", "picture(rae, decoder, shown)", STEPS),
    ("train_decoder.py", "(0.55 + 0.45 * math.cos(", "(0.5 + 0.5 * math.cos(", STEPS),
    ("train_decoder.py", "rising = min(1, (step + 1) /", "rising = min(1, step /", STEPS),
    ("train_decoder.py",
     "lr = learning_rate(step, args.lr, args.warmup * epoch, schedule)",
     "lr = learning_rate(step, args.lr, args.warmup * epoch, total)", STEPS),
    ("train_decoder.py",
     "adversary = disc if disc and step >= gan_begin else None",
     "adversary = disc", STEPS),
    ("train_decoder.py", "if disc and step >= disc_begin:", "if disc:", STEPS),
    ("train_decoder.py", "disc_lr = learning_rate(step - disc_begin,", "disc_lr = learning_rate(step,", STEPS),
    ("train_decoder.py",
     "learning_rate(step - disc_begin, args.lr, args.warmup * epoch, schedule)",
     "learning_rate(step - disc_begin, args.lr, args.warmup * epoch, schedule - disc_begin)", STEPS),
    ("train_decoder.py",
     "skipped = apply_gradients(optimizer, lr)\n        ema.update(decoder)",
     "ema.update(decoder)\n        skipped = apply_gradients(optimizer, lr)", STEPS),
    ("train_decoder.py", "ema.update(decoder)", "pass", STEPS),
    ("train_decoder.py", "ema = ModelEmaV3(decoder, decay=args.ema)", "ema = ModelEmaV3(decoder)", STEPS),
    ("train_decoder.py",
     "model=decoder, ema=ema.module, optimizer",
     "model=decoder, ema=decoder, optimizer", STEPS),
    ("train_decoder.py",
     "betas=(0.9, 0.95), weight_decay=0.0",
     "betas=(0.9, 0.95), weight_decay=0.01", STEPS),
    ("train_dit.py", "math.sqrt(tokens * token_dim / base)", "math.sqrt(tokens * token_dim) / base", DIT),
    ("train_dit.py", "return alpha * t / (1 + (alpha - 1) * t)", "return t / (alpha - (alpha - 1) * t)", DIT),
    ("train_dit.py", "t = torch.sigmoid(u) if", "t = torch.special.ndtr(u) if", DIT),
    ("train_dit.py",
     "torch.special.ndtr(draws[:, -1]) < label_dropout",
     "torch.special.ndtr(u) < label_dropout", STEPS),
    ("train_dit.py", "torch.lerp(z, eps, t[:, None, None])", "torch.lerp(eps, z, t[:, None, None])", DIT),
    ("train_dit.py", "v = eps - z ", "v = z - eps ", DIT),
    ("train_dit.py", "v = (x_t - z) / t.clamp(min=LEAST_T)", "v = (x_t - z) / t.clamp(min=1e-3)", DIT),
    ("train_dit.py", "F.mse_loss(full, v) + F.mse_loss(base, v)", "F.mse_loss(full, v)", STEPS),
    ("train_dit.py", "torch.linspace(1, 0, steps + 1)", "torch.linspace(1, 1 / steps, steps + 1)", SAMPLE),
    ("train_dit.py",
     "z = z - (t - t_next) * velocity(z, t)",
     "z = z - (t - t_next) * velocity(z, t_next)", SAMPLE),
    ("train_dit.py",
     'for key, value in saved["ema"].items()',
     'for key, value in saved["model"].items()', STEPS),
    ("train_dit.py",
     'model.alpha = saved["alpha"]',
     "model.alpha = shift_alpha(model.config['tokens'], model.config['token_dim'])", SAMPLE),
    ("train_dit.py", "(v - (eps - z)).square()", "(v - (z - eps)).square()", STEPS),
    ("train_dit.py", "v = model(torch.lerp(z, eps, t), ", "v = model(torch.lerp(eps, z, t), ", STEPS),
    ("train_dit.py",
     "fake = euler(conditional(model, y), noise, sample_times(25, alpha))",
     "fake = euler(conditional(model, y), noise, sample_times(25, 1.0))", STEPS),
    ("train_dit.py", "y = torch.full_like(y, model.num_classes)", "pass", STEPS),
    ("train_dit.py",
     "z = euler(conditional(model, y.to(device)), noise, sample_times(25, alpha))",
     "z = euler(conditional(model, y.to(device)), noise, sample_times(25, 1.0))", STEPS),
    ("train_dit.py", "y.fill_(count)", "pass", STEPS),
    ("train_dit.py", "picture(ema.module, rae,", "picture(model, rae,", STEPS),
    ("train_dit.py", "evaluate(ema.module, rae, held_out", "evaluate(model, rae, held_out", STEPS),
    ("train_dit.py", "rising = min(1, (step + 1) /", "rising = min(1, step /", STEPS),
    ("train_dit.py", "args.lr * rising * (1 - 0.9 * fallen)", "args.lr * rising * (1 - fallen)", STEPS),
    ("train_dit.py",
     "length = max(args.decay_end - args.decay_start, 1e-9)",
     "length = max(args.decay_end, 1e-9)", STEPS),
    ("train_dit.py", "args.clip = 1.0 if args.head else 0.0", "args.clip = 0.0", STEPS),
    ("train_dit.py",
     "args.ema = 0.9995 if args.head else 0.9999",
     "args.ema = 0.9999 if args.head else 0.9995", DIT),
    ("train_dit.py", "args.decay_start = 40 if args.head else math.inf", "args.decay_start = 40", DIT),
    ("train_dit.py", "alpha = 1 if args.no_shift else shift_alpha", "alpha = shift_alpha", STEPS),
    ("train_dit.py", "mirrored = (keys & 1).bool()", "mirrored = (keys & 0).bool()", STEPS),
    ("train_dit.py",
     "flow_matching_loss(ddp, z, y, alpha, keys,",
     "flow_matching_loss(ddp, z, y, 1.0, keys,", STEPS),
    ("train_dit.py", "alpha, keys, args.label_dropout, args.time)", "alpha, keys, 0.0, args.time)", STEPS),
    ("train_dit.py",
     "alpha, keys, args.label_dropout, args.time)",
     "alpha, keys, args.label_dropout)", STEPS),
    ("train_dit.py", "(loss / args.accum).backward()", "loss.backward()", STEPS),
    ("train_dit.py", "apply_gradients(optimizer, lr, args.clip)", "apply_gradients(optimizer, lr)", STEPS),
    ("train_dit.py",
     "meter.skipped(apply_gradients(optimizer, lr, args.clip))\n        ema.update(model)",
     "ema.update(model)\n        meter.skipped(apply_gradients(optimizer, lr, args.clip))", STEPS),
    ("train_dit.py", "ema=ema.module, optimizer", "ema=model, optimizer", STEPS),
    ("train_dit.py", "step=step, alpha=alpha,", "step=step, alpha=1.0,", STEPS),
    ("train_dit.py", "(0.9, 0.95), weight_decay=0.0", "(0.9, 0.999), weight_decay=0.0", STEPS),
    ("sample.py", "or len(dataset.classes) != num_classes", "", SAMPLE),
    ("sample.py", "return torch.lerp(v_other, v, scale)", "return torch.lerp(v, v_other, scale)", SAMPLE),
    ("sample.py", "torch.full_like(y, model.num_classes)", "torch.full_like(y, model.num_classes - 1)", SAMPLE),
    ("sample.py",
     "return plain(z, t), other(z, t)",
     "return other(z, t), plain(z, t)", SAMPLE),
    ("sample.py",
     "not interval[0] <= float(t) <= interval[1]",
     "not interval[0] < float(t) < interval[1]", SAMPLE),
    ("sample.py",
     "noise = normals(keys, rae.num_tokens",
     "noise = normals(torch.arange(len(keys)), rae.num_tokens", SAMPLE),
    ("sample.py", "noise, sample_times(steps, alpha))", "noise, sample_times(steps, 1.0))", SAMPLE),
    ("sample.py",
     "[mix(keys, j) for j in range(1, best_of)]",
     "[mix(keys, 1) for j in range(1, best_of)]", SAMPLE),
    ("sample.py", "means = (z * rae.std + rae.mean).mean(1)", "means = z.mean(1)", SAMPLE),
    ("sample.py", ".double().log_softmax(1)", ".double()", SAMPLE),
    ("sample.py", "in_fp32(probe)(means)", "probe(means)", SAMPLE),
    ("sample.py", "fits.argmax(1)]", "fits.argmin(1)]", SAMPLE),
    ("sample.py", "rae.decode(z).float().clamp(0, 1)", "rae.decode(z).float()", SAMPLE),
    ("sample.py", "int(mix(seed, 1, block))", "int(mix(0, 1, block))", SAMPLE),
    ("sample.py",
     "return rae.tokens(images.float() / 255).mean(1)",
     "return rae.tokens(images.float()).mean(1)", SCRIPTS + " -k probe"),
    ("sample.py", '{None: 1.0, "self": 1.78}.get(guide, 1.42)', "{None: 1.0}.get(guide, 1.42)", SAMPLE),
    ("sample.py", "scale = model.scale", "pass", SAMPLE),
    ("sample.py", "keys = mix(args.seed, 0, indices)", "keys = mix(0, 0, indices)", SAMPLE),
    ("sample.py",
     "labels = torch.tensor(columns)[indices % len(columns)]",
     "labels = torch.tensor(columns)[indices * len(columns) // num]", SAMPLE),
    ("sample.py",
     "generate(model, rae, labels[index], keys[index], model.alpha, args.steps, scale",
     "generate(model, rae, labels[index], keys[index], 1.0, args.steps, scale", SAMPLE),
    ("sample.py",
     "labels[index], keys[index], model.alpha, args.steps",
     "labels[index], keys[:len(index)], model.alpha, args.steps", SAMPLE),
    ("sample.py", "model.alpha, args.steps, scale,", "model.alpha, 50, scale,", SAMPLE),
    ("sample.py", "args.interval or (0, 1), probe", "(0, 1), probe", SAMPLE),
    ("sample.py", "(images * 255).round().byte()", "(images * 255).byte()", SAMPLE),

    # Predicting the latent, and a base head
    ("train_dit.py",
     "return (x_t - out.float()) / t.clamp(min=LEAST_T)[:, None, None]",
     "return (x_t - out.float()) / t[:, None, None]",
     BEYOND + "::test_the_velocity_is_x_t_minus_x_over_a_clamped_time"),
    ("train_dit.py",
     "u = F.silu(t_e + s)",
     "u = F.silu(c + s)", BEYOND + "::test_the_base_head_is_a_final_layer_on_the_tokens_after_block_k"),
    ("train_dit.py",
     "self.base_layer(u, u)",
     "self.base_layer(s, u)", BEYOND + "::test_the_base_head_is_a_final_layer_on_the_tokens_after_block_k"),
    ("train_dit.py",
     "if base and number == self.base_head:",
     "if base and number == self.depth:",
     BEYOND + "::test_the_base_head_is_a_final_layer_on_the_tokens_after_block_k"),
    ("train_dit.py",
     "([self.base_layer] if self.base_head else [])",
     "[]", BEYOND + "::test_both_outputs_predict_the_same_thing"),
    ("train_dit.py",
     "v = (x_t - z) / t.clamp(min=LEAST_T)[:, None, None]",
     "v = (x_t - z) / t[:, None, None]", BEYOND + "::test_the_target_is_clamped_like_the_prediction"),
    ("train_dit.py",
     "v = (x_t - z) / t.clamp(min=LEAST_T)[:, None, None]",
     "v = eps - z", BEYOND + "::test_the_target_is_clamped_like_the_prediction"),
    ("train_dit.py",
     "LEAST_T = 0.05",
     "LEAST_T = 0.04", BEYOND + "::test_a_network_that_says_x_is_zero_has_the_closed_form_loss"),
    ("train_dit.py",
     "return F.mse_loss(full, v) + F.mse_loss(base, v)",
     "return F.mse_loss(full, v) + 0 * base.sum()",
     BEYOND + "::test_the_loss_is_the_sum_of_both_outputs_losses"),
    ("train_dit.py",
     "return F.mse_loss(full, v) + F.mse_loss(base, v)",
     "return F.mse_loss(full, v)", BEYOND + "::test_every_parameter_gets_a_gradient_in_every_step"),
    ("train_dit.py",
     'if config["predict"] == "x":',
     'if config["predict"] == "none":', BEYOND + "::test_a_narrow_model_is_warned_and_told_both_ways_out"),
    ("train_dit.py",
     'outputs.append(("base head", "width"))',
     "pass", BEYOND + "::test_a_narrow_model_is_warned_and_told_both_ways_out"),
    ("train_dit.py",
     "if other.predict != args.predict:",
     "if False:", BEYOND + "::test_init_with_another_prediction_is_refused"),
    ("train_dit.py",
     "base = args.base_head > 0",
     "base = False", BEYOND + "::test_describe_counts_the_base_head"),
    ("train_decoder.py",
     'then = dict(predict="v", base_head=0) | saved["fixed"]',
     'then = saved["fixed"]', BEYOND + "::test_a_checkpoint_that_names_neither_is_a_plain_model"),
    ("sample.py",
     "if scale == 1 or not interval[0] <= float(t) <= interval[1]:",
     "if scale == 1:", BEYOND + "::test_scale_one_and_times_outside_the_interval_are_the_unguided_model"),
    ("sample.py",
     '"self": 1.78}',
     '"self": 1.42}', BEYOND + "::test_guide_self_takes_one_pass_a_step_and_its_own_scale"),
    ("sample.py",
     "v, v_other = pair(z, t)",
     "v, v_other = plain(z, t), pair(z, t)[1]",
     BEYOND + "::test_guide_self_takes_one_pass_a_step_and_its_own_scale"),
    ("sample.py",
     'if not getattr(model, "base_head", 0):',
     "if False:", BEYOND + "::test_a_model_without_a_base_head_is_refused_in_a_sentence"),

    # Processes, and input that must be refused: faults that were mended
    ("train_decoder.py",
     "for number in (signal.SIGTERM, signal.SIGINT):",
     "for number in (signal.SIGINT,):", FAULTS + " -k 'stop_signal and 15-1'"),
    ("train_decoder.py",
     "step % args.save_every == 0 or step == total or stop:",
     "step % args.save_every == 0 or step == total:", FAULTS + " -k 'stop_signal and 15-1'"),
    ("train_decoder.py",
     "if rank == 0 and not stop:",
     "if rank == 0:", FAULTS + "::test_a_stop_during_an_evaluation_saves_the_next_step"),
    ("train_decoder.py",
     "    dist.all_reduce(flag, dist.ReduceOp.MAX)\n",
     "", DECODER + " -k asked_of_one_rank"),
    ("train_decoder.py",
     "fcntl.LOCK_EX | fcntl.LOCK_NB",
     "fcntl.LOCK_SH | fcntl.LOCK_NB", FAULTS + "::test_a_second_trainer_of_the_same_run_is_refused"),
    ("train_decoder.py",
     "    claim.held = file",
     "    file.close()", FAULTS + "::test_a_second_trainer_of_the_same_run_is_refused"),
    ("train_decoder.py", 'or entry["step"] <= step):', "or True):", FAULTS + " -k full_disk"),
    ("train_decoder.py",
     "    # Steps after the checkpoint will be run",
     "    if not saved:\n        return None, 0\n    # Steps after the checkpoint will be run",
     FAULTS + " -k before_its_first_checkpoint"),
    ("sample.py", "pixels.unlink(missing_ok=True)", "pass", FAULTS + " -k samples_that_do_not_fit"),
    ("sample.py", 'if args.npz and default_data(rae) == "shapes":', 'if args.npz and rae.data == "shapes":', SAMPLE),
    ("fid.py", "if len(given) == 1 or images", "if images", FID),
    ("train_decoder.py",
     "    optimizer.found_inf = (~norm.isfinite()).float()\n",
     "    optimizer.found_inf = torch.zeros(())\n", FAULTS + " -k finite_gradient"),
    ("train_decoder.py",
     "skipped = torch.maximum(skipped, apply_gradients(disc_optimizer, disc_lr))",
     "apply_gradients(disc_optimizer, disc_lr)", FAULTS + " -k of_the_discriminator"),
    ("train_decoder.py",
     "rate = steps * self.batch / seconds",
     "rate = steps / seconds", DECODER + " -k speed"),
    ("train_decoder.py",
     "return encoding + 3 * forward",
     "return encoding + 2 * forward", DECODER + " -k flops"),
    ("fid.py",
     "images = open_val(None, args.data, side) or open_val(args.data, None, side)",
     "images = open_val(args.data, None, side)", FID + " -k 'are_those_of_its_held_out'"),
    ("train_decoder.py", "self.clock += time.time() - before", "pass", DECODER + " -k speed"),
    ("train_decoder.py",
     "self.in_a_row = (self.in_a_row + 1) * flag",
     "self.in_a_row = self.in_a_row + flag", DECODER + " -k in_a_row"),
    ("train_decoder.py",
     "if len({*steps}) > 1:",
     "if False:", SCRIPTS + "::test_ranks_that_find_different_checkpoints_say_so"),
    ("rae.py",
     'options["device_id"] = device',
     "pass", SCRIPTS + "::test_the_process_group_waits_for_long_saves_and_knows_its_device"),
    ("rae.py",
     "timeout=timedelta(hours=1), ",
     "", SCRIPTS + "::test_the_process_group_waits_for_long_saves_and_knows_its_device"),
    ("train_decoder.py",
     "(micro * world + rank) * size",
     "(micro * world + 0) * size", SCRIPTS + " -k 'stage_1 and 2-2'"),
    ("train_decoder.py",
     "size = batch // (accum * world)",
     "size = batch // accum", SCRIPTS + " -k 'stage_1 and 2-2'"),
    ("train_decoder.py", "    while True:\n", "    step = 0\n    while True:\n", SCRIPTS + " -k resumed"),
    ("train_dit.py",
     "data = absolute(args.data or default_data(rae))",
     'data = absolute(args.data or "shapes")',
     SCRIPTS + "::test_stage_2_trains_on_the_data_of_its_autoencoder_and_judges_on_its_held_out_images"),
    ("rae.py", "or math.isinf(value):", "or False:", SCRIPTS + " -k 'out_of_range and inf'"),
    ("sample.py",
     "if args.interval and args.interval[0] > args.interval[1]:",
     "if False:", SCRIPTS + " -k 'out_of_range and interval'"),
    ("sample.py", "if scale == 1 and args.interval:", "if False:", SCRIPTS + " -k 'interval'"),
    ("sample.py",
     'add("--scale", type=at_least(0, float)',
     'add("--scale", type=float', SCRIPTS + " -k 'out_of_range and scale'"),
    ("train_decoder.py",
     'add("--lr", type=at_least(1e-12, float)',
     'add("--lr", type=at_least(0, float)', SCRIPTS + " -k 'out_of_range and lr'"),
    ("train_decoder.py",
     'add("--ema", type=at_least(0, float, 1)',
     'add("--ema", type=at_least(0, float)', SCRIPTS + " -k 'out_of_range and ema'"),
    ("train_dit.py",
     'add("--head-depth", type=at_least(1)',
     'add("--head-depth", type=at_least(0)', SCRIPTS + " -k 'out_of_range and head-depth'"),
    ("train_decoder.py", "args.gan_start < args.disc_start:", "False:", SCRIPTS + " -k 'bad_input and GAN'"),
    ("sample.py", "        check_picture(args.out)\n", "        pass\n", SCRIPTS + " -k 'bad_input and grid'"),
    ("rae.py", "    check_picture(args.out)\n", "", SCRIPTS + " -k 'bad_input and reconstruction'"),
]


# Tests on a copy of the code

class Copies:
    """Copies of the code, one for each thread that asks for one."""
    def __init__(self, folder):
        self.folder = Path(folder)
        self.own = threading.local()

    def get(self):
        if not hasattr(self.own, "path"):
            self.own.path = self.folder / str(threading.get_ident())
            shutil.copytree(ROOT, self.own.path, ignore=shutil.ignore_patterns(*LEFT_OUT))
        return self.own.path


def run_pytest(copy, tests, said):
    """The body of a process: pytest on the copy, all that it prints into the file `said`."""
    multiprocessing.set_start_method(None, force=True)  # loaders as they are everywhere else
    os.setsid()  # so that it can be killed as a whole
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    sys.path[:] = [str(copy)] + [path for path in sys.path if not path.startswith(str(ROOT))]
    import pytest
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)])))


def outcome(copy, tests):
    """What pytest says of the copy: "passed", "failed", "hung", or None, if it could not run the tests; and
    what it printed."""
    said = copy.with_suffix(".txt")
    process = PROCESSES.Process(target=run_pytest, args=(copy, tests, said))
    process.start()
    process.join(LIMIT)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return "hung", ""
    return {0: "passed", 1: "failed"}.get(process.exitcode), said.read_text(errors="replace")


def judge(copies, mutant):
    """The outcome of the mutant's tests."""
    file, old, new, tests = mutant
    copy = copies.get()
    good = (copy / file).read_text()
    (copy / file).write_text(good.replace(old, new))
    try:
        return outcome(copy, tests)
    finally:
        (copy / file).write_text(good)


def check_rows():
    """Refuse rows that no longer fit the code: a mutant that changes nothing would prove nothing."""
    wrong = []
    for file, old, new, tests in MUTANTS:
        count = (ROOT / file).read_text().count(old)
        if count != 1:
            wrong.append(f"{file}: {old!r} occurs {count} times")
        if old == new:
            wrong.append(f"{file}: {old!r} is not changed")
        if not (ROOT / tests.split()[0].split("::")[0]).is_file():
            wrong.append(f"no such tests: {tests}")
    if len(set(MUTANTS)) < len(MUTANTS):
        wrong.append("a row stands there twice")
    if wrong:
        sys.exit("\n".join(["the rows no longer fit the code:", *wrong]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="TEXT", help="mutants whose file, texts or tests contain it")
    args = parser.parse_args()
    check_rows()
    chosen = [row for row in MUTANTS if not args.only or any(args.only in text for text in row)]
    if not chosen:
        sys.exit(f"no row contains {args.only!r}")

    begun = time.time()
    survivors = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        copies = Copies(folder)

        # Tests that fail anyhow would kill every mutant
        selections = sorted({tests for *_, tests in chosen})
        results = pool.map(lambda tests: outcome(copies.get(), tests), selections)
        for tests, (found, text) in zip(selections, results):
            if found != "passed":
                pool.shutdown(cancel_futures=True)
                sys.exit(f"{tests}: on the code as it is: {found}\n{text[-2000:]}")
        print(f"{len(selections)} selections of tests pass on the code as it is", flush=True)

        results = pool.map(lambda row: judge(copies, row), chosen)
        for (file, old, new, tests), (found, text) in zip(chosen, results):
            killed = found in ("failed", "hung")
            survivors += not killed
            how = " (hung)" if found == "hung" else ""
            print(f"{'killed  ' if killed else 'SURVIVED'} {file}: {old!r} -> {new!r}{how}", flush=True)
            if found is None:
                print(f"pytest could not run {tests}:\n{text[-1000:]}")
    minutes = (time.time() - begun) / 60
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed, {minutes:.1f} minutes")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    # A server imports what is slow once; each process is a copy of it. No .pyc: a mutant may have the time
    # and the size of the text before it.
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    PROCESSES = multiprocessing.get_context("forkserver")
    PROCESSES.set_forkserver_preload(["torch", "torchvision", "timm", "scipy.linalg", "pytest", "numpy"])
    main()
