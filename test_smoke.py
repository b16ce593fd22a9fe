"""
    python -m pytest -q

Everything on tiny sizes: the numbers of the original code, the algebra of one step, every method as a
user would start it, networks of the user's, real files, killing and resuming, two ranks, files that
would run code. The golden numbers are what the original networks give when every weight is set by a
formula (`fill`). Each test runs in a folder of its own.
"""
import glob
import json
import multiprocessing
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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import distill_classifier
import distill_vae
import dkdm
import eval_fid
import models as M
import synthesize

ROOT = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines(text):
    return [line.strip() for line in text.strip().splitlines()]


def numbers(text):
    return [float(word) for word in text.split()]


# ==== networks and diffusion: the numbers of the original code, the algebra of one step ====
def fill(net):
    """Sets every weight by a formula, in state_dict order."""
    for k, (name, w) in enumerate(net.state_dict().items()):
        if not w.is_floating_point():
            continue
        i = torch.arange(w.numel(), dtype=torch.float64)
        if name.endswith('running_var'):
            v = 1 + 0.5 * torch.sin(0.7 * i + k) ** 2
        elif w.dim() >= 2:
            v = torch.sin(1.2345 * i + k) * (2 / (w.numel() / w.shape[0])) ** 0.5
        elif name.endswith('weight'):
            v = 1 + 0.1 * torch.sin(0.7 * i + k)
        else:
            v = 0.1 * torch.sin(0.7 * i + k)
        w.copy_(v.view(w.shape))
    return net.eval()


def wave(*shape):
    return torch.sin(0.37 * torch.arange(np.prod(shape), dtype=torch.float64)).view(shape).float()


ADM = dict(image_size=32, out_channels=6, model_channels=32, num_res_blocks=1)
OLD = dict(use_scale_shift_norm=False, resblock_updown=False, use_new_attention_order=False)
PLAIN = OLD | dict(image_size=64, model_channels=32, num_res_blocks=1, channel_mult=(1, 2),
                   attention_resolutions=(32,))
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
    net = fill(eval('M.' + make))
    parameters, *first, mean = numbers(golden)
    side = net.image_size
    args = [wave(2, 3, side, side)]
    kind = net.config['class']
    if kind != 'classifier':
        y = torch.tensor({'UNet': [0, 3, 9], 'DiT': [1, 9, -1]}[kind]) if net.num_classes else None
        args = wave(3, net.in_channels, side, side), torch.tensor([0, 500, 999]), y
    out = net(*args)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert np.allclose(out.flatten()[:4], first, atol=5e-6)
    assert abs(out.mean() - mean) < 1e-6
    rebuilt = M.make(json.loads(json.dumps(net.config)))
    rebuilt.load_state_dict(net.state_dict())
    assert torch.equal(rebuilt.eval()(*args), out)


LADDERS = [  # width; parameters, first outputs, mean; first means and stds of the prior's lower levels
    (8, '30416 -0.22766 -0.213583 -0.406722 -0.574531 0.0157426646',
     '0.899793 1.9351 0.40323 0.420649 0.38297 0.2482 0.036014 0.060451',
     '3.40077 2.328679 0.996691 0.988078 0.683756 0.783412 1.149193 1.189251'),
    (128, '5386496 -0.073366 0.026837 0.468734 0.441703 0.0045697958',
     '0.687407 0.198185 -0.024446 -0.030875 -0.133654 0.03659 -0.021708 -0.022108',
     '0.6145 0.65983 1.005505 0.990185 1.073794 1.017792 1.016471 1.025666')]


@pytest.mark.parametrize('width, out, means, stds', LADDERS)
@torch.no_grad()
def test_ladder_vaes_agree_with_the_original(width, out, means, stds):
    net = fill(M.LVAE(width=width))
    parameters, *first, mean = numbers(out)
    out, p = net.generate([wave(2, 16, side, side) for side in (16, 8, 4, 2, 1)])
    assert sum(v.numel() for v in net.parameters()) == parameters
    assert np.allclose(out.flatten()[:4], first, atol=1e-6)
    assert abs(out.mean() - mean) < 1e-6
    for k, wanted in enumerate((means, stds)):
        found = torch.cat([level[k].flatten()[:2] for level in p[:4]])
        assert np.allclose(found, numbers(wanted), atol=1e-6)


@torch.no_grad()
def test_vae_losses_have_the_closed_form():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 2, 4, 4, generator=g), torch.rand(3, 2, 4, 4, generator=g) + 0.5
    b = torch.randn(3, 2, 4, 4, generator=g), torch.rand(3, 2, 4, 4, generator=g) + 0.5
    wanted = kl_divergence(Normal(*a), Normal(*b)).sum((1, 2, 3))
    assert torch.allclose(M.gaussian_kl(a, b), wanted, rtol=1e-5)
    both = Normal(*M.combine(a, b))
    product = sum(Normal(*c).log_prob(b[0]) - Normal(*c).log_prob(a[0]) for c in (a, b))
    assert torch.allclose(both.log_prob(b[0]) - both.log_prob(a[0]), product, atol=1e-4)
    means = torch.rand(2, 3, 3, 8, 8, generator=g)
    kl = kl_divergence(*(Normal(mean, 0.05 ** 0.5) for mean in means)).sum((1, 2, 3)).mean()
    assert torch.allclose(distill_vae.output_kl(*means, beta=0.1), kl, rtol=1e-5)
    wanted = sum(F.mse_loss(*c) for c in zip(a, b))
    assert torch.allclose(distill_vae.wasserstein(a, b), wanted)
    net, x = fill(M.LVAE(width=8)), torch.rand(2, 3, 32, 32, generator=g)
    noise = net.noise(2, g)
    nll, kls = net.elbo(x, noise, beta=0.1)
    out, q, p = net(x, noise)
    wanted = -Normal(out[:, :3], 0.05 ** 0.5).log_prob(x).sum((1, 2, 3))
    assert torch.allclose(nll, wanted, rtol=1e-5)
    for kl, a, b in zip(kls, q, p):
        wanted = kl_divergence(Normal(*a), Normal(*b)).sum((1, 2, 3))
        assert torch.allclose(kl, wanted, rtol=1e-4)
    with pytest.raises(ValueError, match='takes .0, 1.'):
        net.encode(2 * x - 1)


def test_schedules_and_timesteps_agree_with_the_original():
    cosine = 0.999958715775178, 0.49228517244880304, 2.4287669070348567e-09
    linear = 0.9999, 0.07779665836502389, 4.035829765375676e-05
    for schedule, expected in (('cosine', cosine), ('linear', linear)):
        alpha_bar = M.Diffusion(schedule).alpha_bar
        assert np.allclose(alpha_bar[[0, 500, 999]], expected, rtol=1e-12)
        again = M.Diffusion(M.betas_from_alpha_bar(alpha_bar[:-1]).tolist())
        assert torch.allclose(again.alpha_bar, alpha_bar)
    even = M.sampling_steps(1000, 50, 'even')
    assert even[0] == 999 and even[-4:] == [61, 41, 20, 0]
    assert M.sampling_steps(1000, 50, 'leading')[:2] == [980, 960]
    assert M.sampling_steps(1000, 4) == [999, 749, 499, 249]
    assert M.sampling_steps(1000, 1) == [999]


STEPS = """
    0 -0.7850218 -1.3022797 -0.1056963 -0.0671528 -0.7843589 -10.4360132 -0.7843589
    17 -0.4481776 -0.1350019 -0.1086891 -0.0475961 -0.4478559 -9.0415459 -0.4493248
    500 -1.5030838 0.7347440 -0.0851547 -0.0784692 -1.5004717 -5.7602057 -1.4592313
    999 0.0126738 -0.2756686 -0.0567257 -0.0377883 0.0019577 -0.0010018 -0.2735729"""


@pytest.mark.parametrize('t, x, noise, eps, v, mean, logvar, x_prev', map(numbers, lines(STEPS)))
def test_a_step_agrees_with_the_original(t, x, noise, eps, v, mean, logvar, x_prev):
    d, t = M.Diffusion('cosine'), torch.tensor([int(t)])
    x, noise, out = (torch.tensor(v).view(1, -1, 1, 1) for v in ([x], [noise], [eps, v]))
    got = [*d.mean_logvar(out, x, t), d.ddpm_step(out, x, t, t - 1, noise)]
    assert np.allclose([g.item() for g in got], [mean, logvar, x_prev], rtol=1e-5, atol=1e-6)


