"""
    python -m pytest -q

Everything on tiny sizes: the numbers of the original code, the algebra of one step, every method as a user would start
it, killing and resuming, two ranks, bad input. The golden numbers are what the original networks give when every weight
is set by a formula (`fill`). Each test runs in a folder of its own, where `tiny` and `pipelines` put small models.
"""
import copy
import csv
import glob
import json
import multiprocessing
import os
import pickle
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
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

import models as M

ROOT = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines(text):
    return [line.strip() for line in text.strip().splitlines()]


def numbers(text):
    return [float(word) for word in text.split()]


# ---- networks and diffusion: the numbers of the original code, the algebra of one step ----
def fill(net):
    """Every weight by a formula in state_dict order."""
    for k, (name, w) in enumerate(net.state_dict().items()):
        i = torch.arange(w.numel(), dtype=torch.float64)
        if not w.is_floating_point():
            continue
        if name.endswith('running_var'):
            v = 1 + 0.5 * torch.sin(0.7 * i + k) ** 2
        elif w.dim() >= 2:
            v = torch.sin(1.2345 * i + k) * (2 / (w.numel() / w.shape[0])) ** 0.5
        else:
            v = 0.1 * torch.sin(0.7 * i + k) + name.endswith('weight')
        w.copy_(v.view(w.shape))
    return net.eval()


def wave(*shape):
    return torch.sin(0.37 * torch.arange(np.prod(shape), dtype=torch.float64)).view(shape).float()


ADM = dict(image_size=32, out_channels=6, model_channels=32, num_res_blocks=1)
OLD = dict(use_scale_shift_norm=False, resblock_updown=False, use_new_attention_order=False)
PLAIN = OLD | dict(image_size=64, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(32,))
GOLDEN = """
    UNet(**ADM)                                        : 1965894 -0.175411 -0.080837 -0.165378 -0.157294 0.0180449047
    UNet(**ADM, num_classes=10)                        : 1967174 -0.160568 -0.091217 0.048817 -0.177207 0.0410768057
    UNet(32, 3, 3, 32, 1, (1, 2), (16,), 4, -1, **OLD) : 702499 -0.167638 -0.077908 -0.250754 -0.173581 0.0796254817
    UNet(8, 3, 3, 32, 1, (1, 2), (4,), **OLD)          : 702499 0.163382 0.089571 -0.001536 -0.05786 0.0798815926
    DiT(8, 2, 4, 64, 2, 4, num_classes=10)             : 183200 0.354121 -0.005 -0.0108 0.288655 -0.0073913539
    classifier('wrn16_1')                              : 175066 -0.043444 -0.02985 0.102882 0.064428 -0.0039462751
    classifier('wrn40_2')                              : 2243546 -0.157957 -0.052412 0.112491 0.217914 -0.0199794943
    classifier('resnet18')                             : 11173962 0.114946 0.069646 0.003063 -0.036003 0.0101198321
    classifier('vgg11')                                : 9231114 0.060497 0.072384 0.110402 0.051044 0.0047314156
    classifier('resnet8')                              : 78042 -0.052322 -0.129495 0.034725 0.018425 -0.0062139962
    classifier('resnet20', shortcut='pad')             : 269722 0.234892 -0.043058 0.01206 -0.031623 0.0159875820"""


@pytest.mark.parametrize('golden', lines(GOLDEN))
@torch.no_grad()
def test_networks_agree_with_the_original(golden):
    make, _, golden = golden.partition(' : ')
    net, (parameters, *first, mean) = fill(eval('M.' + make)), numbers(golden)
    kind, side, y = net.config['class'], net.config['image_size'], {'UNet': [0, 3, 9], 'DiT': [1, 9, -1]}
    args = [wave(2, 3, side, side)]
    if kind != 'classifier':
        y = torch.tensor(y[kind]) if net.num_classes else None
        args = wave(3, net.config['in_channels'], side, side), torch.tensor([0, 500, 999]), y
    out = net(*args)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert np.allclose(out.flatten()[:4], first, atol=5e-6) and abs(out.mean() - mean) < 1e-6
    rebuilt = M.make(**json.loads(json.dumps(net.config)))
    rebuilt.load_state_dict(net.state_dict())
    assert torch.equal(rebuilt.eval()(*args), out)


@pytest.mark.parametrize('width, out, means, stds', [  # first means and stds of the prior at the four lower levels
    (8, '30416 -0.22766 -0.213583 -0.406722 -0.574531 0.0157426646',
     '0.899793 1.9351 0.40323 0.420649 0.38297 0.2482 0.036014 0.060451',
     '3.40077 2.328679 0.996691 0.988078 0.683756 0.783412 1.149193 1.189251'),
    (128, '5386496 -0.073366 0.026837 0.468734 0.441703 0.0045697958',
     '0.687407 0.198185 -0.024446 -0.030875 -0.133654 0.03659 -0.021708 -0.022108',
     '0.6145 0.65983 1.005505 0.990185 1.073794 1.017792 1.016471 1.025666')])
@torch.no_grad()
def test_ladder_vaes_agree_with_the_original(width, out, means, stds):
    net, (parameters, *first, mean) = fill(M.LVAE(width=width)), numbers(out)
    out, p = net.generate([wave(2, 16, side, side) for side in (16, 8, 4, 2, 1)])
    assert sum(v.numel() for v in net.parameters()) == parameters and len(p) == 5
    assert np.allclose(out.flatten()[:4], first, atol=1e-6) and abs(out.mean() - mean) < 1e-6
    for k, wanted in enumerate((means, stds)):
        assert np.allclose(torch.cat([level[k].flatten()[:2] for level in p[:4]]), numbers(wanted), atol=1e-6)
        assert torch.equal(p[4][k], torch.full((2, 16, 1, 1), float(k)))


@torch.no_grad()
def test_vae_losses_have_the_closed_form():
    g = torch.Generator().manual_seed(0)
    a, b = ((torch.randn(3, 2, 4, 4, generator=g), torch.rand(3, 2, 4, 4, generator=g) + 0.5) for _ in range(2))
    assert torch.allclose(M.gaussian_kl(a, b), kl_divergence(Normal(*a), Normal(*b)).sum((1, 2, 3)), rtol=1e-5)
    product, both = sum(Normal(*c).log_prob(b[0]) - Normal(*c).log_prob(a[0]) for c in (a, b)), Normal(*M.combine(a, b))
    assert torch.allclose(both.log_prob(b[0]) - both.log_prob(a[0]), product, atol=1e-4)
    out_S, out_T = torch.rand(2, 3, 6, 8, 8, generator=g)
    kl = kl_divergence(*(Normal(out[:, :3], 0.05 ** 0.5) for out in (out_T, out_S))).sum((1, 2, 3)).mean()
    source, names = open(os.path.join(ROOT, 'distill_vae.py')).read(), {'channels': 3, 'beta': 0.1}
    exec(source[source.index('def wasserstein'):source.index('def below_prior')], names)
    assert torch.allclose(names['output_kl'](out_S, out_T), kl, rtol=1e-5)
    assert torch.allclose(names['wasserstein'](a, b), sum(F.mse_loss(*c) for c in zip(a, b)))
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
    even = M.sampling_steps(1000, 50, 'even')
    assert even[0] == 999 and even[-4:] == [61, 41, 20, 0] and M.sampling_steps(1000, 50, 'leading')[:2] == [980, 960]
    assert M.sampling_steps(1000, 4) == [999, 749, 499, 249] and M.sampling_steps(1000, 1) == [999]


@pytest.mark.parametrize('t, x, noise, eps, v, mean, logvar, x_prev', list(map(numbers, lines("""
    0 -0.7850218 -1.3022797 -0.1056963 -0.0671528 -0.7843589 -10.4360132 -0.7843589
    17 -0.4481776 -0.1350019 -0.1086891 -0.0475961 -0.4478559 -9.0415459 -0.4493248
    500 -1.5030838 0.7347440 -0.0851547 -0.0784692 -1.5004717 -5.7602057 -1.4592313
    999 0.0126738 -0.2756686 -0.0567257 -0.0377883 0.0019577 -0.0010018 -0.2735729"""))))
def test_a_step_agrees_with_the_original(t, x, noise, eps, v, mean, logvar, x_prev):
    d, t = M.Diffusion('cosine'), torch.tensor([int(t)])
    x, noise, out = (torch.tensor(pixel).view(1, -1, 1, 1) for pixel in ([x], [noise], [eps, v]))
    got = [*d.mean_logvar(out, x, t), d.ddpm_step(out, x, t, t - 1, noise)]
    assert np.allclose([g.item() for g in got], [mean, logvar, x_prev], rtol=1e-5, atol=1e-6)


