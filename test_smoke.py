"""
    python -m pytest -q

Everything on tiny sizes: the numbers of the original code, the algebra of one step, the pool, every method as a user
would start it, resuming, two ranks, bad input. The golden numbers below are what the original networks give when every
weight is set by a formula (`fill`).
"""
import json
import os
import signal
import subprocess
import sys
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
    rebuilt = M.build(json.loads(json.dumps(net.config)))
    rebuilt.load_state_dict(net.state_dict())
    assert torch.equal(rebuilt.eval()(*args), out)


def test_schedules_and_timesteps_agree_with_the_original():
    for schedule, expected in (('cosine', (0.999958715775178, 0.49228517244880304, 2.4287669070348567e-09)),
                               ('linear', (0.9999, 0.07779665836502389, 4.035829765375676e-05))):
        assert np.allclose(M.Diffusion(schedule).alpha_bar[[0, 500, 999]], expected, rtol=1e-12)
    assert M.sampling_steps(1000, 50)[::-1][:4] == [0, 20, 41, 61] and M.sampling_steps(1000, 50)[0] == 999
    assert M.sampling_steps(1000, 50, 'ddim')[:2] == [980, 960]


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


# ---- the scripts, as a user starts them ----
def run(*args, cwd, ranks=0, ok=True, env=None):
    """Output of a script; with `ranks`, under torchrun. A failed run must be one line on stderr and exit code 2."""
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks else [sys.executable]
    p = subprocess.run([*launch, os.path.join(ROOT, args[0]), *map(str, args[1:])], cwd=cwd, text=True, capture_output=True,
                       env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **(env or {})})
    if ok:
        assert p.returncode == 0, p.stderr[-3000:]
        return p.stdout
    lines = [line for line in p.stderr.splitlines() if line.strip() and '%|' not in line]     # all but progress bars
    assert p.returncode == 2 and len(lines) == 1, p.stderr[-3000:]
    return lines[0]


def at_once(fn, cases):
    """Two processes at a time: most of a small run is importing torch."""
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
CLASSIFIER_RUN = ['distill_classifier.py', '--data=images.npz', '--test=images.npz', '--student=resnet8', '--width=4', '--epochs=8',
                  '--batch_size=16', '--augment_flip=True']


