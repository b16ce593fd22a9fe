"""
    python -m pytest -q

Everything on tiny sizes: the numbers of the original code, the algebra of one step, the pool, every method as a user
would start it, resuming, two ranks, bad input. The golden numbers below are what the original networks give when every
weight is set by a formula (`fill`).
"""
import copy
import csv
import fcntl
import glob
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import models as M

ROOT = os.path.dirname(os.path.abspath(__file__))


# ---- numbers of the original code ----
def fill(net):
    """Every weight by a formula in state_dict order."""
    for k, (name, w) in enumerate(net.state_dict().items()):
        i = torch.arange(w.numel(), dtype=torch.float64)
        if not w.is_floating_point():
            continue
        if name.endswith('running_var'):
            v = 1 + 0.5 * torch.sin(0.7 * i + k) ** 2
        elif name.endswith('running_mean'):
            v = 0.1 * torch.sin(0.7 * i + k)
        elif w.dim() >= 2:
            v = torch.sin(1.2345 * i + k) * (2 / (w.numel() / w.shape[0])) ** 0.5
        else:
            v = 1 + 0.1 * torch.sin(0.7 * i + k) if name.endswith('weight') else 0.1 * torch.sin(0.7 * i + k)
        w.copy_(v.view(w.shape))
    return net.eval()


def wave(*shape):
    return torch.sin(0.37 * torch.arange(np.prod(shape), dtype=torch.float64)).view(shape).float()


ADM = dict(image_size=32, out_channels=6, model_channels=32, num_res_blocks=1)
PLAIN = dict(model_channels=32, num_res_blocks=1, channel_mult=(1, 2), use_scale_shift_norm=False,
             resblock_updown=False, use_new_attention_order=False)
GOLDEN = [  # network, input, label, parameters, first outputs, mean
    (lambda: M.UNet(**ADM), (3, 3, 32, 32), None, 1965894,
     (-0.175411, -0.080837, -0.165378, -0.157294), 0.018044904741587844),
    (lambda: M.UNet(**ADM, num_classes=10), (3, 3, 32, 32), [0, 3, 9], 1967174,
     (-0.160568, -0.091217, 0.048817, -0.177207), 0.04107680574518705),
    (lambda: M.UNet(32, attention_resolutions=(16,), num_head_channels=-1, **PLAIN), (3, 3, 32, 32), None, 702499,
     (-0.167638, -0.077908, -0.250754, -0.173581), 0.0796254817400192),
    (lambda: M.UNet(8, attention_resolutions=(4,), **PLAIN), (3, 3, 8, 8), None, 702499,
     (0.163382, 0.089571, -0.001536, -0.05786), 0.07988159261812042),
    (lambda: M.DiT(8, hidden_size=64, depth=2, num_heads=4, num_classes=10), (3, 4, 8, 8), [1, 9, -1], 183200,
     (0.354121, -0.005, -0.0108, 0.288655), -0.007391353901463542),
    (lambda: M.classifier('wrn16_1'), (2, 3, 32, 32), None, 175066,
     (-0.043444, -0.02985, 0.102882, 0.064428), -0.003946275077760219),
    (lambda: M.classifier('wrn40_2'), (2, 3, 32, 32), None, 2243546,
     (-0.157957, -0.052412, 0.112491, 0.217914), -0.019979494251310827),
    (lambda: M.classifier('resnet18'), (2, 3, 32, 32), None, 11173962,
     (0.114946, 0.069646, 0.003063, -0.036003), 0.010119832120835781),
    (lambda: M.classifier('vgg11'), (2, 3, 32, 32), None, 9231114,
     (0.060497, 0.072384, 0.110402, 0.051044), 0.004731415584683418),
    (lambda: M.classifier('resnet8'), (2, 3, 32, 32), None, 78042,
     (-0.052322, -0.129495, 0.034725, 0.018425), -0.006213996186852455),
    (lambda: M.classifier('resnet20', shortcut='pad'), (2, 3, 32, 32), None, 269722,
     (0.234892, -0.043058, 0.01206, -0.031623), 0.01598758203908801)]


@pytest.mark.parametrize('make, shape, y, parameters, first, mean', GOLDEN)
@torch.no_grad()
def test_networks_agree_with_the_original(make, shape, y, parameters, first, mean):
    net = fill(make())
    args = (wave(*shape),) if net.config['class'] == 'classifier' else (
        wave(*shape), torch.tensor([0, 500, 999]), None if y is None else torch.tensor(y))
    out = net(*args)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert np.allclose(out.flatten()[:4], first, atol=5e-6) and abs(out.mean() - mean) < 1e-6
    rebuilt = M.make(**json.loads(json.dumps(net.config)))
    rebuilt.load_state_dict(net.state_dict())
    assert torch.equal(rebuilt.eval()(*args), out)


LADDERS = [  # width, parameters, first outputs, mean; first means and stds of the prior at the four lower levels
    (8, 30416, (-0.22766, -0.213583, -0.406722, -0.574531), 0.0157426645765059,
     ((0.899793, 1.9351), (0.40323, 0.420649), (0.38297, 0.2482), (0.036014, 0.060451)),
     ((3.40077, 2.328679), (0.996691, 0.988078), (0.683756, 0.783412), (1.149193, 1.189251))),
    (128, 5386496, (-0.073366, 0.026837, 0.468734, 0.441703), 0.004569795816109945,
     ((0.687407, 0.198185), (-0.024446, -0.030875), (-0.133654, 0.03659), (-0.021708, -0.022108)),
     ((0.6145, 0.65983), (1.005505, 0.990185), (1.073794, 1.017792), (1.016471, 1.025666)))]


@pytest.mark.parametrize('width, parameters, first, mean, p_means, p_stds', LADDERS)
@torch.no_grad()
def test_ladder_vaes_agree_with_the_original(width, parameters, first, mean, p_means, p_stds):
    net = fill(M.LVAE(width=width))
    out, p = net.generate([wave(2, 16, side, side) for side in (16, 8, 4, 2, 1)])
    assert sum(v.numel() for v in net.parameters()) == parameters and len(p) == 5
    assert np.allclose(out.flatten()[:4], first, atol=1e-6) and abs(out.mean() - mean) < 1e-6
    for (m, s), means, stds in zip(p, p_means, p_stds):
        assert np.allclose(m.flatten()[:2], means, atol=1e-6) and np.allclose(s.flatten()[:2], stds, atol=1e-6)
    assert torch.equal(p[4][0], torch.zeros(2, 16, 1, 1)) and torch.equal(p[4][1], torch.ones(2, 16, 1, 1))


@torch.no_grad()
def test_vae_losses_have_the_closed_form():
    from torch.distributions import Normal, kl_divergence
    g = torch.Generator().manual_seed(0)
    a, b = ((torch.randn(3, 2, 4, 4, generator=g), torch.rand(3, 2, 4, 4, generator=g) + 0.5) for _ in range(2))
    assert torch.allclose(M.gaussian_kl(a, b), kl_divergence(Normal(*a), Normal(*b)).sum((1, 2, 3)), rtol=1e-5)
    product = Normal(*a).log_prob(b[0]) + Normal(*b).log_prob(b[0]) - Normal(*a).log_prob(a[0]) - Normal(*b).log_prob(a[0])
    both = Normal(*M.combine(a, b))
    assert torch.allclose(both.log_prob(b[0]) - both.log_prob(a[0]), product, atol=1e-4)
    out_S, out_T = torch.rand(2, 3, 6, 8, 8, generator=g)
    kl = kl_divergence(Normal(out_T[:, :3], 0.05 ** 0.5), Normal(out_S[:, :3], 0.05 ** 0.5)).sum((1, 2, 3)).mean()
    source, names = open(os.path.join(ROOT, 'distill_vae.py')).read(), {'channels': 3, 'beta': 0.1}
    exec(source[source.index('def wasserstein'):source.index('def below_prior')], names)
    assert torch.allclose(names['output_kl'](out_S, out_T), kl, rtol=1e-5)
    assert torch.allclose(names['wasserstein'](a, b), ((a[0] - b[0]) ** 2).mean() + ((a[1] - b[1]) ** 2).mean())
    net, x = fill(M.LVAE(width=8)), torch.rand(2, 3, 32, 32, generator=g)
    noise = net.noise(2, g)
    nll, kls = net.elbo(x, noise, beta=0.1)
    out, q, p = net(x, noise)
    assert torch.allclose(nll, -Normal(out[:, :3], 0.05 ** 0.5).log_prob(x).sum((1, 2, 3)), rtol=1e-5)
    for kl, a, b in zip(kls, q, p):
        assert torch.allclose(kl, kl_divergence(Normal(*a), Normal(*b)).sum((1, 2, 3)), rtol=1e-4)
    assert [s for side in (28, 64) for s in M.LVAE(side, 1, 2).sides] == [28, 14, 7, 4, 2, 1, 64, 32, 16, 8, 4, 2, 1]
    with pytest.raises(ValueError, match=r'in \[0, 1\]'):
        net.encode(2 * x - 1)


def test_schedules_and_timesteps_agree_with_the_original():
    for schedule, expected in (('cosine', (0.999958715775178, 0.49228517244880304, 2.4287669070348567e-09)),
                               ('linear', (0.9999, 0.07779665836502389, 4.035829765375676e-05))):
        assert np.allclose(M.Diffusion(schedule).alpha_bar[[0, 500, 999]], expected, rtol=1e-12)
    assert M.sampling_steps(1000, 50, 'even')[::-1][:4] == [0, 20, 41, 61] and M.sampling_steps(1000, 50, 'even')[0] == 999
    assert M.sampling_steps(1000, 50, 'leading')[:2] == [980, 960]
    assert M.sampling_steps(1000, 4) == [999, 749, 499, 249] and M.sampling_steps(1000, 1) == [999]


@pytest.mark.parametrize('t, x, noise, eps, v, mean, logvar, x_prev', [  # one pixel at four timesteps
    (0, -0.7850218, -1.3022797, -0.1056963, -0.0671528, -0.7843589, -10.4360132, -0.7843589),
    (17, -0.4481776, -0.1350019, -0.1086891, -0.0475961, -0.4478559, -9.0415459, -0.4493248),
    (500, -1.5030838, 0.7347440, -0.0851547, -0.0784692, -1.5004717, -5.7602057, -1.4592313),
    (999, 0.0126738, -0.2756686, -0.0567257, -0.0377883, 0.0019577, -0.0010018, -0.2735729)])
def test_a_step_agrees_with_the_original(t, x, noise, eps, v, mean, logvar, x_prev):
    d, t = M.Diffusion('cosine'), torch.tensor([t])
    x, noise, out = torch.tensor(x).view(1, 1, 1, 1), torch.tensor(noise).view(1, 1, 1, 1), torch.tensor([eps, v]).view(1, 2, 1, 1)
    got = [*d.mean_logvar(out, x, t), d.ddpm_step(out, x, t, t - 1, noise)]
    assert np.allclose([g.item() for g in got], [mean, logvar, x_prev], rtol=1e-5, atol=1e-6)


# ---- the algebra of one step ----
def random_step(prediction='eps', C=1, schedule='cosine', clip=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    t = torch.tensor([1, 17, 500, 990])
    x0, noise = (torch.randn(4, C, 8, 8, generator=g).clamp(-1, 1) for _ in range(2))
    d = M.Diffusion(schedule, prediction=prediction, clip=clip)
    return d, x0, noise, t, d.q_sample(x0, t, noise)


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'sqrt_linear', 'flow'])
def test_predictions_agree_on_the_same_point(schedule):
    steps = {}
    for prediction in ('v', 'x0', 'flow') + (('eps',) if schedule != 'flow' else ()):
        d, x0, noise, t, x_t = random_step(prediction, schedule=schedule)
        out = d.target(x0, x_t, t, prediction)
        assert torch.allclose(d.predict_x0(out, x_t, t), x0, atol=2e-3)
        for to in ('eps', 'v', 'x0', 'flow'):
            assert torch.allclose(d.convert(out, x_t, t, to), d.target(x0, x_t, t, to), atol=2e-2)
        steps[prediction] = d.ddpm_step(out, x_t, t, t - 1, noise), d.ddim_step(out, x_t, t, t // 2)
    for ddpm, ddim in steps.values():
        assert torch.allclose(ddpm, steps['x0'][0], atol=2e-3) and torch.allclose(ddim, steps['x0'][1], atol=2e-3)


def test_one_step_has_the_closed_form():
    """Eqs. (5)-(7), (10), (12) written out with betas; a jump to -1 is the predicted clean image."""
    d, x0, noise, t, x_t = random_step('eps')
    v = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(4, 1, 8, 8)
    out = torch.cat([noise, v], dim=1)
    ab = d.alpha_bar
    ab_t, ab_s = (ab[k].view(-1, 1, 1, 1) for k in (t, t - 1))
    beta = 1 - ab_t / ab_s
    mean = (x_t - beta / (1 - ab_t).sqrt() * noise) / (1 - beta).sqrt()                       # Eq. (10)
    beta_tilde = (1 - ab_s) / (1 - ab_t) * beta                                               # Eq. (6)
    logvar = (v + 1) / 2 * beta.log() + (1 - v) / 2 * beta_tilde.log()                        # Eq. (12)
    got_mean, got_logvar = d.mean_logvar(out, x_t, t)
    assert torch.allclose(got_mean.double(), mean, atol=1e-4) and torch.allclose(got_logvar.double(), logvar, atol=1e-4)
    z = torch.randn(4, 1, 8, 8)
    assert torch.allclose(d.ddpm_step(out, x_t, t, t - 1, z).double(), mean + (logvar / 2).exp() * z, atol=1e-3)
    assert torch.allclose(d.ddpm_step(out, x_t, t, -1), d.predict_x0(out, x_t, t), atol=1e-4)
    s = torch.tensor([-1, 3, 250, 100])
    a, b = ab[s].view(-1, 1, 1, 1).sqrt(), (1 - ab[s]).view(-1, 1, 1, 1).sqrt()
    assert torch.allclose(d.ddim_step(out, x_t, t, s).double(), a * d.predict_x0(out, x_t, t) + b * noise, atol=1e-3)


def test_losses():
    d, x0, noise, t, x_t = random_step('eps', clip=True)
    teacher, student = torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8, requires_grad=True)
    same = d.distill_loss(teacher, teacher, x_t, t)
    assert same['mse'].max() == 0
    losses = d.distill_loss(student, teacher, x_t, t, lam=0.001)
    assert torch.allclose(losses['mse'], ((student - teacher)[:, :1] ** 2).mean((1, 2, 3)))
    losses['vb'].sum().backward()
    assert student.grad[:, :1].abs().max() == 0 and student.grad[:, 1:].abs().max() > 0       # the variance only
    assert losses['loss'].shape == (4,) and torch.allclose(losses['loss'], losses['mse'] + losses['vb'])
    perfect = d.training_loss(torch.cat([noise, torch.zeros_like(noise)], 1), x0, x_t, t, noise, 0.)
    assert perfect['loss'].max() == 0


def test_kl_of_the_original():
    """The original's KL at one pixel, computed by hand: bits, mean of the student neither clamped nor trained."""
    d = M.Diffusion('cosine')
    x, t = torch.full((1, 1, 1, 1), 0.3), torch.tensor([500])
    student, teacher = torch.tensor([0.2, 0.5]).view(1, 2, 1, 1), torch.tensor([0.1, -0.5]).view(1, 2, 1, 1)
    (m1, l1), (m2, l2) = d.mean_logvar(teacher, x, t), d.mean_logvar(student, x, t, clip=False)
    p, q = torch.distributions.Normal(m1, (l1 / 2).exp()), torch.distributions.Normal(m2, (l2 / 2).exp())
    kl = torch.distributions.kl_divergence(p, q).item() / np.log(2)
    assert abs(d.distill_loss(student, teacher, x, t, lam=0.001)['vb'].item() / kl - 1) < 1e-4