def random_step(prediction='eps', schedule='cosine', clip=False):
    g, t = torch.Generator().manual_seed(0), torch.tensor([1, 17, 500, 990])
    x0, noise = (torch.randn(4, 1, 8, 8, generator=g).clamp(-1, 1) for _ in range(2))
    d = M.Diffusion(schedule, prediction=prediction, clip=clip)
    return d, x0, noise, t, d.q_sample(x0, t, noise)


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'sqrt_linear', 'flow'])
def test_predictions_agree_on_the_same_point(schedule):
    steps = {}
    for prediction in ('v', 'x0', 'flow') + ('eps',) * (schedule != 'flow'):
        d, x0, noise, t, x_t = random_step(prediction, schedule)
        out = d.target(x0, x_t, t, prediction)
        assert torch.allclose(d.predict_x0(out, x_t, t), x0, atol=2e-3)
        for to in ('eps', 'v', 'x0', 'flow'):
            assert torch.allclose(d.convert(out, x_t, t, to), d.target(x0, x_t, t, to), atol=2e-2)
        steps[prediction] = torch.stack([d.ddpm_step(out, x_t, t, t - 1, noise), d.ddim_step(out, x_t, t, t // 2)])
    for found in steps.values():
        assert torch.allclose(found, steps['x0'], atol=2e-3)


def test_one_step_has_the_closed_form():
    """Eqs. (5)-(7), (10), (12) written out with betas; a jump to -1 is the predicted clean image."""
    d, x0, noise, t, x_t = random_step()
    v = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(4, 1, 8, 8)
    out, ab = torch.cat([noise, v], dim=1), d.alpha_bar.view(-1, 1, 1, 1)
    beta = 1 - ab[t] / ab[t - 1]
    mean = (x_t - beta / (1 - ab[t]).sqrt() * noise) / (1 - beta).sqrt()                      # Eq. (10)
    beta_tilde = (1 - ab[t - 1]) / (1 - ab[t]) * beta                                         # Eq. (6)
    logvar = (v + 1) / 2 * beta.log() + (1 - v) / 2 * beta_tilde.log()                        # Eq. (12)
    for got, wanted in zip(d.mean_logvar(out, x_t, t), (mean, logvar)):
        assert torch.allclose(got.double(), wanted, atol=1e-4)
    z, clean, s = torch.randn(4, 1, 8, 8), d.predict_x0(out, x_t, t), torch.tensor([-1, 3, 250, 100])
    assert torch.allclose(d.ddpm_step(out, x_t, t, t - 1, z).double(), mean + (logvar / 2).exp() * z, atol=1e-3)
    assert torch.allclose(d.ddpm_step(out, x_t, t, -1), clean, atol=1e-4)
    ddim = ab[s].sqrt() * clean + (1 - ab[s]).sqrt() * noise
    assert torch.allclose(d.ddim_step(out, x_t, t, s).double(), ddim, atol=1e-3)
    d, x, out = M.Diffusion('cosine', 100), torch.randn(3, 1, 4, 4), torch.randn(3, 2, 4, 4)
    for t, s in ((99, 40), (1, 0), (0, -1)):                                   # ints or tensors
        tt, ss = torch.full((3,), t), torch.full((3,), s)
        assert torch.equal(d.ddpm_step(out, x, t, s, x), d.ddpm_step(out, x, tt, ss, x))
        assert torch.equal(d.ddim_step(out, x, t, s, 0.5, x), d.ddim_step(out, x, tt, ss, 0.5, x))


def test_losses():
    """The KL is the original's: in bits, the student's mean in it neither clamped nor trained."""
    d, x0, noise, t, x_t = random_step(clip=True)
    teacher, student = torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8, requires_grad=True)
    assert d.distill_loss(teacher, teacher, x_t, t)['mse'].max() == 0
    losses = d.distill_loss(student, teacher, x_t, t, lam=0.001)
    assert torch.allclose(losses['mse'], ((student - teacher)[:, :1] ** 2).mean((1, 2, 3)))
    losses['vb'].sum().backward()
    assert student.grad[:, :1].abs().max() == 0 and student.grad[:, 1:].abs().max() > 0       # the variance only
    assert losses['loss'].shape == (4,) and torch.allclose(losses['loss'], losses['mse'] + losses['vb'])
    perfect = d.training_loss(torch.cat([noise, torch.zeros_like(noise)], 1), x0, x_t, t, noise, 0.)
    assert perfect['loss'].max() == 0
    d, x, t = M.Diffusion('cosine'), torch.full((1, 1, 1, 1), 0.3), torch.tensor([500])
    student, teacher = (torch.tensor(out).view(1, 2, 1, 1) for out in ([0.2, 0.5], [0.1, -0.5]))
    moments = d.mean_logvar(teacher, x, t), d.mean_logvar(student, x, t, clip=False)
    kl = kl_divergence(*(Normal(mean, (logvar / 2).exp()) for mean, logvar in moments)).item() / np.log(2)
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


@torch.no_grad()
def test_guidance():
    net = fill(M.DiT(8, hidden_size=64, depth=2, num_heads=4, num_classes=10))
    x, t, y = wave(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 9])
    cond, null, got = net(x, t, y), net(x, t), M.guided(net, x, t, y, 3.)
    assert torch.allclose(got[:, :4], null[:, :4] + 3 * (cond - null)[:, :4], atol=1e-4)
    assert torch.allclose(got[:, 4:], cond[:, 4:], atol=1e-5)


# ---- files and images ----
@pytest.mark.parametrize('config', [
    ADM, PLAIN, ADM | dict(num_classes=10, attention_resolutions=(8,), num_res_blocks=2, channel_mult=(1, 2, 3))])
def test_original_unets_load_by_their_shapes(config):
    net = fill(M.UNet(**config))
    torch.save(net.state_dict(), 'adm.pt')
    known = {k: config[k] for k in ('image_size', 'use_new_attention_order') if k in config}
    loaded, diffusion = M.load_denoiser('adm.pt', **known)
    assert loaded.config == net.config and diffusion.prediction == 'eps'
    assert diffusion.learn_sigma == (net.config['out_channels'] == 6)


def test_ldm_and_dit_checkpoints():
    net = fill(M.UNet(**PLAIN))
    betas = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000, dtype=torch.float64) ** 2
    state = {'betas': betas, 'first_stage_model.x': torch.zeros(1)}
    for k, v in net.state_dict().items():
        state['model.diffusion_model.' + k] = torch.zeros_like(v)
        state['model_ema.diffusion_model' + k.replace('.', '')] = v
    torch.save({'state_dict': state}, 'ldm.ckpt')
    loaded, d = M.load_denoiser('ldm.ckpt')
    assert loaded.config == net.config and torch.equal(loaded.out[2].weight, net.out[2].weight) and not d.clip
    assert np.allclose(d.alpha_bar[:-1], M.Diffusion('sqrt_linear', beta_range=(0.0015, 0.0195)).alpha_bar[:-1])
    dit = fill(M.DiT(8, hidden_size=64, depth=2, num_heads=4, num_classes=10))
    torch.save({'ema': dit.state_dict()}, 'dit.pt')
    loaded, d = M.load_denoiser('dit.pt', num_heads=4)
    assert loaded.config == dit.config and d.learn_sigma


def test_own_files_describe_themselves():
    net, d = M.UNet(28, 1, 2, 20, 1, (1, 2), (7,), num_head_channels=20, patch_size=2), M.Diffusion('linear', 100, 'v')
    M.save_model(fill(net), 'a.safetensors', d)
    loaded, d2 = M.load_denoiser('a.safetensors')
    assert [d2.config, loaded.config] == json.loads(json.dumps([d.config, net.config]))
    x, t = wave(2, 1, 28, 28), torch.tensor([3, 70])
    assert torch.equal(loaded(x, t), net(x, t)) and os.listdir() == ['a.safetensors']
    clf = fill(M.classifier('resnet8', 7, image_size=28, in_channels=1, width=8))
    M.save_model(clf, 'c.safetensors')
    assert torch.equal(M.load_classifier('c.safetensors')(x), clf(x))


@pytest.mark.parametrize('name, renamed', [
    ('resnet34', []), ('wrn40_2', []), ('vgg16', []), ('resnet50', []),
    ('resnet34', [('.shortcut.', '.downsample.'), ('linear.', 'fc.')]),        # timm's names
    ('resnet20', [('fc.', 'linear.'), ('', 'module.', 1)])])                   # the paper's shortcuts, of CIFAR
def test_published_classifiers_load_by_their_shapes(name, renamed):
    net = fill(M.classifier(name, 10, **{'shortcut': 'pad'} if name == 'resnet20' else {}))
    state = net.state_dict()
    for change in renamed:
        state = {k.replace(*change): v for k, v in state.items()}
    torch.save({'state_dict': state, 'best_prec1': 91.7}, 'c.pth')
    loaded = M.load_classifier('c.pth', image_size=64)
    assert loaded.config['image_size'] == 64 and loaded.config['mean'][0] == (0.485 if name == 'resnet20' else 0.4914)
    assert torch.equal(loaded(wave(2, 3, 32, 32)), net(wave(2, 3, 32, 32)))


def test_torchvision_classifiers():
    import torchvision
    net = torchvision.models.resnet18(num_classes=5).eval()
    torch.save(net.state_dict(), 'r.pth')
    loaded, x = M.load_classifier('r.pth'), wave(1, 3, 64, 64)
    logits, maps = loaded.forward_features(x)
    assert torch.equal(logits, net(x)) and [m.shape[1] for m in maps] == [64, 128, 256, 512]
    assert loaded.config['image_size'] == 224
    M.save_model(M.classifier('torchvision:vgg11_bn', 5), 'v.safetensors')
    assert len(M.load_classifier('v.safetensors').forward_features(x)[1]) == 4


def save_image(path, pixels):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_images_of_every_kind():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez('a.npz', arr_0=pixels, arr_1=np.arange(6))
    images, labels = M.load_images('a.npz')
    assert images.shape == (6, 3, 8, 8) and torch.equal(images[2].permute(1, 2, 0), torch.tensor(pixels[2]))
    os.makedirs('shards')
    for i, p in enumerate(pixels):
        save_image(f'classes/{i % 2}/{i}.png', p)
        save_image(f'flat/{i}.png', p)
        np.savez(f'shards/images_0000_{i:05d}.npz', arr_0=p[None])
    classes, flat = M.load_images('classes'), M.load_images('flat')
    assert classes[1].tolist() == [0, 0, 0, 1, 1, 1] and torch.equal(classes[0][1], images[2])
    assert flat[1] is None and torch.equal(flat[0], images) and torch.equal(M.load_images('shards')[0], images)
    chosen, labels = M.load_images('a.npz:2-4')                                # classes keep their numbers
    assert torch.equal(chosen, images[2:5]) and labels.tolist() == [2, 3, 4]
    assert M.load_images('classes:1-1')[1].tolist() == [1] * 3
    with pytest.raises(ValueError, match='no labels'):
        M.load_images('shards:0-1')


def test_images_of_any_size():
    """DomainNet's lists of files, and Tiny-ImageNet's val, whose classes are numbered as the folders of train."""
    for i, (w, h) in enumerate(((20, 12), (12, 30), (9, 9))):
        picture, side = np.zeros((h, w, 3), np.uint8), min(w, h)
        picture[(h - side) // 2:, (w - side) // 2:][:side, :side] = 200        # the middle is what is kept
        save_image(f'clipart/arm/{i}.png', picture)
        save_image(f'val/images/val_{i}.png', np.full((8, 8, 3), i, np.uint8))
    with open('clipart_train.txt', 'w') as f, open('val/val_annotations.txt', 'w') as val:
        for i in range(3):
            f.write(f'clipart/arm/{i}.png {9 + i}\n')
            val.write(f'val_{i}.png\tn{9 - i // 2}\t0\t0\t7\t7\n')
    images, labels = M.load_images('clipart_train.txt:0-10', image_size=8)
    assert images.shape == (2, 3, 8, 8) and (images == 200).all() and labels.tolist() == [9, 10]
    with pytest.raises(ValueError, match='differ in size'):
        M.load_images('clipart_train.txt')
    images, labels = M.load_images('val')
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2] and labels.tolist() == [1, 1, 0]


# ---- how the scripts are started ----
# torch, diffusers and transformers take seconds to import: a server imports them once, every run is a child it forks
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload([__name__, 'scipy.optimize', 'torchvision', *[f'diffusers.pipelines.{name}' for name in (
    'deepfloyd_if', 'dit', 'latent_diffusion', 'stable_diffusion_3.pipeline_stable_diffusion_3')]])
STARTING = threading.Lock()
os.environ.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1')
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [ROOT, os.getenv('PYTHONPATH')]))  # for the server
# small settings of each script; what stands behind them overrides them
SMALL = ('--model_channels=8 --num_head_channels=8 --channel_mult=(1,1) --attention_resolutions=(4,) --batch_size=8 '
         '--max_steps=6 --save_every=2 --log_every=1 --sample_steps=2')
DKDM = f'dkdm.py --teacher=teacher.safetensors {SMALL} --stride=10'
QUICK = 'dkdm.py --stride=250 --batch_size=4 --max_steps=2 --sample_steps=2'
SYNTH = ('synthesize.py --prior=teacher.safetensors --teacher=classifier.safetensors --batch_size=8 --steps=4 '
         '--lca_every=2 --keep=2 --keep_every=1 --num_images=32')
CLASSIFIER = ('distill_classifier.py --data=images.npz --teacher=classifier.safetensors --student=resnet8 --width=4 '
              '--batch_size=16 --holdout=8')
VAE = ("distill_vae.py --teacher=lvae.safetensors --student_config={'width':4} --batch_size=8 --max_steps=6 "
       '--log_every=1')
FID = ('eval_fid.py --reference=images.npz --features=classifier.safetensors --num_samples=52 --steps=3 --batch_size=8 '
       '--n_two_sample=32')
BENCH = ('bench.py --model_channels=16 --num_res_blocks=1 --channel_mult=(1,2) --num_head_channels=16 --batch_size=4 '
         '--repeats=1 --image_size=16 --attention_resolutions=(8,)')
TEACHERS = {'ddpm': 'unet', 'ldm': 'unet', 'dit': 'transformer', 'sd': 'unet', 'sd3': 'transformer'}


def script(args, cwd, outputs, env):
    """A child's work: the script's file run as the main program, stdout and stderr into two files."""
    os.environ.update(env)
    for fd, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    sys.argv = [os.path.join(ROOT, args[0]), *args[1:]]
    runpy.run_path(sys.argv[0], run_name='__main__')


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def start(command, ranks=0):
    """The processes of a run, one for each rank, and the folder of what they say: out0, err0, ..."""
    args, every = command.split() if isinstance(command, str) else command, []
    folder = tempfile.mkdtemp(dir='..')
    env = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': str(ranks)}
    for r in range(max(1, ranks)):
        outputs = [os.path.abspath(f'{folder}/{name}{r}') for name in ('out', 'err')]
        mine = env | {'RANK': str(r), 'LOCAL_RANK': str(r)} if ranks else {}
        every.append(SERVER.Process(target=script, args=(args, os.getcwd(), outputs, mine)))
        with STARTING:
            every[-1].start()
            multiprocessing.process._children.discard(every[-1])  # two threads may not ask for one exit code
    while not os.path.exists(outputs[-1]):                                     # the script begins
        time.sleep(0.002)
    return every, folder


def said(folder, name):
    return ''.join(open(path).read() for path in sorted(glob.glob(f'{folder}/{name}*')))