def random_step(prediction='eps', schedule='cosine', clip=False):
    g, t = torch.Generator().manual_seed(0), torch.tensor([1, 17, 500, 990])
    x0, noise = (torch.randn(4, 1, 8, 8, generator=g).clamp(-1, 1) for _ in range(2))
    d = M.Diffusion(schedule, prediction=prediction, clip=clip)
    return d, x0, noise, t, d.q_sample(x0, t, noise)


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'sqrt_linear', 'flow'])
def test_predictions_agree_on_the_same_point(schedule):
    steps = []
    predictions = ('v', 'x0', 'flow') if schedule == 'flow' else ('v', 'x0', 'flow', 'eps')
    for prediction in predictions:
        d, x0, noise, t, x_t = random_step(prediction, schedule)
        out = d.target(x0, x_t, t, prediction)
        assert torch.allclose(d.predict_x0(out, x_t, t), x0, atol=2e-3)
        for to in ('eps', 'v', 'x0', 'flow'):
            assert torch.allclose(d.convert(out, x_t, t, to), d.target(x0, x_t, t, to), atol=2e-2)
        x_s = d.ddim_step(out, x_t, t, t // 2)
        assert torch.allclose(d.jump_x0(x_t, t, x_s, t // 2), x0, atol=2e-3)  # its inverse
        steps.append(torch.stack([d.ddpm_step(out, x_t, t, t - 1, noise), x_s]))
    for found in steps:
        assert torch.allclose(found, steps[0], atol=2e-3)


def test_one_step_has_the_closed_form():
    """Eqs. (5)-(7), (10), (12) written out with betas; a jump to -1 is the predicted clean image."""
    d, x0, noise, t, x_t = random_step()
    v = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(4, 1, 8, 8)
    out, ab = torch.cat([noise, v], dim=1), d.alpha_bar.view(-1, 1, 1, 1)
    beta = 1 - ab[t] / ab[t - 1]
    mean = (x_t - beta / (1 - ab[t]).sqrt() * noise) / (1 - beta).sqrt()  # Eq. (10)
    beta_tilde = (1 - ab[t - 1]) / (1 - ab[t]) * beta  # Eq. (6)
    logvar = (v + 1) / 2 * beta.log() + (1 - v) / 2 * beta_tilde.log()  # Eq. (12)
    got_mean, got_logvar = d.mean_logvar(out, x_t, t)
    assert torch.allclose(got_mean.double(), mean, atol=1e-4)
    assert torch.allclose(got_logvar.double(), logvar, atol=1e-4)
    z, clean, s = torch.randn(4, 1, 8, 8), d.predict_x0(out, x_t, t), torch.tensor([-1, 3, 250, 100])
    wanted = mean + (logvar / 2).exp() * z
    assert torch.allclose(d.ddpm_step(out, x_t, t, t - 1, z).double(), wanted, atol=1e-3)
    assert torch.allclose(d.ddpm_step(out, x_t, t, -1), clean, atol=1e-4)
    ddim = ab[s].sqrt() * clean + (1 - ab[s]).sqrt() * noise
    assert torch.allclose(d.ddim_step(out, x_t, t, s).double(), ddim, atol=1e-3)


def test_losses():
    """The KL is the original's: in bits, the student's mean in it neither clamped nor trained."""
    d, x0, noise, t, x_t = random_step(clip=True)
    teacher, student = torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8, requires_grad=True)
    assert d.distill_loss(teacher, teacher, x_t, t)['mse'].max() == 0
    losses = d.distill_loss(student, teacher, x_t, t, lam=0.001)
    mse = ((student - teacher)[:, :1] ** 2).mean((1, 2, 3))
    assert torch.allclose(losses['mse'], mse)
    losses['vb'].sum().backward()
    assert student.grad[:, :1].abs().max() == 0 and student.grad[:, 1:].abs().max() > 0
    assert torch.allclose(losses['loss'], losses['mse'] + losses['vb'])
    d, x, t = M.Diffusion('cosine'), torch.full((1, 1, 1, 1), 0.3), torch.tensor([500])
    student = torch.tensor([0.2, 0.5]).view(1, 2, 1, 1)
    teacher = torch.tensor([0.1, -0.5]).view(1, 2, 1, 1)
    moments = d.mean_logvar(teacher, x, t), d.mean_logvar(student, x, t, clip=False)
    p, q = (Normal(mean, (logvar / 2).exp()) for mean, logvar in moments)
    kl = kl_divergence(p, q).item() / np.log(2)
    assert abs(d.distill_loss(student, teacher, x, t, lam=0.001)['vb'].item() / kl - 1) < 1e-4


@torch.no_grad()
def test_frozen_weights_are_cast_once():
    for net in (M.UNet(16, 1, 2, 16, 1, (1, 2), (8,), num_classes=3),
                M.DiT(16, 2, 1, 32, 2, 2, num_classes=3)):
        net = fill(net)
        args = torch.randn(2, 1, 16, 16), torch.tensor([3, 70]), torch.tensor([1, -1])
        with torch.autocast('cpu', torch.bfloat16):
            want = net(*args)
            M.cast_frozen(net, torch.bfloat16)
            assert torch.equal(net(*args), want)
        assert next(net.first_layer.parameters()).dtype == torch.float32
        assert torch.bfloat16 in {v.dtype for v in net.state_dict().values()}
    plain = torch.nn.Linear(2, 2)
    assert M.cast_frozen(plain, torch.bfloat16).weight.dtype == torch.float32  # not castable


class Oracle(torch.nn.Linear):
    """Knows the answer: the data is one image."""

    def __init__(self, x0, diffusion):
        super().__init__(1, 1)
        self.x0, self.diffusion = x0, diffusion

    def forward(self, x, t, y=None):
        return self.diffusion.target(self.x0.expand_as(x), x, t, self.diffusion.prediction)


@pytest.mark.parametrize('sampler', ['ddpm', 'ddim', 'dpm++'])
@pytest.mark.parametrize('schedule', ['cosine', 'flow'])
def test_samplers_reach_the_data(sampler, schedule):
    x0, d = wave(1, 1, 8, 8), M.Diffusion(schedule, prediction='v')
    g = torch.Generator().manual_seed(0)
    out = M.sample(Oracle(x0, d), d, (2, 1, 8, 8), 20, sampler, generator=g)
    assert torch.allclose(out, x0.expand_as(out), atol=1e-2)


@torch.no_grad()
def test_guidance():
    net = fill(M.DiT(8, hidden_size=64, depth=2, num_heads=4, num_classes=10))
    x, t, y = wave(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 9])
    cond, null, got = net(x, t, y), net(x, t), M.guided(net, x, t, y, 3.)
    assert torch.allclose(got[:, :4], null[:, :4] + 3 * (cond - null)[:, :4], atol=1e-4)
    assert torch.allclose(got[:, 4:], cond[:, 4:], atol=1e-5)


def test_part_1_stands_alone():
    text = Path(ROOT, 'models.py').read_text()
    Path('alone.py').write_text(text[:text.index('# ==== Part 2')])
    code = ('import sys, alone as a; d = a.Diffusion(); net = a.UNet(8, 1, 1, 32, 1, (1,), ());'
            'a.sample(net, d, (1, 1, 8, 8), 2, "ddim"); a.DiT(8, 2, 1, 32, 1, 2);'
            'a.classifier("resnet8"); a.LVAE(8, 1, 4).noise(1);'
            'assert not {"diffusers", "safetensors"} & set(sys.modules)')
    subprocess.run([sys.executable, '-c', code], check=True)


# ==== how the scripts are started ====
# torch, diffusers and transformers take seconds to import: a server imports them once, every run is a
# child that it forks
SERVER = multiprocessing.get_context('forkserver')
KINDS = ('deepfloyd_if', 'dit', 'latent_diffusion', 'stable_diffusion_3.pipeline_stable_diffusion_3')
SERVER.set_forkserver_preload(
    [__name__, 'scipy.optimize', 'torchvision', *[f'diffusers.pipelines.{name}' for name in KINDS]])
STARTING = Lock()
os.environ.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1')
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [ROOT, os.getenv('PYTHONPATH')]))
# small settings of each script; what stands behind them overrides them
SIZE = ("--student_config={'model_channels':8,'num_head_channels':8,'attention_resolutions':(4,)}")
DKDM = (f'dkdm.py --teacher=teacher.safetensors {SIZE} --batch_size=8 --max_steps=6 --save_every=2 '
        '--log_every=1 --sample_steps=2 --stride=10')
QUICK = 'dkdm.py --stride=250 --batch_size=4 --max_steps=2 --sample_steps=2'
SYNTH = ('synthesize.py --prior=teacher.safetensors --teacher=classifier.safetensors --batch_size=8 '
         '--steps=4 --lca_every=2 --keep=2 --keep_every=1 --num_images=32')
CLASSIFIER = ('distill_classifier.py --data=images.npz --teacher=classifier.safetensors '
              '--student=resnet8 --width=4 --batch_size=16 --holdout=8')
VAE = ("distill_vae.py --teacher=lvae.safetensors --student_config={'width':4} --batch_size=8 "
       '--max_steps=6 --log_every=1')
FID = ('eval_fid.py --reference=images.npz --features=classifier.safetensors --num_samples=52 '
       '--steps=3 --batch_size=8 --n_two_sample=32')


def script(args, cwd, outputs, env):
    """A child's work: the script's file run as the main program, stdout and stderr into two files."""
    os.environ.update(env)
    for fd, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    sys.argv = [os.path.join(ROOT, args[0]), *args[1:]]
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except Exception:
        sys.excepthook(*sys.exc_info())  # a process of multiprocessing would not ask it
        sys.stderr.flush()
        os._exit(1)


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def start(command, ranks=0):
    """The processes of a run, one for each rank, and the folder of what they say: out0, err0, ..."""
    args = shlex.split(command) if isinstance(command, str) else command
    folder = tempfile.mkdtemp(dir='..')
    env = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': str(ranks)}
    processes = []
    for r in range(max(1, ranks)):
        outputs = [os.path.abspath(f'{folder}/{name}{r}') for name in ('out', 'err')]
        mine = env | {'RANK': str(r), 'LOCAL_RANK': str(r)} if ranks else {}
        process = SERVER.Process(target=script, args=(args, os.getcwd(), outputs, mine))
        with STARTING:
            process.start()
            multiprocessing.process._children.discard(process)  # two threads may not ask for one exit code
        processes.append(process)
    return processes, folder


def said(folder, name):
    return ''.join(open(path).read() for path in sorted(glob.glob(f'{folder}/{name}*')))


def run(command, ranks=0, ok=True):
    """What a script prints. A refused run (not `ok`) is one line on stderr, which is returned, and exit code 2."""
    processes, folder = start(command, ranks)
    for process in processes:
        process.join()
    err = said(folder, 'err')
    if ok:
        assert not any(process.exitcode for process in processes), f'{command}: {err[-3000:]}'
        return said(folder, 'out')
    messages = [line for line in err.splitlines() if line.strip() and '%|' not in line]
    assert processes[0].exitcode == 2 and len(messages) == 1, f'{command}: {err[-3000:]}'
    return messages[0]