@torch.no_grad()
def test_frozen_weights_are_cast_once():
    for net, first in ((M.UNet(16, 1, 2, 16, 1, (1, 2), (8,), num_classes=3), 'input_blocks.0.0.weight'),
                       (M.DiT(16, 2, 1, 32, 2, 2, num_classes=3), 'x_embedder.proj.weight')):
        net = fill(net)
        args = torch.randn(2, 1, 16, 16), torch.tensor([3, 70]), torch.tensor([1, -1])
        with torch.autocast('cpu', torch.bfloat16):
            want = net(*args)
            M.cast_frozen(net, torch.bfloat16)
            assert torch.equal(net(*args), want)
        kinds = {k: v.dtype for k, v in net.state_dict().items()}
        assert kinds[first] == torch.float32 and torch.bfloat16 in kinds.values()


def test_a_step_takes_ints_and_tensors():
    d, x, out = M.Diffusion('cosine', 100), torch.randn(3, 1, 4, 4), torch.randn(3, 2, 4, 4)
    for t, s in ((99, 40), (1, 0), (0, -1)):
        tt, ss = torch.full((3,), t), torch.full((3,), s)
        assert torch.equal(d.ddpm_step(out, x, t, s, x), d.ddpm_step(out, x, tt, ss, x))
        assert torch.equal(d.ddim_step(out, x, t, s, 0.5, x), d.ddim_step(out, x, tt, ss, 0.5, x))


@pytest.mark.parametrize('sampler', ['ddpm', 'ddim', 'dpm++'])
@pytest.mark.parametrize('schedule', ['cosine', 'flow'])
def test_samplers_reach_the_data(sampler, schedule):
    """A network that knows the answer: data is one image, so every sampler must end there."""
    x0, d = wave(1, 1, 8, 8), M.Diffusion(schedule, prediction='v')

    class Oracle(torch.nn.Linear):
        def forward(self, x, t, y=None):
            return d.target(x0.expand_as(x), x, t, 'v')
    out = M.sample(Oracle(1, 1), d, (2, 1, 8, 8), 20, sampler, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(out, x0.expand_as(out), atol=1e-2)


def test_guidance():
    net = fill(M.DiT(8, hidden_size=64, depth=2, num_heads=4, num_classes=10))
    x, t, y = wave(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 9])
    with torch.no_grad():
        cond, null, got = net(x, t, y), net(x, t), M.guided(net, x, t, y, 3.)
    assert torch.allclose(got[:, :4], null[:, :4] + 3 * (cond - null)[:, :4], atol=1e-4)
    assert torch.allclose(got[:, 4:], cond[:, 4:], atol=1e-5)


# ---- files ----
UNETS = [dict(image_size=32, **{k: v for k, v in ADM.items() if k != 'image_size'}), dict(image_size=32, num_classes=10,
         attention_resolutions=(8,), model_channels=32, num_res_blocks=2, channel_mult=(1, 2, 3), out_channels=6),
         dict(image_size=64, attention_resolutions=(32,), **PLAIN)]


@pytest.mark.parametrize('config', UNETS)
def test_original_unets_load_by_their_shapes(config, tmp_path):
    net = fill(M.UNet(**config))
    torch.save(net.state_dict(), tmp_path / 'adm.pt')
    known = {k: config[k] for k in ('image_size', 'use_new_attention_order') if k in config}
    loaded, diffusion = M.load_denoiser(str(tmp_path / 'adm.pt'), **known)
    assert {k: v for k, v in loaded.config.items()} == {k: v for k, v in net.config.items()}
    assert diffusion.learn_sigma == (config.get('out_channels', 3) == 6) and diffusion.prediction == 'eps'


def test_ldm_and_dit_checkpoints(tmp_path):
    net = fill(M.UNet(64, attention_resolutions=(32,), **PLAIN))
    betas = np.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000) ** 2
    state = {'model.diffusion_model.' + k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    state |= {'model_ema.diffusion_model' + k.replace('.', ''): v for k, v in net.state_dict().items()}
    torch.save({'state_dict': state | {'betas': torch.tensor(betas), 'first_stage_model.x': torch.zeros(1)}}, tmp_path / 'ldm.ckpt')
    loaded, d = M.load_denoiser(str(tmp_path / 'ldm.ckpt'))
    assert loaded.config == net.config and torch.equal(loaded.out[2].weight, net.out[2].weight) and not d.clip
    assert np.allclose(d.alpha_bar[:-1], M.Diffusion('sqrt_linear', beta_range=(0.0015, 0.0195)).alpha_bar[:-1])
    dit = fill(M.DiT(8, hidden_size=64, depth=2, num_heads=4, num_classes=10))
    torch.save({'ema': dit.state_dict()}, tmp_path / 'dit.pt')
    loaded, d = M.load_denoiser(str(tmp_path / 'dit.pt'), num_heads=4)
    assert loaded.config == dit.config and d.learn_sigma


def test_own_files_describe_themselves(tmp_path):
    net, d = fill(M.UNet(28, 1, 2, 20, 1, (1, 2), (7,), num_head_channels=20, patch_size=2)), M.Diffusion('linear', 100, 'v')
    M.save_model(net, str(tmp_path / 'a.safetensors'), d)
    loaded, d2 = M.load_denoiser(str(tmp_path / 'a.safetensors'))
    assert [d2.config, loaded.config] == json.loads(json.dumps([d.config, net.config]))
    x, t = wave(2, 1, 28, 28), torch.tensor([3, 70])
    assert torch.equal(loaded(x, t), net(x, t)) and os.listdir(tmp_path) == ['a.safetensors']
    clf = fill(M.classifier('resnet8', 7, image_size=28, in_channels=1, width=8))
    M.save_model(clf, str(tmp_path / 'c.safetensors'))
    assert torch.equal(M.load_classifier(str(tmp_path / 'c.safetensors'))(x), clf(x))


def test_published_cifar_resnets_load(tmp_path):
    net = fill(M.classifier('resnet20', shortcut='pad'))
    state = {'module.' + k.replace('fc.', 'linear.'): v for k, v in net.state_dict().items()}
    torch.save({'state_dict': state, 'best_prec1': 91.7}, tmp_path / 'r.th')
    loaded = M.load_classifier(str(tmp_path / 'r.th'))
    assert torch.equal(loaded(wave(2, 3, 32, 32)), net(wave(2, 3, 32, 32))) and loaded.config['mean'][0] == 0.485


def test_images_of_every_kind(tmp_path):
    from PIL import Image
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / 'a.npz', arr_0=pixels, arr_1=np.arange(6))
    images, labels = M.load_images(str(tmp_path / 'a.npz'))
    assert images.shape == (6, 3, 8, 8) and torch.equal(images[2].permute(1, 2, 0), torch.tensor(pixels[2]))
    for i, p in enumerate(pixels):
        os.makedirs(tmp_path / 'classes' / str(i % 2), exist_ok=True)
        os.makedirs(tmp_path / 'flat', exist_ok=True)
        for folder in (tmp_path / 'classes' / str(i % 2), tmp_path / 'flat'):
            Image.fromarray(p).save(folder / f'{i}.png')
    classes, flat = M.load_images(str(tmp_path / 'classes')), M.load_images(str(tmp_path / 'flat'))
    assert classes[1].tolist() == [0, 0, 0, 1, 1, 1] and torch.equal(classes[0][1], images[2])
    assert flat[1] is None and torch.equal(flat[0], images)
    os.makedirs(tmp_path / 'shards')
    for i in range(2):
        np.savez(tmp_path / 'shards' / f'images_0000_{i:05d}.npz', arr_0=pixels[i::2])
    assert M.load_images(str(tmp_path / 'shards'))[0].shape == (6, 3, 8, 8)
    chosen, labels = M.load_images(f'{tmp_path}/a.npz:2-4')                    # classes keep their numbers
    assert torch.equal(chosen, images[2:5]) and labels.tolist() == [2, 3, 4]
    assert M.load_images(f'{tmp_path}/classes:1-1')[1].tolist() == [1] * 3
    with pytest.raises(ValueError, match='no labels'):
        M.load_images(f'{tmp_path}/shards:0-1')


def test_images_of_any_size(tmp_path):
    """DomainNet's lists of files, and Tiny-ImageNet's val, whose classes are numbered as the folders of train."""
    from PIL import Image
    os.makedirs(tmp_path / 'clipart/arm')
    for i, (w, h) in enumerate(((20, 12), (12, 30), (9, 9))):
        picture = np.zeros((h, w, 3), np.uint8)
        picture[(h - min(w, h)) // 2:, (w - min(w, h)) // 2:][:min(w, h), :min(w, h)] = 200     # the square in the middle is what is kept
        Image.fromarray(picture).save(tmp_path / f'clipart/arm/{i}.png')
    (tmp_path / 'clipart_train.txt').write_text(''.join(f'clipart/arm/{i}.png {9 + i}\n' for i in range(3)))
    images, labels = M.load_images(f'{tmp_path}/clipart_train.txt:0-10', image_size=8)
    assert images.shape == (2, 3, 8, 8) and (images == 200).all() and labels.tolist() == [9, 10]
    with pytest.raises(ValueError, match='differ in size'):
        M.load_images(f'{tmp_path}/clipart_train.txt')
    os.makedirs(tmp_path / 'val/images')
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f'val/images/val_{i}.png')
    (tmp_path / 'val/val_annotations.txt').write_text(''.join(f'val_{i}.png\tn{9 - i // 2}\t0\t0\t7\t7\n' for i in range(3)))
    images, labels = M.load_images(f'{tmp_path}/val')
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2] and labels.tolist() == [1, 1, 0]


# ---- the scripts, as a user starts them ----
# torch and diffusers take seconds to import: a server imports them once, and every run is a child that it forks
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['models', 'scipy.optimize', 'tqdm', 'torchvision', 'diffusers.pipelines', 'pytest'])
STARTING = threading.Lock()
os.environ.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1')


def script(args, cwd, outputs, env=()):
    """A child's work: the script's file run as the main program, stdout and stderr into two files."""
    os.environ.update(env)
    for fd, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    sys.argv = [os.path.join(ROOT, args[0]), *args[1:]]
    runpy.run_path(sys.argv[0], run_name='__main__')


def run(*args, cwd, ranks=0, ok=True, env=None):
    """Output of a script; with `ranks`, under torchrun. A failed run must be one line on stderr and exit code 2."""
    args = [*map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ('out', 'err')]
        if ranks or env:
            launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks else []
            with open(outputs[0], 'w') as out, open(outputs[1], 'w') as err:
                code = subprocess.call([sys.executable, *launch, os.path.join(ROOT, args[0]), *args[1:]], cwd=cwd, stdout=out, stderr=err,
                                       env={**os.environ, **(env or {})})
        else:
            with STARTING:
                p = SERVER.Process(target=script, args=(args, cwd, outputs))
                p.start()
                multiprocessing.process._children.discard(p)                   # two threads may not ask for one exit code
            p.join()
            code = p.exitcode
        out, err = (open(path).read() for path in outputs)
    if ok:
        assert code == 0, err[-3000:]
        return out
    lines = [line for line in err.splitlines() if line.strip() and '%|' not in line]          # all but progress bars
    assert code == 2 and len(lines) == 1, err[-3000:]
    return lines[0]


def at_once(fn, cases):
    """Two runs at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(fn, cases))


SMALL = ['--model_channels=8', '--num_head_channels=8', '--channel_mult=(1,1)', '--attention_resolutions=(4,)',
         '--batch_size=8', '--max_steps=6', '--save_every=2', '--log_every=1', '--sample_steps=2']


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """A folder with tiny teachers (with and without classes), a classifier and images."""
    folder = tmp_path_factory.mktemp('tiny')
    torch.manual_seed(0)
    kw = dict(image_size=16, in_channels=1, out_channels=2, model_channels=16, num_res_blocks=1, channel_mult=(1, 2),
              attention_resolutions=(4,), num_head_channels=16, patch_size=2)
    for name, classes in (('teacher', 0), ('classes', 4)):
        net = M.UNet(**kw, num_classes=classes)
        torch.nn.init.normal_(net.out[2].weight, std=0.02)
        M.save_model(net, str(folder / f'{name}.safetensors'), M.Diffusion('cosine', 100, 'v'))
    M.save_model(M.classifier('resnet8', 4, image_size=16, in_channels=1, width=4), str(folder / 'classifier.safetensors'))
    M.save_model(M.LVAE(16, 1, 8), str(folder / 'lvae.safetensors'))
    labels = np.arange(64) % 4
    pixels = (np.random.default_rng(0).random((64, 16, 16, 1)) * 60 + 60 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(folder / 'images.npz', arr_0=pixels, arr_1=labels)
    return folder


def losses(folder):
    rows = np.genfromtxt(os.path.join(folder, 'log.csv'), delimiter=',', names=True)
    return rows['loss']


METHODS = [
    ['--method=dynamic', '--stride=10', '--pool_dtype=float16'], ['--method=dynamic', '--stride=1', '--rho=0.02'],
    ['--method=shuffled', '--stride=10', '--grad_accum=2'], ['--method=iterative', '--stride=10'],
    ['--method=synthetic', '--synthetic_images=16', '--synthetic_steps=3', '--real_fraction=0.25', '--data=images.npz'],
    ['--method=synthetic', '--synthetic=images.npz', '--student_prediction=teacher'],
    ['--method=data', '--data=images.npz', '--class_cond=True', '--uncond_prob=0.2', '--flip=True', '--T=50'],
    ['--student=dit', '--hidden_size=16', '--depth=1', '--num_heads=2', '--student_prediction=eps', '--stride=10'],
    ['--teacher=classes.safetensors', '--guidance=2.0', '--uncond_prob=0.1', '--stride=10', '--student_prediction=flow']]


def test_every_method(tiny, tmp_path):
    def one(i):
        out_dir = tmp_path / str(i)
        out = run('dkdm.py', '--teacher=teacher.safetensors', *SMALL, *METHODS[i], f'--out_dir={out_dir}', cwd=tiny)
        assert f'{out_dir}/student.safetensors' in out and 'eval_fid.py' in out
        assert len(losses(out_dir)) == 6 and np.isfinite(losses(out_dir)).all()
        net, _ = M.load_denoiser(f'{out_dir}/student.safetensors')
        assert net.num_classes == (4 if 'classes' in str(METHODS[i]) or 'class_cond' in str(METHODS[i]) else 0)
        assert os.path.getsize(out_dir / 'samples.png') > 0
        assert not [f for f in os.listdir(out_dir) if f.startswith('.tmp')]
    at_once(one, range(len(METHODS)))


def test_the_pool_stays_uniform_and_finished_images_leave(tiny, tmp_path):
    run('dkdm.py', '--teacher=teacher.safetensors', *SMALL, '--rho=4.0', '--stride=5', '--max_steps=200', '--batch_size=32',
        '--save_every=200', f'--out_dir={tmp_path}', cwd=tiny)
    _, own = M.load_checkpoint(str(tmp_path), 0)
    pool_x, pool_t, _ = own['pool']
    assert len(pool_t) == round(4 * 100 / 5) * 32 and pool_t.min() >= 0 and pool_t.max() <= 99
    counts = torch.histc(pool_t.float(), 5, 0, 99.99)
    assert (counts / len(pool_t) - 0.2).abs().max() < 0.06, counts
    fresh = pool_x[pool_t == 99]                                               # entered since: standard noise
    assert len(fresh) > 50 and abs(fresh.mean()) < 0.05 and abs(fresh.std() - 1) < 0.05
    assert pool_x[pool_t < 10].std() != pytest.approx(1, abs=0.02)


def test_a_student_learns(tiny, tmp_path):
    run('dkdm.py', '--teacher=teacher.safetensors', *SMALL, '--stride=10', '--max_steps=150', '--save_every=150', '--lr=5e-3',
        '--batch_size=32', f'--out_dir={tmp_path}', cwd=tiny)
    assert losses(tmp_path)[-10:].mean() < 0.5 * losses(tmp_path)[:5].mean()


DKDM_RUN = ['dkdm.py', '--teacher=teacher.safetensors', *SMALL, '--stride=10', '--dropout=0.1', '--max_steps=30']
CLASSIFIER_RUN = ['distill_classifier.py', '--data=images.npz', '--teacher=classifier.safetensors', '--student=resnet8', '--width=4',
                  '--epochs=8', '--batch_size=16', '--holdout=8', '--augment_flip=True']


VAE = ['distill_vae.py', '--teacher=lvae.safetensors', "--student_config={'width': 4}", '--batch_size=8', '--max_steps=6', '--log_every=1']
VAE_RUN = [*VAE, '--method=synthetic', '--data=images.npz', '--flip=True', '--max_steps=30', '--save_every=2']


@pytest.mark.parametrize('args, ranks', [(DKDM_RUN, 2)])                          # the others: at ten moments, below
def test_killed_and_resumed_is_bit_for_bit(args, ranks, tiny, tmp_path):
    run(*args, f'--out_dir={tmp_path}/whole', cwd=tiny, ranks=ranks)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks else [sys.executable]
    p = subprocess.Popen([*launch, os.path.join(ROOT, args[0]), *args[1:], f'--out_dir={tmp_path}/cut'], cwd=tiny, start_new_session=True,
                         stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    ckpt = str(tmp_path / 'cut/ckpt.pt')
    while not (os.path.exists(ckpt) and M.read_weights(ckpt)[0]['step']):
        assert p.poll() is None
        time.sleep(0.01)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    with open(tmp_path / 'cut/.lock') as f:                                    # torchrun's ranks outlive it for a moment
        fcntl.flock(f, fcntl.LOCK_EX)
    run(*args, f'--out_dir={tmp_path}/cut', '--init_from=resume', cwd=tiny, ranks=ranks)
    whole, cut = (load_file(tmp_path / d / 'student.safetensors') for d in ('whole', 'cut'))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert np.array_equal(losses(tmp_path / 'whole'), losses(tmp_path / 'cut'))


def forked(args, cwd, folder, ranks):
    """The ranks of a run that were forked from the server, without torchrun."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        env = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(s.getsockname()[1]), 'WORLD_SIZE': str(ranks)}
    every = []
    for r in range(max(1, ranks)):
        outputs = [os.path.join(folder, f'{name}{r}') for name in ('out', 'err')]
        for path in outputs:
            if os.path.exists(path):
                os.remove(path)
        mine = env | {'RANK': str(r), 'LOCAL_RANK': str(r)} if ranks else {}
        every.append(SERVER.Process(target=script, args=([*map(str, args)], cwd, outputs, mine)))
        every[-1].start()
    while not os.path.exists(outputs[-1]):                                     # the script begins
        time.sleep(0.01)
    return every