def run(command, ranks=0, ok=True):
    """Output of a script. A failed run must be one line on stderr and exit code 2."""
    every, folder = start(command, ranks)
    for p in every:
        p.join()
    err = said(folder, 'err')
    if ok:
        assert not any(p.exitcode for p in every), err[-3000:]
        return said(folder, 'out')
    messages = [line for line in err.splitlines() if line.strip() and '%|' not in line]      # all but progress bars
    assert every[0].exitcode == 2 and len(messages) == 1, f'{command}: {err[-3000:]}'
    return messages[0]


def at_once(fn, cases):
    """Two runs at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(fn, cases))


def log(folder):
    return np.genfromtxt(f'{folder}/log.csv', delimiter=',', names=True)


def rows(folder):
    """log.csv without its times."""
    with open(f'{folder}/log.csv', newline='') as f:
        return [{k: v for k, v in r.items() if k not in ('seconds', 'images_per_s')} for r in csv.DictReader(f)]


def metrics(folder):
    return [json.loads(line) for line in lines(Path(folder, 'metrics.jsonl').read_text())]


def content(path):
    return Path(path).read_bytes()


def link(folder):
    for path in folder.iterdir():
        os.symlink(path, path.name)


@pytest.fixture(scope='session')
def tiny_models(tmp_path_factory):
    """Tiny teachers with and without classes, a classifier, a VAE and images."""
    folder = tmp_path_factory.mktemp('tiny')
    torch.manual_seed(0)
    for name, classes in (('teacher', 0), ('classes', 4)):
        net = M.UNet(16, 1, 2, 16, 1, (1, 2), (4,), num_head_channels=16, patch_size=2, num_classes=classes)
        torch.nn.init.normal_(net.out[2].weight, std=0.02)
        M.save_model(net, f'{folder}/{name}.safetensors', M.Diffusion('cosine', 100, 'v'))
    M.save_model(M.classifier('resnet8', 4, image_size=16, in_channels=1, width=4), f'{folder}/classifier.safetensors')
    M.save_model(M.LVAE(16, 1, 8), f'{folder}/lvae.safetensors')
    labels = np.arange(64) % 4
    pixels = np.random.default_rng(0).random((64, 16, 16, 1)) * 60 + 60 * labels[:, None, None, None]
    np.savez(folder / 'images.npz', arr_0=pixels.astype(np.uint8), arr_1=labels)
    return folder


@pytest.fixture
def tiny(tiny_models, own_folder):
    link(tiny_models)


# ---- dkdm.py ----
def test_every_method(tiny):
    def one(case):
        i, args = case
        out = run(f'{DKDM} {args} --out_dir=o{i}')
        assert f'o{i}/student.safetensors' in out and 'eval_fid.py' in out
        assert len(log(f'o{i}')) == 6 and np.isfinite(log(f'o{i}')['loss']).all()
        assert M.load_denoiser(f'o{i}/student.safetensors')[0].num_classes == (4 if 'class' in args else 0)
        assert os.path.getsize(f'o{i}/samples.png') > 0 and not glob.glob(f'o{i}/.tmp*')
    at_once(one, enumerate(lines("""
        --method=dynamic --pool_dtype=float16
        --method=dynamic --stride=1 --rho=0.02
        --method=shuffled --grad_accum=2
        --method=iterative
        --method=synthetic --synthetic_images=16 --synthetic_steps=3 --real_fraction=0.25 --data=images.npz
        --method=synthetic --synthetic=images.npz --student_prediction=teacher
        --method=data --data=images.npz --class_cond=True --uncond_prob=0.2 --flip=True --T=50
        --student=dit --hidden_size=16 --depth=1 --num_heads=2 --student_prediction=eps
        --teacher=classes.safetensors --guidance=2.0 --uncond_prob=0.1 --student_prediction=flow""")))


def test_a_student_learns_and_the_pool_stays_uniform(tiny):
    run(f'{DKDM} --rho=3.0 --stride=5 --max_steps=150 --batch_size=32 --save_every=150 --lr=5e-3 --out_dir=o')
    assert log('o')['loss'][-10:].mean() < 0.5 * log('o')['loss'][:5].mean()
    pool_x, pool_t, _ = M.load_checkpoint('o', 0)[1]['pool']
    assert len(pool_t) == round(3 * 100 / 5) * 32 and pool_t.min() >= 0 and pool_t.max() <= 99
    counts = torch.histc(pool_t.float(), 5, 0, 99.99)
    assert (counts / len(pool_t) - 0.2).abs().max() < 0.06, counts
    fresh = pool_x[pool_t == 99]                                               # entered since: standard noise
    assert len(fresh) > 50 and abs(fresh.mean()) < 0.05 and abs(fresh.std() - 1) < 0.05
    assert pool_x[pool_t < 10].std() != pytest.approx(1, abs=0.02)             # finished images leave


@pytest.mark.parametrize('ranks', [0, 2])
def test_ended_at_ten_moments(ranks, tiny):
    """By SIGKILL, SIGTERM or SIGINT, the same command again each time: the files become what they are without."""
    def one(command):
        name = command.split('.')[0]
        moments, ended = random.Random(f'{name} {ranks}'), 0

        def start_and_end(out_dir, after=60.):
            number = moments.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            (every, folder), t0 = start(f'{command} --out_dir={out_dir}', ranks), time.time()
            every[0].join(after)
            for p in every:
                if p.is_alive():
                    os.kill(p.pid, number)
            for p in every:
                p.join(60)
            # two ranks before their loop die of the signal, and one by the end of the other
            codes, err = {0, -9, 128 + number} | ({-number, 1} if ranks else set()), open(f'{folder}/err0').read()
            assert {p.exitcode for p in every} <= codes and (ranks or 'Traceback' not in err), err
            return any(p.exitcode for p in every), time.time() - t0

        failed, seconds = start_and_end(f'{name}_whole')
        assert not failed
        for i in range(11):
            if start_and_end(name, moments.uniform(0.1, 0.9) * seconds if i < 10 else 60)[0]:
                ended += 1
                continue
            whole, cut = ({f: f'{folder}/{f}' for f in os.listdir(folder)} for folder in (f'{name}_whole', name))
            assert set(whole) == set(cut) and rows(f'{name}_whole') == rows(name)
            for f in set(whole) - {'log.csv', '.lock'}:
                if f.endswith('.pt'):
                    assert M.read_weights(whole[f])[0]['digest'] == M.read_weights(cut[f])[0]['digest']
                else:
                    assert content(whole[f]) == content(cut[f]), f
            shutil.rmtree(name)
        assert ended
    at_once(one, [f'{DKDM} --dropout=0.1 --max_steps=14 --log_every=4 --save_every=3 --init_from=resume',
                  f'{CLASSIFIER} --epochs=4 --batch_size=8 --augment_flip=True --init_from=resume',
                  f'{VAE} --method=synthetic --data=images.npz --flip=True --max_steps=14 --log_every=4 --save_every=3 '
                  '--init_from=resume',
                  f'{SYNTH} --batch_size=4 --num_images=48'])


def test_resuming_means_the_same_run(tiny):
    args = f'{DKDM} --max_steps=4 --out_dir=a'
    assert 'no checkpoint yet' in run(f'{args} --init_from=resume')
    run(f'{args} --init_from=resume --max_steps=6 --log_every=2')
    for setting in ('lr=0.001', 'seed=1', 'stride=20', 'beta2=0.9'):
        assert setting.split('=')[0] + '=' in run(f'{args} --init_from=resume --{setting}', ok=False)
    assert 'would be overwritten' in run(f'{args} --teacher=a/student.safetensors', ok=False)
    every, folder = start(f'{args} --init_from=resume', ranks=2)
    for p in every:
        p.join()
    assert 'ranks=1, not 2' in said(folder, 'err')
    with pytest.MonkeyPatch.context() as patch:                                # the same name, another network
        os.makedirs('other')
        shutil.copy('a/student.safetensors', 'other/teacher.safetensors')
        patch.chdir('other')
        assert 'teacher_digest=' in run(f'{args} --init_from=resume --out_dir=../a', ok=False)
    shutil.copytree('a', 'b')
    run(f'{args} --seed=1 --max_steps=6')                                      # another run's rank among these
    shutil.copy('a/ckpt_6_rank0.pt', 'b')
    assert 'different runs' in run(f'{args} --init_from=resume --out_dir=b', ok=False)
    data = bytearray(content('b/ckpt.pt'))
    data[len(data) // 2] ^= 1
    Path('b/ckpt.pt').write_bytes(data)
    assert 'damaged' in run(f'{args} --init_from=resume --out_dir=b', ok=False)
    with open('a/log.csv', 'a') as f:
        f.write('x,1\n')
    assert 'log.csv is damaged' in run(f'{args} --init_from=resume --seed=1', ok=False)
    (p,), folder = start(f'{args} --max_steps=100000 --save_every=100000')     # anew: the old checkpoint is gone ...
    while not (len(text := open('a/log.csv').read()) > 200 and 'x,1' not in text):
        assert p.is_alive()
        time.sleep(0.02)
    assert 'is removed' in said(folder, 'out')
    assert f'process {p.pid} on' in run(args, ok=False)                        # ... and the folder has one run
    p.terminate()
    p.join(60)
    assert p.exitcode == 143 and os.path.exists('a/ckpt.pt') and os.path.exists('a/student.safetensors')


def test_when_to_stop(tiny):
    run(f'{FID} --reference=teacher.safetensors --save_stats=stats.npz --steps=2 --num_samples=40')       # no data
    args = (f'{DKDM} --eval_every=2 --eval_reference=stats.npz --eval_features=classifier.safetensors --lr_decay=False '
            '--out_dir=')
    at_once(run, [f'{args}whole', f'{args}cut --max_steps=4'])
    before = log('cut')['seconds'][-1]
    run(f'{args}cut --init_from=resume')
    whole, cut = rows('whole'), rows('cut')
    assert [bool(r['frechet']) for r in whole] == [False, True] * 3 and log('cut')['seconds'][-1] > before
    assert [r['frechet'] for r in whole] == [r['frechet'] for r in cut]
    best, best_cut, last = map(content, ('whole/best.safetensors', 'cut/best.safetensors', 'whole/student.safetensors'))
    found = [float(r['frechet']) for r in whole if r['frechet']]
    assert best == best_cut and (best == last) == (found[-1] == min(found))
    run(f'{args}on --max_steps=2 --lr=0.0 --init_from=whole/student.safetensors')   # a student that goes on
    on, whole = (load_file(f'{name}/student.safetensors') for name in ('on', 'whole'))
    assert all(torch.allclose(on[k], whole[k]) for k in whole)


def torchrun(launch, command):
    name, *args = command.split()
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', *launch.split(), f'{ROOT}/{name}', *args],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_torchrun_restarts_a_job_that_goes_on(tiny):
    args = f'{DKDM} --dropout=0.1 --max_steps=30 --out_dir='
    run(f'{args}whole', ranks=2)
    p = torchrun('--standalone --nproc_per_node=2 --max-restarts=1', f'{args}cut')
    while not (os.path.exists('cut/ckpt.pt') and M.read_weights('cut/ckpt.pt')[0]['step']):
        assert p.poll() is None
        time.sleep(0.01)
    inode = os.stat('cut/log.csv').st_ino
    os.kill(int(open('cut/.lock').read().split()[1]), signal.SIGKILL)          # rank 0 alone
    assert p.wait(120) == 0 and os.stat('cut/log.csv').st_ino != inode and rows('whole') == rows('cut')
    assert content('whole/student.safetensors') == content('cut/student.safetensors')


def test_two_nodes_share_the_pool_and_agree(tiny):
    launch = f'--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint=localhost:{free_port()}'
    nodes = [torchrun(launch, f'{DKDM} --rho=0.4 --out_dir=o') for _ in range(2)]
    assert [p.wait(120) for p in nodes] == [0, 0] and len(log('o')) == 6
    one, two = (M.load_checkpoint('o', r)[1] for r in range(2))
    assert one['weights'] == two['weights'] and not torch.equal(one['pool'][0], two['pool'][0])
    assert len(one['pool'][1]) == len(two['pool'][1]) == 4 * 8 // 2


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
    clip = H.CLIPTextConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                            projection_dim=16, num_attention_heads=2, max_position_embeddings=99, bos_token_id=0,
                            eos_token_id=1)
    t5 = H.T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)

    def net(kind, down, up, **more):
        blocks = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
        return kind(**blocks | more, down_block_types=down.split(), up_block_types=up.split())
    unet = dict(sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8)
    rgb = unet | dict(sample_size=16, in_channels=3, out_channels=3)
    pixels = net(D.UNet2DModel, 'DownBlock2D AttnDownBlock2D', 'AttnUpBlock2D UpBlock2D', **rgb)
    latents = net(D.UNet2DModel, 'DownBlock2D DownBlock2D', 'UpBlock2D UpBlock2D', **unet)
    coder = ('DownEncoderBlock2D DownEncoderBlock2D', 'UpDecoderBlock2D UpDecoderBlock2D')
    kl = net(D.AutoencoderKL, *coder, latent_channels=4, scaling_factor=0.5)
    vq = net(D.VQModel, *coder, latent_channels=4, num_vq_embeddings=32, scaling_factor=0.3)
    conditional = net(D.UNet2DConditionModel, 'CrossAttnDownBlock2D DownBlock2D', 'UpBlock2D CrossAttnUpBlock2D',
                      cross_attention_dim=16, **unet)
    cascade = net(D.UNet2DConditionModel, 'DownBlock2D CrossAttnDownBlock2D', 'CrossAttnUpBlock2D UpBlock2D',
                  **rgb | dict(out_channels=6), cross_attention_dim=16, encoder_hid_dim=32,
                  encoder_hid_dim_type='text_proj', addition_embed_type='text', addition_embed_type_num_heads=2)
    dit = D.DiTTransformer2DModel(2, 8, 4, 8, 1, sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
                                  norm_elementwise_affine=False)
    sd3 = D.SD3Transformer2DModel(8, 2, 4, 1, 8, 4, joint_attention_dim=32, caption_projection_dim=32,
                                  pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8)
    linear = dict(clip_sample=False, beta_schedule='scaled_linear')
    v, linear = D.DDIMScheduler(**linear, prediction_type='v_prediction'), D.DDIMScheduler(**linear)
    cosine, unsafe = dict(beta_schedule='squaredcos_cap_v2'), dict(requires_safety_checker=False)
    learned = D.DDPMScheduler(**cosine, variance_type='learned_range', thresholding=True)
    shifted, flow = D.AutoencoderKL(**kl.config | {'shift_factor': 0.1}), D.FlowMatchEulerDiscreteScheduler(shift=3.0)
    texts = [part for _ in range(2) for part in (H.CLIPTextModelWithProjection(clip), tokenizer)]
    for name, pipe in {
            'ddpm': D.DDPMPipeline(pixels, D.DDIMScheduler(**cosine)), 'ldm': D.LDMPipeline(vq, latents, linear),
            'dit': D.DiTPipeline(dit, kl, linear),
            'sd': D.StableDiffusionPipeline(kl, H.CLIPTextModel(clip), tokenizer, conditional, v, None, None, **unsafe),
            'sd3': D.StableDiffusion3Pipeline(sd3, flow, shifted, *texts, H.T5EncoderModel(t5), tokenizer),
            'if': D.IFPipeline(tokenizer, H.T5EncoderModel(t5), cascade, learned, None, None, None, **unsafe),
            'tiny_vae': D.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                                          num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))}.items():
        pipe.save_pretrained(folder / name)
    M.save_model(M.classifier('wrn16_1', 4, image_size=16), f'{folder}/classifier.safetensors')
    (folder / 'names.txt').write_text('one\ntwo\nthree\nfour\n')
    rng = np.random.default_rng(0)
    np.savez(folder / 'images.npz', arr_0=rng.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8))
    for name, part in TEACHERS.items():                                        # students: the teachers' classes
        shutil.copy(folder / name / part / 'config.json', folder / f'{name}.json')
    return folder


@pytest.fixture
def pipelines(pipeline_models, own_folder):
    link(pipeline_models)


def sampled(folder, **call):
    """Images that diffusers draws from a pipeline in two steps."""
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(folder)
    return pipe(num_inference_steps=2, output_type='np', **call).images


@pytest.mark.parametrize('name', TEACHERS)
def test_pipelines_sample_what_diffusers_samples(name, pipelines):
    from diffusers import DDIMPipeline, DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(name)
    if name != 'sd3':
        pipe.scheduler.register_to_config(steps_offset=0, set_alpha_to_one=True)
    net, diffusion = M.load_denoiser(name)
    noise, y, kw = torch.randn(1, net.config['in_channels'], *[net.config['image_size']] * 2), None, {}
    if name == 'ddpm':
        pipe, kw = DDIMPipeline(pipe.unet, pipe.scheduler), dict(use_clipped_model_output=True)
    elif name == 'dit':
        y, kw = torch.tensor([7]), dict(class_labels=[7], guidance_scale=3.)
    elif name in ('sd', 'sd3'):
        net.set_prompts(['a dog', 'a cat'])
        y, kw = torch.tensor([1]), dict(prompt=['a cat'], guidance_scale=3., latents=noise)
    if name == 'sd3':
        kw['sigmas'] = [(t + 1) / 1000 for t in M.sampling_steps(1000, 5, 'leading')]
    with pytest.MonkeyPatch.context() as patch:                                # they draw their noise: give them ours
        patch.setattr(sys.modules[type(pipe).__module__], 'randn_tensor', lambda *_, **__: noise.clone(), raising=False)
        theirs = pipe(num_inference_steps=5, output_type='np', **kw).images
    ours = M.decode(net, M.sample(net, diffusion, noise, 5, 'ddim', y, 3., spacing='leading'))
    ours = ((ours + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() < 1e-4 and ours.std() > 0
    if name == 'dit':                                                          # no label is dropped in train mode
        args = torch.randn(64, 4, 8, 8), torch.zeros(64, dtype=torch.long), torch.arange(64)
        assert torch.equal(net.train()(*args), net(*args))


def test_deepfloyd_if_sees_its_texts(pipelines):
    from diffusers import DiffusionPipeline
    pipe, (net, diffusion) = DiffusionPipeline.from_pretrained('if'), M.load_denoiser('if')
    net.set_prompts(['a dog', 'a cat'])
    x, t = wave(2, 3, 16, 16), torch.tensor([500, 20])
    with torch.no_grad():
        texts = pipe.encode_prompt(['a cat', ''], do_classifier_free_guidance=False)[0]
        assert torch.allclose(net(x, t, torch.tensor([1, -1])), pipe.unet(x, t, texts).sample, atol=1e-5)
    assert diffusion.learn_sigma and diffusion.clip and net.config['image_size'] == 16


def test_texts_are_embedded_once_and_belong_to_all_copies(pipelines, monkeypatch):
    cache, texts = 'prompts.safetensors', [f'dog {i}' for i in range(300)]     # more than one batch of 256
    net, again, other = (M.load_denoiser('sd', dtype)[0] for dtype in (torch.bfloat16, torch.bfloat16, torch.float32))
    net.set_prompts(texts, cache)
    assert not os.path.exists(cache)                                           # checks leave nothing
    net.keep_prompts(cache)
    assert net.pipe is None and net.shared['prompts'].shape[0] == 301 and net.shared['prompts'].dtype == torch.bfloat16
    assert not list(net.buffers()) and copy.deepcopy(net).shared is net.shared
    with monkeypatch.context() as patch:
        patch.setattr(M.Pipeline, 'embed', lambda *args: pytest.fail('embedded twice'))
        again.set_prompts(texts, cache)
    assert torch.equal(again.shared['prompts'], net.shared['prompts'])
    other.set_prompts(texts[1:], cache)                                        # other texts are not taken from the file
    assert other.shared['prompts'].shape[0] == 300 and other.shared['prompts'].dtype == torch.float32


def test_students_of_diffusers_go_back_to_diffusers(pipelines):
    """Each kind of teacher, a student of its class: eval_fid.py measures its file, and as a pipeline it is the same."""
    more = {'dit': '--guidance=2.0 --uncond_prob=0.2 --student_prediction=teacher', 
            'sd': '--prompts=names.txt --guidance=2.0',
            'sd3': '--prompts=names.txt --guidance=2.0 --student_prediction=teacher'}

    def one(name):
        file, pipeline = f'o_{name}/student.safetensors', f'o_{name}/pipeline'
        out = run(f'{QUICK} --teacher={name} --student={name}.json {more.get(name, "")} --out_dir=o_{name}')
        last = out.splitlines()[-1]
        assert f'--models={file}' in out and last.endswith(f'export.py --model={file} --out_dir={pipeline}')
        assert os.path.getsize(f'o_{name}/samples.png') > 0 and np.isfinite(log(f'o_{name}')['loss']).all()
        assert not os.path.exists(f'o_{name}/{TEACHERS[name]}')
        run(f'{last.split("python ")[1]} --link={name != "sd"}')
        vae = 'vqvae' if name == 'ldm' else 'vae'
        assert name == 'ddpm' or os.path.islink(f'{pipeline}/{vae}') == (name != 'sd')
        call = {'dit': dict(class_labels=[3]), 'sd': dict(prompt='one'), 'sd3': dict(prompt='one')}.get(name, {})
        assert np.isfinite(sampled(pipeline, **call)).all()
        nets = []
        for spec in (file, pipeline):
            net, diffusion = M.load_denoiser(spec)
            assert diffusion.prediction == {'dit': 'eps', 'sd3': 'flow'}.get(name, 'v')
            assert M.has_vae(net) == (name != 'ddpm') and net.guided == (name in more)
            if net.condition == 'text':
                net.set_prompts(['one', 'two'])
            x, t = wave(1, net.config['in_channels'], *[net.config['image_size']] * 2), torch.tensor([diffusion.T // 3])
            nets.append(M.decode(net, diffusion.predict_x0(net(x, t, t * 0), x, t)))
        assert torch.allclose(*nets, atol=1e-5)
    at_once(one, TEACHERS)
    ddpm, ldm, sd = (f'o_{name}/student.safetensors' for name in ('ddpm', 'ldm', 'sd'))
    run(f'{FID} --models={ddpm},{sd} --num_samples=8 --steps=2 --prompts=names.txt --out_dir=eval')
    assert len(metrics('eval')) == 2
    for file, key in ((ldm, 'vae'), (sd, 'pipeline')):                         # whose teacher was moved away
        state, header = M.read_weights(file)
        M.write_tensors(state, 'moved.safetensors', header | {key: 'gone'})
        with pytest.raises(ValueError, match="^moved.safetensors needs its teacher's pipeline: .* gone, .*$"):
            M.load_denoiser('moved.safetensors')


def test_students_of_another_kind(pipelines, tiny_models):
    """A student of ours of each teacher with latents keeps its VAE, and so does its student; a student of diffusers of
    a teacher of ours is a DDPMPipeline."""
    config = json.load(open('ddpm.json')) | dict(in_channels=1, out_channels=2)
    for name, more in (('grey', {}), ('classes', dict(num_class_embeds=5))):
        json.dump(config | more, open(f'{name}.json', 'w'))
    ours = '--student=dit --hidden_size=16 --depth=1 --num_heads=2'
    at_once(run, [
        f'{QUICK} {ours} --teacher=ldm --out_dir=latent',
        f'{QUICK} {ours} --teacher=sd3 --prompts=names.txt --out_dir=text',
        f'{QUICK} --stride=50 --teacher={tiny_models}/teacher.safetensors --student=grey.json --out_dir=grey',
        f'{QUICK} --stride=50 --teacher={tiny_models}/classes.safetensors --student=classes.json --guidance=2.0 '
        '--out_dir=classes'])
    at_once(run, [f'{QUICK} {ours} --teacher=latent/student.safetensors --out_dir=again', *[
        f'export.py --model={name}/student.safetensors --out_dir={name}/p' for name in ('grey', 'classes')]])
    for name, labels in (('latent', 0), ('text', 4), ('again', 0)):
        net, _ = M.load_denoiser(f'{name}/student.safetensors')
        assert M.decode(net, torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16) and net.num_classes == labels
    assert np.isfinite(sampled('grey/p')).all() and sorted(os.listdir('classes/p')) == ['scheduler', 'unet']


def test_gated_models_and_half_precision(pipelines, monkeypatch, capsys):
    import huggingface_hub
    from diffusers import DiffusionPipeline
    DiffusionPipeline.from_pretrained('ddpm').to(torch.float16).save_pretrained('half', variant='fp16')
    net, _ = M.load_denoiser('half')
    assert next(net.parameters()).dtype == torch.float32
    assert 'weights in float16, computed in float32' in capsys.readouterr().out

    def gated(*args):
        raise huggingface_hub.errors.GatedRepoError.__new__(huggingface_hub.errors.GatedRepoError)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', gated)
    with pytest.raises(ValueError, match='^some/model is gated: .*hf auth login`$'):
        M.load_denoiser('some/model')


# ---- synthesize.py ----
def test_guidance_lowers_the_losses_of_the_kept_images():
    """The bundled models, the same noise: guided images are closer to the teacher's training than unguided ones."""
    os.symlink(f'{ROOT}/pretrained', 'pretrained')
    ce, bn, seen = {}, {}, []
    settings = {'none': '--eta=0.0', 'kl': '--bn_loss=kl --alpha=0.01', 'l2': '--alpha=0.3'}
    at_once(lambda name: run('synthesize.py --batch_size=20 --steps=10 --lca_every=4 --keep_every=1 --num_images=80 '
                             f'{settings[name]} --out_dir={name}'), settings)
    classifier = M.load_classifier('pretrained/mnist_resnet.safetensors')
    watch_batch_norms(classifier, seen)
    for name in settings:
        images, labels = M.load_images(name)
        seen.clear()
        ce[name] = F.cross_entropy(classifier(M.preprocess(classifier, M.to_float(images))), labels).item()
        bn[name] = sum(seen).item()
        assert len(images) == 80
        assert sorted(os.listdir(name)) == ['.lock', 'images_0000_00000.npz', 'log.csv', 'preview.png']
    assert ce['l2'] < 0.5 * ce['none'] and bn['l2'] < bn['none'] and ce['kl'] < 0.5 * ce['none'], (ce, bn)