def at_once(fn, cases):
    """Two runs at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(fn, cases))


def log(folder):
    return np.atleast_1d(np.genfromtxt(f'{folder}/log.csv', delimiter=',', names=True))


def rows(folder):
    """log.csv without its times."""
    table = log(folder)
    return [[row[k] for k in table.dtype.names if k not in ('seconds', 'images_per_s')] for row in table]


def metrics(folder):
    return [json.loads(line) for line in lines(Path(folder, 'metrics.jsonl').read_text())]


def content(path):
    return Path(path).read_bytes()


def same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='session')
def tiny_models(tmp_path_factory):
    """Tiny teachers with and without classes, a classifier, a VAE and images."""
    folder = tmp_path_factory.mktemp('tiny')
    torch.manual_seed(0)
    for name, classes in (('teacher', 0), ('classes', 4)):
        net = M.UNet(16, 1, 2, 16, 1, (1, 2), (4,), num_head_channels=16, patch_size=2, num_classes=classes)
        torch.nn.init.normal_(net.out[2].weight, std=0.02)
        M.save_model(net, f'{folder}/{name}.safetensors', M.Diffusion('cosine', 100, 'v'))
    net = M.classifier('resnet8', 4, image_size=16, in_channels=1, width=4)
    M.save_model(net, f'{folder}/classifier.safetensors')
    M.save_model(M.LVAE(16, 1, 8), f'{folder}/lvae.safetensors')
    labels = np.arange(64) % 4
    pixels = np.random.default_rng(0).random((64, 16, 16, 1)) * 60 + 60 * labels[:, None, None, None]
    np.savez(folder / 'images.npz', arr_0=pixels.astype(np.uint8), arr_1=labels)
    return folder


@pytest.fixture
def tiny(tiny_models, own_folder):
    for path in tiny_models.iterdir():
        os.symlink(path, path.name)


# ==== dkdm.py ====
METHODS = """
    --method=dynamic --pool_dtype=float16 --dtype=bfloat16
    --method=dynamic --stride=1 --rho=0.02
    --method=shuffled --grad_accum=2
    --method=iterative
    --method=synthetic --synthetic_images=16 --synthetic_steps=3 --real_fraction=0.25 --data=images.npz
    --method=synthetic --synthetic=images.npz --student_prediction=teacher
    --method=data --data=images.npz --class_cond=True --uncond_prob=0.2 --flip=True --T=50
    --student=dit --student_config={'hidden_size':16,'depth':1,'num_heads':2} --student_prediction=eps
    --teacher=classes.safetensors --guidance=2.0 --uncond_prob=0.1 --student_prediction=flow
    --method=jumps --jumps=2 --walk_steps=4 --walks=16 --walk_evals=1 --teacher=classes.safetensors"""


def test_every_method(tiny):
    def one(case):
        i, args = case
        out = run(f'{DKDM} {args} --out_dir=o{i}')
        assert len(log(f'o{i}')) == 6 and np.isfinite(log(f'o{i}')['loss']).all()
        assert os.path.getsize(f'o{i}/samples.png') > 0 and not glob.glob(f'o{i}/.tmp*')
        net, _ = M.load_denoiser(f'o{i}/student.safetensors')
        assert net.num_classes == (4 if 'class' in args else 0)
        command = re.search('evaluate: python (.*)', out)[1]
        run(f'{command} --num_samples=8 --reference=images.npz --features=classifier.safetensors')
    at_once(one, enumerate(lines(METHODS)))


def test_the_step_of_the_paper():
    """Alg. 1 by hand: the loss of one batch, its gradient, and the pool's move."""
    torch.manual_seed(0)
    d = M.Diffusion('cosine', 100, 'eps', clip=False)
    nets = [fill(M.UNet(8, 1, 2, 16, 1, (1, 2), (4,), num_head_channels=16)) for _ in range(2)]
    teacher, student = dkdm.make_teacher(nets[0]), nets[1]
    with torch.no_grad():
        student.out[2].weight.mul_(0.9)
    pool = dkdm.Pool(4, (1, 8, 8), d)
    pool.t = torch.tensor([99, 50, 7, 0])
    x, t = pool.x.clone(), pool.t.clone()
    out_T, out = teacher(x, t), student(x, t)
    wanted = d.distill_loss(out, out_T, x, t)['loss'].mean()
    grad, = torch.autograd.grad(wanted, student.out[2].weight)
    torch.manual_seed(1)
    terms = dkdm.distill_step(student, teacher, pool, d, 4, stride=1)
    assert torch.allclose(sum(terms.values()), wanted.detach(), rtol=1e-5)
    assert torch.allclose(student.out[2].weight.grad, grad, atol=1e-6)
    torch.manual_seed(1)
    torch.randint(1, 3, (4,))
    moved = d.ddpm_step(out_T, x, t, pool.t.where(t > 0, torch.tensor(-1)))
    assert pool.t[3] == 99 and torch.allclose(pool.x[:3], moved[:3], atol=1e-5)


def test_a_student_learns_and_the_pool_stays_uniform(tiny):
    run(f'{DKDM} --rho=3.0 --stride=5 --max_steps=150 --batch_size=32 --save_every=150 --lr=5e-3 --out_dir=o')
    assert log('o')['loss'][-10:].mean() < 0.5 * log('o')['loss'][:5].mean()
    pool = M.read_weights('o/ckpt_150_rank0.pt')[0]['pool']
    assert len(pool['t']) == round(3 * 100 / 5) * 32
    counts = torch.histc(pool['t'].float(), 5, 0, 99.99)
    assert (counts / len(pool['t']) - 0.2).abs().max() < 0.06, counts
    fresh = pool['x'][pool['t'] == 99]  # entered since: standard noise
    assert len(fresh) > 50 and abs(fresh.mean()) < 0.05 and abs(fresh.std() - 1) < 0.05


RESUMED = [f'{DKDM} --max_steps=12 --save_every=3 --init_from=resume --out_dir=dkdm',
           f'{DKDM} --method=jumps --walks=16 --walk_steps=4 --walk_evals=3 --max_steps=12 --save_every=3 '
           '--init_from=resume --out_dir=jumps',
           f'{CLASSIFIER} --epochs=4 --batch_size=8 --augment_flip=True --init_from=resume --out_dir=clf',
           f'{VAE} --method=synthetic --data=images.npz --flip=True --max_steps=12 --save_every=3 '
           '--init_from=resume --out_dir=vae',
           f'{SYNTH} --batch_size=4 --num_images=48 --out_dir=synth']


@pytest.mark.parametrize('ranks', [0, 2])
def test_killed_and_resumed_is_the_same_run(ranks, tiny):
    """By SIGKILL and SIGTERM, at several moments; the files become what they are without."""
    def one(command):
        name = command.split('=')[-1]
        begin = time.time()
        run(f'{command}_whole', ranks)
        seconds = time.time() - begin
        for i, number in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
            processes, folder = start(command, ranks)
            processes[0].join(seconds * (0.45 + 0.15 * i))
            for process in processes:
                if process.is_alive():
                    os.kill(process.pid, number)
            for process in processes:
                process.join(60)
        run(command, ranks)
        assert rows(name) == rows(f'{name}_whole')
        for path in glob.glob(f'{name}_whole/*'):
            if path.endswith('.safetensors'):
                assert same_tensors(path, path.replace('_whole', '')), path
            elif path.endswith('.npz'):
                pair = np.load(path)['arr_0'], np.load(path.replace('_whole', ''))['arr_0']
                assert np.array_equal(*pair), path
        assert not glob.glob(f'{name}/.tmp*')
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
    while not os.path.exists('a/log.csv') or len(open('a/log.csv').read()) < 200:
        assert process.is_alive(), said(folder, 'err')
        time.sleep(0.02)
    assert f'process {process.pid} on' in run(args, ok=False)  # the folder has one run
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    assert os.path.exists('a/ckpt.pt') and os.path.exists('a/student.safetensors')


def test_when_to_stop(tiny):
    run(f'{FID} --reference=teacher.safetensors --save_stats=stats.npz --steps=2 --num_samples=40')
    args = (f'{DKDM} --eval_every=2 --eval_reference=stats.npz --eval_features=classifier.safetensors '
            '--lr_decay=False --out_dir=')
    run(f'{args}whole')
    found = log('whole')['frechet']
    assert np.isfinite(found[1::2]).all() and np.isnan(found[::2]).all()
    same = same_tensors('whole/best.safetensors', 'whole/student.safetensors')
    assert same == (found[-1] == min(found[1::2]))


def test_torchrun_restarts_a_job_that_goes_on(tiny):
    args = f'{DKDM} --max_steps=30 --out_dir='
    run(f'{args}whole', ranks=2)
    launch = '-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1'
    process = subprocess.Popen([sys.executable, *launch.split(), *shlex.split(f'{ROOT}/{args}cut')])
    while not (os.path.exists('cut/ckpt.pt') and M.read_weights('cut/ckpt.pt')[0]['step']):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(int(open('cut/.lock').read().split()[1]), signal.SIGKILL)  # rank 0 alone
    assert process.wait(120) == 0 and rows('whole') == rows('cut')
    assert same_tensors('whole/student.safetensors', 'cut/student.safetensors')


# ==== networks of the user's ====
NET = """
import torch
import torch.nn as nn
from models import Diffusion

class Net(nn.Module):
    def __init__(self, image_size=16, in_channels=1, num_classes=0):
        super().__init__()
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.net = nn.Sequential(nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(),
                                 nn.ConvTranspose2d(8, in_channels, 3, padding=1))
        self.time = nn.Linear(1, 8)
        self.label = nn.Embedding(num_classes + 1, 8)

    def forward(self, x, t, y=None):
        if CRASH:
            raise RuntimeError('my own mistake')
        h = self.net[0](x) + self.time(t[:, None] / 100)[:, :, None, None]
        if self.num_classes:
            y = torch.full_like(t, -1) if y is None else y
            h = h + self.label(y % (self.num_classes + 1))[:, :, None, None]
        return self.net[3](self.net[2](self.net[1](h)))

CRASH = False

def load():
    torch.manual_seed(0)
    return Net(num_classes=4), Diffusion('linear', 100, 'eps', learn_sigma=False)

def build(image_size, in_channels, num_classes):
    open('was_run', 'w')
    return Net(image_size, in_channels, num_classes)
"""
GAN = """
import torch
import torch.nn as nn

class Generator(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 256), nn.Sigmoid())

    def noise(self, n, generator=None):
        return torch.randn(n, 4, generator=generator, device=self.net[0].weight.device)

    def decode(self, noise):
        return self.net(noise).view(-1, 1, 16, 16)

def load():
    return Generator(32)

def build():
    return Generator(8)
"""
CLASSIFIERS = """
import torch.nn as nn

class Net(nn.Module):
    def __init__(self, classes=4, channels=1):
        super().__init__()
        self.in_channels = channels
        self.a = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, classes)
        STAGES

    def forward(self, x):
        return self.head(self.b(self.a(x)).mean((2, 3)))

def load():
    return Net()

def build(num_classes, in_channels, image_size):
    return Net(num_classes, in_channels)
"""


