"""The tests' negative controls: mistakes of one line, each of which a test has to notice. Not run by pytest.

    python tests/mutants.py                   # all of them, two at a time
    python tests/mutants.py --only sample.py  # those whose file, text or test contains this

A row is (file, old text, new text, test): the old text occurs once, else nothing is started; the new one is
what a maintainer might write by mistake, and would change numbers without a word. Each is put into a copy of
the project, where its test file, or its one test (FILE::TEST), has to fail. Ends with the score, and with
exit status 1 if a mutant survived.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parent.parent
LIMIT = 300                                           # seconds for a test that hangs: noticed as well
MUTANTS = [
    # rae.py
    ('rae.py', 'x = z * self.std + self.mean ', 'x = z * self.std ', 'steps'),
    ('rae.py', 'x = z * self.std + self.mean ', 'x = z ', 'steps'),
    ('rae.py', 'for key, value in saved["ema"].items()', 'for key, value in saved["model"].items()', 'steps'),
    ('rae.py', 'if not low <= value <= most or math.isinf(value):', 'if value < low or value > most:', 'rae'),
    ('rae.py', 'with torch.autocast("cuda" if args[-1].is_cuda else "cpu", enabled=False):\n            return function',
     'with torch.autocast("cuda" if args[-1].is_cuda else "cpu", enabled=True):\n            return function', 'rae'),
    ('rae.py', 'h = (h ^ shift(h, 27)) * -0x6B2FB644ECCEEE15', 'h = (h ^ h >> 27) * -0x6B2FB644ECCEEE15', 'rae'),
    ('rae.py', 'row.normal_(generator=generator.manual_seed(key))', 'row.normal_(generator=generator)', 'rae'),
    ('rae.py', 'image = TF.resize(image, size * 3 // 2, TF.InterpolationMode.BICUBIC)',
     'image = TF.resize(image, size, TF.InterpolationMode.BICUBIC)', 'rae'),
    ('rae.py', 'left = rng.integers(image.width - size + 1)', 'left = (image.width - size) // 2', 'rae'),
    ('rae.py', 'image = ImageOps.exif_transpose(image)', 'image = image.copy()', 'rae'),
    ('rae.py', '            if not self.train:\n                return None',
     '            if False:\n                return None', 'rae'),
    ('rae.py', '        if self.train and self.crop:', '        if self.train or self.crop:', 'rae'),
    ('rae.py', 'allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)',
     'allowed = range(os.cpu_count())', 'rae'),
    ('rae.py', '    signal.signal(signal.SIGTERM, signal.SIG_IGN)', '    pass', 'rae'),
    ('rae.py', 'for i, place in enumerate(spread(len(dataset), most))][rank::world]',
     'for i, place in enumerate(spread(len(dataset), most))]', 'rae'),
    ('rae.py', 'return F.layer_norm(x[:, self.extra:], x.shape[-1:], eps=self.eps)',
     'return F.layer_norm(x[:, 1:], x.shape[-1:], eps=self.eps)', 'encoders'),
    ('rae.py', 'state["cls_token"] = state["cls_token"] + position', 'pass', 'encoders'),
    ('rae.py', 'antialias=spec.antialias,', 'antialias=True,', 'encoders'),
    ('rae.py', 'return torch.cat([columns, rows], 1).float()', 'return torch.cat([rows, columns], 1).float()', 'rae'),
    ('rae.py', 'return (x - self.mean) / self.std', 'return x / self.std', 'rae'),
    ('rae.py', 'return x * self.pixel_std + self.pixel_mean', 'return x * self.pixel_std', 'rae'),
    ('rae.py', 'images = F.avg_pool2d(images, self.upsample)', 'pass', 'rae'),
    ('rae.py', 'rae.load_encoder(saved["encoder"]', 'rae.load_encoder(None', 'rae'),
    ('rae.py', 'rae.data = saved.get("data")', 'rae.data = None', 'rae'),
    ('rae.py', 'weights_only=True, mmap=mapped)', 'weights_only=True, mmap=False)', 'rae'),
    ('rae.py', 'weights_only=True, mmap=mapped)', 'weights_only=False, mmap=mapped)', 'rae'),
    ('rae.py', '            with open(temporary, "wb") as file:', '            with open(path, "wb") as file:', 'rae'),
    # fid.py
    ('fid.py', 'source = torch.arange(side, device=x.device) * (size / side)',
     'source = torch.arange(side, device=x.device) * ((size - 1) / (side - 1))', 'fid'),
    ('fid.py', 'net.Mixed_7c.register_forward_hook(self.max_pooled)', 'pass', 'fid'),
    ('fid.py', 'features = self.net((resize_tf1(images.float()) - 128) / 128)',
     'features = self.net((resize_tf1(images.float()) - 127.5) / 127.5)', 'fid'),
    ('fid.py', 'sigma = sum(rows.T @ rows for rows in centred) / (len(features) - 1)',
     'sigma = sum(rows.T @ rows for rows in centred) / len(features)', 'fid'),
    ('fid.py', 'if np.abs(left).max(initial=0) <= 1e-10 * np.abs(sigma).max():', 'if True:', 'fid'),
    ('fid.py', 'if values[0] < -1e-5 * values[-1]:', 'if False:', 'fid'),
    ('fid.py', 'np.trace(sigma2) - 2 * trace))', 'np.trace(sigma2) - trace))', 'fid'),
    ('fid.py', 'def inception_score(logits, splits=10):', 'def inception_score(logits, splits=1):', 'fid'),
    ('fid.py', 'd[rows - rows[0], rows] = torch.inf', 'pass', 'fid'),
    ('fid.py', 'precise += (d <= radii_real).any(1).sum().item()',
     'precise += (d <= radii_fake[rows, None]).any(1).sum().item()', 'fid'),
    ('fid.py', 'recalled |= (d <= radii_fake[rows, None]).any(0)', 'recalled |= (d <= radii_real).any(0)', 'fid'),
    ('fid.py', 'clamp(min=1e-10).log10()', 'clamp(min=1e-8).log10()', 'fid'),
    ('fid.py', 'c1, c2 = 0.01 ** 2, 0.03 ** 2', 'c1, c2 = 0.01 ** 2, 0.01 ** 2', 'fid'),
    ('fid.py', 'linear.forward = in_fp32(linear.forward)', 'pass', 'fid'),
    ('fid.py', 'start, shape, "F" if fortran else "C")', 'start, shape, "C")', 'fid'),
    ('fid.py', 'if not Path(path).exists():', 'if False:', 'fid'),
    ('fid.py', 'order = np.sort(np.random.RandomState(0).permutation(len(dataset))[:num]).tolist()',
     'order = list(range(len(dataset)))[:num]', 'fid'),
    ('fid.py', 'return table[:, :-2], table[:, -2].long()', 'return table[:, :-2], table[:, -1].long()', 'fid'),
    ('fid.py', 'some = np.random.RandomState(0).permutation(len(real))[:10_000]', 'some = slice(10_000)', 'fid'),
    ('fid.py', 'precision_recall(real[some], fake)', 'precision_recall(fake, real[some])', 'fid'),
    ('fid.py', 'figures["inception_score"] = inception_score(logits)', 'figures["inception_score"] = inception_score(fake)', 'fid'),
    ('fid.py', '.clamp(0, 1).mul(255).round().byte()', '.clamp(0, 1).mul(255).byte()', 'fid'),
    ('fid.py', 'perceptual(2 * a - 1, 2 * b - 1).flatten()', 'perceptual(a, b).flatten()', 'fid'),
    ('fid.py', 'a, b = images.float() / 255, copies.float() / 255', 'a = b = images.float() / 255', 'fid'),
    ('fid.py', 'copies = rae.decode(rae.encode(images.float() / 255))',
     'copies = rae.decode(rae.encode(images.float() / 256))', 'fid'),
    ('fid.py', 'columns.append(measure(images)[:, :args.dim])', 'columns.append(measure(copies)[:, :args.dim])', 'fid'),
    ('fid.py', 'n=saved[2] or 0, features=args.features,', 'n=n or 0, features=args.features,', 'fid'),
    ('fid.py', 'linear_probe(x, y, u, v)', 'linear_probe(u, v, x, y)', 'fid'),
    # train_decoder.py
    ('train_decoder.py', 'both = torch.cat([images, images.flip(-1)])', 'both = torch.cat([images, images])', 'steps'),
    ('train_decoder.py', '(square - mean.square()).clamp', 'square.clamp', 'steps'),
    ('train_decoder.py', 'still.train = False ', 'still.train = True ', 'steps'),
    ('train_decoder.py', 'sigma = tau * (u.abs() if', 'sigma = tau * (u.square() if', 'train_decoder'),
    ('train_decoder.py', 'sigma[:, None, None] * eps / std', 'sigma[:, None, None] * eps', 'steps'),
    ('train_decoder.py', 'noisy = noise_augment(z, rae.std, keys, args.tau, args.noise)', 'noisy = z', 'steps'),
    ('train_decoder.py', 'x = x + brightness - 0.5', 'x = x + brightness', 'train_decoder'),
    ('train_decoder.py', '(self.residual(x) + x) / math.sqrt(2)', 'self.residual(x) + x', 'train_decoder'),
    ('train_decoder.py', 'x = (x / 2 + 0.5 - self.pixel_mean)', 'x = (x - self.pixel_mean)', 'train_decoder'),
    ('train_decoder.py', 'maps = [maps[-1], *maps]', 'maps = [maps[0], *maps]', 'train_decoder'),
    ('train_decoder.py', 'F.relu(1 - real).mean() + F.relu(1 + fake)',
     'F.relu(1 + real).mean() + F.relu(1 - fake)', 'train_decoder'),
    ('train_decoder.py', '    return -fake.mean()', '    return fake.mean()', 'train_decoder'),
    ('train_decoder.py', '(gan_gradient.norm() + 1e-6)).clamp(0, 1e4)',
     '(gan_gradient.norm() + 1e-6)).clamp(0, 1)', 'train_decoder'),
    ('train_decoder.py', 'dist.all_reduce(gradient)', 'pass', 'train_decoder'),
    ('train_decoder.py', 'd_rec + gan_weight * weight * d_gan', 'd_rec + weight * d_gan', 'steps'),
    ('train_decoder.py', 'd_rec + gan_weight * weight * d_gan', 'd_rec + gan_weight * d_gan', 'steps'),
    ('train_decoder.py', 'adaptive_weight(at_last(d_rec), at_last(d_gan))', 'adaptive_weight(d_rec, d_gan)', 'steps'),
    ('train_decoder.py', 'adaptive_weight(at_last(d_rec), at_last(d_gan))',
     'adaptive_weight(at_last(d_gan), at_last(d_rec))', 'steps'),
    ('train_decoder.py', 'parts["lpips"] = perceptual(copies * 2 - 1, images * 2 - 1).mean()',
     'parts["lpips"] = perceptual(copies, images).mean()', 'steps'),
    ('train_decoder.py', 'loss = loss + args.lpips_weight * parts["lpips"]', 'loss = loss + parts["lpips"]', 'steps'),
    ('train_decoder.py', 'disc.eval()(augment(copies * 2 - 1, mix(keys, 1)))', 'disc.eval()(copies * 2 - 1)', 'steps'),
    ('train_decoder.py', 'disc.eval()(augment(copies * 2 - 1, mix(keys, 1)))',
     'disc.eval()(augment(copies, mix(keys, 1)))', 'steps'),
    ('train_decoder.py', 'disc.eval()(augment(', 'disc.train()(augment(', 'steps'),
    ('train_decoder.py', '    else:\n        (loss / args.accum).backward()', '    else:\n        loss.backward()', 'steps'),
    ('train_decoder.py', 'z = noise_augment(z, rae.std, mix(keys, 4), args.tau, args.noise)', 'pass', 'steps'),
    ('train_decoder.py', 'if args.disc_input == "noisy":', 'if True:', 'steps'),
    ('train_decoder.py', 'copies = rae.decode(z).clamp(0, 1)', 'copies = rae.decode(z)', 'steps'),
    ('train_decoder.py', 'fakes = (copies * 255).round() / 255', 'fakes = copies', 'steps'),
    ('train_decoder.py', 'real = augment(images * 2 - 1, mix(keys, 2))', 'real = images * 2 - 1', 'steps'),
    ('train_decoder.py', 'torch.cat([real, fake])', 'torch.cat([fake, real])', 'steps'),
    ('train_decoder.py', 'hinge_loss(*logits.chunk(2))\n    (loss / args.accum)',
     'hinge_loss(*logits.chunk(2))\n    (loss)', 'steps'),
    ('train_decoder.py', 'keys = mix(self.seed, step, places).tolist()', 'keys = mix(self.seed, places).tolist()', 'steps'),
    ('train_decoder.py', 'group["lr"] = lr', 'pass', 'steps'),
    ('train_decoder.py', 'if clip:', 'if False:', 'steps'),
    ('train_decoder.py', 'sums / dist.get_world_size()', 'sums', 'train_decoder'),
    ('train_decoder.py', 'copies = rae.decode(z + sigma * eps, decoder)', 'copies = rae.decode(z, decoder)', 'train_decoder'),
    ('train_decoder.py', 'copies = rae.decode(z + sigma * eps, decoder)', 'copies = rae.decode(z + sigma * eps)', 'steps'),
    ('train_decoder.py', 'row[2] += perceptual(copies * 2 - 1, images * 2 - 1).sum()',
     'row[2] += perceptual(copies, images).sum()', 'steps'),
    ('train_decoder.py', 'evaluate(rae, ema.module, held_out', 'evaluate(rae, decoder, held_out', 'steps'),
    ('train_decoder.py', 'picture(rae, ema.module, shown)', 'picture(rae, decoder, shown)', 'steps'),
    ('train_decoder.py', '(0.55 + 0.45 * math.cos(', '(0.5 + 0.5 * math.cos(', 'steps'),
    ('train_decoder.py', 'lr = learning_rate(step, args.lr, args.warmup * epoch, schedule)',
     'lr = learning_rate(step, args.lr, args.warmup * epoch, total)', 'steps'),
    ('train_decoder.py', 'adversary = disc if disc and step >= gan_begin else None', 'adversary = disc', 'steps'),
    ('train_decoder.py', 'if disc and step >= disc_begin:', 'if disc:', 'steps'),
    ('train_decoder.py', 'own_step = step - disc_begin', 'own_step = step', 'steps'),
    ('train_decoder.py', 'learning_rate(own_step, args.lr, args.warmup * epoch, schedule)',
     'learning_rate(own_step, args.lr, args.warmup * epoch, schedule - disc_begin)', 'steps'),
    ('train_decoder.py', 'meter.skipped(apply_gradients(optimizer, lr))\n        ema.update(decoder)',
     'ema.update(decoder)\n        meter.skipped(apply_gradients(optimizer, lr))', 'steps'),
    ('train_decoder.py', 'ema.update(decoder)', 'pass', 'steps'),
    ('train_decoder.py', 'ema = ModelEmaV3(decoder, decay=args.ema)', 'ema = ModelEmaV3(decoder)', 'steps'),
    ('train_decoder.py', 'model=decoder, ema=ema.module, optimizer', 'model=decoder, ema=decoder, optimizer', 'steps'),
    ('train_decoder.py', '{"predict": "v", "base_head": 0, **saved["fixed"]}',
     '{**saved["fixed"]}', 'beyond::test_a_checkpoint_that_names_neither_is_a_plain_model'),
    ('train_decoder.py', 'if len({*steps}) > 1:', 'if False:', 'scripts::test_ranks_that_find_different_checkpoints_say_so'),
    ('train_decoder.py', '    @in_fp32  # power iterations do not converge in bf16\n', '', 'train_decoder'),
    # train_dit.py
    ('train_dit.py', 'math.sqrt(tokens * token_dim / base)', 'math.sqrt(tokens * token_dim) / base', 'train_dit'),
    ('train_dit.py', 'return alpha * t / (1 + (alpha - 1) * t)', 'return t / (alpha - (alpha - 1) * t)', 'train_dit'),
    ('train_dit.py', 't = torch.sigmoid(u) if', 't = torch.special.ndtr(u) if', 'train_dit'),
    ('train_dit.py', 'torch.special.ndtr(draws[:, -1]) < label_dropout', 'torch.special.ndtr(u) < label_dropout', 'steps'),
    ('train_dit.py', 'torch.lerp(z, eps, t[:, None, None])', 'torch.lerp(eps, z, t[:, None, None])', 'train_dit'),
    ('train_dit.py', 'v = eps - z ', 'v = z - eps ', 'train_dit'),
    ('train_dit.py', 'v = (x_t - z) / t.clamp(min=LEAST_T)', 'v = (x_t - z) / t.clamp(min=1e-3)', 'train_dit'),
    ('train_dit.py', 'F.mse_loss(full, v) + F.mse_loss(base, v)', 'F.mse_loss(full, v)', 'steps'),
    ('train_dit.py', 'torch.linspace(1, 0, steps + 1)', 'torch.linspace(1, 1 / steps, steps + 1)', 'sample'),
    ('train_dit.py', 'z = z - (t - t_next) * velocity(z, t)', 'z = z - (t - t_next) * velocity(z, t_next)', 'sample'),
    ('train_dit.py', 'for key, value in saved["ema"].items()', 'for key, value in saved["model"].items()', 'steps'),
    ('train_dit.py', 'model.alpha = saved["alpha"]',
     "model.alpha = shift_alpha(model.config['tokens'], model.config['token_dim'])", 'sample'),
    ('train_dit.py', '(v - (eps - z)).square()', '(v - (z - eps)).square()', 'steps'),
    ('train_dit.py', 'v = model(torch.lerp(z, eps, t), ', 'v = model(torch.lerp(eps, z, t), ', 'steps'),
    ('train_dit.py', 'fake = euler(conditional(model, y), noise, sample_times(25, alpha))',
     'fake = euler(conditional(model, y), noise, sample_times(25, 1.0))', 'steps'),
    ('train_dit.py', 'y = torch.full_like(y, model.num_classes)', 'pass', 'steps'),
    ('train_dit.py', 'z = euler(conditional(model, y.to(device)), noise, sample_times(25, alpha))',
     'z = euler(conditional(model, y.to(device)), noise, sample_times(25, 1.0))', 'steps'),
    ('train_dit.py', 'picture(ema.module, rae,', 'picture(model, rae,', 'steps'),
    ('train_dit.py', 'evaluate(ema.module, rae, held_out', 'evaluate(model, rae, held_out', 'steps'),
    ('train_dit.py', 'rising = min(1, (step + 1) /', 'rising = min(1, step /', 'steps'),
    ('train_dit.py', 'args.lr * rising * (1 - 0.9 * fallen)', 'args.lr * rising * (1 - fallen)', 'steps'),
    ('train_dit.py', 'length = max(args.decay_end - args.decay_start, 1e-9)', 'length = max(args.decay_end, 1e-9)', 'steps'),
    ('train_dit.py', 'args.clip = 1.0 if args.head else 0.0', 'args.clip = 0.0', 'steps'),
    ('train_dit.py', 'args.ema = 0.9995 if args.head else 0.9999', 'args.ema = 0.9999 if args.head else 0.9995', 'train_dit'),
    ('train_dit.py', 'alpha = 1 if args.no_shift else shift_alpha', 'alpha = shift_alpha', 'steps'),
    ('train_dit.py', 'mirrored = (keys & 1).bool()', 'mirrored = (keys & 0).bool()', 'steps'),
    ('train_dit.py', 'flow_matching_loss(ddp, z, y, alpha, keys,', 'flow_matching_loss(ddp, z, y, 1.0, keys,', 'steps'),
    ('train_dit.py', 'alpha, keys, args.label_dropout, args.time)', 'alpha, keys, 0.0, args.time)', 'steps'),
    ('train_dit.py', 'alpha, keys, args.label_dropout, args.time)', 'alpha, keys, args.label_dropout)', 'steps'),
    ('train_dit.py', '(loss / args.accum).backward()', 'loss.backward()', 'steps'),
    ('train_dit.py', 'apply_gradients(optimizer, lr, args.clip)', 'apply_gradients(optimizer, lr)', 'steps'),
    ('train_dit.py', 'meter.skipped(apply_gradients(optimizer, lr, args.clip))\n        ema.update(model)',
     'ema.update(model)\n        meter.skipped(apply_gradients(optimizer, lr, args.clip))', 'steps'),
    ('train_dit.py', 'ema=ema.module, optimizer', 'ema=model, optimizer', 'steps'),
    ('train_dit.py', 'step=step, alpha=alpha,', 'step=step, alpha=1.0,', 'steps'),
    ('train_dit.py', '(0.9, 0.95), weight_decay=0.0', '(0.9, 0.999), weight_decay=0.0', 'steps'),
    ('train_dit.py', 'return (x_t - out.float()) / t.clamp(min=LEAST_T)[:, None, None]',
     'return (x_t - out.float()) / t[:, None, None]', 'beyond::test_the_velocity_is_x_t_minus_x_over_a_clamped_time'),
    ('train_dit.py', 'self.base_layer(u, u)',
     'self.base_layer(s, u)', 'beyond::test_the_base_head_is_a_final_layer_on_the_tokens_after_block_k'),
    ('train_dit.py', 'if base and number == self.base_head:',
     'if base and number == self.depth:', 'beyond::test_the_base_head_is_a_final_layer_on_the_tokens_after_block_k'),
    ('train_dit.py', 'v = (x_t - z) / t.clamp(min=LEAST_T)[:, None, None]',
     'v = eps - z', 'beyond::test_the_target_is_clamped_like_the_prediction'),
    ('train_dit.py', 'LEAST_T = 0.05', 'LEAST_T = 0.04', 'beyond::test_a_network_that_says_x_is_zero_has_the_closed_form_loss'),
    ('train_dit.py', 'return F.mse_loss(full, v) + F.mse_loss(base, v)',
     'return F.mse_loss(full, v) + 0 * base.sum()', 'beyond::test_the_loss_is_the_sum_of_both_outputs_losses'),
    ('train_dit.py', 'return F.mse_loss(full, v) + F.mse_loss(base, v)',
     'return F.mse_loss(full, v)', 'beyond::test_every_parameter_gets_a_gradient_in_every_step'),
    ('train_dit.py', 'if config["predict"] == "x":',
     'if config["predict"] == "none":', 'beyond::test_a_narrow_model_is_warned_and_told_both_ways_out'),
    ('train_dit.py', 'outputs.append(("base head", "width"))',
     'pass', 'beyond::test_a_narrow_model_is_warned_and_told_both_ways_out'),
    ('train_dit.py', 'base = args.base_head > 0', 'base = False', 'beyond::test_describe_counts_the_base_head'),
    ('train_dit.py', 'data = absolute(args.data or default_data(rae))',
     'data = absolute(args.data or ("shapes" if rae.name == "tiny" else "data/imagenet"))', 'scripts::test_stage_2_trains_on_the_data_of_its_autoencoder_and_judges_on_its_held_out_images'),
    ('train_dit.py', '    @in_fp32  # near t = 1 bf16 has steps of 1/256\n', '', 'train_dit'),
    ('train_dit.py', 'x = self.x_embedder(x_t).float()', 'x = self.x_embedder(x_t)', 'train_dit'),
    ('train_dit.py', '"--label-dropout", type=at_least(0, float, 1)',
     '"--label-dropout", type=float', 'scripts::test_a_number_out_of_range_gets_one_sentence_that_names_its_flag'),
    # sample.py
    ('sample.py', 'return torch.lerp(v_null, v, scale)', 'return torch.lerp(v, v_null, scale)', 'sample'),
    ('sample.py', 'return torch.lerp(v_base, v, scale)', 'return torch.lerp(v, v_base, scale)', 'sample'),
    ('sample.py', 'return torch.lerp(other(z, t), plain(z, t), scale)',
     'return torch.lerp(plain(z, t), other(z, t), scale)', 'sample'),
    ('sample.py', 'not interval[0] <= float(t) <= interval[1]', 'not interval[0] < float(t) < interval[1]', 'sample'),
    ('sample.py', 'noise = normals(keys, rae.num_tokens', 'noise = normals(torch.arange(len(keys)), rae.num_tokens', 'sample'),
    ('sample.py', 'noise, sample_times(steps, alpha))', 'noise, sample_times(steps, 1.0))', 'sample'),
    ('sample.py', 'means = (z * rae.std + rae.mean).mean(1)', 'means = z.mean(1)', 'sample'),
    ('sample.py', '.double().log_softmax(1)', '.double()', 'sample'),
    ('sample.py', 'in_fp32(probe)(means)', 'probe(means)', 'sample'),
    ('sample.py', 'rae.decode(z).float().clamp(0, 1)', 'rae.decode(z).float()', 'sample'),
    ('sample.py', 'int(mix(seed, 1, block))', 'int(mix(0, 1, block))', 'sample'),
    ('sample.py', '{None: 1.0, "self": 1.78}.get(guide, 1.42)', '{None: 1.0}.get(guide, 1.42)', 'sample'),
    ('sample.py', 'keys = mix(args.seed, 0, indices)', 'keys = mix(0, 0, indices)', 'sample'),
    ('sample.py', 'labels = torch.tensor(columns)[indices % len(columns)]',
     'labels = torch.tensor(columns)[indices * len(columns) // num]', 'sample'),
    ('sample.py', 'generate(model, rae, labels[index], keys[index], model.alpha, args.steps, scale',
     'generate(model, rae, labels[index], keys[index], 1.0, args.steps, scale', 'sample'),
    ('sample.py', 'labels[index], keys[index], model.alpha, args.steps',
     'labels[index], keys[:len(index)], model.alpha, args.steps', 'sample'),
    ('sample.py', 'model.alpha, args.steps, scale, weak,', 'model.alpha, 50, scale, weak,', 'sample'),
    ('sample.py', '(images * 255).round().byte()', '(images * 255).byte()', 'sample'),
    ('sample.py', 'if scale == 1 or not interval[0] <= float(t) <= interval[1]:',
     'if scale == 1:', 'beyond::test_scale_one_and_times_outside_the_interval_are_the_unguided_model'),
    ('sample.py', 'v, v_base = inner(z, t)',
     'v, v_base = plain(z, t), inner(z, t)[1]', 'beyond::test_guide_self_takes_one_pass_a_step_and_its_own_scale'),
    ('sample.py', 'if args.interval and args.interval[0] > args.interval[1]:',
     'if False:', 'scripts::test_a_number_out_of_range_gets_one_sentence_that_names_its_flag'),
    # assets/shapes.py
    ('assets/shapes.py', 'inside = crossed.sum(-1) % 2 == 1', 'inside = crossed.sum(-1) > 0', 'rae'),
    ('assets/shapes.py', 'qy = py * angle.cos() - px * angle.sin()', 'qy = py * angle.cos() + px * angle.sin()', 'rae'),
    ('assets/shapes.py', 'images, labels = self.render(self.first + torch.tensor(indices))',
     'images, labels = self.render(torch.tensor(indices))', 'rae'),
    ('assets/shapes.py', 'bits = mix(indices[:, None], torch.arange(len(self.low))) >> 39',
     'bits = mix(indices[:, None] % 10, torch.arange(len(self.low))) >> 39', 'rae'),
    # assets/release.py
    ('assets/release.py', 'return mean.flatten(1).T.contiguous(), var.flatten(1).T.contiguous()',
     'return mean.mT.flatten(1).T.contiguous(), var.mT.flatten(1).T.contiguous()', 'release'),
    ('assets/release.py', 'for part in ("query", "key", "value")]', 'for part in ("key", "query", "value")]', 'release'),
    ('assets/release.py', 'return width // buffer.shape[1]', 'return 16', 'release'),
    ('assets/release.py', 'alpha = math.sqrt(config["tokens"] * config["token_dim"] / 4096)', 'alpha = 1.0', 'release'),
    ('assets/release.py', '"ImageNet256/DiTDH-S_ep14", 1.42)', '"ImageNet256/DiTDH-S_ep14", 1.5)', 'release'),
]


def copy(folder):
    """The project without its history and its runs."""
    ignore = shutil.ignore_patterns(".*", "out", "data", "__pycache__", "*.png")
    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


def noticed(folder, mutant):
    """Whether the test fails with the mutant in it."""
    name, old, new, test = mutant
    file = folder / name
    whole = file.read_text()
    file.write_text(whole.replace(old, new))
    path, _, one = test.partition("::")
    target = f"tests/test_{path}.py" + (f"::{one}" if one else "")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", target]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=LIMIT,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
        return done.returncode == 1                   # 2 to 5: pytest itself had no test to run
    except subprocess.TimeoutExpired:
        return True
    finally:
        file.write_text(whole)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="only mutants whose row contains this")
    args = parser.parse_args()
    wrong = [row for row in MUTANTS if (ROOT / row[0]).read_text().count(row[1]) != 1]
    if wrong:
        sys.exit("\n".join(f"{row[0]}: not there once: {row[1]!r}" for row in wrong))
    chosen = [row for row in MUTANTS if args.only in " ".join(row)]
    begun = time.time()
    survived = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        copies = Queue()                              # each mutant has a copy to itself
        for i in range(2):
            copies.put(copy(Path(folder, str(i))))

        def judge(mutant):
            mine = copies.get()
            try:
                return noticed(mine, mutant)
            finally:
                copies.put(mine)

        for row, killed in zip(chosen, pool.map(judge, chosen)):
            survived += not killed
            print(f"{'killed  ' if killed else 'SURVIVED'}  {row[0]}: {row[1]!r} -> {row[2]!r}  ({row[3]})", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutants killed, {(time.time() - begun) / 60:.1f} minutes")
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()