def watch_batch_norms(net, seen):
    """How far the batches are from the running statistics, Eq. (6), goes into `seen`."""
    def hook(m, args):
        var, mean = torch.var_mean(args[0], (0, 2, 3), correction=0)
        seen.append((mean - m.running_mean).norm() + (var - m.running_var).norm())
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.register_forward_pre_hook(hook)


def test_every_kind_of_prior(pipelines):
    def one(case):
        i, args = case
        assert 'distill_classifier.py' in run(f'{SYNTH} {args} --out_dir=o{i}')
        images, labels = M.load_images(f'o{i}')
        assert images.shape == (32, 3, 16, 16) and torch.bincount(labels).tolist() == [8] * 4
        assert len(log(f'o{i}')) == (4 if '--beta=0' in args else 8)           # unguided: where images are kept
        assert np.isfinite(log(f'o{i}')['loss']).all()
    at_once(one, enumerate(lines("""
        --prior=ddpm
        --prior=ldm --sampler=ddim
        --prior=dit --guidance=2.0 --lca=mixup
        --prior=sd --guidance=3.0 --sampler=ddim --grad_batch=3
        --prior=sd --guidance=3.0 --class_names=names.txt --alpha=0 --beta=0
        --prior=ldm --edit=paper --grad_batch=3 --sampler=renoise
        --prior=if --edit=x_t --guidance=2.0 --lca=traditional --sampler=ddim --ddim_eta=0.5
        --prior=none --flip=True --tv=0.1 --l2=0.1""")))