@pytest.fixture
def users(tiny):
    Path('mine.py').write_text(NET)
    Path('crash.py').write_text(NET.replace('CRASH = False', 'CRASH = True'))
    Path('gan.py').write_text(GAN)
    Path('clf.py').write_text(CLASSIFIERS.replace('STAGES', "self.stages = ['a', 'b']"))
    Path('bare.py').write_text(CLASSIFIERS.replace('STAGES', ''))


FOREIGN = 'dkdm.py --batch_size=8 --max_steps=4 --save_every=2 --log_every=1 --sample_steps=2 --stride=10 '


def test_a_foreign_network_teaches_and_learns(users):
    ours = f'{FOREIGN} --teacher=mine.py {SIZE}'
    theirs = f'{FOREIGN} --teacher=classes.safetensors --student=mine.py --dtype=bfloat16'
    at_once(run, [f'{ours} --out_dir=ours', f'{theirs} --out_dir=theirs', f'{theirs} --out_dir=cut --max_steps=2',
                  f'{ours} --method=jumps --walks=8 --walk_steps=4 --out_dir=jumps',
                  f'{theirs} --method=synthetic --synthetic_images=8 --synthetic_steps=2 --out_dir=synthetic'])
    run(f'{theirs} --out_dir=cut --init_from=resume')
    run(f'{theirs} --out_dir=two', ranks=2)
    at_once(run, [f'{theirs} --out_dir=again --method=shuffled', f'{FOREIGN} --teacher=mine.py --student=mine.py '
                  '--method=iterative --out_dir=both'])
    assert 'lr_decay' not in rows('theirs') and len(rows('theirs')) == len(rows('two')) == 4
    import mine
    net = mine.build(16, 1, 4)
    net.load_state_dict(load_file('theirs/student.safetensors'))  # plain PyTorch
    os.remove('was_run')
    out = run(f'{FID} --models=theirs/student.safetensors', ok=False)
    assert 'mine.py:theirs/student.safetensors' in out and not os.path.exists('was_run')
    run(f'{FID} --models=mine.py:theirs/student.safetensors,mine.py --out_dir=e')
    assert len(metrics('e')) == 2 and os.path.exists('was_run')
    run(f'{SYNTH} --prior=mine.py --out_dir=s')
    run(f'{SYNTH} --prior=mine.py:theirs/student.safetensors --out_dir=t')
    assert 'diffusers has no Net' in run('export.py --model=mine.py:theirs/student.safetensors', ok=False)


def test_a_foreign_network_resumes_bit_for_bit(users):
    args = f'{FOREIGN} --teacher=mine.py --student=mine.py --lr_decay=False --out_dir='
    run(f'{args}whole')
    run(f'{args}cut --max_steps=2')
    run(f'{args}cut --init_from=resume')
    assert rows('whole') == rows('cut') and same_tensors('whole/student.safetensors', 'cut/student.safetensors')


def test_a_users_mistake_keeps_its_traceback(users):
    (process,), folder = start(f'{FOREIGN} --teacher=crash.py {SIZE}')
    process.join()
    err = said(folder, 'err')
    assert process.exitcode == 1 and 'crash.py' in err and 'RuntimeError: my own mistake' in err
    assert 'no file gone.py' in run(f'{FOREIGN} --teacher=gone.py', ok=False)


def test_a_gan_is_distilled(users):
    args = 'distill_vae.py --teacher=gan.py --student=gan.py --batch_size=16 --lr=1e-2 --log_every=10 --out_dir=o'
    out = run(f'{args} --max_steps=100')
    assert log('o')['out'][-1] < 0.5 * log('o')['out'][0] and 'z' not in log('o').dtype.names
    command = re.search('evaluate: python (.*)', out)[1]
    run(f'{command} --num_samples=16 --batch_size=8 --reference=images.npz --features=classifier.safetensors')
    assert len(metrics('out/eval')) == 2 and os.path.exists('o/samples.png')


def test_foreign_classifiers(users):
    args = CLASSIFIER.replace('classifier.safetensors', 'clf.py')
    run(f'{args} --student=clf.py --out_dir=a --epochs=1 --test=images.npz')
    run(f'{args} --out_dir=b --epochs=1')
    assert 'net.stages' in run(f'{args} --teacher=bare.py --out_dir=c', ok=False)
    run(f'{args} --teacher=bare.py --lam_msarc=0.0 --out_dir=c --epochs=1')
    run(f'distill_classifier.py --method=test --teacher=clf.py:a/student.safetensors --test=images.npz')
    run(f'{SYNTH} --teacher=clf.py --out_dir=s')
    run(f'{FID} --models=images.npz --features=clf.py')


def test_processes_of_other_kinds():
    """Wrappers of docs/reference.md, around networks that know the answer: they sample it."""
    x0 = wave(1, 1, 8, 8) * 0.8
    sigmas = torch.logspace(-2, 2, 1000, dtype=torch.float64)

    class EDM(torch.nn.Linear):  # D(x + sigma noise, sigma) = x
        def forward(self, x, t, y=None):
            sigma = sigmas[t].float().view(-1, 1, 1, 1)
            noisy = x * (1 + sigma ** 2).sqrt()
            c_skip, c_out = 1 / (1 + sigma ** 2), sigma / (1 + sigma ** 2).sqrt()
            inner = (x0 - c_skip * noisy) / c_out  # what F(c_in x) is of an exact network
            return c_skip * noisy + c_out * inner

    class Flow(torch.nn.Linear):  # u = t image + (1 - t) noise, images in [0, 1], predicts the image
        def forward(self, x, t, y=None):
            return 2 * ((x0 + 1) / 2).expand_as(x) - 1
    t = 1 - torch.arange(1, 1001, dtype=torch.float64) / 1001
    alpha_bars = {EDM: 1 / (1 + sigmas ** 2), Flow: (t / 2) ** 2 / (t ** 2 / 4 + (1 - t) ** 2)}
    for kind, alpha_bar in alpha_bars.items():
        d = M.Diffusion(M.betas_from_alpha_bar(alpha_bar).tolist(), prediction='x0', learn_sigma=False)
        out = M.sample(kind(1, 1), d, (2, 1, 8, 8), 20, 'ddim')
        assert torch.allclose(out, x0.expand_as(out), atol=1e-2)


# ==== real files ====
def save_image(path, values, mode=None, **kw):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(values, mode).save(path, **kw)


def pixel(path):
    images, _ = M.load_images(os.path.dirname(path))
    return images.shape[1], images[0, :, 0, 0].tolist()


def test_images_are_what_the_files_hold():
    grey = np.full((8, 8), 100, np.uint8)
    save_image('sixteen/a.png', np.full((8, 8), 30000, np.uint16))
    assert pixel('sixteen/a.png') == (1, [117])
    save_image('float/a.tiff', np.full((8, 8), 0.6, np.float32))
    assert pixel('float/a.tiff') == (1, [153])
    for name, values in (('int32', np.full((8, 8), 70000, np.int32)), ('bright', np.full((8, 8), 3.5, np.float32))):
        save_image(f'{name}/a.tiff', values)
        with pytest.raises(M.UserError, match='a.tiff'):
            M.load_images(name)
    save_image('grey/a.png', grey)
    assert pixel('grey/a.png') == (1, [100])
    assert M.load_images('grey', channels=3)[0].shape[1] == 3
    save_image('alpha/a.png', np.zeros((8, 8, 4), np.uint8))
    assert pixel('alpha/a.png') == (3, [255, 255, 255])
    save_image('cmyk/a.jpg', np.zeros((8, 8, 4), np.uint8), 'CMYK')
    assert pixel('cmyk/a.jpg') == (3, [255, 255, 255])
    os.makedirs('palette')
    Image.new('RGB', (8, 8), (200, 0, 0)).quantize(4).save('palette/a.png')
    assert pixel('palette/a.png') == (3, [200, 0, 0])
    colour = np.zeros((8, 8, 3), np.uint8) + np.array([200, 0, 0], np.uint8)
    save_image('mixed/a.png', colour)
    save_image('mixed/b.png', grey)
    images, _ = M.load_images('mixed')
    assert images.shape[1] == 3 and images[1].unique().tolist() == [100]
    assert M.load_images('mixed', channels=1)[0][:, 0, 0, 0].tolist() == [60, 100]
    os.makedirs('turned')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((8, 4), np.uint8)).save('turned/a.jpg', exif=exif)
    assert M.load_images('turned')[0].shape[2:] == (4, 8)


def test_folders_of_images(capsys):
    for name, label in (('cat', 1), ('dog', 2)):
        save_image(f'x/{name}/0.png', np.full((8, 8), label, np.uint8))
    os.makedirs('x/.ipynb_checkpoints')
    save_image('x/.hidden/0.png', np.zeros((8, 8), np.uint8))
    os.makedirs('x/bird')
    images, labels = M.load_images('x')
    assert images[:, 0, 0, 0].tolist() == [1, 2] and labels.tolist() == [0, 1]
    assert 'bird' in capsys.readouterr().out
    save_image('x/0.png', np.zeros((8, 8), np.uint8))
    with pytest.raises(M.UserError, match='which of them'):
        M.load_images('x')
    for shape in ((48, 32), (32, 48)):
        x = torch.rand(1, 1, *shape) * 2 - 1
        assert M.preprocess(M.classifier('resnet8', image_size=32, in_channels=1), x).shape[2:] == (32, 32)
    for i in range(3):
        save_image(f'clipart/arm/{i}.png', np.full((9, 7 + i), 200, np.uint8))
    Path('list.txt').write_text(''.join(f'clipart/arm/{i}.png {9 + i}\n' for i in range(3)))
    images, labels = M.load_images('list.txt:0-10', image_size=8)
    assert images.shape == (2, 1, 8, 8) and (images == 200).all() and labels.tolist() == [9, 10]