def rows(folder):
    """log.csv without its times."""
    with open(os.path.join(folder, 'log.csv'), newline='') as f:
        return [{k: v for k, v in r.items() if k not in ('seconds', 'images_per_s')} for r in csv.DictReader(f)]


KILLED = [[*DKDM_RUN, '--max_steps=14', '--log_every=4', '--save_every=3'],
          [*CLASSIFIER_RUN, '--epochs=4', '--batch_size=8'],
          [*VAE_RUN, '--max_steps=14', '--log_every=4', '--save_every=3'],
          ['synthesize.py', '--prior=teacher.safetensors', '--teacher=classifier.safetensors', '--batch_size=4', '--steps=4',
           '--lca_every=2', '--keep=2', '--keep_every=1', '--num_images=48']]


@pytest.mark.parametrize('args, ranks', [(args, ranks) for args in KILLED for ranks in (0, 2)])
def test_ended_at_ten_moments(args, ranks, tiny, tmp_path):
    """By SIGKILL, SIGTERM or SIGINT, the same command again each time: in the end all files are what they are without that."""
    moments, ended = random.Random(f'{args[0]} {ranks}'), 0
    args = args + ['--init_from=resume'] * (args[0] != 'synthesize.py')

    def start_and_end(folder, after=60.):
        every = forked([*args, f'--out_dir={tmp_path}/{folder}'], tiny, tmp_path, ranks)
        number, t0 = moments.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]), time.time()
        every[0].join(after)
        for p in [p for p in every if p.is_alive()]:
            os.kill(p.pid, number)
        for p in every:
            p.join(60)
        err = open(tmp_path / 'err0').read()
        # two ranks before their loop die of the signal, and one by the end of the other
        assert {p.exitcode for p in every} <= {0, -9, 128 + number} | ({-number, 1} if ranks else set()), err
        assert ranks or 'Traceback' not in err
        return any(p.exitcode for p in every), time.time() - t0

    failed, seconds = start_and_end('whole')
    names = sorted(os.listdir(tmp_path / 'whole'))
    assert not failed
    for i in range(11):
        if start_and_end('cut', moments.uniform(0.1, 0.9) * seconds if i < 10 else 60)[0]:
            ended += 1
            continue
        assert names == sorted(os.listdir(tmp_path / 'cut')) and rows(tmp_path / 'whole') == rows(tmp_path / 'cut')
        for name in set(names) - {'log.csv', '.lock'}:
            whole, cut = (str(tmp_path / d / name) for d in ('whole', 'cut'))
            if name.endswith('.pt'):
                assert M.read_weights(whole)[0]['digest'] == M.read_weights(cut)[0]['digest']
            else:
                assert open(whole, 'rb').read() == open(cut, 'rb').read(), name
        shutil.rmtree(tmp_path / 'cut')
    assert ended


def test_resuming_means_the_same_run(tiny, tmp_path):
    args = [*DKDM_RUN, '--max_steps=4', f'--out_dir={tmp_path}/a']
    assert 'no checkpoint yet' in run(*args, '--init_from=resume', cwd=tiny)
    run(*args, '--init_from=resume', '--max_steps=6', '--log_every=2', cwd=tiny)
    for setting in ('--lr=0.001', '--seed=1', '--stride=20', '--beta2=0.9'):
        assert setting[2:].split('=')[0] + '=' in run(*args, '--init_from=resume', setting, cwd=tiny, ok=False)
    shutil.copy(tmp_path / 'a/student.safetensors', tmp_path / 'teacher.safetensors')      # the same name, another network
    assert 'teacher_digest=' in run(*args, '--init_from=resume', cwd=tmp_path, ok=False)
    for p in forked([*args, '--init_from=resume'], tiny, tmp_path, 2):
        p.join()
    assert 'ranks=1, not 2' in open(tmp_path / 'err0').read()
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    run(*args, '--seed=1', '--max_steps=6', cwd=tiny)                          # another run, whose rank's file is put among these
    shutil.copy(tmp_path / 'a/ckpt_6_rank0.pt', tmp_path / 'b')
    args[-1] = f'--out_dir={tmp_path}/b'
    assert 'different runs' in run(*args, '--init_from=resume', cwd=tiny, ok=False)
    data = bytearray((tmp_path / 'b/ckpt.pt').read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / 'b/ckpt.pt').write_bytes(data)
    assert 'damaged' in run(*args, '--init_from=resume', cwd=tiny, ok=False)
    with open(tmp_path / 'a/log.csv', 'a') as f:
        f.write('x,1\n')
    args[-1] = f'--out_dir={tmp_path}/a'
    assert 'log.csv is damaged' in run(*args, '--init_from=resume', '--seed=1', cwd=tiny, ok=False)
    p, = forked([*args, '--max_steps=100000'], tiny, tmp_path, 0)              # from scratch: the old checkpoint is gone ...
    while not (os.path.getsize(tmp_path / 'a/log.csv') and 'is removed' in open(tmp_path / 'out0').read()):
        assert p.is_alive()
        time.sleep(0.02)
    assert f'process {p.pid} on' in run(*args, cwd=tiny, ok=False)             # ... and the folder has one run
    p.kill()
    p.join()


def test_when_to_stop(tiny, tmp_path):
    stats = f'{tmp_path}/stats.npz'                                            # of the teacher's own samples: no data
    run('eval_fid.py', '--reference=teacher.safetensors', '--features=classifier.safetensors', f'--save_stats={stats}', '--steps=2',
        '--num_samples=40', cwd=tiny)
    args = ['dkdm.py', '--teacher=teacher.safetensors', *SMALL, '--eval_every=2', f'--eval_reference={stats}',
            '--eval_features=classifier.safetensors', '--stride=10', '--lr_decay=False']
    run(*args, '--max_steps=6', f'--out_dir={tmp_path}/whole', cwd=tiny)
    run(*args, '--max_steps=4', f'--out_dir={tmp_path}/cut', cwd=tiny)
    seconds = float(list(csv.DictReader(open(tmp_path / 'cut/log.csv')))[-1]['seconds'])
    run(*args, '--max_steps=6', f'--out_dir={tmp_path}/cut', '--init_from=resume', cwd=tiny)
    found = [r['frechet'] for r in csv.DictReader(open(tmp_path / 'whole/log.csv'))]
    assert [bool(f) for f in found] == [False, True] * 3 and found == [r['frechet'] for r in csv.DictReader(open(tmp_path / 'cut/log.csv'))]
    assert float(list(csv.DictReader(open(tmp_path / 'cut/log.csv')))[-1]['seconds']) > seconds
    best = [(tmp_path / d / 'best.safetensors').read_bytes() for d in ('whole', 'cut')]
    last = (tmp_path / 'whole/student.safetensors').read_bytes()
    assert best[0] == best[1] and (best[0] == last) == (float(found[5]) == min(float(f) for f in found if f))
    run(*args, '--max_steps=2', '--lr=0.0', f'--init_from={tmp_path}/whole/student.safetensors', f'--out_dir={tmp_path}/on', cwd=tiny)
    on, whole = (load_file(tmp_path / d / 'student.safetensors') for d in ('on', 'whole'))
    assert all(torch.allclose(on[k], whole[k]) for k in whole)                 # a student that goes on


def test_torchrun_restarts_a_job_that_goes_on(tiny, tmp_path):
    for p in forked([*DKDM_RUN, f'--out_dir={tmp_path}/whole'], tiny, tmp_path, 2):
        p.join()
    p = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=1',
                          os.path.join(ROOT, DKDM_RUN[0]), *DKDM_RUN[1:], f'--out_dir={tmp_path}/cut'], cwd=tiny,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (os.path.exists(tmp_path / 'cut/ckpt.pt') and M.read_weights(str(tmp_path / 'cut/ckpt.pt'))[0]['step']):
        assert p.poll() is None
        time.sleep(0.01)
    inode = os.stat(tmp_path / 'cut/log.csv').st_ino
    os.kill(int(open(tmp_path / 'cut/.lock').read().split()[1]), signal.SIGKILL)           # rank 0 alone
    assert p.wait(120) == 0 and os.stat(tmp_path / 'cut/log.csv').st_ino != inode
    assert rows(tmp_path / 'whole') == rows(tmp_path / 'cut')
    assert (tmp_path / 'whole/student.safetensors').read_bytes() == (tmp_path / 'cut/student.safetensors').read_bytes()


def test_sigterm_saves_before_leaving(tiny, tmp_path):
    p = subprocess.Popen([sys.executable, os.path.join(ROOT, 'dkdm.py'), '--teacher=teacher.safetensors', *SMALL, '--max_steps=100000',
                          '--save_every=100000', f'--out_dir={tmp_path}'], cwd=tiny, stderr=subprocess.DEVNULL)
    while not (os.path.exists(tmp_path / 'log.csv') and os.path.getsize(tmp_path / 'log.csv') > 200):
        assert p.poll() is None
        time.sleep(0.05)
    p.terminate()
    assert p.wait(60) == 143 and os.path.exists(tmp_path / 'ckpt.pt') and os.path.exists(tmp_path / 'student.safetensors')


def test_two_ranks_share_the_pool_and_agree(tiny, tmp_path):
    run('dkdm.py', '--teacher=teacher.safetensors', *SMALL, '--stride=10', '--rho=0.4', f'--out_dir={tmp_path}', cwd=tiny, ranks=2)
    pools = [M.load_checkpoint(str(tmp_path), r)[1]['pool'] for r in range(2)]
    assert all(len(p[1]) == 4 * 8 // 2 for p in pools) and not torch.equal(pools[0][0], pools[1][0])
    digests = [M.load_checkpoint(str(tmp_path), r)[1]['weights'] for r in range(2)]
    assert digests[0] == digests[1]


def test_two_nodes(tiny, tmp_path):
    args = [os.path.join(ROOT, 'dkdm.py'), '--teacher=teacher.safetensors', *SMALL, '--stride=10', f'--out_dir={tmp_path}']
    nodes = [subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d',
                               '--rdzv_endpoint=localhost:29533', *args], cwd=tiny,
                              stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait(120) for p in nodes] == [0, 0]
    assert len({M.load_checkpoint(str(tmp_path), r)[1]['weights'] for r in range(2)}) == 1 and len(losses(tmp_path)) == 6


def test_classifier_and_frechet_distance(tiny, tmp_path):
    args = ['distill_classifier.py', '--method=data', '--data=images.npz', '--test=images.npz', '--student=resnet8', '--width=4',
            '--epochs=3', '--batch_size=16', '--holdout=0', f'--out_dir={tmp_path}/c']
    out = run(*args, cwd=tiny)
    assert 'test_accuracy' in out and M.load_classifier(f'{tmp_path}/c/student.safetensors').config['num_classes'] == 4
    common = ['eval_fid.py', '--features=classifier.safetensors', '--num_samples=64', '--steps=2', '--batch_size=8', '--n_two_sample=32']
    run(*common, '--reference=images.npz', f'--save_stats={tmp_path}/stats.npz', cwd=tiny)
    out = run(*common, f'--reference={tmp_path}/stats.npz', '--models=images.npz,teacher.safetensors', f'--out_dir={tmp_path}/e', cwd=tiny)
    assert out.splitlines()[-2].split()[0] == 'images.npz' and 'FID' not in out
    same, sampled = metrics(tmp_path / 'e')
    assert abs(same['Frechet']) < 1e-6 < 1e-3 < sampled['Frechet'] and 'KID' not in same
    assert sampled['parameters'] > 0 and sampled['MFLOPs'] > 0 and sampled['sampler'] == 'ddim' and sampled['features'].startswith('classifier')
    assert sorted(os.listdir(tmp_path / 'e')) == ['images.png', 'metrics.jsonl', 'teacher.png']


def metrics(folder):
    with open(os.path.join(folder, 'metrics.jsonl')) as f:
        return [json.loads(line) for line in f]


def test_a_number_does_not_depend_on_the_ranks(tiny, tmp_path):
    args = ['eval_fid.py', '--features=classifier.safetensors', '--reference=images.npz', '--models=images.npz,classes.safetensors',
            '--num_samples=52', '--steps=3', '--batch_size=8', '--n_two_sample=32', '--spacing=even']
    run(*args, f'--out_dir={tmp_path}/1', cwd=tiny)
    run(*args, f'--out_dir={tmp_path}/2', cwd=tiny, ranks=2)
    for one, two in zip(metrics(tmp_path / '1'), metrics(tmp_path / '2')):
        for k in ('Frechet', 'score', 'precision', 'recall', 'KID', 'EMD', 'MMD', '1-NN'):
            assert one[k] == pytest.approx(two[k], rel=1e-6, abs=1e-9), k
    assert metrics(tmp_path / '1')[1]['agreement'] == metrics(tmp_path / '2')[1]['agreement']
    same, sampled = metrics(tmp_path / '1')
    assert sampled['spacing'] == 'even' and sampled['batch_size'] == same['batch_size'] == 8 and 'spacing' not in same
    assert same['precision'] == 1 and max(same['EMD'], same['MMD']) < 1e-6 < sampled['EMD']