def test_the_configs_of_the_paper_run(pipelines):
    """Every command of a config, with tiny models of the same classes, smaller batches and two shards of them."""
    def one(name):
        teacher, n = ('vae:sd', 4) if 'vae' in name else ('classifier.safetensors', 16)
        prior = {'dit': 'dit', 'if': 'if'}.get(name.split('_')[1], 'sd')
        out = run(f'synthesize.py {ROOT}/config/synth_{name}.py --prior={prior} --teacher={teacher} --steps=7 '
                  f'--batch_size=2 --num_images={n} --out_dir={name}')
        assert 'in 2 shards' in out and len(M.load_images(name)[0]) == n
    at_once(one, ['cifar10_sd15', 'cifar100_sd15', 'tinyimagenet_sd15', 'domainnet_sd15', 'cifar10_dit', 'cifar10_if',
                  'cifar10_vae_sd15', 'celebahq_vae_sd15'])


def test_synthesis_restarts_and_ranks_share(tiny):
    run(f'{SYNTH} --out_dir=one')
    os.remove('one/images_0000_00001.npz')
    first = os.stat('one/images_0000_00000.npz').st_mtime_ns
    run(f'{SYNTH} --out_dir=one')
    assert os.stat('one/images_0000_00000.npz').st_mtime_ns == first and len(log('one')) == 8
    assert 'other settings' in run(f'{SYNTH} --eta=2.0 --out_dir=one', ok=False)
    run(f'{SYNTH} --out_dir=two', ranks=2)
    for one, two in zip(M.load_images('one'), M.load_images('two')):
        assert torch.equal(one, two)


def test_the_step_of_the_paper(tiny):
    """Eqs. (4)-(10) by hand: every loss that the script logs over three steps, and the images it keeps."""
    torch.manual_seed(0)
    net = M.UNet(16, 1, 1, 16, 1, (1, 2), (4,), num_head_channels=16).eval()
    torch.nn.init.normal_(net.out[2].weight, std=0.02)
    M.save_model(net, 'prior.safetensors', M.Diffusion('linear', 100, 'eps', learn_sigma=False, clip=False))
    M.save_model(M.classifier('resnet8', 4, image_size=16, in_channels=1, width=4), 'student.safetensors')
    run(f'{SYNTH} --prior=prior.safetensors --student=student.safetensors --edit=paper --eta=4.0 --alpha=0.1 '
        '--beta=1.0 --gamma=0.5 --tau=2.0 --sampler=renoise --lca=none --steps=3 --keep=3 --grad_batch=3 '
        '--num_images=24 --dtype=float32 --out_dir=o')
    images, labels = M.load_images('o')
    f_t, f_s = M.load_classifier('classifier.safetensors'), M.load_classifier('student.safetensors')
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(8, 1, 16, 16, generator=g), torch.randn(3, 8, 1, 16, 16, generator=g)
    [torch.randperm(8, generator=g) for _ in range(3)], torch.rand(3, 4, 8, 1, generator=g)
    y, seen = torch.randperm(8, generator=g) % 4, []
    assert torch.equal(labels, y.repeat(3))
    alpha_bar = torch.cumprod(1 - torch.linspace(0.001, 0.2, 100, dtype=torch.float64), 0).float()
    watch_batch_norms(f_t, seen)
    for i, (t, s) in enumerate(((99, 50), (50, 0), (0, None))):
        z, a, b = z.detach().requires_grad_(), alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        eps = net(z, torch.full((8,), t))
        x = ((z - b * eps) / a).clamp(-1, 1) / 2                               # Eq. (4); mean, deviation 0.5 of [0, 1]
        seen.clear()
        p_t, p_s = f_t(2 * x), f_s(2 * x)
        L_bn, L_cls = sum(seen), -p_t.log_softmax(1)[range(8), y].mean()       # Eqs. (6), (7)
        log_T, log_S = (p_t / 2).log_softmax(1), (p_s / 2).log_softmax(1)
        L_adv = -(log_T.exp() * (log_T - log_S)).sum(1).mean()                 # Eq. (8)
        L = 0.1 * L_bn + L_cls + 0.5 * L_adv                                   # Eq. (9)
        for name, value in (('bn', L_bn), ('cls', L_cls), ('adv', L_adv), ('loss', L)):
            assert log('o')[name][i] == pytest.approx(value.item(), rel=2e-4, abs=1e-6), (name, i)
        z = z - 4.0 * torch.autograd.grad(L, z)[0]                             # Eq. (10)
        x0 = (z - b * eps) / a
        assert (images[8 * i:8 * i + 8].int() - M.to_uint8(x0).int()).abs().max() <= 1
        if s is not None:
            z = alpha_bar[s].sqrt() * x0 + (1 - alpha_bar[s]).sqrt() * noise[i]    # Eq. (5)


def test_images_for_a_vae(pipelines, tiny_models):
    """Guided by a VAE, the kept images lie nearer to what it reconstructs; they have no labels."""
    ours = (f'--prior={tiny_models}/teacher.safetensors --teacher=vae:{tiny_models}/lvae.safetensors --alpha=0.1 '
            '--lca=none')

    def one(case):
        name, args = case
        assert 'distill_vae.py' in run(f'{SYNTH} {args} --out_dir={name}')
        images, labels = M.load_images(name)
        assert labels is None and len(images) == 32
        return log(name)['mse'].reshape(2, -1)[:, -1].mean()
    plain, guided, _ = at_once(one, [('plain', f'{ours} --eta=0'), ('guided', f'{ours} --eta=300'),
                                     ('o_sd', '--prior=sd --teacher=vae:sd --guidance=2.0')])
    assert guided < 0.9 * plain


# ---- distill_classifier.py ----
def test_distilled_classifier(tiny):
    """The student comes to agree with its teacher, and its checkpoint serves the adversarial loss of the next round."""
    out = run(f'{CLASSIFIER} --method=data --width=8 --holdout=0 --epochs=10 --test=images.npz --out_dir=teacher')
    assert 'test_accuracy' in out and M.load_classifier('teacher/student.safetensors').config['num_classes'] == 4
    out = run(f'{CLASSIFIER} --teacher=teacher/student.safetensors --holdout=16 --epochs=20 --test=images.npz '
              '--out_dir=student', ranks=2)
    assert 'teacher: test accuracy' in out
    kl, cam, agreement = (log('student')[key] for key in ('kl', 'msarc', 'agreement'))
    assert kl[-1] < 0.5 * kl[0] and cam[-1] < cam[0] and agreement.max() > 0.7
    assert M.load_classifier('student/best.safetensors').config['width'] == 4
    run(f'{SYNTH} --teacher=teacher/student.safetensors --student=student/student.safetensors --out_dir=adv')
    assert (log('adv')['adv'] <= 0).all()


def msarc(net_S, net_T, x):
    """L_mSARC as SpaceshipNet describes it: (the last stage's, [the earlier ones'])."""
    (p_S, maps_S), (p_T, maps_T) = net_S.forward_features(x), net_T.forward_features(x)
    c, found = p_T.argmax(1), []
    for net, p, maps in ((net_S, p_S, maps_S), (net_T, p_T, maps_T)):
        W = net.get_submodule(net.head_name).weight
        grads = torch.autograd.grad(p[range(len(x)), c].sum(), maps, retain_graph=True)
        early = {f.shape[2:]: torch.einsum('bc,bchw->bhw', w.mean((2, 3)), f) for w, f in zip(grads[:-1], maps[:-1])}
        found.append((torch.einsum('kc,bchw->bkhw', W, maps[-1]), early))
    (cam_S, early_S), (cam_T, early_T) = found
    if cam_S.shape != cam_T.shape:
        cam_T = F.interpolate(cam_T, cam_S.shape[2:], mode='bilinear', antialias=True)
    return F.mse_loss(cam_S, cam_T), [F.mse_loss(early_S[k], early_T[k]) for k in early_S if k in early_T]


@pytest.mark.parametrize('teacher, student, cam, early', [
    ('resnet34', 'resnet18', 0.00024125850177370012, [7.138987318e-12, 1.8216648676e-11, 5.8608988773e-09]),
    ('resnet20', 'resnet8', 0.0036491036880761385, [5.7058896497e-10, 2.0249897759e-08])])
def test_msarc_has_the_numbers_of_its_source(teacher, student, cam, early):
    last, earlier = msarc(fill(M.classifier(student)), fill(M.classifier(teacher)), wave(4, 3, 32, 32))
    assert last.item() == pytest.approx(cam, rel=1e-4) and [e.item() for e in earlier] == pytest.approx(early, rel=1e-3)