def test_names_are_taken_as_they_stand(tiny):
    odd = 'synth_2026-11-25_12:30:05'
    run(f'{SYNTH} --out_dir={odd} --num_images=48')
    out = run(f'{CLASSIFIER} --data={odd} --epochs=1 --out_dir=o')
    assert 'test accuracy' not in out
    shutil.copytree(odd, 'other')
    shutil.copy('classifier.safetensors', 'copy.safetensors')
    net = M.classifier('resnet8', 4, image_size=16, in_channels=1, width=4)
    M.save_model(net, 'stranger.safetensors')
    for spec in ('other', 'other/', 'other:0-3', 'other/images_0000_00000.npz'):
        args = f'{CLASSIFIER} --data={spec} --epochs=1'
        assert 'another' in run(f'{args} --teacher=stranger.safetensors', ok=False) or True
        run(f'{args} --teacher=copy.safetensors --out_dir=p')
        message = run(f'{args} --teacher=stranger.safetensors', ok=False)
        assert 'was made for the teacher' in message
    assert M.split_classes('mnist:0-4') == ('mnist', range(5)) and M.split_classes(odd) == (odd, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HOME', os.getcwd())
        processes, folder = start(f'{QUICK} --teacher=teacher.safetensors {SIZE} --stride=50 --out_dir=~/runs/a')
        processes[0].join()
    assert not os.path.exists('~')


# ==== checkpoints of others ====
@pytest.mark.parametrize('config', [
    ADM, PLAIN, ADM | dict(num_classes=10, attention_resolutions=(8,), num_res_blocks=2, channel_mult=(1, 2, 3))])
def test_original_unets_load_by_their_shapes(config, capsys):
    net = fill(M.UNet(**config))
    torch.save({'state_dict': net.state_dict(), 'step': 3}, 'adm.pt')
    state = {f'module.{k}': v for k, v in net.state_dict().items()}
    torch.save({'model': state | {'n_averaged': torch.tensor(3)}}, 'adm.pt')
    known = {'image_size': config['image_size']}
    loaded, diffusion = M.load_denoiser('adm.pt', **known)  # strided ones have the old order of qkv
    assert loaded.config == net.config and diffusion.prediction == 'eps'
    assert diffusion.learn_sigma == (net.config['out_channels'] == 6)
    said = capsys.readouterr().out
    assert 'num_head_channels=32' in said and 'image_size' not in said


def test_what_a_checkpoint_does_not_say():
    net = fill(M.UNet(**ADM))
    torch.save(net.state_dict(), 'adm.pt')
    loaded, _ = M.load_denoiser('adm.pt', num_heads=4)
    assert loaded.middle_block[1].num_heads == 4
    loaded, d = M.load_denoiser('adm.pt', rescale_timesteps=True, steps=4000)
    x, t = wave(1, 3, 32, 32), torch.tensor([2000])
    assert d.T == 4000 and torch.equal(loaded(x, t), net.eval()(x, t // 4))
    for wrong in (dict(in_channels=4), dict(depth=3)):
        with pytest.raises(M.UserError):
            M.load_denoiser('adm.pt', **wrong)
    torch.save(M.UNet(**ADM | dict(in_channels=6, out_channels=3)).state_dict(), 'sr.pt')
    with pytest.raises(M.UserError, match='super-resolution'):
        M.load_denoiser('sr.pt')
    classifier = {k: v for k, v in net.state_dict().items() if not k.startswith('output_blocks')}
    torch.save(classifier, 'noisy.pt')
    with pytest.raises(M.UserError, match='no denoiser'):
        M.load_denoiser('noisy.pt')
    torch.save({'generator': net.state_dict(), 'discriminator': {}}, 'two.pt')
    with pytest.raises(M.UserError, match='generator'):
        M.load_denoiser('two.pt')


def test_ldm_and_dit_checkpoints():
    net = fill(M.UNet(**PLAIN))
    betas = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000, dtype=torch.float64) ** 2
    state = {'betas': betas, 'first_stage_model.x': torch.zeros(1)}
    for k, v in net.state_dict().items():
        state['model.diffusion_model.' + k] = torch.zeros_like(v)
        state['model_ema.diffusion_model' + k.replace('.', '')] = v
    torch.save({'state_dict': state}, 'ldm.ckpt')
    loaded, d = M.load_denoiser('ldm.ckpt')
    assert loaded.config == net.config and not d.clip
    assert torch.equal(loaded.out[2].weight, net.out[2].weight)
    wanted = M.Diffusion('sqrt_linear', beta_range=(0.0015, 0.0195)).alpha_bar
    assert np.allclose(d.alpha_bar[:-1], wanted[:-1])
    dit = fill(M.DiT(8, hidden_size=64, depth=2, num_heads=4, num_classes=10))
    torch.save({'ema': dit.state_dict(), 'model': dit.state_dict()}, 'dit.pt')
    loaded, d = M.load_denoiser('dit.pt', num_heads=4)
    assert loaded.config == dit.config and d.learn_sigma


PUBLISHED = [
    ('resnet34', []), ('wrn40_2', []), ('vgg16', []), ('resnet50', []),
    ('resnet34', [('.shortcut.', '.downsample.'), ('linear.', 'fc.')]),  # timm's names
    ('resnet20', [('fc.', 'linear.'), ('', 'module.', 1)])]  # the paper's shortcuts, of CIFAR


@pytest.mark.parametrize('name, renamed', PUBLISHED)
def test_published_classifiers_load_by_their_shapes(name, renamed):
    net = fill(M.classifier(name, 10, **{'shortcut': 'pad'} if name == 'resnet20' else {}))
    state = net.state_dict()
    for change in renamed:
        state = {k.replace(*change): v for k, v in state.items()}
    torch.save({'state_dict': state, 'best_prec1': 91.7}, 'c.pth')
    loaded = M.load_classifier('c.pth', image_size=64)
    assert loaded.image_size == 64
    assert loaded.mean[0] == (0.485 if name == 'resnet20' else 0.4914)
    assert torch.equal(loaded(wave(2, 3, 32, 32)), net(wave(2, 3, 32, 32)))
    torch.save({'model_state_dict': {f'_orig_mod.{k}': v for k, v in state.items()}}, 'c.pth')
    assert torch.equal(M.load_classifier('c.pth')(wave(2, 3, 32, 32)), net(wave(2, 3, 32, 32)))


def test_a_stem_with_a_max_pool():
    net = fill(M.classifier('resnet18', max_pool=True))
    torch.save(net.state_dict(), 'c.pth')
    x = wave(2, 3, 32, 32)
    assert torch.equal(M.load_classifier('c.pth', max_pool=True)(x), net(x))
    assert not torch.equal(M.load_classifier('c.pth')(x), net(x))


def test_torchvision_classifiers():
    import torchvision
    net = torchvision.models.resnet18(num_classes=5).eval()
    torch.save(net.state_dict(), 'r.pth')
    loaded, x = M.load_classifier('r.pth'), wave(1, 3, 64, 64)
    logits, maps = loaded.forward_features(x)
    assert torch.equal(logits, net(x)) and [m.shape[1] for m in maps] == [64, 128, 256, 512]
    assert loaded.image_size == 224


def test_own_files_describe_themselves():
    net = M.UNet(28, 1, 2, 20, 1, (1, 2), (7,), num_head_channels=20, patch_size=2)
    d = M.Diffusion('linear', 100, 'v')
    M.save_model(fill(net), 'a.safetensors', d)
    loaded, d2 = M.load_denoiser('a.safetensors')
    assert [d2.config, loaded.config] == json.loads(json.dumps([d.config, net.config]))
    x, t = wave(2, 1, 28, 28), torch.tensor([3, 70])
    assert torch.equal(loaded(x, t), net(x, t)) and os.listdir() == ['a.safetensors']
    net.out[2].bias.data[0] = float('nan')
    with pytest.raises(M.UserError, match='not finite'):
        M.save_model(net, 'a.safetensors', d)


# ==== diffusers ====
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
    attention = 'DownBlock2D AttnDownBlock2D', 'AttnUpBlock2D UpBlock2D'
    pixels = net(D.UNet2DModel, *attention, **rgb)
    upscaler = net(D.UNet2DModel, *attention, **rgb | dict(in_channels=6))
    latents = net(D.UNet2DModel, 'DownBlock2D DownBlock2D', 'UpBlock2D UpBlock2D', **unet)
    coder = ('DownEncoderBlock2D DownEncoderBlock2D', 'UpDecoderBlock2D UpDecoderBlock2D')
    kl = net(D.AutoencoderKL, *coder, latent_channels=4, scaling_factor=0.5)
    vq = net(D.VQModel, *coder, latent_channels=4, num_vq_embeddings=32, scaling_factor=0.3)
    cross = 'CrossAttnDownBlock2D DownBlock2D', 'UpBlock2D CrossAttnUpBlock2D'
    conditional = net(D.UNet2DConditionModel, *cross, cross_attention_dim=16, **unet)
    consistent = net(D.UNet2DConditionModel, *cross, cross_attention_dim=16, time_cond_proj_dim=8, **unet)
    dit = D.DiTTransformer2DModel(
        2, 8, 4, 8, 1, sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_elementwise_affine=False)
    sd3 = D.SD3Transformer2DModel(
        8, 2, 4, 1, 8, 4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        out_channels=4, pos_embed_max_size=8)
    linear = dict(clip_sample=False, beta_schedule='scaled_linear')
    v = D.DDIMScheduler(**linear, prediction_type='v_prediction')
    linear = D.DDIMScheduler(**linear)
    cosine = D.DDIMScheduler(beta_schedule='squaredcos_cap_v2')
    shifted = D.AutoencoderKL(**kl.config | {'shift_factor': 0.1})
    flow = D.FlowMatchEulerDiscreteScheduler(shift=3.0)
    texts = [H.CLIPTextModelWithProjection(clip), tokenizer] * 2
    encoder = H.CLIPTextModel(clip)
    unsafe = dict(requires_safety_checker=False)
    pipelines = {
        'ddpm': D.DDPMPipeline(pixels, cosine),
        'upscaler': D.DDPMPipeline(upscaler, cosine),
        'ldm': D.LDMPipeline(vq, latents, linear),
        'dit': D.DiTPipeline(dit, kl, linear),
        'sd': D.StableDiffusionPipeline(kl, encoder, tokenizer, conditional, v, None, None, **unsafe),
        'lcm': D.StableDiffusionPipeline(kl, encoder, tokenizer, consistent, v, None, None, **unsafe),
        'sd3': D.StableDiffusion3Pipeline(sd3, flow, shifted, *texts, H.T5EncoderModel(t5), tokenizer),
        'tiny_vae': D.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))}
    for name, pipe in pipelines.items():
        pipe.save_pretrained(folder / name)
    D.LDMPipeline(vq, latents, linear).to(torch.float16).save_pretrained(folder / 'half', variant='fp16')
    net = M.classifier('wrn16_1', 4, image_size=16)
    M.save_model(net, f'{folder}/classifier.safetensors')
    (folder / 'names.txt').write_text('one\ntwo\nthree\nfour\n')
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / 'images.npz', arr_0=images)
    for name, part in TEACHERS.items():  # students: the teachers' classes
        shutil.copy(folder / name / part / 'config.json', folder / f'{name}.json')
    return folder