def test_metrics_have_their_definitions():
    source = open(os.path.join(ROOT, 'eval_fid.py')).read()
    names = {'frechet_distance': M.frechet_distance}
    exec('\n'.join(line for line in source.splitlines() if line.startswith(('import ', 'from ')) and 'models' not in line), names)
    exec(source[source.index('NEIGHBOURS ='):source.index('# ---- check everything')], names)
    def measured(name, *arrays):
        return names[name](*map(torch.tensor, arrays))
    g = np.random.default_rng(0)
    a, b = g.normal(size=(300, 5)), g.normal(size=(200, 5)) * [1, 2, 3, 1, 1] + [0, 0, 0, 2, 0]
    s1, s2 = np.diag([1., 4., 9.]), np.diag([4., 1., 1.])
    distance, _ = measured('frechet_distance', np.zeros(3), s1, np.ones(3), s2)
    assert distance == pytest.approx(3 + 1 + 1 + 4)                            # (sd1 - sd2)^2 summed
    assert measured('frechet_distance', np.zeros(3), s1, np.zeros(3), np.diag([1., 1., 0.]))[1]               # singular
    assert measured('inception_score', np.eye(4).repeat(5, 0) * 100) == pytest.approx(4)
    d = np.linalg.norm(a[:, None] - b[None], axis=2)
    ball_a, ball_b = (np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), 1)[:, 3] for x in (a, b))
    assert np.allclose(torch.cat(list(names['distances'](*map(torch.tensor, (a, b))))), d, rtol=1e-12)
    assert measured('precision_recall', a, b) == [(d.T <= ball_a).any(1).mean(), (d <= ball_b).any(1).mean()]
    k = lambda x, y: (x @ y.T / 5 + 1) ** 3                                    # noqa: E731
    off = ~np.eye(300, dtype=bool)
    expected = k(a, a)[off].mean() + k(b, b)[off[:200, :200]].mean() - 2 * k(a, b).mean()
    assert measured('kid', a, b) == pytest.approx(expected)
    far = measured('two_sample', a[:200], a[:200] + 100)
    assert far['1-NN'] == 1 and far['EMD'] == pytest.approx(100 * 5 ** 0.5) and 0 < far['MMD'] <= 2 ** 0.5


# ---- DiffDFKD ----
SYNTH = ['synthesize.py', '--batch_size=8', '--steps=4', '--lca_every=2', '--keep=2', '--keep_every=1', '--num_images=32']


def test_guidance_lowers_the_losses_of_the_kept_images(tmp_path):
    """The bundled models, the same noise: guided images are closer to the teacher's training than unguided ones."""
    args = ['synthesize.py', '--batch_size=20', '--steps=10', '--lca_every=4', '--keep_every=1', '--num_images=80']
    at_once(lambda more: run(*args, *more, f'--out_dir={tmp_path}/{more[0][2:]}', cwd=ROOT),
            [['--eta=0.0'], ['--bn_loss=kl', '--alpha=0.01'], ['--alpha=0.3']])
    classifier = M.load_classifier(os.path.join(ROOT, 'pretrained/mnist_resnet.safetensors'))
    ce, bn = {}, {}
    for name in os.listdir(tmp_path):
        images, labels = M.load_images(str(tmp_path / name))
        x, inputs = M.preprocess(classifier, M.to_float(images)), []
        hooks = [m.register_forward_pre_hook(lambda m, args: inputs.append((m, *torch.var_mean(args[0], (0, 2, 3)))))
                 for m in classifier.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        ce[name] = torch.nn.functional.cross_entropy(classifier(x), labels).item()
        bn[name] = sum((mean - m.running_mean).norm() + (var - m.running_var).norm() for m, var, mean in inputs).item()
        for h in hooks:
            h.remove()
        assert len(images) == 80 and sorted(os.listdir(tmp_path / name)) == [
            '.lock', 'images_0000_00000.npz', 'log.csv', 'preview.png']
    assert ce['alpha=0.3'] < 0.5 * ce['eta=0.0'] and bn['alpha=0.3'] < bn['eta=0.0'], (ce, bn)
    assert ce['bn_loss=kl'] < 0.5 * ce['eta=0.0']


TEACHERS = [('ddpm', 'unet'), ('ldm', 'unet'), ('dit', 'transformer'), ('sd', 'unet'), ('sd3', 'transformer')]


@pytest.fixture(scope='session')
def pipelines(tmp_path_factory):
    """Every kind of diffusers pipeline, tiny and random, saved as its users save theirs."""
    from diffusers import (AutoencoderKL, AutoencoderTiny, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, DiTTransformer2DModel,
                           FlowMatchEulerDiscreteScheduler, IFPipeline, LDMPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline,
                           StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel, VQModel)
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel
    folder = tmp_path_factory.mktemp('pipelines')
    torch.manual_seed(0)
    vocab = {c: i for i, c in enumerate(['<|startoftext|>', '<|endoftext|>', *'abcdefghijklmnopqrstuvwxyz',
                                         *[f'{c}</w>' for c in 'abcdefghijklmnopqrstuvwxyz,']])}
    (folder / 'vocab.json').write_text(json.dumps(vocab))
    (folder / 'merges.txt').write_text('#version: 0.2\n')
    tokenizer = CLIPTokenizer(str(folder / 'vocab.json'), str(folder / 'merges.txt'), model_max_length=99)
    clip = CLIPTextConfig(vocab_size=len(vocab), hidden_size=16, intermediate_size=16, num_hidden_layers=1, projection_dim=16,
                          num_attention_heads=2, max_position_embeddings=99, bos_token_id=0, eos_token_id=1)
    t5 = T5Config(vocab_size=len(vocab), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    text = CLIPTextModel(clip)
    blocks = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    unet = dict(sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8, **blocks)
    pixels = UNet2DModel(**unet | dict(sample_size=16, in_channels=3, out_channels=3),
                         down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D'))
    latents = UNet2DModel(**unet, down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2)
    kl = AutoencoderKL(**blocks, latent_channels=4, scaling_factor=0.5, down_block_types=('DownEncoderBlock2D',) * 2,
                       up_block_types=('UpDecoderBlock2D',) * 2)
    vq = VQModel(**blocks, latent_channels=4, num_vq_embeddings=32, scaling_factor=0.3,
                 down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2)
    conditional = UNet2DConditionModel(**unet, cross_attention_dim=16, down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
                                       up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))
    cascade = UNet2DConditionModel(**{**unet, 'sample_size': 16, 'in_channels': 3, 'out_channels': 6}, cross_attention_dim=16,
                                   encoder_hid_dim=32, encoder_hid_dim_type='text_proj', addition_embed_type='text',
                                   addition_embed_type_num_heads=2, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
                                   up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'))
    dit = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
                                sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_elementwise_affine=False)
    sd3 = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
                                num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
                                pos_embed_max_size=8)
    shifted = AutoencoderKL(**{**kl.config, 'shift_factor': 0.1})
    tiny_vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                               num_decoder_blocks=(1, 1))
    tiny_vae.save_pretrained(folder / 'tiny_vae')
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule='scaled_linear')
    StableDiffusion3Pipeline(sd3, FlowMatchEulerDiscreteScheduler(shift=3.0), shifted, CLIPTextModelWithProjection(clip), tokenizer,
                             CLIPTextModelWithProjection(clip), tokenizer, T5EncoderModel(t5), tokenizer).save_pretrained(folder / 'sd3')
    IFPipeline(tokenizer, T5EncoderModel(t5), cascade, DDPMScheduler(beta_schedule='squaredcos_cap_v2', variance_type='learned_range',
               thresholding=True), None, None, None, requires_safety_checker=False).save_pretrained(folder / 'if')
    DDPMPipeline(pixels, DDIMScheduler(beta_schedule='squaredcos_cap_v2')).save_pretrained(folder / 'ddpm')
    LDMPipeline(vq, latents, scheduler).save_pretrained(folder / 'ldm')
    DiTPipeline(dit, kl, scheduler).save_pretrained(folder / 'dit')
    StableDiffusionPipeline(kl, text, tokenizer, conditional, DDIMScheduler(clip_sample=False, beta_schedule='scaled_linear',
                            prediction_type='v_prediction'), None, None, requires_safety_checker=False).save_pretrained(folder / 'sd')
    M.save_model(M.classifier('wrn16_1', 4, image_size=16), str(folder / 'classifier.safetensors'))
    (folder / 'names.txt').write_text('one\ntwo\nthree\nfour\n')
    np.savez(folder / 'images.npz', arr_0=np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8))
    for name, part in TEACHERS:                                                # students: the teachers' classes
        config = json.loads((folder / name / part / 'config.json').read_text())
        (folder / f'{name}.json').write_text(json.dumps(config))
    return folder


PRIORS = [['--prior=ddpm'], ['--prior=ldm', '--sampler=ddim'], ['--prior=dit', '--guidance=2.0', '--lca=mixup'],
          ['--prior=sd', '--guidance=3.0', '--sampler=ddim', '--grad_batch=3'],
          ['--prior=sd', '--guidance=3.0', '--class_names=names.txt', '--alpha=0', '--beta=0'], ['--prior=ldm', '--edit=paper', '--grad_batch=3', '--sampler=renoise'],
          ['--prior=if', '--edit=x_t', '--guidance=2.0', '--lca=traditional', '--sampler=ddim', '--ddim_eta=0.5'],
          ['--prior=none', '--flip=True', '--tv=0.1', '--l2=0.1']]


def test_every_kind_of_prior(pipelines, tmp_path):
    def one(i):
        out = run(*SYNTH, *PRIORS[i], '--teacher=classifier.safetensors', f'--out_dir={tmp_path}/{i}', cwd=pipelines)
        assert 'distill_classifier.py' in out
        images, labels = M.load_images(str(tmp_path / str(i)))
        assert images.shape == (32, 3, 16, 16) and torch.bincount(labels).tolist() == [8] * 4
        rows = 4 if '--beta=0' in PRIORS[i] else 8                             # unguided: where images are kept
        assert np.isfinite(losses(tmp_path / str(i))).all() and len(losses(tmp_path / str(i))) == rows
    at_once(one, range(len(PRIORS)))
    err = run(*SYNTH, '--prior=sd', '--class_names=cifar10', '--teacher=classifier.safetensors', cwd=pipelines, ok=False)
    assert '10 names' in err and '4 classes' in err


SYNTH_CONFIGS = ['cifar10_sd15', 'cifar100_sd15', 'tinyimagenet_sd15', 'domainnet_sd15', 'cifar10_dit', 'cifar10_if', 'cifar10_vae_sd15',
                 'celebahq_vae_sd15']


def test_the_configs_of_the_paper_run(pipelines, tmp_path):
    """Every command of a config, with tiny models of the same classes, smaller batches and two shards of them."""
    def one(name):
        teacher, n = ('vae:sd', 4) if 'vae' in name else ('classifier.safetensors', 16)
        prior = {'dit': 'dit', 'if': 'if'}.get(name.split('_')[1], 'sd')
        out = run('synthesize.py', os.path.join(ROOT, f'config/synth_{name}.py'), f'--prior={prior}', f'--teacher={teacher}', '--steps=7',
                  '--batch_size=2', f'--num_images={n}', f'--out_dir={tmp_path}/{name}', cwd=pipelines)
        assert 'in 2 shards' in out and len(M.load_images(f'{tmp_path}/{name}')[0]) == n
    at_once(one, SYNTH_CONFIGS)


def test_deepfloyd_if_sees_its_texts(pipelines):
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(pipelines / 'if')
    net, diffusion = M.load_denoiser(str(pipelines / 'if'))
    net.set_prompts(['a dog', 'a cat'])
    x, t = wave(2, 3, 16, 16), torch.tensor([500, 20])
    with torch.no_grad():
        theirs = pipe.unet(x, t, pipe.encode_prompt(['a cat', ''], do_classifier_free_guidance=False)[0]).sample
        assert torch.allclose(net(x, t, torch.tensor([1, -1])), theirs, atol=1e-5)
    assert diffusion.learn_sigma and diffusion.clip and net.config['image_size'] == 16


