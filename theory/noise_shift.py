"""Why the noise schedule's shift depends on the dimension: closed forms for Gaussians, no training, seconds.

    python theory/noise_shift.py

Let z have m = tokens x channels coordinates of variance 1 that share k factors, each in r = m / k of them and
correlated by rho. S has eigenvalue 1 + (r-1) rho once per factor, else 1 - rho; x_t = (1-t) z + t eps tells
the share R2(t) = sum s^2 (1-t)^2 / ((1-t)^2 s + t^2) / sum s of z. Fully redundant, rho = 1, it is a function
of sqrt(r) (1-t) / t alone, as r noisy copies average to one copy with noise t / sqrt(r). More channels are so
less noise at the same t; the shift turns t / (1-t) into alpha t / (1-t), and undoes just that with alpha =
sqrt(m / 4096). Source: arXiv 2510.11690, section 4.2.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1)]
from train_dit import shift_alpha, time_shift  # noqa: E402
from width_bound import VERDICTS, holds, pyplot  # noqa: E402

FACTORS = 64
LATENTS = [  # name, tokens, channels
    ("SD-VAE",           1024,    4),                                  # m = 4096: no shift
    ("DINOv2-S",          256,  384),
    ("DINOv2-B",          256,  768),
    ("DINOv2-B, 512 px", 1024,  768),
]


def predictable(t, m, rho=1.0, factors=FACTORS):
    """R2(t), the share of the variance of z (m,) that x_t tells; t (T,) in (0, 1)."""
    s = torch.tensor([1 + (m / factors - 1) * rho, 1 - rho]).double()  # the eigenvalues of S ...
    count = torch.tensor([factors, m - factors])                       # ... and how often each occurs
    t = t.double()[:, None]
    return (count * s ** 2 * (1 - t) ** 2 / ((1 - t) ** 2 * s + t ** 2)).sum(1) / m


def by_matrices(t, m, rho, factors):
    """The same from the covariance matrix: 1 - tr(Cov(z | x_t)) / m, Cov(z | x_t) = S - (1-t)^2 S K^-1 S."""
    group, t = torch.arange(m) % factors, t.double()[:, None, None]
    S = torch.where(group[:, None] == group, rho, 0.0).double().fill_diagonal_(1.0)
    K = (1 - t) ** 2 * S + t ** 2 * torch.eye(m)                       # Cov(x_t), (T, m, m)
    return ((1 - t) ** 2 * (S @ torch.linalg.solve(K, S))).diagonal(dim1=1, dim2=2).sum(1) / m


def checks():
    """Rows (what, value, low, high, control); value: the greatest distance of two curves."""
    u = torch.linspace(0.001, 0.999, 999).double()
    errors = [predictable(u[::50], 48, rho, 4) - by_matrices(u[::50], 48, rho, 4) for rho in (0.0, 0.5, 1.0)]
    yield "closed form and covariance matrix, m = 48", torch.stack(errors).abs().max().item(), 0, 1e-9, False
    for what, alpha, rho, control in (
            ("redundant channels: alpha = sqrt(m / 4096)",        shift_alpha,               1.0, False),
            ("redundant channels: alpha = 1, no shift",           lambda n, d: 1.0,          1.0, True),
            ("redundant channels: alpha = m / 4096, no root",     lambda n, d: n * d / 4096, 1.0, True),
            ("half redundant, rho = 0.5: alpha = sqrt(m / 4096)", shift_alpha,               0.5, True),
            ("independent channels: alpha = sqrt(m / 4096)",      shift_alpha,               0.0, True),
            ("independent channels: alpha = 1",                   lambda n, d: 1.0,          0.0, False)):
        apart = [predictable(time_shift(u, alpha(n, d)), n * d, rho) - predictable(u, 4096, rho)
                 for _, n, d in LATENTS]                               # from SD-VAE's curve
        yield what, torch.stack(apart).abs().max().item(), 0, 1e-9, control


def figure(path):
    if not (plt := pyplot()):
        return
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    u = torch.linspace(0.001, 0.999, 500)
    for axis, rho, alpha, title in ((axes[0], 1.0, lambda n, d: 1.0, "redundant channels, alpha = 1"),
                                    (axes[1], 1.0, shift_alpha, "redundant, alpha = sqrt(m / 4096)"),
                                    (axes[2], 0.0, shift_alpha, "independent, alpha = sqrt(m / 4096)")):
        for width, (name, n, d) in zip((7, 5.5, 4, 2.5, 1), LATENTS):
            axis.plot(u, predictable(time_shift(u, alpha(n, d)), n * d, rho), label=f"{name}: m = {n * d:,}",
                      lw=width if axis is axes[1] else 1.5)
        axis.set(xlabel="u ~ U(0, 1), t = shift(u, alpha)", ylabel="share of z that x_t tells", title=title)
    axes[0].legend(fontsize=8, frameon=False)
    fig.savefig(path, dpi=70)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/theory"), help="folder for the figure")
    args, failed, u = parser.parse_args(argv), 0, (torch.arange(100_000) + 0.5) / 100_000
    print(f"{'':18s} {'m':>8s}  alpha  R2 = 1/2 at t  draws with R2 < .9: alpha = 1, shifted")
    for name, n, d in LATENTS:
        alpha, root = shift_alpha(n, d), (n * d / FACTORS) ** 0.5
        hard = [(predictable(time_shift(u, a), n * d) < 0.9).double().mean() for a in (1.0, alpha)]
        print(f"{name:18s} {n * d:8,d} {alpha:6.2f} {root / (1 + root):14.3f} {hard[0]:31.1%} {hard[1]:9.1%}")
    for what, value, low, high, control in checks():
        ok = holds(value, low, high)
        failed += ok == control
        print(f"{what:50s} {value:8.1e}  {VERDICTS[ok, control]}")
    args.out.mkdir(parents=True, exist_ok=True)
    figure(args.out / "theory_noise_shift.png")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