@pytest.mark.parametrize('args, ranks', [(DKDM_RUN, 0), (DKDM_RUN, 2), (CLASSIFIER_RUN, 0), (CLASSIFIER_RUN, 2)])
def test_killed_and_resumed_is_bit_for_bit(args, ranks, tiny, tmp_path):
    run(*args, f'--out_dir={tmp_path}/whole', cwd=tiny, ranks=ranks)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks else [sys.executable]
    p = subprocess.Popen([*launch, os.path.join(ROOT, args[0]), *args[1:], f'--out_dir={tmp_path}/cut'], cwd=tiny, start_new_session=True,
                         stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    ckpt = str(tmp_path / 'cut/ckpt.pt')
    while not (os.path.exists(ckpt) and M.read_weights(ckpt)[0]['step']):
        assert p.poll() is None
        time.sleep(0.01)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    run(*args, f'--out_dir={tmp_path}/cut', '--init_from=resume', cwd=tiny, ranks=ranks)
    whole, cut = (load_file(tmp_path / d / 'student.safetensors') for d in ('whole', 'cut'))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert np.array_equal(losses(tmp_path / 'whole'), losses(tmp_path / 'cut'))


def test_sigterm_saves_before_leaving(tiny, tmp_path):
    p = subprocess.Popen([sys.executable, os.path.join(ROOT, 'dkdm.py'), '--teacher=teacher.safetensors', *SMALL, '--max_steps=100000',
                          '--save_every=100000', f'--out_dir={tmp_path}'], cwd=tiny, stderr=subprocess.DEVNULL)
    while not (os.path.exists(tmp_path / 'log.csv') and os.path.getsize(tmp_path / 'log.csv') > 200):
        assert p.poll() is None
        time.sleep(0.05)
    p.terminate()
    assert p.wait(60) == 0 and os.path.exists(tmp_path / 'ckpt.pt') and os.path.exists(tmp_path / 'student.safetensors')


def test_two_ranks_share_the_pool_and_agree(tiny, tmp_path):
    run('dkdm.py', '--teacher=teacher.safetensors', *SMALL, '--stride=10', '--rho=0.4', f'--out_dir={tmp_path}', cwd=tiny, ranks=2)
    pools = [M.load_checkpoint(str(tmp_path), r)[1]['pool'] for r in range(2)]
    assert all(len(p[1]) == 4 * 8 // 2 for p in pools) and not torch.equal(pools[0][0], pools[1][0])
    digests = [M.load_checkpoint(str(tmp_path), r)[1]['weights'] for r in range(2)]
    assert digests[0] == digests[1]


def test_two_nodes(tiny, tmp_path):
    args = [os.path.join(ROOT, 'dkdm.py'), '--teacher=teacher.safetensors', *SMALL, '--stride=10', f'--out_dir={tmp_path}']
    nodes = [subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d',
                               '--rdzv_endpoint=localhost:29533', *args], cwd=tiny, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                              stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait(120) for p in nodes] == [0, 0]
    assert len({M.load_checkpoint(str(tmp_path), r)[1]['weights'] for r in range(2)}) == 1 and len(losses(tmp_path)) == 6


def test_classifier_and_frechet_distance(tiny, tmp_path):
    args = ['distill_classifier.py', '--data=images.npz', '--test=images.npz', '--student=resnet8', '--width=4', '--epochs=3',
            '--batch_size=16', f'--out_dir={tmp_path}/c']
    out = run(*args, cwd=tiny)
    assert 'test accuracy' in out and M.load_classifier(f'{tmp_path}/c/student.safetensors').config['num_classes'] == 4
    common = ['eval_fid.py', '--features=classifier.safetensors', f'--out_dir={tmp_path}/e']
    run(*common, '--reference=images.npz', f'--save_stats={tmp_path}/stats.npz', cwd=tiny)
    out = run(*common, f'--reference={tmp_path}/stats.npz', '--models=images.npz,teacher.safetensors', '--num_samples=64', '--steps=2',
              '--batch_size=32', cwd=tiny)
    rows = [r.split() for r in out.splitlines() if r.startswith(('images.npz', 'teacher'))]
    assert abs(float(rows[0][-1])) < 1e-3 and float(rows[1][-2]) > float(rows[0][-1])
    two = run(*common, f'--reference={tmp_path}/stats.npz', '--models=teacher.safetensors', '--num_samples=64', '--steps=2',
              '--batch_size=32', cwd=tiny, ranks=2)
    assert [r.split()[-2] for r in two.splitlines() if r.startswith('teacher')] == [rows[1][-2]]
    assert sorted(os.listdir(tmp_path / 'e')) == ['images.png', 'teacher.png']


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
    return tiny


BAD = [
    (['--roh=0.4'], "did you mean 'rho'"), (['--rho=high'], 'rho is float'), (['--compile=1'], 'compile is bool'),
    (['--channel_mult=2'], 'channel_mult is tuple'), (['nothing.py'], 'no config file'), (['--rho'], '--key=value'),
    (['config.py'], 'rho is float'), (['--method=magic'], "'dynamic'"), (['--rho=0.0'], 'above 0'), (['--stride=200'], 'T=100'),
    (['--teacher=missing.pt'], 'no file missing.pt'), (['--teacher=cut.safetensors'], 'cut short'), (['--teacher=cut.pt'], 'cut short'),
    (['--teacher=other.pt'], 'no denoiser'), (['--teacher=classifier.safetensors'], 'no denoiser'),
    (['--rho=1e12', '--stride=1'], '--pool_dtype=float16'), (['--batch_size=9', '--grad_accum=2'], 'a multiple of 2'),
    (['--method=data'], '--data'), (['--method=data', '--data=no_arr.npz'], "no 'arr_0'"), (['--method=data', '--data=nowhere'], 'nowhere'),
    (['--method=synthetic', '--synthetic=big.npz'], '(1, 16, 16)'), (['--guidance=2.0'], 'no classes'),
    (['--model_channels=9', '--num_head_channels=4'], 'attention heads'), (['--patch_size=3'], 'patches of 3'), (['--init_from=resume'], 'ckpt.pt'),
    (['--device=tpu9'], 'device'), (['--student=dit', '--hidden_size=30'], 'hidden_size'), (['--lr=1e30', '--lr_warmup=0', '--max_steps=50'], 'not finite')]
BAD_OTHERS = [
    (['eval_fid.py', '--models=missing.safetensors'], 'no file'), (['eval_fid.py', '--models=big.npz'], '3 channels'),
    (['eval_fid.py'], 'nothing to measure'), (['eval_fid.py', '--models=teacher.safetensors', '--steps=500'], 'from 1 to 100'),
    (['distill_classifier.py', '--data=big.npz'], 'no labels'), (['distill_classifier.py', '--data=images.npz', '--batch_size=16', '--student=resnet7'], 'resnet7')]


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
        common = ['--reference=images.npz', '--features=classifier.safetensors'] if args[0] == 'eval_fid.py' else []
        err = run(*args, *common, f'--out_dir={tmp_path}/o', cwd=bad, ok=False)
        assert words in err and not os.path.exists(tmp_path / 'o'), (args, err)
    at_once(one, BAD_OTHERS)


# ---- what the repository ships ----
@pytest.mark.parametrize('script', ['dkdm.py', 'distill_classifier.py', 'eval_fid.py'])
def test_help(script, tmp_path):
    out = run(script, '--help', cwd=tmp_path)
    assert '--out_dir' in out and '--seed' in out and len(out.splitlines()) > 15


def test_paper_configs_say_where_the_teacher_is(tmp_path):
    def one(name):
        err = run('dkdm.py', os.path.join(ROOT, 'config', name), cwd=tmp_path, ok=False)
        assert 'github.com' in err and not os.listdir(tmp_path), err
    at_once(one, [f'dkdm_{n}.py' for n in ('cifar10', 'celeba64', 'imagenet32', 'celebahq256_ldm', 'ffhq256_ldm')])


def test_bundled_models(tmp_path):
    """The teacher draws digits that the bundled classifier is sure of, all ten of them."""
    net, diffusion = M.load_denoiser(os.path.join(ROOT, 'pretrained/mnist_unet.safetensors'))
    classifier = M.load_classifier(os.path.join(ROOT, 'pretrained/mnist_resnet.safetensors'))
    x = M.sample(net, diffusion, (64, 1, 28, 28), 50, 'ddpm', generator=torch.Generator().manual_seed(0))
    p = classifier(M.preprocess(classifier, x)).softmax(1).max(1)
    assert (p.values > 0.9).float().mean() > 0.85 and len(p.indices.unique()) == 10