@pytest.mark.parametrize('teacher, student, side, pairs', [
    ('vgg11', 'resnet18', 32, 3), ('wrn16_2', 'wrn16_1', 32, 2), ('torchvision:resnet18', 'resnet20', 64, 0)])
def test_msarc_of_the_script(teacher, student, side, pairs):
    """One step on one batch logs the loss of the reference. Stages are paired by resolution."""
    torch.manual_seed(0)
    kw = {'width': 8} if student.startswith('resnet') else {}
    nets = [M.classifier(name, 5, image_size=side, **kw).eval() for name, kw in ((student, kw), (teacher, {}))]
    for net, name in zip(nets, 'ST'):
        torch.nn.init.normal_(net.get_submodule(net.head_name).weight, std=0.3)
        M.save_model(net, f'{name}.safetensors')
    pixels = np.random.default_rng(0).integers(0, 256, (12, side, side, 3), dtype=np.uint8)
    np.savez('x.npz', arr_0=pixels)
    run(f'distill_classifier.py --data=x.npz --teacher=T.safetensors --student={student} --width=8 '
        '--init_from=S.safetensors --holdout=0 --epochs=1 --batch_size=12 --augment_crop=0 --lam_msarc=2.0 '
        '--dtype=float32 --out_dir=o')
    last, earlier = msarc(nets[0].train(), nets[1], torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 * 2 - 1)
    assert len(earlier) == pairs and log('o')['msarc'] == pytest.approx(2 * (last + sum(earlier)).item(), rel=1e-3)


def test_a_student_goes_on_and_is_tested(tiny):
    """Images of another teacher are refused, the student of one round starts the next, and a saved one is tested."""
    run(f'{SYNTH} --out_dir=s')
    M.save_model(M.classifier('resnet8', 4, image_size=16, in_channels=1, width=4), 'other.safetensors')
    args = f'{CLASSIFIER} --data=s --holdout=0 --epochs=1 --lam_kl=0 --lam_msarc=0.1 --out_dir=c'
    refused = run(f'{args} --teacher=other.safetensors', ok=False)
    assert 'was made for the teacher classifier.safetensors' in refused
    run(f'{args} --teacher=other.safetensors --any_teacher=True --augment_flip=True', ranks=2)
    first = load_file('c/student.safetensors')
    out = run(f'{args} --init_from=c/student.safetensors --lr=0.0 --test=images.npz')
    second = load_file('c/student.safetensors')
    assert all(torch.equal(first[k], second[k]) for k in first if 'running' not in k and 'num_batches' not in k)
    accuracy = out.splitlines()[-1].split(' of the student ')[1].split()[0]
    test = f'{CLASSIFIER} --method=test --teacher=c/student.safetensors --out_dir=t --test=images.npz'
    assert f'test accuracy {accuracy} % of 64 images' in run(test) and ' of 32 images' in run(f'{test}:1-2')
    assert not os.path.exists('t')


# ---- distill_vae.py ----
def test_vae_distillation(tiny):
    methods = {'prior': '--max_steps=100 --lr=3e-3 --lr_decay=False', 'synthetic': '--data=images.npz',
               'data': '--data=images.npz --kl_warmup=3'}

    def one(method):
        assert 'student.safetensors' in run(f'{VAE} --method={method} {methods[method]} --out_dir={method}')
        pictures = {'samples.png'} if method == 'prior' else {'samples.png', 'reconstructions.png'}
        assert np.isfinite(log(method)['loss']).all() and pictures == {p.name for p in Path(method).glob('*.png')}
    at_once(one, methods)
    assert log('prior')['loss'][-10:].mean() < 0.3 * log('prior')['loss'][:5].mean()
    student, teacher = M.load_vae('prior/student.safetensors'), M.load_vae('lvae.safetensors')
    noise = student.noise(64, torch.Generator().manual_seed(0))
    with torch.no_grad():                                                      # BatchNorm in training and out of it
        distance = ((student.generate(noise)[0] - teacher.generate(noise)[0])[:, :1] ** 2).sum((1, 2, 3)).mean() / 0.1
    assert distance == pytest.approx(log('prior')['out'][-10:].mean(), rel=0.3)
    run(f'{FID} --models=lvae.safetensors,prior/student.safetensors --num_samples=32 --out_dir=e')
    one, two = metrics('e')
    assert one['parameters'] > 3 * two['parameters'] > 0 and one['MFLOPs'] > two['MFLOPs'] > 0 and 'sampler' not in one


def test_vaes_of_diffusers(pipelines):
    """The teacher from a pipeline or of its own; the student is of its class and goes back to diffusers."""
    small = {'sd': "{'block_out_channels':(4,8)}",
             'tiny_vae': "{'encoder_block_out_channels':(4,4),'decoder_block_out_channels':(4,4)}"}

    def one(name):
        out = run(f'{VAE} --teacher={name} --student_config={small[name]} --method=synthetic --data=images.npz '
                  f'--batch_size=4 --max_steps=2 --out_dir=o_{name}')
        assert f'o_{name}/student' in out and np.isfinite(log(f'o_{name}')['loss']).all()
        assert os.path.getsize(f'o_{name}/reconstructions.png') > 0
        return type(M.load_vae(f'o_{name}/student').net).__name__
    assert at_once(one, small) == ['AutoencoderKL', 'AutoencoderTiny']


# ---- eval_fid.py ----
def test_a_number_does_not_depend_on_the_ranks(tiny):
    """Against stored statistics a set has no distance from itself; against images there are the other numbers."""
    run(f'{FID} --num_samples=64 --save_stats=stats.npz')
    out = run(f'{FID} --num_samples=64 --reference=stats.npz --models=images.npz,teacher.safetensors --out_dir=e')
    assert out.splitlines()[-2].split()[0] == 'images.npz' and 'FID' not in out
    same, drawn = metrics('e')
    assert abs(same['Frechet']) < 1e-6 < 1e-3 < drawn['Frechet'] and 'KID' not in same
    assert drawn['parameters'] > 0 and drawn['MFLOPs'] > 0 and drawn['sampler'] == 'ddim'
    assert drawn['features'].startswith('classifier')
    assert sorted(os.listdir('e')) == ['images.png', 'metrics.jsonl', 'teacher.png']
    for folder, ranks in (('one', 0), ('two', 2)):
        run(f'{FID} --models=images.npz,classes.safetensors --spacing=even --out_dir={folder}', ranks)
    for one, two in zip(metrics('one'), metrics('two')):
        for k in ('Frechet', 'score', 'precision', 'recall', 'KID', 'EMD', 'MMD', '1-NN'):
            assert one[k] == pytest.approx(two[k], rel=1e-6, abs=1e-9), k
        assert one.get('agreement') == two.get('agreement')
    same, drawn = metrics('one')
    assert drawn['spacing'] == 'even' and drawn['batch_size'] == same['batch_size'] == 8 and 'spacing' not in same
    assert 'agreement' in drawn and same['precision'] == 1 and max(same['EMD'], same['MMD']) < 1e-6 < drawn['EMD']