@pytest.mark.parametrize('name', ['ddpm', 'ldm', 'dit', 'sd', 'sd3'])
def test_pipelines_sample_what_diffusers_samples(name, pipelines):
    from diffusers import DDIMPipeline, DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(pipelines / name)
    pipe.set_progress_bar_config(disable=True)
    if name != 'sd3':
        pipe.scheduler.register_to_config(steps_offset=0, set_alpha_to_one=True)
    net, diffusion = M.load_denoiser(str(pipelines / name))
    noise, y, guidance, kw = torch.randn(1, net.config['in_channels'], *[net.config['image_size']] * 2), None, 3., {}
    if name == 'dit':
        y, kw = torch.tensor([7]), dict(class_labels=[7], guidance_scale=guidance)
    elif name == 'sd':
        net.set_prompts(['a dog', 'a cat'])
        y, kw = torch.tensor([1]), dict(prompt=['a cat'], guidance_scale=guidance, latents=noise)
    elif name == 'sd3':
        net.set_prompts(['a dog', 'a cat'])
        sigmas = [(t + 1) / 1000 for t in M.sampling_steps(1000, 5, 'leading')]
        y, kw = torch.tensor([1]), dict(prompt=['a cat'], guidance_scale=guidance, latents=noise, sigmas=sigmas)
    elif name == 'ddpm':
        pipe, kw = DDIMPipeline(pipe.unet, pipe.scheduler), dict(use_clipped_model_output=True)
        pipe.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:                                # the pipelines draw their noise: give them ours
        patch.setattr(sys.modules[type(pipe).__module__], 'randn_tensor', lambda *args, **kwargs: noise.clone(), raising=False)
        theirs = pipe(num_inference_steps=5, output_type='np', **kw).images
    ours = M.decode(net, M.sample(net, diffusion, noise, 5, 'ddim', y, guidance, spacing='leading'))
    ours = ((ours + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() < 1e-4 and ours.std() > 0


def test_texts_are_embedded_once_and_belong_to_all_copies(pipelines, tmp_path, monkeypatch):
    cache, texts = str(tmp_path / 'prompts.safetensors'), [f'dog {i}' for i in range(300)]  # more than one batch of 256
    net, _ = M.load_denoiser(str(pipelines / 'sd'), torch.bfloat16)
    net.set_prompts(texts, cache)
    assert not os.path.exists(cache)                                           # checks leave nothing
    net.keep_prompts(cache)
    assert net.pipe is None and net.shared['prompts'].shape[0] == 301 and net.shared['prompts'].dtype == torch.bfloat16
    assert not list(net.buffers()) and copy.deepcopy(net).shared is net.shared
    again, _ = M.load_denoiser(str(pipelines / 'sd'), torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(M.Pipeline, 'embed', lambda *args: pytest.fail('embedded twice'))
        again.set_prompts(texts, cache)
    assert torch.equal(again.shared['prompts'], net.shared['prompts'])
    other, _ = M.load_denoiser(str(pipelines / 'sd'))
    other.set_prompts(texts[1:], cache)                                        # other texts are not taken from the file
    assert other.shared['prompts'].shape[0] == 300 and other.shared['prompts'].dtype == torch.float32


def test_dits_of_diffusers_keep_their_labels_in_train_mode(pipelines):
    import diffusers
    net = M.Pipeline(diffusers.DiTTransformer2DModel.from_config(json.loads((pipelines / 'dit.json').read_text()))).train()
    x, t = torch.randn(64, 4, 8, 8), torch.zeros(64, dtype=torch.long)
    y = torch.arange(64)
    assert torch.equal(net(x, t, y), net(x, t, y))


QUICK = ['--stride=250', '--batch_size=4', '--max_steps=2', '--sample_steps=2']


def test_students_of_diffusers_go_back_to_diffusers(pipelines, tmp_path):
    """Each kind of teacher, a student of its class: eval_fid.py measures its file, and as a pipeline it is the same."""
    from diffusers import DiffusionPipeline
    more = {'dit': ['--guidance=2.0', '--uncond_prob=0.2', '--student_prediction=teacher'],
            'sd': ['--prompts=names.txt', '--guidance=2.0'],
            'sd3': ['--prompts=names.txt', '--guidance=2.0', '--student_prediction=teacher']}

    def one(case):
        name, part = case
        folder = tmp_path / name
        file, pipeline = folder / 'student.safetensors', folder / 'pipeline'
        out = run('dkdm.py', f'--teacher={name}', f'--student={name}.json', *QUICK, *more.get(name, []),
                  f'--out_dir={folder}', cwd=pipelines)
        last = out.splitlines()[-1]
        assert f'--models={file}' in out and last.endswith(f'export.py --model={file} --out_dir={pipeline}')
        assert os.path.getsize(folder / 'samples.png') > 0 and np.isfinite(losses(folder)).all()
        assert not os.path.exists(folder / part)
        run(*last.split('python ')[1].split(), f'--link={name != "sd"}', cwd=tmp_path)
        assert name == 'ddpm' or os.path.islink(pipeline / ('vqvae' if name == 'ldm' else 'vae')) == (name != 'sd')
        pipe = DiffusionPipeline.from_pretrained(pipeline)
        pipe.set_progress_bar_config(disable=True)
        call = {'dit': dict(class_labels=[3]), 'sd': dict(prompt='one'), 'sd3': dict(prompt='one')}.get(name, {})
        assert np.isfinite(pipe(num_inference_steps=2, output_type='np', **call).images).all()
        nets = []
        for spec in (str(file), str(pipeline)):
            net, diffusion = M.load_denoiser(spec)
            predicts = {'dit': 'eps', 'sd3': 'flow'}.get(name, 'v')
            assert diffusion.prediction == predicts and M.has_vae(net) == (name != 'ddpm')
            assert net.guided == (name in more)
            if net.condition == 'text':
                net.set_prompts(['one', 'two'])
            C, H = net.config['in_channels'], net.config['image_size']
            t = torch.tensor([diffusion.T // 3])
            nets.append(M.decode(net, diffusion.predict_x0(net(wave(1, C, H, H), t, t * 0), wave(1, C, H, H), t)))
        assert torch.allclose(*nets, atol=1e-5)
        return str(file)
    files = at_once(one, TEACHERS)
    run('eval_fid.py', f'--models={files[0]},{files[3]}', '--reference=images.npz', '--features=classifier.safetensors',
        '--num_samples=8', '--steps=2', '--prompts=names.txt', f'--out_dir={tmp_path}/eval', cwd=pipelines)
    assert len(metrics(tmp_path / 'eval')) == 2
    for i, key in ((1, 'vae'), (3, 'pipeline')):                               # whose teacher was moved away
        state, header = M.read_weights(files[i])
        M.write_tensors(state, f'{tmp_path}/moved.safetensors', header | {key: 'gone'})
        with pytest.raises(ValueError, match="^.*moved.safetensors needs its teacher's pipeline: .* gone, .*$"):
            M.load_denoiser(f'{tmp_path}/moved.safetensors')


def test_students_of_another_kind(pipelines, tiny, tmp_path):
    """A student of ours of each teacher with latents keeps its VAE, and so does its student; a student of diffusers of
    a teacher of ours is a DDPMPipeline."""
    from diffusers import DiffusionPipeline
    ours = ['--student=dit', '--hidden_size=16', '--depth=1', '--num_heads=2']

    def one(case):
        i, args = case
        run('dkdm.py', *QUICK, *args, f'--out_dir={tmp_path}/{i}', cwd=pipelines)
        return tmp_path / str(i)
    cases = [['--teacher=ldm', *ours], ['--teacher=sd3', '--prompts=names.txt', *ours],
             [f'--teacher={tiny}/teacher.safetensors', '--student=grey.json', '--stride=50'],
             [f'--teacher={tiny}/classes.safetensors', '--student=classes.json', '--stride=50', '--guidance=2.0']]
    config = json.loads((pipelines / 'ddpm.json').read_text()) | dict(in_channels=1, out_channels=2)
    (pipelines / 'grey.json').write_text(json.dumps(config))
    (pipelines / 'classes.json').write_text(json.dumps(config | dict(num_class_embeds=5)))
    latent, text, grey, classes = at_once(one, enumerate(cases))
    again = one(('again', [f'--teacher={latent}/student.safetensors', *ours]))
    for folder, labels in ((latent, 0), (text, 4), (again, 0)):
        net, _ = M.load_denoiser(str(folder / 'student.safetensors'))
        assert M.decode(net, torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16) and net.num_classes == labels
    for folder in (grey, classes):
        run('export.py', f'--model={folder}/student.safetensors', f'--out_dir={folder}/p', cwd=tmp_path)
    pipe = DiffusionPipeline.from_pretrained(grey / 'p')
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe(num_inference_steps=2, output_type='np').images).all()
    assert sorted(os.listdir(classes / 'p')) == ['scheduler', 'unet']


BAD_HUB = [
    (['--teacher=nobody/nothing'], 'no diffusers pipeline at nobody/nothing', {}), (['--teacher=sd'], '--prompts=file.txt', {}),
    (['--teacher=sd', '--prompts=empty.txt'], 'empty.txt is empty', {}), (['--teacher=ddpm', '--prompts=names.txt'], 'takes no texts', {}),
    (['--teacher=sd', '--prompts=names.txt'], 'pip install transformers', {'PYTHONPATH': 'blocked'}),
    (['--teacher=ddpm', '--student=broken.json'], 'no config of a diffusers model', {}), (['--teacher=ddpm', '--student=dit.json'], 'takes 1000 class', {}),
    (['--teacher=ldm', '--student=ddpm.json'], 'for 4x8x8', {}), (['--teacher=karras'], 'FlowMatchEulerDiscreteScheduler', {}),
    (['--teacher=sd3', '--prompts=names.txt', '--student=sd3.json'], '--student_prediction=teacher', {})]


def test_bad_hubs_and_students(pipelines, tmp_path):
    import shutil
    from diffusers import FlowMatchEulerDiscreteScheduler
    (pipelines / 'empty.txt').write_text(' \n')
    (pipelines / 'broken.json').write_text('{"_class_name": "NoSuchModel"}')
    os.makedirs(pipelines / 'blocked')
    (pipelines / 'blocked/sitecustomize.py').write_text(                       # a machine without transformers
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'transformers' else find(name, *a)\n")
    shutil.copytree(pipelines / 'ddpm', pipelines / 'karras')
    config = json.loads((pipelines / 'karras/model_index.json').read_text()) | {'scheduler': ['diffusers', 'FlowMatchEulerDiscreteScheduler']}
    (pipelines / 'karras/model_index.json').write_text(json.dumps(config))
    FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).save_pretrained(pipelines / 'karras/scheduler')

    def one(case):
        i, (args, words, env) = case
        err = run('dkdm.py', *QUICK, *args, f'--out_dir={tmp_path}/{i}', cwd=pipelines, ok=False, env=env)
        assert words in err and not os.path.exists(tmp_path / str(i)), (args, err)
    at_once(one, enumerate(BAD_HUB))


def test_gated_models_and_half_precision(pipelines, tmp_path, monkeypatch, capsys):
    import huggingface_hub
    from diffusers import DiffusionPipeline
    DiffusionPipeline.from_pretrained(pipelines / 'ddpm').to(torch.float16).save_pretrained(tmp_path / 'half', variant='fp16')
    net, _ = M.load_denoiser(str(tmp_path / 'half'))
    assert next(net.parameters()).dtype == torch.float32 and 'weights in float16, computed in float32' in capsys.readouterr().out

    def gated(*args):
        raise huggingface_hub.errors.GatedRepoError.__new__(huggingface_hub.errors.GatedRepoError)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', gated)
    with pytest.raises(ValueError, match='^some/model is gated: .*hf auth login`$'):
        M.load_denoiser('some/model')


def test_synthesis_restarts_and_ranks_share(tiny, tmp_path):
    args = [*SYNTH, '--prior=teacher.safetensors', '--teacher=classifier.safetensors']
    run(*args, f'--out_dir={tmp_path}/one', cwd=tiny)
    os.remove(tmp_path / 'one/images_0000_00001.npz')
    first = os.stat(tmp_path / 'one/images_0000_00000.npz').st_mtime_ns
    run(*args, f'--out_dir={tmp_path}/one', cwd=tiny)
    assert os.stat(tmp_path / 'one/images_0000_00000.npz').st_mtime_ns == first and len(losses(tmp_path / 'one')) == 8
    assert 'other settings' in run(*args, '--eta=2.0', f'--out_dir={tmp_path}/one', cwd=tiny, ok=False)
    run(*args, f'--out_dir={tmp_path}/two', cwd=tiny, ranks=2)
    one, two = (M.load_images(str(tmp_path / d)) for d in ('one', 'two'))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_distilled_classifier(tiny, tmp_path):
    """The student comes to agree with its teacher, and its checkpoint serves the adversarial loss of the next round."""
    run('distill_classifier.py', '--method=data', '--data=images.npz', '--student=resnet8', '--width=8', '--holdout=0', '--epochs=10',
        '--batch_size=16', f'--out_dir={tmp_path}/teacher', cwd=tiny)
    args = ['distill_classifier.py', '--data=images.npz', f'--teacher={tmp_path}/teacher/student.safetensors', '--width=4', '--holdout=16',
            '--epochs=20', '--batch_size=16', f'--out_dir={tmp_path}/student']
    out = run(*args, '--test=images.npz', cwd=tiny, ranks=2)
    assert 'teacher: test accuracy' in out
    log = np.genfromtxt(tmp_path / 'student/log.csv', delimiter=',', names=True)
    assert log['kl'][-1] < 0.5 * log['kl'][0] and log['msarc'][-1] < log['msarc'][0] and log['agreement'].max() > 0.7
    assert M.load_classifier(f'{tmp_path}/student/best.safetensors').config['width'] == 4
    run(*SYNTH, '--prior=teacher.safetensors', f'--teacher={tmp_path}/teacher/student.safetensors',
        f'--student={tmp_path}/student/student.safetensors', f'--out_dir={tmp_path}/adv', cwd=tiny)
    assert (np.genfromtxt(tmp_path / 'adv/log.csv', delimiter=',', names=True)['adv'] <= 0).all()


def test_the_step_of_the_paper(tiny, tmp_path):
    """Eqs. (4)-(10) by hand: every loss that the script logs over three steps, and the images it keeps."""
    torch.manual_seed(0)
    kw = dict(image_size=16, in_channels=1, out_channels=1, model_channels=16, num_res_blocks=1, channel_mult=(1, 2), num_head_channels=16)
    net, F = M.UNet(**kw, attention_resolutions=(4,)).eval(), torch.nn.functional
    torch.nn.init.normal_(net.out[2].weight, std=0.02)
    M.save_model(net, f'{tmp_path}/prior.safetensors', M.Diffusion('linear', 100, 'eps', learn_sigma=False, clip=False))
    M.save_model(M.classifier('resnet8', 4, image_size=16, in_channels=1, width=4), f'{tmp_path}/student.safetensors')
    run('synthesize.py', f'--prior={tmp_path}/prior.safetensors', '--teacher=classifier.safetensors', f'--student={tmp_path}/student.safetensors',
        '--edit=paper', '--eta=4.0', '--alpha=0.1', '--beta=1.0', '--gamma=0.5', '--tau=2.0', '--sampler=renoise', '--lca=none', '--steps=3',
        '--keep=3', '--keep_every=1', '--batch_size=8', '--grad_batch=3', '--num_images=24', '--dtype=float32', f'--out_dir={tmp_path}/o', cwd=tiny)
    log = np.genfromtxt(tmp_path / 'o/log.csv', delimiter=',', names=True)
    images, labels = M.load_images(f'{tmp_path}/o')

    f_t, f_s = M.load_classifier(str(tiny / 'classifier.safetensors')), M.load_classifier(f'{tmp_path}/student.safetensors')
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(8, 1, 16, 16, generator=g), torch.randn(3, 8, 1, 16, 16, generator=g)
    [torch.randperm(8, generator=g) for _ in range(3)], torch.rand(3, 4, 8, 1, generator=g)
    y, alpha_bar = torch.randperm(8, generator=g) % 4, torch.cumprod(1 - torch.linspace(0.001, 0.2, 100, dtype=torch.float64), 0).float()
    assert torch.equal(labels, y.repeat(3))
    seen = []
    for m in f_t.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.register_forward_pre_hook(lambda m, args: seen.append((args[0].mean((0, 2, 3)) - m.running_mean).norm()
                                                                    + (args[0].var((0, 2, 3), correction=0) - m.running_var).norm()))
    for i, (t, s) in enumerate(((99, 50), (50, 0), (0, None))):
        z, a, b = z.detach().requires_grad_(), alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        eps = net(z, torch.full((8,), t))
        x = ((z - b * eps) / a).clamp(-1, 1) / 2                               # Eq. (4); mean 0.5, deviation 0.5 of [0, 1]: [-1, 1]
        seen.clear()
        p_t, p_s = f_t(2 * x), f_s(2 * x)
        L_bn, L_cls = sum(seen), -p_t.log_softmax(1)[range(8), y].mean()       # Eqs. (6), (7)
        L_adv = -((p_t / 2).softmax(1) * ((p_t / 2).log_softmax(1) - (p_s / 2).log_softmax(1))).sum(1).mean()   # Eq. (8)
        L = 0.1 * L_bn + L_cls + 0.5 * L_adv                                   # Eq. (9)
        for name, value in (('bn', L_bn), ('cls', L_cls), ('adv', L_adv), ('loss', L)):
            assert log[name][i] == pytest.approx(value.item(), rel=2e-4, abs=1e-6), (name, i)
        z = z - 4.0 * torch.autograd.grad(L, z)[0]                             # Eq. (10)
        x0 = (z - b * eps) / a
        assert (images[8 * i:8 * i + 8].int() - M.to_uint8(x0).int()).abs().max() <= 1
        if s is not None:
            z = alpha_bar[s].sqrt() * x0 + (1 - alpha_bar[s]).sqrt() * noise[i]    # Eq. (5)


def msarc(net_S, net_T, x):
    """L_mSARC as SpaceshipNet describes it: (the last stage's, [the earlier ones'])."""
    (p_S, maps_S), (p_T, maps_T) = net_S.forward_features(x), net_T.forward_features(x)
    c, found = p_T.argmax(1), []
    for net, p, maps in ((net_S, p_S, maps_S), (net_T, p_T, maps_T)):
        W = net.get_submodule(net.head_name).weight
        grads = torch.autograd.grad(p[range(len(x)), c].sum(), maps, retain_graph=True)
        found.append((torch.einsum('kc,bchw->bkhw', W, maps[-1]),
                      {f.shape[2:]: torch.einsum('bc,bchw->bhw', w.mean((2, 3)), f) for w, f in zip(grads[:-1], maps[:-1])}))
    (cam_S, early_S), (cam_T, early_T) = found
    if cam_S.shape != cam_T.shape:
        cam_T = torch.nn.functional.interpolate(cam_T, cam_S.shape[2:], mode='bilinear', antialias=True)
    return (cam_S - cam_T).square().mean(), [(early_S[k] - early_T[k]).square().mean() for k in early_S if k in early_T]


@pytest.mark.parametrize('teacher, student, cam, early', [
    ('resnet34', 'resnet18', 0.00024125850177370012, [7.138987317967249e-12, 1.8216648675628555e-11, 5.860898877330101e-09]),
    ('resnet20', 'resnet8', 0.0036491036880761385, [5.705889649654239e-10, 2.0249897758617408e-08])])
def test_msarc_has_the_numbers_of_its_source(teacher, student, cam, early):
    last, earlier = msarc(fill(M.classifier(student)), fill(M.classifier(teacher)), wave(4, 3, 32, 32))
    assert last.item() == pytest.approx(cam, rel=1e-4) and [e.item() for e in earlier] == pytest.approx(early, rel=1e-3)


@pytest.mark.parametrize('teacher, student, side, pairs', [('vgg11', 'resnet18', 32, 3), ('wrn16_2', 'wrn16_1', 32, 2),
                                                           ('torchvision:resnet18', 'resnet20', 64, 0)])
def test_msarc_of_the_script(teacher, student, side, pairs, tmp_path):
    """One step on one batch logs the loss of the reference. Stages are paired by resolution, where both networks have it."""
    torch.manual_seed(0)
    kw = {'width': 8} if student.startswith('resnet') else {}
    nets = [M.classifier(name, 5, image_size=side, **kw).eval() for name, kw in ((student, kw), (teacher, {}))]
    for net, name in zip(nets, 'ST'):
        torch.nn.init.normal_(net.get_submodule(net.head_name).weight, std=0.3)
        M.save_model(net, f'{tmp_path}/{name}.safetensors')
    pixels = np.random.default_rng(0).integers(0, 256, (12, side, side, 3), dtype=np.uint8)
    np.savez(tmp_path / 'x.npz', arr_0=pixels)
    run('distill_classifier.py', '--data=x.npz', '--teacher=T.safetensors', f'--student={student}', '--width=8', '--init_from=S.safetensors',
        '--holdout=0', '--epochs=1', '--batch_size=12', '--augment_crop=0', '--lam_msarc=2.0', '--dtype=float32', '--out_dir=o', cwd=tmp_path)
    last, earlier = msarc(nets[0].train(), nets[1], torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 * 2 - 1)
    logged = np.genfromtxt(tmp_path / 'o/log.csv', delimiter=',', names=True)['msarc']
    assert len(earlier) == pairs and logged == pytest.approx(2 * (last + sum(earlier)).item(), rel=1e-3)


def test_a_student_goes_on_and_is_tested(tiny, tmp_path):
    """Images of another teacher are refused, the student of one round starts the next, and a saved one is tested on some classes."""
    run(*SYNTH, '--prior=teacher.safetensors', '--teacher=classifier.safetensors', f'--out_dir={tmp_path}/s', cwd=tiny)
    M.save_model(M.classifier('resnet8', 4, image_size=16, in_channels=1, width=4), f'{tmp_path}/other.safetensors')
    args = ['distill_classifier.py', f'--data={tmp_path}/s', '--width=4', '--holdout=0', '--batch_size=16', '--epochs=1', '--lam_kl=0',
            '--lam_msarc=0.1', f'--out_dir={tmp_path}/c']
    err = run(*args, f'--teacher={tmp_path}/other.safetensors', cwd=tiny, ok=False)
    assert 'was made for the teacher classifier.safetensors' in err
    run(*args, f'--teacher={tmp_path}/other.safetensors', '--any_teacher=True', '--augment_flip=True', cwd=tiny, ranks=2)
    first = load_file(tmp_path / 'c/student.safetensors')
    out = run(*args, '--teacher=classifier.safetensors', f'--init_from={tmp_path}/c/student.safetensors', '--lr=0.0', '--test=images.npz',
              cwd=tiny)
    second = load_file(tmp_path / 'c/student.safetensors')
    assert all(torch.equal(first[k], second[k]) for k in first if 'running' not in k and 'num_batches' not in k)
    accuracy = out.splitlines()[-1].split(' of the student ')[1].split()[0]
    test = ['distill_classifier.py', '--method=test', f'--teacher={tmp_path}/c/student.safetensors', f'--out_dir={tmp_path}/t']
    assert f'test accuracy {accuracy} % of 64 images' in run(*test, '--test=images.npz', cwd=tiny)
    assert ' of 32 images' in run(*test, '--test=images.npz:1-2', cwd=tiny) and not os.path.exists(tmp_path / 't')


@pytest.mark.parametrize('name, head', [('resnet34', 'linear'), ('wrn40_2', 'fc'), ('vgg16', 'classifier'), ('resnet50', 'linear')])
def test_published_classifiers_load_by_their_shapes(name, head, tmp_path):
    net = M.classifier(name, 7).eval()
    torch.save({'state_dict': net.state_dict()}, tmp_path / 'c.pth')
    loaded = M.load_classifier(str(tmp_path / 'c.pth'), image_size=64)
    assert loaded.config['name'] == name and loaded.config['image_size'] == 64 and loaded.config['mean'][0] == 0.4914
    assert torch.equal(loaded(wave(2, 3, 32, 32)), net(wave(2, 3, 32, 32)))


def test_names_of_timm(tmp_path):
    net = M.classifier('resnet34', 7).eval()
    state = {k.replace('.shortcut.', '.downsample.').replace('linear.', 'fc.'): v for k, v in net.state_dict().items()}
    torch.save(state, tmp_path / 'c.pth')
    assert torch.equal(M.load_classifier(str(tmp_path / 'c.pth'))(wave(2, 3, 32, 32)), net(wave(2, 3, 32, 32)))


def test_torchvision_classifiers(tmp_path):
    import torchvision
    net = torchvision.models.resnet18(num_classes=5).eval()
    torch.save(net.state_dict(), tmp_path / 'r.pth')
    loaded, x = M.load_classifier(str(tmp_path / 'r.pth')), wave(1, 3, 64, 64)
    logits, maps = loaded.forward_features(x)
    assert torch.equal(logits, net(x)) and [m.shape[1] for m in maps] == [64, 128, 256, 512] and loaded.config['image_size'] == 224
    M.save_model(M.classifier('torchvision:vgg11_bn', 5), str(tmp_path / 'v.safetensors'))
    assert len(M.load_classifier(str(tmp_path / 'v.safetensors')).forward_features(x)[1]) == 4


# ---- bad input: one line, exit code 2, nothing left behind ----
@pytest.fixture(scope='session')
def bad(tiny):
    with open(tiny / 'teacher.safetensors', 'rb') as f:
        (tiny / 'cut.safetensors').write_bytes(f.read()[:5000])
    (tiny / 'cut.pt').write_bytes(b'PK\x03\x04 cut short')
    torch.save({'weight': torch.zeros(3)}, tiny / 'other.pt')
    np.savez(tiny / 'no_arr.npz', x=np.zeros(3))
    np.savez(tiny / 'big.npz', arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    (tiny / 'config.py').write_text('rho = "much"\n')
    np.savez(tiny / 'adm.npz', mu=np.zeros(2048), sigma=np.zeros((2048, 2048), np.float32))
    space = f"classifier.safetensors {M.digest(M.load_classifier(str(tiny / 'classifier.safetensors')))}"
    np.savez(tiny / 'short.npz', mu=np.zeros(2), sigma=np.eye(2), n=5, space=space)
    os.makedirs(tiny / 'empty')
    os.makedirs(tiny / 'cut')
    np.savez(tiny / 'cut/images_0000_00000.npz', arr_0=np.zeros((4, 16, 16, 1), np.uint8))
    (tiny / 'cut/images_0000_00001.npz').write_bytes((tiny / 'cut/images_0000_00000.npz').read_bytes()[:300])
    M.save_model(M.classifier('vgg11', image_size=4), str(tiny / 'vgg.safetensors'))
    M.save_model(M.classifier('torchvision:alexnet', 4, image_size=64), str(tiny / 'norm_free.safetensors'))
    return tiny


BAD = [
    (['--roh=0.4'], "did you mean 'rho'"), (['--rho=high'], 'rho is float'), (['--compile=1'], 'compile is bool'),
    (['--channel_mult=2'], 'channel_mult is tuple'), (['nothing.py'], 'no config file'), (['--rho'], '--key=value'),
    (['config.py'], 'rho is float'), (['--method=magic'], "'dynamic'"), (['--rho=0.0'], 'above 0'), (['--stride=200'], 'T=100'),
    (['--teacher=missing.pt'], 'no file missing.pt'), (['--teacher=cut.safetensors'], 'cut short'), (['--teacher=cut.pt'], 'cut short'),
    (['--teacher=other.pt'], 'no denoiser'), (['--teacher=classifier.safetensors'], 'no denoiser'),
    (['--rho=1e12', '--stride=1'], '--pool_dtype=float16'), (['--batch_size=9', '--grad_accum=2'], 'a multiple of 2'),
    (['--method=data'], '--data'), (['--method=data', '--data=images.npz', '--guidance=2.0'], 'no teacher to guide'), (['--method=data', '--data=no_arr.npz'], "no 'arr_0'"), (['--method=data', '--data=nowhere'], 'nowhere'),
    (['--method=synthetic', '--synthetic=big.npz'], '(1, 16, 16)'), (['--guidance=2.0'], 'no classes'),
    (['--model_channels=9', '--num_head_channels=4'], 'attention heads'), (['--patch_size=3'], 'patches of 3'),
    (['--eval_every=2', '--eval_reference=images.npz', '--eval_features=classifier.safetensors'], 'no statistics'),
    (['--eval_every=2', '--eval_reference=short.npz', '--eval_features=classifier.safetensors'], 'of 2 features'),
    (['--eval_every=2', '--eval_features=vgg.safetensors'], 'too small'),
    (['--eval_every=2', '--eval_features=missing.safetensors'], 'no file missing'), (['--eval_every=-1'], 'eval_every'),
    (['--device=tpu9'], 'device'), (['--student=dit', '--hidden_size=30'], 'hidden_size'), (['--lr=1e30', '--lr_warmup=0', '--max_steps=50'], 'not finite')]
BAD_OTHERS = [
    (['eval_fid.py', '--models=missing.safetensors'], 'no file'), (['eval_fid.py', '--models=big.npz'], '3 channels'),
    (['eval_fid.py'], 'nothing to measure'), (['eval_fid.py', '--models=images.npz', '--reference=adm.npz'], 'space of inception'),
    (['eval_fid.py', '--models=images.npz', '--reference=short.npz'], 'statistics of 2 features'),
    (['eval_fid.py', '--models=images.npz', '--features=inception', '--inception_weights=missing.pth'], '--inception_weights'), (['eval_fid.py', '--models=teacher.safetensors', '--steps=500'], 'from 1 to 100'),
    (['eval_fid.py', '--models=teacher.safetensors', '--spacing=odd'], "'leading'"),
    (['distill_classifier.py', '--method=data', '--data=big.npz', '--holdout=0', '--batch_size=2'], 'no labels'),
    (['distill_classifier.py', '--method=data', '--data=images.npz', '--batch_size=16', '--holdout=0', '--student=resnet7'], 'resnet7'),
    (['distill_classifier.py', '--data=empty'], 'no images'), (['distill_classifier.py', '--data=cut'], 'images_0000_00001.npz cannot be read'),
    (['distill_classifier.py', '--data=images.npz'], 'holdout=400'), (['distill_classifier.py', '--data=big.npz', '--holdout=0'], 'classifier'),
    (['distill_classifier.py', '--data=images.npz', '--teacher=teacher.safetensors'], 'no classifier'),
    (['synthesize.py', '--teacher=norm_free.safetensors'], 'no BatchNorm'),
    (['synthesize.py', '--class_names=cifar10'], 'takes no text'), (['synthesize.py', '--prior=nobody/nothing'], 'no diffusers pipeline'),
    (['synthesize.py', '--keep=4', '--keep_every=9'], 'more than 25 steps'), (['synthesize.py', '--edit=x'], "'paper'"),
    (['synthesize.py', '--prior=none', '--guidance=2.0'], 'has none'), (['synthesize.py', '--sampler=dpm'], "'renoise'"),
    (['distill_classifier.py', '--method=test'], 'needs images'), (['distill_classifier.py', '--method=test', '--test=images.npz:7-9'], 'no images of the classes'),
    (['distill_classifier.py', '--data=images.npz', '--init_from=missing.safetensors'], 'there is none'), (['distill_classifier.py', '--data=missing.txt'], 'missing.txt'), (['synthesize.py', '--bn_loss=l1'], "'kl'"),
    (['synthesize.py', '--student=vgg.safetensors'], '10 classes'), (['synthesize.py', '--guidance=2.0'], 'no condition'),
    (['synthesize.py', '--teacher=vae:lvae.safetensors', '--student=classifier.safetensors'], 'no L_adv'),
    (['distill_vae.py', '--method=both'], "'prior'"), (['distill_vae.py', '--method=synthetic'], 'needs images'),
    (['distill_vae.py', '--teacher=classifier.safetensors'], 'holds a classifier'), (['distill_vae.py', '--teacher=nobody/nothing'], 'no VAE'),
    (['distill_vae.py', "--student_config={'image_size': 64}"], 'image_size'), (['distill_vae.py', "--student_config={'depth': 3}"], "no 'depth'"),
    (['distill_vae.py', '--method=synthetic', '--data=big.npz'], '(3, 32, 32)'),
    (['distill_vae.py', "--student_config={'_class_name': 'AutoencoderKL'}"], 'must be the same'),
    (['synthesize.py', '--steps=200'], 'from 1 to 100'), (['synthesize.py', '--teacher=vgg.safetensors'], 'cannot take')]


def test_bad_input(bad, tmp_path):
    def one(case):
        i, (args, words) = case
        err = run('dkdm.py', '--teacher=teacher.safetensors', *SMALL, '--save_every=1', '--grad_clip=0.0', '--stride=10', *args,
                  f'--out_dir={tmp_path}/{i}', cwd=bad, ok=False)
        assert words in err, (args, err)
        if 'not finite' in words:
            state = M.load_checkpoint(f'{tmp_path}/{i}', 0)[0]['net']          # the last good checkpoint is intact
            assert all(v.isfinite().all() for v in state.values())
        else:
            assert not os.path.exists(tmp_path / str(i)), args
    at_once(one, enumerate(BAD))


def test_bad_input_of_the_others(bad, tmp_path):
    def one(case):
        args, words = case
        common = {'eval_fid.py': ['--reference=images.npz', '--features=classifier.safetensors'],
                  'distill_vae.py': ['--teacher=lvae.safetensors'],
                  'synthesize.py': ['--prior=teacher.safetensors', '--teacher=classifier.safetensors']}.get(
                      args[0], ['--teacher=classifier.safetensors'])
        common = [c for c in common if c.split('=')[0] + '=' not in str(args)]
        err = run(*args, *common, f'--out_dir={tmp_path}/o', cwd=bad, ok=False)
        assert words in err and not os.path.exists(tmp_path / 'o'), (args, err)
    at_once(one, BAD_OTHERS)



# one value each, over a command that runs; the line must name the key, or say what stands behind ~
COMMANDS = {'dkdm.py': ['--teacher=teacher.safetensors', *SMALL, '--stride=10'], 'bench.py': SMALL[:5],
            'synthesize.py': ['--prior=teacher.safetensors', '--teacher=classifier.safetensors', '--batch_size=4',
                              '--num_images=16'],
            'distill_classifier.py': ['--teacher=classifier.safetensors', '--data=images.npz', '--holdout=8',
                                      '--batch_size=8'],
            'distill_vae.py': ['--teacher=lvae.safetensors', '--batch_size=4', '--max_steps=2'],
            'eval_fid.py': ['--models=images.npz', '--reference=images.npz', '--features=classifier.safetensors'],
            'export.py': ['--model=teacher.safetensors']}
VALUES = {
    'dkdm.py': """
        rho=nan rho=-1.0 rho=1e999 stride=0 stride=-3 warmup_steps=-1 lam=-1 lam=nan guidance=-1 guidance=inf lr=-1.0
        lr=1e999 lr=nan lr_warmup=-1 weight_decay=-0.1 weight_decay=nan beta2=1 beta2=-1.0 beta2=nan grad_clip=-1
        grad_clip=nan ema=nan ema=1.5 ema=1 max_steps=0 max_steps=-5 batch_size=0 grad_accum=0 log_every=0
        save_every=0 save_every=1e3 sample_steps=0 sample_steps=101~100 seed=-1 seed=100000000000000000000000 T=0 T=1
        patch_size=0 patch_size=1000000000000 model_channels=0 model_channels=-8 model_channels=1000000000
        model_channels=1000000 num_res_blocks=-1 num_res_blocks=0 num_res_blocks=1000000 channel_mult=()
        channel_mult=(1,-1) channel_mult=(0,) channel_mult=(1,'a') channel_mult=(nan,) channel_mult=(1,1,1,1,1,1,1)
        attention_resolutions=(-4,) attention_resolutions=('x',) num_head_channels=-1 dropout=1.0 dropout=-1
        dropout=nan uncond_prob=1.1 real_fraction=-0.1 real_fraction=2 synthetic_images=0 synthetic_steps=0
        sampler=euler pool_dtype=int8 student_prediction=z schedule=fast init_from=start student=resnet device=meta
        dtype=float64 wandb=project teacher_config={'image_size':nan} teacher_config={1:2}
        teacher_config={'image_size':32}~nothing rho=((( rho="1is" batch_size=None""",
    'bench.py': """
        repeats=0 what=walk image_size=0 image_size=1000000~memory channels=0 classes=-1 teacher_width=-1
        model_channels=0 rho=1e29 student=x.json""",
    'synthesize.py': """
        alpha=-1 alpha=1e999 beta=nan gamma=-0.1 tau=0.0 tau=nan eta=-3.0 eta=inf ddim_eta=1.5 guidance=-1 steps=0
        lca_every=0 lr=0.0 lr=nan tv=-1 l2=nan jitter=-1 num_images=0 keep=0 keep_every=0 image_size=-1
        image_size=100000 batch_size=0 grad_batch=0 seed=-1 seed=100000000000000000000000 lca=none2 bn_loss=l3 edit=y
        sampler=x prior_config={'steps':50}~nothing teacher_config={'image_size':16}~nothing num_images=1e5""",
    'distill_classifier.py': """
        lam_kl=-1 lam_kl=nan lam_msarc=inf temperature=0.0 temperature=nan label_smoothing=1.5 label_smoothing=-0.1
        epochs=0 epochs=-1 batch_size=0 lr=-1 lr=nan warmup_epochs=-1 weight_decay=-1 weight_decay=1e999 holdout=-1
        holdout=64 augment_crop=-2 augment_crop=5000 width=-1 width=1000000 width=9000 image_size=-1
        image_size=1000000 optimizer=adam method=train student=resnet1000004~resnet8 student=vgg12~vgg11
        student=wrn9999_9999~wrn40_2 seed=-1 seed=1e5 teacher_config={'mean':(0.5,)}~nothing init_from=none.pt
        dtype=half""",
    'distill_vae.py': """
        beta=0.0 beta=nan beta=-1.0 lam_z=-1 lam_z=inf kl_warmup=-1 max_steps=0 batch_size=0 lr=nan lr=-1
        weight_decay=-1e-4 weight_decay=nan grad_clip=-1 save_every=0 log_every=0 seed=-1
        student_config={'width':0}~LVAE student_config={'width':-4}~LVAE student_config={'width':2.5}~LVAE
        student_config={'width':1000000}~memory student_config={'image_size':0}~LVAE student_config={'width':nan}
        init_from=x method=x data=images.npz student_config={3:4}""",
    'eval_fid.py': """
        num_samples=-1 num_samples=nan n_two_sample=-1 batch_size=0 steps=0 guidance=-1 guidance=nan seed=-1
        seed=100000000000000000000000 sampler=x spacing=x save_stats=stats.txt save_stats=empty features=nothing~file
        model_config={2:3}""",
    'export.py': """
        link=1 link=yes model=missing.safetensors~no model=broken~no model=classifier.safetensors~denoiser
        model=lvae.safetensors~LVAE model=cut.safetensors~short model=teacher.safetensors~patch_size
        out_dir=broken~other"""}
FILES = [                                                                      # damaged files, folders that cannot be
    *[('dkdm.py', [f'--teacher=damaged_{name}.safetensors'], words) for name, words in [
        ('list', 'damaged'), ('json', 'cannot be read'), ('net', 'damaged'), ('class', "'Sequential'"),
        ('huge', 'no UNet'), ('depth', 'num_res_blocks'), ('odd', 'no UNet'), ('vae', 'damaged'),
        ('steps', 'no Diffusion'), ('schedule', 'no Diffusion'), ('nan', 'not finite'), ('none', 'no denoiser'),
        ('pipeline', 'damaged'), ('gone', "needs its teacher's pipeline"), ('runs', "'DiffusionPipeline'"),
        ('layers', 'layers_per_block'), ('long', 'block_out_channels'), ('wide', 'do not fit into memory'),
        ('keys', 'unexpected'), ('side', 'sample_size'), ('kind', 'kind')]],
    *[('dkdm.py', [f'--teacher={name}.pt'], words) for name, words in [
        ('list', 'holds a list'), ('text', "but 'weight'"), ('nothing', 'no dict of tensors'),
        ('ints', 'no dict of tensors')]],
    ('distill_classifier.py', ['--teacher=list.pt'], 'holds a list'),
    ('distill_classifier.py', ['--teacher=text.pt'], 'no dict of tensors'),
    ('distill_classifier.py', ['--teacher=damaged_mean.safetensors'], 'no classifier of'),
    ('distill_vae.py', ['--teacher=damaged_class.safetensors'], 'no VAE'),
    *[('dkdm.py', [f'--teacher=index_{name}'], 'model_index.json') for name in ('list', 'empty', 'text')],
    *[('distill_classifier.py', ['--method=data', f'--data={name}'], words) for name, words in [
        ('negative.npz', 'labels from 0'), ('flat.npz', 'N x H x W x C'), ('zero.npz', 'N x H x W x C'),
        ('array.npz', 'cannot be read'), ('broken', 'one.png'), ('half', 'one.jpg'),
        ('images.npz:5-3', 'a not above b'), ('list.txt', 'a file and a label'), ('latin.txt', 'cannot be read')]],
    *[('eval_fid.py', [f'--reference=stats_{name}.npz'], 'its covariance') for name in ('nan', 'odd', 'negative')],
    *[(name, [f'--out_dir={folder}'], words) for name in COMMANDS if name != 'bench.py' for folder, words in [
        *[(f, 'cannot be written') for f in ('', '/proc/x', 'images.npz', 'images.npz/x', 'x' * 300, 'a/' * 3000)],
        ('new\nline', 'one line'), ('caf\udcff', 'one line')]],
    ('eval_fid.py', ['--save_stats=/proc/x/stats.npz'], 'cannot be written'), ('dkdm.py', ['exits.py'], 'SystemExit'),
    ('dkdm.py', ['stops.py'], 'KeyboardInterrupt'), ('dkdm.py', ['.'], 'no config file'),
    ('dkdm.py', ['-x'], 'no config file'),
    ('dkdm.py', ['folded.py'], 'two lines'), ('dkdm.py', ['--teacher=no\nfile.pt'], 'one line')]


@pytest.fixture(scope='session')
def damaged(bad):
    net = M.load_denoiser(str(bad / 'teacher.safetensors'))[0].config
    diffusion = M.Diffusion('cosine', 100, 'v').config
    state = load_file(bad / 'teacher.safetensors')
    for name, header in dict({'class': {'net': {'class': 'Sequential'}, 'diffusion': diffusion}}, list=[1],
                             net={'net': 3, 'diffusion': diffusion},
                             huge={'net': net | {'model_channels': 10 ** 9}, 'diffusion': diffusion}, none={'key': 'x'},
                             depth={'net': net | {'num_res_blocks': 10 ** 9}, 'diffusion': diffusion},
                             odd={'net': net | {'shape': 4}, 'diffusion': diffusion},
                             vae={'net': net, 'diffusion': diffusion, 'vae': [1]},
                             pipeline={'net': net, 'diffusion': diffusion, 'pipeline': 3},
                             gone={'net': net, 'diffusion': diffusion, 'vae': 'gone'},
                             kind={'net': net | {'kind': 'DiT'}, 'diffusion': diffusion},
                             **{name: {'net': {'class': 'UNet2DModel', 'sample_size': 16} | config,
                                       'diffusion': diffusion} for name, config in dict(
                                 runs={'class': 'DiffusionPipeline'}, layers={'layers_per_block': 10 ** 9},
                                 long={'block_out_channels': [8] * 10 ** 5}, keys={'trust_remote_code': True},
                                 wide={'block_out_channels': [2 ** 20] * 4}, side={'sample_size': [16, 16]}).items()},
                             steps={'net': net, 'diffusion': diffusion | {'steps': 10 ** 12}},
                             schedule={'net': net, 'diffusion': diffusion | {'schedule': [2., 3.]}},
                             nan={'net': net, 'diffusion': diffusion},
                             mean={'net': {'class': 'classifier', 'name': 'resnet8', 'mean': 'x'}}).items():
        tensors = {k: v * (float('nan') if name == 'nan' else 1) for k, v in state.items()}
        M.write_tensors(tensors, str(bad / f'damaged_{name}.safetensors'), header)
    from safetensors.torch import save_file
    save_file(state, bad / 'damaged_json.safetensors', metadata={'config': '{'})
    for name, what in dict(list=[1], text={'weight': 'x'}, nothing={}, ints={1: torch.zeros(2)}).items():
        torch.save(what, bad / f'{name}.pt')
    for name, text in dict(list='[1]', empty='', text='"x"').items():
        os.makedirs(bad / f'index_{name}')
        (bad / f'index_{name}/model_index.json').write_text(text)
    pixels = np.zeros((64, 16, 16, 1), np.uint8)
    np.savez(bad / 'negative.npz', arr_0=pixels, arr_1=np.arange(64) - 1)
    np.savez(bad / 'flat.npz', arr_0=pixels[0])
    np.savez(bad / 'zero.npz', arr_0=pixels[:, :0], arr_1=np.arange(64))
    with open(bad / 'array.npz', 'wb') as f:
        np.save(f, pixels)
    os.makedirs(bad / 'broken/a')
    os.makedirs(bad / 'half/a')
    (bad / 'broken/a/one.png').write_bytes(b'\x89PNG\r\n\x1a\n none')
    from PIL import Image
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(bad / 'half/a/one.jpg')
    os.truncate(bad / 'half/a/one.jpg', 1000)
    (bad / 'list.txt').write_text('a/one.png first\n')
    (bad / 'latin.txt').write_bytes(b'caf\xe9.png 1\n')
    space = f"classifier.safetensors {M.digest(M.load_classifier(str(bad / 'classifier.safetensors')))}"
    eye = np.eye(16)
    for name, sigma in dict(nan=eye * np.nan, odd=eye + np.triu(eye + 1, 1), negative=-eye).items():
        np.savez(bad / f'stats_{name}.npz', mu=np.zeros(16), sigma=sigma, n=5, space=space)
    (bad / 'exits.py').write_text('import sys\nsys.exit(0)\n')
    (bad / 'stops.py').write_text('raise KeyboardInterrupt\n')
    (bad / 'folded.py').write_text('raise ValueError("two\\nlines")\n')
    return bad


@pytest.mark.parametrize('script, args, words', [
    (script, [f'--{value.partition("~")[0]}'], value.partition('~')[2] or value.partition('=')[0])
    for script, values in VALUES.items() for value in values.split()] + FILES)
def test_bad_lines(script, args, words, damaged, tmp_path):
    before = sorted(os.listdir(damaged))
    out = [] if 'out_dir' in str(args) else [f'--out_dir={tmp_path}/o']
    err = run(script, *COMMANDS[script], *out, *args, cwd=damaged, ok=False)
    assert words in err and not os.listdir(tmp_path) and sorted(os.listdir(damaged)) == before, err


def test_what_is_not_finite_is_not_saved(tiny, tmp_path, capsys):
    args = [*COMMANDS['synthesize.py'], '--eta=1e30', f'--out_dir={tmp_path}']
    assert 'not finite' in run('synthesize.py', *args, cwd=tiny, ok=False)
    net = M.LVAE(16, 1, 8)
    net.d0.out.weight.data[0] = float('nan')
    with pytest.raises(SystemExit):
        M.save_model(net, str(tmp_path / 'student.safetensors'))
    assert 'd0.out.weight is not finite' in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == ['.lock', 'log.csv']


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_no_file_runs_code(pipelines, tiny, tmp_path):
    import pickle
    import shutil
    from diffusers import DiffusionPipeline
    mark, cases = Marker(str(tmp_path / 'marker')), []
    code = f"open({mark.path!r}, 'w')\nclass Net: pass\n"
    for name in ('a.pt', 'a.pth', 'a.th', 'a.ckpt', 'a.bin'):
        torch.save({'state_dict': {'weight': mark}}, tmp_path / name)
    for name in ('raw.pt', 'raw.safetensors', 'raw.npz', 'image/raw.png'):
        os.makedirs(tmp_path / 'image', exist_ok=True)
        (tmp_path / name).write_bytes(pickle.dumps(mark))
    np.savez(tmp_path / 'a.npz', arr_0=np.array([mark], dtype=object))
    np.savez(tmp_path / 'mu.npz', mu=np.array([mark], dtype=object))
    for name in ('run', 'shards'):
        os.makedirs(tmp_path / name)
        torch.save(mark, tmp_path / name / 'ckpt.pt')
        np.savez(tmp_path / name / 'images_0000_00000.npz', arr_0=np.zeros((4, 16, 16, 1), np.uint8),
                 settings=np.array([mark], dtype=object))
    index = json.loads((pipelines / 'ddpm/model_index.json').read_text())
    for name, file, parts in [('component', 'unet/net.py', {'unet': ['net', 'Net']}),
                              ('library', 'unet/diffusers.py', {'unet': ['diffusers', 'Net']}),
                              ('pipeline', 'net.py', {'_class_name': ['net', 'Net']}), ('none', 'None.py', {}),
                              ('string', 'net.py', {'_class_name': 'net'}),
                              ('module', 'net.py', {'unet': ['net', 'Net']}), ('weights', 'net.py', {}),
                              ('scheduler', 'scheduler/net.py', {'scheduler': ['net', 'Net']})]:
        shutil.copytree(pipelines / 'ddpm', tmp_path / name)
        (tmp_path / name / file).write_text(code)
        (tmp_path / name / 'model_index.json').write_text(json.dumps(index | parts))
        cases.append(['dkdm.py', f'--teacher={tmp_path}/{name}'])
    os.remove(next((tmp_path / 'weights/unet').glob('*.safetensors')))
    torch.save(mark, tmp_path / 'weights/unet/diffusion_pytorch_model.bin')
    os.makedirs(tmp_path / 'vae')
    (tmp_path / 'vae/config.json').write_text('{"_class_name": "AutoencoderKL"}')
    torch.save(mark, tmp_path / 'vae/diffusion_pytorch_model.bin')
    with pytest.raises(ValueError, match='custom code'):                       # diffusers itself, as required
        DiffusionPipeline.from_pretrained(tmp_path / 'component')
    net = M.load_denoiser(str(pipelines / 'ddpm'))[0]
    for name in ('component', 'scheduler'):                                    # a student that says where its parts are
        M.save_model(net, f'{tmp_path}/vae_{name}.safetensors', M.Diffusion(), vae=f'{tmp_path}/{name}')
        M.save_model(net, f'{tmp_path}/of_{name}.safetensors', M.Diffusion(), pipeline=f'{tmp_path}/{name}')
        cases += [['dkdm.py', f'--teacher={tmp_path}/vae_{name}.safetensors'],
                  ['export.py', f'--model={tmp_path}/of_{name}.safetensors']]
    names = 'a.pt', 'a.pth', 'a.ckpt', 'a.bin', 'raw.pt', 'raw.safetensors'
    cases += [['dkdm.py', f'--teacher={tmp_path}/{name}'] for name in names]
    cases += [['dkdm.py', '--method=data', f'--data={tmp_path}/{name}'] for name in ('a.npz', 'raw.npz', 'image')]
    cases += [['distill_classifier.py', f'--{key}={tmp_path}/{name}'] for key, name in (
        ('teacher', 'a.th'), ('init_from', 'a.pth'), ('data', 'a.npz'), ('data', 'shards'))]
    cases += [['synthesize.py', f'--prior={tmp_path}/a.ckpt'], ['synthesize.py', f'--student={tmp_path}/a.th'],
              ['synthesize.py', f'--out_dir={tmp_path}/shards'], ['distill_vae.py', f'--teacher={tmp_path}/vae'],
              ['distill_vae.py', f'--teacher={tmp_path}/a.pt']]
    cases += [[name, f'--out_dir={tmp_path}/run', '--init_from=resume']
              for name in ('dkdm.py', 'distill_classifier.py', 'distill_vae.py')]
    cases += [['eval_fid.py', f'--models={tmp_path}/a.pt'], ['eval_fid.py', f'--reference={tmp_path}/mu.npz'],
              ['eval_fid.py', f'--features={tmp_path}/a.pth'],
              ['eval_fid.py', '--features=inception', f'--inception_weights={tmp_path}/a.pth'],
              ['eval_fid.py', f'--models={tmp_path}/weights']]

    def one(case):
        out = [] if '--out_dir' in str(case) else [f'--out_dir={tmp_path}/o']
        err = run(case[0], *COMMANDS[case[0]], *out, *case[1:], cwd=tiny, ok=False)
        assert not os.path.exists(mark.path) and not os.path.exists(tmp_path / 'o'), (case, err)
    at_once(one, cases)
    assert len(cases) >= 20


@pytest.mark.parametrize('make', [
    lambda: M.UNet(16, 3, 6, 32, 2, (1, 2, 2), (8,), num_head_channels=16), lambda: M.UNet(16, 3, 6, 32, 1, (1, 2), (16, 8), num_classes=4),
    lambda: M.UNet(16, 3, 3, 32, 1, (1, 2), (8,), use_scale_shift_norm=False, resblock_updown=False),
    lambda: M.DiT(8, 2, 4, 32, 2, 2, num_classes=5), lambda: M.DiT(8, 2, 4, 32, 1, 2, num_classes=5, learn_sigma=False)])
@torch.no_grad()
def test_our_networks_in_diffusers(make, tmp_path):
    import diffusers
    net = make()
    position = net.state_dict().get('pos_embed', torch.zeros(0)).clone()
    fill(net).load_state_dict({'pos_embed': position} if len(position) else {}, strict=False)
    M.save_model(net, str(tmp_path / 'net.safetensors'), M.Diffusion(learn_sigma=False))
    run('export.py', '--model=net.safetensors', '--out_dir=o', cwd=tmp_path)
    c = net.config
    kind, part = ('UNet2DModel', 'unet') if c['class'] == 'UNet' else ('DiTTransformer2DModel', 'transformer')
    assert os.path.exists(tmp_path / 'o/model_index.json') == (not c['num_classes'])
    other = getattr(diffusers, kind).from_pretrained(tmp_path / 'o', subfolder=part)
    x, t, y = wave(2, c['in_channels'], c['image_size'], c['image_size']), torch.tensor([3, 40]), torch.tensor([1, -1])
    kw = {'class_labels': torch.where(y < 0, c['num_classes'], y)} if c['num_classes'] else {}
    ours, theirs = net(x, t, y), other(x, timestep=t, **kw).sample
    # float32 on these weights (1e-13 in float64); diffusers' DiT has slightly other frequencies of t
    assert (ours - theirs).norm() < (1e-4 if c['class'] == 'UNet' else 5e-4) * ours.norm()


def test_export(pipelines, tmp_path):
    from diffusers import DiffusionPipeline
    unet, dit = M.UNet(16, 1, 2, 32, 1, (1, 2), (8,)), M.DiT(8, 2, 4, 32, 1, 2, num_classes=1000)
    latents = M.UNet(8, 4, 4, 32, 1, (1, 2), (8,))
    scaled = M.load_denoiser(str(pipelines / 'ldm'))[1]
    for name, net, diffusion in [('unet', unet, M.Diffusion(prediction='v')),
                                 ('dit', dit, M.Diffusion('linear', clip=False)),
                                 ('ldm', latents, M.Diffusion(**scaled.config | {'prediction': 'v'}))]:
        vae = str(pipelines / name) if name != 'unet' else ''
        M.save_model(net, str(tmp_path / f'{name}.safetensors'), diffusion, vae=vae)
        run('export.py', f'--model={name}.safetensors', f'--out_dir={name}', cwd=tmp_path)
        pipe = DiffusionPipeline.from_pretrained(tmp_path / name)
        pipe.set_progress_bar_config(disable=True)
        call = dict(class_labels=[1], guidance_scale=2.0) if name == 'dit' else {}
        assert np.isfinite(pipe(num_inference_steps=2, output_type='np', **call).images).all()
        if vae:                                                                # its own process, not the teacher's
            found = M.load_denoiser(str(tmp_path / name))[1]
            assert found.prediction == diffusion.prediction and found.learn_sigma == (name == 'dit')
            assert torch.allclose(found.alpha_bar, diffusion.alpha_bar)
    assert '--link' in run('export.py', '--help', cwd=tmp_path)
    assert len(os.listdir(tmp_path)) == 6                                      # the three files and folders


# ---- VAEs ----
def test_vae_distillation(tiny, tmp_path):
    def one(case):
        i, args = case
        out = run(*VAE, *args, f'--out_dir={tmp_path}/{i}', cwd=tiny)
        assert np.isfinite(losses(tmp_path / str(i))).all() and 'student.safetensors' in out
        return set(os.listdir(tmp_path / str(i)))
    cases = [['--method=prior', '--max_steps=100', '--lr=3e-3', '--lr_decay=False'], ['--method=synthetic', '--data=images.npz'],
             ['--method=data', '--data=images.npz', '--kl_warmup=3']]
    prior, synthetic, data = at_once(one, enumerate(cases))
    assert 'samples.png' in prior and 'reconstructions.png' not in prior and {'samples.png', 'reconstructions.png'} <= synthetic & data
    assert losses(tmp_path / '0')[-10:].mean() < 0.3 * losses(tmp_path / '0')[:5].mean()
    student, teacher = (M.load_vae(f) for f in (f'{tmp_path}/0/student.safetensors', f'{tiny}/lvae.safetensors'))
    noise = student.noise(64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        out, out_T = student.generate(noise)[0][:, :1], teacher.generate(noise)[0][:, :1]
    last = np.genfromtxt(tmp_path / '0/log.csv', delimiter=',', names=True)['out'][-10:].mean()
    assert ((out - out_T) ** 2).sum((1, 2, 3)).mean() / 0.1 == pytest.approx(last, rel=0.3)          # BatchNorm in training and out of it
    err = run(*VAE, '--lr=1e30', '--max_steps=50', '--save_every=1', '--log_every=50',
              f'--out_dir={tmp_path}/bad', cwd=tiny, ok=False)
    assert 'not finite' in err                                                 # the last checkpoint is, BatchNorm too
    assert all(v.isfinite().all() for v in M.load_checkpoint(f'{tmp_path}/bad', 0)[0]['net'].values())
    out = run('eval_fid.py', f'--models={tiny}/lvae.safetensors,{tmp_path}/0/student.safetensors', '--reference=images.npz', '--num_samples=32',
              '--features=classifier.safetensors', f'--out_dir={tmp_path}/e', cwd=tiny)
    one, two = metrics(tmp_path / 'e')
    assert one['parameters'] > 3 * two['parameters'] > 0 and one['MFLOPs'] > two['MFLOPs'] > 0 and 'sampler' not in one, out


def test_vaes_of_diffusers(pipelines, tmp_path):
    """The teacher from a pipeline or of its own; the student is of its class and goes back to diffusers."""
    import diffusers
    small = {'sd': {'block_out_channels': (4, 8)}, 'tiny_vae': {'encoder_block_out_channels': (4, 4), 'decoder_block_out_channels': (4, 4)}}

    def one(name):
        out = run('distill_vae.py', f'--teacher={name}', f'--student_config={small[name]}', '--method=synthetic', '--data=images.npz',
                  '--batch_size=4', '--max_steps=2', f'--out_dir={tmp_path}/{name}', cwd=pipelines)
        assert f'{tmp_path}/{name}/student' in out and np.isfinite(losses(tmp_path / name)).all()
        assert os.path.getsize(tmp_path / name / 'reconstructions.png') > 0
        return type(M.load_vae(f'{tmp_path}/{name}/student').net)
    assert at_once(one, small) == [diffusers.AutoencoderKL, diffusers.AutoencoderTiny]


def test_images_for_a_vae(tiny, pipelines, tmp_path):
    """Guided by a VAE, the kept images lie nearer to what it reconstructs; they have no labels."""
    def one(case):
        name, cwd, args = case
        out = run(*SYNTH, *args, f'--out_dir={tmp_path}/{name}', cwd=cwd)
        images, labels = M.load_images(str(tmp_path / name))
        assert 'distill_vae.py' in out and labels is None and len(images) == 32
        return np.genfromtxt(tmp_path / name / 'log.csv', delimiter=',', names=True)['mse'].reshape(2, -1)[:, -1].mean()
    ours = ['--prior=teacher.safetensors', '--teacher=vae:lvae.safetensors', '--alpha=0.1', '--lca=none']
    plain, guided, _ = at_once(one, [('plain', tiny, [*ours, '--eta=0']), ('guided', tiny, [*ours, '--eta=300']),
                                     ('sd', pipelines, ['--prior=sd', '--teacher=vae:sd', '--guidance=2.0'])])
    assert guided < 0.9 * plain


# ---- what the repository ships ----
def test_bench(tmp_path):
    tiny_net = ['bench.py', '--model_channels=16', '--num_res_blocks=1', '--channel_mult=(1, 2)', '--num_head_channels=16',
                '--batch_size=4', '--repeats=1', '--image_size=16', '--attention_resolutions=(8,)']
    out = run(*tiny_net, '--classes=3', cwd=tmp_path)
    assert '% of the peak' in out and 'walk' in out and 'GFLOP/s' in out
    assert run(*tiny_net, '--student=dit', '--depth=1', '--hidden_size=16', '--num_heads=2', cwd=tmp_path, ranks=2).count('one step') == 2
    assert run(*tiny_net, '--what=sample', cwd=tmp_path).count('ms per image') == 6
    assert 'what' in run('bench.py', '--what=nothing', cwd=tmp_path, ok=False)
    assert '--teacher_width' in run('bench.py', '--help', cwd=tmp_path)


@pytest.mark.parametrize('script', ['dkdm.py', 'synthesize.py', 'distill_classifier.py', 'distill_vae.py', 'eval_fid.py'])
def test_help(script, tmp_path):
    out = run(script, '--help', cwd=tmp_path)
    assert '--out_dir' in out and '--seed' in out and len(out.splitlines()) > 15


def test_paper_configs_say_where_the_teacher_is(tmp_path):
    """Every config runs up to the teacher that it needs, so its keys are right."""
    def one(name):
        script = {'dkdm': 'dkdm.py', 'synth': 'synthesize.py', 'distill': 'distill_classifier.py', 'vae': 'distill_vae.py'}[name.split('_')[0]]
        err = run(script, os.path.join(ROOT, 'config', name), cwd=tmp_path, ok=False)
        assert 'no diffusers pipeline at' in err or 'no file' in err and '; get ' in err, err
        assert not os.listdir(tmp_path)
    at_once(one, [f for f in sorted(os.listdir(os.path.join(ROOT, 'config'))) if f.startswith(('dkdm', 'synth', 'distill', 'vae')) and f.endswith('.py')
                  and 'mnist' not in f and 'teacher' not in f])


def test_teacher_configs(tmp_path):
    """Every config of a teacher of Tables I and II reads, and leaves the file that the other configs ask for."""
    configs = [f for f in sorted(os.listdir(os.path.join(ROOT, 'config'))) if f.startswith('teacher_')]
    asked = ' '.join(open(os.path.join(ROOT, 'config', f)).read() for f in os.listdir(os.path.join(ROOT, 'config')) if f.startswith('distill'))
    for name in configs:
        err = run('distill_classifier.py', os.path.join(ROOT, 'config', name), '--data=missing.npz', cwd=tmp_path, ok=False)
        assert 'missing.npz cannot be read' in err and f'out/{name[:-3]}/student.safetensors' in asked


def test_bundled_models(tmp_path):
    """The teacher draws digits that the bundled classifier is sure of, all ten of them."""
    net, diffusion = M.load_denoiser(os.path.join(ROOT, 'pretrained/mnist_unet.safetensors'))
    classifier = M.load_classifier(os.path.join(ROOT, 'pretrained/mnist_resnet.safetensors'))
    x = M.sample(net, diffusion, (64, 1, 28, 28), 50, 'ddpm', spacing='even', generator=torch.Generator().manual_seed(0))
    p = classifier(M.preprocess(classifier, x)).softmax(1).max(1)
    assert (p.values > 0.9).float().mean() > 0.85 and len(p.indices.unique()) == 10


# ---- the README ----
def test_readme():
    """Its commands name scripts, files and settings that exist, its links into the code the lines that they say."""
    def read(name):
        with open(os.path.join(ROOT, name), encoding='utf-8') as f:
            return f.read()

    def settings(script):
        head = read(script).split('configurator.py')[0]
        base = settings('dkdm.py') if "'dkdm.py'" in head else set()          # bench.py's
        return base | set(re.findall('^([a-zA-Z]\\w*) = ', head, re.M))
    text, wrong, seen = read('README.md'), [], 0
    names = [f for f in os.listdir(ROOT) if f.endswith('.py') and f != 'test_smoke.py']
    scripts = [f for f in names if 'configurator.py' in read(f)]
    for path in re.findall(r'(?<![\w/])(?:config|pretrained|assets)/[^\s`)"\',;]+', text):
        if not glob.glob(os.path.join(ROOT, re.sub(r'\$\{.*?\}|\$\w+', '*', path))):
            wrong.append(f'no file {path}')
    blocks = re.findall(r'^```sh\n(.*?)^```', text, re.M | re.S)
    blocks += re.findall('`((?:python|torchrun) [^`]+)`', text) + re.findall('`(--(?!key)[^`]+)`', text)
    for command in re.split(r'\n|&&|[;|]|\$\(', '\n'.join(blocks).replace('\\\n', ' ')):
        script = re.search(r'(?:^|\s)(\w+\.py)(?=\s|$)', command)
        seen += script is not None
        if script and script[1] not in scripts:
            wrong.append(f'no script {script[1]}')
            continue
        known = settings(script[1]) if script else set().union(*map(settings, scripts))   # of a shell function: any
        wrong += [f'no setting --{k}: {command.strip()}' for k in
                  re.findall(r'(?:^|\s)--(\w+)=', command[script.end():] if script else command) if k not in known]
    links = re.findall(r'\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)', text)
    for name, script, line in links:
        lines = list(enumerate(read(script).split('\n'), 1))
        right = [i for i, s in lines if re.match(rf'\s*(def|class) {re.escape(name)}\b', s)]
        right = right or [i for i, s in lines if name in s]
        if int(line) not in right:
            wrong.append(f'{script}#L{line}: `{name}` is in line {right}')
    assert not wrong and seen > 50 and len(links) > 25, '\n'.join(wrong)
