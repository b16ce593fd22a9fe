"""
    python -m pytest -q

Everything on tiny sizes: the numbers of the original code, the algebra of one step, every script
and method as a user starts it, killing and resuming, two ranks, networks and files of users, bad
input. The golden numbers are what the original networks give when every weight is set by a formula
(`fill`). Each test runs in a folder of its own; `tiny` and `pipelines` put small models there.
"""
import ast
import copy
import csv
import glob
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import bench
import distill_classifier
import distill_vae
import dkdm
import eval_fid
import export
import few_steps
import models as M
import synthesize

ROOT = Path(os.path.abspath(__file__)).parent
MODULES = (dkdm, few_steps, synthesize, distill_classifier, distill_vae, eval_fid, export, bench)
SCRIPTS = {f'{module.__name__}.py': module for module in MODULES}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines(text):
    return [line.strip() for line in text.strip().splitlines()]


def numbers(text):
    return [float(word) for word in text.split()]


# ==== networks: the numbers of the original code ====
def fill(net):
    """Every weight by a formula in state_dict order."""
    for k, (name, w) in enumerate(net.state_dict().items()):
        if not w.is_floating_point():
            continue
        i = torch.arange(w.numel(), dtype=torch.float64)
        v = 0.1 * torch.sin(0.7 * i + k)
        if name.endswith('running_var'):
            v = 1 + 0.5 * torch.sin(0.7 * i + k) ** 2
        elif w.dim() >= 2:
            v = torch.sin(1.2345 * i + k) * (2 / (w.numel() / w.shape[0])) ** 0.5
        elif name.endswith('weight'):
            v = 1 + v
        w.copy_(v.view(w.shape))
    return net.eval()


def wave(*shape):
    return torch.sin(0.37 * torch.arange(np.prod(shape), dtype=torch.float64)).view(shape).float()


ADM = dict(image_size=32, out_channels=6, model_channels=32, num_res_blocks=1)
OLD = dict(use_scale_shift_norm=False, resblock_updown=False, use_new_attention_order=False)
PLAIN = OLD | dict(image_size=64, model_channels=32, num_res_blocks=1, channel_mult=(1, 2),
                   attention_resolutions=(32,))
SMALL_DIT = dict(image_size=8, hidden_size=64, depth=2, num_heads=4, num_classes=10)
GOLDEN = [  # parameters; the first four numbers of the output, its mean
    (M.UNet, ADM, 1965894, '-0.175411 -0.080837 -0.165378 -0.157294 0.0180449047'),
    (M.UNet, ADM | dict(num_classes=10), 1967174,
     '-0.160568 -0.091217 0.048817 -0.177207 0.0410768057'),
    (M.UNet, PLAIN | dict(image_size=32, attention_resolutions=(16,), num_head_channels=-1), 702499,
     '-0.167638 -0.077908 -0.250754 -0.173581 0.0796254817'),
    (M.UNet, PLAIN | dict(image_size=8, attention_resolutions=(4,)), 702499,
     '0.163382 0.089571 -0.001536 -0.05786 0.0798815926'),
    (M.DiT, SMALL_DIT, 183200, '0.354121 -0.005 -0.0108 0.288655 -0.0073913539'),
    (M.classifier, dict(name='wrn16_1'), 175066,
     '-0.043444 -0.02985 0.102882 0.064428 -0.0039462751'),
    (M.classifier, dict(name='wrn40_2'), 2243546,
     '-0.157957 -0.052412 0.112491 0.217914 -0.0199794943'),
    (M.classifier, dict(name='resnet18'), 11173962,
     '0.114946 0.069646 0.003063 -0.036003 0.0101198321'),
    (M.classifier, dict(name='vgg11'), 9231114, '0.060497 0.072384 0.110402 0.051044 0.0047314156'),
    (M.classifier, dict(name='resnet8'), 78042,
     '-0.052322 -0.129495 0.034725 0.018425 -0.0062139962'),
    (M.classifier, dict(name='resnet20', shortcut='pad'), 269722,
     '0.234892 -0.043058 0.01206 -0.031623 0.0159875820')]


@pytest.mark.parametrize('make, kw, parameters, expected', GOLDEN)
@torch.no_grad()
def test_networks_agree_with_the_original(make, kw, parameters, expected):
    net = fill(make(**kw))
    args = [wave(2, 3, 32, 32)]
    if make is not M.classifier:
        y = {M.UNet: torch.tensor([0, 3, 9]), M.DiT: torch.tensor([1, 9, -1])}
        x = wave(3, net.in_channels, net.image_size, net.image_size)
        args = [x, torch.tensor([0, 500, 999]), y[make] if net.num_classes else None]
    out = net(*args)
    assert sum(p.numel() for p in net.parameters()) == parameters
    *first, mean = numbers(expected)
    assert np.allclose(out.flatten()[:4], first, atol=5e-6) and abs(out.mean() - mean) < 1e-6
    rebuilt = M.make(json.loads(json.dumps(net.config)))
    rebuilt.load_state_dict(net.state_dict())
    assert torch.equal(rebuilt.eval()(*args), out)


LADDERS = [  # width, parameters; output as above; the prior's first means and stds, level by level
    (8, 30416, '-0.22766 -0.213583 -0.406722 -0.574531 0.0157426646',
     '0.899793 1.9351 0.40323 0.420649 0.38297 0.2482 0.036014 0.060451',
     '3.40077 2.328679 0.996691 0.988078 0.683756 0.783412 1.149193 1.189251'),
    (128, 5386496, '-0.073366 0.026837 0.468734 0.441703 0.0045697958',
     '0.687407 0.198185 -0.024446 -0.030875 -0.133654 0.03659 -0.021708 -0.022108',
     '0.6145 0.65983 1.005505 0.990185 1.073794 1.017792 1.016471 1.025666')]


@pytest.mark.parametrize('width, parameters, expected, means, stds', LADDERS)
@torch.no_grad()
def test_ladder_vaes_agree_with_the_original(width, parameters, expected, means, stds):
    net = fill(M.LVAE(width=width))
    out, _, p = net.decode([wave(2, 16, side, side) for side in (16, 8, 4, 2, 1)])
    assert sum(v.numel() for v in net.parameters()) == parameters
    *first, mean = numbers(expected)
    assert np.allclose(out.flatten()[:4], first, atol=1e-6) and abs(out.mean() - mean) < 1e-6
    for k, wanted in enumerate((means, stds)):
        found = torch.cat([level[k].flatten()[:2] for level in p[:4]])
        assert np.allclose(found, numbers(wanted), atol=1e-6)
        assert torch.equal(p[4][k], torch.full((2, 16, 1, 1), float(k)))


@torch.no_grad()
def test_vae_losses_have_the_closed_form():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 2, 4, 4, generator=g), torch.rand(3, 2, 4, 4, generator=g) + 0.5
    b = torch.randn(3, 2, 4, 4, generator=g), torch.rand(3, 2, 4, 4, generator=g) + 0.5
    kl = kl_divergence(Normal(*a), Normal(*b)).sum((1, 2, 3))
    assert torch.allclose(M.gaussian_kl(a, b), kl, rtol=1e-5)
    p, q = Normal(*a), Normal(*b)
    product = Normal(*M.adapter('ladder_vae').combine(a, b))
    wanted = (p.log_prob(b[0]) + q.log_prob(b[0])) - (p.log_prob(a[0]) + q.log_prob(a[0]))
    assert torch.allclose(product.log_prob(b[0]) - product.log_prob(a[0]), wanted, atol=1e-4)
    distance = F.mse_loss(a[0], b[0]) + F.mse_loss(a[1], b[1])
    assert torch.allclose(distill_vae.wasserstein(a, b), distance)
    mean_S, mean_T = torch.rand(2, 3, 3, 8, 8, generator=g)
    kl = kl_divergence(Normal(mean_T, 0.05 ** 0.5), Normal(mean_S, 0.05 ** 0.5)).sum((1, 2, 3))
    assert torch.allclose(distill_vae.output_kl(mean_S, mean_T, beta=0.1), kl.mean(), rtol=1e-5)

    net, x = fill(M.LVAE(width=8)), torch.rand(2, 3, 32, 32, generator=g)
    noise = net.noise(2, g)
    nll, kls = net.elbo(x, noise, beta=0.1)
    out, q, p = net(x, noise)
    wanted = -Normal(out[:, :3], 0.05 ** 0.5).log_prob(x).sum((1, 2, 3))
    assert torch.allclose(nll, wanted, rtol=1e-5)
    for kl, a, b in zip(kls, q, p):
        assert torch.allclose(kl, kl_divergence(Normal(*a), Normal(*b)).sum((1, 2, 3)), rtol=1e-4)
    assert M.LVAE(28, 1, 2).sides == [28, 14, 7, 4, 2, 1]
    with pytest.raises(ValueError, match=r'takes \[0, 1\]'):
        net.encode(2 * x - 1)


# ==== diffusion: the original's numbers, the algebra of one step ====
def test_schedules_and_timesteps_agree_with_the_original():
    cosine = 0.999958715775178, 0.49228517244880304, 2.4287669070348567e-09
    linear = 0.9999, 0.07779665836502389, 4.035829765375676e-05
    for schedule, expected in (('cosine', cosine), ('linear', linear)):
        assert np.allclose(M.Diffusion(schedule).alpha_bar[[0, 500, 999]], expected, rtol=1e-12)
    even = M.sampling_steps(1000, 50, 'even')
    assert even[0] == 999 and even[-4:] == [61, 41, 20, 0]
    assert M.sampling_steps(1000, 50, 'leading')[:2] == [980, 960]
    assert M.sampling_steps(1000, 4) == [999, 749, 499, 249]


STEPS = lines("""
    0 -0.7850218 -1.3022797 -0.1056963 -0.0671528 -0.7843589 -10.4360132 -0.7843589
    17 -0.4481776 -0.1350019 -0.1086891 -0.0475961 -0.4478559 -9.0415459 -0.4493248
    500 -1.5030838 0.7347440 -0.0851547 -0.0784692 -1.5004717 -5.7602057 -1.4592313
    999 0.0126738 -0.2756686 -0.0567257 -0.0377883 0.0019577 -0.0010018 -0.2735729""")


@pytest.mark.parametrize('row', STEPS)
def test_a_step_agrees_with_the_original(row):
    t, x, noise, eps, v, *expected = numbers(row)
    d, t = M.Diffusion('cosine'), torch.tensor([int(t)])
    x = torch.full((1, 1, 1, 1), x)
    out = torch.tensor([eps, v]).view(1, 2, 1, 1)
    found = [*d.mean_logvar(out, x, t), d.ddpm_step(out, x, t, t - 1, torch.full_like(x, noise))]
    assert np.allclose([f.item() for f in found], expected, rtol=1e-5, atol=1e-6)