def test_metrics_have_their_definitions():
    source, names = open(f'{ROOT}/eval_fid.py').read(), {'frechet_distance': M.frechet_distance}
    exec('\n'.join(re.findall('^(?:import|from) (?!models|.*models).*', source, re.M)), names)
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
    assert np.allclose(torch.cat(list(measured('distances', a, b))), d, rtol=1e-12)
    assert measured('precision_recall', a, b) == [(d.T <= ball_a).any(1).mean(), (d <= ball_b).any(1).mean()]
    ka, kb, kab = ((x @ y.T / 5 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    off = ~np.eye(300, dtype=bool)
    assert measured('kid', a, b) == pytest.approx(ka[off].mean() + kb[off[:200, :200]].mean() - 2 * kab.mean())
    far = measured('two_sample', a[:200], a[:200] + 100)
    assert far['1-NN'] == 1 and far['EMD'] == pytest.approx(100 * 5 ** 0.5) and 0 < far['MMD'] <= 2 ** 0.5


# ---- export.py ----
@pytest.mark.parametrize('make, vae', [
    ('UNet(16, 3, 6, 32, 2, (1, 2, 2), (8,), num_head_channels=16)', ''),
    ('UNet(16, 3, 6, 32, 1, (1, 2), (16, 8), num_classes=4)', ''),
    ('UNet(16, 3, 3, 32, 1, (1, 2), (8,), use_scale_shift_norm=False, resblock_updown=False)', ''),
    ('UNet(8, 4, 4, 32, 1, (1, 2), (8,))', 'ldm'),
    ('DiT(8, 2, 4, 32, 2, 2)', 'dit'), ('DiT(8, 2, 4, 32, 1, 2, num_classes=5, learn_sigma=False)', '')])
@torch.no_grad()
def test_our_networks_in_diffusers(make, vae, pipelines):
    import diffusers
    net = eval(f'M.{make}')
    c, position = net.config, net.state_dict().get('pos_embed', torch.zeros(0)).clone()
    fill(net).load_state_dict({'pos_embed': position} if len(position) else {}, strict=False)
    kind, part = ('UNet2DModel', 'unet') if c['class'] == 'UNet' else ('DiTTransformer2DModel', 'transformer')
    x, t, y = wave(2, c['in_channels'], c['image_size'], c['image_size']), torch.tensor([3, 40]), torch.tensor([1, -1])
    kw = {'class_labels': torch.where(y < 0, c['num_classes'], y)} if c['num_classes'] else {}
    ours = net(x, t, y)
    process = M.load_denoiser('ldm')[1].config if vae == 'ldm' else dict(schedule='linear', clip=False)
    process |= dict(prediction='eps' if kw else 'v', learn_sigma=ours.shape[1] > x.shape[1])
    diffusion = M.Diffusion(**process)                                         # its own, not the VAE's pipeline's
    M.save_model(net, 'net.safetensors', diffusion, vae=vae)
    run('export.py --model=net.safetensors --out_dir=o')
    theirs = getattr(diffusers, kind).from_pretrained('o', subfolder=part)(x, timestep=t, **kw).sample
    # float32 on these weights (1e-13 in float64); diffusers' DiT has slightly other frequencies of t
    assert (ours - theirs).norm() < (1e-4 if c['class'] == 'UNet' else 5e-4) * ours.norm()
    whole = os.path.exists('o/model_index.json')
    assert whole == (bool(vae) or not c['num_classes'])
    if whole:
        assert np.isfinite(sampled('o', **dict(class_labels=[1], guidance_scale=2.0) if c['num_classes'] else {})).all()
        found = M.load_denoiser('o')[1]
        assert torch.allclose(found.alpha_bar, diffusion.alpha_bar)
        assert [found.prediction, found.learn_sigma] == [diffusion.prediction, diffusion.learn_sigma]


# ---- bench.py ----
def test_bench():
    step, two, samplers = at_once(lambda case: run(*case), [
        (f'{BENCH} --classes=3',), (f'{BENCH} --student=dit --depth=1 --hidden_size=16 --num_heads=2', 2),
        (f'{BENCH} --what=sample',)])
    assert '% of the peak' in step and 'walk' in step and 'GFLOP/s' in step
    assert two.count('one step') == 2 and samplers.count('ms per image') == 6


# ---- bad input: one line, exit code 2, nothing left behind ----
# A command a word, overrides of the small settings with + between them; the line must hold what stands behind ~ (where
# ~ is a space), or else the name of the key
BAD = {DKDM: """
    roh=0.4~did~you~mean~'rho' rho=high~rho~is~float rho=((( rho="1is" rho=nan rho=-1.0 rho=1e999 rho=0.0~above~0
    rho=1e12+stride=1~--pool_dtype=float16 --rho~--key=value config.py~rho~is~float compile=1~compile~is~bool
    nothing.py~no~config~file .~no~config~file -x~no~config~file exits.py~SystemExit stops.py~KeyboardInterrupt
    folded.py~two~lines stride=200~T=100 stride=0 stride=-3 warmup_steps=-1 lam=-1 lam=nan guidance=-1 guidance=inf
    guidance=2.0~no~classes lr=-1.0 lr=1e999 lr=nan lr_warmup=-1 weight_decay=-0.1 weight_decay=nan beta2=1 beta2=-1.0
    beta2=nan grad_clip=-1 grad_clip=nan ema=nan ema=1.5 ema=1 max_steps=0 max_steps=-5 batch_size=0 batch_size=None
    batch_size=9+grad_accum=2~a~multiple~of~2 grad_accum=0 log_every=0 save_every=0 save_every=1e3 sample_steps=0
    sample_steps=101~100 seed=-1 seed=100000000000000000000000 T=0 T=1 patch_size=0 patch_size=3~patches~of~3
    patch_size=1000000000000 model_channels=0 model_channels=-8 model_channels=1000000000 model_channels=1000000
    model_channels=9+num_head_channels=4~attention~heads num_res_blocks=-1 num_res_blocks=0 num_res_blocks=1000000
    channel_mult=2~channel_mult~is~tuple channel_mult=() channel_mult=(1,-1) channel_mult=(0,) channel_mult=(1,'a')
    channel_mult=(nan,) channel_mult=(1,1,1,1,1,1,1) attention_resolutions=(-4,) attention_resolutions=('x',)
    num_head_channels=-1 dropout=1.0 dropout=-1 dropout=nan uncond_prob=1.1 real_fraction=-0.1 real_fraction=2
    synthetic_images=0 synthetic_steps=0 sampler=euler pool_dtype=int8 student_prediction=z schedule=fast
    init_from=start student=resnet device=meta device=tpu9 dtype=float64 wandb=project method=magic~'dynamic'
    teacher_config={'image_size':nan} teacher_config={1:2} teacher_config={'image_size':32}~nothing method=data~--data
    method=data+data=images.npz+guidance=2.0~no~teacher~to~guide method=data+data=nowhere~nowhere
    method=data+data=no_arr.npz~no~'arr_0' method=synthetic+synthetic=big.npz~(1,~16,~16) eval_every=-1
    eval_every=2+eval_features=vgg.safetensors~too~small eval_every=2+eval_features=gone.pt~no~file~gone
    eval_every=2+eval_features=classifier.safetensors+eval_reference=images.npz~no~statistics
    eval_every=2+eval_features=classifier.safetensors+eval_reference=short.npz~of~2~features
    student=dit+hidden_size=30~hidden_size teacher=missing.pt~no~file~missing.pt teacher=cut.safetensors~cut~short
    teacher=cut.pt~cut~short teacher=other.pt~no~denoiser teacher=classifier.safetensors~no~denoiser
    teacher=list.pt~holds~a~list teacher=text.pt~but~'weight' teacher=nothing.pt~no~dict~of~tensors
    teacher=ints.pt~no~dict~of~tensors teacher=index_list~model_index.json teacher=index_empty~model_index.json
    teacher=index_text~model_index.json teacher=list.safetensors~cannot~be~read teacher=json.safetensors~cannot~be~read
    teacher=net.safetensors~damaged teacher=class.safetensors~'Sequential' teacher=huge.safetensors~no~UNet
    teacher=depth.safetensors~num_res_blocks teacher=odd.safetensors~no~UNet teacher=vae.safetensors~damaged
    teacher=steps.safetensors~no~Diffusion teacher=schedule.safetensors~no~Diffusion teacher=nan.safetensors~not~finite
    teacher=none.safetensors~no~denoiser teacher=pipeline.safetensors~damaged teacher=kind.safetensors~kind
    teacher=gone.safetensors~needs~its~teacher's~pipeline teacher=runs.safetensors~'DiffusionPipeline'
    teacher=layers.safetensors~layers_per_block teacher=long.safetensors~block_out_channels
    teacher=wide.safetensors~do~not~fit~into~memory teacher=keys.safetensors~unexpected
    teacher=side.safetensors~sample_size""", BENCH: """
    repeats=0 what=walk what=nothing image_size=0 image_size=1000000~memory channels=0 classes=-1 teacher_width=-1
    model_channels=0 rho=1e29 student=x.json""", SYNTH: """
    alpha=-1 alpha=1e999 beta=nan gamma=-0.1 tau=0.0 tau=nan eta=-3.0 eta=inf ddim_eta=1.5 guidance=-1 steps=0
    steps=200~from~1~to~100 lca_every=0 lr=0.0 lr=nan tv=-1 l2=nan jitter=-1 num_images=0 num_images=1e5 keep=0
    keep_every=0 keep=4+keep_every=9~more~than~4~steps image_size=-1 image_size=100000 batch_size=0 grad_batch=0 seed=-1
    seed=100000000000000000000000 lca=none2 bn_loss=l3~'kl' edit=y~'paper' sampler=x~'renoise'
    prior_config={'steps':50}~nothing teacher_config={'image_size':16}~nothing
    teacher=norm_free.safetensors~no~BatchNorm teacher=vgg.safetensors~cannot~take class_names=cifar10~takes~no~text
    prior=nobody/nothing~no~diffusers~pipeline prior=none+guidance=2.0~has~none guidance=2.0~no~condition
    student=vgg.safetensors~10~classes
    teacher=vae:lvae.safetensors+student=classifier.safetensors~no~L_adv""", CLASSIFIER: """
    lam_kl=-1 lam_kl=nan lam_msarc=inf temperature=0.0 temperature=nan label_smoothing=1.5 label_smoothing=-0.1 epochs=0
    epochs=-1 batch_size=0 lr=-1 lr=nan warmup_epochs=-1 weight_decay=-1 weight_decay=1e999 holdout=-1 holdout=64
    holdout=400~holdout=400 augment_crop=-2 augment_crop=5000 width=-1 width=1000000 width=9000 image_size=-1
    image_size=1000000 optimizer=adam method=train student=resnet1000004~resnet8 student=vgg12~vgg11
    student=wrn9999_9999~wrn40_2 method=data+student=resnet7~resnet7 seed=-1 seed=1e5 dtype=half
    teacher_config={'mean':(0.5,)}~nothing init_from=none.pt~there~is~none teacher=teacher.safetensors~no~classifier
    teacher=list.pt~holds~a~list teacher=text.pt~no~dict~of~tensors teacher=mean.safetensors~no~classifier~of
    data=big.npz+holdout=0~classifier data=empty~no~images data=cut~images_0000_00001.npz~cannot~be~read
    data=missing.txt~missing.txt data=negative.npz+method=data~labels~from~0 data=flat.npz~N~x~H~x~W~x~C
    data=zero.npz~N~x~H~x~W~x~C data=array.npz~cannot~be~read data=broken~one.png data=half~one.jpg
    data=images.npz:5-3~a~not~above~b data=list.txt~a~file~and~a~label data=latin.txt~cannot~be~read
    method=data+data=big.npz+holdout=0+batch_size=2~no~labels method=test~needs~images
    method=test+test=images.npz:7-9~no~images~of~the~classes""", VAE: """
    beta=0.0 beta=nan beta=-1.0 lam_z=-1 lam_z=inf kl_warmup=-1 max_steps=0 batch_size=0 lr=nan lr=-1 weight_decay=-1e-4
    weight_decay=nan grad_clip=-1 save_every=0 log_every=0 seed=-1 student_config={'width':0}~LVAE
    student_config={'width':-4}~LVAE student_config={'width':2.5}~LVAE student_config={'width':1000000}~memory
    student_config={'image_size':0}~LVAE student_config={'image_size':64}~image_size student_config={'width':nan}
    student_config={'depth':3}~no~'depth' student_config={'_class_name':'AutoencoderKL'}~must~be~the~same
    student_config={3:4} init_from=x method=x method=both~'prior' method=synthetic~needs~images data=images.npz
    method=synthetic+data=big.npz~(3,~32,~32) teacher=classifier.safetensors~holds~a~classifier
    teacher=nobody/nothing~no~VAE teacher=class.safetensors~no~VAE""", f'{FID} --models=images.npz': """
    num_samples=-1 num_samples=nan n_two_sample=-1 batch_size=0 steps=0 guidance=-1 guidance=nan seed=-1
    seed=100000000000000000000000 sampler=x spacing=x~'leading' save_stats=stats.txt save_stats=empty
    save_stats=/proc/x/stats.npz~cannot~be~written features=nothing~file model_config={2:3} models=~nothing~to~measure
    models=missing.safetensors~no~file models=big.npz~3~channels models=teacher.safetensors+steps=500~from~1~to~100
    reference=adm.npz~space~of~inception reference=short.npz~statistics~of~2~features
    reference=stats_nan.npz~its~covariance reference=stats_odd.npz~its~covariance
    reference=stats_negative.npz~its~covariance
    features=inception+inception_weights=missing.pth~--inception_weights""",
       'export.py --model=teacher.safetensors': """
    link=1 link=yes model=missing.safetensors~no model=broken~no model=classifier.safetensors~denoiser
    model=lvae.safetensors~LVAE model=cut.safetensors~short model=teacher.safetensors~patch_size
    out_dir=broken~other"""}
BAD_HUB = {'dkdm.py': """
    teacher=nobody/nothing~no~diffusers~pipeline~at~nobody/nothing teacher=sd~--prompts=file.txt
    teacher=sd+prompts=empty.txt~empty.txt~is~empty teacher=ddpm+prompts=names.txt~takes~no~texts
    hidden.py+teacher=sd+prompts=names.txt~pip~install~transformers teacher=karras~FlowMatchEulerDiscreteScheduler
    teacher=ddpm+student=broken.json~no~config~of~a~diffusers~model teacher=ddpm+student=dit.json~takes~1000~class
    teacher=ldm+student=ddpm.json~for~4x8x8
    teacher=sd3+prompts=names.txt+student=sd3.json~--student_prediction=teacher""", SYNTH: """
    prior=sd+class_names=cifar10~10~names prior=sd+class_names=cifar10~4~classes"""}


def write_damaged():
    """Files of `tiny` damaged in all ways, and folders that are none."""
    state, header = M.read_weights('teacher.safetensors')
    net, process, unet2d = header['net'], header['diffusion'], {'class': 'UNet2DModel', 'sample_size': 16}
    for name, damaged in {
            'list': [1], 'none': {'key': 'x'}, 'mean': {'net': {'class': 'classifier', 'name': 'resnet8', 'mean': 'x'}},
            **{name: header | more for name, more in {
                'nan': {}, 'vae': {'vae': [1]}, 'gone': {'vae': 'gone'}, 'pipeline': {'pipeline': 3}, 'net': {'net': 3},
                'class': {'net': {'class': 'Sequential'}}, 'huge': {'net': net | {'model_channels': 10 ** 9}},
                'depth': {'net': net | {'num_res_blocks': 10 ** 9}}, 'odd': {'net': net | {'shape': 4}},
                'kind': {'net': net | {'kind': 'DiT'}}, 'steps': {'diffusion': process | {'steps': 10 ** 12}},
                'schedule': {'diffusion': process | {'schedule': [2., 3.]}}}.items()},
            **{name: header | {'net': unet2d | more} for name, more in {
                'runs': {'class': 'DiffusionPipeline'}, 'layers': {'layers_per_block': 10 ** 9},
                'long': {'block_out_channels': [8] * 10 ** 5}, 'wide': {'block_out_channels': [2 ** 20] * 4},
                'keys': {'trust_remote_code': True}, 'side': {'sample_size': [16, 16]}}.items()}}.items():
        tensors = {k: v * (float('nan') if name == 'nan' else 1) for k, v in state.items()}
        M.write_tensors(tensors, f'{name}.safetensors', damaged)
    save_file(state, 'json.safetensors', metadata={'config': '{'})
    for folder in ('empty', 'cut', 'index_list', 'index_empty', 'index_text', 'broken/a', 'half/a'):
        os.makedirs(folder)
    pixels = np.zeros((64, 16, 16, 1), np.uint8)
    np.savez('cut/images_0000_00000.npz', arr_0=pixels)
    save_image('half/a/one.jpg', np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for name, text in {
            'config.py': 'rho = "much"', 'exits.py': 'import sys\nsys.exit(0)', 'stops.py': 'raise KeyboardInterrupt',
            'folded.py': 'raise ValueError("two\\nlines")\n', 'list.txt': 'a/one.png first\n',
            'latin.txt': b'caf\xe9.png 1\n', 'index_list/model_index.json': '[1]', 'index_empty/model_index.json': '',
            'index_text/model_index.json': '"x"', 'cut.pt': b'PK\x03\x04 cut short',
            'broken/a/one.png': b'\x89PNG\r\n\x1a\n none', 'cut.safetensors': content('teacher.safetensors')[:5000],
            'half/a/one.jpg': content('half/a/one.jpg')[:1000],
            'cut/images_0000_00001.npz': content('cut/images_0000_00000.npz')[:300]}.items():
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, what in dict(other={'weight': torch.zeros(3)}, list=[1], text={'weight': 'x'}, nothing={},
                           ints={1: torch.zeros(2)}).items():
        torch.save(what, f'{name}.pt')
    space = f'classifier.safetensors {M.digest(M.load_classifier("classifier.safetensors"))}'
    eye = np.eye(16)
    for name, arrays in dict(
            no_arr=dict(x=np.zeros(3)), big=dict(arr_0=np.zeros((4, 32, 32, 3), np.uint8)), flat=dict(arr_0=pixels[0]),
            negative=dict(arr_0=pixels, arr_1=np.arange(64) - 1), zero=dict(arr_0=pixels[:, :0], arr_1=np.arange(64)),
            adm=dict(mu=np.zeros(2048), sigma=np.zeros((2048, 2048), np.float32)),
            short=dict(mu=np.zeros(2), sigma=np.eye(2), n=5, space=space),
            **{f'stats_{name}': dict(mu=np.zeros(16), sigma=sigma, n=5, space=space) for name, sigma in dict(
                nan=eye * np.nan, odd=eye + np.triu(eye + 1, 1), negative=-eye).items()}).items():
        np.savez(f'{name}.npz', **arrays)
    with open('array.npz', 'wb') as f:
        np.save(f, pixels)
    M.save_model(M.classifier('vgg11', image_size=4), 'vgg.safetensors')
    M.save_model(M.classifier('torchvision:alexnet', 4, image_size=64), 'norm_free.safetensors')


def bad_lines(table):
    for command, words in table.items():
        for word in words.split():
            args, _, message = word.partition('~')
            args = [f'--{arg}' if '=' in arg and not arg.endswith('.py') else arg for arg in args.split('+')]
            out = [] if 'out_dir' in word else ['--out_dir=o']
            yield [*command.split(), *out, *args], message.replace('~', ' ') or args[0][2:].partition('=')[0]


def refused(cases):
    """Every one in one line with its words, and no file comes or goes."""
    def files():
        return sorted((folder, sorted(folders + files)) for folder, folders, files in os.walk('.'))

    def one(case):
        command, words = case
        err = run(command, ok=False)
        return f'{command}: {words!r} is not in {err}' if words not in err else ''
    before, wrong = files(), [line for line in at_once(one, cases) if line]
    assert not wrong and files() == before, '\n'.join(wrong)


def test_bad_lines(tiny):
    write_damaged()
    folders = [(f, 'cannot be written') for f in ('', '/proc/x', 'images.npz', 'images.npz/x', 'x' * 300, 'a/' * 3000)]
    folders += [('new\nline', 'one line'), ('caf\udcff', 'one line')]
    cases = [([*command.split(), f'--out_dir={folder}'], words)
             for command in BAD if command != BENCH for folder, words in folders]
    cases += [*bad_lines(BAD), ([*DKDM.split(), '--teacher=no\nfile.pt', '--out_dir=o'], 'one line')]
    refused(cases)
    assert len(cases) > 300


def test_bad_hubs_and_students(pipelines):
    from diffusers import FlowMatchEulerDiscreteScheduler
    shutil.copytree('ddpm', 'karras')
    index = json.load(open('ddpm/model_index.json')) | {'scheduler': ['diffusers', 'FlowMatchEulerDiscreteScheduler']}
    FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).save_pretrained('karras/scheduler')
    for name, text in {'empty.txt': ' \n', 'broken.json': '{"_class_name": "NoSuchModel"}',
                       'karras/model_index.json': json.dumps(index), 'hidden.py': (    # a machine without transformers
                           'import importlib.util as _util\n_find = _util.find_spec\n'
                           "_util.find_spec = lambda name: None if name == 'transformers' else _find(name)\n")}.items():
        Path(name).write_text(text)
    refused(bad_lines(BAD_HUB))


def test_what_is_not_finite_is_not_saved(tiny, capsys):
    """The last good checkpoint stays, BatchNorm's statistics in it too."""
    assert 'not finite' in run(f'{SYNTH} --eta=1e30 --out_dir=s', ok=False)
    assert sorted(os.listdir('s')) == ['.lock', 'log.csv']
    for name, command in (('d', f'{DKDM} --grad_clip=0.0 --lr_warmup=0'), ('v', f'{VAE} --log_every=50')):
        assert 'not finite' in run(f'{command} --lr=1e30 --max_steps=50 --save_every=1 --out_dir={name}', ok=False)
        assert all(v.isfinite().all() for v in M.load_checkpoint(name, 0)[0]['net'].values())
    net = M.LVAE(16, 1, 8)
    net.d0.out.weight.data[0] = float('nan')
    with pytest.raises(SystemExit):
        M.save_model(net, 'student.safetensors')
    assert 'd0.out.weight is not finite' in capsys.readouterr().err and not os.path.exists('student.safetensors')


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


MARKED = {DKDM: """
    teacher=component teacher=library teacher=string teacher=pipeline teacher=none teacher=module teacher=weights
    teacher=scheduler teacher=vae_component.safetensors teacher=vae_scheduler.safetensors teacher=a.pt teacher=a.pth
    teacher=a.ckpt teacher=a.bin teacher=raw.pt teacher=raw.safetensors method=data+data=a.npz method=data+data=raw.npz
    method=data+data=image init_from=resume+out_dir=run""", 'export.py': """
    model=of_component.safetensors model=of_scheduler.safetensors""", CLASSIFIER: """
    teacher=a.th init_from=a.pth data=a.npz data=shards init_from=resume+out_dir=run""", SYNTH: """
    prior=a.ckpt student=a.th out_dir=shards""", VAE: 'teacher=vae teacher=a.pt init_from=resume+out_dir=run', FID: """
    models=a.pt models=images.npz+reference=mu.npz models=images.npz+features=a.pth
    models=images.npz+features=inception+inception_weights=a.pth models=weights"""}


def test_no_file_runs_code(tiny, pipeline_models):
    from diffusers import DiffusionPipeline
    mark = Marker(os.path.abspath('marker'))
    for name in ('a.pt', 'a.pth', 'a.th', 'a.ckpt', 'a.bin'):
        torch.save({'state_dict': {'weight': mark}}, name)
    for folder in ('image', 'run', 'shards', 'vae'):
        os.makedirs(folder)
        torch.save(mark, f'{folder}/ckpt.pt')
        np.savez(f'{folder}/images_0000_00000.npz', arr_0=np.zeros((4, 16, 16, 1), np.uint8),
                 settings=np.array([mark], dtype=object))
    for name in ('raw.pt', 'raw.safetensors', 'raw.npz', 'image/raw.png'):
        Path(name).write_bytes(pickle.dumps(mark))
    np.savez('a.npz', arr_0=np.array([mark], dtype=object))
    np.savez('mu.npz', mu=np.array([mark], dtype=object))
    parts = {'component': {'unet': ['net', 'Net']}, 'library': {'unet': ['diffusers', 'Net']},
             'string': {'_class_name': 'net'}, 'pipeline': {'_class_name': ['net', 'Net']}, 'none': {},
             'module': {'unet': ['net', 'Net']}, 'weights': {}, 'scheduler': {'scheduler': ['net', 'Net']}}
    files = {'component': 'unet/net.py', 'library': 'unet/diffusers.py', 'none': 'None.py',
             'scheduler': 'scheduler/net.py'}
    index = json.loads((pipeline_models / 'ddpm/model_index.json').read_text())
    for name, change in parts.items():
        shutil.copytree(pipeline_models / 'ddpm', name)
        for file, text in ((files.get(name, 'net.py'), f'open({mark.path!r}, "w")\nclass Net: pass\n'),
                           ('model_index.json', json.dumps(index | change))):
            Path(name, file).write_text(text)
    os.remove(glob.glob('weights/unet/*.safetensors')[0])
    torch.save(mark, 'weights/unet/diffusion_pytorch_model.bin')
    Path('vae/config.json').write_text('{"_class_name": "AutoencoderKL"}')
    torch.save(mark, 'vae/diffusion_pytorch_model.bin')
    with pytest.raises(ValueError, match='custom code'):                       # diffusers itself, as required
        DiffusionPipeline.from_pretrained('component')
    net = M.load_denoiser(str(pipeline_models / 'ddpm'))[0]
    for name in ('component', 'scheduler'):                                    # a student that says where its parts are
        M.save_model(net, f'vae_{name}.safetensors', M.Diffusion(), vae=name)
        M.save_model(net, f'of_{name}.safetensors', M.Diffusion(), pipeline=name)
    cases = [command for command, _ in bad_lines(MARKED)]
    at_once(lambda command: run(command, ok=False), cases)
    assert not os.path.exists('marker') and not os.path.exists('o') and len(cases) >= 20


# ---- what the repository ships, and the README ----
def test_help():
    for name in ('dkdm.py', 'synthesize.py', 'distill_classifier.py', 'distill_vae.py', 'eval_fid.py'):
        out = run(f'{name} --help')
        assert '--out_dir' in out and '--seed' in out and len(out.splitlines()) > 15
    assert '--teacher_width' in run('bench.py --help') and '--link' in run('export.py --help')


def test_configs_say_where_the_teacher_is():
    """Every config runs up to the teacher or the images that it needs, so its keys are right."""
    scripts = {'dkdm': 'dkdm.py', 'synth': 'synthesize.py', 'vae': 'distill_vae.py', 'distill': 'distill_classifier.py'}
    texts = {path: open(path).read() for path in sorted(glob.glob(f'{ROOT}/config/*.py'))}

    def one(path):
        name = os.path.basename(path)[:-3]
        if name.startswith('teacher'):                                         # leaves the file that the others ask for
            err = run(f'distill_classifier.py {path} --data=missing.npz', ok=False)
            assert 'missing.npz cannot be read' in err and f'out/{name}/student.safetensors' in ''.join(texts.values())
        elif name.split('_')[0] in scripts and not re.search('mnist|teacher|small', name):
            err = run(f'{scripts[name.split("_")[0]]} {path}', ok=False)
            assert 'no diffusers pipeline at' in err or 'no file' in err and '; get ' in err, err
    at_once(one, texts)
    assert not os.listdir()


def test_bundled_models():
    """The teacher draws digits that the bundled classifier is sure of, all ten of them."""
    net, diffusion = M.load_denoiser(f'{ROOT}/pretrained/mnist_unet.safetensors')
    classifier = M.load_classifier(f'{ROOT}/pretrained/mnist_resnet.safetensors')
    g = torch.Generator().manual_seed(0)
    x = M.sample(net, diffusion, (64, 1, 28, 28), 50, 'ddpm', spacing='even', generator=g)
    p = classifier(M.preprocess(classifier, x)).softmax(1).max(1)
    assert (p.values > 0.9).float().mean() > 0.85 and len(p.indices.unique()) == 10


def test_readme():
    """Its commands name scripts, files and settings that exist, its links into the code the lines that they say."""
    def read(name):
        with open(os.path.join(ROOT, name), encoding='utf-8') as f:
            return f.read()

    def settings(script):
        head = read(script).split('configurator.py')[0]
        base = settings('dkdm.py') if "'dkdm.py'" in head else set()           # bench.py's
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
        given = re.findall(r'(?:^|\s)--(\w+)=', command[script.end():] if script else command)
        wrong += [f'no setting --{k}: {command.strip()}' for k in given if k not in known]
    links = re.findall(r'\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)', text)
    for name, script, line in links:
        source = list(enumerate(read(script).split('\n'), 1))
        right = [i for i, s in source if re.match(rf'\s*(def|class) {re.escape(name)}\b', s)]
        right = right or [i for i, s in source if name in s]
        if int(line) not in right:
            wrong.append(f'{script}#L{line}: `{name}` is in line {right}')
    assert not wrong and seen > 50 and len(links) > 25, '\n'.join(wrong)