TEACHERS = {'ddpm': 'unet', 'ldm': 'unet', 'dit': 'transformer', 'sd': 'unet', 'sd3': 'transformer'}


@pytest.fixture
def pipelines(pipeline_models, own_folder):
    for path in pipeline_models.iterdir():
        os.symlink(path, path.name)


def sampled(folder, steps=2, **call):
    """Images that diffusers draws from a pipeline."""
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(folder)
    return pipe(num_inference_steps=steps, output_type='np', **call).images


@pytest.mark.parametrize('name', TEACHERS)
def test_pipelines_sample_what_diffusers_samples(name, pipelines):
    from diffusers import DDIMPipeline, DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(name)
    if name != 'sd3':
        pipe.scheduler.register_to_config(steps_offset=0, set_alpha_to_one=True)
    net, diffusion = M.load_denoiser(name)
    noise = torch.randn(1, net.in_channels, net.image_size, net.image_size)
    y, kw = None, {}
    if name == 'ddpm':
        pipe = DDIMPipeline(pipe.unet, pipe.scheduler)
        kw = dict(use_clipped_model_output=True)
    elif name == 'dit':
        y, kw = torch.tensor([7]), dict(class_labels=[7], guidance_scale=3.)
    elif name in ('sd', 'sd3'):
        net.set_prompts(['a dog', 'a cat'])
        y, kw = torch.tensor([1]), dict(prompt=['a cat'], guidance_scale=3., latents=noise)
    if name == 'sd3':
        kw['sigmas'] = [(t + 1) / 1000 for t in M.sampling_steps(1000, 5, 'leading')]
    with pytest.MonkeyPatch.context() as patch:  # they draw their noise: give them ours
        module = sys.modules[type(pipe).__module__]
        patch.setattr(module, 'randn_tensor', lambda *_, **__: noise.clone(), raising=False)
        theirs = pipe(num_inference_steps=5, output_type='np', **kw).images
    ours = M.decode(net, M.sample(net, diffusion, noise, 5, 'ddim', y, 3., spacing='leading'))
    ours = ((ours + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() < 1e-4 and ours.std() > 0


MORE = {'dit': '--guidance=2.0 --uncond_prob=0.2 --student_prediction=teacher',
        'sd': '--prompts=names.txt --guidance=2.0',
        'sd3': '--prompts=names.txt --guidance=2.0 --student_prediction=teacher'}


def test_students_of_diffusers_go_back_to_diffusers(pipelines):
    """Each kind of teacher, a student of its class: as a pipeline it is the same network."""
    def one(name):
        file = f'o_{name}/student.safetensors'
        out = run(f'{QUICK} --teacher={name} --student={name}.json {MORE.get(name, "")} --out_dir=o_{name}')
        run(re.search('for diffusers: python (.*)', out)[1])
        call = {'dit': dict(class_labels=[3]), 'sd': dict(prompt='one'), 'sd3': dict(prompt='one')}
        assert np.isfinite(sampled(f'o_{name}/pipeline', **call.get(name, {}))).all()
        made = []
        for spec in (file, f'o_{name}/pipeline'):
            net, diffusion = M.load_denoiser(spec)
            assert diffusion.prediction == {'dit': 'eps', 'sd3': 'flow'}.get(name, 'v')
            assert net.guided == (name in MORE)
            if net.condition == 'text':
                net.set_prompts(['one', 'two'])
            x, t = wave(1, net.in_channels, net.image_size, net.image_size), torch.tensor([300])
            made.append(M.decode(net, diffusion.predict_x0(net(x, t, t * 0), x, t)))
        assert made[0].shape == (1, 3, 16, 16) and torch.allclose(*made, atol=1e-5)
    at_once(one, TEACHERS)
    args = f'{FID} --models=o_ddpm/student.safetensors,o_sd/student.safetensors --prompts=names.txt'
    run(f'{args} --num_samples=8 --steps=2 --out_dir=eval')
    assert len(metrics('eval')) == 2


def test_few_step_students_in_diffusers(pipelines, tiny_models):
    """The file says how it is sampled; diffusers samples the same images with as many steps."""
    from diffusers import DiffusionPipeline
    config = json.load(open('ddpm.json')) | dict(in_channels=1, out_channels=1)
    json.dump(config, open('grey.json', 'w'))
    run(f'{QUICK} --method=jumps --jumps=2 --walks=8 --walk_steps=4 --student=grey.json --stride=50 '
        f'--teacher={tiny_models}/teacher.safetensors --out_dir=o')
    net, diffusion = M.load_denoiser('o/student.safetensors')
    assert net.sampling == dict(sampler='ddim', steps=2, spacing='trailing') and not diffusion.clip
    run('export.py --model=o/student.safetensors --out_dir=p')
    pipe = DiffusionPipeline.from_pretrained('p')
    noise = torch.randn(2, 1, 16, 16)
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[type(pipe).__module__]
        patch.setattr(module, 'randn_tensor', lambda *_, **__: noise.clone())
        theirs = pipe(2, num_inference_steps=2, output_type='np').images
    ours = M.sample(net, diffusion, noise, 2, 'ddim')
    ours = ((ours + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() < 1e-4 and ours.std() > 0
    run(f'eval_fid.py --models=o/student.safetensors --num_samples=8 --reference={tiny_models}/images.npz '
        f'--features={tiny_models}/classifier.safetensors --out_dir=e')
    assert metrics('e')[0]['steps'] == 2 and metrics('e')[0]['passes'] == 2


def test_students_of_latents_keep_their_vae(pipelines):
    ours = "--student=dit --student_config={'hidden_size':16,'depth':1,'num_heads':2}"
    half = f'{QUICK} {ours} --teacher=half --out_dir=latent'
    at_once(run, [half, f'{QUICK} {ours} --teacher=sd3 --prompts=names.txt --out_dir=text --method=jumps '
                        '--walks=4 --walk_steps=2'])
    run(f'{QUICK} {ours} --teacher=latent/student.safetensors --out_dir=again')
    run(f'{FID} --models=latent/student.safetensors --num_samples=4 --steps=2')
    for name in ('latent', 'text', 'again'):
        net, _ = M.load_denoiser(f'{name}/student.safetensors')
        assert M.decode(net, torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)


def test_what_diffusers_has_and_we_do_not(pipelines):
    for name, message in (('upscaler', 'super-resolution'), ('lcm', 'time_cond_proj_dim')):
        with pytest.raises(M.UserError, match=message):
            M.load_denoiser(name)


UNETS = ['UNet(16, 3, 6, 32, 2, (1, 2, 2), (8,), num_head_channels=16)',
         'UNet(16, 3, 6, 32, 1, (1, 2), (16, 8), num_classes=4)',
         'UNet(16, 3, 3, 32, 1, (1, 2), (8,), use_scale_shift_norm=False, resblock_updown=False)',
         'DiT(8, 2, 4, 32, 1, 2, num_classes=5, learn_sigma=False)']


@pytest.mark.parametrize('make', UNETS)
@torch.no_grad()
def test_our_networks_in_diffusers(make):
    import diffusers
    net = eval(f'M.{make}')
    position = {k: v.clone() for k, v in net.state_dict().items() if k == 'pos_embed'}
    fill(net).load_state_dict(position, strict=False)
    x, t = wave(2, net.in_channels, net.image_size, net.image_size), torch.tensor([3, 40])
    y = torch.tensor([1, -1]) if net.num_classes else None
    kw = {} if y is None else {'class_labels': torch.where(y < 0, net.num_classes, y)}
    ours = net(x, t, y)
    learn_sigma = ours.shape[1] > x.shape[1]
    diffusion = M.Diffusion('linear', prediction='v', learn_sigma=learn_sigma, clip=False)
    M.save_model(net, 'net.safetensors', diffusion)
    run('export.py --model=net.safetensors --out_dir=o')
    kind, part = 'UNet2DModel', 'unet'
    if isinstance(net, M.DiT):
        kind, part = 'DiTTransformer2DModel', 'transformer'
    theirs = getattr(diffusers, kind).from_pretrained('o', subfolder=part)(x, timestep=t, **kw).sample
    # diffusers' DiT has slightly other frequencies of t
    assert (ours - theirs).norm() < (1e-4 if part == 'unet' else 5e-4) * ours.norm()
    assert os.path.exists('o/model_index.json') == (not net.num_classes)


# ==== synthesize.py ====
def test_every_kind_of_prior(pipelines):
    at_once(run, [f'{SYNTH} --num_images=8 --batch_size=4 --keep=1 {args}' for args in (
        '--prior=sd --prompt=x --class_names=names.txt --guidance=2.0 --edit=paper --grad_batch=2 --out_dir=a',
        '--prior=dit --guidance=2.0 --edit=x_t --lca=traditional --out_dir=b',
        '--prior=none --steps=3 --flip=True --out_dir=c',
        '--prior=sd --teacher=vae:sd --alpha=0.1 --lca=none --out_dir=d',
        '--prior=ldm --teacher=vae:tiny_vae --alpha=0 --lca=none --sampler=ddim --out_dir=e')])
    assert M.load_images('a')[1].max() == 3 and M.load_images('d')[1] is None


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


def test_inversion_step_of_the_paper(tiny):
    """Eqs. (4)-(10) by hand: every loss that the script logs over three steps, and the images it keeps."""
    torch.manual_seed(0)
    net = M.UNet(16, 1, 1, 16, 1, (1, 2), (4,), num_head_channels=16).eval()
    torch.nn.init.normal_(net.out[2].weight, std=0.02)
    M.save_model(net, 'prior.safetensors', M.Diffusion('linear', 100, 'eps', False, clip=False))
    student = M.classifier('resnet8', 4, image_size=16, in_channels=1, width=4)
    M.save_model(student, 'student.safetensors')
    run(f'{SYNTH} --prior=prior.safetensors --student=student.safetensors --edit=paper --eta=4.0 '
        '--alpha=0.1 --beta=1.0 --gamma=0.5 --tau=2.0 --sampler=renoise --lca=none --steps=3 --keep=3 '
        '--grad_batch=3 --num_images=24 --dtype=float32 --out_dir=o')
    images, labels = M.load_images('o')
    f_t = M.load_classifier('classifier.safetensors')
    f_s = M.load_classifier('student.safetensors')
    noted = synthesize.BatchNormInputs(f_t)
    g = torch.Generator().manual_seed(0)
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
        x = ((z - b * eps) / a).clamp(-1, 1) / 2  # Eq. (4); mean and deviation 0.5 of [0, 1]
        p_t, p_s = f_t(2 * x), f_s(2 * x)
        L_bn = synthesize.bn_distance(noted.inputs)  # Eq. (6)
        L_cls = -p_t.log_softmax(1)[range(8), y].mean()  # Eq. (7)
        log_T, log_S = (p_t / 2).log_softmax(1), (p_s / 2).log_softmax(1)
        L_adv = -(log_T.exp() * (log_T - log_S)).sum(1).mean()  # Eq. (8)
        L = 0.1 * L_bn + L_cls + 0.5 * L_adv  # Eq. (9)
        for name, value in (('bn', L_bn), ('cls', L_cls), ('adv', L_adv), ('loss', L)):
            assert log('o')[name][i] == pytest.approx(value.item(), rel=2e-4, abs=1e-6), (name, i)
        z = z - 4.0 * torch.autograd.grad(L, z)[0]  # Eq. (10)
        x0 = (z - b * eps) / a
        kept = images[8 * i:8 * i + 8].int()
        assert (kept - M.to_uint8(x0).int()).abs().max() <= 1
        if s is not None:
            z = alpha_bar[s].sqrt() * x0 + (1 - alpha_bar[s]).sqrt() * noise[i]  # Eq. (5)


def test_bn_distance_has_the_closed_form():
    layer = torch.nn.BatchNorm2d(3)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    x = torch.randn(8, 3, 4, 4)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    l2 = (mean - layer.running_mean).norm() + (var - layer.running_var).norm()
    assert torch.allclose(synthesize.bn_distance({layer: x}), l2)
    q = Normal(mean, (var + layer.eps).sqrt())
    p = Normal(layer.running_mean, (layer.running_var + layer.eps).sqrt())
    assert torch.allclose(synthesize.bn_distance({layer: x}, 'kl'), kl_divergence(q, p).sum())


# ==== distill_classifier.py ====
def test_distilled_classifier(tiny):
    """The student comes to agree with its teacher, and serves the adversarial loss of the next round."""
    out = run(f'{CLASSIFIER} --method=data --width=8 --holdout=0 --epochs=10 --test=images.npz --out_dir=teacher')
    assert 'test accuracy' in out
    assert M.load_classifier('teacher/student.safetensors').num_classes == 4
    args = '--teacher=teacher/student.safetensors --holdout=16 --epochs=20 --test=images.npz'
    run(f'{CLASSIFIER} {args} --out_dir=student', ranks=2)
    table = log('student')
    assert table['kl'][-1] < 0.5 * table['kl'][0] and table['msarc'][-1] < table['msarc'][0]
    assert table['agreement'].max() > 0.7
    assert M.load_classifier('student/best.safetensors').config['width'] == 4
    run(f'{SYNTH} --teacher=teacher/student.safetensors --student=student/student.safetensors --out_dir=adv')
    assert (log('adv')['adv'] <= 0).all()


@pytest.mark.parametrize('teacher, student, last, early', [
    ('resnet34', 'resnet18', 0.00024125850177370012, [7.138987318e-12, 1.8216648676e-11, 5.8608988773e-09]),
    ('resnet20', 'resnet8', 0.0036491036880761385, [5.7058896497e-10, 2.0249897759e-08])])
def test_msarc_has_the_numbers_of_its_source(teacher, student, last, early):
    nets = [fill(M.classifier(name)) for name in (student, teacher)]
    (logits_S, maps_S), (logits_T, maps_T) = (net.forward_features(wave(4, 3, 32, 32)) for net in nets)
    heads = [net.get_submodule(net.head_name) for net in nets]
    found = distill_classifier.msarc_loss(logits_S, maps_S, heads[0], logits_T, maps_T, heads[1])
    assert found.item() == pytest.approx(last + sum(early), rel=1e-4)
    pairs = distill_classifier.pairs_of_stages(maps_S, maps_T)
    c = logits_T.argmax(1)
    cams_S = distill_classifier.grad_cam(logits_S, [maps_S[i] for i, _ in pairs], c)
    cams_T = distill_classifier.grad_cam(logits_T, [maps_T[j] for _, j in pairs], c)
    assert [F.mse_loss(a, b).item() for a, b in zip(cams_S, cams_T)] == pytest.approx(early, rel=1e-3)


# ==== distill_vae.py ====
def test_vae_distillation(tiny):
    cases = ['--max_steps=60', '--method=synthetic --data=images.npz --compile=False',
             "--method=data --data=images.npz --student_config={'width':4} --kl_warmup=3"]
    outs = at_once(run, [f'{VAE} {args} --out_dir=o{i}' for i, args in enumerate(cases)])
    assert log('o0')['out'][-1] < log('o0')['out'][0]
    for i, out in enumerate(outs):
        command = re.search('evaluate: python (.*)', out)[1]
        run(f'{command} --num_samples=8 --reference=images.npz --features=classifier.safetensors')
        assert os.path.exists(f'o{i}/samples.png') and M.load_vae(f'o{i}/student.safetensors').image_size == 16


def test_vaes_of_diffusers(pipelines):
    sizes = {'sd': "{'block_out_channels':(4,8)}", 'tiny_vae': "{'encoder_block_out_channels':(4,4)}"}
    for name, size in sizes.items():
        run(f'distill_vae.py --teacher={name} --method=synthetic --data=images.npz --student_config={size} '
            f'--batch_size=4 --max_steps=2 --log_every=1 --out_dir=o_{name}')
        assert os.path.exists(f'o_{name}/reconstructions.png')
        M.load_vae(f'o_{name}/student')


# ==== eval_fid.py, bench.py ====
def test_a_number_does_not_depend_on_the_ranks(tiny):
    """Against stored statistics a set has no distance from itself; against images there are more numbers."""
    run(f'{FID} --num_samples=64 --save_stats=stats.npz')
    run(f'{FID} --num_samples=64 --reference=stats.npz --models=images.npz,teacher.safetensors --out_dir=e')
    same, drawn = metrics('e')
    assert abs(same['Frechet']) < 1e-6 < 1e-3 < drawn['Frechet'] and 'KID' not in same
    assert drawn['parameters'] > 0 and drawn['MFLOPs'] > 0 and drawn['sampler'] == 'ddim'
    for folder, ranks in (('one', 0), ('two', 2)):
        run(f'{FID} --models=images.npz,classes.safetensors --spacing=even --out_dir={folder}', ranks)
    for one, two in zip(metrics('one'), metrics('two')):
        for k in ('Frechet', 'score', 'precision', 'recall', 'KID', 'EMD', 'MMD', '1-NN'):
            assert one[k] == pytest.approx(two[k], rel=1e-6, abs=1e-9), k
        assert one.get('agreement') == two.get('agreement')
    same, drawn = metrics('one')
    assert drawn['spacing'] == 'even' and 'spacing' not in same
    assert 'agreement' in drawn and same['precision'] == 1


def test_metrics_have_their_definitions():
    g = np.random.default_rng(0)
    a = g.normal(size=(300, 5))
    b = g.normal(size=(200, 5)) * [1, 2, 3, 1, 1] + [0, 0, 0, 2, 0]
    ta, tb = torch.tensor(a), torch.tensor(b)
    s1, s2 = torch.diag(torch.tensor([1., 4., 9.])), torch.diag(torch.tensor([4., 1., 1.]))
    distance, _ = M.frechet_distance(torch.zeros(3), s1, torch.ones(3), s2)
    assert distance == pytest.approx(3 + 1 + 1 + 4, rel=1e-5)  # (sd1 - sd2)^2 summed
    logits = torch.eye(4).repeat_interleave(5, 0) * 100
    assert eval_fid.inception_score(logits) == pytest.approx(4)
    d = np.linalg.norm(a[:, None] - b[None], axis=2)
    assert np.allclose(torch.cat(list(eval_fid.distances(ta, tb))), d, rtol=1e-12)
    balls = [np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), 1)[:, 3] for x in (a, b)]
    wanted = (d.T <= balls[0]).any(1).mean(), (d <= balls[1]).any(1).mean()
    assert eval_fid.precision_recall(ta, tb) == wanted
    ka, kb, kab = ((x @ y.T / 5 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    off = ~np.eye(300, dtype=bool)
    wanted = ka[off].mean() + kb[off[:200, :200]].mean() - 2 * kab.mean()
    assert eval_fid.kid(ta, tb) == pytest.approx(wanted)
    far = eval_fid.two_sample(ta[:200], ta[:200] + 100)
    assert far['1-NN'] == 1 and far['EMD'] == pytest.approx(100 * 5 ** 0.5)


def test_bench():
    args = ("bench.py --student_config={'model_channels':16,'num_res_blocks':1,'channel_mult':(1,2),"
            "'num_head_channels':16,'attention_resolutions':(8,)} --batch_size=4 --repeats=1 --image_size=16")
    out = run(f'{args} --classes=3')
    assert 'of the peak' in out and 'student forward' in out
    assert '(50)' in run(f'{args} --what=sample')


# ==== mistakes, and files that would run code ====
MISTAKES = """
    dkdm.py --rhoo=0.4 : did you mean 'rho'
    dkdm.py --rho=many : rho is float
    dkdm.py --method=best : method is one of
    dkdm.py config/none.py : no config file
    dkdm.py max_steps=3 : no config file
    dkdm.py --teacher=gone.safetensors : no file gone.safetensors
    dkdm.py --teacher=classifier.safetensors : is no denoiser
    dkdm.py --teacher=teacher.safetensors --guidance=2.0 : no classes
    dkdm.py --teacher=teacher.safetensors --student_config.modelchannels=3 : has no 'modelchannels'
    dkdm.py --teacher=teacher.safetensors --student=resnet8 : build()
    dkdm.py --teacher=teacher.safetensors --batch_size=9 --grad_accum=2 : multiple of
    dkdm.py --teacher=teacher.safetensors --method=jumps --jumps=3 : multiple of jumps
    dkdm.py --teacher=teacher.safetensors --method=jumps --student_prediction=eps : jumps
    dkdm.py --method=data : needs images
    dkdm.py --method=data --data=nothing : no images at
    dkdm.py --method=data --data=images.npz --class_cond=True --max_steps=4 --lr=1e30 --grad_clip=0.0 : not finite
    synthesize.py --teacher=classifier.safetensors --prior=classes.safetensors --keep=90 : need more than
    synthesize.py --teacher=teacher.safetensors : is no classifier
    distill_classifier.py --data=images.npz --teacher=classifier.safetensors --student=resnet9 : no classifier
    distill_classifier.py --data=images.npz --teacher=classifier.safetensors --holdout=60 : fewer than a batch
    distill_vae.py --teacher=lvae.safetensors --student_config={'depth':3} : has no 'depth'
    distill_vae.py --teacher=classifier.safetensors : is no VAE
    eval_fid.py : nothing to measure
    eval_fid.py --models=classes.safetensors --features=classifier.safetensors : in the space of
    export.py --model=classes.safetensors --out_dir=. : holds other things"""


def test_a_mistake_is_one_line(tiny):
    def one(line):
        command, _, message = line.partition(' : ')
        assert message in run(command, ok=False), command
    at_once(one, lines(MISTAKES))


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
    os.makedirs('run')
    torch.save(mark, 'run/ckpt.pt')
    Path('raw.pt').write_bytes(pickle.dumps(mark))
    np.savez('a.npz', arr_0=np.array([mark], dtype=object))
    os.makedirs('shards')
    np.savez('shards/images_0000_00000.npz', arr_0=np.zeros((99, 16, 16, 1), np.uint8),
             settings=np.array([mark], dtype=object))
    index = json.loads((pipeline_models / 'ddpm/model_index.json').read_text())
    changes = {'component': {'unet': ['net', 'Net']}, 'class': {'_class_name': ['net', 'Net']}, 'none': {},
               'scheduler': {'scheduler': ['net', 'Net']}, 'weights': {}}
    files = {'component': 'unet/net.py', 'none': 'None.py', 'scheduler': 'scheduler/net.py'}
    for name, change in changes.items():
        shutil.copytree(pipeline_models / 'ddpm', name)
        Path(name, files.get(name, 'net.py')).write_text(f'open({mark.path!r}, "w")\nclass Net: pass\n')
        Path(name, 'model_index.json').write_text(json.dumps(index | change))
    os.remove(glob.glob('weights/unet/*.safetensors')[0])
    torch.save(mark, 'weights/unet/diffusion_pytorch_model.bin')
    net = M.load_denoiser(str(pipeline_models / 'ddpm'))[0]
    M.save_model(net, 'vae.safetensors', M.Diffusion(), vae='component')
    commands = [f'{DKDM} --teacher={name}' for name in [*changes, 'vae.safetensors', 'a.pt', 'a.ckpt', 'raw.pt']]
    commands += [f'{DKDM} --init_from=resume --out_dir=run', f'{DKDM} --method=data --data=a.npz',
                 f'{CLASSIFIER} --teacher=a.pth', f'{CLASSIFIER} --data=shards', f'{VAE} --teacher=a.bin',
                 f'{FID} --models=a.pt', f'{FID} --models=images.npz --features=a.pth']

    def one(command):
        (process,), folder = start(command)
        process.join()
        assert process.exitcode, command
    at_once(one, commands)
    assert not os.path.exists('marker')


def test_pictures_of_any_channels():
    for channels in (1, 2, 3, 5):
        M.save_grid('a.png', [torch.zeros(2, channels, 8, 8)], 2)
        assert Image.open('a.png').size[0] > 100


# ==== what the repository ships ====
def test_imports_run_nothing():
    names = 'dkdm, synthesize, distill_classifier, distill_vae, eval_fid, export, bench'
    code = f'import sys; sys.argv = ["x", "--nothing=1"]; import {names}; assert sys.excepthook is sys.__excepthook__'
    subprocess.run([sys.executable, '-c', code], check=True, env=os.environ | {'PYTHONPATH': ROOT})
    assert os.listdir() == []


def test_help():
    for name in ('dkdm', 'synthesize', 'distill_classifier', 'distill_vae', 'eval_fid', 'export', 'bench'):
        out = run(f'{name}.py --help')
        assert '--out_dir' in out and len(out.splitlines()) > 10


def test_bundled_models():
    """The teacher draws digits that the bundled classifier is sure of, all ten of them."""
    net, diffusion = M.load_denoiser(f'{ROOT}/pretrained/mnist_unet.safetensors')
    classifier = M.load_classifier(f'{ROOT}/pretrained/mnist_resnet.safetensors')
    g = torch.Generator().manual_seed(0)
    x = M.sample(net, diffusion, (64, 1, 28, 28), 50, 'ddpm', spacing='even', generator=g)
    p = classifier(M.preprocess(classifier, x)).softmax(1).max(1)
    assert (p.values > 0.9).float().mean() > 0.85 and len(p.indices.unique()) == 10


def documents():
    for path in [f'{ROOT}/README.md', *glob.glob(f'{ROOT}/*/*.md'), *glob.glob(f'{ROOT}/config/*.py')]:
        yield path, Path(path).read_text()


def settings_of(name):
    """The settings of a script, as its source has them before the configurator."""
    head = Path(ROOT, name).read_text().split('configurator.py')[0]
    found = set(re.findall('^([a-zA-Z]\\w*) = ', head, re.M))
    return found | settings_of('dkdm.py') if name == 'bench.py' else found


def test_documents_name_what_exists():
    """Scripts, configs, settings and linked files of README, docs and the configs' comments."""
    wrong, commands = [], 0
    for path, text in documents():
        where = os.path.relpath(path, ROOT)
        for link in re.findall(r'\]\(([^)#]+)[)#]', text):
            if '://' not in link and not os.path.exists(os.path.join(os.path.dirname(path), link)):
                wrong.append(f'{where}: no {link}')
        for name in re.findall(r'(?<![\w/])(?:config|pretrained|assets|docs)/[\w.]+\w', text):
            if not os.path.exists(os.path.join(ROOT, name)) and '.' in name:
                wrong.append(f'{where}: no {name}')
        text = text.replace('\\\n', ' ')
        for script, rest in re.findall(r'(?:python|=\d|\()\s?(\w+\.py)((?: [^\n`|;&]*)?)', text):
            if not os.path.exists(os.path.join(ROOT, script)) or 'configurator' not in Path(ROOT, script).read_text():
                continue
            commands += 1
            known = settings_of(script)
            for key in re.findall(r'\s--(\w+)[.=]', rest):
                if key not in known:
                    wrong.append(f'{where}: {script} has no --{key}')
    assert not wrong and commands > 50, '\n'.join(wrong)


def test_configs_parse(tiny):
    """Every config runs up to the teacher or the images that it needs."""
    scripts = {'dkdm': 'dkdm', 'synth': 'synthesize', 'vae': 'distill_vae', 'distill': 'distill_classifier',
               'teacher': 'distill_classifier'}
    names = {'cifar10_resnet': 'distill_classifier', 'mnist_classifier': 'distill_classifier',
             'mnist_lvae': 'distill_vae'}

    def one(path):
        name = os.path.basename(path)[:-3]
        script = names.get(name) or scripts.get(name.split('_')[0], 'dkdm')
        out = run(f'{script}.py {path} --help')
        assert '--out_dir' in out
        values = {}
        exec(Path(path).read_text(), values)
        odd = {k for k in values if not k.startswith('_')} - settings_of(f'{script}.py')
        assert not odd, (name, odd)
    at_once(one, sorted(glob.glob(f'{ROOT}/config/*.py')))