def random_step(prediction='eps', schedule='cosine', clip=False):
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([1, 17, 500, 990])
    x0 = torch.randn(4, 1, 8, 8, generator=g).clamp(-1, 1)
    noise = torch.randn(4, 1, 8, 8, generator=g).clamp(-1, 1)
    d = M.Diffusion(schedule, prediction=prediction, clip=clip)
    return d, x0, noise, t, d.q_sample(x0, t, noise)


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'sqrt_linear', 'flow'])
def test_predictions_agree_on_the_same_point(schedule):
    steps = []
    for prediction in ('x0', 'v', 'flow', 'eps')[:3 if schedule == 'flow' else 4]:
        d, x0, noise, t, x_t = random_step(prediction, schedule)
        out = d.target(x0, x_t, t, prediction)
        assert torch.allclose(d.predict_x0(out, x_t, t), x0, atol=2e-3)
        for to in ('eps', 'v', 'x0', 'flow'):
            found = d.convert(out, x_t, t, to)
            assert torch.allclose(found, d.target(x0, x_t, t, to), atol=2e-2)
        ddpm = d.ddpm_step(out, x_t, t, t - 1, noise)
        steps.append(torch.stack([ddpm, d.ddim_step(out, x_t, t, t // 2)]))
        assert torch.allclose(steps[-1], steps[0], atol=2e-3)
    for s in (t // 2, torch.full_like(t, -1)):  # it inverts a DDIM step to anywhere
        x_s = torch.randn_like(x_t)
        out = d.target(few_steps.jump_x0(d, x_t, t, x_s, s), x_t, t, d.prediction)
        assert torch.allclose(d.ddim_step(out, x_t, t, s), x_s, atol=2e-2)


def test_one_step_has_the_closed_form():
    """Eqs. (5)-(7), (10), (12) written out with betas; a jump to -1 is the clean image."""
    d, x0, noise, t, x_t = random_step()
    v = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(4, 1, 8, 8)
    out = torch.cat([noise, v], dim=1)
    ab = d.alpha_bar.view(-1, 1, 1, 1)
    beta = 1 - ab[t] / ab[t - 1]
    mean = (x_t - beta / (1 - ab[t]).sqrt() * noise) / (1 - beta).sqrt()  # Eq. (10)
    beta_tilde = (1 - ab[t - 1]) / (1 - ab[t]) * beta  # Eq. (6)
    logvar = (v + 1) / 2 * beta.log() + (1 - v) / 2 * beta_tilde.log()  # Eq. (12)
    for found, wanted in zip(d.mean_logvar(out, x_t, t), (mean, logvar)):
        assert torch.allclose(found.double(), wanted, atol=1e-4)
    z = torch.randn(4, 1, 8, 8)
    stepped = d.ddpm_step(out, x_t, t, t - 1, z).double()
    assert torch.allclose(stepped, mean + (logvar / 2).exp() * z, atol=1e-3)
    clean = d.predict_x0(out, x_t, t)
    assert torch.allclose(d.ddpm_step(out, x_t, t, -1), clean, atol=1e-4)
    s = torch.tensor([-1, 3, 250, 100])
    ddim = ab[s].sqrt() * clean + (1 - ab[s]).sqrt() * noise
    assert torch.allclose(d.ddim_step(out, x_t, t, s).double(), ddim, atol=1e-3)
    tt, ss = torch.full((4,), 990), torch.full((4,), 400)  # times are ints or tensors
    assert torch.equal(d.ddpm_step(out, x_t, 990, 400, z), d.ddpm_step(out, x_t, tt, ss, z))
    eta = d.ddim_step(out, x_t, 990, 400, 0.5, z)
    assert torch.equal(eta, d.ddim_step(out, x_t, tt, ss, 0.5, z))


def test_losses():
    """The KL is the original's: in bits, the student's mean in it neither clamped nor trained."""
    d, x0, noise, t, x_t = random_step(clip=True)
    teacher, student = torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8, requires_grad=True)
    assert d.distill_loss(teacher, teacher, x_t, t)['mse'].max() == 0
    losses = d.distill_loss(student, teacher, x_t, t, lam=0.001)
    assert torch.allclose(losses['mse'], ((student - teacher)[:, :1] ** 2).mean((1, 2, 3)))
    losses['vb'].sum().backward()
    assert student.grad[:, :1].abs().max() == 0 and student.grad[:, 1:].abs().max() > 0
    perfect = torch.cat([noise, torch.zeros_like(noise)], 1)
    assert d.training_loss(perfect, x0, x_t, t, noise, 0.)['loss'].max() == 0
    d, t = M.Diffusion('cosine'), torch.tensor([500])
    x = torch.full((1, 1, 1, 1), 0.3)
    student = torch.tensor([0.2, 0.5]).view(1, 2, 1, 1)
    teacher = torch.tensor([0.1, -0.5]).view(1, 2, 1, 1)
    mean_T, logvar_T = d.mean_logvar(teacher, x, t)
    mean_S, logvar_S = d.mean_logvar(student, x, t, clip=False)
    p_T, p_S = Normal(mean_T, (logvar_T / 2).exp()), Normal(mean_S, (logvar_S / 2).exp())
    vb = d.distill_loss(student, teacher, x, t, lam=0.001)['vb'].item()
    assert vb == pytest.approx(kl_divergence(p_T, p_S).item() / np.log(2), rel=1e-4)


class Oracle(torch.nn.Linear):
    """A denoiser that knows the answer: answer(x_t, t)."""

    def __init__(self, answer):
        super().__init__(1, 1)
        self.answer = answer

    def forward(self, x, t, y=None):
        return self.answer(x, t)


@pytest.mark.parametrize('sampler', ['ddpm', 'ddim', 'dpm++'])
@pytest.mark.parametrize('schedule', ['cosine', 'flow'])
def test_samplers_reach_the_data(sampler, schedule):
    x0, d = wave(1, 1, 8, 8), M.Diffusion(schedule, prediction='v')
    net = Oracle(lambda x, t: d.target(x0.expand_as(x), x, t, 'v'))
    g = torch.Generator().manual_seed(0)
    out = M.sample(net, d, (2, 1, 8, 8), 20, sampler, generator=g)
    assert torch.allclose(out, x0.expand_as(out), atol=1e-2)


@pytest.mark.parametrize('steps', [2, 7, 20])
@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'flow'])
def test_dpm_solver_is_that_of_diffusers(schedule, steps):
    from diffusers import DPMSolverMultistepScheduler
    d = M.Diffusion(schedule, prediction='v', clip=False)
    net = Oracle(lambda x, t: torch.sin(x + t.view(-1, 1, 1, 1) / 200) / 2)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = M.sample(net, d, noise, steps, 'dpm++')
    betas = M.betas_from_alpha_bar(d.alpha_bar[:-1].clamp(min=1e-9))
    solver = DPMSolverMultistepScheduler(trained_betas=betas.numpy(), prediction_type='sample')
    times = M.sampling_steps(1000, steps)
    solver.set_timesteps(timesteps=times)
    norm = (d.a**2 + d.b**2).sqrt()  # x / norm is of constant variance
    x = (noise / norm[times[0]]).float()
    for t in times:
        x_t = (x * norm[t]).float()
        x0 = d.predict_x0(net(x_t, torch.full((2,), t)), x_t, t)
        x = solver.step(x0, t, x, return_dict=False)[0]
    assert torch.allclose(ours, x, atol=1e-4)


def expected_x0(x, a, b, mean, std):
    """E[x_0 | x = a x_0 + b noise] of pixels that are N(mean, std^2); with std 0 of one image."""
    return mean + std ** 2 * a / (a ** 2 * std ** 2 + b ** 2) * (x - a * mean)


@pytest.mark.parametrize('std', [0., 0.5])
def test_processes_of_other_kinds(std):
    """Exact networks of other processes, wrapped as docs/reference.md does, sample their data."""
    mean = 0.5 * wave(1, 1, 8, 8)
    times = 1 - torch.arange(1, 1001, dtype=torch.float64) / 1001  # from the image to the noise
    sigmas = torch.logspace(-2.5, 2, 1000, dtype=torch.float64)

    def reversed_flow(x, t):  # of u = t image + (1 - t) noise, images in [0, 1]; predicts the image
        time = times[t].float().view(-1, 1, 1, 1)
        u = x * (time ** 2 / 4 + (1 - time) ** 2).sqrt() + time / 2
        return 2 * expected_x0(u, time, 1 - time, (mean + 1) / 2, std / 2) - 1

    def edm(x, t):  # D(image + sigma noise; sigma) = image
        sigma = sigmas[t].float().view(-1, 1, 1, 1)
        return expected_x0(x * (1 + sigma ** 2).sqrt(), 1, sigma, mean, std)
    signal_share = (times / 2) ** 2 / (times ** 2 / 4 + (1 - times) ** 2)
    for net, alpha_bar in ((reversed_flow, signal_share), (edm, 1 / (1 + sigmas ** 2))):
        betas = M.betas_from_alpha_bar(alpha_bar).tolist()
        d = M.Diffusion(betas, prediction='x0', learn_sigma=False, clip=False)
        noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        out = M.sample(Oracle(net), d, noise, 200, 'ddim')
        assert torch.allclose(out, mean + std * noise, atol=2e-3 if std == 0 else 4e-2)


# ==== what can be lifted out ====
def test_one_step_of_dkdm():
    """Lines 4-8 of Alg. 1 by hand, with functions that a notebook can import."""
    torch.manual_seed(0)
    d = M.Diffusion('cosine', 50, clip=False)
    net_T, net = (fill(M.UNet(8, 1, 2, 16, 1, (1, 2), (4,))) for _ in range(2))
    net.out[2].weight.data *= 0.5
    teacher = M.make_teacher(net_T)
    pool = dkdm.Pool(6, (1, 8, 8), d)
    assert pool.fill(teacher, 10, 3, progress=False) > 0 and len(pool.t.unique()) > 3
    pool.t[0] = 0
    x_t, t = pool.x.clone(), pool.t.clone()
    out_T = teacher(x_t, t)
    wanted = d.distill_loss(net(x_t, t), out_T, x_t, t, 0.01)
    grad, = torch.autograd.grad(wanted['loss'].mean(), net.out[2].weight)
    torch.manual_seed(1)
    terms = dkdm.distill_step(net, teacher, pool, d, 6, lam=0.01, distance=1)
    assert torch.allclose(sum(terms.values()), wanted['loss'].mean())
    assert torch.allclose(net.out[2].weight.grad, grad, rtol=1e-4)
    torch.manual_seed(1)
    x_s = d.ddpm_step(out_T, x_t, t, t - 1)
    fresh = torch.where((t == 0).view(-1, 1, 1, 1), torch.randn_like(x_s), x_s)
    assert torch.equal(pool.x, fresh) and torch.equal(pool.t, torch.where(t == 0, 49, t - 1))


def test_walks_go_on_where_they_stopped():
    """Pool and Walks, stopped while they are filled and loaded by others, become what they would."""
    d = M.Diffusion('cosine', 50, clip=False)
    teacher = M.make_teacher(fill(M.UNet(8, 1, 2, 16, 1, (1, 2), (4,))))
    for make, args in (
        (lambda: dkdm.Pool(6, (1, 8, 8), d), (teacher, 10, 3, False, False)),
        (lambda: few_steps.Walks(6, 1, 6, (1, 8, 8), d, 2), ([teacher] * 6, 'ddim', False))
    ):
        torch.manual_seed(0)
        whole = make()
        evaluations = whole.fill(*args)
        torch.manual_seed(0)
        calls = iter((False, True))
        part = make()
        found = part.fill(*args, lambda: next(calls))
        assert 0 < found < evaluations
        random = torch.get_rng_state()
        other = make()
        other.load(copy.deepcopy(part.state()))
        torch.set_rng_state(random)
        assert found + other.fill(*args) == evaluations
        for name, value in whole.state().items():
            assert value is None or torch.equal(*map(torch.as_tensor, (value, other.state()[name])))


def test_a_discriminator():
    """It learns to tell the student's images from the walks, which pulls the images to those."""
    torch.manual_seed(0)
    d = M.Diffusion('cosine', 50, 'x0', learn_sigma=False, clip=False)
    net_T = fill(M.UNet(8, 1, 1, 16, 1, (1, 2), (4,))).requires_grad_(False)
    walks = few_steps.Walks(16, 1, 6, (1, 8, 8), d, 16)
    walks.x[-1] = 0.5
    with torch.no_grad():
        maps = few_steps.inner_maps(net_T, walks.x[-1], torch.zeros(16).long(), None)
    assert [m.shape[:2] for m in maps[:3]] == [(16, 64), (16, 64), (16, 16)]
    net_D = few_steps.Discriminator(maps)
    opt = torch.optim.AdamW(net_D.parameters(), 1e-2)
    images = torch.full((16, 1, 8, 8), -0.5, requires_grad=True)
    found = []
    for _ in range(30):
        images.grad = None
        hinge = few_steps.adversarial_step(
            lambda x, t, y: images, net_D, opt, net_T, walks, d, 16, weight=0.5
        )
        found.append(hinge.item())
    assert found[0] > 1.5 and found[-1] < 0.5
    assert (images.grad.sum() < 0) and net_T.out[2].weight.grad is None
    assert (images.grad * images.numel()).square().mean().sqrt().item() == pytest.approx(0.5)


def test_part_1_of_models_stands_alone(monkeypatch):
    part1, part2 = (ROOT / 'models.py').read_text().split('# ==== Part 2')
    used = {node.id for node in ast.walk(ast.parse(part1)) if isinstance(node, ast.Name)}
    assert not used & set(re.findall(r'^(?:def |class )?(\w+)(?:\(| = )', part2, re.M))
    assert set(re.findall(r'^(?:import|from) (\w+)', part1, re.M)) == {'math', 'torch'}
    Path('part1.py').write_text(part1)
    spec = importlib.util.spec_from_file_location('part1', 'part1.py')
    alone = importlib.util.module_from_spec(spec)
    M.save_model(fill(M.UNet(8, 1, 2, 8, 1, (1, 2), (4,))), 'a.safetensors')
    for name in ('numpy', 'scipy', 'tqdm', 'torchvision', 'diffusers', 'transformers',
                 'safetensors', 'torch_fidelity', 'models'):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    spec.loader.exec_module(alone)
    state, header = alone.read_safetensors('a.safetensors')
    alone.UNet(**{k: v for k, v in header['net'].items() if k != 'class'}).load_state_dict(state)
    for net in (alone.UNet(8, 1, 2, 8, 1, (1, 2), (4,)), alone.DiT(8, 2, 1, 16, 1, 2)):
        for sampler in ('ddpm', 'ddim', 'dpm++'):
            out = alone.sample(net, alone.Diffusion(), (2, 1, 8, 8), 3, sampler)
        assert out.shape == (2, 1, 8, 8) and out.isfinite().all()


def test_importing_a_script_runs_nothing():
    code = ('import os, signal, sys, threading\n'
            'before = sys.argv[:], sys.excepthook, signal.getsignal(signal.SIGTERM)\nimport '
            f'{", ".join(module.__name__ for module in MODULES)}\nassert before == (sys.argv, '
            'sys.excepthook, signal.getsignal(signal.SIGTERM))\n'
            'assert threading.active_count() == 1 and not os.listdir()\n')
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    subprocess.run([sys.executable, '-c', code, '--nonsense'], check=True, env=env)


# ==== networks in files ====
BIG = ADM | dict(num_classes=10, attention_resolutions=(8,), num_res_blocks=2,
                 channel_mult=(1, 2, 3))


@pytest.mark.parametrize('config', [ADM, PLAIN, BIG])
def test_original_unets_load_by_their_shapes(config, capsys):
    net = fill(M.UNet(**config))
    size = dict(image_size=config['image_size'])
    torch.save(net.state_dict(), 'adm.pt')
    loaded, d = M.load_denoiser('adm.pt', **size)  # strided ones have the old order of qkv
    assert loaded.config == net.config and d.prediction == 'eps'
    assert d.learn_sigma == (net.config['out_channels'] == 6)
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1 and 'num_head_channels=32' in said and 'cosine' in said
    loaded, d = M.load_denoiser('adm.pt', num_heads=2, use_new_attention_order=False, **size,
                                rescale_timesteps=True, steps=4000, schedule='linear')
    assert loaded.middle_block[1].num_heads == 2 and not loaded.middle_block[1].new_order
    assert loaded.time_scale == 0.25 and d.T == 4000


def test_ldm_and_dit_checkpoints():
    net = fill(M.UNet(**PLAIN))
    wanted = M.Diffusion('sqrt_linear', beta_range=(0.0015, 0.0195))
    betas = M.betas_from_alpha_bar(wanted.alpha_bar[:-1])
    state = {'betas': betas, 'first_stage_model.x': torch.zeros(1)}
    for k, v in net.state_dict().items():
        state['model.diffusion_model.' + k] = torch.zeros_like(v)
        state['model_ema.diffusion_model' + k.replace('.', '')] = v
    torch.save({'state_dict': state}, 'ldm.ckpt')
    loaded, d = M.load_denoiser('ldm.ckpt')
    assert loaded.config == net.config and np.allclose(d.alpha_bar, wanted.alpha_bar)
    assert torch.equal(loaded.out[2].weight, net.out[2].weight) and not d.clip
    dit = fill(M.DiT(**SMALL_DIT))
    torch.save({'ema': dit.state_dict(), 'model': dit.state_dict()}, 'dit.pt')
    loaded, d = M.load_denoiser('dit.pt', num_heads=4)
    assert loaded.config == dit.config and d.learn_sigma


def test_own_files_describe_themselves():
    net = fill(M.UNet(28, 1, 2, 20, 1, (1, 2), (7,), num_head_channels=20, patch_size=2))
    d = M.Diffusion('linear', 100, 'v')
    M.save_model(net, 'a.safetensors', d)
    loaded, d2 = M.load_denoiser('a.safetensors')
    assert [d2.config, loaded.config] == json.loads(json.dumps([d.config, net.config]))
    x, t = wave(2, 1, 28, 28), torch.tensor([3, 70])
    assert torch.equal(loaded(x, t), net(x, t)) and os.listdir() == ['a.safetensors']
    clf = fill(M.classifier('resnet8', 7, image_size=28, in_channels=1, width=8))
    M.save_model(clf, 'c.safetensors')
    assert torch.equal(M.load_classifier('c.safetensors')(x), clf(x))
    clf.fc.bias.data[0] = float('nan')
    with pytest.raises(M.UserError, match='fc.bias is not finite'):
        M.save_model(clf, 'd.safetensors')
    tied = torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 2)
    tied.config = {}
    M.save_model(tied, 'tied.safetensors')


TIMM = [('.shortcut.', '.downsample.'), ('linear.', 'fc.')]
PUBLISHED = [('resnet34', {}, TIMM), ('wrn40_2', {}, []), ('vgg16', {}, []), ('resnet50', {}, []),
             ('resnet18', {'max_pool': True}, []),
             ('resnet20', {'shortcut': 'pad'}, [('fc.', 'linear.')])]


@pytest.mark.parametrize('name, kw, renamed', PUBLISHED)
def test_published_classifiers_load_by_their_shapes(name, kw, renamed, capsys):
    net = fill(M.classifier(name, 10, **kw))
    state = net.state_dict()
    for change in renamed:
        state = {k.replace(*change): v for k, v in state.items()}
    if name == 'resnet20':  # saved by a PyTorch before 0.4.1
        state = {k: v for k, v in state.items() if 'num_batches' not in k}
    torch.save({'state_dict': state, 'best_prec1': 91.7}, 'c.pth')
    said = {'max_pool': True} if 'max_pool' in kw else {}
    loaded = M.load_classifier('c.pth', image_size=64, **said)
    assert loaded.image_size == 64
    assert loaded.mean[0] == (0.485 if name == 'resnet20' else 0.4914)
    assert torch.equal(loaded(wave(2, 3, 32, 32)), net(wave(2, 3, 32, 32)))
    M.load_classifier('c.pth')
    assumed = capsys.readouterr().out
    assert 'image_size=32' in assumed and 'mean=' in assumed
    assert ('max_pool=False' in assumed) == (name in ('resnet18', 'resnet34', 'resnet50'))


MY_FAMILY = """
import torch
import models as M

def load_denoiser(path, depth=1):
    net = M.UNet(8, 1, 1, 8, 1, (1, 2)[:depth], ())
    net.load_state_dict(torch.load(path, weights_only=True))
    return net, M.Diffusion('linear', 50, 'eps', learn_sigma=False)

def load_images(path):
    return torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2])
"""


def test_one_door():
    """A family of the user's: FILE.py:ARGUMENT; an adapter by its long name; what a header may say."""
    Path('family.py').write_text(MY_FAMILY)
    net = fill(M.UNet(8, 1, 1, 8, 1, (1, 2), ()))
    torch.save(net.state_dict(), 'w.pt')
    loaded, d = M.load_denoiser('family.py:w.pt', depth=2)
    x, t = wave(2, 1, 8, 8), torch.tensor([3, 40])
    assert torch.equal(loaded(x, t), net(x, t)) and d.T == 50 and not loaded.training
    assert M.load_images('family.py:anything:1-2')[1].tolist() == [1, 2]
    with pytest.raises(M.UserError, match='unexpected keyword'):
        M.load_denoiser('family.py:w.pt', width=2)
    fill(big := M.UNet(**ADM))
    torch.save(big.state_dict(), 'adm.pt')
    long = M.load_denoiser(f'{M.ADAPTERS}/original.py:adm.pt')[0]
    assert long.config == M.load_denoiser('adm.pt')[0].config
    for name in ('../family', 'family', '/tmp/family'):
        with pytest.raises(M.UserError, match='no adapter'):
            M.make({'class': 'Net', 'adapter': name})


def test_wrappers_of_state_dicts():
    net = fill(M.classifier('resnet8', 10, width=4))
    x, t = wave(2, 3, 32, 32), torch.tensor([3, 70])
    for key in ('net', 'model', 'model_state_dict', 'params_ema', 'state_dict', 'ema', ''):
        for prefix in ('module.', '_orig_mod.', 'model.', 'module._orig_mod.', ''):
            state = {prefix + k: v for k, v in net.state_dict().items()}
            state['n_averaged'] = torch.tensor(3)
            torch.save({key: state, 'epoch': 3} if key else state, 'c.pt')
            assert torch.equal(M.load_classifier('c.pt')(x), net(x)), (key, prefix)
    unet = fill(M.UNet(**ADM))
    torch.save({'model': {'module.' + k: v for k, v in unet.state_dict().items()}}, 'u.pt')
    assert torch.equal(M.load_denoiser('u.pt')[0](x, t), unet(x, t))
    torch.save({'generator': net.state_dict(), 'step': 3}, 'hint.pt')
    with pytest.raises(M.UserError, match="'generator', 'step'.*checkpoint"):
        M.load_classifier('hint.pt')


REFUSED = [('sr.pt', {}, 'super-resolution'), ('sr_sigma.pt', {}, 'super-resolution'),
           ('encoder.pt', {}, 'not a denoiser .*output_blocks'),
           ('adm.pt', dict(model_channels=64), 'does not fit'),
           ('adm.pt', dict(num_heads=5), 'heads'), ('adm.pt', dict(colour=5), "no 'colour'")]


@pytest.mark.parametrize('spec, kw, message', REFUSED)
def test_networks_that_are_refused(spec, kw, message):
    torch.save(M.UNet(**ADM | dict(in_channels=6, out_channels=3)).state_dict(), 'sr.pt')
    torch.save(M.UNet(**ADM | dict(in_channels=6)).state_dict(), 'sr_sigma.pt')
    state = M.UNet(**ADM).state_dict()
    torch.save(state, 'adm.pt')
    encoder = {k: v for k, v in state.items() if not k.startswith(('output_blocks', 'out.'))}
    torch.save(encoder, 'encoder.pt')  # of a classifier
    with pytest.raises(M.UserError, match=message):
        M.load_denoiser(spec, **kw)


def averages(state):
    return {k: v + 1 for k, v in state.items()}


def test_averaged_weights_come_first(capsys):
    """Under the names of many trainers, as dicts, lists and prefixes; a line says so."""
    raw = M.classifier('resnet8', width=4).state_dict()
    mean = averages(raw)
    trained = [v for k, v in mean.items() if k.endswith(('weight', 'bias'))]
    held = [{'model': raw, 'ema': mean}, {'model_ema': mean, 'model': raw, 'epoch': 5},
            {'net_model': raw, 'ema_model': mean}, {'state_dict': raw, 'state_dict_ema': mean},
            {'params': raw, 'params_ema': mean},
            {'model': raw, 'ema': {'module.' + k: v for k, v in mean.items()}},
            {'model': raw, 'ema': {'decay': 0.9, 'shadow_params': trained}},
            {'model.' + k: v for k, v in raw.items()} | {
                'model_ema.' + k: v for k, v in mean.items()}]
    for checkpoint in held:
        torch.save(checkpoint, 'c.pt')
        loaded = M.load_classifier('c.pt').state_dict()
        assert torch.equal(loaded['fc.weight'], mean['fc.weight']), checkpoint.keys()
        assert 'averaged' in capsys.readouterr().out
    for checkpoint, message in (({'ema': trained}, 'without names'), (trained, 'a list')):
        torch.save(checkpoint, 'c.pt')
        with pytest.raises(M.UserError, match=message):
            M.load_classifier('c.pt')


def test_files_that_are_no_weights():
    torch.save({'w': torch.zeros(99)}, 'whole.pt')
    M.save_model(M.classifier('resnet8', width=4), 'whole.safetensors')
    for name, start in (('lfs', b'version https://git-lfs.github.com/spec/v1\noid sha256:0'),
                        ('page', b'<!DOCTYPE html>'), ('empty', b''), ('half', None)):
        for ending in ('.pt', '.safetensors'):
            whole = Path('whole' + ending).read_bytes()
            Path(name + ending).write_bytes(whole[:len(whole) // 2] if start is None else start)
            message = {'lfs': 'pointer', 'page': 'web page', 'half': 'incomplete'}.get(name, name)
            with pytest.raises(M.UserError, match=message) as e:
                M.read_weights(name + ending)
            assert 'weights_only' not in str(e.value)


@torch.no_grad()
def test_networks_with_the_names_of_others(capsys):
    """SiT, LightningDiT, PixArt and EDM; tables of labels with and without a null class."""
    original = M.adapter('original')
    net = fill(M.DiT(**SMALL_DIT | {'num_heads': 1}))
    torch.save(net.state_dict(), 'sit.pt')
    sit, flow = M.load_denoiser('sit.pt', kind='sit')
    z = wave(3, 4, 8, 8)
    noise, y = z, torch.tensor([0, 7, 3])
    for i in range(5):  # SiT's own sampler: Euler from noise, time 0, to the image, time 1
        z = z + net(z, torch.full((3,), i / 5), y)[:, :4] / 5
    assert torch.allclose(M.sample(sit, flow, noise, 5, 'ddim', y), z, rtol=1e-4, atol=1e-4)
    M.save_model(sit, 'sit.safetensors', flow)
    again, _ = M.load_denoiser('sit.safetensors')
    assert torch.equal(again(z, y, y), sit(z, y, y))
    with pytest.raises(M.UserError, match="kind='sit'"):
        M.load_denoiser('sit.pt', schedule='flow', prediction='flow')
    for lacks in ('blocks.0.mlp.fc1.weight', 'pos_embed'):
        torch.save({k: v for k, v in net.state_dict().items() if k != lacks}, 'other.pt')
        with pytest.raises(M.UserError, match=f"lacks '{lacks}'"):
            M.load_denoiser('other.pt')

    capsys.readouterr()
    M.load_denoiser('sit.pt')
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1 and "kind='dit'" in said and 'DOUBTFUL' in said
    oracle = torch.nn.Linear(1, 1)
    oracle.forward = lambda x, t, y=None: x
    oracle.in_channels, oracle.image_size, oracle.num_classes = 3, 8, 0
    assert original.doubt_of(oracle, M.Diffusion('linear')) == ''

    table = net.state_dict()
    name = 'y_embedder.embedding_table.weight'
    torch.save(table | {name: table[name][:10]}, 'ten.pt')  # classes, and no null class
    unet = fill(M.UNet(**ADM | dict(num_classes=11)))
    torch.save(unet.state_dict(), 'eleven.pt')
    torch.save(M.UNet(**BIG).state_dict(), 'adm.pt')
    for spec, known, guidance in (('ten.pt', {}, 1), ('sit.pt', {}, 2), ('eleven.pt', {}, 2),
                                  ('adm.pt', {}, 1), ('adm.pt', {'null_class': True}, 2)):
        loaded, _, found = M.load_teacher(spec, known, 0, '', torch.device('cpu'), torch.float32)
        assert found == guidance and loaded.num_classes == (9 if known else 10)
        assert loaded.no_null == (guidance == 1)
    with pytest.raises(M.UserError, match='without a null class'):
        M.load_teacher('ten.pt', {}, 2.0, '', torch.device('cpu'), torch.float32)
    x, t = wave(2, 3, 32, 32), torch.tensor([5, 900])
    mine, _ = M.load_denoiser('eleven.pt')
    wanted = unet(x, t, torch.tensor([10, 3]))
    assert torch.allclose(mine(x, t, torch.tensor([-1, 3])), wanted, atol=1e-4)


KINDS = """
import torch, torchvision, models
from torch import nn
def net(norm=nn.BatchNorm2d, outputs=4, last=nn.Identity()):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), norm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8, outputs), last)
    made.in_channels, made.image_size = 1, 16
    return made
def load(kind):
    return {'one': net(outputs=1), 'soft': net(last=nn.Softmax(1)),
            'log': net(last=nn.LogSoftmax(1)), 'sync': net(nn.SyncBatchNorm),
            'untracked': net(lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
            'frozen': net(torchvision.ops.FrozenBatchNorm2d)}[kind]
"""


def test_teachers_of_other_kinds(tiny):
    Path('kinds.py').write_text(KINDS)
    for kind, message in (('one', 'has one output'), ('soft', 'returns probabilities')):
        with pytest.raises(M.UserError, match=message):
            M.load_classifier(f'kinds.py:{kind}')
    assert M.load_classifier('kinds.py:log').num_classes == 4  # these are logits too
    run(f'{SYNTH} --teacher=kinds.py:sync --num_images=16 --out_dir=sync')
    assert log('sync')['bn'].min() > 0
    for kind, name in (('untracked', 'BatchNorm2d'), ('frozen', 'FrozenBatchNorm2d')):
        said = run(f'{SYNTH} --teacher=kinds.py:{kind} --out_dir={kind}', ok=False)
        assert f'its {name} does not hold' in said


# ==== images in files ====
def save_image(path, pixels, **kw):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **kw)


def plain(value, shape=(8, 8), dtype=np.uint8):
    return np.full(shape, value, dtype)


def test_images_of_every_kind():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez('a.npz', arr_0=pixels, arr_1=np.arange(6))
    os.makedirs('shards')
    for i, p in enumerate(pixels):
        save_image(f'classes/{i % 2}/{i}.png', p)
        save_image(f'flat/{i}.png', p)
        np.savez(f'shards/images_0000_{i:05d}.npz', arr_0=p[None])
    images, labels = M.load_images('a.npz')
    assert torch.equal(images[2].permute(1, 2, 0), torch.tensor(pixels[2]))
    classes, flat = M.load_images('classes'), M.load_images('flat')
    assert classes[1].tolist() == [0, 0, 0, 1, 1, 1] and torch.equal(classes[0][1], images[2])
    assert flat[1] is None and torch.equal(flat[0], images)
    assert torch.equal(M.load_images('shards')[0], images)
    chosen, labels = M.load_images('a.npz:2-4')  # classes keep their numbers
    assert torch.equal(chosen, images[2:5]) and labels.tolist() == [2, 3, 4]
    assert M.load_images('classes:1-1')[1].tolist() == [1] * 3
    with pytest.raises(M.UserError, match='no labels'):
        M.load_images('shards:0-1')


def test_images_of_any_size():
    """DomainNet's lists, and Tiny-ImageNet's val, whose classes are numbered as those of train."""
    for i, (w, h) in enumerate(((20, 12), (12, 30), (9, 9))):
        picture = np.zeros((h, w, 3), np.uint8)
        side = min(w, h)
        picture[(h - side) // 2:, (w - side) // 2:][:side, :side] = 200  # the middle is kept
        save_image(f'clipart/arm/{i}.png', picture)
        save_image(f'val/images/val_{i}.png', plain(i))
    rows = [f'clipart/arm/{i}.png {9 + i}' for i in range(3)]
    Path('clipart_train.txt').write_text('\n'.join(rows))
    rows = [f'val_{i}.png\tn{9 - i // 2}\t0\t0\t7\t7' for i in range(3)]
    Path('val/val_annotations.txt').write_text('\n'.join(rows))
    images, labels = M.load_images('clipart_train.txt:0-10', image_size=8)
    assert images.shape == (2, 3, 8, 8) and (images == 200).all() and labels.tolist() == [9, 10]
    with pytest.raises(M.UserError, match='differ in size'):
        M.load_images('clipart_train.txt')
    images, labels = M.load_images('val')
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2] and labels.tolist() == [1, 1, 0]
    assert M.adapter('images').class_names('val') == []
    net = M.classifier('resnet8', width=4, image_size=32)
    for shape in ((48, 32), (32, 48)):
        assert M.preprocess(net, torch.zeros(1, 3, *shape)).shape == (1, 3, 32, 32)


def test_classes_of_folders():
    """Numbers in their order, links followed, EDM's labels, and roots of train and test sets."""
    for i in range(12):
        save_image(f'numbers/{i}/0.png', plain(i))
    os.makedirs('links')
    os.symlink(os.path.abspath('numbers/3'), 'links/b')
    save_image('links/a/0.png', plain(7))
    save_image('edm/00000/0.png', plain(1))
    save_image('edm/00000/1.png', plain(2))
    rows = {'labels': [['00000/1.png', 4], ['00000/0.png', 6]]}
    Path('edm/dataset.json').write_text(json.dumps(rows))
    for name, pixels, wanted in (('numbers', range(12), range(12)), ('links', (7, 3), (0, 1)),
                                 ('edm', (2, 1), (4, 6))):
        images, labels = M.load_images(name)
        assert images[:, 0, 0, 0].tolist() == list(pixels) and labels.tolist() == list(wanted)
    for split in ('train', 'val'):
        save_image(f'root/{split}/a/0.png', plain(1))
    with pytest.raises(M.UserError, match='name one of them, root/train'):
        M.load_images('root')


def test_arrays_of_other_kinds(capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez('a.npz', arr_0=pixels.transpose(0, 3, 1, 2))
    np.save('a.npy', pixels.transpose(0, 3, 1, 2))
    for name in ('a.npz', 'a.npy'):
        images, _ = M.load_images(name)
        assert torch.equal(images, torch.tensor(pixels).permute(0, 3, 1, 2))
        assert 'N x C x H x W' in capsys.readouterr().out
    np.savez('keys.npz', images=pixels)
    np.save('features.npy', pixels.reshape(6, -1))
    Path('page.npy').write_text('<html>')
    for name, message in (('keys.npz', "'arr_0', but images"), ('features.npy', 'N x H x W x C'),
                          ('page.npy', 'not an array of images')):
        with pytest.raises(M.UserError, match=message):
            M.load_images(name)
    f = np.random.default_rng(0).normal(size=(50, 4))
    np.savez('pool.npz', pool_3=f.astype(np.float32))  # the features of a set, of score_sde
    found = M.read_statistics('pool.npz', 'inception')
    assert np.allclose(found['sigma'], np.cov(f.T), atol=1e-5) and found['n'] == 50
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    for labels in (None, torch.arange(40) // 10):  # sorted by class: a random part is measured
        part = eval_fid.ImageSet(images, labels, 5).take(20)
        seen = torch.cat([x for _, x in part.batches(0, 1)]).flatten()
        assert len(seen.unique()) == 20 and len((seen // 10).unique()) == 4


RED = Image.new('RGB', (8, 8), (255, 0, 0))
FILES = [  # a file, what is written into it, and the pixel that is to be read
    ('16_bit.png', plain(30000, dtype=np.uint16), [117]),
    ('float.tif', plain(0.6, dtype=np.float32), [153]),
    ('grey.png', plain(77), [77]),
    ('grey_alpha.png', Image.new('LA', (8, 8), (0, 128)), [127]),
    ('one_bit.png', plain(True, dtype=bool), [255]),
    ('rgba.png', Image.new('RGBA', (8, 8), (255, 0, 0, 128)), [255, 127, 127]),
    ('palette.png', RED.convert('P'), [255, 0, 0]),
    ('grey_palette.png', Image.new('L', (8, 8), 77).convert('P'), [77]),
    ('clear.png', Image.new('P', (8, 8)), [255, 255, 255]),
    ('cmyk.tif', RED.convert('CMYK'), [255, 0, 0]),
    ('int32.tif', plain(9, dtype=np.int32), "range of mode 'I'"),
    ('nan.tif', plain(np.nan, dtype=np.float32), 'outside'),
    ('large.tif', plain(200., dtype=np.float32), 'outside')]


@pytest.mark.parametrize('name, pixels, expected', FILES)
def test_files_of_many_modes(name, pixels, expected):
    save_image(f'a/{name}', pixels, **{'transparency': 0} if name == 'clear.png' else {})
    if isinstance(expected, str):
        with pytest.raises(M.UserError, match=expected):
            M.load_images('a')
    else:
        found = M.load_images('a')[0][0, :, 0, 0].int()
        assert np.abs(np.subtract(found, expected)).max() <= 1, found


def test_folders_as_people_have_them(capsys):
    save_image('a/dog/1.png', plain(1, (8, 8, 3)))
    save_image('a/cat/1.png', plain(2))
    for name in ('.ipynb_checkpoints', '__MACOSX', 'cat/.hidden'):
        save_image(f'a/{name}/1.png', plain(3))
    save_image('a/cat/._1.png', plain(3))
    os.makedirs('a/bird')
    images, labels = M.load_images('a')
    assert images.shape == (2, 3, 8, 8) and labels.tolist() == [1, 2]  # bird keeps its number
    images, labels = M.load_images('a', channels=1)
    assert images[:, 0, 0, 0].tolist() == [2, 1] and labels.tolist() == [1, 2]
    said = capsys.readouterr().out
    assert 'bird' in said and 'converted to grey' in said
    save_image('a/1.png', plain(1))
    with pytest.raises(M.UserError, match='keep one kind only'):
        M.load_images('a')
    turned = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    exif = turned.getexif()
    exif[0x0112] = 6  # turn it clockwise by 90 degrees
    save_image('exif/a.png', turned, exif=exif)
    assert M.load_images('exif')[0][0, 0, 0].tolist() == list(range(56, -1, -8))
    M.save_grid('five.png', [torch.zeros(2, 5, 8, 8), torch.zeros(2, 5, 8, 8)], 2)
    M.save_grid('rows.png', [-torch.ones(3, 1, 64, 64), torch.ones(3, 1, 64, 64)], 12)
    picture = np.array(Image.open('rows.png'))[:, :, 0]
    assert picture[:68].max() == 0 and picture[72:136, 4:68].min() == 255  # a row of each set


def test_names_with_punctuation():
    """What exists is taken as it stands, and the check for its teacher sees through every form."""
    made = dict(arr_0=plain(0, (4, 8, 8, 1)), arr_1=np.arange(4),
                settings=np.array(json.dumps({'teacher_digest': 'abc', 'teacher': 'x'})))
    for folder in ('synth_2026-11-25_12:30:05', 'other', 'a:0-1'):
        os.makedirs(folder)
        np.savez(f'{folder}/images_0000_00000.npz', **made)
    assert len(M.load_images('synth_2026-11-25_12:30:05')[0]) == 4
    assert len(M.load_images('synth_2026-11-25_12:30:05:1-2')[0]) == 2
    assert len(M.load_images('a:0-1')[0]) == 4 and len(M.load_images('a:0-1:0-1')[0]) == 2
    file = 'other/images_0000_00000.npz'
    for spec in ('other', 'other/', 'other:0-9', './other/:0-9', file, file + ':0-9', 'a:0-1'):
        distill_classifier.check_origin(spec, 'abc', 'x')
        with pytest.raises(M.UserError, match='was made for the teacher x'):
            distill_classifier.check_origin(spec, 'def', 'y')


def test_a_set_that_is_larger_than_the_memory(capsys):
    """adapters/images.py writes a file that is mapped; it goes on where it was stopped."""
    images = M.adapter('images')
    for i in range(6):
        save_image(f'a/{i % 3}/{i}.png', np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8))
    images.write_map('a', 8, 3, 'whole.npy')
    found, labels = M.load_images('whole.npy')
    wanted, wanted_labels = M.load_images('a', image_size=8)
    assert torch.equal(found, wanted) and torch.equal(labels, wanted_labels)
    part = np.lib.format.open_memmap('b.npy.part', 'w+', np.uint8, (6, 8, 8, 3))
    part[:4] = 7  # as if four had been done
    part.flush()
    Path('b.npy.part.json').write_text(json.dumps({'set': [os.path.abspath('a'), 6, 8, 8, 3], 'done': 4}))
    images.write_map('a', 8, 3, 'b.npy')
    found, _ = M.load_images('b.npy')
    assert (found[:4] == 7).all() and torch.equal(found[4:], wanted[4:])
    assert sorted(os.listdir()) == ['a', 'b.labels.npy', 'b.npy', 'whole.labels.npy', 'whole.npy']
    chosen, labels = M.load_images('whole.npy:2,0')
    assert labels.tolist() == [1, 1, 0, 0] and torch.equal(chosen, wanted[[0, 1, 4, 5]])
    with pytest.raises(M.UserError, match='write it anew'):
        M.load_images('whole.npy', image_size=4)


# ==== how the scripts are started ====
# torch, diffusers and transformers take seconds to import: a server imports them once, and every
# run is a child that it forks
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload([__name__, 'scipy.optimize', 'torchvision', *[
    f'diffusers.pipelines.{name}' for name in (
        'dit', 'latent_diffusion', 'stable_diffusion_3.pipeline_stable_diffusion_3')]])
STARTING = threading.Lock()
os.environ.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1')
os.environ['PYTHONPATH'] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # for the server
# small settings of each script; what stands behind them overrides them
UNET = ("""--student_config="{'model_channels':8,'num_head_channels':8,'channel_mult':(1,1),"""
        """'attention_resolutions':(4,)}" """)
STEPS_6 = ('--batch_size=8 --max_steps=6 --save_every=2 --log_every=1 --sample_steps=2 --stride=10 '
           '--lr_decay=False')
DKDM = f'dkdm.py --teacher=teacher.safetensors {UNET} {STEPS_6}'
QUICK = 'dkdm.py --stride=250 --batch_size=4 --max_steps=2 --sample_steps=2'
FEW = ('few_steps.py --batch_size=8 --max_steps=6 --save_every=2 --log_every=1 --lr_decay=False '
       '--walks=16 --walk_steps=4 --jumps=2')
JUMPS = f'{FEW} --teacher=teacher.safetensors {UNET}'
SYNTH = ('synthesize.py --prior=teacher.safetensors --teacher=classifier.safetensors '
         '--batch_size=8 --steps=4 --lca_every=2 --keep=2 --keep_every=1 --num_images=32')
CLASSIFIER = ('distill_classifier.py --data=images.npz --teacher=classifier.safetensors '
              '--student=resnet8 --width=4 --batch_size=16 --holdout=8')
VAE = ('distill_vae.py --teacher=lvae.safetensors --student_config.width=4 --batch_size=8 '
       '--max_steps=6 --log_every=1')
FID = ('eval_fid.py --reference=images.npz --features=classifier.safetensors --num_samples=52 '
       '--steps=3 --batch_size=8 --n_two_sample=32')


def script(args, cwd, outputs, env):
    """A child's work: the script's file run as the main program, its outputs into two files."""
    os.environ.update(env)
    for fd, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    sys.argv = [str(ROOT / args[0]), *args[1:]]
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except Exception:
        sys.excepthook(*sys.exc_info())  # multiprocessing would not ask it
        os._exit(1)


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def start(command, ranks=0):
    """The processes of a run, one for each rank, and the folder of what they say: out0, err0 ..."""
    args = shlex.split(command) if isinstance(command, str) else command
    folder = tempfile.mkdtemp(dir='..')
    env = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': str(ranks)}
    processes = []
    for rank in range(max(1, ranks)):
        outputs = [os.path.abspath(f'{folder}/{name}{rank}') for name in ('out', 'err')]
        mine = env | {'RANK': str(rank), 'LOCAL_RANK': str(rank)} if ranks else {}
        process = SERVER.Process(target=script, args=(args, os.getcwd(), outputs, mine))
        with STARTING:
            process.start()
            multiprocessing.process._children.discard(process)  # no two threads ask for its end
        processes.append(process)
    return processes, folder


def said(folder, name):
    return ''.join(Path(path).read_text() for path in sorted(glob.glob(f'{folder}/{name}*')))


def run(command, ranks=0, ok=True):
    """What a script prints. One that is refused (ok=False) says one line, on all ranks together,
    and exits with 2; as under torchrun, the first rank that ends has the others ended."""
    processes, folder = start(command, ranks)
    if not ok:
        multiprocessing.connection.wait([process.sentinel for process in processes])
        for process in processes:
            if process.is_alive():
                process.terminate()
    for process in processes:
        process.join()
    err = said(folder, 'err')
    if ok:
        assert not any(p.exitcode for p in processes), f'{command}: {err[-3000:]}'
        return said(folder, 'out')
    messages = [line for line in err.splitlines() if line.strip() and '%|' not in line]
    refused = 2 in [process.exitcode for process in processes]
    assert refused and len(messages) == 1, f'{command}: {err[-3000:]}'
    return messages[0]


def follow(out, more=''):
    """Runs the next command that a script has printed, as a shell would read it."""
    command = re.search(r': python (.*)', out)[1]
    return run([*shlex.split(command), *shlex.split(more)])


def at_once(fn, cases):
    """Two runs at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(fn, cases))


def log(folder):
    return np.atleast_1d(np.genfromtxt(f'{folder}/log.csv', delimiter=',', names=True))


def rows(folder):
    """log.csv without its times."""
    with open(f'{folder}/log.csv', newline='') as f:
        table = list(csv.DictReader(f))
    for row in table:
        row.pop('seconds', None)
        row.pop('images_per_s', None)
    return table


def metrics(folder):
    return [json.loads(line) for line in lines(Path(folder, 'metrics.jsonl').read_text())]


def same_file(a, b):
    return Path(a).read_bytes() == Path(b).read_bytes()


@pytest.fixture(scope='session')
def tiny_models(tmp_path_factory):
    """Tiny teachers with and without classes, a classifier, a VAE and images of MNIST's kind."""
    folder = tmp_path_factory.mktemp('tiny')
    torch.manual_seed(0)
    for name, classes in (('teacher', 0), ('classes', 4)):
        net = M.UNet(16, 1, 2, 16, 1, (1, 2), (4,), num_head_channels=16, patch_size=2,
                     num_classes=classes)
        torch.nn.init.normal_(net.out[2].weight, std=0.02)
        M.save_model(net, f'{folder}/{name}.safetensors', M.Diffusion('cosine', 100, 'v'))
    classifier = M.classifier('resnet8', 4, image_size=16, in_channels=1, width=4)
    M.save_model(classifier, f'{folder}/classifier.safetensors')
    M.save_model(M.LVAE(16, 1, 8), f'{folder}/lvae.safetensors')
    labels = np.arange(64) % 4
    noise = np.random.default_rng(0).random((64, 16, 16, 1))
    pixels = 60 * noise + 60 * labels[:, None, None, None]
    np.savez(folder / 'images.npz', arr_0=pixels.astype(np.uint8), arr_1=labels)
    return folder


def link(folder):
    for path in folder.iterdir():
        os.symlink(path, path.name)


@pytest.fixture
def tiny(tiny_models, own_folder):
    link(tiny_models)
    os.symlink(ROOT / 'pretrained', 'pretrained')


# ==== dkdm.py ====
METHODS = """
    --method=dynamic --dtype=bfloat16
    --method=dynamic --stride=1 --rho=0.02 --eval_every=6
    --method=noised --data=images.npz --teacher=classes.safetensors
    --method=shuffled --grad_accum=2
    --method=iterative
    --method=synthetic --synthetic.number=9 --synthetic.steps=2 --data=images.npz --synthetic.real_fraction=.2
    --method=synthetic --synthetic.images=images.npz --student_prediction=teacher
    --method=data --data=images.npz --class_cond=True --uncond_prob=0.2 --flip=True --process.steps=50
    --student=dit --student_config="{'hidden_size':16,'depth':1}" --student_prediction=eps
    --teacher=classes.safetensors --guidance=2.0 --uncond_prob=0.1 --student_prediction=flow"""


def test_every_method(tiny):
    def one(case):
        i, args = case
        script = '' if args.startswith('few_steps.py') else DKDM
        out = run(f'{script} {args} --out_dir=o{i}')
        assert len(log(f'o{i}')) == 6 and np.isfinite(log(f'o{i}')['loss']).all()
        assert os.path.getsize(f'o{i}/samples.png') > 0 and not glob.glob(f'o{i}/.tmp*')
        net, _ = M.load_denoiser(f'o{i}/student.safetensors')
        assert net.num_classes == (4 if 'class' in args else 0)
        more = '--num_samples=8 --reference=images.npz --features=classifier.safetensors'
        follow(out, f'{more} --out_dir=e{i}')
        steps = 1 if '--jumps=1' in args else 2  # of the file's header, or of the command
        assert metrics(f'e{i}')[0]['steps'] == steps
    few = JUMPS + ' --teacher=classes.safetensors'
    few_step = few + ' --loss=l2', few + ' --jumps=1 --discriminator=0.5'
    at_once(one, enumerate([*lines(METHODS), *few_step]))
    again = f'{DKDM} --teacher=o9/student.safetensors --max_steps=1 --out_dir=again'
    assert 'already makes guided' in run(f'{again} --guidance=2.0', ok=False)
    run(again)
    assert M.load_denoiser('again/student.safetensors')[0].guided


RESUMED = {
    'dkdm': f"{DKDM} --student_config.dropout=0.1 --max_steps=12 --log_every=2 --save_every=3",
    'jumps': f'{JUMPS} --max_steps=12 --save_every=3',
    'discriminator': f'{JUMPS} --jumps=1 --discriminator=0.5 --max_steps=12 --save_every=3',
    'classifier': f'{CLASSIFIER} --epochs=4 --batch_size=8 --augment_flip=True',
    'vae': f'{VAE} --method=synthetic --data=images.npz --flip=True --max_steps=12 --save_every=3',
    'synth': f'{SYNTH} --batch_size=4 --num_images=48'}


@pytest.mark.parametrize('ranks', [0, 2])
def test_killed_and_resumed_is_the_same_run(ranks, tiny):
    """By SIGKILL and SIGTERM; the files become what they are without, bit for bit."""
    def one(name):
        resume = '' if name == 'synth' else '--init_from=resume'
        command = f'{RESUMED[name]} {resume} --out_dir={name}'
        begin = time.time()
        run(f'{command}_whole', ranks)
        seconds = time.time() - begin
        for share, number in ((0.5, signal.SIGKILL), (0.6, signal.SIGTERM)):
            processes, _ = start(command, ranks)
            processes[0].join(seconds * share)
            for process in processes:
                if process.is_alive():
                    os.kill(process.pid, number)
            for process in processes:
                process.join(60)
        run(command, ranks)
        assert rows(name) == rows(f'{name}_whole')
        files = set(os.listdir(f'{name}_whole'))
        # earlier-1: half a checkpoint, where the first one was being written
        assert files == set(os.listdir(name)) - {'earlier-1', 'earlier-2'}
        for file in files:
            if file.endswith(('.safetensors', '.npz')):
                assert same_file(f'{name}/{file}', f'{name}_whole/{file}'), file
    at_once(one, RESUMED)


def test_resuming_and_the_lock(tiny):
    args = f'{DKDM} --max_steps=4 --out_dir=a'
    assert 'no checkpoint yet' in run(f'{args} --init_from=resume')
    run(f'{args} --init_from=resume --max_steps=6 --log_every=2')
    for setting in ('lr=0.001', 'seed=1', 'stride=20', 'adamw.beta2=0.9'):
        name = re.split('[=.]', setting)[0]
        assert f'{name}=' in run(f'{args} --init_from=resume --{setting}', ok=False)
    assert 'would be overwritten' in run(f'{args} --teacher=a/student.safetensors', ok=False)
    (process,), folder = start(f'{args} --max_steps=100000 --save_every=100000')
    while not os.path.exists('a/log.csv') or len(Path('a/log.csv').read_text()) < 2000:
        assert process.is_alive(), said(folder, 'err')
        time.sleep(0.02)
    assert f'process {process.pid} on' in run(args, ok=False)  # the folder has one run
    process.terminate()
    process.join(60)
    assert process.exitcode == 143 and os.path.exists('a/ckpt.pt')


def test_no_run_removes_another(tiny):
    """An unfinished run is never replaced by mistake; whatever is replaced is kept."""
    args = f'{DKDM} --max_steps=2 --out_dir=a'
    run(args)
    before = Path('a/student.safetensors').read_bytes()
    assert 'moved to a/earlier-1' in run(f'{args} --seed=1')  # it had finished
    assert Path('a/earlier-1/student.safetensors').read_bytes() == before
    os.remove('a/ckpt.pt')
    assert 'no checkpoint to resume from' in run(f'{args} --init_from=resume', ok=False)
    torch.save({'step': 1, 'settings': {}}, 'a/ckpt.pt')
    assert 'unfinished run' in run(args, ok=False)
    run(f'{args} --init_from=overwrite')
    assert sorted(os.listdir('a/earlier-2')) == ['ckpt.pt', 'ckpt_2_rank0.pt', 'log.csv',
                                                 'samples.png', 'student.safetensors']


def test_the_printed_commands_work(tiny):
    """Each script's next command, pasted: foreign checkpoints and paths with spaces."""
    adm = M.UNet(16, 3, 6, 16, 1, (1, 2), (8,), num_head_channels=8)
    torch.save(adm.state_dict(), 'adm.pt')
    net = M.classifier('resnet8', 4, in_channels=1, image_size=16, width=4)
    torch.save(net.state_dict(), 'net.pt')

    def denoiser():
        known = '--teacher_config.image_size=16 --teacher_config.num_head_channels=8 --rho=0.01'
        follow(run(f"{DKDM} --teacher=adm.pt {known} --out_dir='a b'"), '--num_samples=8')
        one, = metrics('out/eval')
        assert one['model'] == 'a b/student.safetensors'
        assert one['features'].startswith('cifar10_resnet')

    def classifier():
        known = '--teacher_config.image_size=16 --teacher_config.mean=(0.4,) '
        known += '--teacher_config.std=(0.2,)'
        out = run(f"{SYNTH} --teacher=net.pt {known} --out_dir='c d'")
        out = follow(out, '--epochs=1 --width=4 --batch_size=8 --holdout=8 --out_dir=e')
        assert M.load_classifier('e/student.safetensors').mean == [0.4]
        assert 'student: e/student.safetensors' in out
    at_once(lambda case: case(), (denoiser, classifier))


def test_the_printed_command_of_a_classifier_works(tiny):
    out = run(f'{CLASSIFIER} --epochs=1 --out_dir=a')
    follow(out.replace('FOLDER', 'images.npz'))


# ==== networks of the user ====
MY_NET = """
import torch
from torch import nn
from models import Diffusion

class Net(nn.Module):
    def __init__(self, image_size, in_channels, num_classes):
        super().__init__()
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.first = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.condition = nn.Embedding(num_classes + 1, 8)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.ConvTranspose2d(8, in_channels, 3, padding=1)

    def forward(self, x, t, y=None):
        y = torch.full_like(t, -1) if y is None else y
        h = self.condition(y % (self.num_classes + 1)) + t[:, None] / 100
        return self.last(self.norm(self.first(x) + h[:, :, None, None]).relu())

def load():
    torch.manual_seed(0)
    return Net(16, 1, 4), Diffusion('linear', 100, 'eps', learn_sigma=False)

def build(image_size, in_channels, num_classes):
    open('was_run', 'w')
    return Net(image_size, in_channels, num_classes)
"""
MY_GAN = """
import torch
from torch import nn

class Generator(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 256))

    def noise(self, n, generator=None):
        return torch.randn(n, 4, generator=generator)

    def decode(self, noise):
        return self.net(noise).sigmoid().view(-1, 1, 16, 16)

def load():
    return Generator(32)

def build():
    return Generator(8)
"""
MY_CLASSIFIER = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=4, in_channels=1, image_size=16):
        super().__init__()
        self.in_channels, self.stages = in_channels, ['one', 'two']
        self.one = nn.Sequential(nn.Conv2d(in_channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.two(self.one(x)).mean((2, 3)))

load = build = Net
"""
MINE = f'dkdm.py --teacher=mine.py {STEPS_6}'


@pytest.fixture
def users(tiny):
    Path('mine.py').write_text(MY_NET)
    Path('gan.py').write_text(MY_GAN)
    Path('student.py').write_text('def build():\n    pass\n')
    Path('range.py').write_text(MY_GAN.replace('sigmoid()', 'mul(20)'))
    Path('clf.py').write_text(MY_CLASSIFIER)
    Path('bare.py').write_text(MY_CLASSIFIER.replace('self.stages', 'self.other'))
    Path('raises.py').write_text(MY_NET.replace("h = self", "h = self.typo + self"))
    Path('deaf.py').write_text(MY_NET.replace("h = self", "h = 0 * self"))


def test_networks_of_the_user(users):
    """A foreign teacher, a foreign student, both, by several methods; the exported weights."""
    foreign = f'{DKDM} --teacher=classes.safetensors --student=mine.py --student_config={{}}'
    few = f'{FEW} --teacher=classes.safetensors --student=mine.py'
    outs = at_once(run, [
        f'{MINE} {UNET} --guidance=2.0 --out_dir=a', f'{FEW} {UNET} --teacher=mine.py --out_dir=b',
        f'{foreign} --dtype=bfloat16 --out_dir=c', f'{MINE} --student=mine.py --out_dir=d',
        f'{foreign} --method=synthetic --synthetic.number=8 --synthetic.steps=2 --uncond_prob=.5 '
        '--out_dir=e',
        f'{few} --max_steps=3 --out_dir=f'])
    run(f'{few} --init_from=resume --out_dir=f', ranks=0)
    run(f'{few} --out_dir=g')
    assert same_file('f/student.safetensors', 'g/student.safetensors') and rows('f') == rows('g')
    out = run(f'{MINE} --teacher=deaf.py --student=deaf.py --max_steps=2 --out_dir=h')
    assert 'deaf.py gives the same output' in out and 'the student gives the same output' in out
    assert 'same output' not in outs[0] + outs[3]
    follow(outs[2], f'--num_samples=8 --out_dir=ec')
    follow(outs[3], f'--num_samples=8 --out_dir=ed')
    assert metrics('ed')[0]['model'] == 'mine.py:d/student.safetensors'
    net = M.run_file('mine.py').build(16, 1, 4)
    net.load_state_dict(load_file('c/student.safetensors'))  # plain PyTorch

    os.remove('was_run')  # the file of weights alone never runs it
    message = run(f'{FID} --models=c/student.safetensors', ok=False)
    assert 'mine.py:c/student.safetensors' in message and not os.path.exists('was_run')
    run(f'{SYNTH} --prior=mine.py:c/student.safetensors --num_images=16 --out_dir=s')
    (process,), folder = start(f'{MINE} {UNET} --teacher=raises.py')
    process.join()
    err = said(folder, 'err')
    assert process.exitcode == 1 and 'Traceback' in err and "no attribute 'typo'" in err
    assert 'unexpected' in run(f'{MINE} --teacher_config.steps=9', ok=False)


def test_generators_and_classifiers_of_the_user(users):
    out = run('distill_vae.py --teacher=gan.py --student=gan.py --max_steps=100 --out_dir=o')
    assert log('o')['out'][-1] < 0.5 * log('o')['out'][0] and os.path.exists('o/samples.png')
    assert 'z' not in log('o').dtype.names
    follow(out, '--num_samples=16')
    assert metrics('out/eval')[0]['model'] == 'gan.py:o/student.safetensors'
    bad = 'distill_vae.py --out_dir=p --student=gan.py'
    assert 'Generator has no encode()' in run(f'{bad} --method=data --data=images.npz', ok=False)
    assert 'image_range of the network is (0, 1)' in run(f'{bad} --teacher=range.py', ok=False)
    assert 'student.py has no load()' in run(f'{bad} --teacher=student.py', ok=False)
    args = CLASSIFIER.replace('classifier.safetensors', 'clf.py') + ' --epochs=1 '
    at_once(run, [f'{args} --out_dir=a', f'{args} --student=clf.py --out_dir=b',
                  f'{SYNTH} --teacher=clf.py --out_dir=s'])
    bare = args + ' --teacher=bare.py --student=clf.py '
    assert 'net.stages' in run(f'{bare} --out_dir=c', ok=False)
    run(f'{bare} --lam_msarc=0.0 --out_dir=c')
    assert 'test accuracy' in run('distill_classifier.py --method=test --test=images.npz '
                                  '--teacher=clf.py:b/student.safetensors')
    run(f'{SYNTH} --teacher=clf.py --student=clf.py:b/student.safetensors --out_dir=t')
    run(f'{FID} --models=images.npz --features=clf.py')


# ==== diffusers ====
TEACHERS = {'ddpm': 'unet', 'ldm': 'unet', 'dit': 'transformer', 'sd': 'unet', 'sd3': 'transformer'}
SAMPLED = [*TEACHERS, 'sdxl', 'shifted']


@pytest.fixture(scope='session')
def pipeline_models(tmp_path_factory):
    """Every kind of diffusers pipeline, tiny and random, saved as its users save theirs."""
    import diffusers as D
    import transformers as H
    folder = tmp_path_factory.mktemp('pipelines')
    torch.manual_seed(0)
    letters = 'abcdefghijklmnopqrstuvwxyz'
    words = ['<|startoftext|>', '<|endoftext|>', *letters, *[f'{c}</w>' for c in letters + ',']]
    (folder / 'vocab.json').write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / 'merges.txt').write_text('#version: 0.2\n')
    tokenizer = H.CLIPTokenizer(f'{folder}/vocab.json', f'{folder}/merges.txt', model_max_length=99)
    clip = H.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        projection_dim=16, num_attention_heads=2, max_position_embeddings=99, bos_token_id=0,
        eos_token_id=1)
    t5 = H.T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)

    def net(kind, down, up, **more):
        blocks = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
        return kind(**blocks | more, down_block_types=down.split(), up_block_types=up.split())
    unet = dict(sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8)
    rgb = unet | dict(sample_size=16, in_channels=3, out_channels=3)
    wide = rgb | {'in_channels': 6}  # an image more, as a condition
    attention = 'DownBlock2D AttnDownBlock2D', 'AttnUpBlock2D UpBlock2D'
    latents = net(D.UNet2DModel, 'DownBlock2D DownBlock2D', 'UpBlock2D UpBlock2D', **unet)
    coder = 'DownEncoderBlock2D DownEncoderBlock2D', 'UpDecoderBlock2D UpDecoderBlock2D'
    kl = net(D.AutoencoderKL, *coder, latent_channels=4, scaling_factor=0.5)
    shifted = D.AutoencoderKL(**kl.config | {'shift_factor': 0.1})
    vq = net(D.VQModel, *coder, latent_channels=4, num_vq_embeddings=32, scaling_factor=0.3)
    cross = 'CrossAttnDownBlock2D DownBlock2D', 'UpBlock2D CrossAttnUpBlock2D'
    unet['cross_attention_dim'] = 16
    conditional = net(D.UNet2DConditionModel, *cross, **unet)
    large = net(
        D.UNet2DConditionModel, *cross, **unet | {'cross_attention_dim': 32},
        addition_embed_type='text_time', addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64, use_linear_projection=True)
    consistent = net(D.UNet2DConditionModel, *cross, **unet, time_cond_proj_dim=8)
    dit = D.DiTTransformer2DModel(2, 8, 4, 8, 1, sample_size=8, patch_size=2,
                                  num_embeds_ada_norm=1000, norm_elementwise_affine=False)
    sd3 = D.SD3Transformer2DModel(
        8, 2, 4, 1, 8, 4, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8)
    cosine = D.DDIMScheduler(beta_schedule='squaredcos_cap_v2')
    linear = D.DDIMScheduler(clip_sample=False, beta_schedule='scaled_linear')
    v = D.DDIMScheduler(**linear.config | {'prediction_type': 'v_prediction'})
    flow = D.FlowMatchEulerDiscreteScheduler(shift=3.0)
    shifted_flow = D.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    encoder = H.CLIPTextModel(clip)
    two = [H.CLIPTextModelWithProjection(clip), tokenizer] * 2
    rest = v, None, None, None, False
    t5 = H.T5EncoderModel(t5)
    eps = D.DDIMScheduler(1000, 0.00085, 0.012, 'scaled_linear', clip_sample=False)
    pipelines = {
        'ddpm': D.DDPMPipeline(net(D.UNet2DModel, *attention, **rgb), cosine),
        'upscaler': D.DDPMPipeline(net(D.UNet2DModel, *attention, **wide), cosine),
        'ldm': D.LDMPipeline(vq, latents, linear), 'dit': D.DiTPipeline(dit, kl, linear),
        'sd': D.StableDiffusionPipeline(kl, encoder, tokenizer, conditional, *rest),
        'lcm': D.StableDiffusionPipeline(kl, encoder, tokenizer, consistent, *rest),
        'sd3': D.StableDiffusion3Pipeline(sd3, flow, shifted, *two, t5, tokenizer),
        'sdxl': D.StableDiffusionXLPipeline(kl, encoder, two[0], tokenizer, tokenizer, large, eps),
        'shifted': D.StableDiffusion3Pipeline(sd3, shifted_flow, shifted, *two, t5, tokenizer),
        'tiny_vae': D.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))}
    for name, pipe in pipelines.items():
        pipe.save_pretrained(folder / name)
    pipelines['ldm'].to(torch.float16).save_pretrained(folder / 'half', variant='fp16')
    M.save_model(M.classifier('wrn16_1', 4, image_size=16), f'{folder}/classifier.safetensors')
    (folder / 'names.txt').write_text('one\ntwo\nthree\nfour\n')
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / 'images.npz', arr_0=images)
    for name, part in TEACHERS.items():  # students: the teachers' classes
        shutil.copy(folder / name / part / 'config.json', folder / f'{name}.json')
    return folder


@pytest.fixture
def pipelines(pipeline_models, own_folder):
    link(pipeline_models)


def sampled(pipe, noise, steps, **call):
    """Images (B, C, H, W) in [0, 1] that a pipeline of diffusers makes of our noise."""
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[type(pipe).__module__]
        patch.setattr(module, 'randn_tensor', lambda *_, **__: noise.clone(), raising=False)
        images = pipe(num_inference_steps=steps, output_type='np', **call).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def assert_same_images(theirs, ours):
    assert (theirs - ((ours + 1) / 2).clamp(0, 1)).abs().max() < 1e-4 and ours.std() > 0


@pytest.mark.parametrize('name', SAMPLED)
def test_pipelines_sample_what_diffusers_samples(name, pipelines):
    from diffusers import DDIMPipeline, DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(name)
    flow = name in ('sd3', 'shifted')
    if not flow:
        pipe.scheduler.register_to_config(steps_offset=0, set_alpha_to_one=True)
    net, diffusion = M.load_denoiser(name)
    noise = torch.randn(1, net.in_channels, net.image_size, net.image_size)
    y, call = None, {}
    if name == 'ddpm':
        pipe = DDIMPipeline(pipe.unet, pipe.scheduler)
        call = dict(use_clipped_model_output=True)
    elif name == 'dit':
        y, call = torch.tensor([7]), dict(class_labels=[7], guidance_scale=3.)
    elif name != 'ldm':
        net.set_prompts(['a dog', 'a cat'])
        y, call = torch.tensor([1]), dict(prompt=['a cat'], guidance_scale=3., latents=noise)
    if flow:
        call['sigmas'] = [(t + 1) / 1000 for t in M.sampling_steps(1000, 5, 'leading')]
    ours = M.sample(net, diffusion, noise, 5, 'ddim', y, 3., spacing='leading')
    assert_same_images(sampled(pipe, noise, 5, **call), M.decode(net, ours))


def changed(name, part, **values):
    """A copy of the pipeline `ddpm` with other values in one config."""
    shutil.copytree('ddpm', name, symlinks=True)
    path = Path(name, part, 'scheduler_config.json' if part == 'scheduler' else 'config.json')
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    if '_class_name' in values:
        index = Path(name, 'model_index.json')
        said = json.loads(index.read_text()) | {part: ['diffusers', values['_class_name']]}
        index.write_text(json.dumps(said))
    return name


def test_processes_and_folders_of_diffusers(pipelines, monkeypatch):
    """What a scheduler's config says is done, or refused; errors of diffusers and moved folders."""
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm
    noise = torch.randn(2, 3, 16, 16)
    monkeypatch.setattr(scheduling_ddpm, 'randn_tensor', lambda *_, **__: noise)
    ddpm = {'_class_name': 'DDPMScheduler'}
    for i, said in enumerate(({'clip_sample_range': 2.0}, {'variance_type': 'fixed_large'})):
        net, diffusion = M.load_denoiser(changed(f'd{i}', 'scheduler', **said | ddpm))
        theirs = DDPMScheduler.from_pretrained(f'd{i}', subfolder='scheduler')
        for t in (999, 300, 20):
            out = net(noise, torch.tensor([t, t]))
            wanted = theirs.step(out, t, noise).prev_sample
            tt = torch.tensor([t, t])
            for a, b in ((t, t - 1), (tt, tt - 1), (tt, None)):
                b = a - 1 if b is None else b
                found = diffusion.ddpm_step(out, noise, a, b, noise)
                assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)
    refused = [(ddpm | {'variance_type': 'learned'}, "variance_type='learned'"),
               ({'_class_name': 'LCMScheduler'}, 'LCMScheduler is not supported'),
               ({'rescale_betas_zero_snr': True}, 'zero terminal SNR')]
    for i, (said, message) in enumerate(refused):
        with pytest.raises(M.UserError, match=message):
            M.load_denoiser(changed(f'r{i}', 'scheduler', **said))
    assert M.load_denoiser(changed('square', 'unet', sample_size=[16, 16]))[0].image_size == 16
    name = changed('null', 'unet', sample_size=None)
    assert M.load_denoiser(name, image_size=16)[0].image_size == 16
    with pytest.raises(M.UserError, match='sample_size=None'):
        M.load_denoiser(name)
    net, diffusion = M.load_denoiser('ddpm')
    M.save_model(net, 'moved.safetensors', diffusion, vae='/gone/pipeline')
    weights, = glob.glob(f'{name}/unet/*.safetensors')
    Path(weights).write_text('version https://git-lfs.github.com/spec/v1')
    os.makedirs('run')
    shutil.copy('moved.safetensors', 'run/student.safetensors')
    for spec, message in ((name, 'cannot be loaded'), ('moved.safetensors', 'needs the VAE of'),
                          ('run', 'name a file in it, run/student'), ('run/none', 'no file or folder'),
                          ('./none', 'no file or folder'), ('a/b/c', 'no file or folder')):
        with pytest.raises(M.UserError, match=message):
            M.load_denoiser(spec)
    np.savez('odd.npz', arr_0=plain(0, (4, 15, 15, 3)))
    args = 'distill_vae.py --method=synthetic --teacher=sd --data=odd.npz --batch_size=2'
    assert 'its downsampling divides' in run(f"{args} --student_config={{}}", ok=False)


MORE = {'dit': '--guidance=2.0 --uncond_prob=0.2 --student_prediction=teacher',
        'sd': '--prompts=names.txt --guidance=2.0',
        'sd3': '--prompts=names.txt --guidance=2.0 --student_prediction=teacher'}
OURS = """--student=dit --student_config="{'hidden_size':16,'depth':1,'num_heads':2}" """


def test_students_of_pipelines(pipelines):
    """Of each kind of teacher one of its class, which goes back to diffusers, and one of ours."""
    def same_class(name):
        more, file = MORE.get(name, ''), f'o_{name}/student.safetensors'
        out = run(f'{QUICK} --teacher={name} --student={name}.json {more} --out_dir=o_{name}')
        out = run(shlex.split(re.search('for diffusers: python (.*)', out)[1]))
        assert ('guidance_scale=1.0' in out) == (name in MORE)
        made = []
        for spec in (file, f'o_{name}/pipeline'):
            net, diffusion = M.load_denoiser(spec)
            assert diffusion.prediction == {'dit': 'eps', 'sd3': 'flow'}.get(name, 'v')
            assert net.guided == (name in MORE)
            if net.condition == 'text':
                net.set_prompts(['one', 'two'])
            x = wave(1, net.in_channels, net.image_size, net.image_size)
            t = torch.tensor([300])
            made.append(M.decode(net, diffusion.predict_x0(net(x, t, t * 0), x, t)))
        assert made[0].shape == (1, 3, 16, 16) and torch.allclose(*made, atol=1e-5)
    at_once(same_class, TEACHERS)
    at_once(run, [f'{QUICK} {OURS} --teacher=half --out_dir=half_s',  # which is there in fp16 only
                  f'{FEW} {OURS} --teacher=sd3 --prompts=names.txt --max_steps=2 --out_dir=text '
                  '--jumps=1 --discriminator=0.5'])
    run(f'{QUICK} {OURS} --teacher=half_s/student.safetensors --out_dir=again')
    for name, classes in (('half_s', 0), ('text', 4), ('again', 0)):
        net, _ = M.load_denoiser(f'{name}/student.safetensors')  # its VAE is its teacher's
        assert M.decode(net, torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)
        assert net.num_classes == classes
    models = ','.join(f'{name}/student.safetensors' for name in ('o_ddpm', 'o_sd', 'half_s'))
    run(f'{FID} --models={models} --num_samples=8 --steps=2 --prompts=names.txt --out_dir=e')
    assert len(metrics('e')) == 3
    for family in ('Flux', 'QwenImage'):
        os.mkdir(family)
        net = f'{family}Transformer2DModel'
        parts = {'_class_name': f'{family}Pipeline', 'transformer': ['diffusers', net]}
        Path(f'{family}/model_index.json').write_text(json.dumps(parts))
        message = run(f'few_steps.py --teacher={family} --prompts=names.txt', ok=False)
        assert f'{family}Pipeline: a {net} is not supported' in message and 'adapter' in message
    for name, message in (('upscaler', 'super-resolution'), ('lcm', 'time_cond_proj_dim')):
        with pytest.raises(M.UserError, match=message):
            M.load_denoiser(name)


@pytest.mark.parametrize('student', ['unet', 'grey.json'])
def test_few_step_students_in_diffusers(student, tiny, pipeline_models):
    """The file says how it is sampled; with as many steps diffusers samples the same images."""
    from diffusers import DiffusionPipeline
    config = json.loads((pipeline_models / 'ddpm.json').read_text())
    Path('grey.json').write_text(json.dumps(config | dict(in_channels=1, out_channels=1)))
    sizes = """--student_config="{'patch_size':1,'model_channels':32}" """
    args = f'{FEW} --student={student} --teacher=teacher.safetensors'
    run(f"{args} --lr=3e-3 --out_dir=o {sizes if student == 'unet' else ''}")
    net, diffusion = M.load_denoiser('o/student.safetensors')
    assert net.sampling == dict(sampler='ddim', steps=2, spacing='trailing') and not diffusion.clip
    run('export.py --model=o/student.safetensors --out_dir=p')
    noise = torch.randn(2, 1, 16, 16)
    theirs = sampled(DiffusionPipeline.from_pretrained('p'), noise, 2, batch_size=2)
    assert_same_images(theirs, M.sample(net, diffusion, noise, 2, 'ddim'))
    run(f'{FID} --models=o/student.safetensors --steps=0 --out_dir=e')
    assert metrics('e')[0]['steps'] == metrics('e')[0]['passes'] == 2


def test_few_step_flows_in_diffusers(pipelines):
    """They keep their teacher's scheduler, and are sampled with the sigmas that export.py prints."""
    from diffusers import DiffusionPipeline
    run(f"{FEW} --batch_size=4 --max_steps=2 --teacher=sd3 --student=sd3.json {MORE['sd3']} --out_dir=o")
    out = run('export.py --model=o/student.safetensors --out_dir=p')
    sigmas = ast.literal_eval(re.search(r'sigmas=(\[.*?\])', out)[1])
    net, diffusion = M.load_denoiser('o/student.safetensors')
    net.set_prompts(['a cat'])
    noise = torch.randn(1, 4, 8, 8)
    call = dict(prompt=['a cat'], guidance_scale=1., latents=noise, sigmas=sigmas)
    theirs = sampled(DiffusionPipeline.from_pretrained('p'), noise, 2, **call)
    ours = M.sample(net, diffusion, noise, 2, 'ddim', torch.tensor([0]))
    assert_same_images(theirs, M.decode(net, ours))


# ==== students that begin as their teacher ====
def test_copies_of_the_teacher(pipelines, tiny_models):
    """They predict what it predicts; told otherwise, their last layer is negated or begins at 0."""
    os.symlink(tiny_models / 'teacher.safetensors', 'teacher.safetensors')
    cpu = torch.device('cpu')
    dit = M.DiT(16, 2, 1, 16, 1, 2, num_classes=0)
    torch.nn.init.normal_(dit.final_layer['linear'].weight)
    M.save_model(dit, 'dit.safetensors', M.Diffusion('cosine'))
    for name in [*SAMPLED, 'teacher.safetensors', 'dit.safetensors']:
        prompts = 'names.txt' if name in ('sd', 'sd3', 'sdxl', 'shifted') else ''
        net_T, diffusion_T, _ = M.load_teacher(name, {}, 1.0, prompts, cpu, torch.float32)
        C, H = net_T.in_channels, net_T.image_size
        x, t = wave(2, C, H, H), torch.tensor([900, 20]) % diffusion_T.T
        y = t % 4 if net_T.num_classes else None
        theirs = net_T(x, t, y)
        for prediction in ('teacher', 'x0'):
            for learn_sigma in (False, True):
                net, diffusion = M.adapter('students').build_student(
                    'teacher', {'learn_sigma': learn_sigma}, prediction, (C, H), net_T.num_classes,
                    diffusion_T.config, (name, {}, net_T), cpu)
                mine = net(x, t, y)
                sign = 1 if prediction == 'teacher' else -1 if diffusion_T.prediction == 'v' else 0
                assert torch.allclose(mine[:, :C], sign * theirs[:, :C], atol=1e-5)
                assert diffusion.learn_sigma == (mine.shape[1] == 2 * C) == learn_sigma
                more = theirs[:, C:] if len(theirs[0]) > C else torch.zeros_like(x)
                assert not learn_sigma or torch.allclose(mine[:, C:], more, atol=1e-5)
                again = M.make(net.config)
                again.load_state_dict(net.state_dict())
    few = f'{FEW} --teacher=sdxl --prompts=names.txt --student=teacher --max_steps=2'
    at_once(run, [f'{QUICK} --teacher=ddpm --student=teacher --out_dir=a', f'{few} --out_dir=b'])
    for name in 'ab':
        run(f'export.py --model={name}/student.safetensors --out_dir={name}/pipeline')


def test_scripts_that_begin_as_the_teacher(pipelines):
    pytest.importorskip('peft')
    shutil.copy('names.txt', 'texts.txt')
    sd = f'{QUICK} --teacher=sd --prompts=texts.txt'
    out = run(f'{sd} --student=sd.json --init_from=teacher --out_dir=a')
    assert '100% of the student' in out
    size = '--teacher_config.image_size=16'  # not that of the pipeline
    run(f'{sd} {size} --student=teacher --student_config.lora_rank=4 --out_dir=b', ranks=2)
    state, _ = M.read_weights('b/student.safetensors')
    assert state and all('lora_' in key for key in state)
    assert M.load_denoiser('b/student.safetensors')[0].image_size == 16
    for command, message in (
            (f'{sd} --student=unet --student_config.lora_rank=4', 'needs --student=teacher'),
            (f'{QUICK} --teacher=ldm --student=teacher --student_config.lora_rank=4', 'with texts'),
            (f'{sd} --student=teacher --student_config.width=4', "no 'width'")):
        assert message in run(f'{command} --out_dir=c', ok=False)
    with open('texts.txt', 'a') as f:
        f.write('another text')
    out = run(f'{sd} --student=sd.json --init_from=resume --out_dir=a', ok=False)
    assert 'holds a run with teacher_digest' in out


def test_shallower_students_borrow_blocks(capsys):
    """The first and the last block of each stage, and all else that fits."""
    import diffusers as D
    from_teacher, hub = M.adapter('from_teacher'), M.adapter('hub')
    sizes = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
                 norm_num_groups=4, cross_attention_dim=16, attention_head_dim=8,
                 down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
                 up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))
    deep, flat = (hub.Pipeline(D.UNet2DConditionModel(**sizes, layers_per_block=n)) for n in (2, 1))
    diffusion = M.Diffusion('cosine', prediction='v', learn_sigma=False)
    from_teacher.lend(deep, 'v', flat, diffusion)
    assert capsys.readouterr().out.startswith('100% of the student')
    a, b = deep.net.up_blocks[0].resnets, flat.net.up_blocks[0].resnets
    for mine, theirs in ((b[0], a[0]), (b[1], a[2])):
        assert torch.equal(mine.conv1.weight, theirs.conv1.weight)
    nets = [M.UNet(16, 1, 1, 16, n, (1, 2), (8,), num_head_channels=16) for n in (3, 2)]
    for p in nets[0].parameters():
        torch.nn.init.normal_(p)
    from_teacher.lend(nets[0], 'v', nets[1], M.Diffusion(prediction='x0', learn_sigma=False))
    assert capsys.readouterr().out.startswith('100% of the student')
    a, b = (net.state_dict() for net in nets)
    for pair in ('in 2.0 3.0', 'in 3.0 4.0', 'out 2.1 3.1', 'out 5.0 7.0'):
        side, mine, theirs = pair.split()
        mine, theirs = (f'{side}put_blocks.{i}' for i in (mine, theirs))
        names = [k for k in b if k.startswith(mine)]
        assert names and all(torch.equal(b[k], a[theirs + k.removeprefix(mine)]) for k in names)
    assert torch.equal(b['out.2.weight'], -a['out.2.weight'])


@pytest.mark.parametrize('name', ['sd', 'sdxl', 'shifted'])
def test_loras_in_diffusers(name, pipelines):
    """A LoRA's file and its checkpoint hold adapters only; diffusers loads what export.py writes,
    and samples the same images as we do. A resumed run is the same run."""
    import diffusers as D
    pytest.importorskip('peft')
    args = (f'{FEW} --teacher={name} --prompts=names.txt --guidance=2.0 --student=teacher '
            '--lora_rank=4 --lr=3e-2 --ema=0.5 --batch_size=4 --max_steps=4')
    if name == 'sdxl':
        args += ' --student_config.gradient_checkpointing=True'
    run(f'{args} --out_dir=o')
    run(f'{args} --max_steps=2 --out_dir=r')
    run(f'{args} --init_from=resume --out_dir=r')
    assert same_file('o/student.safetensors', 'r/student.safetensors')
    saved, _ = M.read_weights('o/ckpt.pt')
    for state in (saved['net'], saved['ema'], M.read_weights('o/student.safetensors')[0]):
        assert state and all('lora_' in key for key in state)
    out = run('export.py --model=o/student.safetensors --out_dir=p')
    assert "load_lora_weights('p')" in Path('p/README.md').read_text()
    net, diffusion = M.load_denoiser('o/student.safetensors')
    net.set_prompts(['a cat'])
    noise, y = torch.randn(1, 4, 8, 8), torch.tensor([0])
    ours = M.sample(net, diffusion, noise, 2, 'ddim', y)
    call = dict(prompt=['a cat'], guidance_scale=1., latents=noise)
    if name == 'shifted':
        call['sigmas'] = ast.literal_eval(re.search(r'sigmas=(\[.*?\])', out)[1])
    for path in ('p', 'o/student.safetensors'):
        pipe = D.DiffusionPipeline.from_pretrained(name)
        pipe.load_lora_weights(path)
        kind = D.FlowMatchEulerDiscreteScheduler if name == 'shifted' else D.DDIMScheduler
        pipe.scheduler = kind.from_pretrained('p', subfolder='scheduler')
        assert_same_images(sampled(pipe, noise, 2, **call), M.decode(net, ours))
    plain, _ = M.load_denoiser(name)
    plain.set_prompts(['a cat'])
    assert (M.sample(plain, diffusion, noise, 2, 'ddim', y) - ours).abs().max() > 1e-2


# ==== synthesize.py ====
PRIORS = lines("""
    --prior=ddpm
    --prior=ldm --edit=paper --grad_batch=3 --sampler=renoise
    --prior=dit --guidance=2.0 --lca=mixup
    --prior=sd --guidance=3.0 --sampler=ddim --ddim_eta=0.5 --lca=traditional --edit=x_t
    --prior=sd --class_names=names.txt --alpha=0 --beta=0
    --prior=none --flip=True --tv=0.1 --l2=0.1
    --prior=sd --teacher=vae:sd --guidance=2.0 --lca=none
    --prior=ldm --teacher=vae:tiny_vae --alpha=0 --lca=none""")


def test_every_kind_of_prior(pipelines):
    def one(case):
        i, args = case
        out = run(f'{SYNTH} --num_images=16 --batch_size=4 {args} --out_dir=o{i}')
        images, labels = M.load_images(f'o{i}')
        assert images.shape == (16, 3, 16, 16) and np.isfinite(log(f'o{i}')['loss']).all()
        if 'vae:' in args:
            assert labels is None and 'distill_vae.py' in out
        else:
            assert torch.bincount(labels).tolist() == [4] * 4 and 'distill_classifier.py' in out
    at_once(one, enumerate(PRIORS))


def test_saturated_pixels_have_a_gradient():
    """At the bounds of [-1, 1], where the gradient of clamp differs between versions of torch."""
    x = torch.tensor([-1.5, -1, 0.3, 1, 1.5]).view(5, 1, 1, 1).requires_grad_()
    synthesize.as_kept(x, 1, 1).sum().backward()
    assert x.grad.flatten().tolist() == [0, 1, 1, 1, 0]


def test_synthesis_restarts_and_ranks_share(tiny):
    run(f'{SYNTH} --out_dir=one')
    os.remove('one/images_0000_00001.npz')
    first = os.stat('one/images_0000_00000.npz').st_mtime_ns
    run(f'{SYNTH} --out_dir=one')
    assert os.stat('one/images_0000_00000.npz').st_mtime_ns == first and len(log('one')) == 8
    assert 'eta=3.0, not 2.0' in run(f'{SYNTH} --eta=2.0 --out_dir=one', ok=False)
    run(f'{SYNTH} --out_dir=two', ranks=2)
    for one, two in zip(M.load_images('one'), M.load_images('two')):
        assert torch.equal(one, two)


@pytest.mark.parametrize('again', [False, True])
def test_the_step_of_the_paper(tiny, again):
    """Eqs. (4)-(10) by hand: every loss that the script logs over three steps, and its images. With
    `reevaluate`, x_0 is that of the edited z."""
    torch.manual_seed(0)
    net = M.UNet(16, 1, 1, 16, 1, (1, 2), (4,), num_head_channels=16).eval()
    torch.nn.init.normal_(net.out[2].weight, std=0.02)
    process = M.Diffusion('linear', 100, 'eps', learn_sigma=False, clip=False)
    M.save_model(net, 'prior.safetensors', process)
    student = M.classifier('resnet8', 4, image_size=16, in_channels=1, width=4)
    M.save_model(student, 'student.safetensors')
    run(f'{SYNTH} --prior=prior.safetensors --student=student.safetensors --edit=paper --eta=0.5 '
        f'--reevaluate={again} --alpha=0.1 --beta=1.0 --gamma=0.5 --tau=2.0 --sampler=renoise --lca=none --steps=3 '
        '--keep=3 --grad_batch=3 --num_images=24 --dtype=float32 --out_dir=o')
    images, labels = M.load_images('o')
    f_T = M.load_classifier('classifier.safetensors')
    f_S = M.load_classifier('student.safetensors')
    noted = synthesize.BatchNormInputs(f_T)
    g = torch.Generator().manual_seed(0)  # the script's draws, in its order
    z, noise = torch.randn(8, 1, 16, 16, generator=g), torch.randn(3, 8, 1, 16, 16, generator=g)
    for _ in range(3):
        torch.randperm(8, generator=g)
    torch.rand(3, 4, 8, 1, generator=g)
    y = torch.randperm(8, generator=g) % 4
    assert torch.equal(labels, y.repeat(3))
    betas = torch.linspace(0.001, 0.2, 100, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0).float()
    for i, (t, s) in enumerate(((99, 50), (50, 0), (0, None))):
        z = z.detach().requires_grad_()
        a, b = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        eps = net(z, torch.full((8,), t))
        x = ((z - b * eps) / a).clamp(-1, 1)  # Eq. (4); the classifiers have mean and std 0.5
        logits_T, logits_S = f_T(x), f_S(x)
        L_bn = 0.  # Eq. (6)
        for layer, seen in noted.inputs.items():
            var, mean = torch.var_mean(seen, (0, 2, 3), correction=0)
            L_bn = L_bn + (mean - layer.running_mean).norm() + (var - layer.running_var).norm()
        L_cls = -logits_T.log_softmax(1)[range(8), y].mean()  # Eq. (7)
        log_T, log_S = (logits_T / 2).log_softmax(1), (logits_S / 2).log_softmax(1)
        L_adv = -(log_T.exp() * (log_T - log_S)).sum(1).mean()  # Eq. (8)
        L = 0.1 * L_bn + L_cls + 0.5 * L_adv  # Eq. (9)
        for name, value in (('bn', L_bn), ('cls', L_cls), ('adv', L_adv), ('loss', L)):
            assert log('o')[name][i] == pytest.approx(value.item(), rel=2e-4, abs=1e-6), (name, i)
        z = z - 0.5 * torch.autograd.grad(8 * L, z)[0]  # Eq. (10), of the sum over 8 walks
        if again:
            with torch.no_grad():
                eps = net(z, torch.full((8,), t))
        x0 = (z - b * eps) / a
        kept = images[8 * i:8 * i + 8].int()
        assert (kept - M.to_uint8(x0).int()).abs().max() <= 1
        if s is not None:
            z = alpha_bar[s].sqrt() * x0 + (1 - alpha_bar[s]).sqrt() * noise[i]  # Eq. (5)


# ==== distill_classifier.py, distill_vae.py ====
def test_distilled_classifier(tiny):
    """The student comes to agree with its teacher, and serves the next round's adversarial loss."""
    out = run(f'{CLASSIFIER} --method=data --width=8 --holdout=0 --epochs=10 --test=images.npz '
              '--out_dir=teacher')
    assert 'test accuracy' in out
    teacher = '--teacher=teacher/student.safetensors'
    run(f'{CLASSIFIER} {teacher} --holdout=16 --epochs=20 --test=images.npz --out_dir=s', ranks=2)
    table = log('s')
    assert table['kl'][-1] < 0.5 * table['kl'][0] and table['msarc'][-1] < table['msarc'][0]
    assert table['agreement'].max() > 0.7
    assert M.load_classifier('s/best.safetensors').config['width'] == 4
    run(f'{SYNTH} {teacher} --student=s/student.safetensors --out_dir=adv')
    assert (log('adv')['adv'] <= 0).all()
    args = f'{CLASSIFIER} --data=adv --epochs=1'
    assert 'was made for the teacher' in run(f'{args} --out_dir=b', ok=False)
    out = run(f'{args} --any_teacher=True --init_from=s/student.safetensors --lr=0.0 --out_dir=b')
    first, second = load_file('s/student.safetensors'), load_file('b/student.safetensors')
    assert torch.equal(first['fc.weight'], second['fc.weight']) and 'test accuracy' not in out


@pytest.mark.parametrize('teacher, student, last, early', [
    ('resnet34', 'resnet18', 2.4125850177e-4, [7.138987318e-12, 1.8216648676e-11, 5.8608988773e-9]),
    ('resnet20', 'resnet8', 3.6491036880761e-3, [5.7058896497e-10, 2.0249897759e-08])])
def test_msarc_has_the_numbers_of_its_source(teacher, student, last, early):
    logits, maps = {}, {}
    heads = []
    for role, name in (('S', student), ('T', teacher)):
        net = fill(M.classifier(name))
        logits[role], maps[role] = net.forward_features(wave(4, 3, 32, 32))
        heads.append(net.get_submodule(net.head_name))
    found = distill_classifier.msarc_loss(
        logits['S'], maps['S'], heads[0], logits['T'], maps['T'], heads[1])
    assert found.item() == pytest.approx(last + sum(early), rel=1e-4)
    c = logits['T'].argmax(1)
    pairs = distill_classifier.pairs_of_stages(maps['S'], maps['T'])
    cams_S = distill_classifier.grad_cam(logits['S'], [maps['S'][i] for i, _ in pairs], c)
    cams_T = distill_classifier.grad_cam(logits['T'], [maps['T'][j] for _, j in pairs], c)
    found = [F.mse_loss(a, b).item() for a, b in zip(cams_S, cams_T)]
    assert found == pytest.approx(early, rel=1e-3)


def test_distilled_vaes(tiny, pipeline_models):
    os.symlink(pipeline_models, 'p')
    diffusers = f'{VAE} --method=synthetic --data=p/images.npz --batch_size=4 --max_steps=2'
    kl = """--teacher=p/sd --student_config="{'block_out_channels':(4,8)}" """
    small = """--teacher=p/tiny_vae --student_config="{'encoder_block_out_channels':(4,4)}" """
    shutil.copy('p/tiny_vae/config.json', 'tiny.json')
    to_tiny = f'{diffusers} --teacher=p/sd --student=tiny.json'
    outs = at_once(run, [
        f'{VAE} --max_steps=100 --lr=3e-3 --lr_decay=False --out_dir=a',
        f'{VAE} --method=synthetic --data=images.npz --out_dir=b',
        f'{VAE} --method=data --data=images.npz --kl_warmup=3 --out_dir=c',
        f'{diffusers} {kl} --out_dir=d', f'{diffusers} {small} --out_dir=e',
        f'{to_tiny} --features=p/classifier.safetensors --max_steps=80 --out_dir=f',
        f'{VAE} --teacher=p/sd --student=tiny.json --out_dir=g'])
    assert log('a')['loss'][-10:].mean() < 0.3 * log('a')['loss'][:5].mean()
    for name, out in zip('abc', outs):
        more = '--num_samples=8 --reference=images.npz --features=classifier.safetensors'
        follow(out, f'{more} --out_dir=e{name}')
        assert os.path.exists(f'{name}/samples.png') and metrics(f'e{name}')[0]['MFLOPs'] > 0
    run(f'{FID} --models=b/student.safetensors --num_samples=24 --reconstruct=images.npz '
        '--out_dir=mse', ranks=2)
    vae, (images, _) = M.load_vae('b/student.safetensors').eval(), M.load_images('images.npz')
    picked = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:24]
    x = images[picked].float() / 255
    out, _, _ = vae(x, [torch.zeros_like(n) for n in vae.noise(24)])
    error = F.mse_loss(out[:, : x.shape[1]], x).item()
    assert metrics('mse')[0]['MSE'] == pytest.approx(error, rel=1e-4)
    assert [type(M.load_vae(f'{name}/student').net).__name__ for name in 'defg'] == [
        'AutoencoderKL', 'AutoencoderTiny', 'AutoencoderTiny', 'AutoencoderTiny']
    assert log('f')['loss'][-5:].mean() < 0.8 * log('f')['loss'][:5].mean()
    # as `vae=` of a pipeline it decodes the pipeline's latents
    from diffusers import AutoencoderTiny, StableDiffusionPipeline
    call = dict(prompt='a', num_inference_steps=1, output_type='np', guidance_scale=1.0)
    made = []
    for given in ({}, {'vae': AutoencoderTiny.from_pretrained('f/student')}):
        pipe = StableDiffusionPipeline.from_pretrained('p/sd', **given)
        made.append(pipe(**call, latents=torch.ones(1, 4, 8, 8)).images)
    assert made[0].shape == made[1].shape == (1, 16, 16, 3)
    teacher = M.load_vae('p/sd')
    tiny = M.adapter('hub').build_vae('tiny.json', {}, teacher)
    z = teacher.encode(torch.rand(2, 3, 16, 16))[0][0]
    theirs = tiny.net.decode(z * teacher.net.config.scaling_factor).sample
    assert torch.allclose(tiny.decode([z])[0] * 2 - 1, theirs, atol=1e-5)


def test_a_vae_of_the_user(tiny):
    """The slides' pipeline: a VAE is trained, images are made for it, narrower ones learn."""
    os.symlink(ROOT / 'adapters/plain_vae.py', 'plain.py')
    plain = 'distill_vae.py --student=plain.py --batch_size=8 --log_every=1'
    run(f'{plain} --method=data --data=images.npz --student_config.latents=4 --max_steps=60 '
        '--lr=3e-3 --kl_warmup=0 --out_dir=T')
    table = log('T')
    assert table['nll'][-5:].mean() < table['nll'][:5].mean()
    teacher = 'plain.py:T/student.safetensors'
    assert M.load_vae(teacher).elbo(torch.rand(2, 1, 16, 16), [torch.zeros(2, 4, 1, 1)])[1][0].ndim
    out = run(f'{SYNTH} --teacher=vae:{teacher} --edit=paper --eta=1.0 --reevaluate=True '
              '--lca=none --out_dir=s')
    assert M.load_images('s')[0].shape == (32, 1, 16, 16) and (log('s')['kl'] > 0).all()
    small = f'{plain} --teacher={teacher} --student_config="{{\'width\':4,\'latents\':4}}"'
    run(f'{small} --max_steps=60 --out_dir=noise')
    assert log('noise')['out'][-5:].mean() < 0.7 * log('noise')['out'][:5].mean()
    out = follow(out, '--student=plain.py --student_config.latents=4 --max_steps=3 --out_dir=images')
    assert (log('images')['z_x'] > 0).all()
    follow(out, '--num_samples=8 --reference=images.npz --features=classifier.safetensors')
    other = f'{plain} --teacher={teacher} --method=synthetic --data=s --out_dir=other'
    assert 'the levels' in run(other, ok=False)  # 4 latents and 128


# ==== eval_fid.py, bench.py ====
def test_a_number_does_not_depend_on_the_ranks(tiny):
    """A set has no distance from its own statistics; against images there are more numbers."""
    run(f'{FID} --num_samples=64 --save_stats=stats.npz')
    models = '--models=images.npz,teacher.safetensors'
    run(f'{FID} --num_samples=64 --reference=stats.npz {models} --out_dir=e')
    same, drawn = metrics('e')
    assert abs(same['Frechet']) < 1e-6 < 1e-3 < drawn['Frechet'] and 'KID' not in same
    assert drawn['parameters'] > 0 and drawn['MFLOPs'] > 0 and drawn['sampler'] == 'ddim'
    for folder, ranks in (('one', 0), ('two', 2)):
        models = '--models=images.npz,classes.safetensors --spacing=even'
        run(f'{FID} {models} --out_dir={folder}', ranks)
    for one, two in zip(metrics('one'), metrics('two')):
        for k in ('Frechet', 'score', 'precision', 'recall', 'KID', 'EMD', 'MMD', '1-NN'):
            assert one[k] == pytest.approx(two[k], rel=1e-6, abs=1e-9), k
        assert one.get('agreement') == two.get('agreement')
    same, drawn = metrics('one')
    assert drawn['spacing'] == 'even' and 'agreement' in drawn and same['precision'] == 1


def test_references_and_folders_of_runs(tiny):
    """Statistics beside images, which differ; alone; and a run's folder, which is no set."""
    run(f'{FID} --save_stats=stats.npz')
    made = dict(np.load('stats.npz')) | {'arr_0': np.load('images.npz')['arr_0'][:48, ::-1]}
    np.savez('both.npz', **made)
    os.makedirs('run')
    shutil.copy('teacher.safetensors', 'run/student.safetensors')
    for name in ('log.csv', 'samples.png', 'ckpt.pt'):
        Path('run', name).touch()
    args = f'{FID} --models=run,images.npz --num_samples=16'
    outs = at_once(run, [f'{args} --reference=both.npz --out_dir=a',
                         f'{args} --reference=stats.npz --out_dir=b'])
    assert 'these two are' in outs[0] and 'statistics alone' in outs[1]
    assert 'run/student.safetensors is measured' in outs[0]
    both, alone = metrics('a'), metrics('b')
    assert 'precision' in both[0] and 'precision' not in alone[0] and 'MFLOPs' in both[0]
    assert both[1]['Frechet'] == pytest.approx(alone[1]['Frechet'])
    os.remove('run/student.safetensors')
    with pytest.raises(M.UserError, match='without a student'):
        eval_fid.student_of('run')


def test_metrics_have_their_definitions():
    g = np.random.default_rng(0)
    a = g.normal(size=(300, 5))
    b = g.normal(size=(200, 5)) * [1, 2, 3, 1, 1] + [0, 0, 0, 2, 0]
    real, fake = torch.tensor(a), torch.tensor(b)
    s1, s2 = torch.tensor([1., 4., 9.]).diag(), torch.tensor([4., 1., 1.]).diag()
    distance, _ = M.frechet_distance(torch.zeros(3), s1, torch.ones(3), s2)
    assert distance == pytest.approx(3 + 1 + 1 + 4, rel=1e-5)  # (sd1 - sd2)^2 summed
    logits = torch.eye(4).repeat_interleave(5, 0) * 100
    assert eval_fid.inception_score(logits) == pytest.approx(4)
    d = np.linalg.norm(a[:, None] - b[None], axis=2)
    assert np.allclose(torch.cat(list(eval_fid.distances(real, fake))), d, rtol=1e-12)
    radii = [np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), 1)[:, 3] for x in (a, b)]
    wanted = (d.T <= radii[0]).any(1).mean(), (d <= radii[1]).any(1).mean()
    assert eval_fid.precision_recall(real, fake) == wanted
    k_a, k_b, k_ab = ((x @ y.T / 5 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    off = ~np.eye(300, dtype=bool)
    wanted = k_a[off].mean() + k_b[off[:200, :200]].mean() - 2 * k_ab.mean()
    assert eval_fid.kid(real, fake) == pytest.approx(wanted)
    far = eval_fid.two_sample(real[:200], real[:200] + 100)
    assert far['1-NN'] == 1 and far['EMD'] == pytest.approx(100 * 5 ** 0.5)


def test_bench():
    sizes = ("""--student_config="{'model_channels':16,'num_res_blocks':1,'channel_mult':(1,2),"""
             """'num_head_channels':16,'attention_resolutions':(8,)}" """)
    args = f'bench.py {sizes} --batch_size=4 --repeats=1 --image_size=16'
    step = run(f'{args} --classes=3')
    assert '% of the peak' in step and 'GFLOP/s' in step


# ==== mistakes, and files that would run code ====
MISTAKES = lines("""
    dkdm.py --roh=0.4 : did you mean 'rho'
    dkdm.py --rho=many : rho is float
    dkdm.py --method=best : method is one of
    dkdm.py --rho : --key=value
    dkdm.py --batch_size 64 : --batch_size: overrides look like --key=value
    dkdm.py -rho=1.0 : --key=value
    dkdm.py --batch-size=4 : did you mean 'batch_size'
    dkdm.py --max_steps=0 : >= 1
    dkdm.py --teacher= : no file or folder
    dkdm.py --teacher=google/none : there is no folder google/none
    dkdm.py config/none.py : no config file
    dkdm.py wrong.py : rho is float
    dkdm.py --teacher=gone.safetensors : no file gone.safetensors
    dkdm.py --teacher=classifier.safetensors : is not a denoiser
    dkdm.py --teacher=teacher.safetensors --teacher_config.steps=50 : leave out steps
    dkdm.py --teacher=teacher.safetensors --guidance=2.0 : has no classes or texts
    dkdm.py --teacher=teacher.safetensors --stride=200 : T=100
    dkdm.py --teacher=teacher.safetensors --student_config.channels=3 : has no 'channels'
    dkdm.py --teacher=teacher.safetensors --student_config.patch_size=3 : patches of 3
    dkdm.py --teacher=teacher.safetensors --student=resnet8 : build()
    dkdm.py --teacher=teacher.safetensors --batch_size=9 --grad_accum=2 : multiple of
    few_steps.py --teacher=teacher.safetensors --jumps=3 : multiple of jumps
    few_steps.py --teacher=teacher.safetensors --jumps=2 --discriminator=0.5 : of one evaluation
    few_steps.py --teacher=teacher.safetensors --student_prediction=eps : one of 'x0'
    dkdm.py --teacher=teacher.safetensors --eval_every=2 --eval_reference=gone.npz : no file gone
    dkdm.py --method=iterative --grad_accum=2 : grad_accum must be 1
    dkdm.py --method=synthetic --synthetic.images=i.npz --data=i.npz:0-0 --synthetic.real_fraction=1 : only
    dkdm.py --synthetic.steps=many : synthetic.steps is
    dkdm.py --adamw.betas=0.5 : no entry 'betas'
    dkdm.py --method=data : needs images
    dkdm.py --method=data --data=nothing : no images at
    dkdm.py --method=data --data=flat.npz : N x H x W x C
    eval_fid.py --models=oblong.npz : must be square, they are 28x20
    dkdm.py --method=data --data=images.npz --lr=1e30 --grad_clip=0.0 --max_steps=40 : not finite
    synthesize.py --teacher=classifier.safetensors --keep=90 : need more than
    synthesize.py --teacher=classifier.safetensors --class_names=cifar10 : takes no text
    distill_classifier.py --data=images.npz --student=resnet9 --holdout=0 --batch_size=8 : resnet8
    distill_classifier.py --data=images.npz --teacher=classifier.safetensors --holdout=60 : fewer
    distill_classifier.py --method=data --data=images.npz:5-3 : must not be greater than b
    distill_vae.py --teacher=lvae.safetensors --student_config.depth=3 : has no 'depth'
    distill_vae.py --teacher=classifier.safetensors : is not a VAE
    distill_vae.py --beta=1e999 : not a finite number
    distill_classifier.py --method=data --data=images.npz:1-1 --holdout=0 --batch_size=8 : of one class
    eval_fid.py : nothing to measure
    eval_fid.py --models=images.npz --features=classifier.safetensors : in the feature space
    export.py --model=classes.safetensors --out_dir=o : patch_size""")


def test_a_mistake_is_one_line(tiny):
    Path('wrong.py').write_text('rho = "much"')
    np.savez('flat.npz', arr_0=plain(0))
    np.savez('i.npz', arr_0=np.zeros((20, 28, 28, 1), np.uint8), arr_1=np.arange(20) % 10)
    np.savez('oblong.npz', arr_0=np.zeros((20, 28, 20, 1), np.uint8))

    def one(line):
        command, _, message = line.partition(' : ')
        own = f'--out_dir=m{MISTAKES.index(line)}'  # some come as far as the lock
        said = run(f'{command} {own}', ok=False)
        return '' if message in said else f'{command}: {message!r} is not in {said}'
    wrong = list(filter(None, at_once(one, MISTAKES)))
    assert not wrong, '\n'.join(wrong)
    home = os.path.expanduser('~/gone.pt')
    assert home in run('dkdm.py --teacher=~/gone.pt', ok=False)
    for script in ('dkdm.py', 'eval_fid.py --models=images.npz'):
        assert 'out_dir=wrong.py: ' in run(f'{script} --out_dir=wrong.py', ok=False)
    Path('trained').mkdir()
    Path('trained/ckpt.pt').write_text('')
    assert 'training run' in run(
        'synthesize.py --teacher=classifier.safetensors --out_dir=trained', ok=False)


RANKS = lines("""
    dkdm.py --roh=0.4 : did you mean 'rho'
    dkdm.py --teacher=gone.safetensors : no file gone.safetensors
    few_steps.py --teacher=teacher.safetensors --batch_size=9 : multiple of 2 ranks
    synthesize.py --teacher=gone.pth : no file gone.pth
    distill_classifier.py --data=nowhere --teacher=classifier.safetensors : no images at
    distill_vae.py --teacher=classifier.safetensors : is not a VAE
    eval_fid.py --models=gone.safetensors : no file gone.safetensors
    dkdm.py --teacher=second.py : only the second""")


def test_a_mistake_is_one_line_on_two_ranks(tiny):
    """Before and after the ranks have met, and where only the second one refuses."""
    Path('second.py').write_text(
        'import os, models\ndef load():\n    if os.environ["RANK"] == "1":\n'
        '        raise models.UserError("only the second")\n    models.dist.barrier()\n')

    def one(line):
        command, _, message = line.partition(' : ')
        own = f'--out_dir=r{RANKS.index(line)}'
        assert message in run(f'{command} {own}', ranks=2, ok=False)
    at_once(one, RANKS)


def test_torchrun_shows_the_line(tiny, monkeypatch):
    command = f'-m torch.distributed.run --nproc_per_node=2 --master_port={free_port()} {ROOT}/dkdm.py'
    ended = subprocess.run([sys.executable, *command.split(), '--teacher=gone.safetensors'],
                           capture_output=True, text=True, timeout=200)
    said = [line for line in ended.stderr.splitlines() if line.startswith('dkdm.py: ')]
    assert ended.returncode and said == ['dkdm.py: no file gone.safetensors']
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(M.UserError, match='not RANK, MASTER_ADDR'):
        M.init_distributed()


def test_students_with_unused_parameters_on_two_ranks(users):
    Path('spare.py').write_text(MY_NET.replace('    def forward', '''        self.spare = nn.Linear(2, 2)

    def forward'''))
    run(f'{MINE} --student=spare.py --max_steps=2 --save_every=2 --out_dir=a', ranks=2)
    assert len(log('a')) == 2


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_no_file_runs_code(tiny, pipeline_models):
    mark = Marker(os.path.abspath('marker'))
    for name in ('a.pt', 'a.pth', 'a.ckpt', 'a.bin'):
        torch.save({'state_dict': {'weight': mark}}, name)
    for folder in ('run', 'shards'):
        os.makedirs(folder)
        torch.save(mark, f'{folder}/ckpt.pt')
        np.savez(f'{folder}/images_0000_00000.npz', arr_0=plain(0, (99, 16, 16, 1)),
                 settings=np.array([mark], dtype=object))
    Path('raw.pt').write_bytes(pickle.dumps(mark))
    np.savez('a.npz', arr_0=np.array([mark], dtype=object))
    np.savez('mu.npz', mu=np.array([mark], dtype=object))
    index = json.loads((pipeline_models / 'ddpm/model_index.json').read_text())
    changes = {'component': {'unet': ['net', 'Net']}, 'class': {'_class_name': ['net', 'Net']},
               'none': {}, 'scheduler': {'scheduler': ['net', 'Net']}, 'weights': {}}
    files = {'component': 'unet/net.py', 'none': 'None.py', 'scheduler': 'scheduler/net.py'}
    for name, change in changes.items():
        shutil.copytree(pipeline_models / 'ddpm', name)
        code = f'open({mark.path!r}, "w")\nclass Net: pass\n'
        Path(name, files.get(name, 'net.py')).write_text(code)
        Path(name, 'model_index.json').write_text(json.dumps(index | change))
    os.remove(glob.glob('weights/unet/*.safetensors')[0])
    torch.save(mark, 'weights/unet/diffusion_pytorch_model.bin')
    net = M.load_denoiser(str(pipeline_models / 'ddpm'))[0]
    M.save_model(net, 'vae.safetensors', M.Diffusion(), vae='component')
    M.save_model(net, 'of.safetensors', M.Diffusion(), pipeline='scheduler')
    teachers = [*changes, 'vae.safetensors', 'a.pt', 'a.ckpt', 'raw.pt']
    commands = [f'{DKDM} --teacher={name}' for name in teachers]
    commands += [f'{DKDM} --init_from=resume --out_dir=run', f'{DKDM} --method=data --data=a.npz',
                 f'{CLASSIFIER} --teacher=a.pth', f'{CLASSIFIER} --data=shards',
                 f'{VAE} --teacher=a.bin', f'{FID} --models=a.pt', f'{FID} --reference=mu.npz',
                 f'{FID} --models=images.npz --features=a.pth', f'{SYNTH} --out_dir=shards',
                 'export.py --model=of.safetensors']

    def exit_code(command):
        (process,), _ = start(command)
        process.join()
        return process.exitcode
    assert all(at_once(exit_code, commands)) and not os.path.exists('marker')


# ==== what the repository ships ====
def test_bundled_models():
    """The guided teacher draws the digits that it is asked for, as the bundled classifier sees."""
    net, diffusion = M.load_denoiser(f'{ROOT}/pretrained/mnist_classes.safetensors')
    classifier = M.load_classifier(f'{ROOT}/pretrained/mnist_resnet.safetensors')
    g, y = torch.Generator().manual_seed(0), torch.arange(40) % 10
    x = M.sample(net, diffusion, (40, 1, 28, 28), 8, 'ddim', y, 2., generator=g)
    assert (classifier(M.preprocess(classifier, x)).argmax(1) == y).float().mean() > 0.9


def check_setting(module, key, value, words=None):
    """What is wrong with a setting, '' for nothing. words: its text on a command line."""
    default = getattr(module, key, None)
    if type(default) not in (bool, int, float, str, tuple, dict) or key.isupper() and key != 'T':
        return f'{module.__name__} has no {key}'
    kinds = (int, float) if type(default) is float else type(default)
    if not isinstance(value, kinds):
        return f'{module.__name__}: {key}={value!r} is no {type(default).__name__}'
    if value not in getattr(module, '_ranges', {}).get(key, (value,)):
        return f'{module.__name__}: {key}={value!r} is none of its words'
    return ''


def check_command(script, rest):
    """What is wrong with the arguments of a script in a document."""
    module = SCRIPTS[script]
    rest = re.sub(r' #.*', '', rest).replace('...', '$').rstrip(' .,')
    if rest.count(')') > rest.count('('):
        rest = rest.rstrip(')')
    for word in shlex.split(rest):
        word = word.rstrip('.')
        key, equals, text = word.removeprefix('--').partition('=')
        key, _, entry = key.partition('.')
        if '$' in word:
            continue
        if word.endswith('.py') and not equals and not (ROOT / word).exists():
            yield f'{script}: no {word}'
        elif equals:
            value = text if type(getattr(module, key, '')) is str else ast.literal_eval(text)
            yield check_setting(module, key, {entry: value} if entry else value)


def documents():
    for path in [ROOT / 'README.md', *ROOT.glob('*/*.md'), *ROOT.glob('config/*.py')]:
        yield path, path.read_text()
    for module in MODULES:
        yield Path(module.__file__), module.__doc__


def test_documents_name_what_exists():
    """Commands of README, docs, configs and docstrings parse; files and links exist."""
    wrong, commands = [], 0
    command = r'(?:python|nproc_per_node=\S+|HOST:29500) (\w+\.py)((?: [^\n`|;&]*)?)'
    for path, text in documents():
        found = [f'no {link}' for link in re.findall(r'\]\(([^)#:]+)[)#]', text)
                 if not (path.parent / link).exists()]
        files = re.findall(r'(?<![\w/])(?:config|pretrained|assets|docs|adapters)/\w+\.\w+', text)
        found += [f'no {file}' for file in files if not (ROOT / file).exists()]
        for script, rest in re.findall(command, text.replace('\\\n', ' ')):
            if script in SCRIPTS:
                commands += 1
                found += check_command(script, rest)
        wrong += [f'{path.name}: {what}' for what in found if what]
    assert not wrong and commands > 40, '\n'.join(wrong)


def test_configs_parse():
    """Each config is one of a script that has all its settings."""
    for path in ROOT.glob('config/*.py'):
        values = {k: v for k, v in runpy.run_path(str(path)).items() if not k.startswith('_')}
        wrong = []
        for module in MODULES[:5]:
            problems = [check_setting(module, k, v) for k, v in values.items()]
            wrong.append('; '.join(filter(None, problems)))
        assert '' in wrong, f'{path.name}: {wrong}'
